"""Eigenvalues and spectral density of a symmetric operator that is known by its products only (Lanczos)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ire.functional.vectors import Coordinates, in_double

__all__ = ["Extremes", "Krylov", "SpectralDensity", "extreme_eigenvalues", "spectral_density"]

Product = Callable[[Tensor], Tensor]
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Krylov:
    """A subspace Q and what an operator A does to it: A Q = Q T, but for the last column, to which a rest is added.

    Attributes:
        basis: Orthonormal rows q_i, shape [k, p].
        matrix: T = Q^T A Q, symmetric, float64 on the CPU, shape [k, k].
        rest: A q_k - sum over i of T_ik q_i, orthogonal to all q_i, shape [p].
    """

    basis: Tensor
    matrix: Tensor
    rest: Tensor


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
        krylov: The subspace that was reached; ``None`` if products were not finite.
    """

    largest: list[float]
    smallest: list[float]
    residuals: list[float]
    converged: bool
    products: int
    krylov: Krylov | None = field(default=None, compare=False, repr=False)

    def vectors(self, count: int) -> Tensor:
        """Unit eigenvectors of the largest eigenvalues, as far as these have converged.

        Args:
            count: How many.

        Returns:
            Shape [count, p], fewer rows if fewer were found.

        Raises:
            FloatingPointError: If products were not finite.
        """
        if self.krylov is None:
            raise FloatingPointError("the products are not finite")
        rotation = torch.linalg.eigh(self.krylov.matrix)[1][:, -count:].flip(1)
        return rotation.T.to(self.krylov.basis) @ self.krylov.basis


def extreme_eigenvalues(
    product: Product,
    start: Tensor,
    *,
    largest: int = 1,
    smallest: int = 0,
    tolerance: float = 0.01,
    max_products: int = 50,
    basis: int = 20,
    coordinates: Coordinates | None = None,
) -> Extremes:
    """Eigenvalues at both ends by the Lanczos method with full reorthogonalization and thick restarts.

    Lanczos 1950; thick restart: Wu and Simon 2000. When `basis` vectors are in use, the wanted Ritz vectors and a few
    of their neighbours are kept and the rest dropped, so that memory is bounded whatever the number of products.

    What products of one vector span holds one eigenvector of each eigenvalue. Of an eigenvalue that occurs several
    times copies are therefore not seen, and the next one takes their place, until rounding errors have grown to show
    them, which they have not yet when `tolerance` is reached unless that is small. It is different if that space is
    exhausted, because there are few different eigenvalues or `start` has a part in few of them: then a random vector is
    added and products go on without regard to `tolerance`, until everything beside the space has one eigenvalue, the
    basis is complete or `max_products` is reached. Then copies are found.

    Args:
        product: A v for a vector v, of the same shape, dtype and device.
        start: Any vector but 0 that is not orthogonal to the wanted eigenvectors, such as a random one.
        largest: How many of the largest eigenvalues.
        smallest: How many of the smallest.
        tolerance: Relative to the largest absolute eigenvalue found: the residual to be reached.
        max_products: Most products.
        basis: Most vectors kept, at least `largest + smallest + 2`.
        coordinates: Those of a model that may be sharded, so that vectors are this rank's parts; default: vectors are
            whole.

    Returns:
        The Ritz values, the best there are if they have not converged: fewer than wanted if `max_products` or the size
        of the operator is less (the two ends then overlap). NaN if the products are not finite.

    Raises:
        ValueError: If `max_products` is less than 1.

    Cost: one product per iteration, `basis` + 5 vectors; of a sharded model's three all-reduces per iteration more, of
    at most `basis` numbers.

    Example:
        >>> diagonal = torch.tensor([1.0, -4.0, 9.0])
        >>> round(extreme_eigenvalues(lambda v: diagonal * v, torch.ones(3)).largest[0], 4)
        9.0
    """
    if max_products < 1:
        raise ValueError(f"Expected `max_products` to be at least 1, got {max_products}.")
    space = coordinates or Coordinates([start])
    wanted = largest + smallest
    basis = min(max(basis, wanted + 2), space.size)
    vectors = start.new_empty(basis, start.numel())
    vectors[0] = start / space.norm(start)
    matrix = torch.zeros(basis, basis, dtype=torch.float64, device="cpu")
    size = length = 0  # vectors in the basis; those of them that are products of the last vector put in
    random = False  # whether that was a random one
    for taken in range(1, max_products + 1):
        image, column = _orthogonalized(product(vectors[size]), vectors[: size + 1], space)
        size += 1
        length += 1
        matrix[size - 1, :size] = in_double(column).cpu()  # `eigh` reads the lower triangle only
        rest = float(space.norm(image))
        if not math.isfinite(rest):
            return Extremes([math.nan] * largest, [math.nan] * smallest, [math.nan] * wanted, False, taken)
        values, rotation = torch.linalg.eigh(matrix[:size, :size])
        scale = float(values.abs().max())
        residuals = (rotation[-1] * rest).abs()
        complete = size == space.size
        exhausted = rest <= 10 * torch.finfo(start.dtype).eps * scale
        chosen = _ends(size, largest, smallest)
        converged = (len(chosen) == wanted or complete) and bool((residuals[chosen] <= tolerance * scale).all())
        nothing_else = exhausted and random and length == 1  # the rest of the operator is a multiple of the identity
        settled = nothing_else or not (random or exhausted)
        if complete or (converged and settled) or taken == max_products:
            break
        if size == basis:
            extra = (basis - wanted) // 4  # half of what is left to both sides together
            kept = _ends(size, largest + extra, smallest + extra)
            turn = rotation[:, kept].T.to(vectors)
            for columns in vectors.split(_CHUNK, dim=1):  # a second basis at once would be twice the memory
                columns[: len(kept)] = turn @ columns[:size]
            size = len(kept)
            matrix[:size, :size] = torch.diag(values[kept])
        if exhausted:
            generator = torch.Generator(start.device).manual_seed(taken)
            image, _ = _orthogonalized(space.normal(generator, start.dtype), vectors[:size], space)
            rest = float(space.norm(image))
            length, random = 0, True
        vectors[size] = image / rest
    top, bottom = _ends(size, largest, 0), _ends(size, 0, smallest)
    lower = matrix[:size, :size].tril()
    krylov = Krylov(vectors[:size], lower + lower.tril(-1).T, image)
    residual = residuals[top + bottom].tolist()
    return Extremes(values[top].tolist(), values[bottom].tolist(), residual, converged, taken, krylov)


def _orthogonalized(vector: Tensor, others: Tensor, space: Coordinates) -> tuple[Tensor, Tensor]:
    """The part of a vector that is orthogonal to orthonormal others, and its coordinates along these."""
    first = space.dot(others, vector)
    rest = vector - first @ others
    second = space.dot(others, rest)  # classical Gram-Schmidt needs a second go
    return rest - second @ others, first


def _ends(size: int, largest: int, smallest: int) -> list[int]:
    """Indices in an ascending list: the last ones, from the end, then the first ones that are not among them."""
    top = list(range(size - 1, max(size - 1 - largest, -1), -1))
    return top + [index for index in range(min(smallest, size)) if index not in top]


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

    def quantile(self, share: float) -> float:
        """The smallest node such that it and those below have at least a share of the weight.

        Args:
            share: In [0, 1]; 0 and 1 give the outermost nodes.

        Example:
            >>> SpectralDensity(torch.tensor([5.0, 0.0]), torch.tensor([0.1, 0.9]), 0.0).quantile(0.5)
            0.0
        """
        order = self.nodes.argsort()
        below = self.weights[order].cumsum(0)
        place = int(torch.searchsorted(below, share * float(below[-1])))
        return float(self.nodes[order][min(place, len(order) - 1)])

    def smoothed(self, points: int = 400, width: float = 0.01) -> tuple[Tensor, Tensor]:
        """The density with every node replaced by a normal distribution, for a figure.

        Args:
            points: Points of the grid, which reaches a little beyond the outermost nodes.
            width: Standard deviation as a fraction of the distance between these.

        Returns:
            Grid and density, float64 of shape [points].
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        sigma = width * (max(high - low, 1e-6 * abs(high)) or 1.0)  # one eigenvalue, or nothing but 0
        grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64, device="cpu")
        bumps = torch.exp(-0.5 * ((grid[:, None] - self.nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return grid, bumps @ self.weights


def spectral_density(
    product: Product,
    size: int | Coordinates,
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
        size: Length of v, or the coordinates of a model that may be sharded.
        generator: Source of the start vectors (normal), on the device where they are wanted.
        dtype: Type of v.
        vectors: Number of runs.
        steps: Lanczos steps of each run.

    Returns:
        The density, on the CPU in float64.

    Raises:
        FloatingPointError: If a product is not finite.

    Cost: `vectors * steps` products, three vectors.
    """
    space = size if isinstance(size, Coordinates) else Coordinates.of_size(size, generator, dtype)
    nodes, weights, means = [], [], []
    for _ in range(vectors):
        current = space.normal(generator, dtype)
        current /= space.norm(current)
        before, beta = torch.zeros_like(current), 0.0
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(steps, space.size)):
            image = product(current) - beta * before
            alpha = float(space.dot(current, image))
            image -= alpha * current
            beta = float(space.norm(image))
            diagonal.append(alpha)
            if not math.isfinite(beta):
                raise FloatingPointError("Expected finite products for the spectral density, got NaN or infinite ones.")
            if beta <= 10 * torch.finfo(dtype).eps * max(map(abs, [*diagonal, *beside])):  # an invariant subspace
                break
            beside.append(beta)
            before, current = current, image / beta
        below = torch.diag(in_double(beside[: len(diagonal) - 1]), -1)
        matrix = torch.diag(in_double(diagonal)) + below
        values, rotation = torch.linalg.eigh(matrix)  # reads the lower triangle only
        nodes.append(values)
        weights.append(rotation[0] ** 2 / vectors)
        means.append(float((values * rotation[0] ** 2).sum()))
    spread = in_double(means)
    stderr = float(spread.std() / math.sqrt(vectors)) if vectors > 1 else math.inf
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), stderr)
