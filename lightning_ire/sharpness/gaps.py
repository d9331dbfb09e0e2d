"""Quantities that are differences of losses: how much the loss rises when the weights or the data are others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lightning_ire import tags
from lightning_ire.engine.collectives import FailedTogether
from lightning_ire.functional import adaptive_mean, in_double, rounding_displacement
from lightning_ire.sharpness.job import Cost, Job, Quantity, Settings
from lightning_ire.sharpness.step_operator import StepGeometry, UnknownStep

__all__ = ["AscentGap", "CompressionGap", "CumulativeGap", "GeneralizationGap", "NoiseGap"]


class AscentGap(Quantity):
    """How much the loss rises along the gradient."""

    names = ("ascent_gap",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(forward=3 * batches, backward=batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        job.result.add(tags.ASCENT_GAP, job.landscape.ascent_gap(job.settings.rho))


class NoiseGap(Quantity):
    """How much the loss rises along random directions of the same length, on average."""

    names = ("noise_gap",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(forward=(2 * settings.max_vectors + 1) * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        landscape, generator = job.landscape, job.landscape.generator("noise gap")
        coordinates, before = landscape.coordinates, landscape.loss()

        def draw() -> float:
            vector = coordinates.normal(generator, landscape.dtype)
            move = vector * (job.settings.rho / coordinates.norm(vector))
            # both signs: the slope along the direction cancels
            return sum(landscape.loss_at(coordinates.split(sign * move)) for sign in (1, -1)) / 2 - before

        rise = adaptive_mean(draw, relative_error=job.settings.relative_error, max_draws=job.settings.max_vectors)
        job.result.add(tags.NOISE_GAP, rise.value, rise.stderr)


class CompressionGap(Quantity):
    """How much the loss rises when weights are rounded, and when a random share of the way from the start is undone."""

    names = ("compression_gap",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(forward=(settings.max_vectors + 3) * batches, backward=batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        landscape, result = job.landscape, job.result
        before = landscape.loss()
        moves, steps = rounding_displacement(landscape.movable, job.settings.bits)
        result.add(tags.ROUNDING_GAP, landscape.loss_at(moves) - before)
        error, gradient = landscape.coordinates.flatten(moves), landscape.gradient()
        result.add(tags.ROUNDING_SLOPE, float(landscape.coordinates.dot(error, gradient)))
        if job.trace is not None:  # of each tensor
            predicted = job.trace.weighted([step**2 / 24 for step in steps])
            result.add(tags.ROUNDING_PREDICTED, predicted.value, predicted.stderr)
        if job.start is None:
            return
        generator, coordinates = landscape.generator("deletion"), landscape.coordinates
        step = coordinates.flatten([now - then.to(now) for now, then in zip(coordinates.parts, job.start, strict=True)])

        def draw() -> float:
            # the distribution function of a normal number is uniform: which coordinates go, the same on all devices
            chosen = torch.special.ndtr(coordinates.normal(generator, landscape.dtype)) < job.settings.deleted
            return landscape.loss_at(coordinates.split(-step * chosen)) - before

        rise = adaptive_mean(draw, relative_error=job.settings.relative_error, max_draws=job.settings.max_vectors)
        result.add(tags.DELETION_GAP, rise.value, rise.stderr)


class GeneralizationGap(Quantity):
    """The noise of gradients, how fast the loss on other data falls behind by it, and by how much it is behind."""

    names = ("gap",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(forward=4 * batches, backward=2 * batches)  # as many batches of other data

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        reasons = []
        for part in (self._measured, self._noise):
            try:
                part(job)
            except (UnknownStep, FailedTogether) as reason:  # the other part is known all the same
                reasons.append(reason)
        if reasons:
            raise reasons[0]

    def _noise(self, job: Job) -> None:
        """The covariance of single gradients, and what follows from it."""
        landscape, settings = job.landscape, job.settings
        devices = landscape.host.world_size
        together = landscape.coordinates.sharded  # only the gradient of all devices is known
        if len(landscape.batches) * (1 if together else devices) < 2:
            raise UnknownStep("the noise of gradients shows in two batches or more: raise `num_batches`")
        own = settings.samples or 0
        sizes = set(landscape.of_each_device(lambda: own).tolist())  # asked of all, whatever is known here
        if sizes == {0} or len(sizes) > 1:
            raise UnknownStep("the noise of gradients needs batches of equally many samples: let the probe have such")
        geometry, unknown = _geometry(job)
        scale = torch.ones_like(landscape.coordinates.flatten(landscape.coordinates.parts))
        if geometry is not None:
            scale = geometry.gain * geometry.step_sizes
        mean, squares = landscape.gradient_deviations(scale)
        count, size = len(squares), own * (devices if together else 1)
        covariances = size * count / (count - 1) * squares  # of single samples
        trace, weighted = covariances.mean(0).tolist()
        spread = float(covariances[:, 0].std()) * math.sqrt((count - 1) / (count * (count - 2))) if count > 2 else None
        job.result.add(tags.TRACE_COVARIANCE, trace, spread)
        signal = float(landscape.coordinates.norm(mean)) ** 2 - trace / (size * count)  # unbiased for ||E g||^2
        job.result.add(tags.NOISE_SCALE, math.inf if signal <= 0 else trace / signal)
        if unknown is not None:
            raise unknown
        if geometry is not None:
            if settings.train_size is None:
                raise UnknownStep("the size of the training set is not known, and with it the growth of the gap")
            job.result.add(tags.GAP_RATE, weighted / settings.train_size)

    def _measured(self, job: Job) -> None:
        """The difference of the losses, without label smoothing."""
        landscape = job.landscape
        if not landscape.held_out_batches:
            return
        with _Unsmoothed():
            own, other = in_double(landscape.losses()), in_double(landscape.losses(held_out=True))
        error = None
        if min(own.numel(), other.numel()) > 1:
            error = math.sqrt(sum(float(each.var()) / each.numel() for each in (own, other)))
        job.result.add(tags.GAP_MEASURED, float(other.mean() - own.mean()), error)


def _geometry(job: Job) -> tuple[StepGeometry | None, UnknownStep | None]:
    """The run's step, or why its part of the values is not known; neither outside of training."""
    if not job.optimizers:
        return None, None
    try:
        geometry = job.step_geometry()
    except UnknownStep as reason:
        return None, reason
    if geometry.ascent:
        return None, UnknownStep("the growth of the gap is known for steps without SAM only (the rest is logged)")
    return geometry, None


@dataclass
class CumulativeGap:
    """The predicted gap since the start: the rate, summed over the steps by the trapezoidal rule.

    Attributes:
        step: Of the last measurement; before the first one 0.
        rate: Growth per step there; that of the first measurement counts from the start on.
        total: The gap until then.
    """

    step: int = 0
    rate: float | None = None
    total: float = 0.0

    def add(self, step: int, rate: float) -> float:
        """Go on to a measurement.

        Args:
            step: Optimizer steps so far.
            rate: Growth per step.

        Returns:
            The gap until then.
        """
        before = rate if self.rate is None else self.rate
        self.total += (step - self.step) * (before + rate) / 2
        self.step, self.rate = step, rate
        return self.total


class _Unsmoothed(TorchFunctionMode):
    """Inside the block cross entropies are without label smoothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.cross_entropy:
            given["label_smoothing"] = 0.0
            args = args[:7]  # its eighth argument
        return func(*args, **given)
