"""Quantities of the Hessian and of the Fisher matrix: eigenvalues, traces, the density of the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_ire import tags
from lightning_ire.functional import (
    MeanEstimate,
    adaptive_mean,
    deflated_trace,
    hutchinson_trace,
    in_double,
    spectral_density,
)
from lightning_ire.sharpness.blocks import KINDS_OF_BLOCKS, kinds_of_blocks
from lightning_ire.sharpness.job import Cost, Job, Quantity, Settings

__all__ = ["Density", "Eigenvalues", "FisherTrace", "GaussNewtonTrace", "Traces"]

_DENSITY_VECTORS, _DENSITY_STEPS = 4, 30
_PERCENT = (0, 1, 10, 50, 90, 99, 100)  # quantiles of the density that are logged


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

    names = ("trace_hessian", "trace_normalized", "layer_traces", "block_curvature")

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        return Cost(products=settings.max_vectors * batches)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        job.trace = trace = self._trace(job)
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
        if "block_curvature" in wanted:
            job.result.blocks = self._by_kind(job, trace)
            for kind, value in job.result.blocks.items():
                job.result.add(tags.BLOCK_CURVATURE.format(kind), value)

    def _by_kind(self, job: Job, trace: MeanEstimate) -> dict[str, float]:
        """The mean over the coordinates of each kind of block."""
        kinds = kinds_of_blocks(job.landscape.module)
        sums, sizes = dict.fromkeys(KINDS_OF_BLOCKS, 0.0), dict.fromkeys(KINDS_OF_BLOCKS, 0)
        parts = zip(job.landscape.names, job.landscape.parameters, trace.parts.tolist(), strict=True)
        for name, parameter, value in parts:
            sums[kinds[name]] += value
            sizes[kinds[name]] += parameter.numel() * (2 if parameter.is_complex() else 1)
        return {kind: sums[kind] / size for kind, size in sizes.items() if size}

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


class FisherTrace(Quantity):
    """Tr F, with labels drawn from the model."""

    names = ("trace_fisher",)
    all_labels, tag = False, tags.TRACE_FISHER

    def cost(self, settings: Settings, batches: int, sam: bool) -> Cost:
        """See the base class."""
        draws = settings.max_vectors * batches
        return Cost(forward=1 if batches == 1 else draws, backward=draws)

    def measure(self, job: Job, wanted: Sequence[str]) -> None:
        """See the base class."""
        number = iter(range(job.settings.max_vectors))
        trace = adaptive_mean(
            lambda: job.landscape.fisher_trace(next(number), self.all_labels),
            relative_error=job.settings.relative_error,
            max_draws=job.settings.max_vectors,
        )
        job.result.add(self.tag, trace.value, trace.stderr)


class GaussNewtonTrace(FisherTrace):
    """The same with all labels and random signs, so that rare labels are not missed."""

    names = ("trace_gauss_newton",)
    all_labels, tag = True, tags.TRACE_GAUSS_NEWTON
