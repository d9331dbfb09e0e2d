"""Quantities of training steps: how far they are from the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ire import tags
from lightning_ire.functional import adaptive_mean, in_double, largest_stable_kappa, ratio_of_means
from lightning_ire.sharpness.job import Cost, Job, Quantity, Settings
from lightning_ire.sharpness.landscape import Landscape
from lightning_ire.sharpness.step_operator import UnknownStep

__all__ = ["EffectiveRates", "KappaHeadroom", "SGDRatio", "Stability"]

_ORTHOGONAL = 0.05  # largest cosine of a weight and its gradient, if its length changes nothing
_MOST_TENSORS = 100  # that are doubled, the largest of more
_UNCHANGED = 0.02  # change of the loss by doubling such a weight, against that by a random move of the same length
_HEADROOM_ROUNDS = 6  # most eigenvalues for the largest stable kappa


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
            return found.largest[0], found.vectors(1)[0]

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


class EffectiveRates(Quantity):
    """Squared norm and effective learning rate of each tensor whose length changes nothing."""

    names = ("effective_lr",)
    of_steps = True

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class: two forward passes for each tensor."""
        return Cost(forward=(2 * _MOST_TENSORS + 2) * batches, backward=batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        landscape = job.landscape
        coordinates = landscape.coordinates
        chosen, squares = _free_of_length(landscape)
        if not chosen:
            raise UnknownStep("there is no weight whose length changes nothing (none before a normalization layer)")
        for index in chosen:
            job.result.add(tags.SQUARED_NORM.format(landscape.names[index]), squares[index])
        if not job.optimizers:
            return
        sizes = [part.sum() for part in coordinates.split(job.step_geometry().step_sizes)]
        means = coordinates.sums(in_double(torch.stack(sizes))).tolist()
        for index in chosen:
            size = means[index] / landscape.parameters[index].numel()
            job.result.add(tags.EFFECTIVE_LR.format(landscape.names[index]), size / squares[index])


def _free_of_length(landscape: Landscape) -> tuple[list[int], list[float]]:
    """Which tensors may be doubled without a change of the loss; and the squared norms of all."""
    coordinates = landscape.coordinates
    orthogonal, squares = _orthogonal(landscape)
    before = landscape.loss()
    other = coordinates.split(coordinates.normal(landscape.generator("length"), landscape.dtype))
    lengths = coordinates.sums(torch.stack([part.square().sum() for part in other])).tolist()
    chosen = []
    for index in orthogonal:
        random = other[index] * math.sqrt(squares[index] / lengths[index])
        doubled, turned = (
            abs(landscape.loss_at([move if i == index else None for i in range(len(other))]) - before)
            for move in (coordinates.parts[index].clone(), random)
        )
        if doubled < _UNCHANGED * turned:
            chosen.append(index)
    return chosen, squares


def _orthogonal(landscape: Landscape) -> tuple[list[int], list[float]]:
    """The tensors whose gradient is orthogonal to them, as where their length changes nothing; all squared norms."""
    parts = [part.to(landscape.dtype) for part in landscape.coordinates.parts]
    gradient = [part.to(landscape.dtype) for part in landscape.coordinates.split(landscape.gradient())]
    squares, inner, slopes = (
        landscape.coordinates.sums(torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)])).tolist()
        for left, right in ((parts, parts), (parts, gradient), (gradient, gradient))
    )
    found = [
        index
        for index, product in enumerate(inner)
        if slopes[index] > 0 and abs(product) <= _ORTHOGONAL * math.sqrt(squares[index] * slopes[index])
    ]
    largest = sorted(found, key=lambda index: -landscape.parameters[index].numel())
    return sorted(largest[:_MOST_TENSORS]), squares
