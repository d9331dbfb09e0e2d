"""Killed at any moment and resumed: the callback adds no error of its own to what Lightning does.

The runs are in resume_script.py. Compared are the rows that a logger got and, from the checkpoint at the end, weights,
buffers, the optimizer, schedulers, loops and everything the callback saved (masks, averages, counters, latch).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from resume_script import BATCHES, EPOCHS, FORCED_RUNS, RUNS, moment

HERE = Path(__file__).parent
Jobs = Callable[[str], Path]
JOBS = (*RUNS, *FORCED_RUNS, "exchange")
SLOW = {
    "start-fraction", "start-epoch", "start-behind", "empirical", "average-sam", "bf16", "sparse-rows", "sam", "ire",
    "epoch-boundary-fixed", "start-loss-later", "sam-interval", "float64", "kappa-lr", "accumulated-start-loss",
    "validation-start-loss", "start-ahead", "beta", "epoch-boundary", "validation", "forced-accumulated",
    "forced-validation", "friendly", "look",
}  # fmt: skip


def run_script(folder: Path, *jobs: str) -> None:
    command = [sys.executable, str(HERE / "resume_script.py"), str(folder), *jobs]
    error = "resume_script.py took longer than 280 seconds"
    try:
        done = subprocess.run(
            command, env=cases.script_environment(), capture_output=True, text=True, timeout=280, check=False
        )
        error = done.stderr[-10000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        pass
    (folder / f"done-{jobs[0]}").write_text(error)  # others wait for it


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Folder of a job. All fast jobs run in one process, all slow ones in another; pytest's workers share them."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "resume"
    shared.mkdir(exist_ok=True)

    def ready(name: str) -> Path:
        wanted = [job for job in JOBS if (job in SLOW) == (name in SLOW)]
        try:
            (shared / f"taken-{wanted[0]}").mkdir()
        except FileExistsError:
            pass
        else:
            run_script(shared, *wanted)
        done, error = shared / f"done-{wanted[0]}", shared / name / "error.txt"
        while not done.exists():
            time.sleep(0.2)
        assert not done.read_text(), done.read_text()[-3000:]
        assert not error.exists(), error.read_text()
        return shared / name

    return ready


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds, less what names the folder."""
    checkpoint = torch.load(folder / "final.ckpt", weights_only=True)
    callbacks = checkpoint["callbacks"]
    checkpoint["callbacks"] = {key: value for key, value in callbacks.items() if not key.startswith("ModelCheckpoint")}
    return checkpoint


def own_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the callback saved of its only optimizer."""
    (state,) = checkpoint["callbacks"]["IRE"]["optimizers"]
    return state


def results(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Weights, buffers, optimizer, schedulers, counters and what callbacks saved; not Lightning's loop bookkeeping."""
    keys = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")
    return {key: checkpoint[key] for key in keys}


def saved_step(folder: Path) -> int:
    """Steps that were done when the checkpoint was written from which the run went on."""
    return int(torch.load(folder / "from.ckpt", weights_only=True)["global_step"])


def assert_goes_on_as(folder: Path, straight: Path) -> None:
    step = saved_step(folder)
    assert not list(cases.differences(results(final(folder / "resumed")), results(final(straight))))
    before = [row for row in rows(folder / "killed") if row["step"] < step]
    assert before  # Lightning's step axis counts from 0
    assert [*before, *rows(folder / "resumed")] == rows(straight)


def marks(name: str) -> list[Any]:
    return [pytest.mark.slow] if name in SLOW else []


CELLS = [
    pytest.param(name, kill, id=f"{name}-{moment(kill)}", marks=marks(name))
    for name, spec in RUNS.items()
    for kill in spec["kills"]
]


@pytest.mark.parametrize(("name", "kill"), CELLS)
def test_killed_and_resumed_equals_never_interrupted(jobs: Jobs, name: str, kill: tuple[int, int, str]) -> None:
    folder = jobs(name)
    assert_goes_on_as(folder / moment(kill), folder / "straight")


STARTS = {"start-loss": 8, "start-loss-later": 16, "accumulated-start-loss": 3, "validation-start-loss": 8}


@pytest.mark.parametrize("name", [name for name in RUNS if name not in SLOW])
def test_the_runs_are_what_their_names_say(jobs: Jobs, name: str) -> None:
    """The saved partial sum of losses decides, the mean of the part after the checkpoint would decide otherwise."""
    spec = RUNS[name]
    checkpoint = final(jobs(name) / "straight")
    state = own_state(checkpoint)
    assert state["step"] == checkpoint["global_step"] == (9 if "accumulated" in name else EPOCHS * BATCHES)
    assert state["started_at"] == STARTS.get(name, spec["ire"].get("start_step", 0) if spec["ire"]["kappa"] else None)
    assert bool(state["flat"]["masks"]) == bool(spec["ire"]["kappa"])
    assert bool(state["flat"]["average"]) == ("beta" in spec["ire"])
    assert bool(state["peak_lrs"]) == ("kappa_schedule" in spec["ire"])
    if name == "start-loss":
        partial = own_state(torch.load(jobs(name) / "0-6-stepped" / "from.ckpt", weights_only=True))
        assert partial["loss_count"] == 5
        losses = [row["loss"] for row in rows(jobs(name) / "straight")[:BATCHES]]
        assert partial["loss_sum"] == pytest.approx(sum(losses[:5]), rel=1e-6)
        assert sum(losses) / BATCHES < 1.47 < sum(losses[5:]) / 3


FORCED_CELLS = [
    pytest.param(name, kill, id=f"{name}-{moment(kill)}", marks=marks(name))
    for name, spec in FORCED_RUNS.items()
    for kill in spec["kills"]
]


@pytest.mark.parametrize(("name", "kill"), FORCED_CELLS)
def test_forced_second_pass_resumes_as_a_plain_run_does(jobs: Jobs, name: str, kill: tuple[int, int, str]) -> None:
    """Loader, random numbers and a half-filled window are lost by Lightning: to the same effect."""
    plain, forced = (jobs(name) / kind / moment(kill) for kind in ("plain", "forced"))
    assert saved_step(plain) == saved_step(forced)
    first, second = final(plain / "resumed"), final(forced / "resumed")
    assert own_state(second)["step"] == second["global_step"]
    del second["callbacks"]["IRE"]
    assert not list(cases.differences(first, second))
    own = ("sam/perturbed_loss", "sam/grad_norm")
    for part in ("killed", "resumed"):
        seen = rows(forced / part)
        assert any(own[0] in row for row in seen)
        assert [{key: row[key] for key in row if key not in own} for row in seen] == rows(plain / part)


# A checkpoint of a plain run goes on with the callback, and the other way round


def test_a_plain_run_goes_on_with_the_callback(jobs: Jobs) -> None:
    """As if the callback had been there from the beginning, waiting for its start."""
    assert_goes_on_as(jobs("exchange") / "added", jobs("exchange") / "late")
    assert own_state(final(jobs("exchange") / "added" / "resumed"))["started_at"] == 13


def test_the_run_of_a_callback_goes_on_without_it(jobs: Jobs) -> None:
    folder = jobs("exchange")
    assert_goes_on_as(folder / "taken", folder / "plain")
    boosted, stripped = final(folder / "taken-boosted" / "resumed"), final(folder / "stripped")
    assert not list(cases.differences(boosted, stripped))
    assert rows(folder / "taken-boosted" / "resumed") == rows(folder / "stripped")
    assert list(cases.differences(boosted["state_dict"], final(folder / "plain")["state_dict"]))
