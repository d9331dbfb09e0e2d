"""The exact k-th smallest value over many tensors, by counting.

The bits of a non-negative IEEE float order like integers. So a histogram of the upper 16 bits finds the bucket that
holds the k-th value, and a histogram of the next 16 bits inside that bucket finds it exactly: one pass over the data
for 16-bit types, two for float32, four for float64. Nothing is sorted, no copy of the whole is made, the counts of
several tensors (devices, ranks) simply add up, and no shape depends on the data, so that nobody waits for a GPU.

Much data on a CPU is ranked faster: a sorted sample says between which two values the k-th lies, nearly for certain.
One pass counts what is not above the lower one and collects the few between the two, among which the k-th is found
(Floyd & Rivest 1975, "Expected time bounds for selection"). Where the sample was misleading (ties, an order that it
followed), the bits are counted after all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_ire.functional._foreach import groups_of, joined
from lightning_ire.functional._shards import Shards
from lightning_ire.functional.vectors import in_double

__all__ = ["flat_threshold"]

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_INFINITY = {dtype: int(torch.tensor(float("inf"), dtype=dtype).view(bits)) for dtype, bits in _BITS.items()}
_DIGIT = 16
_CHUNK = 1 << 18  # elements looked at together: bounds the temporary memory and stays in cache
_CHUNK_ON_DEVICE = 1 << 22  # some 30 bytes each while digits are counted
_LITTLE = 1 << 17  # elements that are counted by their bits straight away


def flat_threshold(
    values: Sequence[Tensor | None],
    gamma: float,
    *,
    exclude_zero: bool = False,
    like: Sequence[Tensor | None] | None = None,
) -> Tensor:
    r"""Largest curvature still called flat: the max(1, int(p * gamma))-th smallest of \|values\| over all tensors.

    This is the threshold of eq. 5 of Wang et al., "Improving Generalization and Convergence by Enhancing Implicit
    Regularization" (NeurIPS 2024, arXiv 2405.20763), exact to the last bit. p is the total number of values.

    Args:
        values: Curvature estimates, any shapes (scalar and empty ones too), float16, bfloat16, float32 or float64,
            on any devices. ``None`` entries (parameters without a gradient) take no part.
        gamma: Fraction of coordinates called flat, in (0, 1].
        exclude_zero: Leave values that are exactly zero out of p and of the ranking.
        like: The parameters that the values belong to, if they may be parts of sharded ones (as an estimate of the
            curvature is). The threshold is then that of the whole, the same on all ranks, which all have to call.

    Returns:
        A scalar tensor on the first tensor's device, in the common floating dtype of the values. With `exclude_zero`
        and nothing but zeros: 0.

    Raises:
        ValueError: If `gamma` is out of range, there is no value at all, or one of them is NaN or infinite.
        TypeError: If a tensor is not of one of the four floating dtypes.

    Cost: one read of the data; one per 16 bits of the dtype on a GPU and where the sample misleads, and there the host
    waits once, to look for values that are not finite. Temporary memory of about a twentieth of the values (a quarter
    at most) and 2^18 elements (2^22 of some 30 bytes on a GPU), and a copy of the small tensors. Sharded: 512 KB are
    summed over all ranks per 16 bits of the dtype.

    Example:
        >>> values = [torch.tensor([3.0, -1.0]), torch.tensor(2.0), None, torch.tensor([0.5])]
        >>> flat_threshold(values, gamma=0.75)
        tensor(2.)
    """
    present = [index for index, value in enumerate(values) if value is not None]
    shards = Shards([values[index] for index in present], None if like is None else [like[index] for index in present])
    tensors = [part.detach() for part in shards.parts]
    groups = groups_of(tensors, shards.owned)
    vectors = [joined([tensors[index] for index in group]) for group in groups]
    owned = [shards.owned[group[0]] for group in groups]
    return threshold_of_vectors(vectors, gamma, shards, owned, exclude_zero=exclude_zero)[0]


def threshold_of_vectors(
    values: Sequence[Tensor],
    gamma: float,
    shards: Shards,
    owned: Sequence[bool],
    *,
    exclude_zero: bool = False,
    masks: Sequence[Tensor] = (),
    finite: bool = False,
) -> tuple[Tensor, bool]:
    r"""The threshold, and on the way what is at most that.

    Args:
        values: Vectors, as those of :func:`flat_threshold`.
        gamma: As there.
        shards: What the vectors were joined from. If it is sharded, nothing that differs between ranks decides what
            is summed over them next.
        owned: Whether this rank counts the vector, for each.
        exclude_zero: As there.
        masks: Boolean vectors of the same lengths, for \|values\| <= threshold (and not 0, with `exclude_zero`).
        finite: The values are known to be finite: then nobody waits for a GPU to look.

    Returns:
        The threshold, and whether the masks hold the result: only a sample that did not mislead leads to it.

    Raises:
        ValueError: As there.
        TypeError: As there.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"Expected `gamma` to be a number in (0, 1], got {gamma!r}.")
    present = [part for part, size in zip(shards.parts, shards.sizes, strict=True) if size]  # the same on all ranks
    if not present:
        raise ValueError("Expected at least one value to rank, got none (no tensors, or only empty ones).")
    total = sum(shards.sizes)
    dtype = _common_dtype(present)
    device = present[0].device
    values = [value for value, own in zip(values, owned, strict=True) if own and value.numel()]
    zeros = torch.zeros((), dtype=torch.int64, device=device)
    if exclude_zero:
        zeros = shards.sum(torch.stack([zeros, *[(value == 0).sum().to(device) for value in values]]).sum())
    rank = zeros + (in_double(total - zeros) * gamma).long().clamp(min=1).to(device)
    rank = rank.clamp(max=total)  # nothing but zeros: the largest is one
    if not shards.sharded and total >= _LITTLE and all(value.is_cpu for value in values):
        found = _by_sample(values, int(rank), total, dtype, exclude_zero, [mask for mask in masks if mask.numel()])
        if found is not None:
            return found, True
    pattern, bad = _kth_pattern(values, rank, dtype, shards.sum)
    if not finite and (count := int(bad)):
        raise ValueError(f"Expected finite values to rank, got {count} that are NaN or infinite.")
    return pattern.to(_BITS[dtype]).view(dtype), False


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype not in _BITS:
            raise TypeError(f"Expected values of dtype {', '.join(map(str, _BITS))}, got {tensor.dtype}.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _by_sample(
    values: Sequence[Tensor], rank: int, total: int, dtype: torch.dtype, exclude_zero: bool, masks: Sequence[Tensor]
) -> Tensor | None:
    """The `rank`-th smallest (from 1) absolute value; ``None`` if no sample leads to it, or one is not finite.

    For a CPU: how much is collected depends on the data.
    """
    wide = torch.promote_types(dtype, torch.float32)
    stride = round(total ** (1 / 3))  # a sample of p^(2/3): as much work to sort it as to look through what it leaves
    sample = torch.cat([_every(stride, value).to(wide) for value in values]).abs().sort().values
    share = rank / total
    spread = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2  # four standard deviations
    middle = share * len(sample)
    ends = sample.new_tensor([-1.0, float("inf")])
    low = sample[int(middle - spread)] if middle >= spread else ends[0]
    high = sample[int(middle + spread)] if middle + spread < len(sample) else ends[1]
    below, largest = [], []
    between: list[Tensor] = []
    doubtful: list[tuple[Tensor, Tensor, Tensor]] = []
    parts = list(_chunks(masks))
    for place, source in enumerate(_chunks(values)):
        chunk = source.to(wide).abs()
        under = torch.le(chunk, low, out=parts[place]) if parts else chunk <= low
        below.append(_count(under))
        rows, chosen = _few(torch.lt(chunk, high).bitwise_xor_(under))
        between.append(_rows(chunk, rows, chosen)[chosen.index_select(0, rows)])
        largest.append(chunk.amax())  # NaN, if there is one
        if sum(map(len, between)) > total // 8:
            return None
        if parts:
            doubtful.append((under.view(chosen.shape), rows, source))
            if exclude_zero:
                under &= chunk > 0
    inside = torch.cat(between)
    under_all, finite = torch.stack([torch.stack(below).sum(), torch.isfinite(torch.stack(largest)).all()]).tolist()
    position = rank - under_all
    if not finite or not 1 <= position <= len(inside):
        return None
    found = inside.kthvalue(position).values
    for under, rows, source in doubtful:
        near = _rows(source, rows, under).to(wide).abs()
        flat = near <= found
        under.index_copy_(0, rows, flat.logical_and_(near > 0) if exclude_zero else flat)
    return found.to(dtype)


def _every(stride: int, values: Tensor) -> Tensor:
    """One of every `stride` values, not always in the same place: layouts have periods (channels, heads)."""
    count = torch.arange(-(-values.numel() // stride), device=values.device)
    places = count * stride + (count * 40503 % 65536 * stride >> 16)
    return values[places.clamp_(max=values.numel() - 1)]


def _few(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows in which something is chosen, and `chosen` in rows: eight booleans are one number."""
    if chosen.numel() % 8:
        rows = chosen.unsqueeze(1)
        return chosen.nonzero().squeeze(1), rows
    return chosen.view(torch.int64).nonzero().squeeze(1), chosen.view(-1, 8)


def _rows(vector: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return vector.view(like.shape).index_select(0, rows)


def _count(chosen: Tensor) -> Tensor:
    """How many of the booleans are true: bytes of 64-bit words are added up, 32 words at a time (fewer than 256)."""
    if chosen.numel() % (8 * 32 * 32):
        return chosen.count_nonzero()
    return chosen.view(torch.int64).view(-1, 32, 32).sum(1).view(torch.uint8).sum()


def _kth_pattern(
    values: Sequence[Tensor], rank: Tensor, dtype: torch.dtype, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Bit pattern of the `rank`-th smallest (from 1) absolute value, and how many are NaN or infinite.

    The most significant digit first. Shapes do not depend on the data: the host never waits for a GPU. `add` sums
    counts over ranks.
    """
    device = rank.device
    first_shift = torch.finfo(dtype).bits - _DIGIT
    prefix = bad = torch.zeros_like(rank)
    rank = rank.view(1)
    for shift in range(first_shift, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=device)
        for bits in _patterns(values, dtype):
            digits = (bits >> shift).long()
            # those whose higher digits are the ones found so far
            fits = (
                torch.ones_like(digits) if shift == first_shift else (digits >> _DIGIT == prefix.to(bits.device)).long()
            )
            here = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=bits.device)
            counts += here.index_add_(0, digits & ((1 << _DIGIT) - 1), fits).to(device)
        counts = add(counts)
        up_to = counts.cumsum(0)  # [i]: digits of at most i
        if shift == first_shift:
            infinity = _INFINITY[dtype] >> shift  # and what is larger is NaN
            bad = counts.narrow(0, infinity, len(counts) - infinity).sum()
        digit = torch.searchsorted(up_to, rank).clamp_(max=(1 << _DIGIT) - 1)
        rank = rank - (up_to - counts).index_select(0, digit)
        prefix = (prefix << _DIGIT) | digit.squeeze(0)
    return prefix, bad


def _patterns(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Bit patterns of the absolute values."""
    for chunk in _chunks(tensors):
        yield chunk.to(dtype).abs().view(_BITS[dtype])


def _chunks(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
    for vector in vectors:
        yield from vector.split(_CHUNK if vector.device.type == "cpu" else _CHUNK_ON_DEVICE)
