"""IRE beside four optimizers that the paper does not have: Lion, Muon, SOAP and Shampoo, on the digits.

Protocol as for tables 1 to 3: every method gets the same number of trials, at the same points of a scrambled Sobol
sequence; of an optimizer, of the same with IRE, and of the control, trial i has the same learning rate and decay.
kappa, gamma and the start are coordinates of their own. Trials are ranked by validation accuracy on one tuning seed
that is not reported; the best is trained with the reporting seeds, paired by seed. Other settings of an optimizer are
those of the package. Optimizers are not compared with each other: the ranges that they were tuned in are not equal.

A choice that is the smallest or the largest rate of its trials is marked: there the range may end too early. IRE's
steps are longer, so the ranges begin well below what suits the optimizer alone.

The control, tuned with as many trials, is IRE with gamma = 1: all coordinates are boosted, a longer step. Where IRE
does no better than this, flatness is not the reason. A difference is called clear only if it is told apart over seeds
(Holm, in two families: with the optimizer alone, with the control) and the searches with half of the trials agree.

Lion (arXiv 2302.06675), SOAP (arXiv 2409.11321) and Shampoo (arXiv 1802.09568, without momentum and with a root of the
statistics at every step) are those of pytorch_optimizer, and so is Muon: it moves the kernels of convolutions, as
matrices, with updates scaled to the size of AdamW's (arXiv 2502.16982), so that AdamW moves the rest at the same rate.

A ResNet of 19,074 parameters, 300 steps, cosine to 0, label smoothing 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytorch_optimizer
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import train_digits
from claims.accuracy import _logarithmic, _points, _ratio, _short, chosen, luck, make_ire, reported, search
from claims.accuracy import _point as _point_of_accuracy
from lightning_ire.compare.statistics import Difference, Searches, holm, interval, paired, told_apart

QUESTION = "Does IRE help Lion, Muon, SOAP and Shampoo at equal tuning?"
SPLIT = "noisy labels"


def _muon(parameters: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon for the kernels of convolutions, as matrices [out, in * 9]; AdamW for the linear layer, biases and scales.

    Both take the same rate and decay, since updates are scaled to the size of AdamW's (arXiv 2502.16982).
    """
    listed = list(parameters)
    groups = [
        {"params": [one for one in listed if (one.dim() == 4) is use], "use_muon": use, "weight_decay": weight_decay}
        for use in (True, False)
    ]
    return pytorch_optimizer.Muon(groups, lr=lr, adamw_lr=lr, use_adjusted_lr=True)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, float], tuple[float, float]]] = {
    "Lion": (pytorch_optimizer.Lion, (1e-5, 3e-3), (0.01, 10.0)),  # the ranges of the rate and the decay
    "Muon": (_muon, (1e-4, 0.03), (1e-3, 1.0)),
    "SOAP": (pytorch_optimizer.SOAP, (1e-4, 0.03), (1e-3, 1.0)),
    "Shampoo": (pytorch_optimizer.Shampoo, (5e-3, 0.5), (1e-4, 1e-2)),
}
FORMS = ALONE, TREATED, CONTROL = "{}", "{}-IRE", "{}-IRE, gamma = 1"
SIZES = {"default": (8, 1, 3, 300), "full": (16, 1, 8, 300), "tiny": (2, 1, 2, 4)}  # as in accuracy.py


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    trials, tuning, reporting, steps = SIZES[size]
    planned = []
    for name in OPTIMIZERS:
        for form in FORMS[: 2 if size == "default" else None]:
            method = form.format(name)
            options = [
                {"split": SPLIT, "method": method, "trial": trial, "steps": steps, **_point(name, method, trial)}
                for trial in range(trials)
            ]
            planned += search(runs, options, tuning, reporting)
    return planned


def _point(name: str, method: str, trial: int) -> dict[str, Any]:
    """The settings of a trial: kappa, gamma and start as in the claim on SGD, SAM and AdamW."""
    lr, decay, *_ = _points()[trial]
    _, rates, decays = OPTIMIZERS[name]
    own = {"lr": _logarithmic(*rates, lr), "weight_decay": _logarithmic(*decays, decay)}
    return _point_of_accuracy(method, trial) | own


def measure(settings: Settings) -> Result:
    optimizer = OPTIMIZERS[settings["method"].partition("-")[0]][0]
    seed, steps, lr, decay = (settings[name] for name in ("seed", "steps", "lr", "weight_decay"))
    return train_digits(SPLIT, seed, steps, lr, decay, optimizer=optimizer, ire=make_ire(settings))


class Compared(NamedTuple):
    """What IRE gains on a base; the luck of the search; p after Holm's correction; whether it is told apart."""

    gain: Difference
    luck: Searches | None
    p: float
    clear: bool


def _compared(runs: Runs, base: str) -> dict[str, Compared]:
    """By optimizer, against `ALONE` or `CONTROL`: one family of comparisons."""
    names = [name for name in OPTIMIZERS if runs.where(method=base.format(name))]
    pairs = [(TREATED.format(name), base.format(name)) for name in names]
    gains = [paired(*(reported(runs, SPLIT, method) for method in pair)) for pair in pairs]
    chances = [luck(runs, SPLIT, *pair) for pair in pairs]
    found = zip(gains, chances, holm([one.p for one in gains]), told_apart(gains, chances), strict=True)
    return dict(zip(names, (Compared(*one) for one in found), strict=True))


def _signs(found: list[Compared]) -> str:
    better = sum(one.gain.mean > 0 for one in found)
    return f"better in {better}, worse in {len(found) - better}"


def verdict(runs: Runs) -> Verdict:
    said, helped = [], []
    for base, name in ((ALONE, "the optimizer alone"), (CONTROL, "gamma = 1 (a longer step)")):
        if compared := _compared(runs, base):
            helped.append({name for name, one in compared.items() if one.clear and one.gain.mean > 0})
            said.append(
                f"against {name} IRE is clearly {_signs([one for one in compared.values() if one.clear])} of "
                f"{len(compared)} (by seeds alone {_signs([one for one in compared.values() if one.p < 0.05])}): "
                + ", ".join(f"{name} {one.gain.show(scale=100)}" for name, one in compared.items())
            )
    seeds = next(iter(_compared(runs, ALONE).values())).gain.pairs
    short = "no gain told apart"
    if helped[0]:
        short = "helps some" if set.intersection(*helped) else "no more than a longer step"
    text = f"noisy labels, points of test accuracy over {seeds} seeds at equal tuning: {'; '.join(said)}."
    return Verdict(short, f"Digits, {text}", text[0].upper() + text[1:])


def tables(runs: Runs) -> str:
    methods = [form.format(name) for name in OPTIMIZERS for form in FORMS if runs.where(method=form.format(name))]
    rows = []
    for method in methods:
        own = interval([100 * one for one in reported(runs, SPLIT, method).values()])
        settings = chosen(runs, SPLIT, method)
        rows.append([method, f"{own.mean:.2f} ± {own.half:.2f}", _short(settings) + _at_an_end(runs, settings)])
    accuracy = table(["method", f"{SPLIT}: test accuracy, %", "what tuning chose"], rows)
    rows = [
        [
            f"{TREATED.format(name)} - {base.format(name)}",
            one.gain.show(scale=100),
            f"{one.gain.p:.2g}",
            f"{one.p:.2g}",
            one.luck.show() if one.luck else "",
            "yes" if one.clear else "no",
            f"{_ratio(runs, SPLIT, TREATED.format(name), base.format(name)):.2f}",
        ]
        for base in (ALONE, CONTROL)
        for name, one in _compared(runs, base).items()
    ]
    head = ["paired difference", "points of test accuracy", "p", "p after Holm"]
    head += ["searches with half of the trials: mean (95 %), better in", "clear", "ratio of Tr F"]
    return f"{accuracy}\n\n{table(head, rows)}"


def _at_an_end(runs: Runs, settings: Settings) -> str:
    """A word where no trial of the method has a smaller rate, or none a larger one."""
    rates = [one["lr"] for one, _ in runs.where(split=SPLIT, method=settings["method"])]
    for end, found in (("smallest", min(rates)), ("largest", max(rates))):
        if settings["lr"] == found:
            return f" (the {end} rate)"
    return ""


def draw(runs: Runs) -> None:
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for place, (base, label) in enumerate([(ALONE, "the optimizer alone"), (CONTROL, "IRE with gamma = 1")]):
        gains = {name: one.gain for name, one in _compared(runs, base).items()}
        axis.errorbar(
            [100 * one.mean for one in gains.values()],
            [list(OPTIMIZERS).index(name) + 0.24 * (place - 0.5) for name in gains],
            xerr=[100 * one.half for one in gains.values()],
            fmt="os"[place],
            capsize=3,
            label=f"IRE minus {label}",
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(
        title=f"{SPLIT}: what IRE adds", xlabel="points of test accuracy, 95 %", ylim=(len(OPTIMIZERS) - 0.5, -0.5)
    )
    axis.set_yticks(range(len(OPTIMIZERS)), list(OPTIMIZERS))
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(FIGURES / "optimizers.png", dpi=100)
    plt.close(figure)
