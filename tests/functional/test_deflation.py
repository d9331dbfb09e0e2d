"""The trace with the large eigenvalues taken out, against dense matrices."""

import pytest
import torch
from torch import Tensor

from lightning_ire.functional import deflated_trace, extreme_eigenvalues
from lightning_ire.functional.spectrum import Krylov

PARTS = [10, 25, 5]
SIZE = sum(PARTS)


def outlying(seed: int = 0) -> Tensor:
    """A few large eigenvalues over a bulk of both signs."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))
    values = torch.randn(SIZE, dtype=torch.float64, generator=generator)
    values[:4] = torch.tensor([100.0, 60.0, 30.0, -20.0])
    return rotation @ torch.diag(values) @ rotation.T


def bilinear(matrix: Tensor):  # type: ignore[no-untyped-def]
    return lambda w, u: torch.stack([part.sum() for part in (w * (matrix @ u)).split(PARTS)])


def reached(matrix: Tensor, products: int, basis: int = 20) -> Krylov:
    start = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = extreme_eigenvalues(
        lambda v: matrix @ v, start, max_products=products, tolerance=1e-14, basis=basis, smallest=1
    )
    assert found.krylov is not None
    return found.krylov


def block_traces(matrix: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in matrix.diagonal().split(PARTS)])


@pytest.mark.parametrize(("products", "basis"), [(1, 20), (8, 20), (30, 8)], ids=["one", "few", "restarted"])
def test_what_lanczos_leaves_behind_is_what_it_says(products: int, basis: int) -> None:
    matrix = outlying()
    krylov = reached(matrix, products, basis)
    q = krylov.basis
    torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=torch.float64), rtol=0, atol=1e-12)
    expected = krylov.matrix @ q
    expected[-1] += krylov.rest
    torch.testing.assert_close(q @ matrix, expected, rtol=0, atol=1e-9)
    assert float((q @ krylov.rest).abs().max()) < 1e-10


@pytest.mark.parametrize(("products", "basis"), [(1, 20), (8, 20), (30, 8)], ids=["one", "few", "restarted"])
def test_unbiased_with_the_variance_of_what_is_left(products: int, basis: int) -> None:
    matrix = outlying()
    krylov = reached(matrix, products, basis)
    generator = torch.Generator().manual_seed(2)
    trace = deflated_trace(bilinear(matrix), krylov, PARTS, generator=generator, relative_error=0, max_vectors=4000)
    outside = torch.eye(SIZE, dtype=torch.float64) - krylov.basis.T @ krylov.basis
    left = outside @ matrix @ outside
    deviation = (2 * float((left - left.diag().diag()).square().sum())) ** 0.5
    assert trace.stderr == pytest.approx(deviation / 4000**0.5, rel=0.1)
    assert abs(trace.value - float(matrix.trace())) < 3 * trace.stderr
    errors = trace.draws.std(0) / 4000**0.5
    assert bool(((trace.parts - block_traces(matrix)).abs() < 3.5 * errors).all())
    assert float(errors.max()) < 2.0


def test_a_whole_basis_leaves_nothing_to_chance() -> None:
    matrix = outlying()
    krylov = Krylov(torch.eye(SIZE, dtype=torch.float64), matrix, torch.zeros(SIZE, dtype=torch.float64))
    trace = deflated_trace(bilinear(matrix), krylov, PARTS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(trace.parts, block_traces(matrix), rtol=1e-9, atol=1e-9)
    assert trace.stderr < 1e-9
    assert trace.count == 8


def test_one_product_for_each_vector() -> None:
    matrix, calls = outlying(), []

    def counted(w: Tensor, u: Tensor) -> Tensor:
        calls.append(0)
        return bilinear(matrix)(w, u)

    krylov = reached(matrix, 8)
    trace = deflated_trace(
        counted, krylov, PARTS, generator=torch.Generator().manual_seed(0), relative_error=0.0, max_vectors=11
    )
    assert trace.count == len(calls) == 11
