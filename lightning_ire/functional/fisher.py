"""The diagonal of the Fisher information from gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ire.functional._foreach import multiply_, squares
from lightning_ire.functional._shards import local

__all__ = ["fisher_diagonal", "per_sample_squares"]


@torch.no_grad()
def fisher_diagonal(gradients: Sequence[Tensor | None], batch: float | Tensor = 1.0) -> list[Tensor | None]:
    """H = B * G * G, eq. 6: an unbiased estimate of the diagonal of the Fisher information.

    Args:
        gradients: Gradient G, one tensor per parameter, ``None`` where there is none: of the mean loss against drawn
            labels, with B their number; or of a sampled loss's `score`, which has B in it. DTensors hold the gradient
            of all ranks together.
        batch: B.

    Returns:
        h, in at least float32 (squares of half types would underflow); for a DTensor this rank's part of it.

    Example:
        >>> fisher_diagonal([torch.tensor([0.5, -2.0]), None], batch=8)
        [tensor([ 2., 32.]), None]
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    wide = [local(g).to(torch.promote_types(g.dtype, torch.float32)) for g in gradients if g is not None]
    found = squares(wide)
    multiply_(found, batch)
    diagonal: list[Tensor | None] = [None] * len(gradients)
    for index, square in zip(present, found, strict=True):
        diagonal[index] = square
    return diagonal


def per_sample_squares(
    score: Callable[..., tuple[Tensor, Tensor]],
    parameters: Mapping[str, Tensor],
    samples: Sequence[Tensor],
    chunk: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum over samples of the square of each sample's gradient, with `torch.func`.

    Args:
        score: Called as ``score(parameters, *sample)`` with one sample's slices; returns a scalar, and a number that is
            added up beside.
        parameters: Weights by name.
        samples: Tensors whose first dimension goes over the samples.
        chunk: Samples whose gradients are held at a time.

    Returns:
        The sums of squares by name, in at least float32, and the sum of the numbers.

    Cost: the passes of one batch; memory for `chunk` gradients. Random numbers differ between samples.

    Example:
        >>> weights, samples = {"w": torch.tensor([1.0, 2.0])}, [torch.tensor([[1.0, 0.0], [2.0, 3.0]])]
        >>> score = lambda weights, x: ((weights["w"] * x).sum(), torch.ones(()))
        >>> per_sample_squares(score, weights, samples, chunk=1)
        ({'w': tensor([5., 9.])}, tensor(2.))
    """
    at_once = torch.func.vmap(
        torch.func.grad(score, has_aux=True), in_dims=(None, *[0] * len(samples)), randomness="different"
    )
    squares: dict[str, Tensor] = {}
    count = torch.zeros(())
    for parts in zip(*(sample.split(chunk) for sample in samples), strict=True):
        gradients, counted = at_once(dict(parameters), *parts)
        count = count + counted.sum()
        for name, gradient in gradients.items():
            wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(0)
            squares[name] = squares[name] + wide if name in squares else wide
    return squares, count
