"""Figure 2 in small: Tr F, training loss and test accuracy of SAM-IRE on the digits over kappa and gamma.

As in the paper: SAM with rho 0.05 on SGD without momentum, weight decay 5e-4, label smoothing 0.1, IRE on after 30 %
of the run, lr constant or divided by 5 at 20, 50 and 80 %. Ours: a ResNet of 19,074 parameters, 500 images, 600
steps, lr 0.3 (the paper's 0.1 is for another network), Tr F on 250 training images with 16 draws, in eval mode.
Training loss: cross entropy in eval mode, which label smoothing keeps from 0.

Is it monotone? Per gamma and schedule the rank correlation (Spearman) of kappa and the value minus its median over
the kappas of that seed, with its p-value.
"""

from __future__ import annotations

from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import train_digits
from claims.accuracy import make_ire
from lightning_ire.compare.statistics import interval

QUESTION = "Figure 2: the larger kappa, the flatter the minimum, the lower the training loss, the higher the accuracy?"
KAPPAS, GAMMAS, SCHEDULES = (0.0, 2.0, 5.0, 10.0), (0.8, 0.9, 0.95), ("constant", "divided")
SEEDS = {"default": 3, "full": 5, "tiny": 1}
VALUES = {  # name: label, factor, digits
    "trace_fisher": ("Tr F", 1, 1),
    "train_loss": ("training loss", 1, 4),
    "test_accuracy": ("test accuracy, %", 100, 2),
}


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    return [
        {
            "schedule": schedule,
            "kappa": kappa,
            **({"gamma": gamma} if kappa else {}),
            "rho": 0.05,
            "start": 0.3,
            "lr": 0.3,
            "steps": 4 if size == "tiny" else 600,
            "seed": seed,
        }
        for schedule in SCHEDULES
        for kappa in KAPPAS
        for gamma in (GAMMAS if kappa else GAMMAS[:1])
        for seed in range(SEEDS[size])
    ]


def measure(settings: Settings) -> Result:
    return train_digits(
        "digits",
        settings["seed"],
        settings["steps"],
        settings["lr"],
        5e-4,
        momentum=0.0,
        schedule=settings["schedule"],
        ire=make_ire(settings),
    )


def _cell(runs: Runs, schedule: str, kappa: float, gamma: float, value: str) -> list[float]:
    """A value by seed; kappa = 0 is the same run for every gamma."""
    wanted = {"schedule": schedule, "kappa": kappa, **({"gamma": gamma} if kappa else {})}
    return [result[value] for _, result in sorted(runs.where(**wanted), key=lambda run: run[0]["seed"])]


def _trend(runs: Runs, schedule: str, gamma: float, value: str) -> tuple[float, float]:
    """Spearman's correlation of kappa and the value, and its p."""
    by_seed = zip(*(_cell(runs, schedule, kappa, gamma, value) for kappa in KAPPAS), strict=True)
    points = [(kappa, one - median(line)) for line in by_seed for kappa, one in zip(KAPPAS, line, strict=True)]
    found = stats.spearmanr(*zip(*points, strict=True))
    return float(found.statistic), float(found.pvalue)


def verdict(runs: Runs) -> Verdict:
    trends = {
        value: {(s, gamma): _trend(runs, s, gamma, value) for s in SCHEDULES for gamma in GAMMAS} for value in VALUES
    }
    wanted = {"trace_fisher": -1, "train_loss": -1, "test_accuracy": 1}
    counts = {
        value: sum(p < 0.05 and wanted[value] * rho > 0 for rho, p in found.values()) for value, found in trends.items()
    }
    traces = [
        [mean(_cell(runs, s, kappa, gamma, "trace_fisher")) for kappa in KAPPAS] for s in SCHEDULES for gamma in GAMMAS
    ]
    flatter = sum(row[-1] < row[0] for row in traces)
    monotone = sum(row == sorted(row, reverse=True) for row in traces)
    rows = len(SCHEDULES) * len(GAMMAS)
    rising = [s for (s, _), (rho, p) in trends["test_accuracy"].items() if p < 0.05 and rho > 0]
    only_divided = bool(rising) and "constant" not in rising
    done = sum(count == rows for count in counts.values())
    ranges = [f"{min(r for r, _ in f.values()):+.2f} to {max(r for r, _ in f.values()):+.2f}" for f in trends.values()]
    return Verdict(
        "reproduced" if done == 3 else "partly reproduced" if any(counts.values()) else "not reproduced",
        f"Digits, SAM-IRE: in {rows} rows (schedule, gamma) Tr F falls with kappa in {counts['trace_fisher']}, the "
        f"training loss in {counts['train_loss']}, the test accuracy rises in {counts['test_accuracy']}"
        + ("; the latter only with decayed learning rates" if only_divided else "")
        + ".",
        f"Of {rows} rows (schedule, gamma) Tr F falls with kappa in {counts['trace_fisher']} (rank correlation "
        f"{ranges[0]}; flatter at kappa 10 than at 0 in {flatter}, at every step of kappa in {monotone}), the training "
        f"loss falls in {counts['train_loss']} ({ranges[1]}), the test accuracy rises in {counts['test_accuracy']} "
        f"({ranges[2]}), each at p < 0.05.",
    )


def tables(runs: Runs) -> str:
    parts = []
    for value, (label, factor, digits) in VALUES.items():
        rows = []
        for schedule in SCHEDULES:
            for gamma in GAMMAS:
                cells = [_cell(runs, schedule, kappa, gamma, value) for kappa in KAPPAS]
                each = [interval([factor * one for one in cell]) for cell in cells]
                rho, p = _trend(runs, schedule, gamma, value)
                rows.append(
                    [
                        f"{schedule}, {gamma:g}",
                        *(f"{one.mean:.{digits}f} ± {one.half:.{digits}f}" for one in each),
                        f"{rho:+.2f} (p = {p:.1g})",
                    ]
                )
        head = [f"{label} (lr, gamma)", *(f"kappa {kappa:g}" for kappa in KAPPAS), "rank correlation with kappa"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(len(SCHEDULES), len(VALUES), figsize=(12, 5.2), layout="constrained")
    for row, schedule in zip(axes, SCHEDULES, strict=True):
        for axis, (value, (label, factor, digits)) in zip(row, VALUES.items(), strict=True):
            cells = [
                [factor * mean(_cell(runs, schedule, kappa, gamma, value)) for kappa in KAPPAS] for gamma in GAMMAS
            ]
            # a cell far off (a seed that nearly diverged) has the last colour, so that the others can be told apart
            low, high = np.quantile(cells, (0.25, 0.75))
            reach = 1.5 * (high - low)
            image = axis.imshow(
                cells,
                cmap="viridis",
                aspect="auto",
                vmin=max(np.min(cells), low - reach),
                vmax=min(np.max(cells), high + reach),
            )
            middle = (image.get_clim()[0] + image.get_clim()[1]) / 2
            for y, line in enumerate(cells):
                for x, number in enumerate(line):
                    colour = "black" if number > middle else "white"
                    axis.text(x, y, f"{number:.{digits}f}", ha="center", va="center", color=colour)
            axis.set(title=f"{label}, lr {schedule}", xlabel="kappa", ylabel="gamma")
            axis.set_xticks(range(len(KAPPAS)), [f"{kappa:g}" for kappa in KAPPAS])
            axis.set_yticks(range(len(GAMMAS)), [f"{gamma:g}" for gamma in GAMMAS])
            figure.colorbar(image, ax=axis)
    figure.savefig(FIGURES / "sharpness_grid.png", dpi=100)
    plt.close(figure)
