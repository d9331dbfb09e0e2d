"""The range tests: a training in a copy of the trainer and the module, in which one value rises from step to step."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm.auto import tqdm

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError, check_number, check_whole
from lightning_ire.callbacks import IRE, SharpnessMonitor
from lightning_ire.engine.object_state import kept
from lightning_ire.engine.recipe import AUTO, GROUP_KAPPA
from lightning_ire.engine.replay import loss_of
from lightning_ire.find._result import (
    RangeTest,
    crossing,
    diverges,
    doubling,
    raising,
    smoothed,
    spaced,
    steepest_descent,
)
from lightning_ire.perturbation import SAM, Perturbation
from lightning_ire.schedule import Start

__all__ = ["kappas", "learning_rates", "radii"]

_SMOOTHING = 0.9  # weight of the past in the loss that says when the test is over
_PROBE: dict[str, Any] = {"tolerance": 0.01, "max_iterations": 30}  # a ratio to a per cent is enough here


def learning_rates(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Any = None,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    measurements: int = 8,
    progress: bool = True,
) -> RangeTest:
    """A learning-rate range test with the trainer's IRE and SAM at work.

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186): the rate rises exponentially
    from step to step until the loss diverges. Here every step is the run's own, with SAM's ascent and IRE's boost on
    from the first one, whatever `start_*` says; the run's schedule of the rate is left out, and parameter groups keep
    the proportions of their rates. The suggestion is the rate at which the smoothed loss falls fastest by the logarithm
    of the rate, or the one at which `stability/ratio` passes 1, if that is lower and known.

    The test runs in copies: the trainer, the module, a datamodule and the random streams are as before afterwards to
    the bit (of loaders: what :class:`~lightning_ire.SharpnessMonitor` puts back of a dataset). No other callback and
    no logger takes part.

    Args:
        trainer: A trainer that has not trained yet.
        module: A module in automatic optimization with one optimizer.
        data: A datamodule, or training loaders; ``None``: the module's own.
        low: First rate, > 0; that of the group with the highest rate.
        high: Last rate.
        steps: Optimizer steps, at least 10.
        measurements: At how many of the rates the stability ratio is measured; 0: nowhere.
        progress: Whether a bar is shown.

    Returns:
        The rates that were tried and the losses, the ratios, the suggestion and where it comes from.

    Raises:
        ConfigurationError: If an argument is out of range, or for a set-up that is not supported.

    Cost: `steps` steps of training; for each measurement up to 30 Hessian products (60 with SAM) on one batch, each of
    two forward and backward passes; a copy of the module.
    """
    test = _LearningRates(spaced(*_range(low, high), check_whole("steps", steps, low=10)), measurements)
    found = test.run(trainer, module, data, progress)
    steepest, limit = steepest_descent(found.values, found.losses), crossing(found.ratios)
    if steepest is None:
        found.reason = "the loss falls nowhere in the range: change `low` and `high`"
    elif limit is not None and limit < steepest:
        if limit == found.values[0]:
            found.reason = f"stability/ratio is above 1 from the lowest rate on, {limit:.3g}: lower `low`"
        else:
            found.suggestion = limit
            found.reason = f"stability/ratio passes 1 there; the loss falls fastest at {steepest:.3g}"
    else:
        found.suggestion = steepest
        passes = (
            f"passes 1 at {limit:.3g}" if limit is not None else "stays below 1" if found.ratios else "is not known"
        )
        found.reason = f"the loss falls fastest there; stability/ratio {passes}"
    return found


def kappas(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Any = None,
    *,
    low: float = 0.1,
    high: float = 100.0,
    steps: int = 100,
    warm_up: int = 20,
    measurements: int = 4,
    progress: bool = True,
) -> RangeTest:
    """A range test of IRE's kappa at the run's learning rate, and the largest kappa that is stable.

    First `warm_up` steps of the run as it is configured, with its schedule and kappa 0 (masks are made). Then the
    largest stable kappa is measured for the mask in force (`stability/kappa_headroom`:
    :func:`~lightning_ire.functional.largest_stable_kappa`), at the highest learning rate of the schedule, as far as
    the optimizer knows it ("initial_lr", "max_lr"), and kappa rises exponentially from step to step at that rate. The
    suggestion is `kappa_safety` times the largest stable kappa, or the kappa with the lowest smoothed loss, if the loss
    diverged later and that is lower.

    Args:
        trainer: See :func:`learning_rates`; without an IRE among its callbacks: ``IRE()``.
        module: See :func:`learning_rates`.
        data: See :func:`learning_rates`.
        low: First kappa, > 0.
        high: Last kappa.
        steps: Optimizer steps of the range test, at least 10.
        warm_up: Steps before it, at least 1.
        measurements: At how many kappas the stability ratio is measured as well.
        progress: Whether a bar is shown.

    Returns:
        The kappas that were tried and the losses, the ratios, the headroom, the suggestion and where it comes from.

    Raises:
        ConfigurationError: If an argument is out of range, for strengths by name or parameter group, or for a set-up
            that is not supported.

    Cost: as :func:`learning_rates`; the largest stable kappa takes up to 180 Hessian products (360 with SAM), half of
    that as a rule.
    """
    values = spaced(*_range(low, high), check_whole("steps", steps, low=10))
    test = _Kappas(values, measurements, check_whole("warm_up", warm_up, low=1))
    found = test.run(trainer, module, data, progress)
    lowest = found.values[_place_of_least(smoothed(found.losses))] if found.losses else math.inf
    if found.headroom is not None and not (found.diverged and lowest < test.safety * found.headroom):
        found.suggestion = test.safety * found.headroom
        passes, text = crossing(found.ratios), f"{test.safety:g} of the largest stable kappa, {found.headroom:.3g}"
        found.reason = text if passes is None else f"{text}; while kappa rose, stability/ratio passed 1 at {passes:.3g}"
    elif found.diverged and found.losses:
        found.suggestion = lowest
        stable = "is not known" if found.headroom is None else f"is {found.headroom:.3g}"
        found.reason = f"the lowest loss before it diverged; the largest stable kappa {stable}"
    else:
        found.reason = "the stability is not known, and no kappa in the range makes the loss diverge: raise `high`"
        if not found.losses:
            found.reason = "there is no finite loss: look at the run with kappa 0 first"
    return found


def radii(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Any = None,
    *,
    low: float = 1e-3,
    high: float = 1.0,
    steps: int = 30,
    warm_up: int = 20,
    progress: bool = True,
) -> RangeTest:
    """The ascent gap of SAM and the loss at the perturbed weights over the radius rho.

    First `warm_up` steps of the run as it is configured; then, without training, the loss on one batch at theta + d,
    d = rho g / ||g||, for all radii (ASAM: rho T^2 g / ||T g||, if that is the run's perturbation), in training mode.
    The suggestion is a rule of thumb of this package, a scale to begin with: the radius at which the ascent raises the
    loss by a tenth, or at which the gap is twice its first order rho ||g||, if that is smaller (above it the curvature
    says most of the gap).

    Args:
        trainer: See :func:`learning_rates`.
        module: See :func:`learning_rates`.
        data: See :func:`learning_rates`.
        low: Smallest radius, > 0.
        high: Largest radius.
        steps: Number of radii, at least 2.
        warm_up: Optimizer steps before; 0: none.
        progress: Whether a bar is shown.

    Returns:
        The radii, losses and gaps, the suggestion and where it comes from.

    Raises:
        ConfigurationError: If an argument is out of range, or for a set-up that is not supported.

    Cost: `warm_up` steps of training, one backward pass and `steps` + 2 forward passes; a copy of the module.
    """
    values = spaced(*_range(low, high), check_whole("steps", steps, low=2))
    test = _Radii(values, 0, check_whole("warm_up", warm_up, low=0))
    found = test.run(trainer, module, data, progress)
    loss = found.losses[0] - found.gaps[0] if found.gaps else 0.0
    candidates = (
        (raising(found.values, found.gaps, loss), f"the ascent raises the loss, {loss:.3g}, by a tenth there"),
        (doubling(found.values, found.gaps, found.slope or 0.0), "the ascent gap is twice its first order there"),
    )
    known = [(rho, reason) for rho, reason in candidates if rho is not None]
    if not known:
        found.reason = "the gap stays below a tenth of the loss and twice its first order: raise `high`"
    elif min(known)[0] == found.values[0]:
        found.reason = "the gap is above a tenth of the loss or twice its first order from `low` on: lower it"
    else:
        found.suggestion, found.reason = min(known)
    return found


class _Test(Callback):
    """A callback that sets a value before each step and keeps the loss; what kinds of tests differ in is below.

    Args:
        values: The values.
        measurements: At how many of them the stability is measured.
        warm_up: Steps before the first one.
    """

    key = ""

    def __init__(self, values: list[float], measurements: int, warm_up: int = 0) -> None:
        self.values, self.warm_up = values, warm_up
        count = min(check_whole("measurements", measurements, low=0), len(values))
        self.measured = {round(i * (len(values) - 1) / max(count - 1, 1)) for i in range(count)}
        self.found = RangeTest(self.key)
        self.monitor = SharpnessMonitor(None, None, ["stability"], **_PROBE)
        self.step = 0  # optimizer steps so far
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.average, self.weight, self.best = 0.0, 0.0, math.inf

    def run(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any, progress: bool) -> RangeTest:
        """Do the test in copies of everything."""
        _check(trainer, module)
        ire = self.prepared(_ire_of(trainer))
        self.found.notes += _on_from_the_first_step(ire)
        with isolate_rng(), kept(*([] if isinstance(data, LightningDataModule) or data is None else [data])):
            apart, twin, loaders = _copies(trainer, module, data)
            total = self.warm_up + len(self.values)
            apart.callbacks = [self, ire]  # type: ignore[attr-defined]
            apart.limit_val_batches = apart.num_sanity_val_steps = 0
            if apart.max_epochs not in (None, -1):
                apart.fit_loop.max_epochs = max(apart.max_epochs, total)
            if apart.max_steps != -1:
                apart.fit_loop.epoch_loop.max_steps = max(apart.max_steps, total)
            name = f"find {self.key}"
            self.bar = tqdm(total=total, desc=name, disable=not (progress and trainer.is_global_zero), leave=False)
            with self.bar, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="IRE is on from the first step, while")  # as it is to be
                if isinstance(loaders, LightningDataModule):
                    apart.fit(twin, datamodule=loaders)
                else:
                    apart.fit(twin, loaders)
        return self.found

    def prepared(self, ire: IRE) -> IRE:
        """The copy of IRE that takes part."""
        if ire.kappa == AUTO:
            raise ConfigurationError(f"Expected `kappa` to be a number for find {self.key}, got 'auto': set `kappa`.")
        return ire

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The warm-up is over."""

    def set(self, trainer: pl.Trainer, value: float) -> None:
        """Set the value of the next step."""

    # Hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the test end when it is over, and drop schedules that follow a validation that is not made."""
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
        strategy = trainer.strategy
        strategy.lr_scheduler_configs = [one for one in trainer.lr_scheduler_configs if not one.reduce_on_plateau]
        if len(trainer.optimizers) != 1:
            raise ConfigurationError(f"Expected one optimizer for a range test, got {len(trainer.optimizers)}.")
        self.initial = [_highest(group) for group in trainer.optimizers[0].param_groups]
        self.steps_before = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the value where a step begins, and measure."""
        place = self.step - self.warm_up
        if self.losses or place < 0 or trainer.should_stop:
            return
        if place == 0:
            self.begin(trainer, pl_module)
            if trainer.should_stop:
                return
        self.set(trainer, self.values[place])
        if place in self.measured:
            ratio = self.monitor.measure(trainer, pl_module).values.get(tags.RATIO, math.nan)
            if math.isfinite(ratio):
                self.found.ratios.append((self.values[place], ratio))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of a step that was made, and end the test."""
        loss = loss_of(outputs) if outputs else None
        if isinstance(loss, Tensor):  # Lightning reports it divided by the number of micro-batches
            self.losses.append(loss.detach().float() * trainer.accumulate_grad_batches)
        if trainer.global_step == self.steps_before or trainer.should_stop:
            return
        self.steps_before = trainer.global_step
        mean = torch.stack(self.losses).mean() if self.losses else torch.tensor(math.nan)
        self.losses = []
        place, self.step = self.step - self.warm_up, self.step + 1
        self.bar.update()
        if place < 0:
            return
        self._keep(self.values[place], float(trainer.strategy.reduce(mean, reduce_op="mean")))
        trainer.should_stop = self.found.diverged or place == len(self.values) - 1

    def _keep(self, value: float, loss: float) -> None:
        self.average = _SMOOTHING * self.average + (1 - _SMOOTHING) * loss
        self.weight = _SMOOTHING * self.weight + (1 - _SMOOTHING)
        now = self.average / self.weight
        self.best = min(self.best, now)
        first = self.found.losses[0] if self.found.losses else loss
        self.found.diverged = diverges(now, first, self.best)
        if math.isfinite(loss):
            self.found.values.append(value)
            self.found.losses.append(loss)


class _LearningRates(_Test):
    key = "lr"

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.lr_scheduler_configs = []

    def set(self, trainer: pl.Trainer, value: float) -> None:
        most = max(self.initial)
        for group, rate in zip(trainer.optimizers[0].param_groups, self.initial, strict=True):
            group["lr"] = group["initial_lr"] = value * (rate / most if most > 0 else 1.0)


class _Kappas(_Test):
    key = "kappa"

    def prepared(self, ire: IRE) -> IRE:
        if not (isinstance(ire.kappa, float) or ire.kappa == AUTO):
            raise ConfigurationError(
                f"Expected `kappa` to be one number for find kappa, got {ire.kappa!r}: set `kappa` to a number."
            )
        self.safety = ire.kappa_safety
        ire.kappa = 1.0  # that of each step is its parameter groups'
        return ire

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if any(GROUP_KAPPA in group for group in trainer.optimizers[0].param_groups):
            raise ConfigurationError(f"Expected no `{GROUP_KAPPA}` in parameter groups for find kappa: leave it out.")
        self.set(trainer, 0.0)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.lr_scheduler_configs = []
        for group, rate in zip(trainer.optimizers[0].param_groups, self.initial, strict=True):
            group["lr"] = rate
        monitor = SharpnessMonitor(None, None, ["kappa_headroom"], **_PROBE)
        headroom = monitor.measure(trainer, module).values.get(tags.KAPPA_HEADROOM)
        self.found.headroom = headroom

    def set(self, trainer: pl.Trainer, value: float) -> None:
        for group in trainer.optimizers[0].param_groups:
            group[GROUP_KAPPA] = value


class _Radii(_Test):
    key = "rho"

    def prepared(self, ire: IRE) -> IRE:
        perturbation = super().prepared(ire).perturbation
        self.sam = perturbation if isinstance(perturbation, SAM) and perturbation.adaptive else None
        if perturbation is not None and self.sam is None and type(perturbation) is not SAM:
            self.found.notes.append(f"the gap is that of SAM(rho), not that of {perturbation!r}")
        return ire

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = True
        sam = self.sam
        with self.monitor.landscape(trainer, module) as landscape, landscape.mode("train"):
            adaptive = [sam is not None and sam.adapts(name) for name in landscape.names]
            gaps, loss, slope = landscape.ascent_gaps(self.values, adaptive, 0.0 if sam is None else sam.eta)
        self.bar.update(len(gaps))
        self.found.slope = slope
        for value, gap in zip(self.values, gaps, strict=True):
            if math.isfinite(gap):
                self.found.values.append(value)
                self.found.gaps.append(gap)
                self.found.losses.append(loss + gap)


def _range(low: float, high: float) -> tuple[float, float]:
    low = check_number("low", low, low_open=True)
    return low, check_number("high", high, low=low, low_open=True)


def _check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what cannot be tested, before anything is made."""
    if trainer.global_step or trainer.current_epoch:
        raise ConfigurationError(
            f"Expected a trainer that has not trained yet for a range test, got one after {trainer.global_step} steps: "
            "make a new Trainer."
        )
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigurationError("Expected `fast_dev_run` to be false for a range test, got true: leave it out.")
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"Expected a module in automatic optimization for a range test, got {type(module).__name__} in manual "
            "optimization, whose loss is not known."
        )


def _ire_of(trainer: pl.Trainer) -> IRE:
    """A fresh copy of the trainer's IRE (or of its perturbation as one)."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found: Any = next((one for one in callbacks if isinstance(one, (IRE, Perturbation))), None)
    if found is None:
        return IRE(kappa=0.0)
    return copy.deepcopy(found if isinstance(found, IRE) else IRE(kappa=0.0, perturbation=found))


def _on_from_the_first_step(ire: IRE) -> list[str]:
    """Take starts, stops and the growth of kappa away; returns what was left out."""
    notes = []
    if ire.boosts and not ire.start.at_once:
        notes.append(f"`{ire.start.key}` is left out: the boost is on from the first step of the test")
    if ire.boosts and ire.kappa_schedule == "ramp":
        notes.append("`ramp_steps` is left out: the boost has its full strength from the first step of the test")
        ire.kappa_schedule, ire.ramp_steps = "constant", None
    perturbation = ire.perturbation
    if perturbation is not None and not (perturbation.start.at_once and perturbation.stop.immediate):
        notes.append(f"the start and stop of {perturbation!r} are left out: it is on all the time")
        perturbation.start, perturbation.stop = Start(), Start(name="stop")
    ire.start = Start()
    return notes


def _copies(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> tuple[pl.Trainer, pl.LightningModule, Any]:
    """Copies of a trainer without its callbacks and loggers, of a module and of a datamodule; loaders as they are."""
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        apart, twin, other = copy.deepcopy((trainer, module, data if isinstance(data, LightningDataModule) else None))
    except Exception as error:
        raise ConfigurationError(
            f"Expected a module and a datamodule that can be copied for a range test, got {type(module).__name__}: "
            f"{error}."
        ) from error
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
    return apart, twin, data if other is None else other


def _highest(group: dict[str, Any]) -> float:
    """The highest learning rate that a parameter group is known to get."""
    rates = [group[key] for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None]
    return max(map(float, rates))


def _place_of_least(numbers: Sequence[float]) -> int:
    return min(range(len(numbers)), key=numbers.__getitem__)
