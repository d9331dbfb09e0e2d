"""A trace by Hutchinson's method with the large eigenvalues taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ire.functional.averages import MeanEstimate, adaptive_mean
from lightning_ire.functional.spectrum import Krylov
from lightning_ire.functional.vectors import Coordinates

__all__ = ["deflated_trace"]


def deflated_trace(
    bilinear: Callable[[Tensor, Tensor], Tensor],
    krylov: Krylov,
    parts: Sequence[int] | Coordinates,
    *,
    generator: torch.Generator,
    relative_error: float = 0.05,
    max_vectors: int = 64,
) -> MeanEstimate:
    """Tr A and the traces of its diagonal blocks, exact on a subspace Q and by random signs on the rest.

    With P = Q Q^T, A = P A + A P - P A P + (I - P) A (I - P). The trace of the first three is known from Q^T A Q, which
    Lanczos leaves behind; the last one has lost its largest eigenvalues and so most of the variance of Hutchinson's
    estimate (the idea of Hutch++, Meyer et al. 2021, arXiv 2010.09649, with a subspace that costs nothing more here).
    Unbiased if Q does not depend on the signs.

    Args:
        bilinear: Returns the parts w_l . (A u)_l of w . A u for two vectors w, u, shape [len(parts)].
        krylov: What :func:`extreme_eigenvalues` leaves behind.
        parts: Sizes of the blocks, in order; or the coordinates of a model that may be sharded, each of its tensors
            a block.
        generator: Source of the signs, on the vectors' device.
        relative_error: See :func:`adaptive_mean`.
        max_vectors: Most products.

    Returns:
        The estimate; its parts are the traces of the blocks.

    Cost: one product per vector.

    Example:
        >>> from lightning_ire.functional import extreme_eigenvalues
        >>> matrix = torch.diag(torch.tensor([9.0, 1.0, 0.5])) + 0.1
        >>> krylov = extreme_eigenvalues(lambda v: matrix @ v, torch.ones(3)).krylov
        >>> signs = torch.Generator().manual_seed(0)
        >>> trace = deflated_trace(lambda w, u: (w @ matrix @ u)[None], krylov, [3], generator=signs)
        >>> abs(trace.value - 10.8) < 3 * trace.stderr + 1e-5
        True
    """
    basis, rest = krylov.basis, krylov.rest
    last = basis[-1]
    space = parts if isinstance(parts, Coordinates) else Coordinates([last])
    sizes = [part.numel() for part in parts.parts] if isinstance(parts, Coordinates) else list(parts)

    def sums(product: Tensor) -> Tensor:
        return space.sums(torch.stack([piece.sum() for piece in product.split(sizes)]))

    rotated = krylov.matrix.to(basis) @ basis
    exact = sums((basis * rotated).sum(0) + 2 * last * rest)

    def draw() -> Tensor:
        signs = space.signs(generator, basis.dtype)
        outside = signs - space.dot(basis, signs) @ basis
        # P A u is known without a product: A q is in the subspace but for what Lanczos has left over, at the last q
        return exact + bilinear(signs, outside).to(exact) - space.dot(rest, outside) * sums(signs * last)

    return adaptive_mean(draw, relative_error=relative_error, max_draws=max_vectors)
