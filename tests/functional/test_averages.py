"""Means of draws and their standard errors; Hutchinson's trace of matrices whose trace is known."""

import math

import pytest
import torch

from lightning_ire.functional import MeanEstimate, adaptive_mean, hutchinson_trace, rademacher, ratio_of_means


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return matrix + matrix.T


def trace_of(matrix, seed, count, **options):
    return hutchinson_trace(
        lambda v: v @ matrix @ v,
        len(matrix),
        generator=seeded(seed),
        dtype=torch.float64,
        max_vectors=count,
        **{"relative_error": 0, **options},
    )


def rms(numbers):
    return math.sqrt(sum(number**2 for number in numbers) / len(numbers))


# one estimate


def test_value_parts_and_error_of_given_draws():
    draws = torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]], dtype=torch.float64)
    mean = MeanEstimate(draws)
    assert mean.count == 3
    assert mean.parts.tolist() == [2.0, 4.0]
    assert mean.value == 6.0
    assert mean.stderr == pytest.approx(3 / math.sqrt(3), rel=1e-14)  # sums 3, 9, 6: standard deviation 3


def test_one_draw_has_an_infinite_error():
    assert MeanEstimate(torch.ones(1, 2, dtype=torch.float64)).stderr == math.inf


def test_weighted_parts():
    draws = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
    weighted = MeanEstimate(draws).weighted([10.0, -1.0])
    assert weighted.draws.tolist() == [[10.0, -2.0], [30.0, -6.0]]
    assert weighted.value == 16.0
    assert MeanEstimate(draws).value == 6.0


# when to stop


def numbers(*values):
    source = iter(values)
    return lambda: next(source)


def test_stops_once_the_error_is_small_enough():
    """0 and 2 in turn: the relative error of an even number n of draws is 1 / sqrt(n - 1), of an odd one more."""
    for target, count in [(0.3, 14), (0.25, 18), (0.21, 24)]:
        mean = adaptive_mean(numbers(*[0.0, 2.0] * 32), relative_error=target)
        assert mean.count == count
        assert mean.stderr == pytest.approx(1 / math.sqrt(count - 1), rel=1e-14)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_negative_means_count_by_their_size(sign):
    assert adaptive_mean(numbers(*[sign, 1.2 * sign] * 32), relative_error=0.05).count == 8


def test_equal_draws_stop_at_eight():
    assert adaptive_mean(numbers(*[3.0] * 64)).count == 8
    assert adaptive_mean(numbers(*[0.0] * 64)).count == 8
    assert adaptive_mean(numbers(*[3.0] * 5), max_draws=5).count == 5


def test_mean_zero_with_spread_uses_all():
    assert adaptive_mean(numbers(*[1.0, -1.0] * 50), relative_error=0.5, max_draws=100).count == 100


def test_relative_error_zero_uses_all():
    assert adaptive_mean(numbers(*[3.0] * 40), relative_error=0, max_draws=40).count == 40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_draws_that_are_not_finite_end_it(bad):
    mean = adaptive_mean(numbers(1.0, 2.0, bad, 3.0), max_draws=64)
    assert mean.count == 3
    assert not math.isfinite(mean.value)
    parts = adaptive_mean(numbers(torch.tensor([1.0, bad]), torch.ones(2)), max_draws=64)
    assert parts.count == 1
    assert parts.parts[0] == 1.0


def test_draws_are_kept_as_float64_without_a_graph():
    mean = adaptive_mean(lambda: torch.ones(2, dtype=torch.float16, requires_grad=True), max_draws=3)
    assert mean.draws.dtype == torch.float64
    assert mean.draws.shape == (3, 2)
    assert not mean.draws.requires_grad
    assert adaptive_mean(numbers(2.5), max_draws=1).draws.tolist() == [[2.5]]


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="Expected `max_draws` to be at least 1, got 0"):
        adaptive_mean(numbers(), max_draws=0)


# random signs


def test_signs_are_independent_and_of_mean_zero():
    """Means and products within four and a half standard errors."""
    draws = torch.stack([rademacher(6, generator, torch.float64) for generator in [seeded()] for _ in range(4000)])
    assert draws.abs().eq(1).all()
    bound = 4.5 / math.sqrt(len(draws))
    assert (draws.mean(0).abs() <= bound).all()
    assert ((draws.T @ draws / len(draws) - torch.eye(6, dtype=torch.float64)).abs() <= bound).all()
    assert abs(float((draws[1:] * draws[:-1]).mean())) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_signs_come_from_the_generator(dtype):
    before = torch.get_rng_state()
    first, again, other = rademacher(50, seeded(1), dtype), rademacher(50, seeded(1), dtype), rademacher(50, seeded(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other.to(dtype))


# Hutchinson


def test_variance_of_one_draw_is_twice_the_squares_beside_the_diagonal():
    matrix = symmetric(7)
    expected = 2 * float((matrix - matrix.diag().diag()).square().sum())
    sums = trace_of(matrix, 0, 6000).draws.sum(1)
    kurtosis = float(((sums - sums.mean()) ** 4).mean() / sums.var() ** 2)
    error = math.sqrt((kurtosis - 1) / len(sums))  # relative standard error of a sample variance
    assert float(sums.var()) == pytest.approx(expected, rel=4 * error)
    assert 4 * error < 0.15


def test_trace_is_unbiased_and_converges_like_one_over_root_n():
    matrix = symmetric(10)
    trace = float(matrix.trace())
    deviation = math.sqrt(2 * float((matrix - matrix.diag().diag()).square().sum()))
    runs = 300
    errors = {n: [trace_of(matrix, seed, n).value - trace for seed in range(runs)] for n in (10, 40)}
    for n, found in errors.items():
        assert abs(sum(found) / runs) <= 4 * deviation / math.sqrt(n * runs), "bias"
        assert rms(found) == pytest.approx(deviation / math.sqrt(n), rel=4 / math.sqrt(2 * runs))
    assert rms(errors[10]) / rms(errors[40]) == pytest.approx(2, rel=0.2)


def test_reported_error_covers_the_truth_in_95_percent():
    matrix = symmetric(12, seed=3)
    estimates = [trace_of(matrix, seed, 50) for seed in range(300)]
    inside = sum(abs(found.value - float(matrix.trace())) < 2 * found.stderr for found in estimates)
    assert 0.91 <= inside / 300 <= 0.985


def test_parts_are_the_traces_of_the_diagonal_blocks():
    matrix = symmetric(9)
    blocks = [slice(0, 2), slice(2, 6), slice(6, 9)]
    found = hutchinson_trace(
        lambda v: torch.stack([v[block] @ (matrix @ v)[block] for block in blocks]),
        9,
        generator=seeded(),
        dtype=torch.float64,
        relative_error=0,
        max_vectors=4000,
    )
    expected = torch.stack([matrix[block, block].trace() for block in blocks])
    errors = found.draws.std(0) / math.sqrt(found.count)
    assert (errors < 0.2).all()
    assert ((found.parts - expected).abs() <= 4 * errors).all()
    assert found.value == pytest.approx(float(found.parts.sum()), rel=1e-12)


def test_signs_are_exact_for_diagonal_matrices():
    matrix = torch.tensor([3.0, -1.0, 0.5, 4.0], dtype=torch.float64).diag()
    found = trace_of(matrix, 0, 64, relative_error=0.01)
    assert found.value == pytest.approx(6.5, rel=1e-15)
    assert found.count == 8
    assert found.stderr < 1e-14


def test_aim_and_maximum_are_passed_on():
    matrix = symmetric(12, seed=4) + 8 * torch.eye(12, dtype=torch.float64)
    found = trace_of(matrix, 0, 5000, relative_error=0.02)
    assert 8 < found.count < 5000
    assert found.stderr <= 0.02 * abs(found.value)
    assert trace_of(matrix, 0, 9, relative_error=1e-6).count == 9


def test_vectors_have_the_wanted_length_and_dtype():
    seen = []

    def quadratic(v):
        seen.append((v.dtype, v.shape, v.tolist()))
        return 1.0

    for dtype in (torch.float32, torch.float64):
        hutchinson_trace(quadratic, 5, generator=seeded(), dtype=dtype, relative_error=0, max_vectors=3)
    assert [entry[:2] for entry in seen] == [(torch.float32, (5,))] * 3 + [(torch.float64, (5,))] * 3
    assert seen[0][2] != seen[1][2]


# ratios


def test_ratio_of_means_of_given_draws():
    ratio, error = ratio_of_means(MeanEstimate(torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)))
    assert ratio == 1.0
    assert error == pytest.approx(0.5)  # numerators 1 and 3: standard error 1, over a denominator of 2
    exact = MeanEstimate(torch.tensor([[3.0, -2.0], [6.0, -4.0]], dtype=torch.float64))
    assert ratio_of_means(exact) == (-1.5, 0.0), "draws in proportion leave no doubt about the ratio"


def test_error_of_a_ratio_is_what_a_simulation_shows():
    """Correlated normal parts: the delta method, the spread over runs and the error each run reports are the same."""
    runs, count, means = 2000, 60, torch.tensor([2.0, -5.0], dtype=torch.float64)
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    draws = torch.randn(runs, count, 2, generator=seeded(), dtype=torch.float64) @ root.T + means
    found = torch.tensor([ratio_of_means(MeanEstimate(run)) for run in draws], dtype=torch.float64)
    ratio = float(means[0] / means[1])
    variance = (torch.tensor([1.0, -ratio], dtype=torch.float64) @ root).square().sum() / means[1] ** 2 / count
    expected = math.sqrt(float(variance))
    assert float(found[:, 0].mean()) == pytest.approx(ratio, abs=5 * expected / math.sqrt(runs))
    assert float(found[:, 0].std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * runs))
    assert float(found[:, 1].mean()) == pytest.approx(expected, rel=0.03)


def test_ratio_without_a_denominator_is_nan():
    zero = MeanEstimate(torch.tensor([[1.0, 1.0], [2.0, -1.0]], dtype=torch.float64))
    assert all(map(math.isnan, ratio_of_means(zero)))
    assert all(map(math.isnan, ratio_of_means(MeanEstimate(torch.tensor([[1.0, math.nan], [1.0, 2.0]]).double()))))
    assert ratio_of_means(MeanEstimate(torch.tensor([[1.0, 2.0]]).double())) == (0.5, math.inf)
