"""Figure 1 of the IRE paper: L(u, v) = (1 + u^2) v^2 / 2 from (1, 0.01), against the recursion written out by hand."""

import itertools
import math

import pytest
import torch

from lightning_ire.functional import boost_, flat_masks

START = (1.0, 0.01)


def loss(u, v):
    return (1 + u**2) * v**2 / 2


def by_hand(steps, eta, kappa=0.0):
    """u -= (1 + kappa) eta u v^2; v -= eta (1 + u^2) v, in Python's floats."""
    u, v = START
    path = [START]
    for _ in range(steps):
        u, v = u - (1 + kappa) * eta * u * v * v, v - eta * (1 + u * u) * v
        path.append((u, v))
    return path


def by_package(steps, eta, kappa=0.0):
    """Plain SGD and `boost_`, with the mask that the curvature at the start gives."""
    weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in START]
    u, v = (weight.detach() for weight in weights)
    masks = flat_masks([v**2, 1 + u**2], gamma=0.5)
    assert [mask.item() for mask in masks] == [True, False], "u is flat, v is sharp"
    optimizer = torch.optim.SGD(weights, lr=eta)
    path = [START]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*weights).backward()
        old = [weight.detach().clone() for weight in weights]
        optimizer.step()
        boost_(weights, old, masks, kappa)
        path.append(tuple(weight.item() for weight in weights))
    return path


@pytest.mark.parametrize("kappa", [0.0, 90.0, 900.0, 9000.0])
def test_path_is_that_of_the_recursion(kappa):
    got, expected = by_package(400, 1.0, kappa), by_hand(400, 1.0, kappa)
    error = max(
        abs(a - b) for point, other in zip(got, expected, strict=True) for a, b in zip(point, other, strict=True)
    )
    assert error < 1e-12


def test_gradient_descent_crawls_along_the_valley():
    u, v = by_package(2000, 1.0)[-1]
    assert 0.99 < u < 1.0
    assert loss(u, v) < 1e-25


def test_twice_the_learning_rate_diverges():
    got, expected = by_package(20, 2.0), by_hand(20, 2.0)
    for point, other in zip(got[:6], expected[:6], strict=True):
        assert point == pytest.approx(other, abs=1e-12)
    sharp = [abs(v) for _, v in got]
    assert all(after > 2 * before for before, after in itertools.pairwise(sharp[:5]))
    assert not all(map(math.isfinite, by_package(60, 2.0)[-1]))


def test_the_stronger_the_boost_the_flatter_the_end():
    ends = [by_package(1000, 1.0, kappa)[-1] for kappa in (0.0, 90.0, 900.0, 9000.0)]
    sizes = [abs(u) for u, _ in ends]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == pytest.approx([0.99289, 0.92849, 0.74259, 0.00998], abs=1e-5)
    assert all(loss(*end) < 1e-9 * loss(*START) for end in ends), "all of them reach the valley's floor"


def test_boost_9000_is_almost_at_the_flattest_minimum_in_two_steps():
    _, (first, _), (second, v) = by_package(2, 1.0, 9000.0)
    assert first == pytest.approx(0.0999, abs=1e-12)  # 1 - 9001 * 1e-4
    assert second == pytest.approx(0.0999 * (1 - 0.9001), abs=1e-12)
    assert v == pytest.approx(0.01 * 0.0999**2, abs=1e-12)
