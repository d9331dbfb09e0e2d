"""SAM's ascent, average SAM's random step, and moving the weights there and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_ire.functional._foreach import add_, copied, copy_, masked_, norms, products
from lightning_ire.functional._shards import Shards, is_sharded, local, part_of_whole
from lightning_ire.functional.vectors import as_real, in_double

__all__ = [
    "ascent_in_ball",
    "average_sam_displacement",
    "global_dot",
    "global_norm",
    "perturbed",
    "rounding_displacement",
    "sam_displacement",
]

_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor | None], *, like: Sequence[Tensor] | None = None) -> Tensor:
    """L2 norm over all tensors together, as a scalar of at least float32 (float64 for float64 tensors).

    Args:
        tensors: Dense or sparse tensors of any shapes and devices; ``None`` entries are skipped. Of DTensors each
            element counts once, and all ranks have to call.
        like: The parameters that they belong to, if tensors may be parts of sharded ones (as a displacement is).

    Returns:
        Scalar tensor on the first tensor's device; 0 on the CPU if there is no tensor.

    Example:
        >>> global_norm([torch.tensor([3.0]), None, torch.tensor(4.0)])
        tensor(5.)
    """
    shards = Shards(tensors, like)
    dense = [part.coalesce().values() if part.is_sparse else part for part in shards.parts if part is not None]
    if not dense and not shards.sharded:
        return torch.zeros(())
    found = norms(dense)
    if not shards.sharded:
        return _norm_of_norms(found)
    owned = [own for part, own in zip(shards.parts, shards.owned, strict=True) if part is not None]
    return shards.norm([norm for norm, own in zip(found, owned, strict=True) if own]).to(_widest(found))


@overload
def global_dot(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    like: Sequence[Tensor] | None = None,
    each: Literal[False] = False,
) -> Tensor: ...
@overload
def global_dot(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    like: Sequence[Tensor] | None = None,
    each: Literal[True],
) -> list[Tensor]: ...
@torch.no_grad()
def global_dot(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    like: Sequence[Tensor] | None = None,
    each: bool = False,
) -> Tensor | list[Tensor]:
    """Inner product of two lists of tensors, the real part where they are complex; of at least float32.

    Args:
        first: Tensors of any shapes and devices; where one of a pair is ``None`` it counts as zero.
        second: As many, of the same shapes.
        like: The parameters that they belong to, if tensors may be parts of sharded ones; then all ranks have to call.
        each: Return the inner product of each pair, in a list.

    Returns:
        Scalar on the first tensor's device; 0 on the CPU if there is no pair.

    Example:
        >>> global_dot([torch.tensor([3.0, 1.0]), None], [torch.tensor([2.0, 0.5]), torch.ones(2)])
        tensor(6.5000)
    """
    shards = Shards(first, like)
    others = shards.parts if second is first else Shards(second, like).parts
    products: list[Tensor | None] = [
        None if one is None or other is None else _dot(one, other)
        for one, other in zip(shards.parts, others, strict=True)
    ]
    found = [product for product in products if product is not None]
    zero = torch.zeros((), dtype=_widest(found)) if not found else found[0].new_zeros((), dtype=_widest(found))
    values = torch.stack([zero if product is None else product.to(zero) for product in products]) if products else zero
    if shards.sharded:
        owned = torch.tensor(shards.owned, device=values.device)
        values = shards.sum(torch.where(owned, values, 0))
    return list(values.unbind()) if each else values.sum()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    first, second = (_wide(tensor.detach().to_dense()).reshape(-1) for tensor in (first, second))
    return torch.vdot(first, second).real if first.is_complex() else first @ second


def _norm_of_norms(found: Sequence[Tensor]) -> Tensor:
    widest = _widest(found)
    if any(norm.device != found[0].device or norm.dtype != widest for norm in found):
        found = [norm.to(found[0].device, widest) for norm in found]
    return torch.linalg.vector_norm(torch.stack(list(found)))


def _widest(found: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(norm.dtype == torch.float64 for norm in found) else torch.float32


@torch.no_grad()
def sam_displacement(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    rho: float | Sequence[float],
    *,
    adaptive: bool | Sequence[bool] = False,
    eta: float = 0.0,
    rise: float | None = None,
) -> tuple[list[Tensor | None], Tensor]:
    """SAM's ascent step: rho * g / ||g||, the norm over all parameters at once.

    Foret et al. 2021, "Sharpness-Aware Minimization" (arXiv 2010.01412); eq. 7 of the IRE paper. `adaptive` is the
    scale-free form of Kwon et al. 2021, "ASAM" (arXiv 2102.11600): rho * T^2 g / ||T g|| with T = |theta| + eta.

    Args:
        parameters: Weights theta.
        gradients: Gradients g of the same shapes (dense or sparse); ``None`` where a parameter has none. For a
            parameter that is a DTensor: its gradient, a DTensor, or this rank's part of it.
        rho: Radius >= 0 in weight units (adaptive: in units relative to the weights), one for all or one for each
            parameter; the norm is that over all of them either way.
        adaptive: Whether the radius adapts to the size of each weight; or a truth for each parameter (T = 1 where not).
        eta: Added to the size of weights.
        rise: The radius is at most this divided by the norm, so that to first order the loss rises by no more;
            ``None``: it is `rho`.

    Returns:
        The displacements (``None`` where there is no gradient; for a DTensor this rank's part) and the norm that
        divided them. A norm that is zero, NaN, infinite or too small to divide by gives zero displacements.

    Cost: parameter-sized displacements; no gradient pass.

    Example:
        >>> moves, norm = sam_displacement([torch.zeros(2)], [torch.tensor([3.0, 4.0])], rho=0.5)
        >>> moves, norm
        ([tensor([0.3000, 0.4000])], tensor(5.))
    """
    adapting = [adaptive] * len(parameters) if isinstance(adaptive, bool) else adaptive
    weights = [local(parameter) for parameter in parameters]
    scaled: dict[int, Tensor] = {}
    for index, (parameter, gradient, adapts) in enumerate(zip(parameters, gradients, adapting, strict=True)):
        if gradient is not None:
            scaled[index] = _times_size(weights[index], _wide(local(gradient, parameter).to_dense()), adapts, eta)
    norm = global_norm([scaled.get(index) for index in range(len(weights))], like=parameters)
    radii = _each(rho, parameters)
    alike: dict[tuple[float, torch.device], list[int]] = {}  # usually one
    for index, gradient in scaled.items():
        alike.setdefault((radii[index], gradient.device), []).append(index)
    moves: list[Tensor | None] = [None] * len(parameters)
    for (radius, device), members in alike.items():
        allowed = radius if rise is None else (rise / norm.to(device)).clamp(max=radius)
        factor = norm.to(device).reciprocal() * allowed  # as torch divides a number by a tensor
        usable = torch.isfinite(norm).to(device) & torch.isfinite(factor)  # the second not for a norm near 0
        for index in members if adaptive else ():
            scaled[index] = _times_size(weights[index], scaled[index], adapting[index], eta)
        found = _zero_unless(usable, products([scaled[index] for index in members], factor))
        for index, move in zip(members, found, strict=True):
            moves[index] = _of_dtype(move, weights[index].dtype)
    return moves, norm


@torch.no_grad()
def average_sam_displacement(
    parameters: Sequence[Tensor],
    rho: float | Sequence[float],
    *,
    generators: Sequence[torch.Generator | None] | None = None,
) -> list[Tensor]:
    """A step of length rho in a uniformly random direction: rho * xi / ||xi||, xi ~ N(0, I).

    Average SAM, eq. 8 of the IRE paper (arXiv 2405.20763).

    Args:
        parameters: Weights, for their shapes, dtypes and devices.
        rho: Length >= 0 in weight units, over all parameters together; or a number for each parameter in its place.
        generators: One random generator per parameter, on its device; ``None``: torch's global ones. For DTensors
            all ranks draw the whole and keep their part, so they need generators in the same state, and what comes
            out is what one process would draw.

    Returns:
        One displacement per parameter; for a DTensor this rank's part.

    Example:
        >>> moves = average_sam_displacement([torch.zeros(3), torch.zeros(2, 2)], rho=0.1)
        >>> round(float(global_norm(moves)), 4)
        0.1
    """
    sources = generators if generators is not None else [None] * len(parameters)
    sharded = any(map(is_sharded, parameters))
    noise, lengths = [], []
    for weight, source in zip(parameters, sources, strict=True):
        dtype = _accumulation_dtype(weight.dtype)
        draw = torch.randn(weight.shape, generator=source, dtype=dtype, device=weight.device)
        if sharded:  # one whole at a time is in memory
            lengths += norms([draw])
            draw = part_of_whole(draw, weight)
        noise.append(draw)
    norm = _norm_of_norms(lengths) if sharded else global_norm(noise)
    return [
        (draw * (radius / norm).to(draw.device)).to(weight.dtype)
        for weight, draw, radius in zip(parameters, noise, _each(rho, parameters), strict=True)
    ]


@torch.no_grad()
def ascent_in_ball(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    before: Sequence[Tensor | None] | None,
    *,
    step: float,
    radius: float | Sequence[float],
    scope: Literal["tensor", "global"] = "global",
) -> tuple[list[Tensor | None], Tensor]:
    """One ascent step of adversarial model perturbation: delta <- before + step * g, shortened to the ball's radius.

    Zheng, Zhang & Mao 2021 (arXiv 2010.04925): the inner maximization, projected back by scaling.

    Args:
        parameters: Weights, for their dtypes.
        gradients: Gradients at the weights moved by `before` (dense or sparse); ``None`` where there is none. For a
            parameter that is a DTensor: its gradient, a DTensor, or this rank's part of it.
        before: The displacements so far; ``None``: zero.
        step: Step size zeta > 0.
        radius: Largest length epsilon >= 0 of the displacement, in weight units; or one for each parameter (of which
            the largest counts where the length is that over all).
        scope: Whether that is the length over each tensor by itself ("tensor") or over all together ("global").

    Returns:
        The displacements (``None`` where there is neither a gradient nor a displacement so far; for a DTensor this
        rank's part) and the norm of the gradients. A norm that is not finite gives zero displacements.

    Example:
        >>> ascent_in_ball([torch.zeros(2)], [torch.tensor([3.0, 4.0])], None, step=1.0, radius=2.5)
        ([tensor([1.5000, 2.0000])], tensor(5.))
    """
    gradients = [local(gradient, weight) for gradient, weight in zip(gradients, parameters, strict=True)]
    norm = global_norm(gradients, like=parameters)
    longer: list[Tensor | None] = []
    for gradient, move in zip(gradients, map(local, before or [None] * len(gradients)), strict=True):
        if gradient is None:
            longer.append(move)
            continue
        ahead = _wide(gradient.to_dense()) * step
        longer.append(ahead if move is None else ahead + move)
    together = global_norm(longer, like=parameters) if scope == "global" else None
    radii = _each(radius, parameters)
    if together is not None:
        radii = [max(radii, default=0.0)] * len(parameters)
    moves: list[Tensor | None] = []
    for weight, move, radius in zip(parameters, longer, radii, strict=True):
        if move is None:
            moves.append(None)
            continue
        length = (global_norm([move], like=[weight]) if together is None else together).to(move.device)
        shortened = torch.where(length > radius, move * (radius / length), move)
        usable = torch.isfinite(norm.to(move.device)) & torch.isfinite(length)
        moves.append(_of_dtype(_zero_unless(usable, [shortened])[0], weight.dtype))
    return moves, norm


@torch.no_grad()
def rounding_displacement(parameters: Sequence[Tensor], bits: int) -> tuple[list[Tensor | None], list[float]]:
    """Q(theta) - theta, where Q rounds each tensor of two or more dimensions to b bits.

    Q(w) = s round(w / s) with the step s = max |w| / (2^(b-1) - 1) of the whole tensor: symmetric, to the nearest, the
    usual way to quantize weights. Biases and the weights of normalization layers stay as they are.

    Args:
        parameters: Weights of any shapes, real or complex (rounded as pairs); of a DTensor this rank's part is moved.
        bits: b >= 2.

    Returns:
        The displacements (``None``: not rounded; of a DTensor this rank's part), and s of each tensor (0: not rounded).

    Cost: of DTensors one all-reduce of a number for each tensor together.

    Example:
        >>> moves, steps = rounding_displacement([torch.tensor([[1.0, 0.2]]), torch.ones(1)], bits=2)
        >>> moves[0], moves[1], steps
        (tensor([[ 0.0000, -0.2000]]), None, [1.0, 0.0])
    """
    shards = Shards(parameters)
    parts = [as_real(part) for part in shards.parts]
    largest = [in_double(part.abs().amax() if part.numel() else 0.0).cpu() for part in parts]
    steps = [float(most) / (2 ** (bits - 1) - 1) for most in shards.largest(torch.stack(largest))] if parts else []
    moves: list[Tensor | None] = [None] * len(parts)
    for index, (whole, part) in enumerate(zip(parameters, parts, strict=True)):
        if whole.dim() < 2 or not 0 < steps[index] < math.inf:
            steps[index] = 0.0
            continue
        rounded = (_wide(part) / steps[index]).round_().mul_(steps[index])
        move = rounded.sub_(part).to(part.dtype)
        moves[index] = torch.view_as_complex(move) if whole.is_complex() else move
    return moves, steps


def _each(rho: float | Sequence[float], parameters: Sequence[Tensor]) -> Sequence[float]:
    return [rho] * len(parameters) if isinstance(rho, (int, float)) else rho


@contextmanager
def perturbed(parameters: Sequence[Tensor], displacements: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
    """Inside the block the weights are moved; after it, whatever happened, they hold the saved bits again.

    Restoring copies what was saved: subtracting the displacement again would be off by a rounding error for some
    coordinates.

    Args:
        parameters: Weights, moved in place. Of a DTensor this rank's part is; copies of the whole that FSDP2 modules
            hold do not follow (see `FSDPModule.reshard`): resharding them, inside the block and after it, is the
            caller's.
        displacements: What is added to each; ``None`` leaves that weight alone. For a DTensor this rank's part.

    Yields:
        The saved weights, one tensor per parameter (a parameter that is not moved is saved too); of a DTensor this
        rank's part.

    Cost: one copy of the weights, alive inside the block.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> with perturbed([weight], [torch.tensor([0.5])]):
        ...     print(weight)
        tensor([1.5000])
        >>> weight
        tensor([1.])
    """
    displacements = [local(move, weight) for move, weight in zip(displacements, parameters, strict=True)]
    parameters = [local(parameter) for parameter in parameters]
    saved = copied(parameters)
    moved = [index for index, move in enumerate(displacements) if move is not None]
    moves = [move for move in displacements if move is not None]
    try:
        try:
            add_([parameters[index] for index in moved], moves)
            del displacements, moves  # frees a copy of the weights inside the block
            yield saved
        finally:
            _put_back(parameters, saved, moved)
    except BaseException:  # also for a Ctrl-C while weights are put back
        _put_back(parameters, saved, moved)
        raise


def _put_back(parameters: Sequence[Tensor], saved: Sequence[Tensor], moved: Sequence[int]) -> None:
    copy_([parameters[index] for index in moved], [saved[index] for index in moved])


def _zero_unless(usable: Tensor, moves: list[Tensor]) -> list[Tensor]:
    """All moves, or zeros in their place, without waiting for a GPU."""
    if usable.device.type != "cpu" or not bool(usable):
        masked_(moves, usable)
    return moves


def _times_size(weight: Tensor, gradient: Tensor, adaptive: bool, eta: float) -> Tensor:
    """T g, T in the (wide) type of the gradient."""
    if not adaptive:
        return gradient
    return gradient * (weight.abs().to(gradient.real.dtype) + eta if eta else weight.abs())


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, whose squares overflow or lose all digits; else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _WIDE else _of_dtype(tensor, _accumulation_dtype(tensor.dtype))


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # asked before, as `to` takes long to do nothing
