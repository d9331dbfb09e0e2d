"""Tables 1 to 3 in small: six methods on the digits, with few labels and with noisy labels.

Every method gets the same number of trials. Trial i has the same point of a scrambled Sobol sequence for all methods,
so SGD and SGD-IRE try the same learning rates and decays; a method that has more settings spends the same trials on
them. Trials are ranked by validation accuracy (300 images with true labels), ties by validation loss, over tuning
seeds that are not reported; the best is trained with the reporting seeds. A seed is one split, one initialization and
one order of batches, the same for all methods, so differences are paired by seed.

`SGD + IRE`, ... follow the paper's protocol, which is another question: the base's tuned settings are kept, and as
many trials again go into kappa, gamma and the start. So these have had twice the tuning.

A ResNet of 19,074 parameters, 300 steps, cosine to 0, label smoothing 0.1, SGD with momentum 0.9 or AdamW.
"""

from __future__ import annotations

from functools import cache
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot as plt

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._statistics import Difference, holm, interval, paired
from claims._train import SPLITS, train_digits
from lightning_ire import IRE, SAM

QUESTION = "Tables 1 to 3: does IRE raise the test accuracy of SGD, SAM and AdamW at equal tuning effort?"
BASES = {"SGD-IRE": "SGD", "SAM-IRE": "SAM", "AdmIRE": "AdamW"}
METHODS = ["SGD", "SGD-IRE", "SAM", "SAM-IRE", "AdamW", "AdmIRE"]
ON_TOP = {f"{base} + IRE": base for base in BASES.values()}
PAIRS = [*BASES.items(), *ON_TOP.items(), ("SAM", "SGD")]
SIZES = {  # trials, tuning seeds, reporting seeds, steps
    "default": (8, 2, 10, 300),
    "full": (16, 2, 20, 300),
    "tiny": (2, 1, 2, 4),
}
TUNING_SEED = 1000  # and the following ones


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    trials, tuning, reporting, steps = SIZES[size]
    planned = []
    for split in SPLITS:
        tuned = []
        for method in [*METHODS, *(ON_TOP if size != "default" else ())]:
            base = ON_TOP.get(method)
            if base is not None and base not in tuned:
                continue
            kept = {name: chosen(runs, split, base)[name] for name in _point(base, 0)} if base else {}
            options = [
                {"split": split, "method": method, "trial": trial, "steps": steps, **_point(method, trial), **kept}
                for trial in range(trials)
            ]
            tries = [{**option, "seed": TUNING_SEED + seed} for option in options for seed in range(tuning)]
            planned += tries
            if all(one in runs for one in tries):
                tuned.append(method)
                planned += [{**chosen(runs, split, method), "seed": seed} for seed in range(reporting)]
    return planned


@cache
def _points() -> list[list[float]]:
    """Points of the unit cube, 16 because powers of 2 fill it evenly."""
    return torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(16).tolist()


def _point(method: str, trial: int) -> dict[str, Any]:
    """The settings of a trial."""

    def between(low: float, high: float, share: float) -> float:
        return float(f"{low * (high / low) ** share:.3g}")

    lr, decay, rho, kappa, gamma, start = _points()[trial]
    adam = _adam(method)
    settings: dict[str, Any] = {
        "lr": between(1e-3, 0.1, lr) if adam else between(0.02, 1.0, lr),
        "weight_decay": between(1e-3, 1.0, decay) if adam else between(1e-4, 1e-2, decay),
    }
    if method.startswith("SAM"):
        settings["rho"] = between(0.02, 0.5, rho)
    if method.endswith("IRE"):
        settings["kappa"] = between(0.5, 20.0, kappa)
        settings["gamma"] = [0.8, 0.9, 0.99][int(3 * gamma)]
        settings["start"] = [0.0, 0.3, 0.6][int(3 * start)]
    return settings


def _adam(method: str) -> bool:
    return method.startswith("Ad")


def make_ire(settings: Settings, **more: Any) -> IRE | None:
    """The callback that the settings `kappa`, `gamma`, `start` (share of the run) and `rho` ask for."""
    perturbation = SAM(settings["rho"]) if settings.get("rho") else None
    kappa = settings.get("kappa", 0.0)
    if perturbation is None and not kappa:
        return None
    start = settings.get("start") or None
    return IRE(kappa, settings.get("gamma", 0.9), start_step=start, perturbation=perturbation, **more)


def measure(settings: Settings) -> Result:
    return train_digits(
        settings["split"],
        settings["seed"],
        settings["steps"],
        settings["lr"],
        settings["weight_decay"],
        optimizer="AdamW" if _adam(settings["method"]) else "SGD",
        ire=make_ire(settings),
    )


def chosen(runs: Runs, split: str, method: str) -> dict[str, Any]:
    """The settings that are best in validation, without a seed."""
    trials: dict[int, list[tuple[dict[str, Any], Result]]] = {}
    for settings, result in runs.where(split=split, method=method):
        if settings["seed"] >= TUNING_SEED:
            trials.setdefault(settings["trial"], []).append((settings, result))

    def score(trial: int) -> tuple[float, float]:
        results = [result for _, result in trials[trial]]
        return mean(one["val_accuracy"] for one in results), -mean(one["val_loss"] for one in results)

    best = trials[max(sorted(trials), key=score)][0][0]
    return {name: value for name, value in best.items() if name != "seed"}


def reported(runs: Runs, split: str, method: str, value: str = "test_accuracy") -> dict[int, float]:
    """A value by reporting seed."""
    return {
        settings["seed"]: result[value]
        for settings, result in runs.where(**chosen(runs, split, method))
        if settings["seed"] < TUNING_SEED
    }


def _methods(runs: Runs) -> list[str]:
    return [*METHODS, *(method for method in ON_TOP if runs.where(method=method))]


def _pairs(runs: Runs) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if pair[0] in _methods(runs)]


def _differences(runs: Runs) -> dict[tuple[str, str, str], Difference]:
    return {
        (split, *pair): paired(*(reported(runs, split, method) for method in pair))
        for split in SPLITS
        for pair in _pairs(runs)
    }


def _adjusted(runs: Runs) -> dict[tuple[str, str, str], float]:
    """p-values of the comparisons of a method with and without IRE, adjusted for their number."""
    found = {key: one.p for key, one in _differences(runs).items() if key[1] in BASES or key[1] in ON_TOP}
    return dict(zip(found, holm(list(found.values())), strict=True))


def verdict(runs: Runs) -> Verdict:
    differences, adjusted = _differences(runs), _adjusted(runs)
    equal, on_top = ([key for key in adjusted if key[1] in methods] for methods in (BASES, ON_TOP))
    clear = [key for key in adjusted if adjusted[key] < 0.05]
    better, worse = _signs(differences, clear, equal)
    short = "not reproduced"
    if better > worse:
        short = "reproduced" if better > 4 and not worse else "partly reproduced"

    def show(keys: list[tuple[str, str, str]]) -> str:
        return ", ".join(f"{key[0]} {key[1]} {differences[key].show(scale=100)}" for key in keys)

    sam = ", ".join(f"{split} {differences[split, 'SAM', 'SGD'].show(scale=100)}" for split in SPLITS)
    pairs = differences["digits", "SAM", "SGD"].pairs
    counts = f"IRE is better in {better} and worse in {worse} of nine paired comparisons"
    listed = show([key for key in equal if key in clear]) or "none"
    more = ""
    if on_top:
        better, worse = _signs(differences, clear, on_top)
        more = f"On top of the base's tuned settings, with as many trials again: better in {better}, worse in {worse}. "
    return Verdict(
        short,
        f"Digits: {counts} over {pairs} seeds (points of test accuracy with minus without IRE, where the difference "
        f"is clear: {listed}).",
        f"At equal tuning effort {counts} (over {pairs} seeds, Holm-corrected; points of test accuracy with minus "
        f"without IRE: {show(equal)}). {more}SAM minus SGD: {sam}.",
    )


def _signs(differences: dict[tuple[str, str, str], Difference], clear: list, keys: list) -> tuple[int, int]:
    """How many of the clear differences among these are positive, how many negative."""
    means = [differences[key].mean for key in keys if key in clear]
    return sum(one > 0 for one in means), sum(one < 0 for one in means)


def tables(runs: Runs) -> str:
    rows = []
    for method in _methods(runs):
        row = [method]
        for split in SPLITS:
            own = interval([100 * value for value in reported(runs, split, method).values()])
            row.append(f"{own.mean:.2f} ± {own.half:.2f}")
        rows.append(row)
    accuracy = table(["test accuracy, %", *SPLITS], rows)
    differences, adjusted = _differences(runs), _adjusted(runs)
    rows = [
        [
            f"{split}: {treated} - {base}",
            one.show(scale=100),
            f"{one.p:.2g}",
            f"{adjusted[split, treated, base]:.2g}" if (split, treated, base) in adjusted else "",
            f"{_ratio(runs, split, treated, base):.2f}",
        ]
        for (split, treated, base), one in differences.items()
    ]
    gaps = table(["paired difference", "points of test accuracy", "p", "p after Holm", "ratio of Tr F"], rows)
    settings = table(
        ["what tuning chose", *SPLITS],
        [[method, *(_short(chosen(runs, split, method)) for split in SPLITS)] for method in _methods(runs)],
    )
    return "\n\n".join([accuracy, gaps, settings])


def _ratio(runs: Runs, split: str, treated: str, base: str) -> float:
    """Mean Tr F of a method over that of its base."""
    return mean(reported(runs, split, treated, "trace_fisher").values()) / mean(
        reported(runs, split, base, "trace_fisher").values()
    )


def _short(settings: Settings) -> str:
    names = ["lr", "weight_decay", "rho", "kappa", "gamma", "start"]
    return ", ".join(f"{name} {settings[name]:g}" for name in names if name in settings)


def draw(runs: Runs) -> None:
    pairs = _pairs(runs)
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(11, 3.6), layout="constrained", sharey=True)
    for axis, split in zip(axes, SPLITS, strict=True):
        for row, (treated, base) in enumerate(pairs):
            values = [reported(runs, split, method) for method in (treated, base)]
            one = paired(*values)
            points = [100 * (values[0][seed] - values[1][seed]) for seed in values[0].keys() & values[1].keys()]
            axis.plot(points, [row + 0.18] * len(points), "|", color="grey", markersize=7)
            colour = "tab:green" if one.mean > one.half else "tab:red" if one.mean < -one.half else "tab:blue"
            axis.errorbar(100 * one.mean, row, xerr=100 * one.half, fmt="o", color=colour, capsize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=split, xlabel="points of test accuracy", yticks=range(len(pairs)))
        axis.set_yticklabels([f"{treated} - {base}" for treated, base in pairs])
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("paired differences by seed (marks) with 95 % intervals of their mean")
    figure.savefig(FIGURES / "accuracy.png", dpi=100)
    plt.close(figure)
