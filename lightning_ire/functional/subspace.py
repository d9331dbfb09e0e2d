"""The sharp subspace of a matrix, by matrix products alone (LITE)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sharp_subspace"]


@torch.no_grad()
def sharp_subspace(momentum: Tensor, threshold: float = 1.0, *, steps: int = 24) -> Tensor:
    """Projector on the left singular directions of a matrix whose singular values are above a threshold.

    LITE (arXiv 2602.22681) calls these directions of Muon's momentum M sharp: P_s = S S^T with
    S = (msign(M) + msign(M - msign(M))) / 2, M divided by the threshold. For M = U diag(sigma) V^T it is
    msign(M) = U V^T and so S = U diag(sigma > 1) V^T. I - P_s keeps the flat part of an update of the same shape. Each
    msign is `steps` Newton-Schulz iterations X <- (15 X - 10 X X^T X + 3 (X X^T)^2 X) / 8 from X = M / ||M||_F, each of
    which lengthens short directions by 15/8. Not in LITE: six iterations P <- 3 P^2 - 2 P^3 then make 0 of the values
    of at most 1/4 that directions have where msign is not resolved (sigma = 0 but for rounding).

    Args:
        momentum: Real matrix of shape [m, n]. For the right directions give its transpose.
        threshold: In units of the matrix's singular values, > 0.
        steps: Iterations of each msign, >= 1. What is resolved: sigma of at least 2^(-0.9 steps) ||M||_F, and
            distances of sigma / threshold from 1 of at least 2^(-0.9 steps) ||M / threshold - msign(M)||_F. Directions
            nearer to the threshold get values between 0 and 1.

    Returns:
        A symmetric matrix of shape [m, m] in at least float32, on the device of `momentum`.

    Raises:
        ValueError: If `momentum` is no matrix, or `threshold` or `steps` is out of range.

    Cost: 6 `steps` matrix products of min(m, n)^2 max(m, n) multiplications or fewer, one of m^2 n, and 12 of m^3; no
    singular value decomposition.

    Example:
        >>> sharp_subspace(torch.diag(torch.tensor([3.0, 0.5]))).round(decimals=4)
        tensor([[1., 0.],
                [0., 0.]])
    """
    if momentum.dim() != 2:
        raise ValueError(f"Expected `momentum` to be a matrix, got shape {tuple(momentum.shape)}.")
    if not threshold > 0:
        raise ValueError(f"Expected `threshold` to be a number > 0, got {threshold!r}.")
    if steps < 1:
        raise ValueError(f"Expected `steps` to be a whole number >= 1, got {steps!r}.")
    matrix = momentum.to(torch.promote_types(momentum.dtype, torch.float32)) / threshold
    high = momentum.shape[0] > momentum.shape[1]
    sharp = _sharp_part(matrix.mT, steps).mT if high else _sharp_part(matrix, steps)
    projector = sharp @ sharp.mT
    for _ in range(6):
        square = projector @ projector
        projector = torch.addmm(square, square, projector, beta=3, alpha=-2)
    return projector


def _sharp_part(matrix: Tensor, steps: int) -> Tensor:
    """S, of a matrix that is not higher than wide."""
    sign = _sign(matrix, steps)
    return (sign + _sign(matrix - sign, steps)) / 2


def _sign(matrix: Tensor, steps: int) -> Tensor:
    """U V^T of U diag(sigma) V^T; 0 where sigma is."""
    x = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-10, alpha=3), x, beta=15) / 8
    return x
