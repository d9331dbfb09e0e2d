"""From curvature estimates to the 0/1 projection on the flat coordinates (eq. 5), and its storage as bits.

The mask of a parameter that is a DTensor is a plain tensor with the shape of this rank's part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ire.functional._foreach import groups_of, joined, parts_of
from lightning_ire.functional._shards import Shards, local
from lightning_ire.functional.threshold import threshold_of_vectors

__all__ = ["count_true", "flat_masks", "mask_below", "masks_and_threshold", "pack_mask", "unpack_mask"]


def flat_masks(
    values: Sequence[Tensor | None],
    gamma: float,
    *,
    scope: Literal["global", "tensor"] = "global",
    exclude_zero: bool = False,
    like: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    r"""The flat coordinates: 1 where \|h_i\| is at most the max(1, int(p * gamma))-th smallest of \|h\|.

    Eq. 5 of the IRE paper (arXiv 2405.20763). Ties at the threshold are flat, so a little more than the fraction
    `gamma` may be.

    Args:
        values: Diagonal curvature estimates h, one tensor per parameter; ``None`` where there is none.
        gamma: Fraction of coordinates called flat, in (0, 1].
        scope: Rank over all tensors at once ("global", the paper) or in each tensor by itself ("tensor").
        exclude_zero: Leave coordinates with h = 0 out of the ranking; their mask is 0.
        like: The parameters that the values belong to, if they may be parts of sharded ones: p and the ranking are
            then those of the whole, and all ranks have to call (with a value for the same parameters).

    Returns:
        One boolean tensor per value, of its shape (of a DTensor: of this rank's part); ``None`` where the value was
        ``None``.

    Raises:
        ValueError: If `gamma` or `scope` is out of range, nothing is left to rank, or a value is NaN or infinite.

    Example:
        >>> flat_masks([torch.tensor([0.1, 5.0]), torch.tensor([0.2, 9.0])], gamma=0.5)
        [tensor([ True, False]), tensor([ True, False])]
    """
    return masks_of_present(masks_and_threshold, values, like, gamma=gamma, scope=scope, exclude_zero=exclude_zero)


def masks_of_present(
    make: Callable[..., tuple[list[Tensor], Tensor]],
    values: Sequence[Tensor | None],
    like: Sequence[Tensor | None] | None,
    **settings: Any,
) -> list[Tensor | None]:
    """The masks that a function makes of the values that are there; ``None`` where there is none."""
    present = [index for index, value in enumerate(values) if value is not None]
    chosen: list[Tensor] = [values[index] for index in present]  # type: ignore[misc]
    wholes: list[Tensor] = chosen if like is None else [like[index] for index in present]  # type: ignore[misc]
    found, _ = make(chosen, like=wholes, **settings)
    masks: list[Tensor | None] = [None] * len(values)
    for index, mask in zip(present, found, strict=True):
        masks[index] = mask
    return masks


@torch.no_grad()
def masks_and_threshold(
    values: Sequence[Tensor],
    gamma: float,
    *,
    scope: Literal["global", "tensor"] = "global",
    exclude_zero: bool = False,
    finite: bool = False,
    like: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The masks of :func:`flat_masks`, and the threshold that made them.

    Args:
        values: Curvature estimates, one tensor per parameter.
        gamma: As there.
        scope: As there.
        exclude_zero: As there.
        finite: The values are known to be finite: then the host does not wait for a GPU to look.
        like: As there.

    Returns:
        One boolean tensor per value (those of small values are parts of one tensor), and the scalar of
        :func:`flat_threshold`; with scope "tensor" the largest of those of the tensors.

    Raises:
        ValueError: As there.

    Cost: that of :func:`flat_threshold` and one byte per value; for little data and ties one more read of the values.
    """
    if scope not in ("global", "tensor"):
        raise ValueError(f"Expected `scope` to be 'global' or 'tensor', got {scope!r}.")
    wholes = values if like is None else like
    if scope == "tensor" and any(whole.numel() for whole in wholes):
        of_one = functools.partial(masks_and_threshold, gamma=gamma, exclude_zero=exclude_zero, finite=finite)
        pairs = zip(values, wholes, strict=True)
        each = [of_one([value], like=[whole]) if whole.numel() else None for value, whole in pairs]
        thresholds = [one[1] for one in each if one is not None]
        found = [local(value).bool() if one is None else one[0][0] for value, one in zip(values, each, strict=True)]
        return found, torch.stack([one.to(thresholds[0].device) for one in thresholds]).amax()
    shards = Shards(values, like)
    parts = shards.parts
    groups = groups_of(parts, shards.owned)
    flat = [joined([parts[index] for index in group]) for group in groups]
    found = [torch.empty_like(vector, dtype=torch.bool) for vector in flat]
    owned = [shards.owned[group[0]] for group in groups]
    threshold, filled = threshold_of_vectors(
        flat, gamma, shards, owned, exclude_zero=exclude_zero, masks=found, finite=finite
    )
    masks: list[Tensor] = [threshold] * len(parts)
    for group, vector, mask in zip(groups, flat, found, strict=True):
        if not filled:
            mask = mask_below(vector, threshold, exclude_zero=exclude_zero)
        for index, part in zip(group, parts_of(mask, [parts[index] for index in group]), strict=True):
            masks[index] = part
    return masks, threshold


def mask_below(value: Tensor, threshold: Tensor, *, exclude_zero: bool = False) -> Tensor:
    r"""Boolean tensor: \|value\| <= threshold (and not exactly zero, with `exclude_zero`).

    Args:
        value: Curvature estimates, any shape; of a DTensor this rank's part is compared.
        threshold: Scalar tensor from :func:`flat_threshold`, on any device.
        exclude_zero: Whether zeros get mask 0.

    Returns:
        A boolean tensor of the shape and on the device of `value`.
    """
    value = local(value)
    # a scalar tensor would be rounded to the other's dtype
    size = value.detach().abs().to(torch.promote_types(value.dtype, threshold.dtype))
    mask = size <= threshold.to(size)
    return mask & (size > 0) if exclude_zero else mask


def count_true(*masks: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """At how many places one mask, or at least one of several, is true; no copy to the host.

    Args:
        masks: Lists of boolean tensors, the first tensors of all lists of one shape, and so on; at least one.
        like: The parameters that they belong to, if those may be sharded: the count is then that of the whole, and
            all ranks have to call.

    Returns:
        Scalar int64 tensor on the first tensor's device.

    Example:
        >>> count_true([torch.tensor([True, False, False])], [torch.tensor([True, True, False])])
        tensor(2)
    """
    shards = Shards(masks[0], like)
    counts = [torch.zeros((), dtype=torch.int64)] if shards.sharded else []
    for group in groups_of(masks[0], shards.owned):
        if not shards.owned[group[0]]:
            continue
        either = [joined([tensors[index] for index in group]) for tensors in masks]
        counts.append(functools.reduce(torch.logical_or, either).count_nonzero())
    return shards.sum(torch.stack([count.to(masks[0][0].device) for count in counts]).sum())


def pack_mask(mask: Tensor) -> Tensor:
    """Eight booleans to a byte (lowest bit first), for checkpoints.

    Args:
        mask: Boolean tensor, any shape. What is packed of a sharded parameter's mask is this rank's part.

    Returns:
        uint8 tensor of shape [ceil(n / 8)] on the CPU.
    """
    bits = mask.detach().reshape(-1).to("cpu", torch.uint8)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of `shape` that :func:`pack_mask` packed.

    Args:
        packed: uint8 tensor of shape [ceil(n / 8)].
        shape: Shape of the mask.

    Returns:
        Boolean tensor of that shape on the CPU.

    Raises:
        ValueError: If the number of bytes does not fit the shape.

    Example:
        >>> mask = torch.tensor([[True, False, True]])
        >>> unpack_mask(pack_mask(mask), mask.shape)
        tensor([[ True, False,  True]])
    """
    count = math.prod(shape)
    if packed.numel() != -(-count // 8):
        raise ValueError(f"Expected {-(-count // 8)} bytes for a mask of shape {tuple(shape)}, got {packed.numel()}.")
    bits = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:count].bool().reshape(tuple(shape))
