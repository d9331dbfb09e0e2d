"""Figures 3 and 4 and Table 6 in small: AdamW against AdmIRE and its controls on the standard library's text.

Every method gets 10 trials, on one seed that is not reported: AdamW ten learning rates; AdmIRE and the controls five
learning rates times two kappas, gamma 0.8 (the default size: 8, four times two). Trials are ranked by validation loss,
reported is the loss on test text (it depends little on which: both are texts of the same library). Differences are
paired by seed (weights, order of text).

- `gamma = 1`: all coordinates are flat, so only the step is longer.
- `random mask`, `inverted mask`: as many coordinates are boosted, but random ones, or the sharpest ones.
- `decay not boosted`: AdmIRE with `scale_weight_decay=False`. `decay alone boosted`: nothing but the decay is.

The controls' learning rates are fewer than AdamW's, and so are AdmIRE's: that is the price of one more setting at
equal effort.

Steps to AdamW's final loss: the first evaluation (every 25 steps) at which a run's validation loss is at or below the
final one of AdamW with the same seed. As the learning rate falls over the run, a method that is a little better gains
few steps this way; so AdamW and AdmIRE are also trained with half the steps, as in the paper.
Tr F at equal loss: both curves of Tr F (8 draws on 16 training sequences) at the higher of the two final validation
losses, interpolated.

`unclipped`: no gradient clipping and a run 2.5 times as long, meant to be limited by stability, where IRE should win by
the paper's theory. The trials show how far it is: AdamW loses from its best learning rate on, with clipping or without.

A 2-layer Transformer of width 64 (133,121 parameters for bytes), 1,024 tokens per step, warm-up 10 % (IRE starts at
its end), cosine to a twentieth, betas 0.9 and 0.95, weight decay 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt

from claims._inverted import InvertedFisher
from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import TEXT, train_text
from lightning_ire import IRE, RandomMask
from lightning_ire.compare.statistics import Difference, interval, paired

QUESTION = "Figures 3 and 4: does AdmIRE train language models faster than tuned AdamW, and because of flatness?"
ADMIRE: dict[str, dict[str, Any]] = {  # arguments of IRE, beside kappa and gamma
    "AdmIRE": {},
    "gamma = 1": {"gamma": 1.0},
    "random mask": {"curvature": RandomMask},
    "inverted mask": {"curvature": InvertedFisher},
    "decay not boosted": {"scale_weight_decay": False},
    "decay alone boosted": {"scale_weight_decay": "only"},
}
CONTROLS = ["gamma = 1", "random mask", "inverted mask"]
GAMMA = 0.8
TUNING_SEED = 1000
WIDE = [2.4e-3, 4.8e-3, 9.6e-3, 1.36e-2, 1.92e-2, 2.7e-2, 3.84e-2, 7.7e-2]  # of AdamW
COARSE = [4.8e-3, 9.6e-3, 1.92e-2, 3.84e-2]  # of the others, each with two kappas
BETWEEN = [6.8e-3], [6.8e-3, 1.15e-2]  # not in the default size: of the others; of AdamW
TASKS: dict[str, dict[str, Any]] = {
    "bytes": {"tokenizer": "bytes", "steps": 600, "clip": 1.0, "methods": ["AdamW", *ADMIRE], "kappas": (1.0, 3.0)},
    "bpe": {
        "tokenizer": "bpe", "steps": 600, "clip": 1.0, "kappas": (1.0, 3.0),
        "methods": ["AdamW", "AdmIRE", "random mask"],
    },
    "unclipped": {
        "tokenizer": "bytes", "steps": 1500, "clip": None, "kappas": (1.0, 3.0),
        "methods": ["AdamW", "AdmIRE", "gamma = 1"],
    },
}  # fmt: skip
SEEDS = {"default": {"bytes": 3}, "full": {"bytes": 8, "bpe": 6, "unclipped": 4}, "tiny": {"bytes": 2}}


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    planned = []
    for task, seeds in SEEDS[size].items():
        for method in TASKS[task]["methods"]:
            trials = [
                {"task": task, "method": method, **point, "steps": _steps(size, task), "seed": TUNING_SEED}
                for point in _points(task, method, size)[: 2 if size == "tiny" else None]
            ]
            planned += trials
            if all(trial in runs for trial in trials):
                best = chosen(runs, task, method)
                planned += [{**best, "seed": seed} for seed in range(seeds)]
                if size == "full" and task == "bytes" and method in ("AdmIRE", *CONTROLS):
                    planned += [{**chosen(runs, task, method, COARSE), "seed": seed} for seed in range(seeds)]
                if task == "bytes" and method in ("AdamW", "AdmIRE"):
                    planned += [{**best, "seed": seed, "steps": best["steps"] // 2} for seed in range(seeds)]
    return planned


def _tasks(runs: Runs) -> list[str]:
    return [task for task in TASKS if runs.where(task=task)]


def _steps(size: str, task: str) -> int:
    return 2 * TEXT["every"] if size == "tiny" else TASKS[task]["steps"]


def _points(task: str, method: str, size: str) -> list[dict[str, float]]:
    """Learning rates, and kappas: as many points for every method."""
    others, base = BETWEEN if size == "full" else ([], [])
    if method == "AdamW":
        return [{"lr": lr} for lr in [*WIDE, *base]]
    return [{"lr": lr, "kappa": kappa} for lr in [*COARSE, *others] for kappa in TASKS[task]["kappas"]]


def make_ire(settings: Settings) -> IRE | None:
    """The callback of a method; none for AdamW."""
    if settings["method"] == "AdamW":
        return None
    more = {"gamma": GAMMA, **ADMIRE[settings["method"]]}
    if "curvature" in more:
        more["curvature"] = more["curvature"]()
    return IRE(settings["kappa"], start_step=0.1, **more)


def measure(settings: Settings) -> Result:
    task, every = TASKS[settings["task"]], TEXT["every"]
    return train_text(
        task["tokenizer"],
        settings["seed"],
        settings["steps"],
        settings["lr"],
        clip=task["clip"],
        every_trace=0 if settings["seed"] == TUNING_SEED else every * max(1, settings["steps"] // 8 // every),
        ire=make_ire(settings),
    )


def chosen(runs: Runs, task: str, method: str, rates: Sequence[float] = ()) -> dict[str, Any]:
    """The settings that are best in validation, without a seed; among the trials with these learning rates, if any."""
    trials = [
        trial
        for trial in runs.where(task=task, method=method, seed=TUNING_SEED)
        if not rates or trial[0]["lr"] in rates
    ]
    best, _ = min(trials, key=lambda trial: trial[1]["val_loss"])
    return {name: value for name, value in best.items() if name != "seed"}


def results(runs: Runs, task: str, method: str, share: int = 1, rates: Sequence[float] = ()) -> dict[int, Result]:
    """Results by reporting seed, of runs with 1 / `share` of the steps, tuned with these learning rates if any."""
    best = chosen(runs, task, method, rates)
    wanted = {**best, "steps": best["steps"] // share}
    return {s["seed"]: result for s, result in runs.where(**wanted) if s["seed"] != TUNING_SEED}


def coarse(runs: Runs) -> dict[str, Difference]:
    """Test loss of AdmIRE minus that of its controls on bytes, had they been tuned on the coarse grid alone."""
    losses = {
        method: {seed: one["test_loss"] for seed, one in results(runs, "bytes", method, rates=COARSE).items()}
        for method in ("AdmIRE", *CONTROLS)
    }
    return {control: paired(losses["AdmIRE"], losses[control]) for control in CONTROLS}


def _gap(runs: Runs, task: str, method: str, base: str, share: int = 1) -> Difference:
    """Test loss of a method (with 1 / `share` of the steps) minus that of another."""
    losses = [
        {seed: one["test_loss"] for seed, one in results(runs, task, *which).items()}
        for which in ((method, share), (base, 1))
    ]
    return paired(*losses)


def speedup(runs: Runs, task: str, method: str) -> tuple[int, int, float]:
    """In how many of how many runs AdamW's final loss is reached, and there the mean of AdamW's steps over theirs."""
    ratios = []
    base, treated = results(runs, task, "AdamW"), results(runs, task, method)
    for seed, one in treated.items():
        reached = [number for number, loss in enumerate(one["curve"], 1) if loss <= base[seed]["val_loss"]]
        ratios += [len(base[seed]["curve"]) / reached[0]] if reached else []
    return len(ratios), len(treated), mean(ratios) if ratios else 0.0


def _speed(runs: Runs, task: str, method: str) -> str:
    reached, seeds, ratio = speedup(runs, task, method)
    return f"{reached} of {seeds}" + (f", {ratio:.2f} times as fast" if reached else "")


def trace_ratio(runs: Runs, task: str, method: str) -> Difference:
    """Tr F of a method over that of AdamW at equal validation loss, minus 1."""
    base = results(runs, task, "AdamW")
    ratios = []
    for seed, one in results(runs, task, method).items():
        level = max(one["val_loss"], base[seed]["val_loss"])
        ratios.append(_trace_at(one, level) / _trace_at(base[seed], level) - 1)
    return interval(ratios)


def _trace_at(result: Result, level: float) -> float:
    """Tr F at a validation loss, between two measurements of Tr F."""
    every = len(result["curve"]) // len(result["traces"])
    return at_loss(result["curve"][every - 1 :: every], result["traces"], level)


def at_loss(losses: Sequence[float], values: Sequence[float], level: float) -> float:
    """A value where the loss of the same run first falls to the level, interpolated; at the end where it does not."""
    after = next((i for i, loss in enumerate(losses) if loss <= level), len(losses) - 1)
    if after == 0 or losses[after - 1] <= losses[after]:
        return values[after]
    share = min(1.0, (losses[after - 1] - level) / (losses[after - 1] - losses[after]))
    return values[after - 1] * (1 - share) + values[after] * share


def verdict(runs: Runs) -> Verdict:
    gap = {task: _gap(runs, task, "AdmIRE", "AdamW") for task in _tasks(runs)}
    against = {control: _gap(runs, "bytes", "AdmIRE", control) for control in CONTROLS}
    half = _gap(runs, "bytes", "AdmIRE", "AdamW", share=2)
    better = [one.mean < -one.half for one in gap.values()]
    wins, gains = all(better), any(better)
    flat = all(one.mean < -one.half for one in against.values())
    if wins and flat and half.mean <= half.half:
        short = "reproduced"
    else:
        short = "partly reproduced" if flat and gains else "not reproduced"
    controls = ", ".join(f"{control} {one.show(3)}" for control, one in against.items())
    reason = " So what it gains is not due to flatness." if gains else " So neither the boost nor its mask helps here."
    reason = "" if flat else reason
    return Verdict(
        short,
        "AdmIRE minus AdamW, both tuned, in nats of test loss: "
        + ", ".join(f"{task} {one.show(3)}" for task, one in gap.items())
        + f", with half of AdamW's steps {half.show(3)}; minus its controls: {controls}.{reason}",
        "AdmIRE minus AdamW, both tuned, in nats of test loss: "
        + ", ".join(
            f"{task} {one.show(3)} (reaches AdamW's final loss in {_speed(runs, task, 'AdmIRE')})"
            for task, one in gap.items()
        )
        + "; with half of AdamW's steps "
        + half.show(3)
        + f". AdmIRE minus its controls on bytes: {controls}. Tr F at equal loss: "
        + f"{1 + trace_ratio(runs, 'bytes', 'AdmIRE').mean:.2f} of AdamW's.{reason}",
    )


def tables(runs: Runs) -> str:
    parts = []
    for task in _tasks(runs):
        rows = []
        rows_of = [(method, 1) for method in TASKS[task]["methods"]]
        rows_of += [("AdamW", 2), ("AdmIRE", 2)] if task == "bytes" else []
        for method, share in rows_of:
            own = interval([one["test_loss"] for one in results(runs, task, method, share).values()])
            settings = chosen(runs, task, method)
            full = share == 1 and method != "AdamW"
            rows.append(
                [
                    method + (", half the steps" if share == 2 else ""),
                    f"{settings['lr']:g}" + (f", {settings['kappa']:g}" if "kappa" in settings else ""),
                    f"{own.mean:.3f} ± {own.half:.3f}",
                    "" if (method, share) == ("AdamW", 1) else _gap(runs, task, method, "AdamW", share).show(3),
                    _speed(runs, task, method) if full else "",
                    f"{1 + trace_ratio(runs, task, method).mean:.2f} ± {trace_ratio(runs, task, method).half:.2f}"
                    if full
                    else "",
                ]
            )
        pairs = len(results(runs, task, "AdamW"))
        head = [f"{task}, {TASKS[task]['steps']} steps, {pairs} seeds", "lr, kappa", "test loss, nats", "minus AdamW's"]
        parts.append(table([*head, "reaches AdamW's final loss", "Tr F at equal loss / AdamW's"], rows))
    parts.append(_tuning_table(runs))
    if runs.where(lr=BETWEEN[0][0]):
        parts.append(
            "How much hangs on the grid: tuned without the learning rates in between "
            f"({', '.join(f'{lr:g}' for lr in BETWEEN[1])}), AdmIRE minus its controls on bytes would have been "
            + ", ".join(f"{control} {one.show(3)}" for control, one in coarse(runs).items())
            + "."
        )
    return "\n\n".join(parts)


def _tuning_table(runs: Runs) -> str:
    """Validation loss of all trials: how much a method depends on its learning rate."""
    rows = []
    rates = sorted({settings["lr"] for settings, _ in runs.where(seed=TUNING_SEED)})
    for task in _tasks(runs):
        for method in TASKS[task]["methods"]:
            found = {(s["lr"], s.get("kappa")): r for s, r in runs.where(task=task, method=method, seed=TUNING_SEED)}
            for kappa in sorted({kappa for _, kappa in found}, key=lambda kappa: kappa or 0):
                name = f"{task}: {method}" + (f", kappa {kappa:g}" if kappa else "")
                rows.append([name, *(_loss(found.get((lr, kappa))) for lr in rates)])
    return table(["validation loss of the trials at lr =", *(f"{lr:g}" for lr in rates)], rows)


def _loss(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result['val_loss']:.3f}" if result["val_loss"] < 10 else "diverged"


def draw(runs: Runs) -> None:
    tasks = _tasks(runs)
    colours = {method: f"C{number}" for number, method in enumerate(["AdamW", *ADMIRE])}
    figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(4.25 * (len(tasks) + 1), 4.2), layout="constrained")
    for axis, task in zip(axes, tasks, strict=False):
        for method in TASKS[task]["methods"]:
            curves = [one["curve"] for one in results(runs, task, method).values()]
            average = [mean(values) for values in zip(*curves, strict=True)]
            steps = [TEXT["every"] * (number + 1) for number in range(len(average))]
            style = "-" if method in ("AdamW", "AdmIRE") else "--"
            half = len(steps) // 3
            label = f"{method}: {average[-1]:.3f}"
            axis.plot(steps[half:], average[half:], style, color=colours[method], label=label)
        axis.set(xlabel="optimizer steps", ylabel="validation loss, nats per token", title=task)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axis = axes[-1]
    for method in TASKS["bytes"]["methods"]:
        best: dict[float, float] = {}  # the better kappa at each learning rate
        for settings, result in runs.where(task="bytes", method=method, seed=TUNING_SEED):
            best[settings["lr"]] = min(result["val_loss"], best.get(settings["lr"], math.inf))
        axis.plot(*zip(*sorted(best.items()), strict=True), "o-", color=colours[method], markersize=4)
    lowest = min(result["val_loss"] for _, result in runs.where(task="bytes", seed=TUNING_SEED))
    axis.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="final validation loss",
        title="bytes: best trials (colours as left)",
    )
    axis.set_ylim(lowest - 0.02, lowest + 0.4)
    axis.set_xticks(WIDE[::2], [f"{lr:g}" for lr in WIDE[::2]])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.savefig(FIGURES / "language.png", dpi=100)
    plt.close(figure)
