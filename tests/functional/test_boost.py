"""Eq. 4 on the weights: the closed form where the mask is 1, the same bits where it is 0."""

import math

import pytest
import torch

from lightning_ire.functional import boost_

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SHAPES = [(5,), (3, 4), (), (2, 3, 2)]


def drawn(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def drawn_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) < 0.5 for shape in SHAPES]


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("kappa", [0.5, 1, 20.0])
def test_closed_form(kappa):
    weights, old, masks = drawn(0), drawn(1), drawn_masks(2)
    expected = [o + (1 + kappa * m) * (w - o) for w, o, m in zip(weights, old, masks, strict=True)]
    boost_(weights, old, masks, kappa)
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_closed_form_in_lower_precision(dtype):
    """kappa = 0.3 and 7 within the rounding of the step, the product and the sum, each at the size of the result."""
    for kappa in (0.3, 7.0):
        weights, old, masks = drawn(0, dtype), drawn(1, dtype), drawn_masks(2)
        exact = [
            o.double() + (1 + kappa * m) * (w.double() - o.double())
            for w, o, m in zip(weights, old, masks, strict=True)
        ]
        boost_(weights, old, masks, kappa)
        for got, want in zip(weights, exact, strict=True):
            assert got.dtype == dtype
            bound = torch.finfo(dtype).eps * (1 + kappa) * 4
            torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


def test_one_strength_per_parameter():
    weights, old, masks = drawn(0), drawn(1), [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
    kappas = [0.0, 1.0, 2.5, 10.0]
    expected = [o + (1 + k) * (w - o) for w, o, k in zip(weights, old, kappas, strict=True)]
    boost_(weights, old, masks, kappas)
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kappa", [0, 0.0, [0.0] * 4])
def test_strength_zero_changes_no_bit(kappa):
    weights = drawn(0)
    before = copies(weights)
    boost_(weights, drawn(1), [torch.ones(shape, dtype=torch.bool) for shape in SHAPES], kappa, decay=[0.1] * 4)
    assert all(map(torch.equal, weights, before))


def test_mask_none_leaves_the_parameter_alone():
    weights = drawn(0)
    before = copies(weights)
    boost_(weights, drawn(1), [None, torch.ones(3, 4).bool(), None, None], 2.0)
    assert [torch.equal(got, was) for got, was in zip(weights, before, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("decay", [None, [0.1]])
@pytest.mark.parametrize("kappa", [0.3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_mask_zero_keeps_every_bit(dtype, kappa, decay):
    """Also where the step is infinite or NaN, and where adding +0.0 would turn -0.0 into 0.0."""
    info = torch.finfo(dtype)
    special = [-0.0, 0.0, math.inf, -math.inf, info.smallest_normal / 2, -info.smallest_normal / 4, info.max, info.min]
    special += [1.0, -info.eps, 1e-3]
    weight = torch.tensor(special * 12, dtype=dtype)  # long enough for the vectorized and for the scalar kernel
    old = torch.tensor([*special, *reversed(special), math.nan, *special[1:]] * 4, dtype=dtype)
    before = weight.view(BITS[dtype]).clone()
    boost_([weight], [old], [torch.zeros(len(weight)).bool()], kappa, decay=decay)
    changed = (weight.view(BITS[dtype]) != before).nonzero().flatten()
    assert not len(changed), f"{before[changed][:3].tolist()} -> {weight.view(BITS[dtype])[changed][:3].tolist()}"


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_a_nan_with_mask_zero_stays_a_nan(dtype):
    """Its payload too, but for bfloat16, where torch's own addition rewrites it."""
    weight = torch.full((132,), math.nan, dtype=dtype)
    weight[::3] = torch.copysign(weight[::3], torch.tensor(-1.0, dtype=dtype))
    before = weight.view(BITS[dtype]).clone()
    boost_([weight], [torch.zeros_like(weight)], [torch.zeros(132).bool()], 1.0)
    assert weight.isnan().all()
    if dtype != torch.bfloat16:
        assert torch.equal(weight.view(BITS[dtype]), before)


def test_one_nan_step_stays_in_its_coordinate():
    weight = torch.tensor([math.nan, 1.0, 2.0])
    boost_([weight], [torch.zeros(3)], [torch.tensor([False, True, False])], 1.0)
    assert math.isnan(weight[0])
    assert weight[1:].tolist() == [2.0, 2.0]


def test_decoupled_weight_decay_is_not_lengthened():
    """AdamW's step minus its decay is Adam's step: with `decay`, only that part is taken kappa times more."""
    lr, weight_decay, kappa = 0.1, 0.3, 4.0
    old, gradients, masks = drawn(0), drawn(1), drawn_masks(2)

    def stepped(optimizer_class, **settings):
        weights = [torch.nn.Parameter(weight.clone()) for weight in old]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer_class(weights, lr=lr, **settings).step()
        return weights

    adam = stepped(torch.optim.Adam)
    weights = stepped(torch.optim.AdamW, weight_decay=weight_decay)
    expected = [w.detach() + kappa * m * (a.detach() - o) for w, a, o, m in zip(weights, adam, old, masks, strict=True)]
    boost_(weights, old, masks, kappa, decay=[lr * weight_decay] * len(weights))
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-13, atol=1e-13)


def test_decay_per_parameter():
    weights, old = [torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([2.0]), torch.tensor([2.0])]
    boost_(weights, old, [torch.tensor([True])] * 2, 1.0, decay=[0.25, 0.0])
    assert [weight.item() for weight in weights] == [0.5, 0.0]  # 1 + (1 - 2 + 0.25 * 2) and 1 + (1 - 2)


def test_the_decay_alone_is_lengthened():
    weights, old = [torch.tensor([0.5, 1.0])] * 2, [torch.tensor([1.0, 2.0])] * 2
    weights = [weight.clone() for weight in weights]
    boost_(weights, old, [torch.tensor([True, False])] * 2, 3.0, decay=[0.125, 0.0], decay_only=True)
    assert [weight.tolist() for weight in weights] == [[0.5 - 3 * 0.125 * 1.0, 1.0], [0.5, 1.0]]


@pytest.mark.parametrize("decay", [None, [0.1] * 4])
def test_old_weights_and_masks_are_not_changed(decay):
    old, masks = drawn(1), drawn_masks(2)
    old_before, masks_before = copies(old), copies(masks)
    boost_(drawn(0), old, masks, 3.0, decay=decay)
    assert all(map(torch.equal, old, old_before))
    assert all(map(torch.equal, masks, masks_before))


def test_parameters_keep_their_storage_and_need_no_graph():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    address = weight.data_ptr()
    boost_([weight], [torch.tensor([2.0, 2.0])], [torch.tensor([True, False])], 3.0)
    assert weight.data_ptr() == address
    assert weight.is_leaf
    assert weight.tolist() == [-2.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_parameters": drawn(1)[:3]}, r"\(4\), got 3 old parameters, 4 masks, 4 kappas and 4 decays"),
        ({"masks": [None] * 5}, r"\(4\), got 4 old parameters, 5 masks, 4 kappas and 4 decays"),
        ({"kappa": [1.0, 2.0]}, r"\(4\), got 4 old parameters, 4 masks, 2 kappas and 4 decays"),
        ({"decay": [0.0]}, r"\(4\), got 4 old parameters, 4 masks, 4 kappas and 1 decays"),
    ],
)
def test_lists_of_other_lengths_are_refused_before_anything_moves(changes, message):
    weights = drawn(0)
    before = copies(weights)
    arguments = {"old_parameters": drawn(1), "masks": drawn_masks(2), "kappa": 1.0} | changes
    with pytest.raises(ValueError, match="Expected one entry per parameter " + message):
        boost_(weights, **arguments)
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_larger_than_a_piece_and_nothing_that_is_not_finite_spreads(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    weight, old = (torch.randn(3, 100_001).to(dtype) for _ in range(2))
    mask = torch.rand(3, 100_001) < 0.7
    for index, odd in enumerate([float("nan"), float("inf"), -float("inf"), -0.0]):
        weight[2, index], mask[2, index] = odd, False
    if transposed:
        weight, old, mask = weight.t(), old.t(), mask.t()
    before = weight.clone()
    expected = torch.where(mask, before.add(before - old, alpha=2.5), before)
    boost_([weight], [old], [mask], kappa=2.5)
    assert torch.equal(weight[~mask].nan_to_num(7.0), before[~mask].nan_to_num(7.0))
    number = ~mask & ~before.isnan()
    assert torch.equal(weight[number].signbit(), before[number].signbit())
    # torch itself rounds bfloat16 in another way at the end of a run of numbers than inside
    assert torch.allclose(weight[mask], expected[mask], rtol=0.02 if dtype == torch.bfloat16 else 0, atol=0)
