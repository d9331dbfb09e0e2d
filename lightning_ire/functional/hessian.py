"""Products of a loss's Hessian with a vector, without the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ire.functional.perturbation import global_norm, perturbed
from lightning_ire.functional.vectors import widest_dtype

__all__ = ["finite_difference_product", "gradients_by_backward", "hessian_product"]


def hessian_product(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> list[Tensor | None]:
    """H v, by differentiating the gradient once more (Pearlmutter 1994, "Fast exact multiplication by the Hessian").

    The graph of the gradients stays alive, so that many products can be taken from one gradient.

    Args:
        gradients: Gradient of a scalar loss, made with `create_graph=True`; ``None`` where a parameter is unused.
        parameters: Where it was taken.
        vector: v, one tensor per parameter.

    Returns:
        H v, one tensor per parameter; ``None``: zero.

    Cost: one backward pass through the graph of a gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> g = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        >>> hessian_product(g, [x], [torch.tensor([1.0, 1.0])])
        [tensor([ 6., 12.])]
    """
    pairs = [(g, v.to(g)) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    if not pairs:  # a loss that is linear in all parameters
        return [None] * len(parameters)
    outputs, starts = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, parameters, starts, retain_graph=True, allow_unused=True))


def finite_difference_product(
    gradient: Callable[[], Sequence[Tensor | None]],
    parameters: Sequence[Tensor],
    vector: Sequence[Tensor],
    *,
    step: float | None = None,
) -> list[Tensor | None]:
    """H v as (g(theta + e v) - g(theta - e v)) / 2e: for losses that cannot be differentiated twice.

    Args:
        gradient: Returns the gradient at the weights as they are when it is called.
        parameters: The weights; moved in the meantime and put back bit for bit.
        vector: v, one tensor per parameter.
        step: Length of e v in weight units. Default: the cube root of the precision (float32: 0.005), a tenth of that
            for each unit of the weights' norm where that is less.

    Returns:
        H v, one tensor per parameter; ``None``: zero. The error is of order `step` squared plus precision / `step`;
        next to kinks (ReLU) of order `step`.

    Cost: two calls of `gradient`, one copy of the weights.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> (product,) = finite_difference_product(lambda: [3 * x**2], [x], [torch.tensor([1.0, 1.0])])
        >>> product.round(decimals=6)
        tensor([ 6., 12.], dtype=torch.float64)
    """
    length = float(global_norm(vector))
    if length == 0:
        return [None] * len(parameters)
    if step is None:
        step = torch.finfo(widest_dtype(parameters)).eps ** (1 / 3) * min(
            1.0, 0.1 * float(global_norm(parameters)) or 1
        )
    scale = step / length
    sides = []
    for sign in (1, -1):
        with perturbed(parameters, [sign * scale * piece for piece in vector]):
            sides.append([None if g is None else g.detach().clone() for g in gradient()])
    return [
        None if plus is None or minus is None else (plus - minus) / (2 * scale)
        for plus, minus in zip(*sides, strict=True)
    ]


def gradients_by_backward(
    outputs: Sequence[Tensor], starts: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of sum(outputs * starts) with `backward()`, for graphs that refuse `torch.autograd.grad`.

    What is in `.grad` is put aside meanwhile.

    Args:
        outputs: Tensors with a graph (freed by this).
        starts: Their weights in the sum, of the same shapes.
        parameters: Leaves of the graph.

    Returns:
        One gradient per parameter; ``None`` where it is unused.
    """
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(list(outputs), list(starts))
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
