"""Many tensors in few operations: the results are those of one tensor after the other, to the bit."""

import pytest
import torch
from torch import nn

from lightning_ire.functional import _foreach, boost_, count_true, global_norm, perturbed, sam_displacement
from lightning_ire.functional._foreach import groups_of, joined, masked_, norms, parts_of

SHAPES = [(3,), (), (2, 0), (91, 91), (4, 5), (95, 100), (2, 3, 2)]  # two are large: more than 2^13 numbers


def drawn(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def test_small_ones_are_joined_by_dtype_and_key_and_large_ones_are_alone():
    tensors = [*drawn(0), torch.ones(3, dtype=torch.float64), torch.ones(3)]
    keys = ["a"] * 8 + ["b"]
    assert groups_of(tensors, keys) == [[0, 1, 2, 4, 6], [3], [5], [7], [8]]


def test_what_is_joined_stays_small(monkeypatch):
    monkeypatch.setattr(_foreach, "_TOGETHER", 10)
    assert groups_of([torch.ones(4)] * 6) == [[0, 1], [2, 3], [4, 5]]


def test_parts_are_those_that_were_joined():
    tensors = [tensor.t() if tensor.dim() == 2 else tensor for tensor in drawn(0)]
    parts = parts_of(joined(tensors), tensors)
    assert all(torch.equal(part, tensor) for part, tensor in zip(parts, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_cleared_whatever_they_were(dtype):
    values = torch.tensor([1.0, float("nan"), float("-inf"), -0.0, -2.0], dtype=dtype)
    kept, cleared, some = values.clone(), values.clone(), values.clone()
    masked_([kept], torch.tensor(True))
    masked_([cleared], torch.tensor(False))
    masked_([some], [torch.tensor([True, False, False, True, True])])
    assert torch.equal(kept.view(torch.uint8), values.view(torch.uint8))
    assert not cleared.view(torch.uint8).any()
    expected = torch.tensor([1.0, 0.0, 0.0, -0.0, -2.0], dtype=dtype)
    assert torch.equal(some.view(torch.uint8), expected.view(torch.uint8))


def test_norms_of_several_dtypes_do_not_overflow():
    found = norms([torch.full((2, 2), 300.0, dtype=torch.float16), torch.tensor([3.0, 4.0]), torch.ones(4).double()])
    assert [float(norm) for norm in found] == [600.0, 5.0, 2.0]
    assert [norm.dtype for norm in found] == [torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("decay_only", [False, True])
def test_boost_of_many_is_that_of_each(dtype, decay_only):
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5 for shape in SHAPES]
    kappas, decay = [1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]
    together, alone, old = drawn(0, dtype), drawn(0, dtype), drawn(2, dtype)
    together[4], alone[4] = together[4].t().contiguous().t(), alone[4].t().contiguous().t()
    boost_(together, old, masks, kappas, decay=decay, decay_only=decay_only)
    for index in range(len(SHAPES)):
        one = slice(index, index + 1)
        boost_(alone[one], old[one], masks[one], kappas[one], decay=decay[one], decay_only=decay_only)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], drawn(0, dtype)[0])


def test_sam_of_many_is_the_formula():
    weights, gradients = drawn(0), drawn(1)
    moves, norm = sam_displacement(weights, gradients, [0.1] * 6 + [0.2])
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(norm, flat.norm())
    for move, gradient, radius in zip(moves, gradients, [0.1] * 6 + [0.2], strict=True):
        torch.testing.assert_close(move, radius * gradient / flat.norm())
    before = [weight.clone() for weight in weights]
    with perturbed(weights, moves) as saved:
        assert all(torch.equal(w, b + m) for w, b, m in zip(weights, before, moves, strict=True))
        assert all(torch.equal(s, b) for s, b in zip(saved, before, strict=True))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_copies_keep_strides_and_have_no_graph():
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    (copy,) = _foreach.copied([weight])
    assert copy.stride() == weight.stride()
    assert not copy.requires_grad
    assert torch.equal(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()


def test_quotients_are_copies_with_a_divisor_each():
    tensors = [torch.tensor([2.0, 6.0]), torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([5.0])]
    found = _foreach.quotients(tensors, [2.0, 2.0, 1.0])
    assert [(one.tolist(), one.dtype) for one in found] == [
        ([v / d for v in t.tolist()], torch.float32) for t, d in zip(tensors, [2, 2, 1], strict=True)
    ]
    assert found[2].data_ptr() != tensors[2].data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_one_value_that_is_not_finite_is_found(bad, where):
    tensors = [*drawn(0), torch.full((2,), 1e300, dtype=torch.float64)]
    assert bool(_foreach.all_finite(tensors))
    if tensors[where].numel():
        tensors[where].view(-1)[-1] = bad
        assert not bool(_foreach.all_finite(tensors))
    assert bool(_foreach.all_finite([]))


def test_nothing_at_all():
    assert _foreach.copied([]) == _foreach.products([], torch.tensor(1.0)) == norms([]) == groups_of([]) == []
    assert float(global_norm([None])) == 0.0
    with perturbed([], []) as saved:
        assert saved == []


def test_true_places_are_counted_over_all_tensors():
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.rand(shape, generator=generator) < 0.5 for shape in SHAPES] for _ in range(2))
    assert int(count_true(first)) == sum(int(mask.sum()) for mask in first)
    assert int(count_true(first, second)) == sum(int((a | b).sum()) for a, b in zip(first, second, strict=True))
