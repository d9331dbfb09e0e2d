"""One measurement: which quantities, what each costs, and their values with error bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ire import tags
from lightning_ire.callbacks._landscape import Landscape, MeasurementError
from lightning_ire.callbacks._step_geometry import StepGeometry, UnknownStep
from lightning_ire.functional import (
    Extremes,
    Krylov,
    MeanEstimate,
    SpectralDensity,
    adaptive_mean,
    deflated_trace,
    extreme_eigenvalues,
    hutchinson_trace,
    rademacher,
    ratio_of_means,
    spectral_density,
)

__all__ = ["BASIS", "QUANTITIES", "Measurement", "Quantity", "Settings", "measure", "most_work"]

Quantity = Literal[
    "trace_fisher",
    "trace_hessian",
    "trace_normalized",
    "layer_traces",
    "lambda_max",
    "lambda_min",
    "spectral_density",
    "ascent_gap",
    "stability",
    "sgd_ratio",
]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
"""What can be measured."""

BASIS = 20  # most Lanczos vectors kept
_DENSITY_VECTORS, _DENSITY_STEPS = 4, 30
_PERCENT = (0, 1, 10, 50, 90, 99, 100)  # quantiles of the density that are logged


@dataclass(frozen=True)
class Settings:
    """How the quantities are to be measured.

    Attributes:
        mode: "eval" or "train"; the stability of training steps is always that of training mode.
        relative_error: Standard error of a trace at which to stop, relative to it.
        max_vectors: Most random vectors (label draws for the Fisher) of one trace.
        tolerance: Residual of an eigenvalue at which to stop, relative to the largest.
        max_iterations: Most Lanczos steps.
        num_eigenvalues: How many of the largest eigenvalues.
        rho: Radius of the ascent gap in weight units.
        accumulate: Probe batches that make up one batch of training.
    """

    mode: str = "eval"
    relative_error: float = 0.05
    max_vectors: int = 64
    tolerance: float = 1e-3
    max_iterations: int = 50
    num_eigenvalues: int = 1
    rho: float = 0.05
    accumulate: int = 1


@dataclass
class Measurement:
    """What was measured at one moment.

    Attributes:
        step: The trainer's `global_step`.
        values: Numbers by log tag.
        layer_traces: Tr(H_ww) by parameter name.
        density: The spectral density of H, if asked for.
        skipped: Quantities that could not be measured, with the reason.
        out_of_memory: Whether memory was the reason for one of them.
    """

    step: int
    values: dict[str, float] = field(default_factory=dict)
    layer_traces: dict[str, float] = field(default_factory=dict)
    density: SpectralDensity | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    out_of_memory: bool = False

    def add(self, tag: str, value: float, stderr: float | None = None) -> None:
        """Keep a number and its standard error.

        Args:
            tag: Log tag.
            value: The number.
            stderr: Its standard error, if it is an estimate.
        """
        self.values[tag] = value
        if stderr is not None:
            self.values[tag + tags.STDERR] = stderr


@dataclass
class _Work:
    """The measurements; each method gets the quantities that are wanted of those it can tell."""

    trainer: pl.Trainer
    module: pl.LightningModule
    landscape: Landscape
    settings: Settings
    result: Measurement
    krylov: Krylov | None = None

    def traces(self, wanted: Sequence[str]) -> None:
        trace = self._trace()
        if "trace_hessian" in wanted:
            self.result.add(tags.TRACE_HESSIAN, trace.value, trace.stderr)
        if "trace_normalized" in wanted:
            wide = self.landscape.dtype
            norms = [float(coordinate.to(wide).square().sum()) for coordinate in self.landscape.coordinates]
            scaled = trace.weighted(norms)
            self.result.add(tags.TRACE_NORMALIZED, scaled.value, scaled.stderr)
        if "layer_traces" in wanted:
            self.result.layer_traces = dict(zip(self.landscape.names, trace.parts.tolist(), strict=True))
            for name, value in self.result.layer_traces.items():
                self.result.add(tags.LAYER_TRACE.format(name), value)

    def _trace(self) -> MeanEstimate:
        """With the subspace that the eigenvalues leave behind taken out, where they were measured."""
        landscape, generator = self.landscape, self.landscape.generator("trace")
        error, most = self.settings.relative_error, self.settings.max_vectors
        krylov, self.krylov = self.krylov, None
        if krylov is not None:
            sizes = [coordinate.numel() for coordinate in landscape.coordinates]
            return deflated_trace(
                landscape.bilinear, krylov, sizes, generator=generator, relative_error=error, max_vectors=most
            )
        return hutchinson_trace(
            lambda signs: landscape.bilinear(signs, signs),
            landscape.size,
            generator=generator,
            dtype=landscape.dtype,
            relative_error=error,
            max_vectors=most,
        )

    def eigenvalues(self, wanted: Sequence[str]) -> None:
        count = self.settings.num_eigenvalues if "lambda_max" in wanted else 0
        ends = self._lanczos(self.landscape.product, largest=count, smallest=int("lambda_min" in wanted))
        self.krylov = ends.krylov
        names = [tags.LAMBDA_MAX, *(tags.LAMBDA_RANK.format(rank) for rank in range(2, count + 1))]
        found = list(zip(names, ends.largest, strict=False)) + [(tags.LAMBDA_MIN, value) for value in ends.smallest]
        largest = max(map(abs, [*ends.largest, *ends.smallest]), default=math.nan)
        for (tag, value), residual in zip(found, ends.residuals, strict=True):
            self.result.add(tag, value)
            self.result.values[tag + tags.RESIDUAL] = residual
            self.result.values[tag + tags.CONVERGED] = float(residual <= self.settings.tolerance * largest)

    def _lanczos(self, product: Callable[[Tensor], Tensor], largest: int, smallest: int) -> Extremes:
        self.landscape.reserve(BASIS + 5)
        generator = self.landscape.generator("lanczos")
        start = torch.randn(
            self.landscape.size, generator=generator, dtype=self.landscape.dtype, device=generator.device
        )
        return extreme_eigenvalues(
            product,
            start,
            largest=largest,
            smallest=smallest,
            tolerance=self.settings.tolerance,
            max_products=self.settings.max_iterations,
            basis=BASIS,
        )

    def density(self, wanted: Sequence[str]) -> None:
        self.result.density = spectral_density(
            self.landscape.product,
            self.landscape.size,
            generator=self.landscape.generator("density"),
            dtype=self.landscape.dtype,
            vectors=_DENSITY_VECTORS,
            steps=_DENSITY_STEPS,
        )
        for percent in _PERCENT:
            self.result.add(tags.DENSITY_QUANTILE.format(percent), self.result.density.quantile(percent / 100))

    def stability(self, wanted: Sequence[str]) -> None:
        geometry = self._geometry()
        edge = geometry.edge
        if edge is not None and math.isfinite(edge):
            self.result.add(tags.EDGE, edge)
        top = self._lanczos(lambda vector: geometry.product(self.landscape, vector), largest=1, smallest=0)
        self.result.add(tags.RATIO, top.largest[0] / geometry.limit)
        self.result.values[tags.RATIO + tags.CONVERGED] = float(top.converged)

    def sgd_ratio(self, wanted: Sequence[str]) -> None:
        geometry = self._geometry()
        if geometry.ascent:
            raise UnknownStep("the condition is known for steps without SAM only")
        together, count = self.settings.accumulate, len(self.landscape.probe)
        if count < together:
            raise UnknownStep(f"a training batch is {together} batches and the probe has {count}: raise `num_batches`")
        groups = [list(range(first, first + together)) for first in range(0, count - together + 1, together)]
        generator = self.landscape.generator("noise")

        def draw() -> Tensor:
            vector = rademacher(self.landscape.size, generator, self.landscape.dtype)
            parts = [geometry.noise_parts(self.landscape, vector, group) for group in groups]
            return torch.stack(parts).mean(0)

        # the mean of the sum of both parts is no quantity to stop by: all vectors are used, as many as for a trace
        pairs = adaptive_mean(draw, relative_error=0, max_draws=max(self.settings.max_vectors // len(groups), 8))
        ratio, stderr = ratio_of_means(pairs)
        self.result.add(tags.SGD_RATIO, 0.5 * geometry.gain * ratio, 0.5 * geometry.gain * stderr)

    def trace_fisher(self, wanted: Sequence[str]) -> None:
        number = iter(range(self.settings.max_vectors))
        trace = adaptive_mean(
            lambda: self.landscape.fisher_trace(next(number)),
            relative_error=self.settings.relative_error,
            max_draws=self.settings.max_vectors,
        )
        self.result.add(tags.TRACE_FISHER, trace.value, trace.stderr)

    def ascent_gap(self, wanted: Sequence[str]) -> None:
        self.result.add(tags.ASCENT_GAP, self.landscape.ascent_gap(self.settings.rho))

    def _geometry(self) -> StepGeometry:
        if not self.trainer.optimizers:
            raise UnknownStep("there is no optimizer outside of fit")
        return StepGeometry.of(self.trainer, self.module, self.landscape)


_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[_Work, Sequence[str]], None]], ...] = (
    (("lambda_max", "lambda_min"), _Work.eigenvalues),
    (("trace_hessian", "trace_normalized", "layer_traces"), _Work.traces),
    (("spectral_density",), _Work.density),
    (("stability",), _Work.stability),
    (("sgd_ratio",), _Work.sgd_ratio),
    (("trace_fisher",), _Work.trace_fisher),
    (("ascent_gap",), _Work.ascent_gap),
)
_OF_STEPS = ("stability", "sgd_ratio")


def measure(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    landscape: Landscape,
    quantities: Sequence[str],
    settings: Settings,
    warn: Callable[[str, str], None],
) -> Measurement:
    """Measure; a quantity that cannot be measured is skipped, the others go on.

    Args:
        trainer: The trainer.
        module: The module.
        landscape: Its loss, inside :func:`~lightning_ire.callbacks._landscape.measuring`.
        quantities: Which of :data:`QUANTITIES`.
        settings: How.
        warn: Called with a quantity and why it was skipped.
    """
    result = Measurement(trainer.global_step)
    work = _Work(trainer, module, landscape, settings, result)
    for mode, of_steps in ((settings.mode, False), ("train", True)):
        todo = [(run, [one for one in together if one in quantities]) for together, run in _TOGETHER]
        todo = [(run, wanted) for run, wanted in todo if wanted and (wanted[0] in _OF_STEPS) == of_steps]
        if not todo:
            continue
        with landscape.mode(mode):
            for run, wanted in todo:
                try:
                    run(work, wanted)
                except Exception as error:  # whatever it is: training has to go on
                    same_on_all = isinstance(error, (MeasurementError, UnknownStep, FloatingPointError))
                    if not same_on_all and trainer.world_size > 1:  # the others wait for this one
                        raise
                    memory = isinstance(error, torch.OutOfMemoryError) or getattr(error, "out_of_memory", False)
                    result.out_of_memory |= memory
                    for quantity in wanted:
                        result.skipped[quantity] = str(error) or type(error).__name__
                        warn(quantity, result.skipped[quantity])
    return result


def most_work(quantities: Sequence[str], settings: Settings, batches: int, sam: bool) -> dict[str, int]:
    """The most that one measurement can take, as numbers of passes over one batch.

    Args:
        quantities: Which of :data:`QUANTITIES`.
        settings: How.
        batches: Batches of the probe.
        sam: Whether the run's steps are SAM's.

    Returns:
        Forward passes, backward passes and Hessian products.
    """
    forward = backward = products = 0
    if "trace_fisher" in quantities:
        backward += settings.max_vectors * batches
        forward += 1 if batches == 1 else settings.max_vectors * batches
    of_loss = of_steps = 0
    if {"trace_hessian", "trace_normalized", "layer_traces"} & set(quantities):
        of_loss += settings.max_vectors * batches
    if {"lambda_max", "lambda_min"} & set(quantities):
        of_loss += settings.max_iterations * batches
    if "spectral_density" in quantities:
        of_loss += _DENSITY_VECTORS * _DENSITY_STEPS * batches
    if "stability" in quantities:
        of_steps += settings.max_iterations * (2 if sam else 1) * batches
        forward, backward = (forward + batches, backward + batches) if sam else (forward, backward)
    if "sgd_ratio" in quantities:
        of_steps += max(settings.max_vectors, 8 * batches)
    for products in (of_loss, of_steps):  # the graph of a gradient is kept if there is one batch
        if products:
            forward += 1 if batches == 1 else products
            backward += 1 if batches == 1 else products
    if "ascent_gap" in quantities:
        forward, backward = forward + 3 * batches, backward + batches
    return {"forward": forward, "backward": backward, "products": of_loss + of_steps}
