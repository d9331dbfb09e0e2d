"""From curvature estimates to the 0/1 projection on the flat coordinates (eq. 5), and its storage as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_ire.functional.threshold import flat_threshold

__all__ = ["flat_masks", "mask_below", "pack_mask", "unpack_mask"]


def flat_masks(
    values: Sequence[Tensor | None],
    gamma: float,
    *,
    scope: Literal["global", "tensor"] = "global",
    exclude_zero: bool = False,
) -> list[Tensor | None]:
    r"""The flat coordinates: 1 where \|h_i\| is at most the max(1, int(p * gamma))-th smallest of \|h\|.

    Eq. 5 of the IRE paper (arXiv 2405.20763). Ties at the threshold are flat, so a little more than the fraction
    `gamma` may be.

    Args:
        values: Diagonal curvature estimates h, one tensor per parameter; ``None`` where there is none.
        gamma: Fraction of coordinates called flat, in (0, 1].
        scope: Rank over all tensors at once ("global", the paper) or in each tensor by itself ("tensor").
        exclude_zero: Leave coordinates with h = 0 out of the ranking; their mask is 0.

    Returns:
        One boolean tensor per value, of its shape; ``None`` where the value was ``None``.

    Raises:
        ValueError: If `gamma` or `scope` is out of range, nothing is left to rank, or a value is NaN or infinite.

    Example:
        >>> flat_masks([torch.tensor([0.1, 5.0]), torch.tensor([0.2, 9.0])], gamma=0.5)
        [tensor([ True, False]), tensor([ True, False])]
    """
    if scope not in ("global", "tensor"):
        raise ValueError(f"Expected `scope` to be 'global' or 'tensor', got {scope!r}.")
    if scope == "global":
        threshold = flat_threshold(values, gamma, exclude_zero=exclude_zero)
        return [None if value is None else mask_below(value, threshold, exclude_zero=exclude_zero) for value in values]
    if not any(value is not None and value.numel() for value in values):
        flat_threshold(values, gamma)  # says what is missing
    masks: list[Tensor | None] = []
    for value in values:
        if value is None or not value.numel():
            masks.append(None if value is None else torch.zeros_like(value, dtype=torch.bool))
            continue
        masks.append(
            mask_below(value, flat_threshold([value], gamma, exclude_zero=exclude_zero), exclude_zero=exclude_zero)
        )
    return masks


def mask_below(value: Tensor, threshold: Tensor, *, exclude_zero: bool = False) -> Tensor:
    r"""Boolean tensor: \|value\| <= threshold (and not exactly zero, with `exclude_zero`).

    Args:
        value: Curvature estimates, any shape.
        threshold: Scalar tensor from :func:`flat_threshold`, on any device.
        exclude_zero: Whether zeros get mask 0.

    Returns:
        A boolean tensor of the shape and on the device of `value`.
    """
    # a scalar tensor would be rounded to the other's dtype
    size = value.detach().abs().to(torch.promote_types(value.dtype, threshold.dtype))
    mask = size <= threshold.to(size)
    return mask & (size > 0) if exclude_zero else mask


def pack_mask(mask: Tensor) -> Tensor:
    """Eight booleans to a byte (lowest bit first), for checkpoints.

    Args:
        mask: Boolean tensor, any shape.

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
