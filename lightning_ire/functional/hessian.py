"""Products of a loss's Hessian with a vector, without the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ire.functional._shards import Shards, local
from lightning_ire.functional.perturbation import global_norm, perturbed
from lightning_ire.functional.vectors import in_double

__all__ = ["finite_difference_product", "gradients_by_backward", "hessian_product", "twice_differentiable"]


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
    pairs = [
        (g, _aligned(v.to(g))) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad
    ]
    if not pairs:  # a loss that is linear in all parameters
        return [None] * len(parameters)
    outputs, starts = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, parameters, starts, retain_graph=True, allow_unused=True))


def _aligned(piece: Tensor) -> Tensor:
    """A copy of what begins at an odd place of a vector: as pairs it could not become complex again."""
    return piece.clone() if piece.storage_offset() % 2 else piece


def finite_difference_product(
    gradient: Callable[[], Sequence[Tensor | None]],
    parameters: Sequence[Tensor],
    vector: Sequence[Tensor],
    *,
    step: float | None = None,
    precision: torch.dtype | None = None,
) -> list[Tensor | None]:
    """H v as (g(theta + e v) - g(theta - e v)) / 2e: for losses that cannot be differentiated twice.

    Args:
        gradient: Returns the gradient at the weights as they are when it is called (of FSDP2 modules it has to drop
            gathered copies of the weights first, see :func:`~lightning_ire.functional.perturbed`).
        parameters: The weights; moved in the meantime and put back bit for bit.
        vector: v, one tensor per parameter; for a DTensor this rank's part will do.
        step: Length of e v in weight units. Default, with the cube root r of the weights' precision (float32: 0.005):
            so long that the weight that moves most moves by r / 25, but at most 0.6 r times the norm of the weights.
        precision: A coarser type that the loss is computed in, for the default step.

    Returns:
        H v, one tensor per parameter (of a DTensor this rank's part); ``None``: zero. The error is of order `step`
        squared plus precision / `step`. In float32 with the default step it is about 1e-4 of H v for smooth losses and
        rarely more than 1e-2 (random signs and leading eigenvectors, 3e2 to 2e5 weights of norm 1 to 20); more where
        weights are huge or the loss is nearly 0. Gradients that jump (ReLU) are another matter: each jump on the way
        counts as curvature, divided by `step`, and the result can be anywhere from near to H v, which leaves jumps out,
        to many times as large.

    Cost: two calls of `gradient`, one copy of the weights and two of the gradient; of DTensors three all-reduces of a
    number more.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> (product,) = finite_difference_product(lambda: [3 * x**2], [x], [torch.tensor([1.0, 1.0])])
        >>> [round(number, 6) for number in product.tolist()]
        [6.0, 12.0]
    """
    length = float(global_norm(vector, like=parameters))
    vector = [local(piece, parameter) for piece, parameter in zip(vector, parameters, strict=True)]
    if length == 0:
        return [None] * len(parameters)
    scale = _default_scale(parameters, vector, length, precision) if step is None else step / length
    wide = [piece.to(torch.promote_types(piece.dtype, p.dtype)) for piece, p in zip(vector, parameters, strict=True)]
    sides = []
    for sign in (1, -1):
        with perturbed(parameters, [sign * scale * piece for piece in wide]):
            found = zip(gradient(), parameters, strict=True)
            sides.append([None if g is None else local(g, parameter).detach().clone() for g, parameter in found])
    return [
        None if plus is None or minus is None else (plus - minus) / (2 * scale)
        for plus, minus in zip(*sides, strict=True)
    ]


def _default_scale(
    parameters: Sequence[Tensor], vector: Sequence[Tensor], length: float, precision: torch.dtype | None
) -> float:
    """The e of :func:`finite_difference_product`.

    Of the rules tried (constants, multiples of the norm of the weights, of the root of their number) the one that was
    near the best step for directions spread over all weights, whose best step is long, and for concentrated ones.
    """
    dtypes = {parameter.dtype for parameter in parameters} | ({precision} if precision is not None else set())
    coarse = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    largest = max((float(torch.linalg.vector_norm(piece, torch.inf)) for piece in vector if piece.numel()), default=0.0)
    largest = float(Shards(parameters).largest(in_double(largest)))
    weights = float(global_norm(parameters))
    scale = 0.04 * coarse / largest
    return min(scale, 0.6 * coarse * weights / length) if weights > 0 else scale


def gradients_by_backward(
    outputs: Sequence[Tensor], starts: Sequence[Tensor], parameters: Sequence[Tensor], *, keep_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of sum(outputs * starts) with `backward()`, for graphs that refuse `torch.autograd.grad`.

    What is in the parameters' `.grad` is put aside meanwhile. Other leaves of the graph get their gradients added to
    theirs, and hooks for accumulated gradients run: a graph that refuses `grad` refuses to leave them out too.

    Args:
        outputs: Tensors with a graph.
        starts: Their weights in the sum, of the same shapes.
        parameters: Leaves of the graph.
        keep_graph: Whether the graph stays alive.

    Returns:
        One gradient per parameter (for a DTensor this rank's part of that of all ranks); ``None`` where it is unused.
    """
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(list(outputs), list(starts), retain_graph=keep_graph)
        return [local(parameter.grad, parameter) for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Inside the block forward passes make graphs that can be differentiated twice, where torch has a way to.

    Attention uses the math kernel, recurrent layers do without cuDNN, compiled parts run uncompiled.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            cudnn = torch.backends.cudnn
            flags = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
            stack.enter_context(cudnn.flags(enabled=False, **flags))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
