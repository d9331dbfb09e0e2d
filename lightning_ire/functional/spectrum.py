"""Eigenvalues and spectral density of a symmetric operator that is known by its products only (Lanczos)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Extremes", "SpectralDensity", "extreme_eigenvalues", "spectral_density"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extremes:
    """Eigenvalues at the ends of a spectrum.

    Attributes:
        largest: The algebraically largest ones, in falling order.
        smallest: The algebraically smallest ones (the most negative first).
        residuals: Norm of A q - theta q for each of `largest`, then each of `smallest`: an eigenvalue lies within
            that distance.
        converged: Whether all residuals are within the tolerance.
        products: How many products were taken.
    """

    largest: list[float]
    smallest: list[float]
    residuals: list[float]
    converged: bool
    products: int


def extreme_eigenvalues(
    product: Product,
    start: Tensor,
    *,
    largest: int = 1,
    smallest: int = 0,
    tolerance: float = 0.01,
    max_products: int = 50,
    basis: int = 20,
) -> Extremes:
    """Eigenvalues at both ends by the Lanczos method with full reorthogonalization and thick restarts.

    Lanczos 1950; thick restart: Wu and Simon 2000. When `basis` vectors are in use, the wanted Ritz vectors and a few
    of their neighbours are kept and the rest dropped, so that memory is bounded whatever the number of products.

    Args:
        product: A v for a vector v, of the same shape, dtype and device.
        start: Any vector that is not orthogonal to the wanted eigenvectors, such as a random one.
        largest: How many of the largest eigenvalues.
        smallest: How many of the smallest.
        tolerance: Relative to the largest absolute eigenvalue found: the residual to be reached.
        max_products: Most products.
        basis: Most vectors kept, at least `largest + smallest + 2`.

    Returns:
        The Ritz values (those of the whole operator if its size is smaller than the basis), the best there are if
        they have not converged. NaN if the products are not finite.

    Cost: one product per iteration, `basis` + 2 vectors.

    Example:
        >>> diagonal = torch.tensor([1.0, -4.0, 9.0])
        >>> round(extreme_eigenvalues(lambda v: diagonal * v, torch.ones(3)).largest[0], 4)
        9.0
    """
    wanted = largest + smallest
    basis = min(max(basis, wanted + 2), start.numel())
    vectors = start.new_zeros(basis + 1, start.numel())
    vectors[0] = start / start.norm()
    matrix = torch.zeros(basis, basis, dtype=torch.float64)
    size = 0
    for taken in range(1, max_products + 1):
        image = product(vectors[size])
        size += 1
        column = vectors[:size] @ image
        image = image - column @ vectors[:size]
        again = vectors[:size] @ image  # classical Gram-Schmidt needs a second go
        image = image - again @ vectors[:size]
        matrix[:size, size - 1] = matrix[size - 1, :size] = (column + again).double().cpu()
        rest = float(image.norm())
        if not math.isfinite(rest) or not bool(torch.isfinite(matrix).all()):
            nothing = [math.nan]
            return Extremes(nothing * largest, nothing * smallest, nothing * wanted, False, taken)
        values, rotation = torch.linalg.eigh(matrix[:size, :size])
        floor = torch.finfo(start.dtype).eps * float(values.abs().max())
        exhausted = size == start.numel() or rest <= 10 * floor  # an invariant subspace: nothing else can be reached
        residuals = (rotation[-1] * (0.0 if exhausted else rest)).abs()
        chosen = _ends(size, largest, smallest)
        enough = len(chosen) == wanted or exhausted
        done = enough and bool((residuals[chosen] <= tolerance * float(values.abs().max())).all())
        if done or exhausted or taken == max_products:
            top, bottom = _ends(size, largest, 0), _ends(size, 0, smallest)
            return Extremes(
                values[top].tolist(), values[bottom].tolist(), residuals[top + bottom].tolist(), done, taken
            )
        if size == basis:
            extra = (basis - wanted) // 3
            kept = _ends(size, largest + (extra if largest else 0), smallest + (extra if smallest else 0))
            kept = kept[: basis - 2]
            turned = rotation[:, kept].T.to(vectors) @ vectors[:size]
            size = len(kept)
            vectors[:size] = turned
            matrix.zero_()
            matrix[:size, :size] = torch.diag(values[kept])
        vectors[size] = image / rest
    raise ValueError(f"Expected `max_products` to be at least 1, got {max_products}.")


def _ends(size: int, largest: int, smallest: int) -> list[int]:
    """Indices in an ascending list: the last ones, from the end, then the first ones that are not among them."""
    top = list(range(size - 1, max(size - 1 - largest, -1), -1))
    return top + [index for index in range(min(smallest, size)) if not (top and largest and smallest and index in top)]


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues of an operator of size p, as weighted points.

    Attributes:
        nodes: Ritz values of all runs.
        weights: Their weights; they sum to 1, so that `weights * p` counts eigenvalues.
        stderr: Standard error of the mean eigenvalue over the runs, an error bar of the whole; infinite for one run.
    """

    nodes: Tensor
    weights: Tensor
    stderr: float

    @property
    def mean(self) -> float:
        """Mean eigenvalue, that is trace / p."""
        return float((self.nodes * self.weights).sum())

    def smoothed(self, points: int = 400, width: float = 0.01) -> tuple[Tensor, Tensor]:
        """The density with every node replaced by a normal distribution, for a figure.

        Args:
            points: Points of the grid, which reaches a little beyond the outermost nodes.
            width: Standard deviation as a fraction of the distance between these.

        Returns:
            Grid and density, float64 of shape [points].
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        sigma = width * max(high - low, 1e-12 * max(abs(low), abs(high)), torch.finfo(torch.float64).tiny)
        grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        bumps = torch.exp(-0.5 * ((grid[:, None] - self.nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return grid, bumps @ self.weights


def spectral_density(
    product: Product,
    size: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    vectors: int = 4,
    steps: int = 30,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the spectrum as a random start vector sees it, averaged over a few.

    Golub and Welsch 1969 for the quadrature, Ubaru, Chen and Saad 2017 for its use with random vectors, Ghorbani et
    al. 2019 (arXiv 1901.10159) for Hessians. Each run of m steps matches the first 2m - 1 moments of v^T A^k v.
    Vectors are not reorthogonalized: copies of eigenvalues that appear then share the weight of the one.

    Args:
        product: A v for a vector v, of the same shape, dtype and device.
        size: Length of v.
        generator: Source of the start vectors (normal), on the device where they are wanted.
        dtype: Type of v.
        vectors: Number of runs.
        steps: Lanczos steps of each run.

    Returns:
        The density, on the CPU in float64.

    Cost: `vectors * steps` products, three vectors.
    """
    nodes, weights, means = [], [], []
    for _ in range(vectors):
        current = torch.randn(size, generator=generator, dtype=dtype, device=generator.device)
        current /= current.norm()
        before, beta = torch.zeros_like(current), 0.0
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(steps, size)):
            image = product(current) - beta * before
            alpha = float(current @ image)
            image -= alpha * current
            beta = float(image.norm())
            diagonal.append(alpha)
            scale = max(map(abs, [*diagonal, *beside]))
            if not math.isfinite(beta) or beta <= 10 * torch.finfo(dtype).eps * scale or beta == 0:
                break
            beside.append(beta)
            before, current = current, image / beta
        beside = beside[: len(diagonal) - 1]
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        if not bool(torch.isfinite(matrix).all()):
            raise FloatingPointError("Expected finite products for the spectral density, got NaN or infinite ones.")
        values, rotation = torch.linalg.eigh(matrix)
        nodes.append(values)
        weights.append(rotation[0] ** 2 / vectors)
        means.append(float((values * rotation[0] ** 2).sum()))
    spread = torch.tensor(means, dtype=torch.float64)
    stderr = float(spread.std() / math.sqrt(vectors)) if vectors > 1 else math.inf
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), stderr)
