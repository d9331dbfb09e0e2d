"""Which runs a comparison names, and what it makes of their results."""

import math
from typing import Any

import pytest

from lightning_ire import ConfigurationError
from lightning_ire.compare import Choice, Design, Method, Range
from lightning_ire.compare.design import PRICE_SEED, TUNING_SEED, Cell

LR, RHO = {"lr": Range(0.01, 1.0, log=True)}, {"rho": Range(0.1, 0.3)}
SGD, SAM = Method("SGD"), Method("SAM", {"perturbation": "SAM"}, RHO)


def design(**settings: Any) -> Design:
    return Design(**{"methods": [SGD, SAM], "tune": LR, "trials": 4, "seeds": 3, "metric": "v", **settings})


def made(one: Design, value, **more: float) -> dict[Cell, Any]:
    """All runs made, however many stages that takes; `value(cell)` is what they log, None for a failure."""
    results: dict[Cell, Any] = {}
    while todo := [cell for cell in one.plan(results) if cell not in results]:
        for cell in todo:
            logged = value(cell)
            logs = {one.metric: logged, one.report: logged, "compare/steps": 100.0, **more}
            results[cell] = None if logged is None else logs
    return results


def test_ranges_and_choices() -> None:
    assert [Range(0.01, 1.0, log=True).value(share) for share in (0, 0.5, 0.25)] == [0.01, 0.1, 0.0316]
    assert [Range(-1, 1).value(share) for share in (0, 0.5, 0.75)] == [-1, 0, 0.5]
    assert [Choice(("a", "b", "c")).value(share) for share in (0, 0.34, 0.999)] == ["a", "b", "c"]


def test_every_method_has_the_same_points_of_shared_keys() -> None:
    one = design(trials=16)
    for trial in range(16):
        assert one.settings(SGD, trial, {}).items() <= one.settings(SAM, trial, {}).items()
    rates = sorted(one.settings(SGD, trial, {})["lr"] for trial in range(16))
    # one in each sixteenth of the range, as the points of a Sobol sequence are
    assert [int(16 * (math.log10(rate) + 2) / 2 + 1e-2) for rate in rates] == list(range(16))
    assert len({one.settings(SAM, trial, {})["rho"] for trial in range(16)}) == 16


def test_a_methods_own_settings_are_not_tuned() -> None:
    one = design(methods=[SGD, Method("fixed", {"lr": 0.5}, RHO)])
    assert one.settings(one.methods[1], 1, {}).keys() == {"rho"}


def test_more_trials_leave_the_earlier_ones_as_they_are() -> None:
    few, many = design(), design(trials=16, seeds=9)
    assert [few.settings(SAM, trial, {}) for trial in range(4)] == [many.settings(SAM, trial, {}) for trial in range(4)]
    assert few.fingerprint == many.fingerprint
    assert few.fingerprint != design(trials=1).fingerprint  # whose trial 0 is another one
    assert few.fingerprint != design(tune={"lr": Range(0.01, 2.0, log=True)}).fingerprint
    assert few.fingerprint != design(methods=[SGD, Method("SAM", {"perturbation": "ASAM"}, RHO)]).fingerprint


def test_the_best_trial_is_run_with_seeds_that_no_tuning_saw() -> None:
    one = design(tuning_seeds=2)
    assert {cell.seed for cell in one.plan({})} == {TUNING_SEED, TUNING_SEED + 1}
    assert len(one.plan({})) == 2 * 4 * 2
    best = {"SGD": 2, "SAM": 1}
    results = made(one, lambda cell: 1.0 if cell.trial == best[cell.method] else 0.5)
    assert len(results) == one.count == 2 * (4 * 2 + 3)
    for name, trial in best.items():
        assert one.best(name, results) == trial
        assert {cell.seed for cell in results if cell.method == name and cell.seed < 1000} == {0, 1, 2}
        assert {cell.trial for cell in results if cell.method == name and cell.seed < 1000} == {trial}


@pytest.mark.parametrize(("mode", "best"), [("max", 3), ("min", 0)])
def test_more_or_less_is_better_and_a_nan_never(mode: str, best: int) -> None:
    one = design(mode=mode)
    results = made(one, lambda cell: math.nan if cell.trial == 1 else float(cell.trial))
    assert one.best("SGD", results) == best
    assert list(one.ranked(SGD, results))[-1] == 1


def test_a_failed_run_takes_its_trial_out_and_ends_nothing() -> None:
    one = design(tuning_seeds=2)

    def value(cell: Cell) -> float | None:
        if (cell.method, cell.trial, cell.seed) == ("SGD", 3, TUNING_SEED + 1) or (cell.method, cell.seed) == (
            "SAM",
            1,
        ):
            return None
        return float(cell.trial + cell.seed)

    results = made(one, value)
    assert 3 not in one.ranked(SGD, results)
    assert one.best("SGD", results) == 2
    (compared,) = one.compared(results)
    assert (compared.difference.pairs, compared.lost, compared.diverged) == (2, 1, 0)


def test_a_method_without_a_single_run_is_not_compared() -> None:
    one = design(methods=[SGD, SAM, Method("broken")])
    results = made(one, lambda cell: None if cell.method == "broken" else 1.0)
    assert [each.treated for each in one.compared(results)] == ["SAM"]
    assert one.best("broken", results) is None


def test_differences_are_paired_by_seed_and_diverged_seeds_do_not_count() -> None:
    one = design(seeds=4)
    reported = {
        ("SGD", 0): 1.0,
        ("SGD", 1): 2.0,
        ("SGD", 2): 3.0,
        ("SAM", 0): 1.5,
        ("SAM", 1): 2.7,
        ("SAM", 2): math.nan,
    }
    results = made(one, lambda cell: reported.get((cell.method, cell.seed), 5.0))
    (compared,) = one.compared(results)
    assert compared.difference.mean == pytest.approx((0.5 + 0.7 + 0.0) / 3)
    assert (compared.difference.pairs, compared.lost, compared.diverged) == (3, 0, 1)


def test_nothing_is_told_apart_where_runs_diverged_or_the_luck_of_the_search_is_unknown() -> None:
    def better(cell: Cell) -> float:
        return cell.seed % 7 + 0.01 * cell.trial + 5.0 * (cell.method == "SAM")

    for settings, clear in (({"trials": 8}, True), ({"trials": 1}, True), ({"trials": 7}, False),
                            ({"trials": 8, "halving": True}, False)):  # fmt: skip
        one = design(**settings)
        assert [each.clear for each in one.compared(made(one, better))] == [clear]
    one = design(trials=8)
    results = made(one, lambda cell: math.nan if (cell.method, cell.seed) == ("SAM", 2) else better(cell))
    assert [each.clear for each in one.compared(results)] == [False]


def test_on_top_keeps_the_bases_settings_and_waits_for_them() -> None:
    one = design(on_top=True)
    assert {cell.method for cell in one.plan({})} == {"SGD"}
    results = made(one, lambda cell: float(cell.trial == 2))
    kept = one.settings(SGD, 2, results)["lr"]
    assert {one.settings(SAM, trial, results)["lr"] for trial in range(4)} == {kept}
    assert len({one.settings(SAM, trial, results)["rho"] for trial in range(4)}) == 4


def test_halving_stops_all_at_a_quarter_and_runs_the_best_quarter_to_the_end() -> None:
    one = design(trials=8, halving=True)
    assert {cell.stop for cell in one.plan({})} == {0.25}
    early = {"SGD": {6, 1}, "SAM": {0, 5}}
    results = made(one, lambda cell: float(cell.trial in early[cell.method]) if cell.stop < 1 else float(-cell.trial))
    assert len(results) == one.count == 2 * (8 + 2 + 3)
    for name, trials in early.items():
        assert {cell.trial for cell in results if cell.method == name and cell.stop == 1} == trials
        assert one.best(name, results) == min(trials)
    assert one.compared(results)[0].luck is None


@pytest.mark.parametrize(("budget", "runs"), [("passes", 1), ("seconds", 2)])
def test_a_method_with_twice_the_price_has_half_the_steps(budget: str, runs: int) -> None:
    one = design(budget=budget)
    assert [cell.seed - PRICE_SEED for cell in one.plan({})] == [run for run in range(runs) for _ in "ab"]
    results = made(one, lambda cell: 1.0)
    for cell, values in results.items():
        values[f"compare/{budget}"] = 200.0 if cell.method == "SAM" else 100.0
    assert one.length(Cell("SGD", 0, 0), results) == {"max_steps": 100, "max_epochs": -1}
    assert one.length(Cell("SAM", 0, 0), results) == {"max_steps": 50, "max_epochs": -1}
    assert one.length(Cell("SAM", 0, PRICE_SEED), results) == {}
    assert design().length(Cell("SAM", 0, 0), results) == {}
    for values in results.values():
        values["compare/epochs"] = 5.0  # of a run whose length is given in epochs
    assert one.length(Cell("SGD", 0, 0), results) == {"max_steps": 100, "max_epochs": 5}
    assert one.length(Cell("SAM", 0, 0), results) == {"max_steps": 50, "max_epochs": 3}


def test_controls_are_compared_with_what_they_control() -> None:
    methods = [SGD, Method("IRE"), Method("IRE, gamma = 1", control_of="IRE")]
    assert design(methods=methods).pairs == [("IRE", "SGD"), ("IRE", "IRE, gamma = 1")]
    assert design(methods=methods, versus=[("SGD", "IRE")]).pairs[-1] == ("SGD", "IRE")


def test_nothing_to_tune_is_one_trial_in_the_middle() -> None:
    one = design(trials=1)
    assert one.settings(SAM, 0, {}) == {"lr": 0.1, "rho": 0.2}
    results = made(one, lambda cell: float(cell.seed + (cell.method == "SAM")))
    assert one.compared(results)[0].clear  # 1 more for each seed, and no search whose luck it could be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": [SGD]}, "Expected at least two methods to compare, got SGD"),
        ({"methods": [SGD, SGD]}, "Expected methods to have different names, got 'SGD' twice"),
        ({"trials": 0}, "Expected `trials` to be a whole number >= 1, got 0"),
        ({"seeds": 1}, "Expected `seeds` to be a whole number >= 2, got 1"),
        ({"seeds": 2000}, "Expected `seeds` to be at most 1000, got 2000"),
        ({"mode": "more"}, "Expected `mode` to be one of 'max', 'min', got 'more'"),
        ({"budget": "hours"}, "Expected `budget` to be one of 'steps', 'passes', 'seconds', got 'hours'"),
        ({"tune": {}, "methods": [SGD, Method("SAM")]}, "Expected something to tune in 4 trials, got no key"),
        ({"trials": 2, "halving": True}, "Expected at least 4 trials to stop hopeless ones, got 2"),
        ({"versus": [("SAM", "IRE")]}, "Expected methods among SGD, SAM to compare, got 'IRE'"),
        ({"versus": [("SAM", "SAM")]}, "Expected pairs of two methods to compare, got SAM, SAM"),
        ({"methods": "ab"}, "Expected methods to be `Method`s with a name, got 'a'"),
        ({"methods": [SGD, Method(" ")]}, "Expected methods to be `Method`s with a name, got Method"),
        ({"tune": {"lr": [0.1, 0.2]}}, r"Expected what is tuned to be a Range or a Choice, got \[0.1, 0.2\] for 'lr'"),
    ],
)
def test_designs_that_cannot_be_meant(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        design(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Range(1.0, 1.0), "two numbers, the lower one first, got 1 and 1"),
        (lambda: Range(0.0, 1.0, log=True), "two positive numbers, the lower one first, got 0 and 1"),
        (lambda: Choice("ab"), "to be of several values, got the text 'ab'"),
        (lambda: Choice(("a",)), r"at least two values, got \['a'\]"),
    ],
)
def test_ranges_that_cannot_be_meant(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
