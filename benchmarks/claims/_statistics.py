"""Means, paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

__all__ = ["Difference", "holm", "interval", "paired"]


class Difference(NamedTuple):
    """Mean of paired differences, the half width of its 95 % interval (Student's t), p of a two-sided t-test, pairs."""

    mean: float
    half: float
    p: float
    pairs: int

    def show(self, digits: int = 2, scale: float = 1.0) -> str:
        return f"{scale * self.mean:+.{digits}f} ± {scale * self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Difference:
    """Of one sample: its mean against 0."""
    n, average = len(values), mean(values)
    if n < 2:
        return Difference(average, math.inf, 1.0, n)
    error = stdev(values) / math.sqrt(n)
    if error == 0:
        return Difference(average, 0.0, float(average == 0), n)
    p = 2 * stats.t.sf(abs(average) / error, n - 1)
    return Difference(average, stats.t.ppf(0.975, n - 1) * error, float(p), n)


def paired(treated: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Treated minus base, over the seeds that both have."""
    return interval([treated[seed] - base[seed] for seed in sorted(treated.keys() & base.keys())])


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for so many comparisons (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
