"""The threshold of eq. 5 against `torch.kthvalue` of the concatenated absolute values, to the bit."""

import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ire.functional import flat_threshold, masks_and_threshold, threshold

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = list(BITS)
LAYOUTS = ["plain", "flipped", "strided", "expanded", "channels_last"]


def bits(tensor):
    return tensor.view(BITS[tensor.dtype])


def reference(values, gamma, exclude_zero=False):
    """Eq. 5 written down: concatenate, sort, pick. float64 holds every value of the four dtypes exactly."""
    present = [value for value in values if value is not None and value.numel()]
    dtype = functools.reduce(torch.promote_types, [value.dtype for value in present])
    flat = torch.cat([value.double().abs().reshape(-1) for value in present])
    if exclude_zero:
        flat = flat[flat != 0]
    return torch.kthvalue(flat, max(1, int(len(flat) * gamma))).values.to(dtype)


def assert_same_bits(got, expected):
    assert got.shape == ()
    assert got.dtype == expected.dtype
    assert int(bits(got)) == int(bits(expected)), f"got {got.item()!r}, expected {expected.item()!r}"


def laid_out(tensor, layout):
    """A tensor with the elements of the given one (some repeated or left out), in another memory layout."""
    if layout == "flipped":
        return tensor.reshape(tensor.shape[0], -1).t() if tensor.dim() else tensor
    if layout == "strided":
        return tensor.reshape(-1)[::2]
    if layout == "expanded":
        return tensor.unsqueeze(-1).expand(*tensor.shape, 3)
    if layout == "channels_last":
        return tensor.reshape(1, 1, -1, 1).repeat(1, 2, 1, 2).to(memory_format=torch.channels_last)
    return tensor


def numbers(dtype):
    """Finite values of a dtype: any bit pattern (subnormals, both zeros, both signs) or one of a few (ties)."""
    info = torch.finfo(dtype)
    width = torch.finfo(dtype).bits
    pattern = st.integers(-(1 << (width - 1)), (1 << (width - 1)) - 1)
    anything = pattern.map(lambda n: torch.tensor(n, dtype=BITS[dtype]).view(dtype).item()).filter(math.isfinite)
    few = st.sampled_from([0.0, -0.0, 0.0, 1.0, -1.0, info.smallest_normal / 2, -info.tiny, info.max, info.min])
    return st.one_of(anything, few, st.just(0.0))


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (0, 4), (2, 1, 4), (1, 2, 3, 1)]))
    flat = draw(st.lists(numbers(dtype), min_size=math.prod(shape), max_size=math.prod(shape)))
    tensor = torch.tensor(flat, dtype=dtype).reshape(shape)
    return laid_out(tensor, draw(st.sampled_from(LAYOUTS)) if tensor.numel() else "plain")


lists_of_tensors = st.lists(st.one_of(st.none(), tensors()), min_size=1, max_size=4).filter(
    lambda values: any(value is not None and value.numel() for value in values)
)
# whole numbers of k / p are where p * gamma is a rounding error away from k, on either side
gammas = st.one_of(
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([1.0, 5e-324, 1e-9, 0.29, 0.57, 0.7, 1 - 2**-53]),
    st.builds(lambda k, p: min(1.0, k / p), st.integers(1, 40), st.integers(1, 40)),
)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(lists_of_tensors, gammas, st.sampled_from([1, 3, 1 << 20]))
@example([torch.tensor([-0.0, -0.0])], 1.0, 1 << 20)
@example([torch.tensor(float(n + 1)) for n in range(100)], 0.29, 1 << 20)  # 100 * 0.29 = 28.999999999999996
def test_is_the_kth_smallest_value_to_the_bit(values, gamma, chunk):
    with mock.patch.object(threshold, "_CHUNK", chunk):
        got = flat_threshold(values, gamma)
    assert_same_bits(got, reference(values, gamma))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(lists_of_tensors, gammas, st.sampled_from([2, 1 << 20]))
def test_exclude_zero_ranks_the_rest(values, gamma, chunk):
    with mock.patch.object(threshold, "_CHUNK", chunk):
        got = flat_threshold(values, gamma, exclude_zero=True)
    if all(value is None or not value.any() for value in values):
        assert got.item() == 0
    else:
        assert_same_bits(got, reference(values, gamma, exclude_zero=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_values_over_several_real_chunks(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(threshold._CHUNK + 7, generator=generator).to(dtype),
        torch.randn(300, 100, generator=generator).to(dtype).t(),
        torch.zeros(50_000, dtype=dtype),
    ]
    for gamma in (1e-7, 0.01, 0.9, 1.0):
        assert_same_bits(flat_threshold(values, gamma), reference(values, gamma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_bit_patterns_are_told_apart(dtype):
    """Consecutive representable numbers that differ in their lowest bit only."""
    start = int(bits(torch.tensor(1.5, dtype=dtype)))
    values = torch.arange(start, start + 9).to(BITS[dtype]).view(dtype)
    shuffled = values[torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])] * torch.tensor([1, -1] * 4 + [1]).to(dtype)
    for k in range(1, 10):
        assert_same_bits(flat_threshold([shuffled], k / 9 + 1e-9 if k < 9 else 1.0), values[k - 1])


def test_rank_rounds_down_but_not_below_one():
    values = [torch.arange(1.0, 11.0)]
    got = [flat_threshold(values, gamma).item() for gamma in (1e-300, 0.05, 0.19, 0.2, 0.999, 1.0)]
    assert got == [1.0, 1.0, 1.0, 2.0, 9.0, 10.0]


def test_mixed_dtypes_are_ranked_in_their_common_dtype():
    values = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.float16)]
    assert flat_threshold(values, 1.0).dtype == torch.float32
    between = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert_same_bits(flat_threshold([*values, between], 0.7), between[0])


def test_empty_tensors_and_none_do_not_count():
    values = [None, torch.empty(0, dtype=torch.float64), torch.tensor([4.0, -3.0]), torch.empty(2, 0), None]
    assert_same_bits(flat_threshold(values, 0.5), torch.tensor(3.0))


def test_values_stay_as_they_are_and_the_result_has_no_graph():
    value = torch.tensor([-2.0, 1.0], requires_grad=True)
    got = flat_threshold([value], 1.0)
    assert not got.requires_grad
    assert value.tolist() == [-2.0, 1.0]


def test_exclude_zero_of_nothing_but_zeros_is_zero():
    got = flat_threshold([torch.zeros(3, dtype=torch.bfloat16), torch.tensor(-0.0)], 0.5, exclude_zero=True)
    assert_same_bits(got, torch.tensor(0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_their_number(dtype, bad):
    values = [torch.ones(40, dtype=dtype), torch.full((33,), bad, dtype=dtype)]
    with pytest.raises(ValueError, match="Expected finite values to rank, got 33 that are NaN or infinite"):
        flat_threshold(values, 0.1)


def test_half_infinity_is_refused_among_wider_values():
    values = [torch.ones(2, dtype=torch.float64), torch.tensor([math.inf, 1.0], dtype=torch.float16)]
    with pytest.raises(ValueError, match="got 1 that are NaN or infinite"):
        flat_threshold(values, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_number_is_accepted(dtype):
    assert_same_bits(
        flat_threshold([torch.tensor(torch.finfo(dtype).min, dtype=dtype)], 1.0),
        torch.tensor(torch.finfo(dtype).max, dtype=dtype),
    )


@pytest.mark.parametrize("values", [[], [None], [torch.empty(0)], [None, torch.empty(3, 0)]])
def test_nothing_to_rank_is_refused(values):
    with pytest.raises(ValueError, match="Expected at least one value to rank, got none"):
        flat_threshold(values, 0.5)


@pytest.mark.parametrize("gamma", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"Expected `gamma` to be a number in \(0, 1\], got {gamma}"):
        flat_threshold([torch.ones(3)], gamma)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("exclude_zero", [False, True])
def test_other_dtypes_are_refused(dtype, exclude_zero):
    with pytest.raises(TypeError, match=f"Expected values of dtype torch.float16.*, got {dtype}"):
        flat_threshold([torch.ones(3), torch.ones(3).to(dtype)], 0.5, exclude_zero=exclude_zero)


@pytest.mark.parametrize("gamma", [1e-6, 0.3, 0.8, 0.9999, 1.0])
@pytest.mark.parametrize("kind", ["random", "sorted", "tied", "misleading"])
def test_much_data_is_ranked_by_a_sample_to_the_bit(kind: str, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sample misleads, and only there, the bit patterns are counted."""
    torch.manual_seed(0)
    values = torch.randn(400_000)
    if kind == "sorted":
        values = values.sort().values
    elif kind == "tied":
        values = values.masked_fill(values < 1, 0.0)
    elif kind == "misleading":
        monkeypatch.setattr(threshold, "_every", lambda stride, chunk: chunk[chunk > 1])
    counted = []
    count = threshold._kth_pattern
    monkeypatch.setattr(threshold, "_kth_pattern", lambda *args: counted.append(1) or count(*args))
    parts = [values[:150_000].view(3, 50_000).t(), values[150_000:150_003], values[150_003:]]
    expected = values.abs().sort().values[max(1, int(400_000 * gamma)) - 1]
    assert flat_threshold(parts, gamma) == expected
    if kind in ("random", "sorted"):
        assert not counted
    if kind == "misleading" and gamma in (0.3, 0.8):
        assert counted


class Waits(TorchDispatchMode):
    """Notes the operations for which the host of a GPU would wait: numbers and shapes that depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        copies = "_to_copy" in name and (kwargs or {}).get("device") is not None
        if copies or any(part in name for part in ("scalar_dense", "nonzero", "bincount", "masked_select", "unique")):
            self.seen.append(name)
        if name == "aten.index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("exclude_zero", [False, True])
def test_of_finite_values_the_host_wants_to_know_nothing(exclude_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on much data too; that values are finite is the only question otherwise."""
    monkeypatch.setattr(threshold, "_LITTLE", 1 << 40)
    values = [torch.randn(100, 3), torch.randn(300_000), torch.zeros(())]
    options = {"exclude_zero": exclude_zero}
    with Waits() as waits:
        masks, found = masks_and_threshold(values, 0.8, finite=True, **options)
    assert waits.seen == []
    with Waits() as waits:
        again = flat_threshold(values, 0.8, **options)
    assert waits.seen == ["aten._local_scalar_dense.default"]
    assert_same_bits(again, found)
    assert_same_bits(found, reference(values, 0.8, exclude_zero))
    assert masks[1].equal(values[1].abs() <= found)
