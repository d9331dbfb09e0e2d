"""The compatibility suite: each row with SAM-IRE is finite, deterministic, resumable, and the base at kappa = 0.

A SharpnessMonitor leaves no trace in any of them.
"""

import math
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cases
import pytest
import pytorch_optimizer
import torch
from ecosystem import optimizers
from ecosystem.batches import STEPS
from ecosystem.modules import Exercise, TwiceDifferentiable
from ecosystem.rows import ROWS
from ecosystem.runs import ARMS, SAVED, Outcome, Row, train
from ecosystem.table import KINDS, ecosystem_table
from modules import Classifier

from lightning_ire import IRE, tags
from lightning_ire._checks import ConfigurationError

# what Lightning, torch and the other packages say about runs this small
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:lightning\."),
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\."),
    pytest.mark.filterwarnings(r"ignore::UserWarning:pytorch_optimizer\."),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

Runs = Callable[[Row, str], Outcome]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of the rows, each made once; "ARM again" repeats one, "ARM resumed" goes on from its checkpoint."""
    known: dict[tuple[str, str], Outcome] = {}
    folder = tmp_path_factory.mktemp("ecosystem")

    def get(row: Row, name: str) -> Outcome:
        if (row.id, name) not in known:
            arm, _, how = name.partition(" ")
            path = folder / f"{row.id}-{arm}.ckpt"
            if how == "resumed":
                get(row, arm)
            save = path if not how and arm in ("base", "sam-ire") else None
            known[row.id, name] = train(row, ARMS[arm](row), save, path if how == "resumed" else None)
            if how == "resumed":
                path.unlink()
        return known[row.id, name]

    return get


def cells() -> list[Any]:
    """One row of each kind at once, others and slow ones in `make test-all`, very many in `make test-weekly`."""
    cells, at_once = [], Counter[str]()
    for row in ROWS:
        marks = [pytest.mark.xdist_group(f"ecosystem-{row.id}")]
        if row.slow or at_once[row.kind] == 1:
            marks.append(pytest.mark.slow)
        else:
            at_once[row.kind] += 1
        if row.weekly:
            marks.append(pytest.mark.weekly)
        cells.append(pytest.param(row, id=row.id, marks=marks))
    return cells


def differences(first: Outcome, second: Outcome) -> list[str]:
    """Weights, buffers and entries of the optimizer's state that differ in a bit."""
    return [
        *cases.differences(first.weights, second.weights, "weights"),
        *cases.differences(first.optimizers, second.optimizers, "optimizers"),
    ]


@pytest.mark.parametrize("row", cells())
def test_without_a_boost_and_a_climb_it_is_the_base(row: Row, runs: Runs) -> None:
    """With a second pass at each step, and estimates whose masks hold no weight."""
    base = runs(row, "base")
    assert base.steps == STEPS
    assert base.finite
    assert differences(runs(row, "forced"), base) == []


@pytest.mark.parametrize("row", cells())
def test_a_monitor_and_a_callback_that_is_off_leave_no_trace(row: Row, runs: Runs) -> None:
    with cases.monitor_warnings():  # where it skips the Fisher information or takes differences
        monitored = runs(row, "monitored")
    assert differences(monitored, runs(row, "base")) == []
    assert math.isfinite(monitored.measured[tags.TRACE_HESSIAN])


@pytest.mark.parametrize("row", cells())
def test_sam_and_ire_train_it(row: Row, runs: Runs) -> None:
    ours = runs(row, "sam-ire")
    assert ours.steps == STEPS
    assert ours.finite
    assert ours.masks > 0
    assert ours.weights != runs(row, "base").weights


@pytest.mark.parametrize("row", cells())
def test_the_same_run_again_has_the_same_bits(row: Row, runs: Runs) -> None:
    assert differences(runs(row, "sam-ire again"), runs(row, "sam-ire")) == []


@pytest.mark.parametrize("row", cells())
def test_a_resumed_run_is_the_one_that_was_never_killed(row: Row, runs: Runs) -> None:
    """Where plain Lightning is too: a note that says otherwise must be true."""
    if row.resumes is not True:
        assert differences(runs(row, "base resumed"), runs(row, "base"))
        return
    resumed = runs(row, "sam-ire resumed")
    assert resumed.steps == STEPS
    assert differences(resumed, runs(row, "sam-ire")) == []


# Optimizers that are not for everything


@pytest.mark.parametrize("name", ["adahessian", "sophiah"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_ire_alone_with_an_optimizer_that_differentiates_gradients(name: str) -> None:
    make = optimizers.of_package(name)
    row = Row(name, "", module=lambda: TwiceDifferentiable(optimizer=make))
    base = train(row)
    assert differences(train(row, [IRE(kappa=1.0, interval=5, exclude="*")]), base) == []
    ours = train(row, [IRE(kappa=1.0, interval=5)])
    assert ours.finite
    assert ours.weights != base.weights


def test_an_optimizer_that_runs_the_closure_twice_is_refused() -> None:
    """As LBFGS is: which of its passes the mask, the climb and the old weights belong to cannot be known."""
    row = Row("twice", "", module=lambda: Exercise(optimizer=lambda module: optimizers.Twice(module.parameters())))
    with pytest.raises(ConfigurationError, match="closure"):
        train(row, [IRE(kappa=1.0)])


@pytest.mark.parametrize("name", ["alig", "a2grad"])
def test_kappa_cannot_follow_a_learning_rate_that_is_not_there(name: str) -> None:
    make = optimizers.of_package(name, **({"max_lr": 0.1} if name == "alig" else {}))
    row = Row(name, "", module=lambda: Exercise(optimizer=make))
    with pytest.raises(ConfigurationError, match="kappa_schedule"):
        train(row, [IRE(kappa=1.0, kappa_schedule="lr")])


@pytest.mark.parametrize("name", ["prodigy", "apollo", "splus", "adams", "adafactor"])
def test_a_decay_that_is_not_lr_times_weight_decay_is_not_taken_for_it(name: str) -> None:
    make = optimizers.of_package(name, weight_decay=0.1)
    row = Row(name, "", module=lambda: Exercise(optimizer=make))
    with pytest.raises(ConfigurationError, match="scale_weight_decay"):
        train(row, [IRE(kappa=1.0, scale_weight_decay=False)])


def test_an_optimizer_that_keeps_norms_keeps_them_under_the_boost() -> None:
    """RELATED_WORK 13: the boost leaves the sphere, and `project()` of the optimizer puts the weights back on it."""
    module = Classifier(optimizer=lambda module: optimizers.KeepsNorms(module.parameters()))
    before = [parameter.norm().item() for parameter in module.parameters()]
    plain = cases.clone(module)
    cases.fit(plain)
    cases.fit(module, [IRE(kappa=2.0, gamma=0.7, interval=3)])
    assert [parameter.norm().item() for parameter in module.parameters()] == pytest.approx(before, rel=1e-5)
    assert cases.moved(module, plain) > 1e-4


# The lists


def test_ids_and_kinds() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {row.kind for row in ROWS} == set(KINDS)
    assert SAVED % 5  # no mask is made at the step after the checkpoint, which has to hold it


def test_every_optimizer_of_torch_has_a_row_or_a_reason() -> None:
    optim = torch.optim.Optimizer
    names = {name for name, one in vars(torch.optim).items() if isinstance(one, type) and issubclass(one, optim)}
    assert names - {"Optimizer"} == set(optimizers.TORCH) | set(optimizers.NOT_OF_TORCH)


@pytest.mark.skipif(version("pytorch_optimizer") != optimizers.VERSION, reason="the lists are those of one release")
def test_every_optimizer_of_the_package_has_a_row_or_a_reason() -> None:
    lists = [*optimizers.PACKAGE, *optimizers.OTHERS, *optimizers.UNUSABLE]
    assert sorted(lists) == sorted(pytorch_optimizer.get_supported_optimizers())


def test_the_readme_shows_the_ecosystem() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    begin, end = "checked by tests/test_ecosystem.py -->\n", "\n<!-- end of ecosystem -->"
    assert readme.split(begin)[1].split(end)[0] == ecosystem_table()
