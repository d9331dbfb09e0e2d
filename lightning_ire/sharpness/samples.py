"""Quantities of single samples and of random layers: how alike their Hessians are, and how dropout's noise lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ire import tags
from lightning_ire.functional import in_double
from lightning_ire.sharpness.job import Cost, Job, Quantity, Settings
from lightning_ire.sharpness.landscape import LABELS_OF_A_SAMPLE
from lightning_ire.sharpness.step_operator import StepGeometry, UnknownStep

__all__ = ["Coherence", "DropoutVariance"]

_EIGENVECTORS = 8  # along which the variance of dropout is measured, at least
_FEWEST_POINTS = 3  # through which a line is fitted


class Coherence(Quantity):
    """How much the Hessians of single samples overlap."""

    names = ("coherence",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class: a backward pass for each label of each sample."""
        return Cost(forward=1, backward=LABELS_OF_A_SAMPLE * settings.num_samples)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        landscape = job.landscape
        if landscape.coordinates.sharded:
            raise UnknownStep("gradients of single samples are not known where parameters are sharded")

        def compute() -> tuple[Tensor, float]:
            scores = landscape.label_scores(job.settings.num_samples)
            return scores, _eigenvalues_of_coherence(scores)

        scores, sigma = landscape.of_all_devices(compute)
        job.result.add(tags.COHERENCE, landscape.average(sigma))
        if not job.optimizers:
            return
        geometry = job.step_geometry()
        lines = landscape.of_each_device(lambda: _line(job.settings, geometry, scores))
        job.result.add(tags.COHERENCE_RATIO, float(lines.max()))


def _eigenvalues_of_coherence(scores: Tensor) -> float:
    """lambda_1(S) / (m max_i lambda_1(H_i)), S_ij^2 = Tr(H_i H_j), from the factors of the H_i."""
    count, labels, size = scores.shape
    rows = scores.reshape(-1, size)
    products = in_double(rows @ rows.T).reshape(count, labels, count, labels)
    if not bool(products.isfinite().all()):
        raise FloatingPointError("the gradients are not finite")
    if not bool(products.any()):
        raise UnknownStep("the Hessians of all samples are zero")
    overlaps = products.square().sum((1, 3)).sqrt()
    own = torch.stack([products[i, :, i, :] for i in range(count)])
    largest = float(torch.linalg.eigvalsh(own)[:, -1].max())
    return float(torch.linalg.eigvalsh(overlaps)[-1]) / (count * largest)


def _line(settings: Settings, geometry: StepGeometry, scores: Tensor) -> float:
    """max_i lambda_1(S^(1/2) H_i S^(1/2)) (n / B - 1)^(1/2) / n, S the step sizes: SGD diverges above 1."""
    if geometry.ascent:
        raise UnknownStep("the condition is known for steps without SAM only (the coherence itself is logged)")
    if settings.train_size is None or settings.train_batch is None:
        raise UnknownStep("the sizes of the training set and of its batches are not known (the coherence is logged)")
    scaled = scores * geometry.step_sizes.sqrt()
    largest = float(torch.linalg.eigvalsh(in_double(scaled @ scaled.transpose(1, 2)))[:, -1].max())
    others = max(settings.train_size / settings.train_batch - 1, 0.0)
    return geometry.gain * largest * math.sqrt(others) / settings.train_size


class DropoutVariance(Quantity):
    """How much gradients vary with the dropout masks along the sharpest directions."""

    names = ("dropout_variance",)

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        draws = settings.max_vectors * batches
        return Cost(forward=draws, backward=draws, products=settings.max_iterations * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        landscape = job.landscape
        count = min(max(job.settings.num_eigenvalues, _EIGENVECTORS), landscape.size)
        found = job.lanczos(landscape.product, largest=count, smallest=0)
        vectors = found.vectors(count)
        with landscape.mode("train"):
            drawn = []
            for mask in range(max(job.settings.max_vectors, 2)):
                with landscape.noise(mask):
                    drawn.append(landscape.coordinates.dot(vectors, landscape.gradient()))
        variances = in_double(torch.stack(drawn)).var(0)
        curvatures = in_double(list(found.largest)).to(variances.device)
        if not bool(variances.any()):
            raise UnknownStep("the gradient is the same with each random mask: there is no dropout in the module")
        job.result.add(tags.DROPOUT_VARIANCE, float(variances[0]))
        some = (curvatures > 0) & (variances > 0)
        if int(some.sum()) >= _FEWEST_POINTS:
            pairs = torch.stack([curvatures[some].log(), variances[some].log()])
            job.result.add(tags.DROPOUT_SLOPE, float(torch.cov(pairs)[0, 1] / pairs[0].var()))
            job.result.add(tags.DROPOUT_CORRELATION, float(torch.corrcoef(pairs)[0, 1]))
