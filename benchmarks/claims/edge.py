"""Edge of stability: `stability/ratio` along the run, and how far the weights go along flat and sharp coordinates.

Not a claim of the paper: what IRE is for, put to the ratio that `SharpnessMonitor` logs, the effective sharpness of
the run's own step (SAM and IRE's boost included) over its limit, above which steps blow up near a quadratic. Full-batch
gradient descent sharpens the loss until this is 1 and then stays there (Cohen et al., arXiv 2103.00065).

The digits with noisy labels (500 images, label smoothing 0.1, which the loss below is without), a tanh network (64, 32,
32, 10; 3,466 parameters, no BatchNorm), SGD without momentum and decay at a constant learning rate of 0.3, SAM with rho
0.05, IRE from the first step with kappa 2 and gamma 0.9; the same for all methods, nothing tuned, five seeds. With 0.3
plain full-batch SGD reaches the edge after about 200 of 640 steps. That rate, the network and the data were chosen on
seeds 0 and 1000, which are not reported, because the ResNet of the other claims hardly sees the edge on the digits: its
images are fitted in a few dozen steps, and the sharpness falls again. `SGD, longer step` is a control: three times, 1 +
kappa times, the learning rate.

The Hessian is that of the loss on all 500 images, in training mode (which is eval mode here), every 20 steps. That
is the loss that full-batch steps descend. For mini-batches of 50 the premise is another one: the ratio leaves out the
noise of the batches, and a run may leave the neighbourhood of a minimum below 1. `ratio with noise` is
`stability/sgd_ratio` (without SAM, from five batches), a necessary condition and no limit that runs have to reach.

Which coordinates are flat every method says itself, by IRE's own mask, made anew every 10 steps. Methods without IRE
run the callback with kappa = 1e-30: its masks and its log, and the weights of plain SGD to the bit
(tests/test_claims.py).

- `step`: `ire/step_norm_flat` and `ire/step_norm_sharp`, root mean square over the steps between two measurements.
- `net`: the norm of the move from one measurement to the next over the same coordinates, divided by the 20 steps: what
  is left of the steps when those to and fro, which the edge is made of, cancel.

All averages are over the stretch of a run in which the loss on the training images is between 0.9 and 0.55, which all
runs get through, so that methods are compared at equal loss. Factors are geometric means over the seeds of treated /
base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib import pyplot as plt
from torch import Tensor, nn

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import Classifier, Digits, make_trainer
from lightning_ire import IRE, SAM, SharpnessMonitor, tags
from lightning_ire.compare.statistics import Difference, holm, interval, paired

QUESTION = "Edge of stability: does IRE let flat directions go further at the same ratio?"
LR, KAPPA, GAMMA, RHO = 0.3, 2.0, 0.9, 0.05
NO_BOOST = 1e-30  # IRE with its masks and its log, whose boost rounds to nothing
LONGER = "SGD, longer step"
METHODS: dict[str, dict[str, float]] = {
    "SGD": {"lr": LR, "kappa": NO_BOOST},
    "SGD-IRE": {"lr": LR, "kappa": KAPPA},
    "SAM": {"lr": LR, "kappa": NO_BOOST, "rho": RHO},
    "SAM-IRE": {"lr": LR, "kappa": KAPPA, "rho": RHO},
    LONGER: {"lr": (1 + KAPPA) * LR, "kappa": NO_BOOST},
}
BATCHES = {"full batch": 500, "mini-batch": 50}
SIZES = {"default": (3, 640), "full": (5, 640), "tiny": (1, 40)}  # seeds, steps
EVERY = 20  # steps between two measurements
HIGH, LOW = 0.9, 0.55  # training loss of the stretch that is compared
IRE_PAIRS = [("SGD-IRE", "SGD"), ("SAM-IRE", "SAM")]
PAIRS = [*IRE_PAIRS, (LONGER, "SGD"), ("SGD-IRE", LONGER)]
NORMS = {"flat_step": "flat, step", "flat_net": "flat, net", "sharp_step": "sharp, step", "sharp_net": "sharp, net"}
MEASURED = {
    tags.RATIO: "ratio",
    tags.LAMBDA_MAX: "lambda_max",
    tags.KAPPA_HEADROOM: "headroom",
    tags.SGD_RATIO: "sgd_ratio",
}


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    seeds, steps = SIZES[size]
    return [
        {"batch": batch, "method": method, **settings, "steps": steps, "seed": seed}
        for batch in BATCHES
        for method, settings in METHODS.items()
        for seed in range(1, seeds + 1)
    ]


def split(ire: IRE, module: Classifier, moves: list[Tensor]) -> tuple[float, float]:
    """Norms of a move of the weights over the coordinates that are flat now, and over the others."""
    factors = ire.boost_factors(module, module.trainer.optimizers[0], kappa=1.0)
    pairs = [(move, factors[id(weight)] - 1) for move, weight in zip(moves, module.parameters(), strict=True)]
    flat = math.hypot(*(float((move * n).norm()) for move, n in pairs))
    return flat, math.hypot(*(float((move * (1 - n)).norm()) for move, n in pairs))


class Recorder(Callback):
    """Every `every` steps what the monitors measured, the loss, and how far the weights have gone since the last time.

    Args:
        ire: The run's callback, whose steps' norms are logged at every step.
        every: Optimizer steps.
        batch: All training images, for the loss.
    """

    def __init__(self, ire: IRE, every: int, batch: tuple[Tensor, Tensor]) -> None:
        self.ire, self.every, self.batch = ire, every, batch
        self.rows: list[dict[str, float]] = []
        self._norms: list[tuple[float, float]] = []
        self._weights: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: Classifier) -> None:  # type: ignore[override]
        self._weights = [weight.detach().clone() for weight in module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, *_: Any) -> None:  # type: ignore[override]
        values = trainer.callback_metrics
        self._norms.append((float(values[tags.STEP_NORM_FLAT]), float(values[tags.STEP_NORM_SHARP])))
        if trainer.global_step % self.every:
            return
        now = [weight.detach().clone() for weight in module.parameters()]
        moved = split(self.ire, module, [new - old for new, old in zip(now, self._weights, strict=True)])
        steps = [math.sqrt(fmean(norm**2 for norm in norms)) for norms in zip(*self._norms, strict=True)]
        self.rows.append(
            {
                "step": trainer.global_step,
                "loss": module.evaluate(*self.batch)[0],
                **{name: float(values[tag]) for tag, name in MEASURED.items() if tag in values},
                **dict(zip(("flat_step", "sharp_step"), steps, strict=True)),
                **{name: norm / self.every for name, norm in zip(("flat_net", "sharp_net"), moved, strict=True)},
            }
        )
        self._norms, self._weights = [], now


def classifier(seed: int, lr: float) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    return Classifier(
        network,
        partial(torch.optim.SGD, lr=lr),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        label_smoothing=0.1,
    )


def measure(settings: Settings) -> Result:
    size, seed = BATCHES[settings["batch"]], settings["seed"]
    data, module = Digits("noisy labels", seed, size), classifier(seed, settings["lr"])
    ire = IRE(settings["kappa"], GAMMA, perturbation=SAM(settings["rho"]) if "rho" in settings else None)
    images = len(data.parts["train"][1])
    watch = partial(SharpnessMonitor, every_n_steps=EVERY, every_n_epochs=None, mode="train", tolerance=1e-2)
    monitors = [watch(quantities=["lambda_max", "stability", "kappa_headroom"], batch_size=images)]
    if size < images and "rho" not in settings:
        monitors.append(watch(quantities=["sgd_ratio"], batch_size=size, num_batches=5, max_vectors=40))
    recorder = Recorder(ire, EVERY, data.parts["train"])
    make_trainer(settings["steps"], ire, *monitors, recorder, log_every_n_steps=1).fit(module, data)
    return {name: [float(f"{row[name]:.4g}") for row in recorder.rows] for name in recorder.rows[0]}


def stretch(result: Result, name: str) -> float:
    """The mean over the measurements at which the loss is between the two limits."""
    return fmean(value for value, loss in zip(result[name], result["loss"], strict=True) if LOW <= loss <= HIGH)


def _values(runs: Runs, batch: str, method: str, name: str) -> dict[int, float]:
    """By seed, the mean over the stretch; nothing where it was not measured."""
    found = runs.where(batch=batch, method=method)
    return {settings["seed"]: stretch(result, name) for settings, result in found if name in result}


def _below(runs: Runs, batch: str, method: str) -> list[float]:
    """By seed, the first step at which the loss is below the stretch; the whole run where it never is."""
    return [
        next((step for step, loss in zip(result["step"], result["loss"], strict=True) if loss < LOW), settings["steps"])
        for settings, result in runs.where(batch=batch, method=method)
    ]


class Factor(NamedTuple):
    """Geometric mean of treated / base over the seeds, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def show(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def factor(treated: dict[int, float], base: dict[int, float]) -> Factor:
    """The interval is Student's t of the paired logarithms."""
    logs = paired(*({seed: math.log(value) for seed, value in one.items()} for one in (treated, base)))
    return Factor(*(math.exp(logs.mean + sign * logs.half) if sign else math.exp(logs.mean) for sign in (0, -1, 1)))


def _factor(runs: Runs, batch: str, pair: tuple[str, str], name: str) -> Factor:
    return factor(*(_values(runs, batch, method, name) for method in pair))


def _ratios(runs: Runs) -> dict[tuple[str, tuple[str, str]], Difference]:
    """How much more the ratio is than that of the base."""
    return {
        (batch, pair): paired(*(_values(runs, batch, method, "ratio") for method in pair))
        for batch in BATCHES
        for pair in PAIRS
    }


def _inflation(runs: Runs, batch: str) -> Difference:
    """The ratio of SGD-IRE's steps over that of the same steps without the boost, at the same weights."""
    ratios, tops = (_values(runs, batch, "SGD-IRE", name) for name in ("ratio", "lambda_max"))
    return interval([ratios[seed] / (LR * tops[seed] / 2) for seed in ratios])


def verdict(runs: Runs) -> Verdict:
    ratios = _ratios(runs)
    adjusted = dict(zip(ratios, holm([one.p for one in ratios.values()]), strict=True))
    nets = {key: _factor(runs, *key, "flat_net") for key in ratios}
    cases = [(batch, pair) for batch in BATCHES for pair in IRE_PAIRS]
    further = [key for key in cases if nets[key].low > 1]
    same = [key for key in further if adjusted[key] >= 0.05]
    inflation = [_inflation(runs, batch) for batch in BATCHES]
    controls = {batch: nets[batch, ("SGD-IRE", LONGER)] for batch in BATCHES}
    if len(further) < len(cases):
        short = "partly reproduced" if further else "not reproduced"
    elif all(one.low <= 1 for one in controls.values()):
        short = "further, but no more than with a longer step"
    else:
        short = "reproduced" if len(same) == len(cases) else "further, but not at the same ratio"
    return Verdict(
        short,
        f"Digits with noisy labels, kappa = {KAPPA:g}. At equal loss the net move along flat coordinates is "
        f"{min(nets[key].mean for key in cases):.1f} to {max(nets[key].mean for key in cases):.1f} times that without "
        f"IRE, at a ratio that is {min(ratios[key].mean for key in cases):.2f} to "
        f"{max(ratios[key].mean for key in cases):.2f} higher (told apart in {len(cases) - len(same)} of {len(cases)} "
        f"comparisons). SGD-IRE goes {' and '.join(f'{one.mean:.2f}' for one in controls.values())} times as far "
        f"(full batch, mini-batch) as SGD with {1 + KAPPA:g} times its learning rate. The mask leaves out the sharp "
        f"coordinates, not the sharp eigenvectors: the boost makes the ratio "
        f"{' and '.join(f'{one.mean:.1f}' for one in inflation)} times what it is without at the same weights.",
        " ".join(_sentence(runs, batch, ratios, nets) for batch in BATCHES)
        + f" {len(cases) - len(same)} of {len(cases)} ratios with IRE are told apart from those without (Holm).",
    )


def _sentence(runs: Runs, batch: str, ratios: Mapping[Any, Difference], nets: Mapping[Any, Factor]) -> str:
    settled = {method: interval([*_values(runs, batch, method, "ratio").values()]) for method in METHODS}
    means = ", ".join(f"{method} {one.mean:.2f} ± {one.half:.2f}" for method, one in settled.items())
    said = ", ".join(
        f"{pair[0]} / {pair[1]} {nets[batch, pair].show()} at a ratio {ratios[batch, pair].show()}" for pair in PAIRS
    )
    boosted = _inflation(runs, batch)
    rooms = {method: fmean(_values(runs, batch, method, "headroom").values()) for method in ("SGD", "SAM")}
    room = ", ".join(f"{method} {mean:.2f}" for method, mean in rooms.items())
    return (
        f"{batch.capitalize()}, mean ratio between losses {HIGH:g} and {LOW:g}: {means}. Net move along flat "
        f"coordinates: {said}. The boost of SGD-IRE makes the ratio {boosted.mean:.2f} ± {boosted.half:.2f} times what "
        f"it is without at the same weights ({1 + KAPPA:g}: the mask protects nothing). Kappa headroom without IRE: "
        f"{room}."
    )


def tables(runs: Runs) -> str:
    columns = {"ratio": 2, "sgd_ratio": 2, "lambda_max": 1, "headroom": 2, **dict.fromkeys(NORMS, 3)}
    rows = []
    for batch in BATCHES:
        for method in METHODS:
            cells = []
            for name, digits in columns.items():
                values = list(_values(runs, batch, method, name).values())
                one = interval(values) if values else None
                cells.append("" if one is None else f"{one.mean:.{digits}f} ± {one.half:.{digits}f}")
            rows.append([f"{batch}, {method}", *cells, f"{fmean(_below(runs, batch, method)):.0f}"])
    names = ["ratio", "ratio with noise", "lambda_max", "kappa headroom", *NORMS.values()]
    ratios = _ratios(runs)
    compared = [
        [
            f"{batch}, {pair[0]} / {pair[1]}",
            f"{one.show()} ({p:.2g})",
            *(_factor(runs, batch, pair, name).show() for name in NORMS),
        ]
        for ((batch, pair), one), p in zip(ratios.items(), holm([one.p for one in ratios.values()]), strict=True)
    ]
    stretch_of = f"between losses {HIGH:g} and {LOW:g}"
    head = [f"{stretch_of}, treated / base", "ratio: difference (p after Holm)"]
    return "\n\n".join(
        [
            table([stretch_of, *names, f"step at which the loss is {LOW:g}"], rows),
            table([*head, *(f"{one}: factor" for one in NORMS.values())], compared),
        ]
    )


def _mean_curve(runs: Runs, batch: str, method: str, name: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the seeds."""
    results = [result for _, result in runs.where(batch=batch, method=method)]
    return results[0]["step"], [fmean(values) for values in zip(*(one[name] for one in results), strict=True)]


def _draw_factors(runs: Runs, axis: Any) -> None:
    """Norms over those of the base."""
    places = {name: place for place, name in enumerate(NORMS)}
    cases = [(batch, pair) for pair in PAIRS for batch in BATCHES]
    for index, (batch, pair) in enumerate(cases):
        factors = [_factor(runs, batch, pair, name) for name in NORMS]
        means = [one.mean for one in factors]
        axis.errorbar(
            [place + 0.1 * (index - (len(cases) - 1) / 2) for place in places.values()],
            means,
            yerr=[[one.mean - one.low for one in factors], [one.high - one.mean for one in factors]],
            fmt="o" if batch == "full batch" else "s",
            markerfacecolor=None if batch == "full batch" else "white",
            color="black" if pair[1] == LONGER else f"C{list(METHODS).index(pair[0])}",
            capsize=3,
            label=f"{pair[0]} / {pair[1]}" if batch == "full batch" else None,
        )
    for height in (1, 1 + KAPPA):
        axis.axhline(height, color="black", linewidth=0.8, linestyle="--")
    axis.set(yscale="log", title="norms / those of the base (dots: full batch, squares: mini-batch)", ylim=(0.25, 9))
    axis.set_yticks([0.5, 1, 2, 3, 5], ["0.5", "1", "2", "3", "5"])
    axis.minorticks_off()
    axis.set_xticks(list(places.values()), list(NORMS.values()))
    axis.legend(fontsize=8, loc="upper right")


def draw(runs: Runs) -> None:
    figure, ((full, mini), (moves, factors)) = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    for axis, batch in ((full, "full batch"), (mini, "mini-batch")):
        for method in METHODS:
            axis.plot(*_mean_curve(runs, batch, method, "ratio"), label=method)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set(title=f"stability/ratio, {batch} of {BATCHES[batch]}", xlabel="optimizer steps", ylim=(0, None))
    full.legend(fontsize=9)
    for number, method in enumerate(("SGD", "SGD-IRE", LONGER)):
        colour = f"C{list(METHODS).index(method)}"
        for name, style in {"flat_step": "-", "flat_net": "--", "sharp_net": ":"}.items():
            label = NORMS[name] if number == 0 else None
            moves.plot(*_mean_curve(runs, "full batch", method, name), style, color=colour, label=label)
    moves.set(title="norms of steps and of net moves per step, full batch", xlabel="optimizer steps", yscale="log")
    moves.legend(fontsize=9)
    _draw_factors(runs, factors)
    for axis in (full, mini, moves, factors):
        axis.grid(alpha=0.3)
    figure.savefig(FIGURES / "edge.png", dpi=100)
    plt.close(figure)
