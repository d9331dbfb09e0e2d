"""The exact k-th smallest value over many tensors, by counting bit patterns.

The bits of a non-negative IEEE float order like integers. So a histogram of the upper 16 bits finds the bucket that
holds the k-th value, and a histogram of the next 16 bits inside that bucket finds it exactly: one pass over the data
for 16-bit types, two for float32, four for float64. Nothing is sorted, no copy of the whole is made, and the counts of
several tensors (or devices) simply add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["flat_threshold"]

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DIGIT = 16
_CHUNK = 1 << 20  # elements looked at together: bounds the temporary memory and stays in cache


def flat_threshold(values: Sequence[Tensor | None], gamma: float, *, exclude_zero: bool = False) -> Tensor:
    r"""Largest curvature still called flat: the max(1, int(p * gamma))-th smallest of \|values\| over all tensors.

    This is the threshold of eq. 5 of Wang et al., "Improving Generalization and Convergence by Enhancing Implicit
    Regularization" (NeurIPS 2024, arXiv 2405.20763), exact to the last bit. p is the total number of values.

    Args:
        values: Curvature estimates, any shapes (scalar and empty ones too), float16, bfloat16, float32 or float64,
            on any devices. ``None`` entries (parameters without a gradient) take no part.
        gamma: Fraction of coordinates called flat, in (0, 1].
        exclude_zero: Leave values that are exactly zero out of p and of the ranking.

    Returns:
        A scalar tensor on the first tensor's device, in the common floating dtype of the values. With `exclude_zero`
        and nothing but zeros: 0.

    Raises:
        ValueError: If `gamma` is out of range, there is no value at all, or one of them is NaN or infinite.
        TypeError: If a tensor is not of one of the four floating dtypes.

    Cost: one read of the data per 16 bits of the dtype, temporary memory of about a million elements.

    Example:
        >>> values = [torch.tensor([3.0, -1.0]), torch.tensor(2.0), None, torch.tensor([0.5])]
        >>> flat_threshold(values, gamma=0.75)
        tensor(2.)
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"Expected `gamma` to be a number in (0, 1], got {gamma!r}.")
    tensors = [value.detach() for value in values if value is not None and value.numel()]
    if not tensors:
        raise ValueError("Expected at least one value to rank, got none (no tensors, or only empty ones).")
    dtype = _common_dtype(tensors)
    total = sum(tensor.numel() for tensor in tensors)
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors) if exclude_zero else 0
    device = tensors[0].device
    if total == zeros:
        return torch.zeros((), dtype=dtype, device=device)
    rank = zeros + max(1, int((total - zeros) * gamma))
    pattern = _kth_pattern(tensors, rank, dtype)
    return torch.tensor(pattern, dtype=_BITS[dtype]).view(dtype).to(device)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype not in _BITS:
            raise TypeError(f"Expected values of dtype {', '.join(map(str, _BITS))}, got {tensor.dtype}.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _kth_pattern(tensors: Sequence[Tensor], rank: int, dtype: torch.dtype) -> int:
    """Bit pattern of the `rank`-th smallest (from 1) absolute value: most significant digit first."""
    width = torch.finfo(dtype).bits
    prefix = 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        first = shift == width - _DIGIT
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for bits in _patterns(tensors, dtype):
            if not first:  # only values whose higher digits are those found so far
                bits = bits[(bits >> (shift + _DIGIT)) == prefix] & ((1 << (shift + _DIGIT)) - 1)
            counts += torch.bincount(bits >> shift, minlength=1 << _DIGIT).cpu()
        if first:
            _check_finite(counts, dtype)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT) | digit
    return prefix


def _patterns(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Bit patterns of the absolute values: large tensors in chunks, small ones of a device together."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        for chunk in tensor.reshape(-1).split(_CHUNK):
            if waiting and (size + chunk.numel() > _CHUNK or waiting[0].device != chunk.device):
                yield _bits(waiting, dtype)
                waiting, size = [], 0
            waiting.append(chunk)
            size += chunk.numel()
    yield _bits(waiting, dtype)


def _bits(chunks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    joined = chunks[0] if len(chunks) == 1 else torch.cat([chunk.to(dtype) for chunk in chunks])
    return joined.to(dtype).abs().view(_BITS[dtype])


def _check_finite(counts: Tensor, dtype: torch.dtype) -> None:
    """The patterns of infinity and NaN are the largest: look at the buckets from infinity's upwards."""
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(_BITS[dtype])) >> (torch.finfo(dtype).bits - _DIGIT)
    bad = int(counts[infinity:].sum())
    if bad:
        raise ValueError(f"Expected finite values to rank, got {bad} that are NaN or infinite.")
