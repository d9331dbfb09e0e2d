"""Soft masks: a closed form, the mean that was asked for, and what the boost makes of them."""

import math

import pytest
import torch

from lightning_ire.functional import as_shares, boost_, flat_masks, soft_masks

GAMMAS = [0.1, 0.5, 0.9, 0.99]


def curvatures(*shapes, seed=0):
    """Skewed as curvatures are, with scales of their own, and of both signs."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [10.0**place * (2 * one).exp() * one.sign() for place, one in enumerate(normal)]


def by_definition(h, gamma, zeros_out=False):
    """LITE's shares with lower = c / 2 and upper = c times the mean, c by many halvings, in float64."""
    size = torch.cat([one.reshape(-1) for one in h]).abs()
    mean = size.mean()
    counts = (size != 0) | (not zeros_out)
    low, high = 0.0, 1e12
    for _ in range(200):
        c = math.sqrt(low * high) if low else high * 1e-9
        sharp = ((size - c / 2 * mean) / (c / 2 * mean)).clamp(0, 1)
        if float((1 - sharp)[counts].mean()) >= gamma:
            high = c
        else:
            low = c
    found = [(1 - ((one.abs() - c / 2 * mean) / (c / 2 * mean)).clamp(0, 1)) for one in h]
    return [n * ((one != 0) | (not zeros_out)) for n, one in zip(found, h, strict=True)]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_definition(gamma, scope, dtype):
    h = [one.to(dtype) for one in curvatures((40, 50), (3000,), (7, 11, 13))]
    pools = [h] if scope == "global" else [[one] for one in h]
    expected = [n for pool in pools for n in by_definition([one.double() for one in pool], gamma)]
    masks = soft_masks(h, gamma, scope=scope)
    assert any(bool(((mask > 0) & (mask < 255)).any()) for mask in masks)
    for mask, n in zip(masks, expected, strict=True):
        assert (mask.dtype, mask.shape) == (torch.uint8, n.shape)
        torch.testing.assert_close(as_shares(mask, torch.float64), n, rtol=0, atol=3e-3)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_mean_is_gamma(gamma, scope):
    h = curvatures((200, 300), (4000,), (300_000,))
    masks = soft_masks(h, gamma, scope=scope)
    for some in [masks] if scope == "global" else [[mask] for mask in masks]:
        assert float(as_shares(torch.cat([m.flatten() for m in some]), torch.float64).mean()) == pytest.approx(
            gamma, abs=2e-3
        )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_is_flat_where_less_sharp_ones_are(gamma):
    """The order of the curvatures is kept, and the hard mask's threshold is where n is neither 0 nor 1."""
    (h,) = curvatures((5000,))
    (soft,), (hard,) = soft_masks([h], gamma), flat_masks([h], gamma)
    assert (soft[h.abs().argsort()].int().diff() <= 0).all()
    assert int(soft[hard].min()) >= 0
    assert 0 < int(soft[h.abs() == h[hard].abs().max()]) < 255


def test_a_scale_does_not_matter():
    h = curvatures((50, 60), (700,))
    for factor in (2.0**-40, 2.0**30):
        for one, other in zip(soft_masks(h, 0.8), soft_masks([factor * v for v in h], 0.8), strict=True):
            assert torch.equal(one, other)


def test_all_is_flat_with_gamma_one():
    assert all(bool((mask == 255).all()) for mask in soft_masks(curvatures((30,), (4, 5)), 1.0))


def test_zeros():
    h = torch.tensor([0.0] * 6 + [1.0, 2.0, 3.0, 4.0])
    (mask,) = soft_masks([h], 0.3)
    assert mask.tolist() == [255] * 6 + [0] * 4
    (mask,) = soft_masks([h], 0.5, exclude_zero=True)
    (expected,) = by_definition([h.double()], 0.5, zeros_out=True)
    torch.testing.assert_close(as_shares(mask, torch.float64), expected, rtol=0, atol=3e-3)
    assert mask[:6].tolist() == [0] * 6
    assert float(as_shares(mask[6:], torch.float64).mean()) == pytest.approx(0.5, abs=2e-3)
    assert soft_masks([torch.zeros(3)], 0.5)[0].tolist() == [255] * 3


def test_none_and_empty_and_scalar():
    for scope in ("global", "tensor"):
        masks = soft_masks([None, torch.zeros(0), torch.tensor(2.0), torch.ones(2, 3)], 1.0, scope=scope)
        assert masks[0] is None
        assert [tuple(mask.shape) for mask in masks[1:]] == [(0,), (), (2, 3)]
        assert masks[2].item() == 255


def test_what_is_refused():
    with pytest.raises(ValueError, match="`gamma`"):
        soft_masks([torch.ones(3)], 0.0)
    with pytest.raises(ValueError, match="`scope`"):
        soft_masks([torch.ones(3)], 0.5, scope="row")
    with pytest.raises(ValueError, match="finite"):
        soft_masks([torch.tensor([1.0, math.nan])], 0.5)


@pytest.mark.parametrize("shapes", [((5,), (3, 4), ()), ((9000,), (100, 200))], ids=["joined", "alone"])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_the_boost_goes_by_the_share(shapes, decay):
    weights, old = curvatures(*shapes, seed=1), curvatures(*shapes, seed=2)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    start = [o if decay is None else (1 - decay) * o for o in old]
    expected = [w + 3 * m.double() / 255 * (w - s) for w, s, m in zip(weights, start, masks, strict=True)]
    got = [w.clone() for w in weights]
    boost_(got, old, masks, 3.0, decay=None if decay is None else [decay] * len(got))
    for one, want in zip(got, expected, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12)


def test_where_n_is_zero_the_bits_stay():
    weight = torch.tensor([math.nan, math.inf, -0.0, 1e-40, 1.0])
    before, old = weight.clone(), torch.tensor([1.0, 2.0, math.nan, -1.0, math.inf])
    boost_([weight], [old], [torch.zeros(5, dtype=torch.uint8)], 3.0)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_hard_and_soft_masks_beside_each_other():
    weights = [torch.tensor([1.0]), torch.tensor([1.0])]
    boost_(weights, [torch.zeros(1)] * 2, [torch.tensor([True]), torch.tensor([51], dtype=torch.uint8)], 5.0)
    assert [float(weight) for weight in weights] == [6.0, 2.0]
