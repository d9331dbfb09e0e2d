"""Intervals, corrections and power against scipy and by hand; how often the rules are wrong, by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_ire.compare.statistics import (
    Difference,
    Searches,
    detectable,
    expected_best,
    holm,
    interval,
    paired,
    power,
    searches,
    seeds_needed,
    told_apart,
)


def test_paired_differences_are_scipys() -> None:
    treated, base = {0: 1.0, 1: 2.5, 2: 2.0, 3: 9.0}, {0: 0.5, 1: 1.0, 2: 2.5}
    one = paired(treated, base)
    reference = stats.ttest_rel([1.0, 2.5, 2.0], [0.5, 1.0, 2.5])
    low, high = reference.confidence_interval(0.95)
    assert (one.mean - one.half, one.mean + one.half) == pytest.approx((low, high))
    assert one.p == pytest.approx(reference.pvalue)
    assert one.pairs == 3
    assert one.spread == pytest.approx(stats.tstd([0.5, 1.5, -0.5]))


def test_one_pair_says_nothing_and_equal_pairs_say_all() -> None:
    assert interval([3.0]) == Difference(3.0, math.inf, 1.0, 1)
    assert interval([3.0]).spread == math.inf
    assert interval([0.5, 0.5]) == Difference(0.5, 0.0, 0.0, 2)
    assert interval([0.0, 0.0]).p == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_power_is_the_share_of_samples_that_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    for difference, seeds, comparisons in ((1.0, 5, 1), (0.7, 10, 3), (-1.5, 4, 1), (0.0, 6, 1)):
        samples = difference + rng.normal(size=(20_000, seeds))
        share = float((stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05 / comparisons).mean())
        assert power(difference, 1.0, seeds, comparisons) == pytest.approx(share, abs=0.012)


def test_power_at_its_ends() -> None:
    assert power(1.0, 2.0, 1) == 0
    assert power(1.0, math.inf, 5) == 0
    assert power(1.0, 0.0, 5) == 1
    assert power(0.0, 0.0, 5) == 0
    assert power(1e6, 1.0, 5) == 1


def test_what_is_detectable_has_the_power_and_needs_the_seeds() -> None:
    for seeds, comparisons in ((3, 1), (5, 2), (20, 6)):
        least = detectable(0.3, seeds, comparisons)
        assert power(least, 0.3, seeds, comparisons) == pytest.approx(0.8, abs=1e-6)
        assert seeds_needed(1.001 * least, 0.3, comparisons) == seeds
        assert seeds_needed(0.95 * least, 0.3, comparisons) > seeds
    assert detectable(1.0, 1) == math.inf
    assert detectable(0.0, 5) == 0
    assert seeds_needed(1e-9, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None


def test_the_luck_of_the_search_by_hand() -> None:
    """Halves of four trials; the first trial of a half in each method's order is what tuning takes."""
    treated, base = {3: 0.8, 1: 0.6, 0: 0.5, 2: 0.7}, {0: 0.6, 1: 0.5, 2: 0.7, 3: 0.9}
    differences = [0.6 - 0.6, 0.5 - 0.6, 0.8 - 0.6, 0.6 - 0.5, 0.8 - 0.5, 0.8 - 0.7]
    found = searches(treated, base)
    assert found.mean == pytest.approx(np.mean(differences))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))))
    assert (found.better, found.worse) == pytest.approx((4 / 6, 1 / 6))
    assert expected_best([0.8, 0.6, 0.5, 0.7]) == pytest.approx([0.65, 4.1 / 6, (3 * 0.8 + 0.6) / 4, 0.8])
    assert searches({0: 1.0}, {0: 1.0}) is None


def test_halves_of_many_trials_are_drawn_and_always_the_same() -> None:
    rng = np.random.default_rng(0)
    values = dict(enumerate(rng.normal(size=24)))
    other = {trial: value - 0.5 for trial, value in values.items()}
    assert searches(values, other) == searches(values, other)
    assert searches(values, other).better == 1


def test_both_kinds_of_luck_are_to_be_excluded() -> None:
    clear, unclear = Difference(1.0, 0.1, 1e-6, 5), Difference(1.0, 1.2, 0.08, 5)
    always, often, never = Searches(1, 0.5, 2, 1, 0), Searches(1, -1, 2, 0.9, 0.1), Searches(-1, -2, -0.5, 0, 1)
    assert told_apart([clear, clear, unclear], [always, often, always]) == [True, False, False]
    assert told_apart([clear._replace(mean=-1.0), clear], [never, never]) == [True, False]
    assert told_apart([clear], [None]) == [True]  # nothing was tuned
    # 96 % of the searches: enough for one comparison, not for two
    most = Searches(1, 0, 2, 0.96, 0.04)
    assert told_apart([clear], [most]) == [True]
    assert told_apart([clear, clear], [most, most]) == [False, False]


def _study(rng, trials, seeds, noise, methods, better=0.0):
    """Methods that are the same, but for `better` of all after the first; each has noise of its own."""
    response = -np.abs(rng.normal(size=trials))  # of trial i, whichever method
    ranked, reported = [], []
    for method in range(methods):
        shift = better * (method > 0)
        order = np.argsort(-(response + rng.normal(size=trials)))
        tuning = response + shift + noise * rng.normal(size=trials)
        ranked.append({int(trial): float(tuning[trial]) for trial in order})
        reported.append(dict(enumerate(response[order[0]] + shift + noise * rng.normal(size=seeds))))
    differences = [paired(one, reported[0]) for one in reported[1:]]
    return told_apart(differences, [searches(one, ranked[0]) for one in ranked[1:]]), differences


@pytest.mark.parametrize(
    ("trials", "seeds", "noise", "methods"),
    [(8, 10, 0.3, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((8, 10, 0.3, 4), (16, 10, 0.3, 3)))],
)
def test_methods_that_are_the_same_are_told_apart_in_few_studies(trials, seeds, noise, methods, capsys) -> None:
    """At most 5 %, counting a study in which any of them is; over seeds alone it is many times as many."""
    rng, studies = np.random.default_rng(0), 300
    ours = alone = 0
    for _ in range(studies):
        apart, differences = _study(rng, trials, seeds, noise, methods)
        ours += any(apart)
        alone += any(p < 0.05 for p in holm([one.p for one in differences]))
    with capsys.disabled():
        print(
            f" [{methods} equal methods told apart: {ours / studies:.1%}, by seeds alone {alone / studies:.1%}] ",
            end="",
        )
    # if it is 5 %, there are at most 23 of 300 in 97.5 % of simulations
    assert ours <= 23
    assert alone > 23


def test_a_real_difference_is_found_with_the_power_that_is_announced() -> None:
    """Where the search has no luck (a flat response), so that seeds alone decide."""
    rng, seeds, studies = np.random.default_rng(1), 6, 1000
    least = detectable(1.0, seeds)
    found = 0
    for _ in range(studies):
        base = rng.normal(size=seeds)
        treated = base + least + rng.normal(size=seeds)
        trials = rng.normal(size=8) * 1e-3
        luck = searches(dict(enumerate(trials + least)), dict(enumerate(trials)))
        found += told_apart([paired(dict(enumerate(treated)), dict(enumerate(base)))], [luck])[0]
    assert found / studies == pytest.approx(0.8, abs=0.04)


def test_a_method_that_is_much_better_is_found_and_a_crippled_one_loses() -> None:
    rng = np.random.default_rng(2)
    for better in (2.0, -2.0):
        studies = [_study(rng, 16, 5, 0.3, 2, better) for _ in range(30)]
        assert sum(apart[0] and np.sign(differences[0].mean) == np.sign(better) for apart, differences in studies) >= 27
