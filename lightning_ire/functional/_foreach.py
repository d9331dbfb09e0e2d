"""Many tensors in few operations: torch's foreach functions, and small tensors joined to long ones.

The only file that uses torch's `_foreach_*` functions, which torch documents as a beta (`torch.foreach`). Each is
one loop in C++ on a CPU and a few kernels for all tensors together on a GPU. The results are those of the same
operation tensor by tensor, to the bit (norms: up to the order of the sum).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_ire.functional._shards import Shards, local

__all__ = [
    "add_",
    "all_finite",
    "copied",
    "copy_",
    "groups_of",
    "joined",
    "masked_",
    "multiply_",
    "norms",
    "parts_of",
    "products",
    "quotients",
    "squares",
    "subtract_",
]

_SMALL = 1 << 13  # elements; below, the calls cost more than copying the numbers
_SMALL_ON_DEVICE = 1 << 20
_TOGETHER = 1 << 18
_TOGETHER_ON_DEVICE = 1 << 24
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def groups_of(tensors: Sequence[Tensor], keys: Iterable[Hashable] | None = None) -> list[list[int]]:
    """Which tensors are to be joined: small ones of a device and dtype, up to a size that stays in the cache.

    Args:
        tensors: Dense tensors.
        keys: Only tensors with the same key are joined; default: all.

    Returns:
        Lists of indices; a large tensor is alone.
    """
    groups: list[list[int]] = []
    open_groups: dict[Hashable, tuple[list[int], int]] = {}
    for index, (tensor, key) in enumerate(zip(tensors, keys or [None] * len(tensors), strict=True)):
        count, on_cpu = tensor.numel(), tensor.is_cpu
        if count > (_SMALL if on_cpu else _SMALL_ON_DEVICE):
            groups.append([index])
            continue
        where = (tensor.device, tensor.dtype, key)
        members, size = open_groups.get(where, ([], 0))
        if not members or size + count > (_TOGETHER if on_cpu else _TOGETHER_ON_DEVICE):
            members, size = [], 0
            groups.append(members)
        members.append(index)
        open_groups[where] = members, size + count
    return groups


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all elements; a copy, unless it is a single tensor without gaps."""
    flat = [tensor if tensor.dim() == 1 else tensor.flatten() for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def parts_of(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector with the shapes of the tensors that it was joined from."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece if tensor.dim() == 1 else piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


@torch.no_grad()
def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor, with its strides; of a DTensor, of this rank's part."""
    tensors = [local(tensor) for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_(copies, tensors)
    return copies


@torch.no_grad()
def copy_(tensors: list[Tensor], sources: list[Tensor]) -> None:
    """Overwrite each tensor; of a DTensor, this rank's part."""
    tensors, sources = [local(tensor) for tensor in tensors], [local(source) for source in sources]
    for members in _alike(tensors):
        torch._foreach_copy_([tensors[index] for index in members], [sources[index] for index in members])


@torch.no_grad()
def add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor."""
    if tensors:
        torch._foreach_add_(tensors, others)


@torch.no_grad()
def subtract_(tensors: list[Tensor], others: list[Tensor], factor: float) -> None:
    """Subtract `factor` times the other from each tensor."""
    if tensors:
        torch._foreach_sub_(tensors, others, alpha=factor)


@torch.no_grad()
def products(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Each tensor (of a DTensor this rank's part) times a scalar tensor."""
    return _of_each(tensors, lambda some: torch._foreach_mul(some, factor.to(some[0])))


@torch.no_grad()
def squares(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor times itself."""
    return _of_each(tensors, lambda some: torch._foreach_mul(some, some))


@torch.no_grad()
def quotients(tensors: Sequence[Tensor], divisors: Sequence[float]) -> list[Tensor]:
    """Each tensor (of a DTensor this rank's part) in at least float32, divided by a number of its own; copies."""
    tensors = [local(tensor) for tensor in tensors]
    found = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    for divisor in set(divisors):
        members = [index for index, one in enumerate(divisors) if one == divisor]
        results = _of_each([found[index] for index in members], lambda some: torch._foreach_div(some, divisor))  # noqa: B023
        for index, result in zip(members, results, strict=True):
            found[index] = result
    return found


@torch.no_grad()
def multiply_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiply each tensor by a number or a scalar tensor."""
    for members in _alike(tensors):
        some = [tensors[index] for index in members]
        torch._foreach_mul_(some, factor.to(some[0]) if isinstance(factor, Tensor) else factor)


@torch.no_grad()
def norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, in at least float32."""
    return _of_each(
        tensors, lambda some: torch._foreach_norm(some, 2, torch.promote_types(some[0].dtype, torch.float32))
    )


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor], *, like: Sequence[Tensor] | None = None) -> Tensor:
    """Whether no element is NaN or infinite: a boolean scalar on the first tensor's device; of nothing, true.

    Args:
        tensors: Any number of tensors.
        like: The parameters they belong to, if tensors may be parts of sharded ones: then on no rank.
    """
    shards = Shards(tensors, like)
    present = [tensor for tensor in shards.parts if tensor is not None and tensor.numel()]
    ends = [
        end  # NaN wins in both
        for group in groups_of(present)
        for end in torch.aminmax(joined([present[index] for index in group]))
    ]
    finite = torch.stack([torch.isfinite(end).to(ends[0].device) for end in ends]).all() if ends else torch.tensor(True)
    return shards.every(finite)


@torch.no_grad()
def masked_(tensors: list[Tensor], mask: Tensor | list[Tensor]) -> None:
    """Make elements +0.0 where a boolean is false, whatever they were (0 times NaN is NaN; a product of bits is not).

    Args:
        tensors: Floating-point tensors.
        mask: One boolean for all, or a tensor for each.
    """
    if not tensors:
        return
    bits = [tensor.view(_WHOLE[tensor.element_size()]) for tensor in tensors]
    torch._foreach_mul_(bits, mask)


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Indices of the tensors of each device and dtype: a GPU takes lists of one kind in few kernels."""
    if len({tensor.device for tensor in tensors}) == len({tensor.dtype for tensor in tensors}) == 1:
        return [[*range(len(tensors))]]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    return kinds.values()


def _of_each(tensors: list[Tensor], function: Callable[[list[Tensor]], Sequence[Tensor]]) -> list[Tensor]:
    """What a function of tensors of one kind returns, in the order of the tensors."""
    tensors = [local(tensor) for tensor in tensors]
    found: dict[int, Tensor] = {}
    for members in _alike(tensors):
        found.update(zip(members, function([tensors[index] for index in members]), strict=True))
    return [found[index] for index in range(len(tensors))]
