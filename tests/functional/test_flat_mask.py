"""From curvature to masks, and masks to bits and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ire.functional import (
    flat_masks,
    flat_threshold,
    mask_below,
    masks_and_threshold,
    pack_mask,
    unpack_mask,
)
from lightning_ire.functional._shards import Shards
from lightning_ire.functional.threshold import threshold_of_vectors

VALUES = [torch.tensor([[1.0, -8.0], [3.0, 2.0]]), None, torch.tensor([-50.0, 40.0]), torch.tensor(7.0)]


def as_lists(masks):
    return [None if mask is None else mask.tolist() for mask in masks]


def test_global_scope_ranks_all_tensors_together():
    # sorted sizes: 1 2 3 7 8 40 50; int(7 * 0.6) = 4, so 7 is the threshold
    assert as_lists(flat_masks(VALUES, 0.6)) == [[[True, False], [True, True]], None, [False, False], True]


def test_tensor_scope_ranks_each_tensor_by_itself():
    # ranks 2 of 4, 1 of 2 and 1 of 1
    got = flat_masks(VALUES, 0.6, scope="tensor")
    assert as_lists(got) == [[[True, False], [False, True]], None, [False, True], True]


def test_masks_are_boolean_and_of_the_values_shapes():
    masks = flat_masks(VALUES, 0.5)
    assert all(
        mask.dtype == torch.bool and mask.shape == value.shape
        for mask, value in zip(masks, VALUES, strict=True)
        if value is not None
    )


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gamma_one_calls_everything_flat(scope):
    masks = flat_masks(VALUES, 1.0, scope=scope)
    assert all(mask.all() for mask in masks if mask is not None)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_at_the_threshold_are_flat(scope):
    masks = flat_masks([torch.tensor([2.0, -2.0, 2.0, 5.0])], 0.25, scope=scope)
    assert as_lists(masks) == [[True, True, True, False]]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_exclude_zero_leaves_zeros_out_of_the_quota_and_the_mask(scope):
    value = torch.tensor([0.0, -0.0, 0.0, 4.0, -3.0, 2.0, 1.0])
    assert as_lists(flat_masks([value], 0.5, scope=scope)) == [[True, True, True, False, False, False, False]]
    assert as_lists(flat_masks([value], 0.5, scope=scope, exclude_zero=True)) == [
        [False, False, False, False, False, True, True]
    ]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_exclude_zero_of_nothing_but_zeros_calls_nothing_flat(scope):
    assert as_lists(flat_masks([torch.zeros(2)], 1.0, scope=scope, exclude_zero=True)) == [[False, False]]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_empty_tensors_get_empty_masks(scope):
    masks = flat_masks([torch.empty(0, 3), torch.ones(2)], 0.5, scope=scope)
    assert masks[0].shape == (0, 3)
    assert masks[0].dtype == torch.bool
    assert masks[1].tolist() == [True, True]


def test_half_values_meet_the_threshold_in_its_own_dtype():
    """1.005 rounded to bfloat16 is 1.0078125: comparing there would call that value flat."""
    values = [torch.tensor([1.0078125, 1.0], dtype=torch.bfloat16), torch.tensor([1.005, 9.0])]
    assert as_lists(flat_masks(values, 0.5)) == [[False, True], [True, False]]
    assert mask_below(values[0], torch.tensor(1.005)).tolist() == [False, True]
    assert mask_below(values[0][0], torch.tensor(1.005)).item() is False


def test_double_values_meet_a_float32_threshold_unrounded():
    value = torch.tensor([1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert mask_below(value, torch.tensor(1.0)).tolist() == [False, True]


def test_mask_below_compares_sizes_and_has_no_graph():
    value = torch.tensor([-3.0, -1.0, 0.0, 2.0], requires_grad=True)
    assert mask_below(value, torch.tensor(2.0)).tolist() == [False, True, True, True]
    assert mask_below(value, torch.tensor(2.0), exclude_zero=True).tolist() == [False, True, False, True]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.lists(st.floats(-5, 5, width=16), max_size=8), min_size=1, max_size=4), st.floats(0.01, 1))
def test_masks_hold_exactly_the_values_up_to_the_kth(rows, gamma):
    values = [torch.tensor(row, dtype=torch.float64) for row in rows]
    everything = sorted(abs(number) for row in rows for number in row)
    if not everything:
        return
    kth = everything[max(1, int(len(everything) * gamma)) - 1]
    assert flat_threshold(values, gamma).item() == kth
    assert as_lists(flat_masks(values, gamma)) == [[abs(number) <= kth for number in row] for row in rows]


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="Expected `scope` to be 'global' or 'tensor', got 'layer'"):
        flat_masks([torch.ones(2)], 0.5, scope="layer")


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gamma_and_values_are_checked_in_both_scopes(scope):
    with pytest.raises(ValueError, match=r"Expected `gamma` to be a number in \(0, 1\], got 1.5"):
        flat_masks([torch.ones(2)], 1.5, scope=scope)
    with pytest.raises(ValueError, match="Expected finite values to rank, got 1 that"):
        flat_masks([torch.ones(2), torch.tensor([float("nan"), 1.0])], 0.5, scope=scope)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_nothing_to_rank_is_refused_in_both_scopes(scope):
    with pytest.raises(ValueError, match="Expected at least one value to rank, got none"):
        flat_masks([None, torch.empty(0)], 0.5, scope=scope)


@pytest.mark.parametrize("count", range(18))
def test_packed_masks_come_back(count):
    generator = torch.Generator().manual_seed(count)
    for mask in (torch.rand(count, generator=generator) < 0.5, torch.ones(count).bool(), torch.zeros(count).bool()):
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == ((count + 7) // 8,)
        assert torch.equal(unpack_mask(packed, mask.shape), mask)


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0), (2, 1, 3, 2)])
def test_packed_masks_keep_any_shape(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    got = unpack_mask(pack_mask(mask), mask.shape)
    assert got.dtype == torch.bool
    assert got.shape == mask.shape
    assert torch.equal(got, mask)


def test_non_contiguous_masks_are_packed_in_their_logical_order():
    mask = (torch.arange(15).reshape(3, 5) % 4 == 0).t()
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)


def test_lowest_bit_comes_first():
    """The layout in checkpoints: it may not change between releases."""
    assert pack_mask(torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)).tolist() == [0b01000001, 1]


@pytest.mark.parametrize(("size", "shape", "needed"), [(1, (9,), 2), (2, (8,), 1), (0, (1,), 1), (1, (0, 4), 0)])
def test_wrong_number_of_bytes_is_refused(size, shape, needed):
    with pytest.raises(ValueError, match=f"Expected {needed} bytes for a mask of shape .*, got {size}"):
        unpack_mask(torch.zeros(size, dtype=torch.uint8), shape)


@pytest.mark.parametrize("exclude_zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_much_data_gets_its_masks_on_the_way_to_the_threshold(dtype: torch.dtype, exclude_zero: bool) -> None:
    """Several chunks, lengths that are no multiple of 8, both signs, a matrix without gaps and one with."""
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in [(600, 1001), (7,), (250_003,), (64, 64)]]
    values[0][:100] = 0
    values[2] = values[2][1:]
    values[3] = values[3].T
    for gamma in (0.5, 0.9):
        masks, threshold = masks_and_threshold(values, gamma, exclude_zero=exclude_zero)
        assert threshold.equal(flat_threshold(values, gamma, exclude_zero=exclude_zero))
        for value, mask in zip(values, masks, strict=True):
            size = value.double().abs()
            assert mask.equal((size <= threshold.double()) & ((size > 0) | (not exclude_zero)))


@pytest.mark.parametrize(("kind", "filled"), [("spread", True), ("tied", False), ("little", False)])
def test_masks_are_filled_where_the_sample_leads_to_the_threshold(kind: str, filled: bool) -> None:
    value = torch.randn(100 if kind == "little" else 300_000, generator=torch.Generator().manual_seed(0))
    value = value.sign() if kind == "tied" else value
    mask = torch.empty_like(value, dtype=torch.bool)
    threshold, found = threshold_of_vectors([value], 0.8, Shards([value]), [True], masks=[mask])
    assert found is filled
    if filled:
        assert mask.equal(value.abs() <= threshold)


def test_an_empty_tensor_of_another_dtype_takes_no_part_among_much_data() -> None:
    values = [torch.zeros(0, dtype=torch.float64), torch.randn(300_000, generator=torch.Generator().manual_seed(0))]
    masks, threshold = masks_and_threshold(values, 0.8)
    assert threshold.dtype == torch.float32
    assert masks[0].numel() == 0
    assert masks[1].equal(values[1].abs() <= threshold)
