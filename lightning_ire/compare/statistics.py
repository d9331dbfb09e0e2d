"""What the differences between methods are worth: intervals, corrections, power, and the luck of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from lightning_ire._checks import ConfigurationError

__all__ = [
    "Difference",
    "Searches",
    "detectable",
    "expected_best",
    "holm",
    "interval",
    "paired",
    "power",
    "searches",
    "seeds_needed",
    "told_apart",
]

LEVEL = 0.05
_MOST_SEARCHES = 20_000  # all 12,870 halves of 16 trials; of more trials so many, drawn at random
_MOST_SEEDS = 10_000


class Difference(NamedTuple):
    """Mean of paired differences, the half width of its 95 % interval (Student's t), p of a two-sided t-test, pairs."""

    mean: float
    half: float
    p: float
    pairs: int

    def show(self, digits: int = 2, scale: float = 1.0) -> str:
        """Return the mean and its interval as text.

        Args:
            digits: Digits behind the point.
            scale: What both are multiplied by; 100 for points of accuracy.

        Returns:
            For example `+0.81 ± 0.30`.
        """
        return f"{scale * self.mean:+.{digits}f} ± {scale * self.half:.{digits}f}"

    @property
    def spread(self) -> float:
        """The sample standard deviation of the differences, as the interval tells it; infinite of one pair."""
        if self.pairs < 2:
            return math.inf
        return self.half * math.sqrt(self.pairs) / float(_scipy().t.ppf(1 - LEVEL / 2, self.pairs - 1))


class Searches(NamedTuple):
    """Of the difference over all searches with half of the trials: mean, central 95 %, shares above and below 0."""

    mean: float
    low: float
    high: float
    better: float
    worse: float

    def show(self, digits: int = 2, scale: float = 100.0) -> str:
        """Return the numbers as text.

        Args:
            digits: Digits behind the point.
            scale: What the differences are multiplied by; 100 for points of accuracy.

        Returns:
            For example `+0.20 (-0.10 to +0.50), 81 %`.
        """
        low, mean, high = (f"{scale * value:+.{digits}f}" for value in (self.low, self.mean, self.high))
        return f"{mean} ({low} to {high}), {100 * self.better:.0f} %"


def interval(values: Sequence[float]) -> Difference:
    """Compare the mean of a sample with 0 (one-sample t-test).

    Args:
        values: The sample; of one value nothing is known about its spread.

    Returns:
        Mean, half width of the 95 % interval, two-sided p, sample size.
    """
    n, average = len(values), fmean(values)
    if n < 2:
        return Difference(average, math.inf, 1.0, n)
    error = stdev(values) / math.sqrt(n)
    if error == 0:
        return Difference(average, 0.0, float(average == 0), n)
    t = _scipy().t
    return Difference(
        average, float(t.ppf(1 - LEVEL / 2, n - 1) * error), float(2 * t.sf(abs(average) / error, n - 1)), n
    )


def paired(treated: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Return treated minus base, over the seeds that both have.

    Args:
        treated: Values by seed.
        base: Values by seed.

    Returns:
        The mean difference, with its interval.
    """
    return interval([treated[seed] - base[seed] for seed in sorted(treated.keys() & base.keys())])


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p-values for so many comparisons, such that a false one among them is found in at most 5 % of studies.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Args:
        ps: p-values.

    Returns:
        Adjusted p-values, in the same order, to be compared with the level of one test.
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def power(difference: float, spread: float, seeds: int, comparisons: int = 1) -> float:
    """Return the probability that a paired t-test sees a true difference.

    It is the two-sided test at level 5 % / comparisons (the first step of Holm's procedure; so of several comparisons
    this is a lower bound), by the noncentral t distribution.

    Args:
        difference: The true mean difference.
        spread: Standard deviation of the differences by seed.
        seeds: Pairs.
        comparisons: How many comparisons the study makes.

    Returns:
        A probability.
    """
    if seeds < 2 or not math.isfinite(spread):
        return 0.0
    if spread == 0:
        return float(difference != 0)
    stats = _scipy()
    critical = stats.t.ppf(1 - LEVEL / comparisons / 2, seeds - 1)
    shift = abs(difference) / spread * math.sqrt(seeds)
    seen = float(stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift))
    return seen if math.isfinite(seen) else 1.0  # scipy: a shift so large that nothing else is possible


def detectable(spread: float, seeds: int, comparisons: int = 1, wanted: float = 0.8) -> float:
    """Return the smallest true difference that is seen with a probability of `wanted`.

    Args:
        spread: Standard deviation of the differences by seed.
        seeds: Pairs.
        comparisons: How many comparisons the study makes.
        wanted: The power.

    Returns:
        The difference; infinite where there are fewer than two seeds.
    """
    if seeds < 2 or not math.isfinite(spread):
        return math.inf
    if spread == 0:
        return 0.0
    low, high = 0.0, spread
    while power(high, spread, seeds, comparisons) < wanted:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, spread, seeds, comparisons) >= wanted else (middle, high)
    return high


def seeds_needed(difference: float, spread: float, comparisons: int = 1, wanted: float = 0.8) -> int | None:
    """Return how many seeds see a true difference with a probability of `wanted`.

    Args:
        difference: The true mean difference.
        spread: Standard deviation of the differences by seed.
        comparisons: How many comparisons the study makes.
        wanted: The power.

    Returns:
        The number of pairs, at least 2; None: more than 10,000.
    """
    if difference == 0 or power(difference, spread, _MOST_SEEDS, comparisons) < wanted:
        return None
    low, high = 1, _MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, spread, middle, comparisons) >= wanted else (middle, high)
    return high


def told_apart(differences: Sequence[Difference], found: Sequence[Searches | None]) -> list[bool]:
    """Say which differences are neither the luck of the seeds nor that of the search.

    The first: p after Holm's correction is below 5 %. The second: the sign is the same in all but 5 % / comparisons of
    the searches with half of the trials. Both are needed: two methods that are the same, each tuned with 8 to 16 noisy
    trials, end at different settings, of which one is truly better, so that a test over seeds alone tells them apart in
    8 to 70 % of studies, the more often the more seeds it has; with both rules it is less than 5 %
    (tests/compare/test_statistics.py simulates it).

    Args:
        differences: Of all comparisons.
        found: The luck of the search of each; None: nothing was tuned, so there is none.

    Returns:
        One truth value for each.
    """
    adjusted = holm([one.p for one in differences])
    few = LEVEL / max(len(differences), 1)
    return [
        p < LEVEL and (luck is None or (luck.better if one.mean > 0 else luck.worse) >= 1 - few)
        for one, p, luck in zip(differences, adjusted, found, strict=True)
    ]


def expected_best(values: Sequence[float]) -> list[float]:
    """Return what a search of n of the trials finds on average, n = 1, 2, ... (all sets equally likely).

    Args:
        values: What each trial reports, the best in validation first.

    Returns:
        One number for each n; the first is the mean: settings that nobody tuned.
    """
    total = len(values)
    return [
        sum(
            math.comb(total - 1 - place, n - 1) / math.comb(total, n) * value
            for place, value in enumerate(values[: total - n + 1])
        )
        for n in range(1, total + 1)
    ]


def searches(treated: Mapping[int, float], base: Mapping[int, float]) -> Searches | None:
    """Return the difference between two methods, each tuned with the same half of the trials, in all ways.

    Half of the trials in place of all tell how much of a difference is the luck of the search: the variance of a mean
    over halves, drawn without replacement, is that of the mean over all trials.

    Args:
        treated: What each trial reports, by its number, the best in validation first.
        base: The same of the other method.

    Returns:
        Mean, central 95 % and the shares of searches in which `treated` has more and less; None of fewer than two
        trials. Of more than 16 trials 20,000 halves are drawn, always the same.
    """
    both = sorted(treated.keys() & base.keys())
    if len(both) < 2:
        return None
    half = len(both) // 2
    if math.comb(len(both), half) <= _MOST_SEARCHES:
        halves = np.array(list(combinations(range(len(both)), half)))
    else:
        halves = np.random.default_rng(0).random((_MOST_SEARCHES, len(both))).argsort(1)[:, :half]
    found = []
    for values in (treated, base):
        order = list(values)
        places = np.array([order.index(trial) for trial in both])
        best = np.take_along_axis(halves, places[halves].argmin(1)[:, None], 1)[:, 0]
        found.append(np.array([values[trial] for trial in both])[best])
    difference = found[0] - found[1]
    low, high = np.quantile(difference, (LEVEL / 2, 1 - LEVEL / 2))
    return Searches(
        float(difference.mean()),
        float(low),
        float(high),
        *(float(one.mean()) for one in (difference > 0, difference < 0)),
    )


def _scipy() -> Any:
    try:
        from scipy import stats  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError("A comparison needs scipy: pip install 'lightning-ire[compare]'") from error
    return stats
