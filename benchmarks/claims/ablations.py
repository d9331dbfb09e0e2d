"""What users ask: which estimate, how often, which scope, from when on, with or without decay and dropout.

One change at a time from fixed, untuned settings (kappa 2, gamma 0.8, K = 10), so this compares variants of IRE with
each other, not IRE with a tuned baseline: `noisy labels` is SGD-IRE on the digits (lr 0.3, decay 3e-3, on after 30 %
of 300 steps), `bytes` AdmIRE on the standard library's text (lr 9.6e-3, decay 0.1, on after the warm-up, 300 steps).
Differences are paired by seed; their 95 % intervals in the tables are not corrected for the number of variants.
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from claims._inverted import InvertedFisher
from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import train_digits, train_text
from lightning_ire import IRE, EmpiricalFisher, HutchinsonHessian, RandomMask, SampledFisher, SecondMoment
from lightning_ire.compare.statistics import Difference, holm, interval, paired

QUESTION = "Which of IRE's settings matter?"
DEFAULT = "SampledFisher(), K = 10, global"
NONE = "no IRE (kappa = 0)"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    NONE: {"kappa": 0.0},
    "gamma = 1 (a longer step)": {"gamma": 1.0},
    "RandomMask()": {"curvature": RandomMask()},
    "inverted mask": {"curvature": InvertedFisher()},
    "SampledFisher(fraction=0.25)": {"curvature": SampledFisher(fraction=0.25)},
    "SampledFisher(form='micro_batch', micro_batch_size=4)": {
        "curvature": SampledFisher(form="micro_batch", micro_batch_size=4)
    },
    "SampledFisher(form='sample')": {"curvature": SampledFisher(form="sample")},
    "EmpiricalFisher()": {"curvature": EmpiricalFisher()},
    "HutchinsonHessian()": {"curvature": HutchinsonHessian()},
    "SecondMoment()": {"curvature": SecondMoment()},
    "beta = 0.9": {"beta": 0.9},
    "K = 1": {"interval": 1},
    "K = 50": {"interval": 50},
    "one mask for the whole run": {"interval": 10**6},
    "scope = 'tensor'": {"scope": "tensor"},
    "on from the first step": {"start_step": None},
    "on after 60 %": {"start_step": 0.6},
    "on after 90 %": {"start_step": 0.9},
}
TASKS = {
    "noisy labels": ("test_accuracy", 100, 2, 1),
    "bytes": ("test_loss", 1, 3, -1),
}  # value, factor, digits, better
CELLS = [(decay, dropout) for decay in (0.0, 0.1) for dropout in (0.0, 0.1)]  # on the text
SEEDS = {"default": {"noisy labels": 5}, "full": {"noisy labels": 20, "bytes": 8}, "tiny": dict.fromkeys(TASKS, 2)}


def _tasks(runs: Runs) -> list[str]:
    return [task for task in TASKS if runs.where(task=task)]


def _variants(task: str) -> list[str]:
    """SGD has no second moment."""
    return [name for name in VARIANTS if task == "bytes" or name != "SecondMoment()"]


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    steps = 50 if size == "tiny" else 300
    planned: list[dict[str, Any]] = []
    for task, seeds in SEEDS[size].items():
        variants = _variants(task)[: 3 if size == "tiny" else None]
        planned += [
            {"task": task, "variant": name, "steps": steps, "seed": seed} for name in variants for seed in range(seeds)
        ]
    planned += [
        {"task": "bytes", "variant": name, "decay": decay, "dropout": dropout, "steps": steps, "seed": seed}
        for decay, dropout in CELLS
        for name in (DEFAULT, NONE)
        if (decay, dropout) != (0.1, 0.0)  # has been planned above
        for seed in range(SEEDS[size].get("bytes", 0))
    ]
    return planned


def measure(settings: Settings) -> Result:
    digits = settings["task"] == "noisy labels"
    arguments = {"kappa": 2.0, "gamma": 0.8, "start_step": 0.3 if digits else 0.1, **VARIANTS[settings["variant"]]}
    ire = IRE(**arguments)
    if digits:
        return train_digits("noisy labels", settings["seed"], settings["steps"], 0.3, 3e-3, ire=ire)
    result = train_text(
        "bytes",
        settings["seed"],
        settings["steps"],
        9.6e-3,
        weight_decay=settings.get("decay", 0.1),
        dropout=settings.get("dropout", 0.0),
        ire=ire,
    )
    return {name: value for name, value in result.items() if name != "curve"}


def _values(runs: Runs, task: str, variant: str, **cell: float) -> dict[int, float]:
    """By seed."""
    value = TASKS[task][0]
    found = runs.where(task=task, variant=variant, **cell)
    return {s["seed"]: r[value] for s, r in found if cell or "decay" not in s}


def _gains(runs: Runs, task: str, base: str) -> dict[str, Difference]:
    """What each variant gains on a base: positive is better."""
    sign = TASKS[task][3]
    values = {name: {s: sign * v for s, v in _values(runs, task, name).items()} for name in _variants(task)}
    return {name: paired(values[name], values[base]) for name in values if name != base}


def verdict(runs: Runs) -> Verdict:
    brief, said = [], []
    for task in _tasks(runs):
        _, factor, digits, _ = TASKS[task]
        gains = {name: one for name, one in _gains(runs, task, DEFAULT).items() if name != NONE}
        adjusted = holm([one.p for one in gains.values()])
        clear = {name: one for (name, one), p in zip(gains.items(), adjusted, strict=True) if p < 0.05}
        listed = ", ".join(f"{name} {one.show(digits, factor)}" for name, one in clear.items()) or "none"
        base = _gains(runs, task, NONE)[DEFAULT]
        said.append(f"{task}: default against no IRE {base.show(digits, factor)}; differ from the default: {listed}")
        better, worse = ([name for name in clear if sign * clear[name].mean > 0] for sign in (1, -1))
        brief.append(
            f"{task}: the default gains {base.show(digits, factor)} on no IRE; better than the default: "
            f"{', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}"
        )
    return Verdict(
        "measured",
        "At fixed, untuned settings. " + ". ".join(brief) + " (after Holm's correction).",
        ". ".join(said) + " (positive is better; p < 0.05 after Holm's correction for the number of variants).",
    )


def tables(runs: Runs) -> str:
    parts = []
    for task in _tasks(runs):
        value, factor, digits, _ = TASKS[task]
        against = {base: _gains(runs, task, base) for base in (NONE, DEFAULT)}
        rows = []
        for name in _variants(task):
            own = interval([factor * one for one in _values(runs, task, name).values()])
            gains = [found[name].show(digits, factor) if name in found else "" for found in against.values()]
            rows.append([f"`{name}`" if "(" in name and name != NONE else name, f"{own.mean:.{digits}f}", *gains])
        pairs = len(_values(runs, task, NONE))
        unit = f"{task}, {pairs} seeds: {value.replace('_', ' ')}{', %' if factor == 100 else ', nats'}"
        parts.append(table(["variant", unit, "gain on no IRE", "gain on the default"], rows))
    if "bytes" not in _tasks(runs):
        return "\n\n".join(parts)
    rows = []
    for decay, dropout in CELLS:
        cell = {} if (decay, dropout) == (0.1, 0.0) else {"decay": decay, "dropout": dropout}
        treated, base = (_values(runs, "bytes", name, **cell) for name in (DEFAULT, NONE))
        means = [f"{interval(list(each.values())).mean:.3f}" for each in (base, treated)]
        gain = paired(base, treated)
        rows.append([f"{decay:g}", f"{dropout:g}", *means, gain.show(3)])
    parts.append(table(["bytes: weight decay", "dropout", "AdamW, test loss", "AdmIRE", "gain"], rows))
    return "\n\n".join(parts)


def draw(runs: Runs) -> None:
    tasks = _tasks(runs)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(2 + 5 * len(tasks), 5), layout="constrained", sharey=True, squeeze=False
    )
    names = [name for name in VARIANTS if name != DEFAULT]
    for axis, task in zip(axes[0], tasks, strict=True):
        factor = TASKS[task][1]
        gains = _gains(runs, task, DEFAULT)
        for row, name in enumerate(names):
            if name in gains:
                one = gains[name]
                colour = "tab:green" if one.mean > one.half else "tab:red" if one.mean < -one.half else "tab:blue"
                axis.errorbar(factor * one.mean, row, xerr=factor * one.half, fmt="o", color=colour, capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        unit = "points of test accuracy" if factor == 100 else "nats of test loss"
        axis.set(title=task, xlabel=f"gain on the default, {unit} (right is better)", ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(FIGURES / "ablations.png", dpi=100)
    plt.close(figure)
