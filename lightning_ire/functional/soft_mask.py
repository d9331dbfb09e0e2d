"""Soft masks: how flat a coordinate is as a value n in [0, 1], one byte each (LITE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_ire.functional._foreach import groups_of, joined, parts_of
from lightning_ire.functional._shards import Shards
from lightning_ire.functional.flat_mask import masks_of_present
from lightning_ire.functional.vectors import in_double

__all__ = ["as_shares", "soft_masks", "soft_masks_and_threshold"]

_LEVELS = 255
_RATIO = 2.0  # LITE starts with the factors 1/2 and 1
_HALVINGS, _OCTAVES = 17, 100
_CHUNK = 1 << 18
_CHUNK_ON_DEVICE = 1 << 24


def as_shares(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The values n of a mask: 0 or 1 of a boolean one; of a soft one (uint8) its numbers divided by 255.

    Args:
        mask: Boolean or uint8 tensor.
        dtype: A floating dtype.

    Example:
        >>> as_shares(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.float32)
        tensor([0.0000, 0.2000, 1.0000])
    """
    return mask.to(dtype).div_(_LEVELS) if mask.dtype == torch.uint8 else mask.to(dtype)


def soft_masks(
    values: Sequence[Tensor | None],
    gamma: float,
    *,
    scope: Literal["global", "tensor"] = "global",
    exclude_zero: bool = False,
    like: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    r"""How flat each coordinate is: n = 1 - s, with the sharp share s of LITE (arXiv 2602.22681).

    s is 0 where \|h\| <= lower * m, 1 where \|h\| >= upper * m, and linear between; m is the mean of \|h\|. The two
    factors have the fixed ratio upper / lower = 2, and their common scale is found by bisection so that the mean of n
    is `gamma` (within 2e-3: 17 halvings of the 100 octaves below the largest value; n is rounded to steps of 1/255).
    LITE steers both factors by 5 % per step towards shares of their own instead. As the scale is free, m cancels: the
    edges are a and 2 a for one number a.

    Args:
        values: Diagonal curvature estimates h, one tensor per parameter; ``None`` where there is none.
        gamma: The mean of n, in (0, 1]; 1: n is 1 everywhere. It cannot be met where the values that are not zero are
            fewer than 1 - gamma: zeros have n = 1, all others 0 then.
        scope: One scale for all tensors ("global"), or one for each ("tensor", as in LITE).
        exclude_zero: Coordinates with h = 0 have n = 0 and do not count for the mean.
        like: The parameters that the values belong to, as for :func:`flat_masks`.

    Returns:
        One uint8 tensor per value, of its shape (of a DTensor: of this rank's part), with 255 n; ``None`` where the
        value was ``None``. :func:`as_shares` makes n of it.

    Raises:
        ValueError: If `gamma` or `scope` is out of range, there is no value, or one is NaN or infinite.

    Cost: 19 reads of the values, in pieces that stay in the cache; one byte per value. Sharded: 17 sums over all ranks,
    of one number per scale.

    Example:
        >>> (mask,) = soft_masks([torch.tensor([0.0, 1.0, 1.5, 9.0])], gamma=0.625)
        >>> as_shares(mask, torch.float32).mean().round(decimals=3)
        tensor(0.6250)
    """
    return masks_of_present(soft_masks_and_threshold, values, like, gamma=gamma, scope=scope, exclude_zero=exclude_zero)


@torch.no_grad()
def soft_masks_and_threshold(
    values: Sequence[Tensor],
    gamma: float,
    *,
    scope: Literal["global", "tensor"] = "global",
    exclude_zero: bool = False,
    finite: bool = False,
    like: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The masks of :func:`soft_masks`, and the curvature at which n is 1/2.

    Args:
        values: Curvature estimates, one tensor per parameter.
        gamma: As there.
        scope: As there.
        exclude_zero: As there.
        finite: The values are known to be finite: then the host does not wait for a GPU to look.
        like: As there.

    Returns:
        One uint8 tensor per value, and a scalar tensor; with scope "tensor" the largest of those of the tensors.

    Raises:
        ValueError: As there.
    """
    if scope not in ("global", "tensor"):
        raise ValueError(f"Expected `scope` to be 'global' or 'tensor', got {scope!r}.")
    if not 0 < gamma <= 1:
        raise ValueError(f"Expected `gamma` to be a number in (0, 1], got {gamma!r}.")
    wholes = values if like is None else like
    if not any(whole.numel() for whole in wholes):
        raise ValueError("Expected at least one value to rank, got none (no tensors, or only empty ones).")
    filled = [index for index, whole in enumerate(wholes) if whole.numel()]
    scales = [[index] for index in filled] if scope == "tensor" else [[*range(len(values))]]
    shards = Shards(values, like)
    scale_of = {index: place for place, members in enumerate(scales) for index in members}
    groups = groups_of(shards.parts, [(owned, scale_of.get(index, 0)) for index, owned in enumerate(shards.owned)])
    vectors = [joined([shards.parts[index] for index in group]) for group in groups]
    places = [scale_of.get(group[0], 0) for group in groups]
    counted = [(v, place) for v, group, place in zip(vectors, groups, places, strict=True) if shards.owned[group[0]]]
    device = in_double(vectors[0].new_zeros(())).device
    largest = torch.zeros(len(scales), dtype=torch.float64, device=device)
    for vector, place in counted:
        if vector.numel():
            largest[place] = torch.maximum(largest[place], in_double(vector.abs().amax()).to(device))
    if not finite and not bool(shards.every(torch.isfinite(largest).all())):
        raise ValueError("Expected finite values to rank, got some that are NaN or infinite.")
    # at the largest value as the lower edge none is sharp, and far below it all are
    high = shards.largest(largest).clamp(min=2.0**-900)
    low = high * 2.0**-_OCTAVES
    wanted = torch.zeros_like(high)
    for index, size in enumerate(shards.sizes):
        wanted[scale_of.get(index, 0)] += size
    if exclude_zero:
        wanted -= shards.sum(_sums(counted, high, lambda chunk, _: chunk == 0))
    wanted = (1 - gamma) * wanted
    for _ in range(_HALVINGS):
        middle = (low * high).sqrt()
        enough = shards.sum(_sums(counted, middle, _sharp)) <= wanted
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    masks: list[Tensor] = [vectors[0]] * len(values)
    for group, vector, place in zip(groups, vectors, places, strict=True):
        levels = []
        for chunk in _chunks(vector):
            flat = 1 - _sharp(chunk, high[place])
            levels.append((flat * (chunk != 0) if exclude_zero else flat).mul_(_LEVELS).round_().to(torch.uint8))
        mask = torch.cat(levels)
        for index, part in zip(group, parts_of(mask, [shards.parts[index] for index in group]), strict=True):
            masks[index] = part
    return masks, (high.max() * (1 + _RATIO) / 2).to(
        vectors[0].device, torch.promote_types(vectors[0].dtype, torch.float32)
    )


def _sharp(chunk: Tensor, edge: Tensor) -> Tensor:
    r"""The sharp share of each value: 0 up to the edge, 1 from `_RATIO` times that on."""
    size = chunk.abs().to(torch.promote_types(chunk.dtype, torch.float32))
    return size.div_(edge.to(size).clamp(min=torch.finfo(size.dtype).tiny)).sub_(1).div_(_RATIO - 1).clamp_(0, 1)


def _sums(vectors: Sequence[tuple[Tensor, int]], edges: Tensor, function: object) -> Tensor:
    """For each scale the sum of a function of its values and its edge, in float64."""
    totals = torch.zeros_like(edges)
    for vector, place in vectors:
        for chunk in _chunks(vector):
            totals[place] += in_double(function(chunk, edges[place]).sum()).to(totals)  # type: ignore[operator]
    return totals


def _chunks(vector: Tensor) -> Iterator[Tensor]:
    yield from vector.split(_CHUNK if vector.is_cpu else _CHUNK_ON_DEVICE)
