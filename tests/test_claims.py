"""The verdicts are those of the committed runs, nothing planned is missing, and what they rest on is right."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from claims import __main__ as main
from claims import accuracy, drift, language
from claims._inverted import InvertedFisher
from claims._runs import Runs, _key, collect

from lightning_ire import SampledFisher
from lightning_ire.compare.statistics import expected_best
from lightning_ire.curvature import Estimate


def test_the_readme_and_the_page_say_what_the_runs_say() -> None:
    assert main.PAGE.read_text() == main.page(), "call make claims"
    text = main.README.read_text()
    assert text.split(main.BEGIN)[1].split(main.END)[0] == main.summary(), "call make claims"


def test_what_the_readme_quotes_in_its_text_is_measured() -> None:
    text = " ".join(main.README.read_text().split())
    runs = main.known("language")

    def loss(**settings: object) -> str:
        ((_, result),) = runs.where(task="bytes", seed=language.TUNING_SEED, **settings)
        return f"{result['val_loss']:.3f}"

    treated = loss(method="AdmIRE", lr=4.8e-3, kappa=3.0)
    base, twice = (loss(method="AdamW", lr=lr) for lr in (4.8e-3, 9.6e-3))
    assert f"(validation loss {treated} against {base} nats in one trial), and so does AdamW at twice" in text
    assert f"that rate ({twice})" in text

    masks = json.loads((main.ROOT / "benchmarks" / "results" / "mask_agreement.json").read_text())["runs"]
    quoted = {
        "SampledFisher()": "the paper's estimate reaches {:.2f}",
        "SampledFisher(form='micro_batch', micro_batch_size=16)": "micro-batches of 16 give {:.2f}",
        "SampledFisher(form='sample')": "single samples {:.2f}",
        "EmpiricalFisher()": "`EmpiricalFisher` {:.2f}",
        "HutchinsonHessian()": "`HutchinsonHessian` {:.2f}",
        "RandomMask()": "`RandomMask` {:.2f}",
    }
    assert quoted.keys() == masks.keys()
    for name, words in quoted.items():
        assert words.format(masks[name]["mask_iou"]) in text
        assert f"chance is {masks[name]['mask_iou_chance']:.2f}" in text


@pytest.mark.parametrize("name", main.CLAIMS)
def test_nothing_is_missing_or_left_over(name: str) -> None:
    runs = main.known(name)
    planned = main.claim(name).plan("full", runs)
    assert all(settings in runs for settings in planned)
    assert {_key(settings) for settings, _ in runs} <= set(map(_key, planned)), "a run that no table needs"
    assert planned or name == "step_cost"


@pytest.mark.parametrize("name", sorted(set(main.CLAIMS) - {"step_cost"}))
def test_full_contains_default(name: str) -> None:
    runs = main.known(name)
    small, large = (main.claim(name).plan(size, runs) for size in ("default", "full"))
    assert set(map(_key, small)) <= set(map(_key, large))


@pytest.mark.parametrize(
    ("name", "setting", "missing"),
    [
        pytest.param("accuracy", "method", {*accuracy.ON_TOP, *accuracy.CONTROLS}, marks=pytest.mark.slow),
        ("language", "task", {"bpe", "unclipped"}),
        ("ablations", "task", {"bytes"}),
    ],
)
def test_what_only_full_has_may_be_missing(
    name: str, setting: str, missing: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, all_runs, runs = main.claim(name), main.known(name), Runs()
    for settings, result in all_runs:
        if settings[setting] not in missing:
            runs.add(settings, result)
    monkeypatch.setattr(module, "FIGURES", tmp_path)
    module.draw(runs)
    assert (tmp_path / f"{name}.png").exists()
    for said in (module.tables, lambda some: module.verdict(some).sentence):
        assert said(all_runs) != said(runs)
    for one in missing:
        assert one in module.tables(all_runs)
        assert one not in module.tables(runs)


@pytest.mark.parametrize("kappa", [0.0, 90.0, 900.0, 9000.0])
def test_figure_1_is_reproduced_to_the_digit(kappa: float) -> None:
    settings = {"eta": 1.0, "kappa": kappa}
    known = main.known("trajectories")[settings]
    again = main.claim("trajectories").measure(settings)
    paths = (torch.tensor(one["path"], dtype=torch.float64) for one in (again, known))
    torch.testing.assert_close(*paths, rtol=1e-12, atol=1e-300)
    assert again["error"] < 1e-12


@pytest.mark.parametrize("problem", drift.PROBLEMS)
def test_drift_jacobians_and_projections(problem: str) -> None:
    one = drift.PROBLEMS[problem]
    theta = one.start + 0.1 * torch.randn(3, len(one.start), dtype=torch.float64)
    expected = torch.func.vmap(torch.func.jacrev(lambda weights: one.residuals(weights[None])[0]))(theta)
    jacobian = one.jacobian(theta)
    torch.testing.assert_close(jacobian, expected)
    minimum = drift.to_minimum(one, theta)
    assert one.residuals(minimum).abs().max() < 1e-10
    flat = torch.eye(len(one.start), dtype=torch.float64) - drift.pseudo_inverse(jacobian) @ jacobian
    torch.testing.assert_close(flat @ flat, flat)
    hessian = torch.func.vmap(torch.func.hessian(lambda weights: one.residuals(weights[None]).square().mean() / 2))
    torch.testing.assert_close(hessian(minimum).diagonal(dim1=1, dim2=2).sum(1), one.trace(minimum))


@pytest.mark.parametrize("method", drift.METHODS)
def test_drift_of_the_toy_is_measured_again(method: str) -> None:
    """The longest of its boosted runs takes a second."""
    settings, known = main.known("drift").where(problem="toy", method=method, part="ratio", kappa=30.0)[0]
    again = drift.measure(settings)
    assert again["falls"] == pytest.approx(known["falls"], rel=1e-3)
    assert again["predicted"] == pytest.approx(known["predicted"], rel=1e-3)


def _search(scores: dict[str, list[float]], tests: dict[str, list[float]]) -> Runs:
    """Tuning runs of two seeds, whose means these are."""
    runs = Runs()
    for method, values in scores.items():
        for trial, (score, test) in enumerate(zip(values, tests[method], strict=True)):
            for seed, shift in ((1000, 0.1), (1001, -0.1)):
                settings = {"split": "digits", "method": method, "trial": trial, "seed": seed}
                result = {"val_accuracy": score + shift, "val_loss": 0.0, "test_accuracy": test - shift}
                runs.add(settings, result)
    return runs


def test_the_luck_of_the_search_by_hand() -> None:
    """Halves of four trials; by validation SAM takes trial 3, 1, 0, 2 and SGD 0, 1, 2, 3, whichever comes first."""
    runs = _search(
        {"SAM": [0.2, 0.3, 0.1, 0.4], "SGD": [0.4, 0.3, 0.2, 0.1]},
        {"SAM": [0.5, 0.6, 0.7, 0.8], "SGD": [0.6, 0.5, 0.7, 0.9]},
    )
    assert accuracy.chosen(runs, "digits", "SAM")["trial"] == 3
    halves = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    differences = [0.6 - 0.6, 0.5 - 0.6, 0.8 - 0.6, 0.6 - 0.5, 0.8 - 0.5, 0.8 - 0.7]
    found = accuracy.luck(runs, "digits", "SAM", "SGD")
    assert found.mean == pytest.approx(sum(differences) / len(halves))
    assert found.better == pytest.approx(4 / 6)
    low, high = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (found.low, found.high) == pytest.approx((low, high))
    # with n trials: the mean over all; of the halves 0.6 0.5 0.8 0.6 0.8 0.8; of three: 0.8 but for (0, 1, 2); trial 3
    expected = [0.65, 4.1 / 6, (3 * 0.8 + 0.6) / 4, 0.8]
    assert expected_best([*accuracy._by_trial(runs, "digits", "SAM").values()]) == pytest.approx(expected)


def test_controls_are_tuned_like_what_they_control() -> None:
    for method, one in accuracy.CONTROLS.items():
        for trial in range(16):
            own, other = (accuracy._point(each, trial) for each in (method, one))
            if method.endswith("gamma = 1"):
                assert own.pop("gamma") == 1
                assert other.pop("gamma") < 1
            assert own == other


def test_runs_say_what_machine_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path / "runs.json")
    for hardware, count in (("slow", 1), ("fast", 2)):
        monkeypatch.setattr("workloads.machine", lambda device, name=hardware: {"hardware": name, "threads": 8})
        for number in range(count):
            runs.add({"hardware": hardware, "number": number}, {"x": 0})
    expected = [({"hardware": "fast", "threads": 1}, 2), ({"hardware": "slow", "threads": 1}, 1)]
    assert runs.machines() == expected
    assert Runs(tmp_path / "runs.json").machines() == expected


def test_runs_are_found_by_any_of_their_settings() -> None:
    runs = Runs()
    runs.add({"x": 1, "seed": 0}, {"y": 1})
    assert [result["y"] for _, result in runs.where(x=1)] == [1]
    runs.add({"x": 1, "seed": 1}, {"y": 2})
    runs.add({"x": 2, "seed": 0}, {"y": 3})
    assert [result["y"] for _, result in runs.where(x=1)] == [1, 2]
    assert [result["y"] for _, result in runs.where(seed=0)] == [1, 3]
    assert runs.where(x=3) == []


@pytest.mark.slow
def test_runs_are_remembered_and_a_plan_may_depend_on_results(tmp_path: Path) -> None:
    def plan(runs: Runs) -> list[dict]:
        first = [{"x": x} for x in (-3.0, -2.0)]
        best = max((result["y"] for _, result in runs), default=None)
        return first + ([{"x": best}] if len(runs) >= 2 else [])

    file = tmp_path / "runs.json"
    runs = Runs(file)
    collect(runs, plan, _double, "test", processes=1)
    assert [settings["x"] for settings, _ in runs] == [-3.0, -2.0, -4.0]
    again = Runs(file)
    assert sorted(map(str, again)) == sorted(map(str, runs))
    collect(again, plan, _fails, "test", processes=1)  # makes none
    with pytest.raises(ZeroDivisionError):
        collect(again, lambda known: [{"x": 7.0}], _fails, "test", processes=1)
    assert len(Runs(file)) == 3


def _double(settings: dict) -> dict:
    return {"y": 2 * settings["x"]}


def _fails(settings: dict) -> dict:
    return {"y": 1 / 0}


def test_every_method_has_as_many_trials() -> None:
    empty = Runs()
    for module, size in itertools.product((accuracy, language), ("default", "full")):
        counts: dict[tuple, int] = {}
        for settings in module.plan(size, empty):
            key = settings.get("split") or settings["task"], settings["method"]
            counts[key] = counts.get(key, 0) + 1
            assert settings["seed"] >= 1000, "nothing is reported before it is tuned"
        assert len(set(counts.values())) == 1


def test_a_coarse_grid_is_a_part_of_the_grid() -> None:
    runs = main.known("language")
    points = language._points("bytes", "AdmIRE", "full")
    assert language.chosen(runs, "bytes", "AdmIRE")["lr"] in {one["lr"] for one in points} - set(language.COARSE)
    assert language.chosen(runs, "bytes", "AdmIRE", language.COARSE)["lr"] in language.COARSE
    assert {one.pairs for one in language.coarse(runs).values()} == {8}


def test_the_inverted_mask_prefers_the_sharpest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(Estimate):
        def finish(self) -> list[torch.Tensor | None]:
            return [torch.tensor([3.0, 0.0, 1.0]), None]

    monkeypatch.setattr(SampledFisher, "begin", lambda self, window: Known())
    values, nothing = InvertedFisher().begin(None).finish()
    assert nothing is None
    assert values.isfinite().all()
    assert values.argsort().tolist() == [0, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(main.CLAIMS) - {"step_cost"}))
def test_a_tiny_claim_is_measured(name: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.json")
    module = main.claim(name)
    collect(runs, partial(_a_few, module), module.measure, name, processes=2)
    assert len(runs) >= 2
    for _, result in runs:
        numbers = itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in result.values())
        assert all(math.isfinite(one) for one in numbers if isinstance(one, float))


def _a_few(module, runs: Runs) -> list[dict]:
    """Runs of each stage of the plan."""
    planned = module.plan("tiny", runs)
    return planned[:: max(1, len(planned) // 8)] if len(runs) == 0 else [one for one in planned if one in runs]
