"""One measurement: which quantities, what each costs, and their values with error bars."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.engine.collectives import FailedTogether
from lightning_ire.functional import (
    Extremes,
    Krylov,
    MeanEstimate,
    SpectralDensity,
    adaptive_mean,
    deflated_trace,
    extreme_eigenvalues,
    hutchinson_trace,
    in_double,
    largest_stable_kappa,
    ratio_of_means,
    spectral_density,
)
from lightning_ire.sharpness.landscape import Landscape
from lightning_ire.sharpness.step_operator import Enhanced, StepGeometry, UnknownStep

__all__ = [
    "BASIS",
    "KINDS",
    "QUANTITIES",
    "Cost",
    "Job",
    "Measurement",
    "Quantity",
    "QuantityName",
    "Settings",
    "check_quantities",
    "max_cost",
    "measure",
]

QuantityName = Literal[
    "trace_fisher",
    "trace_hessian",
    "trace_normalized",
    "layer_traces",
    "lambda_max",
    "lambda_min",
    "spectral_density",
    "ascent_gap",
    "stability",
    "kappa_headroom",
    "sgd_ratio",
]
QUANTITIES: tuple[str, ...] = get_args(QuantityName)
"""What can be measured."""

BASIS = 20  # most Lanczos vectors kept
_HEADROOM_ROUNDS = 6  # most eigenvalues for the largest stable kappa
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

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("eval", "train"))
        check_number("relative_error", self.relative_error)
        check_whole("max_vectors", self.max_vectors, low=2)
        check_number("tolerance", self.tolerance, low_open=True)
        check_whole("max_iterations", self.max_iterations, low=1)
        check_whole("num_eigenvalues", self.num_eigenvalues, low=1)
        check_number("rho", self.rho, low_open=True)


def with_headroom(quantities: tuple[str, ...]) -> tuple[str, ...]:
    """The quantities for a kappa that follows the largest stable one: that too, where the stability is measured.

    Args:
        quantities: Names.
    """
    add = "stability" in quantities and "kappa_headroom" not in quantities
    return (*quantities, "kappa_headroom") if add else quantities


def check_quantities(quantities: Sequence[str]) -> tuple[str, ...]:
    """Names of quantities, if they are some.

    Args:
        quantities: Names.

    Raises:
        ConfigurationError: If there are none, or one that is unknown.
    """
    if isinstance(quantities, str) or not quantities:
        raise ConfigurationError(
            f"Expected `quantities` to be a list of names like ['trace_fisher', 'lambda_max'], got {quantities!r}."
        )
    return tuple(check_choice("quantities", quantity, QUANTITIES) for quantity in quantities)


@dataclass
class Measurement:
    """What was measured at one moment.

    Attributes:
        step: Optimizer steps so far.
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
class Job:
    """One measurement while it is made.

    Attributes:
        landscape: The loss.
        settings: How the quantities are to be measured.
        result: What was found so far.
        optimizers: All optimizers of the module; none outside of training.
        ire: What enhances their steps; ``None``: nothing.
        krylov: The subspace that eigenvalues have cost, for a trace that comes after them.
    """

    landscape: Landscape
    settings: Settings
    result: Measurement
    optimizers: Sequence[Optimizer] = ()
    ire: Enhanced | None = None
    krylov: Krylov | None = None

    def step_geometry(self, kappa: float | None = None) -> StepGeometry:
        """The run's own step.

        Args:
            kappa: The boost's largest strength, in place of the one in force.
        """
        return StepGeometry.of(self.optimizers, self.landscape.module, self.landscape, self.ire, kappa)

    def lanczos(self, product: Callable[[Tensor], Tensor], largest: int, smallest: int) -> Extremes:
        """Extreme eigenvalues of an operator.

        Args:
            product: The operator.
            largest: How many of the largest.
            smallest: How many of the smallest.
        """
        self.landscape.check_memory(BASIS + 5)
        generator = self.landscape.generator("lanczos")
        coordinates = self.landscape.coordinates
        start = coordinates.normal(generator, coordinates.dtype)
        return extreme_eigenvalues(
            product,
            start,
            largest=largest,
            smallest=smallest,
            tolerance=self.settings.tolerance,
            max_products=self.settings.max_iterations,
            basis=BASIS,
            coordinates=coordinates,
        )


class Cost(NamedTuple):
    """The most that something takes, as numbers of passes over one batch.

    The forward and backward passes of Hessian products are left out: quantities share them.
    """

    forward: int = 0
    backward: int = 0
    products: int = 0


class Quantity(ABC):
    """Quantities that are found together.

    Attributes:
        names: What they are called.
        of_steps: Whether they are those of training steps, so that layers are in training mode.
    """

    names: ClassVar[tuple[str, ...]]
    of_steps: ClassVar[bool] = False

    @abstractmethod
    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """The most that one measurement takes.

        Args:
            settings: How.
            batches: Batches of the probe.
            sam: Whether the run's steps are SAM's.
        """

    @abstractmethod
    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """Add values to the job's result.

        Args:
            job: The measurement.
            wanted: Which of :attr:`names`.
        """


class Eigenvalues(Quantity):
    """The largest eigenvalues of H and the smallest."""

    names = ("lambda_max", "lambda_min")

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(products=settings.max_iterations * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        count = job.settings.num_eigenvalues if "lambda_max" in wanted else 0
        ends = job.lanczos(job.landscape.product, largest=count, smallest=int("lambda_min" in wanted))
        job.krylov = ends.krylov
        names = [tags.LAMBDA_MAX, *(tags.LAMBDA_RANK.format(rank) for rank in range(2, count + 1))]
        found = list(zip(names, ends.largest, strict=False)) + [(tags.LAMBDA_MIN, value) for value in ends.smallest]
        largest = max(map(abs, [*ends.largest, *ends.smallest]), default=math.nan)
        for (tag, value), residual in zip(found, ends.residuals, strict=True):
            job.result.add(tag, value)
            job.result.values[tag + tags.RESIDUAL] = residual
            job.result.values[tag + tags.CONVERGED] = float(residual <= job.settings.tolerance * largest)


class Traces(Quantity):
    """Tr H of all and of each parameter tensor, from the same products."""

    names = ("trace_hessian", "trace_normalized", "layer_traces")

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(products=settings.max_vectors * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        trace = self._trace(job)
        if "trace_hessian" in wanted:
            job.result.add(tags.TRACE_HESSIAN, trace.value, trace.stderr)
        if "trace_normalized" in wanted:
            wide = job.landscape.dtype
            coordinates = job.landscape.coordinates
            norms = [float(part.to(wide).square().sum()) for part in coordinates.parts]
            scaled = trace.weighted(coordinates.sums(in_double(norms)).tolist())
            job.result.add(tags.TRACE_NORMALIZED, scaled.value, scaled.stderr)
        if "layer_traces" in wanted:
            job.result.layer_traces = dict(zip(job.landscape.names, trace.parts.tolist(), strict=True))
            for name, value in job.result.layer_traces.items():
                job.result.add(tags.LAYER_TRACE.format(name), value)

    def _trace(self, job: Job) -> MeanEstimate:
        """With the subspace that the eigenvalues leave behind taken out, where they were measured."""
        landscape, generator = job.landscape, job.landscape.generator("trace")
        error, most = job.settings.relative_error, job.settings.max_vectors
        krylov, job.krylov = job.krylov, None
        if krylov is not None:
            blocks = landscape.coordinates
            return deflated_trace(
                landscape.bilinear, krylov, blocks, generator=generator, relative_error=error, max_vectors=most
            )
        return hutchinson_trace(
            lambda signs: landscape.bilinear(signs, signs),
            landscape.coordinates,
            generator=generator,
            dtype=landscape.dtype,
            relative_error=error,
            max_vectors=most,
        )


class Density(Quantity):
    """The distribution of all eigenvalues."""

    names = ("spectral_density",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(products=_DENSITY_VECTORS * _DENSITY_STEPS * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        job.result.density = spectral_density(
            job.landscape.product,
            job.landscape.coordinates,
            generator=job.landscape.generator("density"),
            dtype=job.landscape.dtype,
            vectors=_DENSITY_VECTORS,
            steps=_DENSITY_STEPS,
        )
        for percent in _PERCENT:
            job.result.add(tags.DENSITY_QUANTILE.format(percent), job.result.density.quantile(percent / 100))


class Stability(Quantity):
    """The effective sharpness of the run's own step against its limit."""

    names = ("stability",)
    of_steps = True

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        products = settings.max_iterations * batches
        return Cost(batches, batches, 2 * products) if sam else Cost(products=products)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        geometry = job.step_geometry()
        edge = geometry.edge
        if edge is not None and math.isfinite(edge):
            job.result.add(tags.EDGE, edge)
        top = job.lanczos(lambda vector: geometry.product(job.landscape, vector), largest=1, smallest=0)
        job.result.add(tags.RATIO, top.largest[0] / geometry.limit)
        job.result.values[tags.RATIO + tags.CONVERGED] = float(top.converged)


class KappaHeadroom(Quantity):
    """The largest kappa with which the run's own step is stable, for the mask in force."""

    names = ("kappa_headroom",)
    of_steps = True

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        products = _HEADROOM_ROUNDS * settings.max_iterations * batches
        return Cost(batches, batches, 2 * products) if sam else Cost(products=products)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        geometry = job.step_geometry(kappa=1.0)
        if geometry.lengths is None:
            raise UnknownStep("there is no mask of IRE in force")
        unboosted, shares = geometry.step_sizes / geometry.lengths, geometry.lengths - 1

        def top(kappa: float) -> tuple[float, Tensor]:
            now = replace(geometry, step_sizes=unboosted * (1 + kappa * shares))
            found = job.lanczos(lambda vector: now.product(job.landscape, vector), largest=1, smallest=0)
            if found.krylov is None:
                raise FloatingPointError("the products are not finite")
            vector = torch.linalg.eigh(found.krylov.matrix)[1][:, -1].to(found.krylov.basis) @ found.krylov.basis
            return found.largest[0], vector

        headroom, found = largest_stable_kappa(
            top,
            shares,
            geometry.limit,
            tolerance=2 * job.settings.tolerance,
            max_rounds=_HEADROOM_ROUNDS,
            coordinates=job.landscape.coordinates,
        )
        job.result.add(tags.KAPPA_HEADROOM, job.landscape.average(headroom))
        job.result.values[tags.KAPPA_HEADROOM + tags.CONVERGED] = float(found)


class SGDRatio(Quantity):
    """Stability in the mean square over training batches."""

    names = ("sgd_ratio",)
    of_steps = True

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(products=max(settings.max_vectors, 8 * batches))

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        geometry = job.step_geometry()
        if geometry.ascent:
            raise UnknownStep("the condition is known for steps without SAM only")
        together, count = job.settings.accumulate, len(job.landscape.batches)
        if count < together:
            raise UnknownStep(f"a training batch is {together} batches and the probe has {count}: raise `num_batches`")
        groups = [list(range(first, first + together)) for first in range(0, count - together + 1, together)]
        generator = job.landscape.generator("noise")

        def draw() -> Tensor:
            vector = job.landscape.coordinates.signs(generator, job.landscape.dtype)
            parts = [geometry.noise_parts(job.landscape, vector, group) for group in groups]
            return torch.stack(parts).mean(0)

        # the mean of the sum of both parts is no quantity to stop by: all vectors are used, as many as for a trace
        pairs = adaptive_mean(draw, relative_error=0, max_draws=max(job.settings.max_vectors // len(groups), 8))
        ratio, stderr = ratio_of_means(pairs)
        job.result.add(tags.SGD_RATIO, 0.5 * geometry.gain * ratio, 0.5 * geometry.gain * stderr)


class FisherTrace(Quantity):
    """Tr F, with labels drawn from the model."""

    names = ("trace_fisher",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        draws = settings.max_vectors * batches
        return Cost(forward=1 if batches == 1 else draws, backward=draws)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        number = iter(range(job.settings.max_vectors))
        trace = adaptive_mean(
            lambda: job.landscape.fisher_trace(next(number)),
            relative_error=job.settings.relative_error,
            max_draws=job.settings.max_vectors,
        )
        job.result.add(tags.TRACE_FISHER, trace.value, trace.stderr)


class AscentGap(Quantity):
    """How much the loss rises along the gradient."""

    names = ("ascent_gap",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(forward=3 * batches, backward=batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        job.result.add(tags.ASCENT_GAP, job.landscape.ascent_gap(job.settings.rho))


# in this order they are measured: a trace uses what the eigenvalues leave behind
KINDS: tuple[Quantity, ...] = (
    Eigenvalues(),
    Traces(),
    Density(),
    Stability(),
    KappaHeadroom(),
    SGDRatio(),
    FisherTrace(),
    AscentGap(),
)


def measure(job: Job, quantities: Sequence[str], warn: Callable[[str, str], None]) -> Measurement:
    """Measure; a quantity that cannot be measured is skipped, the others go on.

    Args:
        job: The measurement, inside :func:`~lightning_ire.sharpness.landscape.measurement_mode`.
        quantities: Which of :data:`QUANTITIES`.
        warn: Called with a quantity and why it was skipped.
    """
    for mode, of_steps in ((job.settings.mode, False), ("train", True)):
        todo = [(kind, [one for one in kind.names if one in quantities]) for kind in KINDS if kind.of_steps == of_steps]
        if not any(wanted for _, wanted in todo):
            continue
        with job.landscape.mode(mode):
            for kind, wanted in todo:
                try:
                    if wanted:
                        kind.measure(job, wanted)
                except Exception as error:  # whatever it is: training has to go on
                    same_on_all = isinstance(error, (FailedTogether, UnknownStep, FloatingPointError))
                    if not same_on_all and job.landscape.ranks.world_size > 1:  # the others wait for this one
                        raise
                    memory = isinstance(error, torch.OutOfMemoryError) or getattr(error, "out_of_memory", False)
                    job.result.out_of_memory |= memory
                    for quantity in wanted:
                        job.result.skipped[quantity] = str(error) or type(error).__name__
                        warn(quantity, job.result.skipped[quantity])
    return job.result


def max_cost(quantities: Sequence[str], settings: Settings, batches: int, sam: bool) -> Cost:
    """The most that one measurement can take, with the passes of Hessian products.

    Args:
        quantities: Which of :data:`QUANTITIES`.
        settings: How.
        batches: Batches of the probe.
        sam: Whether the run's steps are SAM's.
    """
    forward = backward = products = 0
    for of_steps in (False, True):
        kinds = [kind for kind in KINDS if kind.of_steps == of_steps and set(kind.names) & set(quantities)]
        costs = [kind.cost(settings, batches, sam) for kind in kinds]
        own = sum(cost.products for cost in costs)
        graphs = min(own, 1) if batches == 1 else own  # the graph of a gradient is kept if there is one batch
        forward += sum(cost.forward for cost in costs) + graphs
        backward += sum(cost.backward for cost in costs) + graphs
        products += own
    return Cost(forward, backward, products)
