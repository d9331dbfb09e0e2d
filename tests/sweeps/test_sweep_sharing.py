"""Several processes on one study: who does what, and what a killed process leaves behind."""

import multiprocessing
import sqlite3
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from sweep_stub import StubRuns, sweep

from lightning_ire.sweeps import _ledger, _runs
from lightning_ire.sweeps._database import open_storage
from lightning_ire.sweeps._grid import Grid
from lightning_ire.sweeps._ledger import Ledger

FORK = multiprocessing.get_context("fork")
GRID = Grid({"ire.kappa": ("1", "2")})


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ledger():
    return opened()


def opened(grid: Grid = GRID) -> Ledger:
    ledger = Ledger(open_storage("sqlite:///s.db"), "s", grid)
    ledger.open("fingerprint")
    return ledger


def begin(ledger: Ledger, *, kappa: float | None) -> optuna.Trial:
    """Start a trial as another process does, up to the point where it has said its cell or not yet."""
    with pytest.warns(UserWarning, match="Heartbeat of storage"):
        trial = ledger.study.ask()
    if kappa is not None:
        say(ledger, trial, kappa)
    return trial


def say(ledger: Ledger, trial: optuna.Trial, kappa: float) -> float:
    trial.storage.set_trial_system_attr(trial._trial_id, "grid_id", ledger._sampler._all_grids.index((kappa,)))
    return trial.suggest_float("ire.kappa", -_ledger._LIMIT, _ledger._LIMIT)


def _share(barrier) -> None:
    class SlowRuns(StubRuns):
        def __call__(self, arguments, log):
            with Path("runs.txt").open("a") as file:
                file.write(f"{log.parent.name}\n")
            time.sleep(0.02)
            return super().__call__(arguments, log)

    _runs.run_process = SlowRuns()
    barrier.wait()
    raise SystemExit(sweep("--grid ire.kappa 1 2 3 4 5 6"))


def test_two_processes_run_each_cell_exactly_once(monkeypatch):
    failing = StubRuns({f"ire.kappa={kappa}": 1 for kappa in (1, 2, 3)})
    monkeypatch.setattr(_runs, "run_process", failing)
    assert sweep("--grid ire.kappa 1 2 3") == 1  # so both processes begin with the same queue
    barrier = FORK.Barrier(2)
    processes = [FORK.Process(target=_share, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    ran = Counter(Path("runs.txt").read_text().split())
    assert ran == {f"ire.kappa={kappa}": 1 for kappa in range(1, 7)}


def test_the_lower_of_two_trials_of_a_cell_runs_it(ledger):
    first, second = begin(ledger, kappa=1), begin(ledger, kappa=1)
    assert ledger.claim(second) is None
    assert ledger.claim(first) == GRID.cells[0]


def test_a_complete_cell_is_not_run_again(ledger):
    late, done = begin(ledger, kappa=1), begin(ledger, kappa=1)
    ledger.study.tell(done, 1.0)
    assert ledger.claim(late) is None


def test_a_trial_waits_until_lower_ones_have_said_their_cell(ledger, monkeypatch):
    first, second = begin(ledger, kappa=None), begin(ledger, kappa=1)
    trials = []

    def first_says_it(seconds: float) -> None:
        trials.append(say(ledger, first, 1))

    monkeypatch.setattr(_ledger.time, "sleep", first_says_it)
    assert ledger.claim(second) is None
    assert trials == [1.0]


def test_a_trial_that_never_says_its_cell_is_given_up(ledger, monkeypatch):
    first, second = begin(ledger, kappa=None), begin(ledger, kappa=1)
    monkeypatch.setattr(_ledger, "_CLAIM_SECONDS", 0.0)
    assert ledger.claim(second) == GRID.cells[0]
    assert ledger.study.get_trials()[0].state.name == "FAIL"
    assert ledger.claim(first) is None


def test_a_trial_of_another_grid_is_given_back(monkeypatch):
    other = opened(Grid({"ire.kappa": ("1", "2"), "ire.gamma": ("0.9",)}))
    monkeypatch.setattr(other._sampler, "is_exhausted", lambda study: True)
    other.enqueue(other.to_do())
    ledger, taken = opened(), []

    def objective(trial: optuna.Trial) -> float:
        taken.append((trial.params, ledger.claim(trial)))
        raise optuna.TrialPruned

    ledger.optimize(objective, catch=KeyError)
    assert taken == [({"ire.kappa": 1.0, "ire.gamma": 0.9}, None)]
    assert other.to_do() == other.grid.cells


def test_a_run_without_a_sign_of_life_is_done_again(ledger, monkeypatch, capsys):
    trial = begin(ledger, kappa=2)
    ledger._storage.record_heartbeat(trial._trial_id)
    assert ledger.to_do() == [GRID.cells[0]]
    assert ledger.running() == {GRID.cells[1]}
    with sqlite3.connect("s.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    assert ledger.to_do() == GRID.cells
    assert ledger.running() == set()
    runs = StubRuns()
    monkeypatch.setattr(_runs, "run_process", runs)
    Path("c.yaml").write_text("test_after_fit: true\n")
    monkeypatch.setattr(Ledger, "_check_fingerprint", lambda *args: None)
    assert sweep("--grid ire.kappa 1 2 --name s --storage sqlite:///s.db") == 0
    assert runs.cells == ["ire.kappa=1", "ire.kappa=2"]


def test_what_runs_elsewhere_is_said_and_left_alone(ledger, monkeypatch, capsys):
    trial = begin(ledger, kappa=2)
    ledger._storage.record_heartbeat(trial._trial_id)
    runs = StubRuns()
    monkeypatch.setattr(_runs, "run_process", runs)
    monkeypatch.setattr(Ledger, "_check_fingerprint", lambda *args: None)
    assert sweep("--grid ire.kappa 1 2 --name s --storage sqlite:///s.db") == 0
    assert runs.cells == ["ire.kappa=1"]
    out = capsys.readouterr().out
    assert "ire.kappa=2 is running elsewhere; if its process is gone, give this command again in 120 seconds\n" in out
    assert "1 of 2 runs, 1 missing" in out


def test_a_process_taken_for_dead_does_its_run_again(monkeypatch, capsys):
    runs = StubRuns()

    def sleep_then_run(arguments: list[str], log: Path) -> int:
        if not runs.commands:
            with sqlite3.connect("sweeps/c.db") as database:
                database.execute("update trials set state = 'FAIL'")
        return runs(arguments, log)

    monkeypatch.setattr(_runs, "run_process", sleep_then_run)
    assert sweep("--grid ire.kappa 1") == 0
    assert runs.cells == ["ire.kappa=1", "ire.kappa=1"]
    assert "1 of 1 runs\n" in capsys.readouterr().out
