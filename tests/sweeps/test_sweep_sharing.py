"""Several processes on one study: who does what, and what a killed process leaves behind."""

import multiprocessing
import sqlite3
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from sweep_stub import CONFIG, StubRuns, sweep

from lightning_ire import ConfigurationError
from lightning_ire.sweeps import Attempt, Study, _runs, _study
from lightning_ire.sweeps._options import read_options

FORK = multiprocessing.get_context("fork")
TRIALS = [{"ire.kappa": "1"}, {"ire.kappa": "2"}]
SAME_STUDY = "--grid ire.kappa 1 2 --name s --storage sqlite:///s.db"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def study() -> Study:
    """The study that the command SAME_STUDY works on, as another process has opened it."""
    Path("c.yaml").write_text(CONFIG)
    options = read_options(["--config", "c.yaml", *SAME_STUDY.split()])
    return Study(".", TRIALS, "s", fingerprint=options.fingerprint)


def states(name: str = "s") -> list[str]:
    return [trial.state.name for trial in optuna.load_study(study_name=name, storage=f"sqlite:///{name}.db").trials]


def make_old() -> None:
    """Make all signs of life an hour old."""
    with sqlite3.connect("s.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")


def is_old() -> bool:
    with sqlite3.connect("s.db") as database:
        recent = "select count(*) from trial_heartbeats where heartbeat > datetime('now', '-1 minute')"
        return database.execute(recent).fetchone() == (0,)


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


def in_processes(number: int, target) -> None:
    barrier = FORK.Barrier(number)
    processes = [FORK.Process(target=target, args=(barrier,)) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * number


def test_two_processes_run_each_trial_exactly_once(monkeypatch):
    failing = StubRuns({f"ire.kappa={kappa}": 1 for kappa in (1, 2, 3)})
    monkeypatch.setattr(_runs, "run_process", failing)
    assert sweep("--grid ire.kappa 1 2 3") == 1  # three trials are done again, three for the first time
    in_processes(2, _share)
    ran = Counter(Path("runs.txt").read_text().split())
    assert ran == {f"ire.kappa={kappa}": 1 for kappa in range(1, 7)}


def _claim_all(barrier) -> None:
    study = Study(".", [{"x": x} for x in range(5)])
    barrier.wait()
    while study.to_do():
        with study.claim() as attempt:
            if attempt is not None:
                with Path("claims.txt").open("a") as file:
                    file.write(f"{attempt.trial['x']}\n")
                attempt.complete(0.0)


def test_four_processes_make_one_database_and_claim_each_trial_exactly_once():
    in_processes(4, _claim_all)
    assert sorted(Path("claims.txt").read_text().split()) == list("01234")
    assert Study(".", [{"x": 4}]).results() == [{"values": {"x": 4}}]


def test_of_two_who_begin_a_trial_at_once_one_does_it(study, monkeypatch):
    """Another process begins and ends it between what this one reads and what it writes."""
    other = Study(".", TRIALS, "s", fingerprint=None)
    write, begun = study._write, []

    def write_as_second(trial):
        if not begun:
            begun.append(other.claim())
            assert begun[0].__enter__().trial == TRIALS[0]
        return write(trial)

    monkeypatch.setattr(study, "_write", write_as_second)
    with study.claim() as attempt:
        assert attempt.trial == TRIALS[1]
        assert study.running() == other.running() == TRIALS
        assert states() == ["RUNNING", "PRUNED", "RUNNING"]
    assert study.to_do() == [TRIALS[1]]
    begun[0].__exit__(None, None, None)
    assert study.to_do() == TRIALS


def test_the_lower_of_two_attempts_goes_on(study, monkeypatch):
    write = study._write

    def write_as_first(trial):
        ours = write(trial)
        write(trial)
        return ours

    monkeypatch.setattr(study, "_write", write_as_first)
    with study.claim() as attempt:
        assert attempt.trial == TRIALS[0]


def test_a_trial_that_is_done_meanwhile_is_not_done_again(study, monkeypatch):
    write = study._write

    def write_too_late(trial):
        ours = write(trial)
        if trial == TRIALS[0]:
            write(trial).complete(1.0)
        return ours

    monkeypatch.setattr(study, "_write", write_too_late)
    with study.claim() as attempt:
        assert attempt.trial == TRIALS[1]


def test_an_attempt_says_its_trial_from_its_beginning(study, monkeypatch):
    """So nobody has to wait for another process to say what it does."""
    monkeypatch.setattr(study, "_live", lambda trial, key: key)
    study._write(TRIALS[1])
    (attempt,) = optuna.load_study(study_name="s", storage="sqlite:///s.db").trials
    assert (attempt.state.name, attempt.params, attempt.user_attrs) == ("RUNNING", {"ire.kappa": 2.0}, {})


def test_a_process_that_was_killed_before_its_first_sign_of_life(study, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(study, "_live", lambda trial, key: key)
        study._write(TRIALS[0])
    assert study.to_do() == [TRIALS[1]]  # it may be alive
    make_old()
    assert study.to_do() == TRIALS
    assert states() == ["FAIL"]


def test_what_others_and_earlier_versions_left_in_the_study_is_no_hindrance(study):
    """Attempts at trials that are not ours; sweeps at first wrote ones that wait or say no trial."""
    known = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    ranges = dict.fromkeys(("ire.kappa", "ire.gamma"), optuna.distributions.FloatDistribution(-1e300, 1e300))
    for state, params in (
        ("RUNNING", {"ire.kappa": 1.0, "ire.gamma": 0.9}),
        ("RUNNING", {}),
        ("WAITING", {"ire.kappa": 1.0}),
    ):
        theirs = {key: ranges[key] for key in params}
        state = optuna.trial.TrialState[state]
        known.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=theirs))
    for trial in TRIALS:
        with study.claim() as attempt:
            assert attempt.trial == trial
            attempt.complete(1.0)
    assert states() == ["RUNNING", "RUNNING", "WAITING", "COMPLETE", "COMPLETE"]
    more = Study(".", [{"ire.kappa": 1, "ire.gamma": 0.9}, *TRIALS], "s", fingerprint=None)
    assert more.results() == [None, {"values": TRIALS[0]}, {"values": TRIALS[1]}]


def test_a_study_of_an_earlier_version_is_read(monkeypatch, capsys):
    """Made with Optuna's own `optimize`, as sweeps were at first."""
    Path("c.yaml").write_text(CONFIG)
    fingerprint = read_options(["--config", "c.yaml", "--grid", "ire.kappa", "1"]).fingerprint
    Path("sweeps").mkdir()
    grid = optuna.samplers.GridSampler({"ire.kappa": [1.0, 2.0]})
    known = optuna.create_study(study_name="c", storage="sqlite:///sweeps/c.db", sampler=grid, direction="maximize")
    known.set_user_attr("fingerprint", fingerprint)
    known.set_user_attr("flags", [])

    def objective(trial: optuna.Trial) -> float:
        kappa = trial.suggest_float("ire.kappa", -1e300, 1e300)
        trial.set_user_attr("values", {"ire.kappa": f"{kappa:g}"})
        if kappa == 1:
            trial.set_user_attr("error", "exit code 1: x")
            raise KeyError
        trial.set_user_attr("metrics", {"test/accuracy": 0.5})
        trial.set_user_attr("seconds", 1.0)
        return 0.5

    known.optimize(objective, n_trials=2, catch=(KeyError,))
    runs = StubRuns()
    monkeypatch.setattr(_runs, "run_process", runs)
    assert sweep("--grid ire.kappa 1 2") == 0
    assert runs.cells == ["ire.kappa=1"]
    out = capsys.readouterr().out
    assert "| 1         | 91.00         |\n| 2         | 50.00         |" in out


def test_a_run_without_a_sign_of_life_is_done_again(study, monkeypatch):
    study._write(TRIALS[1])
    assert study.to_do() == [TRIALS[0]]
    assert study.running() == [TRIALS[1]]
    make_old()
    assert study.to_do() == TRIALS
    assert study.running() == []
    runs = StubRuns()
    monkeypatch.setattr(_runs, "run_process", runs)
    assert sweep(SAME_STUDY) == 0
    assert runs.cells == ["ire.kappa=1", "ire.kappa=2"]


def test_a_running_trial_gives_signs_of_life(study, monkeypatch):
    monkeypatch.setattr(_study, "HEARTBEAT_SECONDS", 0.01)
    with study.claim():
        make_old()
        deadline = time.monotonic() + 20
        while is_old() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert study.running() == [TRIALS[0]]


def test_what_runs_elsewhere_is_said_and_left_alone(study, monkeypatch, capsys):
    study._write(TRIALS[1])
    runs = StubRuns()
    monkeypatch.setattr(_runs, "run_process", runs)
    assert sweep(SAME_STUDY) == 0
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


def test_a_failed_trial_is_not_done_again_by_who_saw_it_fail(study):
    other = Study(".", TRIALS, "s", fingerprint=None)
    with study.claim() as attempt:
        attempt.note(error="x")
    assert study.failed() == other.failed() == [TRIALS[0]]
    assert study.to_do() == other.to_do() == [TRIALS[1]]
    later = Study(".", TRIALS, "s", fingerprint=None)
    assert (later.failed(), later.to_do()) == ([], TRIALS)


def test_nothing_to_do_hands_out_nothing(study):
    for _ in TRIALS:
        with study.claim() as attempt:
            assert isinstance(attempt, Attempt)
            attempt.complete(float("nan"), a=1)
    with study.claim() as attempt:
        assert attempt is None


def test_the_same_trial_twice_is_refused():
    with pytest.raises(ConfigurationError, match="trials of a study to be different"):
        Study(".", [{"lr": 0.1}, {"lr": "1e-1"}])


def test_a_database_that_does_not_answer_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(_runs, "run_process", StubRuns())

    def broken(study):
        raise optuna.exceptions.StorageInternalError("x") from OSError("gone\nand more")

    monkeypatch.setattr(Study, "results", broken)
    assert sweep("--grid ire.kappa 1") == 1
    assert capsys.readouterr().err == (
        "error: the database did not answer: gone; the same command goes on from there\n"
    )
