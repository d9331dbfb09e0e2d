"""The sharp subspace of a matrix against a dense singular value decomposition."""

import pytest
import torch

from lightning_ire.functional import sharp_subspace


def matrix(rows, columns, values, dtype=torch.float64, seed=0):
    """One with these singular values; also its left directions."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, short, generator=generator, dtype=torch.float64))[0]
    return (left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T).to(dtype), left


SHAPES = [(5, 5), (5, 9), (9, 5)]
VALUES = [40.0, 3.0, 1.2, 0.7, 0.01]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.1, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_projector_of_the_decomposition(shape, threshold, dtype):
    momentum, left = matrix(*shape, VALUES, dtype)
    sharp = left[:, torch.tensor(VALUES) > threshold]
    found = sharp_subspace(momentum, threshold)
    assert found.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(found.double(), sharp @ sharp.T, rtol=0, atol=tolerance)


def test_the_flat_part_of_an_update_is_what_remains():
    momentum, left = matrix(6, 8, [9.0, 4.0, 2.0, 0.5, 0.2, 0.1])
    update = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flat = update - sharp_subspace(momentum) @ update
    torch.testing.assert_close(flat, left[:, 3:] @ left[:, 3:].T @ update, rtol=0, atol=1e-9)


def test_nothing_is_sharp_in_a_matrix_of_zeros():
    assert torch.equal(sharp_subspace(torch.zeros(3, 4)), torch.zeros(3, 3))


@pytest.mark.parametrize("steps", [10, 18, 24, 40])
def test_directions_that_are_zero_but_for_rounding_are_flat(steps):
    momentum, left = matrix(30, 40, [9.0, 3.0, 0.2] + [0.0] * 27, torch.float32)
    found = sharp_subspace(momentum, steps=steps).double()
    torch.testing.assert_close(found, left[:, :2] @ left[:, :2].T, rtol=0, atol=2e-3 if steps > 10 else 0.1)


def test_low_precision_and_arguments_are_left_alone():
    momentum, left = matrix(4, 6, [8.0, 4.0, 0.5, 0.25], torch.bfloat16)
    before = momentum.clone()
    found = sharp_subspace(momentum)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), left[:, :2] @ left[:, :2].T, rtol=0, atol=0.05)
    assert torch.equal(momentum, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3),), r"`momentum` to be a matrix, got shape \(3,\)"),
        ((torch.zeros(3, 3), 0.0), "`threshold` to be a number > 0, got 0.0"),
        ((torch.zeros(3, 3), float("nan")), "`threshold`"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        sharp_subspace(*arguments)
    with pytest.raises(ValueError, match="`steps`"):
        sharp_subspace(torch.zeros(3, 3), steps=0)
