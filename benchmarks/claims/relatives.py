"""What SAM's relatives buy, for what price: on the digits with few and with noisy labels.

Protocol as for tables 1 to 3: every method gets the same number of trials, at the same points of a scrambled Sobol
sequence for learning rate and weight decay; the radius is its own coordinate. Trials are ranked by validation accuracy
over tuning seeds that are not reported; the best is trained with the reporting seeds, paired by seed with SGD's runs.
Other settings of a method are its paper's (the defaults). The price is counted in forward and backward passes of a run,
a plain run's being 1: it says nothing of what runs beside the passes (benchmarks/RESULTS.md has the times).

Five trials are few: a method that is better over seeds may have had luck in the search, or SGD bad luck, so it is
called better only if the searches with half of the trials agree. LESAM's radius stayed at its largest value here, which
makes it SAM.

A ResNet of 19,074 parameters, 300 steps, cosine to 0, label smoothing 0.1, SGD with momentum 0.9.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import train_digits
from claims.accuracy import _by_trial, _logarithmic, _points, chosen, ranked, reported, search
from lightning_ire import (
    GSAM,
    IRE,
    LESAM,
    SAM,
    AverageSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    Perturbation,
    StableSAM,
    WeightedSAM,
)
from lightning_ire.compare.statistics import Difference, holm, interval, paired, searches, told_apart

QUESTION = "Relatives of SAM: what does each buy, and for how many passes?"
SPLITS = ("few labels", "noisy labels")
# what makes the perturbation of a radius; passes per plain pass; the range of radii
METHODS: dict[str, tuple[Callable[[float], Perturbation | None], float, tuple[float, float]]] = {
    "SGD": (lambda rho: None, 1.0, (0.02, 0.5)),
    "AverageSAM": (AverageSAM, 1.0, (0.02, 2.0)),
    "MomentumSAM": (MomentumSAM, 1.0, (0.05, 2.0)),
    "SAM in the last tenth": (lambda rho: SAM(rho, start_step=0.9), 1.1, (0.02, 0.5)),
    "LookSAM": (LookSAM, 1.2, (0.02, 0.5)),
    "SAM, a quarter of the batch": (lambda rho: SAM(rho, fraction=0.25), 1.25, (0.02, 0.5)),
    "SAM": (SAM, 2.0, (0.02, 0.5)),
    "SAM, radius with the rate": (lambda rho: SAM(rho, rho_schedule="lr"), 2.0, (0.02, 0.5)),
    "LESAM": (LESAM, 2.0, (0.02, 0.5)),
    "FriendlySAM": (FriendlySAM, 2.0, (0.02, 0.5)),
    "GSAM": (lambda rho: GSAM(rho, rho_schedule="lr"), 2.0, (0.02, 0.5)),
    "StableSAM": (StableSAM, 2.0, (0.02, 0.5)),
    "WeightedSAM": (WeightedSAM, 2.0, (0.02, 0.5)),
}
SIZES = {"default": (5, 1, 4, 300), "full": (5, 1, 10, 300), "tiny": (2, 1, 2, 4)}  # as in accuracy.py


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    trials, tuning, reporting, steps = SIZES[size]
    planned = []
    for split in SPLITS:
        for method in METHODS:
            options = [
                {"split": split, "method": method, "trial": trial, "steps": steps, **_point(method, trial)}
                for trial in range(trials)
            ]
            planned += search(runs, options, tuning, reporting)
    return planned


def _point(method: str, trial: int) -> dict[str, Any]:
    """The settings of a trial."""
    lr, decay, rho, *_ = _points()[trial]
    settings = {"lr": _logarithmic(0.02, 1.0, lr), "weight_decay": _logarithmic(1e-4, 1e-2, decay)}
    return settings if method == "SGD" else settings | {"rho": _logarithmic(*METHODS[method][2], rho)}


def measure(settings: Settings) -> Result:
    perturbation = METHODS[settings["method"]][0](settings.get("rho", 0.0))
    ire = None if perturbation is None else IRE(kappa=0, perturbation=perturbation)
    split, seed, steps, lr, decay = (settings[name] for name in ("split", "seed", "steps", "lr", "weight_decay"))
    return train_digits(split, seed, steps, lr, decay, ire=ire)


def _differences(runs: Runs) -> dict[tuple[str, str], Difference]:
    return {
        (split, method): paired(reported(runs, split, method), reported(runs, split, "SGD"))
        for split in SPLITS
        for method in METHODS
        if method != "SGD"
    }


def _adjusted(runs: Runs) -> dict[tuple[str, str], float]:
    differences = _differences(runs)
    return dict(zip(differences, holm([one.p for one in differences.values()]), strict=True))


def verdict(runs: Runs) -> Verdict:
    differences = _differences(runs)
    luck = {key: searches(*(_by_trial(runs, key[0], method) for method in (key[1], "SGD"))) for key in differences}
    apart = told_apart([*differences.values()], [*luck.values()])
    clear = [key for key, one in zip(differences, apart, strict=True) if one]
    better = [key for key in clear if differences[key].mean > 0]
    said = []
    for split in SPLITS:
        best = max((key for key in differences if key[0] == split), key=lambda key: differences[key].mean)
        cheap = max(
            (key for key in differences if key[0] == split and METHODS[key[1]][1] < 1.5),
            key=lambda key: differences[key].mean,
        )
        said.append(
            f"{split}: {best[1]} {differences[best].show(scale=100)} points at {METHODS[best[1]][1]:g} times the "
            f"passes, of the cheap ones {cheap[1]} {differences[cheap].show(scale=100)} at {METHODS[cheap[1]][1]:g}, "
            f"SAM {differences[split, 'SAM'].show(scale=100)} at 2"
        )
    adjusted = _adjusted(runs)
    count = (
        f"{len(better)} of {len(differences)} paired comparisons with SGD are clearly better, "
        f"{len(clear) - len(better)} clearly worse, over seeds (Holm) and in all but "
        "5 % / comparisons of the searches with half of the trials; by seeds alone "
        f"{sum(adjusted[key] < 0.05 for key in differences)} are told apart"
    )
    short = "some pay" if better else "none told apart from SGD"
    return Verdict(short, f"{count}. {'; '.join(said)}.", f"{count}, test accuracy: {'; '.join(said)}.")


def tables(runs: Runs) -> str:
    differences, adjusted = _differences(runs), _adjusted(runs)
    rows = []
    for method, (_, price, _) in METHODS.items():
        row = [method, f"{price:g}"]
        for split in SPLITS:
            own = interval([100 * value for value in reported(runs, split, method).values()])
            row.append(f"{own.mean:.2f} ± {own.half:.2f}")
            gap = differences.get((split, method))
            row.append("" if gap is None else f"{gap.show(scale=100)} ({adjusted[split, method]:.2g})")
            luck = searches(_by_trial(runs, split, method), _by_trial(runs, split, "SGD"))
            row.append("" if gap is None or luck is None else luck.show())
        rows.append(row)
    head = ["method", "passes"]
    for split in SPLITS:
        head += [f"{split}: test accuracy, %", "minus SGD (p after Holm)", "searches with half of the trials"]
    settings = [[method, *(_short(chosen(runs, split, method)) for split in SPLITS)] for method in METHODS]
    return "\n\n".join([table(head, rows), table(["what tuning chose", *SPLITS], settings)])


def _short(settings: Settings) -> str:
    return ", ".join(f"{name} {settings[name]:g}" for name in ("lr", "weight_decay", "rho") if name in settings)


def draw(runs: Runs) -> None:
    figure, (axes,) = plt.subplots(1, len(SPLITS), figsize=(11, 5.5), layout="constrained", squeeze=False)
    differences = _differences(runs)
    for axis, split in zip(axes, SPLITS, strict=True):
        for place, price in enumerate(sorted({one[1] for one in METHODS.values()})):
            names = [name for name in METHODS if METHODS[name][1] == price and name != "SGD"]
            for index, name in enumerate(names):
                one = differences[split, name]
                x = place + 0.7 * (index - (len(names) - 1) / 2) / max(len(METHODS) // 2, 1)
                axis.errorbar(x, 100 * one.mean, yerr=100 * one.half, fmt="o", capsize=3, label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        prices = sorted({one[1] for one in METHODS.values()})
        axis.set_xticks(range(len(prices)), [f"{price:g}" for price in prices])
        trials = len(ranked(runs, split, "SGD"))
        axis.set(title=f"{split} ({trials} trials each)", xlabel="forward and backward passes, a plain run's being 1")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("points of test accuracy more than SGD, 95 %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    spread = mean(100 * one.half for one in differences.values())
    figure.suptitle(f"Accuracy against cost; intervals are ± {spread:.1f} points on average")
    figure.savefig(FIGURES / "relatives.png", dpi=100)
    plt.close(figure)
