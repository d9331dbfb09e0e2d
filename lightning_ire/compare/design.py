"""Who is compared and how: methods, what is tuned, which runs that takes, and what their results say.

Nothing here trains: a `Design` names the runs that are to be made, given those that are done, until it names no more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.compare.statistics import Difference, Searches, holm, paired, searches, told_apart

__all__ = ["BUDGETS", "Cell", "Choice", "Comparison", "Design", "Method", "Range", "Ranked", "Results", "Values"]

BUDGETS = ("steps", "passes", "seconds")
TUNING_SEED, PRICE_SEED = 1000, 2000  # and the following ones; reporting seeds are 0, 1, ...
FEW_TRIALS = 8  # with fewer, the luck of a search is not known: tests/compare/test_statistics.py
HALVING = 4  # of so many trials one goes on to the end, after a run that was stopped at this part of it
PRICE_RUNS = {"steps": 0, "passes": 1, "seconds": 2}  # whole runs of each method that tell what a step costs

Values = Mapping[str, float]
"""What a run has logged at its end, by tag."""


@dataclass(frozen=True)
class Range:
    """Values between two numbers, evenly spread (`log`: over their logarithms), rounded to three digits.

    Args:
        low: The lowest value.
        high: The highest one.
        log: Whether values are spread evenly over the logarithm; both bounds are positive then.

    Raises:
        ConfigurationError: If the bounds are no numbers in ascending order.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            check_number(name, value, low=-math.inf)
        if not self.low < self.high or (self.log and self.low <= 0):
            positive = "positive numbers" if self.log else "numbers"
            raise ConfigurationError(
                f"Expected a range to be two {positive}, the lower one first, got {self.low:g} and {self.high:g}."
            )

    def value(self, share: float) -> float:
        """Return the value at a share in [0, 1) of the range."""
        if self.log:
            return float(f"{self.low * (self.high / self.low) ** share:.3g}")
        return float(f"{self.low + (self.high - self.low) * share:.3g}")


@dataclass(frozen=True)
class Choice:
    """One of several values, each for an equal share of the trials.

    Args:
        values: The values: numbers, words, true or false.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            raise ConfigurationError(f"Expected a choice to be of several values, got the text {self.values!r}.")
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) < 2:
            raise ConfigurationError(f"Expected a choice to be of at least two values, got {list(self.values)}.")

    def value(self, share: float) -> Any:
        """Return the value at a share in [0, 1)."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True)
class Method:
    """What is compared.

    Args:
        name: What reports call it.
        settings: What makes it this method, handed to every run of it.
        tune: What is tuned of it alone, beside what is tuned of all methods; but no key that its `settings` have.
        control_of: The method that this one is a control of: as many coordinates boosted, but not the flat ones.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Range | Choice] = field(default_factory=dict)
    control_of: str | None = None


class Cell(NamedTuple):
    """One run: seeds from 1000 on are for tuning; `stop` is the share of the run at which it is stopped."""

    method: str
    trial: int
    seed: int
    stop: float = 1.0

    @property
    def name(self) -> str:
        """What lines of progress call it."""
        part = "" if self.stop == 1 else f", stopped at {self.stop:.0%}"
        return f"{self.method}, trial {self.trial}, seed {self.seed}{part}"


Results = Mapping[Cell, Values | None]
"""The runs that have ended; None: failed."""


class Ranked(NamedTuple):
    """A trial: the mean over the tuning seeds of what it is chosen by (more is better), and of what is reported."""

    score: float
    value: float


class Comparison(NamedTuple):
    """A method beside its base: the paired difference, p after Holm's correction, luck of the search, verdict."""

    treated: str
    base: str
    difference: Difference
    adjusted: float
    luck: Searches | None
    clear: bool
    lost: int
    """Seeds that failed in one of the two, and do not count."""
    diverged: int
    """Runs of the two, with reporting seeds, that ended with NaN or infinity; nothing is told apart then."""


@dataclass(frozen=True)
class Design:
    """A comparison at equal effort: the same number of trials for every method, at the same points of shared keys.

    Trial i of every method has the values of point i of a scrambled Sobol sequence, which has one coordinate for each
    key, whoever tunes it. Trials are ranked by `metric` over tuning seeds that are not reported; the best one is run
    with the reporting seeds, and differences of `report` are paired by seed.

    Args:
        methods: At least two; the first is the base that the others are compared with.
        tune: What is tuned of all methods, by key; see `Method.tune`.
        trials: Settings that are tried of each method; 1: its values are the middle of the ranges, nothing is tuned.
        seeds: Reporting seeds, 0, 1, ...; at least 2.
        tuning_seeds: Runs of each trial, with the seeds 1000, 1001, ...
        metric: What trials are chosen by.
        report: What is compared; by default the same.
        mode: Whether more of the metric is better, "max", or less, "min".
        report_mode: The same of what is reported; by default as `mode`.
        budget: What all methods have as much of: "steps"; "passes" or "seconds": of what the base's run takes, by a
            price that is measured in whole runs of each method, with seeds of their own.
        on_top: Whether methods keep the base's tuned settings of shared keys and spend their trials on their own keys.
        halving: Whether trials are stopped at a quarter of the run, and the best quarter of them is run to the end.
        versus: Further pairs (treated, base) to compare.

    Raises:
        ConfigurationError: If there are fewer than two methods, or a value is out of range.
    """

    methods: Sequence[Method]
    tune: Mapping[str, Range | Choice] = field(default_factory=dict)
    trials: int = 16
    seeds: int = 5
    tuning_seeds: int = 1
    metric: str = "val/accuracy"
    report: str = ""
    mode: str = "max"
    budget: str = "steps"
    on_top: bool = False
    halving: bool = False
    versus: Sequence[tuple[str, str]] = ()
    report_mode: str = ""

    def __post_init__(self) -> None:
        names = [str(getattr(method, "name", method)) for method in self.methods]
        if len(names) < 2:
            raise ConfigurationError(f"Expected at least two methods to compare, got {', '.join(names) or 'none'}.")
        if wrong := [one for one in self.methods if not isinstance(one, Method) or not str(one.name).strip()]:
            raise ConfigurationError(f"Expected methods to be `Method`s with a name, got {wrong[0]!r}.")
        tuned = [*self.tune.items(), *(pair for method in self.methods for pair in method.tune.items())]
        if odd := next(((key, how) for key, how in tuned if not isinstance(how, (Range, Choice))), None):
            raise ConfigurationError(
                f"Expected what is tuned to be a Range or a Choice, got {odd[1]!r} for {odd[0]!r}."
            )
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigurationError(f"Expected methods to have different names, got {twice!r} twice.")
        for name, value, low in (
            ("trials", self.trials, 1),
            ("seeds", self.seeds, 2),
            ("tuning_seeds", self.tuning_seeds, 1),
        ):
            check_whole(name, value, low=low)
            if value > TUNING_SEED:
                raise ConfigurationError(f"Expected `{name}` to be at most {TUNING_SEED}, got {value}.")
        check_choice("mode", self.mode, ("max", "min"))
        check_choice("report_mode", self.report_mode or self.mode, ("max", "min"))
        check_choice("budget", self.budget, BUDGETS)
        for pair in self.versus:
            if len(set(pair)) != 2:
                raise ConfigurationError(f"Expected pairs of two methods to compare, got {', '.join(pair)}.")
            if unknown := set(pair) - set(names):
                raise ConfigurationError(
                    f"Expected methods among {', '.join(names)} to compare, got {unknown.pop()!r}."
                )
        if self.trials > 1 and not any(self.tuned(method) for method in self.methods):
            raise ConfigurationError(
                f"Expected something to tune in {self.trials} trials, got no key: name one with its range, or set the "
                "number of trials to 1."
            )
        if self.halving and self.trials < HALVING:
            raise ConfigurationError(f"Expected at least {HALVING} trials to stop hopeless ones, got {self.trials}.")
        object.__setattr__(self, "report", self.report or self.metric)
        object.__setattr__(self, "report_mode", self.report_mode or self.mode)

    @property
    def base(self) -> Method:
        """The first method."""
        return self.methods[0]

    @cached_property
    def by_name(self) -> dict[str, Method]:
        """The methods by their names."""
        return {method.name: method for method in self.methods}

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared: each method with the base, its controls with it, and the pairs that were asked for."""
        found = [
            (method.control_of, method.name) if method.control_of else (method.name, self.base.name)
            for method in self.methods[1:]
        ]
        return list(dict.fromkeys([*found, *(tuple(pair) for pair in self.versus)]))  # type: ignore[list-item]

    @property
    def fingerprint(self) -> str:
        """What must not change while runs are added; seeds may become more, and trials, of which there were some."""
        free = ("trials", "seeds", "tuning_seeds", "report", "report_mode", "versus")
        made = {key: value for key, value in asdict(self).items() if key not in free}
        made["tuned"] = self.trials > 1  # a single trial is in the middle of the ranges
        return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()

    def tuned(self, method: Method) -> dict[str, Range | Choice]:
        """Return what is tuned of a method: not what makes it this method."""
        keys = {**self.tune, **method.tune}
        return {key: how for key, how in keys.items() if key not in method.settings}

    @cached_property
    def _points(self) -> list[dict[str, float]]:
        """The coordinates of each trial in the unit cube, by key."""
        keys = list(dict.fromkeys(key for method in self.methods for key in self.tuned(method)))
        if self.trials == 1 or not keys:
            return [dict.fromkeys(keys, 0.5)] * self.trials
        sobol = torch.quasirandom.SobolEngine(len(keys), scramble=True, seed=0)
        return [dict(zip(keys, point, strict=True)) for point in sobol.draw(self.trials).tolist()]

    def settings(self, method: Method, trial: int, results: Results) -> dict[str, Any]:
        """Return the tuned values of a trial by key; on top of the base's, the shared ones are the base's best."""
        values = {key: how.value(self._points[trial][key]) for key, how in self.tuned(method).items()}
        if self.on_top and method is not self.base:
            best = next(iter(self.ranked(self.base, results)), None)
            kept = {} if best is None else self.settings(self.base, best, results)
            values |= {key: value for key, value in kept.items() if key in values and key in self.tune}
        return values

    # Which runs

    def plan(self, results: Results) -> list[Cell]:
        """Return all runs that are known to be needed, done or not; more are known once these have ended."""
        prices = [
            Cell(method.name, 0, PRICE_SEED + run) for run in range(PRICE_RUNS[self.budget]) for method in self.methods
        ]
        planned = list(prices)
        if not all(cell in results for cell in prices):
            return planned
        for method in self.methods:
            if self.on_top and method is not self.base and not self._is_tuned(self.base, results):
                continue
            for stage in self._stages(method, results):
                planned += stage
                if not all(cell in results for cell in stage):
                    break
        return planned

    @property
    def count(self) -> int:
        """How many runs there will be, if none fails."""
        whole = max(self.trials // HALVING, 1) if self.halving else 0
        each = self.trials * self.tuning_seeds + whole * self.tuning_seeds + self.seeds
        return len(self.methods) * (each + PRICE_RUNS[self.budget])

    def _stages(self, method: Method, results: Results) -> Any:
        """Yield lists of runs, of which each is needed when the ones before have ended."""
        trials = list(range(self.trials))
        if self.halving:
            yield [cell for trial in trials for cell in self._tries(method, trial, 1 / HALVING)]
            ranked = list(self.ranked(method, results, 1 / HALVING))
            trials = sorted(ranked[: max(self.trials // HALVING, 1)])
        yield [cell for trial in trials for cell in self._tries(method, trial)]
        best = next(iter(self.ranked(method, results)), None)
        yield [] if best is None else [Cell(method.name, best, seed) for seed in range(self.seeds)]

    def _tries(self, method: Method, trial: int, stop: float = 1.0) -> list[Cell]:
        return [Cell(method.name, trial, TUNING_SEED + seed, stop) for seed in range(self.tuning_seeds)]

    def _is_tuned(self, method: Method, results: Results) -> bool:
        *tuning, _ = self._stages(method, results)
        return all(cell in results for stage in tuning for cell in stage)

    # What the results say

    def ranked(self, method: Method, results: Results, stop: float = 1.0) -> dict[int, Ranked]:
        """Return the trials all of whose runs are done, the best first; NaN is the worst, of equals the first wins."""
        sign, found = 1 if self.mode == "max" else -1, {}
        for trial in range(self.trials):
            runs = [results.get(cell) for cell in self._tries(method, trial, stop)]
            if all(run is not None for run in runs):
                score = fmean(sign * run[self.metric] for run in runs if run is not None)
                value = fmean(run.get(self.report, math.nan) for run in runs if run is not None)
                found[trial] = Ranked(-math.inf if math.isnan(score) else score, value)
        return dict(sorted(found.items(), key=lambda one: -one[1].score))

    def best(self, method: str, results: Results) -> int | None:
        """Return the number of the best trial; None: no run of this method is done."""
        return next(iter(self.ranked(self.by_name[method], results)), None)

    def reported(self, method: str, results: Results, tag: str = "") -> dict[int, float]:
        """Return a value (by default the reported one) of the best trial by reporting seed."""
        best, found = self.best(method, results), {}
        for seed in range(self.seeds if best is not None else 0):
            values = results.get(Cell(method, best or 0, seed))
            if values is not None and (tag or self.report) in values:
                found[seed] = values[tag or self.report]
        return found

    def compared(self, results: Results) -> list[Comparison]:
        """Return all comparisons of which both methods have been run."""
        found = []
        for treated, base in self.pairs:
            values = [self.reported(method, results) for method in (treated, base)]
            finite = [{seed: one for seed, one in each.items() if math.isfinite(one)} for each in values]
            diverged = sum(len(every) - len(some) for every, some in zip(values, finite, strict=True))
            lost = self.seeds - len(values[0].keys() & values[1].keys())
            if finite[0].keys() & finite[1].keys():
                luck = self._luck(treated, base, results)
                found.append(Comparison(treated, base, paired(*finite), 1.0, luck, False, lost, diverged))
        adjusted = holm([one.difference.p for one in found])
        clear = told_apart([one.difference for one in found], [one.luck for one in found])
        return [
            one._replace(adjusted=p, clear=apart and self.knows_luck and not one.diverged)
            for one, p, apart in zip(found, adjusted, clear, strict=True)
        ]

    @property
    def knows_luck(self) -> bool:
        """Whether the luck of the search is known, or there was no search."""
        return self.trials == 1 or (self.trials >= FEW_TRIALS and not self.halving)

    def _luck(self, treated: str, base: str, results: Results) -> Searches | None:
        """The luck of the search; unknown where few of the trials ran to the end."""
        if self.trials < 2 or self.halving:
            return None
        ranked = [self.ranked(self.by_name[name], results) for name in (treated, base)]
        finite = [{trial: one.value for trial, one in each.items() if math.isfinite(one.value)} for each in ranked]
        if self.on_top and base == self.base.name and finite[1]:  # the base's search is over before the other begins
            finite[1] = dict.fromkeys(finite[0], next(iter(finite[1].values())))
        return searches(*finite)

    def price(self, method: str, results: Results, tag: str) -> float:
        """Return passes or seconds of a step of a method; NaN where no run says it."""
        made = {
            cell: values[tag] / values["compare/steps"]
            for cell, values in results.items()
            if cell.method == method and cell.stop == 1 and values and values.get("compare/steps") and tag in values
        }
        use = [price for cell, price in made.items() if cell.seed >= PRICE_SEED] or [*made.values()]
        return sorted(use)[(len(use) - 1) // 2] if use else math.nan

    def length(self, cell: Cell, results: Results) -> dict[str, int]:
        """Return the Trainer's arguments for as many passes or seconds as the base's run; none: as it is given."""
        if self.budget == "steps" or cell.seed >= PRICE_SEED:
            return {}
        base = results.get(Cell(self.base.name, 0, PRICE_SEED))
        ratio = self.price(self.base.name, results, tag := f"compare/{self.budget}") / self.price(
            cell.method, results, tag
        )
        if not base or not math.isfinite(ratio):
            return {}
        # a run that is given in epochs keeps to them: schedules may count them
        epochs = math.ceil(ratio * base["compare/epochs"]) if "compare/epochs" in base else -1
        return {"max_steps": max(1, round(ratio * base["compare/steps"])), "max_epochs": epochs}
