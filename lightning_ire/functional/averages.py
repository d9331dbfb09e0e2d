"""Means of random draws with their standard errors; Hutchinson's estimate of a trace is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ire.functional.vectors import Coordinates, in_double

__all__ = ["MeanEstimate", "adaptive_mean", "hutchinson_trace", "ratio_of_means"]

_FEWEST = 8  # the standard error of fewer draws is too uncertain to stop by


@dataclass(frozen=True)
class MeanEstimate:
    """A mean of draws.

    Attributes:
        draws: Everything that was drawn, shape [draws, parts], float64 on the CPU.
    """

    draws: Tensor

    @property
    def value(self) -> float:
        """Mean of the draws' sums over the parts."""
        return float(self.draws.sum(1).mean())

    @property
    def parts(self) -> Tensor:
        """Mean of each part, shape [parts]."""
        return self.draws.mean(0)

    @property
    def stderr(self) -> float:
        """Standard error of :attr:`value`; infinite for a single draw."""
        return _stderr(self.draws.sum(1))

    @property
    def count(self) -> int:
        """Number of draws."""
        return self.draws.size(0)

    def weighted(self, weights: Sequence[float]) -> MeanEstimate:
        """The same draws with every part multiplied by a number.

        Args:
            weights: One number per part.
        """
        return MeanEstimate(self.draws * in_double(weights))


def adaptive_mean(
    draw: Callable[[], Tensor | float], *, relative_error: float = 0.05, max_draws: int = 64
) -> MeanEstimate:
    r"""Draw until the standard error of the mean is small enough, or as often as allowed.

    At least 8 draws are made (fewer if `max_draws` is less). Draws that are not finite end it.

    Args:
        draw: Returns one independent draw: a number, or a vector whose sum it is.
        relative_error: Aim for standard error / \\|mean\\|; 0: all `max_draws`.
        max_draws: Most draws.

    Returns:
        The mean with all draws. For draws of relative standard deviation s the error is s / sqrt(count).

    Raises:
        ValueError: If `max_draws` is less than 1.

    Example:
        >>> numbers = iter([1.0, 3.0] * 8)
        >>> mean = adaptive_mean(lambda: next(numbers), relative_error=0.15)
        >>> mean.value, mean.count
        (1.9230769230769231, 13)
    """
    if max_draws < 1:
        raise ValueError(f"Expected `max_draws` to be at least 1, got {max_draws}.")
    draws: list[Tensor] = []
    while len(draws) < max_draws:
        draws.append(in_double(draw()).detach().cpu().reshape(-1))
        if not bool(torch.isfinite(draws[-1]).all()):
            break
        if len(draws) >= _FEWEST and relative_error > 0:
            sums = torch.stack(draws).sum(1)
            if _stderr(sums) <= relative_error * abs(float(sums.mean())):
                break
    return MeanEstimate(torch.stack(draws))


def hutchinson_trace(
    quadratic: Callable[[Tensor], Tensor | float],
    size: int | Coordinates,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    relative_error: float = 0.05,
    max_vectors: int = 64,
) -> MeanEstimate:
    """Tr H as the mean of v^T H v over random signs v (Hutchinson 1990; signs have the least variance of all v_i).

    The variance of one draw is 2 * sum over i != j of H_ij^2.

    Args:
        quadratic: Returns v^T H v; or, as a vector, the parts of that sum that belong to different layers,
            v_l . (H v)_l.
        size: Length of v, or the coordinates of a model that may be sharded.
        generator: Source of v, on the device where v is wanted.
        dtype: Type of v.
        relative_error: See :func:`adaptive_mean`.
        max_vectors: Most products.

    Returns:
        The estimate; its parts are the traces of the diagonal blocks.

    Cost: one Hessian product per vector.

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> trace = hutchinson_trace(lambda v: v @ matrix @ v, 2, generator=torch.Generator().manual_seed(0))
        >>> abs(trace.value - 5) < 3 * trace.stderr
        True
    """
    space = size if isinstance(size, Coordinates) else Coordinates.of_size(size, generator, dtype)

    def draw() -> Tensor | float:
        return quadratic(space.signs(generator, dtype))

    return adaptive_mean(draw, relative_error=relative_error, max_draws=max_vectors)


def ratio_of_means(estimate: MeanEstimate) -> tuple[float, float]:
    """Mean of the first part divided by the mean of the second, with its standard error (delta method).

    Args:
        estimate: Draws of two parts.

    Returns:
        The ratio and its standard error; NaN where the second mean is 0.
    """
    numerator, denominator = estimate.draws.T
    if float(denominator.mean()) == 0:
        return math.nan, math.nan
    ratio = float(numerator.mean() / denominator.mean())
    return ratio, _stderr(numerator - ratio * denominator) / abs(float(denominator.mean()))


def _stderr(draws: Tensor) -> float:
    return float(draws.std() / math.sqrt(len(draws))) if len(draws) > 1 else math.inf
