"""Tensors of which each rank holds a part (DTensor): the parts, and sums over all ranks.

The only file of `functional` that knows DTensors (FSDP2, tensor parallelism, both, and plain tensors among them).
Their own arithmetic is no way: `torch._foreach_copy_`, `cat`, `kthvalue` and any mix with plain tensors raise, so
everything is computed on the local parts, and what is summed over all elements is added up over the ranks here.

Everywhere in `functional`, what comes back for a DTensor is the rank's own part, a plain tensor; it stands beside the
DTensor it belongs to in later calls. Functions that sum over parts are given those DTensors as `like`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Shards", "is_sharded", "local", "part_of_whole", "whole_of_part"]

_TensorOrNone = TypeVar("_TensorOrNone", Tensor, "Tensor | None")


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. Importing their module takes seconds: who has not imported it has none.

    Args:
        tensor: Anything.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))  # none while a thread loads it


@torch.no_grad()
def _part(tensor: Any, like: Any) -> Tensor:
    wanted = _summed((like if is_sharded(like) else tensor).placements)
    if wanted != tensor.placements:
        tensor = tensor.redistribute(tensor.device_mesh, wanted)
    return tensor.to_local().detach()


@functools.cache
def _summed(placements: Any) -> Any:
    """With `Replicate` in place of `Partial`."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


def local(tensor: _TensorOrNone, like: Tensor | None = None) -> _TensorOrNone:
    """The part of a DTensor that this rank holds, a detached view of its memory; anything else as it is.

    Args:
        tensor: A tensor or ``None``. A DTensor that is a sum still to be made (`Partial`, as gradients of replicated
            weights can be) is summed first: an operation of all ranks of its mesh.
        like: The parameter that it belongs to: a DTensor placed differently is redistributed as this one is.
    """
    return _part(tensor, like) if is_sharded(tensor) else tensor


@torch.no_grad()
def whole_of_part(part: Tensor, like: Tensor) -> Tensor:
    """All parts put together, the same on all ranks; all ranks of the mesh have to call it.

    Args:
        part: A tensor of any dtype with the shape of `local(like)`, as a mask.
        like: The parameter. One that is no DTensor has no parts: `part` is the whole.

    Cost: memory for the whole on each rank.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    # not every backend gathers booleans
    bits = (part.view(torch.uint8) if part.dtype == torch.bool else part).contiguous()
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    spread = DTensor.from_local(bits, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return spread.full_tensor().view(part.dtype).to(part.device)


@torch.no_grad()
def part_of_whole(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have whole, a copy if it is less; nothing is communicated.

    Args:
        whole: A tensor of any dtype with the shape of `like`.
        like: The parameter. One that is no DTensor has no parts: `whole` comes back itself.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(mesh, placements).to_local().to(whole.device).contiguous()


class Shards:
    """The parts of some tensors on this rank, which of them it counts, and sums over all ranks.

    Each element is counted by one rank, its owner: of several meshes with copies of a tensor one in that of rank 0,
    of the copies inside a mesh the rank at 0 of each dimension along which it is replicated; plain tensors among
    sharded ones, which all ranks have, by rank 0. Sums are over all ranks (the default process group), so that all
    get the same bits, those with copies and those with empty parts too: all have to call :meth:`sum` and
    :meth:`largest` equally often.

    Without a DTensor in the list this is one `isinstance` per tensor: everything is counted here, nothing is
    communicated.

    Args:
        tensors: Tensors or ``None``.
        like: The parameters that they belong to, if tensors are parts already. They say who owns what.

    Attributes:
        sharded: Whether there is a DTensor.
        parts: :func:`local` of each tensor.
        owned: Whether this rank counts it.
    """

    def __init__(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor | None] | None = None) -> None:
        self._owners = tensors if like is None else like
        sharded = [owner for owner in self._owners if is_sharded(owner)]
        self.sharded = bool(sharded)
        self.parts: list[Any] = list(tensors)
        self.owned = [True] * len(self.parts)
        if sharded:
            self._device = sharded[0].device_mesh.device_type  # type: ignore[union-attr]
            self.parts = [local(tensor, owner) for tensor, owner in zip(tensors, self._owners, strict=True)]
            self.owned = [_is_owner(owner) for owner in self._owners]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each whole tensor (``None``: 0), the same on all ranks."""
        owners: list[Any] = list(self._owners)
        return [0 if part is None else owner.numel() for part, owner in zip(self.parts, owners, strict=True)]

    def mine(self, values: Sequence[Any]) -> list[Any]:
        """Those that this rank counts, without ``None``.

        Args:
            values: One for each of the tensors.
        """
        return [value for value, own in zip(values, self.owned, strict=True) if own and value is not None]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks.

        Args:
            value: What this rank's own parts come to (zeros, if it has none), of one shape and dtype on all ranks.

        Returns:
            A new tensor; without DTensors `value` itself.
        """
        return self._reduced(value, "SUM")

    def largest(self, value: Tensor) -> Tensor:
        """The largest of all ranks, of each element.

        Args:
            value: As in :meth:`sum`; also parts of others may have been looked at.
        """
        return self._reduced(value, "MAX")

    def every(self, flag: Tensor) -> Tensor:
        """Whether a flag is true on all ranks.

        Args:
            flag: Boolean tensor.
        """
        return ~self.largest((~flag).int()).bool() if self.sharded else flag

    def norm(self, norms: Sequence[Tensor]) -> Tensor:
        """Root of the sum of squares over all ranks; in float64, on the first tensor's device.

        Args:
            norms: Scalars, the norms of parts that this rank counts; maybe none.
        """
        device = next((part.device for part in self.parts if part is not None), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        found = torch.stack([zero, *[norm.to(zero) for norm in norms]])
        return self.sum(found.square().sum()).sqrt()

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        if not self.sharded:
            return value
        result = value.to(self._device, copy=True).contiguous()  # parts may be offloaded to a CPU
        torch.distributed.all_reduce(result, getattr(torch.distributed.ReduceOp, operation))
        return result.to(value.device)


def _is_owner(tensor: Any) -> bool:
    """See :class:`Shards`."""
    if not is_sharded(tensor):
        return torch.distributed.get_rank() == 0
    return _owns(tensor.device_mesh, _summed(tensor.placements))


@functools.cache  # the ranks of a mesh take a third of a millisecond
def _owns(mesh: Any, placements: Any) -> bool:
    coordinate = mesh.get_coordinate()
    if coordinate is None or not bool((mesh.mesh == 0).any()):
        return False
    return all(place == 0 for place, how in zip(coordinate, placements, strict=True) if how.is_replicate())
