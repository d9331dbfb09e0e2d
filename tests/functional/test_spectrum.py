"""Eigenvalues at the ends and spectral densities of matrices whose eigenvalues are known."""

import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ire.functional import SpectralDensity, extreme_eigenvalues, spectral_density, spectrum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def with_eigenvalues(values, seed=0):
    """A symmetric matrix in a random basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(drawn(len(values), len(values), seed=seed)).Q
    matrix = basis @ values.diag() @ basis.T
    return (matrix + matrix.T) / 2


class Counted:
    """A product that counts its calls."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.calls = 0

    def __call__(self, vector):
        self.calls += 1
        return self.matrix @ vector


def random_symmetric(size, seed=0):
    matrix = drawn(size, size, seed=seed)
    return (matrix + matrix.T) / math.sqrt(2 * size)


def outliers_and_bulk(size=150, seed=0):
    """What Hessians of nets look like: a few large eigenvalues, most near 0, some slightly negative."""
    values = torch.cat([torch.tensor([40.0, 25.0, 24.0, 10.0]).double(), 0.3 * drawn(size - 4, seed=seed).abs()])
    values[-20:] *= -0.5
    return with_eigenvalues(values, seed)


MATRICES = {
    "random": random_symmetric(80),
    "outliers": outliers_and_bulk(),
    "positive semidefinite": with_eigenvalues([*range(20), *[0.0] * 30]),
    "negative definite": -with_eigenvalues(torch.linspace(0.1, 5, 60)),
    "two": torch.tensor([[2.0, 1.0], [1.0, -3.0]]).double(),
    "three": with_eigenvalues([1.0, 1.5, 7.0]),
}


def assert_close_to_ends(found, matrix, wanted, digits):
    """The wanted number of each end of `eigvalsh`, within a part of the largest absolute eigenvalue."""
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    assert found.largest == pytest.approx(values.flip(0)[: wanted[0]].tolist(), abs=digits * scale)
    assert found.smallest == pytest.approx(values[: wanted[1]].tolist(), abs=digits * scale)
    assert len(found.residuals) == len(found.largest) + len(found.smallest)


def assert_residuals_bound(found, matrix, rounding=1e-12):
    """An eigenvalue lies within the residual of each value."""
    values = torch.linalg.eigvalsh(matrix.double())
    scale = float(values.abs().max())
    for value, residual in zip(found.largest + found.smallest, found.residuals, strict=True):
        assert float((values - value).abs().min()) <= residual + rounding * scale


@pytest.mark.parametrize("wanted", [(1, 0), (0, 1), (1, 1), (4, 0), (0, 3), (3, 2)])
@pytest.mark.parametrize("basis", [20, 1])
@pytest.mark.parametrize("name", MATRICES)
def test_ends_of_the_spectrum(name, basis, wanted):
    """A `basis` of 1 is raised to the number of wanted values and 2: restarts every other product."""
    matrix = MATRICES[name]
    if sum(wanted) > len(matrix):
        wanted = (1, 1)
    product = Counted(matrix)
    found = extreme_eigenvalues(
        product,
        drawn(len(matrix), seed=5),
        largest=wanted[0],
        smallest=wanted[1],
        tolerance=1e-6,
        max_products=3000,
        basis=basis,
    )
    assert found.converged
    assert product.calls == found.products
    assert all(residual <= 1e-6 * float(torch.linalg.matrix_norm(matrix, 2)) for residual in found.residuals)
    if name != "positive semidefinite" or wanted[1] < 2:  # 0 occurs thirty times there: see below
        assert_close_to_ends(found, matrix, wanted, 1e-9)
    assert_residuals_bound(found, matrix)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("max_products", [1, 3, 8, 30])
def test_residuals_bound_the_distance_to_an_eigenvalue_converged_or_not(seed, tolerance, max_products):
    matrix = random_symmetric(60, seed)
    product = Counted(matrix)
    found = extreme_eigenvalues(
        product,
        drawn(60, seed=seed + 50),
        largest=2,
        smallest=1,
        tolerance=tolerance,
        max_products=max_products,
        basis=9,
    )
    assert_residuals_bound(found, matrix)
    assert product.calls == found.products <= max_products
    assert found.products == max_products or found.converged
    assert found.largest == sorted(found.largest, reverse=True)
    if len(found.residuals) == 3:
        scale = max(map(abs, found.largest + found.smallest))
        assert found.converged == all(residual <= tolerance * scale for residual in found.residuals)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_values_and_residuals_are_those_of_the_krylov_space(count):
    """Rayleigh and Ritz on start, A start, ..., with residuals from their definition; 5 fill the basis."""
    matrix, start = random_symmetric(12), drawn(12, seed=1)
    powers = torch.stack([torch.linalg.matrix_power(matrix, k) @ start for k in range(count)], dim=1)
    basis = torch.linalg.qr(powers).Q
    values, rotation = torch.linalg.eigh(basis.T @ matrix @ basis)
    ritz = basis @ rotation
    norms = (matrix @ ritz - ritz * values).norm(dim=0)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, start, largest=2, smallest=1, tolerance=0, max_products=count, basis=5
    )
    assert found.largest == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-10)
    assert found.smallest == pytest.approx(values[:1].tolist(), rel=1e-10)
    assert found.residuals == pytest.approx([*norms.flip(0)[:2].tolist(), float(norms[0])], rel=1e-8)
    assert not found.converged


def test_too_few_products_do_not_converge():
    matrix = outliers_and_bulk()
    start = drawn(len(matrix), seed=1)
    needed = extreme_eigenvalues(lambda v: matrix @ v, start, largest=2, tolerance=1e-4, max_products=500).products
    assert 5 < needed < 50
    for max_products in (1, 2, needed - 1, needed):
        product = Counted(matrix)
        found = extreme_eigenvalues(product, start, largest=2, tolerance=1e-4, max_products=max_products)
        assert found.converged == (max_products == needed)
        assert product.calls == found.products == max_products
        assert len(found.largest) == len(found.residuals) == min(2, max_products)


def test_tolerance_is_relative_to_the_operator():
    matrix, start = random_symmetric(70), drawn(70, seed=2)
    counts = {}
    for tolerance in (0.1, 0.01, 1e-4):
        runs = [
            extreme_eigenvalues(lambda v, f=f: f * (matrix @ v), start, tolerance=tolerance, max_products=500)
            for f in (1.0, 1e6, 1e-6)
        ]
        assert len({run.products for run in runs}) == 1
        assert runs[1].largest[0] == pytest.approx(1e6 * runs[0].largest[0], rel=1e-9)
        counts[tolerance] = runs[0].products
    assert counts[0.1] < counts[0.01] < counts[1e-4]


@pytest.mark.parametrize("basis", [6, 20])
def test_float32(basis):
    matrix = outliers_and_bulk(400).float()
    found = extreme_eigenvalues(
        lambda v: matrix @ v,
        drawn(400, seed=3, dtype=torch.float32),
        largest=3,
        smallest=1,
        tolerance=1e-4,
        max_products=1000,
        basis=basis,
    )
    assert found.converged
    assert_close_to_ends(found, matrix.double(), (3, 1), 1e-4)
    assert_residuals_bound(found, matrix, rounding=1e-6)


@pytest.mark.parametrize("smallest", [0, 1])
def test_restarts_need_more_products_but_not_many(smallest):
    """The wanted vectors and their neighbours are kept; a basis of 12 instead of 300 costs a few products more."""
    matrix = random_symmetric(300)

    def products(basis):
        runs = [
            extreme_eigenvalues(
                lambda v: matrix @ v,
                drawn(300, seed=seed),
                smallest=smallest,
                tolerance=1e-4,
                max_products=2000,
                basis=basis,
            )
            for seed in (4, 5, 6)
        ]
        assert all(found.converged for found in runs)
        for found in runs:
            assert_close_to_ends(found, matrix, (1, smallest), 1e-4)
        return sum(found.products for found in runs)

    everything = products(300)
    assert 120 < everything < 160
    assert everything < products(12) < 1.2 * everything
    assert products(5) < 4 * everything  # half of the spare vectors are new ones
    assert products(3 + smallest) < 6 * everything


def test_memory_is_one_basis_and_single_vectors():
    """Of all tensors that are made only one holds more than two vectors, restarts included."""
    size, basis, sizes = 5000, 10, set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    sizes.add(tensor.untyped_storage().nbytes() // 8)
            return result

    diagonal, start = drawn(size), drawn(size, seed=1)
    with mock.patch.object(spectrum, "_CHUNK", 700), Sizes():
        found = extreme_eigenvalues(
            lambda v: diagonal * v, start, largest=3, tolerance=1e-3, max_products=200, basis=basis
        )
    assert found.products > 3 * basis
    assert {number for number in sizes if number > 2 * size} == {basis * size}


def test_start_and_global_random_numbers_stay():
    matrix, start = with_eigenvalues([3.0, 3.0, 1.0, 1.0, 1.0]), drawn(5, seed=1)
    before, state = start.clone(), torch.get_rng_state()
    first = extreme_eigenvalues(lambda v: matrix @ v, start, largest=2)
    assert torch.equal(start, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert extreme_eigenvalues(lambda v: matrix @ v, start, largest=2) == first


def test_length_of_the_start_does_not_matter():
    matrix, start = random_symmetric(30), drawn(30, seed=1)
    one, other = (extreme_eigenvalues(lambda v: matrix @ v, factor * start, largest=2) for factor in (1.0, 1e-9))
    assert one.products == other.products
    assert one.largest == pytest.approx(other.largest, rel=1e-12)


# few different eigenvalues


def test_zero_operator_takes_two_products():
    """The second, of a random vector, shows that there is nothing else."""
    product = Counted(torch.zeros(40, 40).double())
    found = extreme_eigenvalues(product, drawn(40), smallest=1, tolerance=0.0)
    assert (found.largest, found.smallest, found.residuals) == ([0.0], [0.0], [0.0, 0.0])
    assert found.converged
    assert product.calls == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize(("largest", "smallest", "products"), [(1, 0, 2), (3, 0, 3), (2, 2, 4)])
def test_multiples_of_the_identity(factor, largest, smallest, products, dtype):
    found = extreme_eigenvalues(
        lambda v: factor * v, drawn(500, seed=1, dtype=dtype), largest=largest, smallest=smallest
    )
    assert found.largest == pytest.approx([factor] * largest, rel=1e-5)
    assert found.smallest == pytest.approx([factor] * smallest, rel=1e-5)
    assert found.converged
    assert found.products == products


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 1), (5, 0), (0, 5), (5, 5), (2, 1)])
def test_more_wanted_than_there_are(size, largest, smallest):
    matrix = random_symmetric(size)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, drawn(size, seed=1), largest=largest, smallest=smallest, tolerance=1e-9
    )
    values = torch.linalg.eigvalsh(matrix)
    assert found.largest == pytest.approx(values.flip(0)[:largest].tolist(), rel=1e-12)
    assert found.smallest == pytest.approx(values[:smallest].tolist(), rel=1e-12)
    assert found.converged
    assert found.products <= size
    assert len(found.residuals) == min(largest, size) + min(smallest, size)


@pytest.mark.parametrize("basis", [20, 8])
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_an_eigenvalue_are_found_if_there_are_few_different_ones(seed, basis):
    """5 three times, 1 otherwise: a Krylov space sees one 5 and one 1, random vectors that are added the others."""
    matrix = with_eigenvalues([5.0, 5.0, 5.0, *[1.0] * 20, -2.0, -2.0], seed)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, drawn(25, seed=seed + 1), largest=4, smallest=2, max_products=60, basis=basis
    )
    assert found.largest == pytest.approx([5.0, 5.0, 5.0, 1.0], abs=1e-9)
    assert found.smallest == pytest.approx([-2.0, -2.0], abs=1e-9)
    assert found.converged


def test_a_repeated_eigenvalue_among_many_others_is_found_once():
    """The limit that the docstring tells: but for rounding errors, which grow with the products, there is one 9."""
    matrix = with_eigenvalues([9.0, 9.0, *torch.linspace(0, 5, 100).tolist()])
    runs = [
        extreme_eigenvalues(lambda v: matrix @ v, drawn(102, seed=1), largest=2, tolerance=tolerance, max_products=90)
        for tolerance in (0.01, 1e-6)
    ]
    assert all(found.converged for found in runs)
    assert runs[0].largest == pytest.approx([9.0, 5.0], abs=0.05)
    assert runs[1].largest == pytest.approx([9.0, 9.0], abs=1e-6)


@pytest.mark.parametrize("position", [0, 17, 28, 29])
@pytest.mark.parametrize("basis", [30, 12])
@pytest.mark.parametrize("largest", [1, 2])
def test_start_that_is_an_eigenvector(position, basis, largest):
    """Whichever it is, random vectors that are added reach the others: they go on although its residual is 0."""
    diagonal = torch.linspace(-2, 4, 30, dtype=torch.float64) ** 3
    start = torch.zeros(30, dtype=torch.float64)
    start[position] = 3.0
    found = extreme_eigenvalues(
        lambda v: diagonal * v, start, largest=largest, smallest=1, tolerance=1e-6, max_products=100, basis=basis
    )
    assert found.converged
    assert found.largest == pytest.approx(diagonal.flip(0)[:largest].tolist(), rel=1e-6)
    assert found.smallest == pytest.approx([-8.0], rel=1e-6)


def test_start_at_the_second_largest_eigenvalue_alone():
    """With nothing wanted but the largest, the start's residual of 0 would end it at once."""
    diagonal, start = torch.linspace(0, 1, 200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    start[198] = 1.0
    found = extreme_eigenvalues(lambda v: diagonal**4 * v, start, tolerance=0.01)
    assert found.largest[0] == pytest.approx(1.0, abs=0.002)


def test_every_random_vector_is_another():
    """The same one twice would leave nothing but rounding errors of the second."""
    noises, real = [], torch.randn

    def recorded(*shape, **options):
        noises.append(real(*shape, **options))
        return noises[-1].clone()

    start = drawn(30)
    with mock.patch("torch.randn", recorded):
        extreme_eigenvalues(lambda v: 2 * v, start, largest=6)
    assert len(noises) == 5
    assert torch.linalg.matrix_rank(torch.stack([start, *noises])) == 6


def test_start_in_an_invariant_subspace():
    diagonal = torch.tensor([1.0, 2.0, 7.0, -3.0, 5.0], dtype=torch.float64)
    start = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = extreme_eigenvalues(lambda v: diagonal * v, start, largest=2, smallest=1)
    assert found.largest == pytest.approx([7.0, 5.0], rel=1e-12)
    assert found.smallest == pytest.approx([-3.0], rel=1e-12)
    assert found.products == 5


def test_rank_one():
    """The Hessian of a loss of one linear form: its square's eigenvalue and zeros, exhausted after two products."""
    direction = drawn(200, seed=1, dtype=torch.float32)
    square = float(direction.square().sum())
    found = extreme_eigenvalues(
        lambda v: direction * (direction @ v), drawn(200, seed=2, dtype=torch.float32), largest=3, tolerance=1e-6
    )
    assert found.largest == pytest.approx([square, 0, 0], abs=1e-5 * square)
    assert found.converged


# products that fail


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 4, 25])
def test_products_that_are_not_finite_give_nan(call, bad):
    matrix, calls = random_symmetric(60), []

    def product(vector):
        calls.append(1)
        image = matrix @ vector
        if len(calls) == call:
            image[3] = bad
        return image

    found = extreme_eigenvalues(product, drawn(60), largest=2, smallest=1, tolerance=1e-9, max_products=100, basis=10)
    assert [len(found.largest), len(found.smallest), len(found.residuals)] == [2, 1, 3]
    assert all(map(math.isnan, found.largest + found.smallest + found.residuals))
    assert not found.converged
    assert found.products == len(calls) == call


def test_products_whose_norm_overflows_give_nan():
    """Finite numbers, at a right angle to the vector, so that the Ritz value is 0."""
    found = extreme_eigenvalues(at_a_right_angle, drawn(10, dtype=torch.float32), max_products=1)
    assert math.isnan(found.largest[0])
    assert not found.converged


def at_a_right_angle(vector):
    return 2.5e38 * torch.stack([-vector[1::2], vector[::2]], dim=1).reshape(-1) / vector.abs().max()


def test_a_basis_larger_than_the_operator_is_not_made():
    """It would be of 80 terabytes."""
    assert extreme_eigenvalues(lambda v: 3 * v, torch.ones(2), basis=10**12).largest == pytest.approx([3.0])


def test_start_of_zeros_gives_nan():
    found = extreme_eigenvalues(lambda v: 2 * v, torch.zeros(4))
    assert math.isnan(found.largest[0])
    assert not found.converged


def test_no_products_are_refused():
    with pytest.raises(ValueError, match="Expected `max_products` to be at least 1, got 0"):
        extreme_eigenvalues(lambda v: v, torch.ones(3), max_products=0)


# spectral density


def density(matrix, seed=0, **options):
    return spectral_density(
        lambda v: matrix @ v, len(matrix), generator=seeded(seed), **{"dtype": torch.float64, **options}
    )


def moment(found, power):
    return float((found.weights * found.nodes**power).sum())


def rms(numbers):
    return math.sqrt(sum(number**2 for number in numbers) / len(numbers))


@pytest.mark.parametrize("name", MATRICES)
def test_weights_are_a_distribution_inside_the_spectrum(name):
    matrix = MATRICES[name]
    found = density(matrix, vectors=3, steps=25)
    values = torch.linalg.eigvalsh(matrix)
    slack = 1e-9 * float(values.abs().max())
    assert found.weights.sum().item() == pytest.approx(1, rel=1e-12)
    assert (found.weights >= 0).all()
    assert found.nodes.min() >= values[0] - slack
    assert found.nodes.max() <= values[-1] + slack
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert len(found.nodes) == len(found.weights) <= 3 * min(25, len(matrix))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_quadrature_of_one_vector_is_exact_up_to_degree_2m_minus_1(steps):
    matrix = random_symmetric(30)
    start = torch.randn(30, generator=seeded(7), dtype=torch.float64)
    start /= start.norm()
    found = density(matrix, seed=7, vectors=1, steps=steps)
    assert len(found.nodes) == steps
    exact = [float(start @ torch.linalg.matrix_power(matrix, k) @ start) for k in range(2 * steps + 1)]
    assert [moment(found, k) for k in range(2 * steps)] == pytest.approx(exact[:-1], rel=1e-11, abs=1e-13)
    assert moment(found, 2 * steps) != pytest.approx(exact[-1], rel=1e-3)


def test_first_moments_are_those_of_the_matrix():
    """Mean and mean square eigenvalue within three standard errors, in nearly all of many runs."""
    matrix = with_eigenvalues(0.5 + drawn(40, seed=1))
    mean, square = float(matrix.trace()) / 40, float(matrix.square().sum()) / 40
    inside = []
    for seed in range(60):
        found = density(matrix, seed=seed, vectors=12, steps=4)
        squares = 12 * (found.weights * found.nodes**2).reshape(12, 4).sum(1)
        error = float(squares.std()) / math.sqrt(12)
        inside.append(abs(found.mean - mean) < 3 * found.stderr and abs(moment(found, 2) - square) < 3 * error)
    assert sum(inside) >= 56


def test_error_bar_is_that_of_the_mean():
    """The variance of v^T A v of a random unit vector is 2 (mean square - square of the mean) / (p + 2)."""
    matrix = with_eigenvalues(0.5 + drawn(40, seed=1))
    mean, square = float(matrix.trace()) / 40, float(matrix.square().sum()) / 40
    expected = math.sqrt(2 * (square - mean**2) / (40 + 2))
    runs = [density(matrix, seed=seed, vectors=8, steps=2) for seed in range(200)]
    assert rms([run.mean - mean for run in runs]) == pytest.approx(expected / math.sqrt(8), rel=0.2)
    assert rms([run.stderr for run in runs]) == pytest.approx(expected / math.sqrt(8), rel=0.1)
    assert density(matrix, vectors=1).stderr == math.inf


def test_all_steps_give_the_distribution_of_the_eigenvalues_at_one_over_root_n():
    """As many steps as eigenvalues: the nodes are the eigenvalues; their weights tend to 1 / p."""
    values = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0, 4.0], dtype=torch.float64)
    matrix = with_eigenvalues(values)
    between = torch.tensor([-1.0, 0.25, 0.75, 2.0, 3.5], dtype=torch.float64)
    exact = torch.tensor([(values <= x).double().mean() for x in between])

    def errors(seed, vectors):
        found = density(matrix, seed=seed, vectors=vectors, steps=10)
        assert (found.nodes[:, None] - values).abs().min(1).values.max() < 1e-9
        reached = torch.stack([found.weights[found.nodes <= x].sum() for x in between])
        return reached - exact

    few = torch.stack([errors(seed, 4) for seed in range(60)])
    many = torch.stack([errors(seed, 16) for seed in range(60)])
    # the weight of k of p eigenvalues is Beta(k/2, (p-k)/2)
    k = 6 * exact
    expected = (2 * k * (6 - k) / (36 * 8)).sqrt()
    torch.testing.assert_close(few.square().mean(0).sqrt(), expected / 2, rtol=0.25, atol=0)
    torch.testing.assert_close(many.square().mean(0).sqrt(), expected / 4, rtol=0.25, atol=0)
    assert (many.mean(0).abs() <= 4 * expected / math.sqrt(16 * 60)).all()
    ratio = float(few.square().mean().sqrt() / many.square().mean().sqrt())
    assert ratio == pytest.approx(2, rel=0.2)


def test_counts_of_outliers_and_bulk():
    matrix = outliers_and_bulk(200)
    found = density(matrix, vectors=40, steps=30)
    outliers = 200 * float(found.weights[found.nodes > 5].sum())
    assert outliers == pytest.approx(4, abs=4 * math.sqrt(2 * 4 / 40))


def test_float32_without_reorthogonalization():
    """Copies of outliers appear in 60 steps; the weight of each outlier and the moments are unharmed."""
    matrix = outliers_and_bulk(200)
    start = torch.randn(200, generator=seeded())
    single = spectral_density(lambda v: matrix.float() @ v, 200, generator=seeded(), vectors=1, steps=60)
    with mock.patch("torch.randn", return_value=start.double()):
        double = density(matrix, vectors=1, steps=60)
    near = (single.nodes - 40).abs() < 1e-3
    assert near.sum() > 2, "the case shows nothing"
    assert single.mean == pytest.approx(double.mean, rel=1e-4)
    for low, high in [(39, 41), (20, 30), (5, 15), (-1, 5)]:
        inside = [float(d.weights[(d.nodes > low) & (d.nodes < high)].sum()) for d in (single, double)]
        assert inside[0] == pytest.approx(inside[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0])
def test_one_eigenvalue_ends_each_run_at_once(factor, dtype):
    calls = []

    def product(vector):
        calls.append(1)
        return factor * vector

    found = spectral_density(product, 300, generator=seeded(), dtype=dtype, vectors=3)
    assert len(calls) == 3
    assert found.nodes.tolist() == pytest.approx([factor] * 3, rel=1e-6)
    assert found.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert found.mean == pytest.approx(factor, rel=1e-6)
    assert found.stderr < 1e-6


def test_repeated_eigenvalues_share_one_node():
    matrix = with_eigenvalues([2.0] * 5 + [-1.0] * 15)
    found = density(matrix, vectors=200)
    shares = torch.stack([found.weights[(found.nodes - value).abs() < 1e-9].sum() for value in (2.0, -1.0)])
    assert shares.tolist() == pytest.approx([0.25, 0.75], abs=0.03)
    assert shares.sum().item() == pytest.approx(1, rel=1e-12)
    assert len(found.nodes) < 3 * 200


def test_vectors_come_from_the_generator():
    matrix = random_symmetric(20)
    before = torch.get_rng_state()
    first, again, other = density(matrix, seed=1), density(matrix, seed=1), density(matrix, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, other.nodes)
    assert len(first.nodes) == 4 * 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, 3])
def test_products_that_are_not_finite_are_refused(call, bad):
    calls = []

    def product(vector):
        calls.append(1)
        image = vector * torch.arange(8.0)
        if len(calls) == call:
            image[2] = bad
        return image

    with pytest.raises(FloatingPointError, match="Expected finite products for the spectral density"):
        spectral_density(product, 8, generator=seeded())
    assert len(calls) == call


def test_products_whose_norm_overflows_are_refused():
    """Finite numbers and a finite alpha: cutting the run short here would look like a spectrum of one point."""
    with pytest.raises(FloatingPointError, match="Expected finite products"):
        spectral_density(at_a_right_angle, 10, generator=seeded(), vectors=1)


# the smoothed density


@pytest.mark.parametrize("width", [0.01, 0.05])
@pytest.mark.parametrize(
    "nodes",
    [
        [-1.0, 0.0, 5.0],
        [0.0, 0.0, 0.0],
        [2.0, 2.0, 2.0],
        [-1e-30, 0.0, 0.0],
        [1e8, 1e8, 1e8 + 1],
        [-1e8, -1e8, -1e8 + 1e-6],
    ],
    ids=str,
)
def test_smoothed_density_integrates_to_one(nodes, width):
    found = SpectralDensity(
        torch.tensor(nodes, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.0
    )
    grid, heights = found.smoothed(points=1000, width=width)
    assert grid.dtype == heights.dtype == torch.float64
    assert grid.shape == heights.shape == (1000,)
    assert (grid.diff() > 0).all()
    assert heights.isfinite().all()
    assert torch.trapezoid(heights, grid).item() == pytest.approx(1, abs=2e-4)
    assert torch.trapezoid(heights * (grid - nodes[0]), grid).item() == pytest.approx(
        found.mean - nodes[0], abs=1e-3 * float(grid[-1] - grid[0])
    )


def test_smoothed_density_is_a_sum_of_normal_distributions():
    found = SpectralDensity(torch.tensor([0.0, 10.0]).double(), torch.tensor([0.25, 0.75]).double(), 0.0)
    grid, heights = found.smoothed(points=901, width=0.02)
    sigma = 0.2
    assert grid[0].item() == pytest.approx(-4 * sigma)
    assert grid[-1].item() == pytest.approx(10 + 4 * sigma)
    normal = torch.distributions.Normal(found.nodes, torch.tensor(sigma, dtype=torch.float64))
    expected = (normal.log_prob(grid[:, None]).exp() * found.weights).sum(1)
    torch.testing.assert_close(heights, expected, rtol=1e-10, atol=1e-12)
    assert len(density(random_symmetric(10)).smoothed()[0]) == 400
