"""Tables 1 to 3 in small: six methods on the digits, with few labels and with noisy labels.

Every method gets the same number of trials. Trial i has the same point of a scrambled Sobol sequence for all methods,
so SGD and SGD-IRE try the same learning rates and decays; a method that has more settings spends the same trials on
them. Trials are ranked by validation accuracy (300 images with true labels), ties by validation loss, over tuning
seeds that are not reported; the best is trained with the reporting seeds. A seed is one split, one initialization and
one order of batches, the same for all methods, so differences are paired by seed.

`SGD + IRE`, ... follow the paper's protocol, which is another question: the base's tuned settings are kept, and as
many trials again go into kappa, gamma and the start. So these have had twice the tuning.

`SGD-IRE, random mask` and `SGD-IRE, gamma = 1`, ... are controls, tuned with as many trials: as many coordinates are
boosted, but random ones; all of them. Where IRE does no better than these, flatness is not the reason.

Differences over seeds take what tuning chose as given. How much of them is the luck of the search? The last column
tunes with every 8 of the 16 trials: the mean and central 95 % of the difference of what was chosen, on the test images
of the tuning seeds, and the share of these searches in which the first method is better. The third table and the lower
pictures show, the same way, what a search of n trials finds on average: at n = 1 settings that nobody tuned.

A ResNet of 19,074 parameters, 300 steps, cosine to 0, label smoothing 0.1, SGD with momentum 0.9 or AdamW.
"""

from __future__ import annotations

from functools import cache
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import SPLITS, train_digits
from lightning_ire import IRE, SAM, RandomMask
from lightning_ire.compare.design import Range
from lightning_ire.compare.statistics import Difference, Searches, expected_best, holm, interval, paired, searches

QUESTION = "Tables 1 to 3: does IRE raise the test accuracy of SGD, SAM and AdamW at equal tuning effort?"
BASES = {"SGD-IRE": "SGD", "SAM-IRE": "SAM", "AdmIRE": "AdamW"}
METHODS = ["SGD", "SGD-IRE", "SAM", "SAM-IRE", "AdamW", "AdmIRE"]
ON_TOP = {f"{base} + IRE": base for base in BASES.values()}
CONTROLS = {f"{method}, {control}": method for control in ("random mask", "gamma = 1") for method in BASES}
AGAINST_CONTROLS = [(method, control) for control, method in CONTROLS.items()]
PAIRS = [*BASES.items(), *ON_TOP.items(), *AGAINST_CONTROLS, ("SAM", "SGD")]
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
        for method in [*METHODS, *([*ON_TOP, *CONTROLS] if size != "default" else ())]:
            base = ON_TOP.get(method)
            if base is not None and base not in tuned:
                continue
            kept = {name: chosen(runs, split, base)[name] for name in _point(base, 0)} if base else {}
            options = [
                {"split": split, "method": method, "trial": trial, "steps": steps, **_point(method, trial), **kept}
                for trial in range(trials)
            ]
            found = search(runs, options, tuning, reporting)
            planned += found
            if found[-1]["seed"] < TUNING_SEED:
                tuned.append(method)
    return planned


def search(runs: Runs, options: list[dict[str, Any]], tuning: int, reporting: int) -> list[dict[str, Any]]:
    """One method's runs: all options with the tuning seeds; when these are there, the best with the reporting seeds."""
    tries = [{**option, "seed": TUNING_SEED + seed} for option in options for seed in range(tuning)]
    if not all(one in runs for one in tries):
        return tries
    best = chosen(runs, options[0]["split"], options[0]["method"])
    return [*tries, *({**best, "seed": seed} for seed in range(reporting))]


@cache
def _points() -> list[list[float]]:
    """Points of the unit cube, 16 because powers of 2 fill it evenly."""
    return torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(16).tolist()


def _point(method: str, trial: int) -> dict[str, Any]:
    """The settings of a trial."""
    lr, decay, rho, kappa, gamma, start = _points()[trial]
    adam = _adam(method)
    settings: dict[str, Any] = {
        "lr": _logarithmic(1e-3, 0.1, lr) if adam else _logarithmic(0.02, 1.0, lr),
        "weight_decay": _logarithmic(1e-3, 1.0, decay) if adam else _logarithmic(1e-4, 1e-2, decay),
    }
    if method.startswith("SAM"):
        settings["rho"] = _logarithmic(0.02, 0.5, rho)
    if "IRE" in method:
        settings["kappa"] = _logarithmic(0.5, 20.0, kappa)
        settings["gamma"] = 1.0 if method.endswith("gamma = 1") else [0.8, 0.9, 0.99][int(3 * gamma)]
        settings["start"] = [0.0, 0.3, 0.6][int(3 * start)]
    return settings


def _logarithmic(low: float, high: float, share: float) -> float:
    return Range(low, high, log=True).value(share)


def _adam(method: str) -> bool:
    return method.startswith("Ad")


def make_ire(settings: Settings, **more: Any) -> IRE | None:
    """The callback that the settings `kappa`, `gamma`, `start` (share of the run) and `rho` ask for."""
    perturbation = SAM(settings["rho"]) if settings.get("rho") else None
    kappa = settings.get("kappa", 0.0)
    if perturbation is None and not kappa:
        return None
    start = settings.get("start") or None if kappa else None
    return IRE(kappa, settings.get("gamma", 0.9), start_step=start, perturbation=perturbation, **more)


def measure(settings: Settings) -> Result:
    return train_digits(
        settings["split"],
        settings["seed"],
        settings["steps"],
        settings["lr"],
        settings["weight_decay"],
        optimizer="AdamW" if _adam(settings["method"]) else "SGD",
        ire=make_ire(settings, **({"curvature": RandomMask()} if "random" in settings["method"] else {})),
    )


class Trial(NamedTuple):
    """Settings without a seed; validation accuracy and negative loss, test accuracy: means over the tuning seeds."""

    settings: dict[str, Any]
    score: tuple[float, float]
    test_accuracy: float


def ranked(runs: Runs, split: str, method: str) -> dict[int, Trial]:
    """The trials by number, the best in validation first."""
    trials: dict[int, list[tuple[Settings, Result]]] = {}
    for settings, result in runs.where(split=split, method=method):
        if settings["seed"] >= TUNING_SEED:
            trials.setdefault(settings["trial"], []).append((settings, result))
    found = {}
    for trial, tries in sorted(trials.items()):
        accuracy, loss, test = (
            mean(result[value] for _, result in tries) for value in ("val_accuracy", "val_loss", "test_accuracy")
        )
        settings = {name: value for name, value in tries[0][0].items() if name != "seed"}
        found[trial] = Trial(settings, (accuracy, -loss), test)
    return dict(sorted(found.items(), key=lambda one: one[1].score, reverse=True))


def chosen(runs: Runs, split: str, method: str) -> dict[str, Any]:
    """The settings that are best in validation, without a seed."""
    return next(iter(ranked(runs, split, method).values())).settings


def luck(runs: Runs, split: str, treated: str, base: str) -> Searches | None:
    """Test accuracy of one method minus that of another, each tuned with the same half of the trials, in all ways.

    None for what is tuned on top of a base: its trials are not those of the base.
    """
    return None if treated in ON_TOP else searches(*(_by_trial(runs, split, method) for method in (treated, base)))


def _by_trial(runs: Runs, split: str, method: str) -> dict[int, float]:
    """Test accuracy by trial, the best in validation first."""
    return {trial: one.test_accuracy for trial, one in ranked(runs, split, method).items()}


def reported(runs: Runs, split: str, method: str, value: str = "test_accuracy") -> dict[int, float]:
    """A value by reporting seed."""
    return {
        settings["seed"]: result[value]
        for settings, result in runs.where(**chosen(runs, split, method))
        if settings["seed"] < TUNING_SEED
    }


def _methods(runs: Runs) -> list[str]:
    return [*METHODS, *(method for method in [*ON_TOP, *CONTROLS] if runs.where(method=method))]


def _pairs(runs: Runs) -> list[tuple[str, str]]:
    methods = _methods(runs)
    return [pair for pair in PAIRS if set(pair) <= set(methods)]


def _differences(runs: Runs) -> dict[tuple[str, str, str], Difference]:
    return {
        (split, *pair): paired(*(reported(runs, split, method) for method in pair))
        for split in SPLITS
        for pair in _pairs(runs)
    }


def _adjusted(runs: Runs) -> dict[tuple[str, str, str], float]:
    """p-values adjusted for the number of comparisons: those with and without IRE, those against the controls."""
    differences, adjusted = _differences(runs), {}
    for family in ([*BASES.items(), *ON_TOP.items()], AGAINST_CONTROLS):
        keys = [key for key in differences if key[1:] in family]
        adjusted |= dict(zip(keys, holm([differences[key].p for key in keys]), strict=True))
    return adjusted


def verdict(runs: Runs) -> Verdict:
    differences, adjusted = _differences(runs), _adjusted(runs)
    clear = [key for key in adjusted if adjusted[key] < 0.05]

    def show(keys: list[tuple[str, str, str]]) -> str:
        return ", ".join(f"{key[0]} {key[1]} {differences[key].show(scale=100)}" for key in keys)

    def signs(pairs: list[tuple[str, str]]) -> tuple[int, int]:
        """How many clear differences are positive, how many negative."""
        means = [differences[key].mean for key in clear if key[1:] in pairs]
        return sum(one > 0 for one in means), sum(one < 0 for one in means)

    better, worse = signs(list(BASES.items()))
    short = "not reproduced"
    if better > worse:
        short = "reproduced" if better > 4 and not worse else "partly reproduced"
    equal = [key for key in adjusted if key[1:] in BASES.items()]
    listed = [key for key in equal if key in clear]
    counts = f"IRE is better in {better} and worse in {worse} of nine paired comparisons"
    brief, said = "", ""
    if any(key[1] in ON_TOP for key in adjusted):
        better, worse = signs(list(ON_TOP.items()))
        said += (
            f" On top of the base's tuned settings, with as many trials again: better in {better}, worse in {worse}."
        )
    if any(key[2] in CONTROLS for key in adjusted):
        parts = []
        for control, name in (("random mask", "a random mask"), ("gamma = 1", "gamma = 1 (a longer step)")):
            better, worse = signs([pair for pair in AGAINST_CONTROLS if pair[1].endswith(control)])
            parts.append(f"against {name} better in {better}, worse in {worse} of nine")
        brief = f" Controls tuned as well: {'; '.join(parts)}."
        said += brief
    found = {key: luck(runs, *key) for key in listed}
    if shares := [f"{key[0]} {key[1]} in {100 * one.better:.0f} %" for key, one in found.items() if one]:
        said += f" Of all searches with half of the trials IRE comes out better: {', '.join(shares)}."
    sam = ", ".join(f"{split} {differences[split, 'SAM', 'SGD'].show(scale=100)}" for split in SPLITS)
    pairs = differences["digits", "SAM", "SGD"].pairs
    return Verdict(
        short,
        f"Digits: {counts} over {pairs} seeds (points of test accuracy with minus without IRE, where the difference "
        f"is clear: {show(listed) or 'none'}).{brief}",
        f"At equal tuning effort {counts} (over {pairs} seeds, Holm-corrected; points of test accuracy with minus "
        f"without IRE: {show(equal)}).{said} SAM minus SGD: {sam}.",
    )


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
            chance.show() if (chance := luck(runs, split, treated, base)) else "",
        ]
        for (split, treated, base), one in differences.items()
    ]
    head = ["paired difference", "points of test accuracy", "p", "p after Holm", "ratio of Tr F"]
    gaps = table([*head, "searches with half of the trials: mean (95 %), better in"], rows)
    settings = table(
        ["what tuning chose", *SPLITS],
        [[method, *(_short(chosen(runs, split, method)) for split in SPLITS)] for method in _methods(runs)],
    )
    return "\n\n".join([accuracy, gaps, _budgets(runs), settings])


def _budgets(runs: Runs) -> str:
    """What a search of few trials finds: with one, a method whose settings nobody tuned."""
    total = len(ranked(runs, next(iter(SPLITS)), METHODS[0]))
    budgets = sorted({min(trials, total) for trials in (1, 4, 16)})
    rows = []
    for method in _methods(runs):
        if method not in ON_TOP:
            curves = [expected_best([*_by_trial(runs, split, method).values()]) for split in SPLITS]
            rows.append([method, *(" → ".join(f"{100 * one[n - 1]:.2f}" for n in budgets) for one in curves)])
    numbers = ", ".join(map(str, budgets))
    return table([f"expected test accuracy, %, after a search of {numbers} trials", *SPLITS], rows)


def _ratio(runs: Runs, split: str, treated: str, base: str) -> float:
    """Mean Tr F of a method over that of its base."""
    return mean(reported(runs, split, treated, "trace_fisher").values()) / mean(
        reported(runs, split, base, "trace_fisher").values()
    )


def _short(settings: Settings) -> str:
    names = ["lr", "weight_decay", "rho", "kappa", "gamma", "start"]
    return ", ".join(f"{name} {settings[name]:g}" for name in names if name in settings)


def draw(runs: Runs) -> None:
    pairs, methods = _pairs(runs), _methods(runs)
    figure = plt.figure(figsize=(12, 4.4 + 0.27 * len(pairs)), layout="constrained")
    axes = figure.subplots(2, len(SPLITS), height_ratios=[0.27 * len(pairs), 3])
    for axis, split in zip(axes[0], SPLITS, strict=True):
        for row, (treated, base) in enumerate(pairs):
            values = [reported(runs, split, method) for method in (treated, base)]
            one = paired(*values)
            points = [100 * (values[0][seed] - values[1][seed]) for seed in values[0].keys() & values[1].keys()]
            axis.plot(points, [row + 0.2] * len(points), "|", color="grey", markersize=5)
            colour = "tab:green" if one.mean > one.half else "tab:red" if one.mean < -one.half else "tab:blue"
            axis.errorbar(100 * one.mean, row, xerr=100 * one.half, fmt="o", color=colour, capsize=3, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=split, xlabel="points of test accuracy", yticks=range(len(pairs)))
        axis.set_yticklabels([_label(*pair) for pair in pairs] if axis is axes[0][0] else [], fontsize=8)
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    colours = {base: f"C{number}" for number, base in enumerate(BASES.values())}
    for axis, split in zip(axes[1], SPLITS, strict=True):
        for method in methods:
            if method in ON_TOP:
                continue
            family = BASES.get(CONTROLS.get(method, method), method)
            style = "-" if method in BASES else "--"
            if method in CONTROLS:
                style = ":" if method.endswith("random mask") else "-."
            values = [100 * one for one in expected_best([*_by_trial(runs, split, method).values()])]
            axis.plot(range(1, len(values) + 1), values, linestyle=style, color=colours[family], label=method)
        axis.set(xlabel="trials of the search", title=f"{split}: what tuning finds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[1][0].set_ylabel("expected test accuracy, %")
    figure.legend(handles=axes[1][0].get_lines(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle("paired differences by seed (marks) with 95 % intervals of their mean")
    figure.savefig(FIGURES / "accuracy.png", dpi=100)
    plt.close(figure)


def _label(treated: str, base: str) -> str:
    """SGD-IRE - its random mask."""
    return f"{treated} - {base.removeprefix(treated + ', ')}"
