"""What a quantity of sharpness is: how it is measured, what it costs, and where its values go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import check_choice, check_number, check_whole
from lightning_ire.functional import Extremes, Krylov, MeanEstimate, SpectralDensity, extreme_eigenvalues
from lightning_ire.sharpness.landscape import Landscape
from lightning_ire.sharpness.step_operator import Enhanced, StepGeometry

__all__ = ["BASIS", "Cost", "Job", "Measurement", "Quantity", "Settings"]

BASIS = 20  # most Lanczos vectors kept


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
        rho: Radius of the ascent gap and of the noise gap, in weight units.
        bits: Bits to which weights are rounded for the compression gap.
        deleted: Share of the way from the start that is deleted for the compression gap.
        num_samples: Most predictions of each device whose Hessians are compared for the coherence.
        accumulate: Probe batches that make up one batch of training.
        samples: Samples in a batch of the probe; ``None``: not known.
        train_size: Samples of the training set; ``None``: not known.
        train_batch: Samples of all devices in one step of training; ``None``: not known.
    """

    mode: str = "eval"
    relative_error: float = 0.05
    max_vectors: int = 64
    tolerance: float = 1e-3
    max_iterations: int = 50
    num_eigenvalues: int = 1
    rho: float = 0.05
    bits: int = 8
    deleted: float = 0.1
    num_samples: int = 16
    accumulate: int = 1
    samples: int | None = None
    train_size: int | None = None
    train_batch: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("eval", "train"))
        check_number("relative_error", self.relative_error)
        check_whole("max_vectors", self.max_vectors, low=2)
        check_number("tolerance", self.tolerance, low_open=True)
        check_whole("max_iterations", self.max_iterations, low=1)
        check_whole("num_eigenvalues", self.num_eigenvalues, low=1)
        check_number("rho", self.rho, low_open=True)
        check_whole("bits", self.bits, low=2, high=32)
        check_number("deleted", self.deleted, high=1.0, low_open=True)
        check_whole("num_samples", self.num_samples, low=2)
        for name in ("samples", "train_size", "train_batch"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, low=1)


@dataclass
class Measurement:
    """What was measured at one moment.

    Attributes:
        step: Optimizer steps so far.
        values: Numbers by log tag.
        layer_traces: Tr(H_ww) by parameter name.
        blocks: Mean curvature by kind of block, if asked for.
        density: The spectral density of H, if asked for.
        skipped: Quantities that could not be measured, with the reason.
        out_of_memory: Whether memory was the reason for one of them.
    """

    step: int
    values: dict[str, float] = field(default_factory=dict)
    layer_traces: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
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
        start: Where the weights were at the start of training, parts as of the landscape's coordinates; ``None``: not
            known.
        trace: The trace of H with its parts, for quantities that come after it.
        krylov: The subspace that eigenvalues have cost, for a trace that comes after them.
    """

    landscape: Landscape
    settings: Settings
    result: Measurement
    optimizers: Sequence[Optimizer] = ()
    ire: Enhanced | None = None
    start: Sequence[Tensor] | None = None
    trace: MeanEstimate | None = None
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
