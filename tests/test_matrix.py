"""The parity matrix: plain Lightning, and the same run with passes and estimates that change nothing, bit for bit."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from matrix.rows import ROWS
from matrix.runs import Row, assert_same, estimated, forced, run
from matrix.table import COMPATIBILITY, ELSEWHERE, compatibility_table
from modules import Classifier, TakesTheIterator

from lightning_ire import IRE, SAM
from lightning_ire._checks import ConfigurationError

# what Lightning and torch say about the small and odd runs of the table
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:lightning\."),
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\."),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def cells(arm: str) -> list[Any]:
    """Every fourth row at once, the others and the slow ones in `make test-all`."""
    cells = []
    for index, row in enumerate(ROWS):
        marks = [pytest.mark.slow] if row.slow or index % 4 else []
        if arm == "forced" or row.estimates is True:
            cells.append(pytest.param(row, id=row.id, marks=marks))
    return cells


@pytest.mark.parametrize("row", cells("forced"))
def test_forced_second_pass(row: Row, plain_runs: Any, tmp_path: Path) -> None:
    """IRE(kappa=0, perturbation=SAM(0)): every micro-batch that was back-propagated runs exactly twice."""
    if row.refused:
        with pytest.raises(ConfigurationError, match=row.refused):
            run(row, forced(), tmp_path)
        return
    plain = plain_runs(row)
    ours = run(row, forced(), tmp_path)
    assert_same(row, plain, ours)
    assert plain.back_propagated > 0
    assert ours.back_propagated == plain.back_propagated
    extra = plain.back_propagated - row.dropped
    assert ours.training_steps - plain.training_steps == extra
    assert ours.backward_passes - plain.backward_passes == extra


@pytest.mark.parametrize("row", cells("estimated"))
def test_estimates_without_a_boost(row: Row, plain_runs: Any, tmp_path: Path) -> None:
    """IRE(kappa=5, exclude="*"): estimates are made, and no weight is boosted. The callback comes last here."""
    plain = plain_runs(row)
    ire = estimated()
    with pytest.warns(UserWarning, match=row.warns) if row.warns else nullcontext():
        ours = run(row, ire, tmp_path, last=True)
    assert_same(row, plain, ours)
    assert ire.curvature.begun > 0
    assert (ire.curvature.made > 0) is row.made


# What users are told


def test_every_row_is_in_the_compatibility_table_and_every_promise_has_a_row() -> None:
    features = [feature for feature, _, _ in COMPATIBILITY]
    assert len(features) == len(set(features))
    status = {feature: verdict for feature, verdict, _ in COMPATIBILITY}
    assert set(status.values()) == {"works", "refused"}
    assert not {row.feature for row in ROWS} - set(features)
    assert len({row.id for row in ROWS}) == len(ROWS)
    proven = {row.feature for row in ROWS} | set(ELSEWHERE)
    assert [feature for feature, verdict in status.items() if verdict == "works" and feature not in proven] == []
    refused = {row.feature for row in ROWS if row.refused} | set(REFUSALS)
    assert {feature for feature, verdict in status.items() if verdict == "refused"} - set(ELSEWHERE) == refused
    assert all(note for _, verdict, note in COMPATIBILITY if verdict == "refused")


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_what_is_proven_elsewhere_is_there(place: str) -> None:
    file, name = place.split("::")
    assert name in (Path(__file__).parent / file).read_text()


def test_the_readme_shows_the_table() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    begin, end = "checked by tests/test_matrix.py -->\n", "\n<!-- end of compatibility -->"
    assert readme.split(begin)[1].split(end)[0] == compatibility_table()


def static_graph() -> Any:
    trainer = cases.under(DDPStrategy)
    trainer.strategy._model = SimpleNamespace(static_graph=True)
    return trainer


def plain_trainer(optimizer: Any = None) -> Any:
    trainer = cases.under(SingleDeviceStrategy)
    trainer.optimizers = [] if optimizer is None else [optimizer]
    return trainer


REFUSALS: dict[str, tuple[Any, Any, str]] = {
    "FSDPStrategy (FSDP1)": (lambda: cases.under(FSDPStrategy), Classifier, "got FSDPStrategy"),
    "DeepSpeed": (lambda: cases.under(DeepSpeedStrategy), Classifier, "got DeepSpeedStrategy"),
    "training_step(dataloader_iter)": (plain_trainer, TakesTheIterator, "dataloader_iter"),
    "LBFGS": (lambda: plain_trainer(torch.optim.LBFGS([torch.ones(1)])), Classifier, "LBFGS"),
    "DDP with static_graph, each device with its own SAM": (static_graph, Classifier, "static_graph"),
}


@pytest.mark.parametrize("feature", REFUSALS)
def test_refusals_come_before_any_compute_in_one_line(feature: str) -> None:
    make_trainer, make_module, words = REFUSALS[feature]
    with pytest.raises(ConfigurationError, match=words) as error:
        forced().on_fit_start(make_trainer(), make_module())
    assert "\n" not in str(error.value)


def test_a_search_for_a_learning_rate_in_between_does_not_count_as_training(tmp_path: Path) -> None:
    """The search steps the same optimizer, and puts callbacks back to a checkpoint, without starting the fit anew."""
    row = next(row for row in ROWS if row.id == "lr-finder-in-between")
    ire = IRE(kappa=1.0, interval=2, exclude="*", perturbation=SAM(0.0))
    plain = run(row, None, tmp_path / "plain")
    run(row, ire, tmp_path / "ire")
    assert ire._progress.step == plain.parts["global_step"]
    assert ire.state_dict()["optimizers"][0]["step"] == plain.parts["global_step"]


@pytest.mark.parametrize("id", ["plain", "nested", "accumulate", "captured-log"])
def test_what_a_step_logs_is_what_it_saw_before_the_ascent(id: str, tmp_path: Path) -> None:
    """At rho = 0 a second pass that logs can go unseen; here it climbs far."""
    row = next(row for row in ROWS if row.id == id)
    row = replace(row, trainer=lambda made=row.trainer: {**made(), "max_steps": 1})
    plain = run(row, None, tmp_path / "plain").parts["rows"]
    ours = run(row, IRE(kappa=0.0, perturbation=SAM(3.0)), tmp_path / "ours").parts["rows"]
    assert plain[0][0] == 0
    assert len(plain) > 1
    trained = {name for _, metrics in plain for name in metrics if "val" not in name}
    for (step, metrics), (same, others) in zip(plain, ours, strict=True):
        assert step == same
        assert {k: metrics[k] for k in trained & set(metrics)} == {k: others[k] for k in trained & set(others)}
