"""The real command with real trainings: a report, a kill in the middle, two processes at once, two devices."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = "--method SGD --ire.kappa 0 --method SAM --ire.kappa 0 --ire.perturbation SAM"
STUDY = f"{METHODS} --tune model.optimizer.lr 0.02 0.5 log --trials 2 --seeds 2 --metric val/accuracy"
FLAGS = "--trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.limit_val_batches 1 --trainer.accelerator cpu"
FLAGS += " --trainer.enable_progress_bar false --ire.start_epoch null"
RUNS = 2 * (2 + 2)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def start(folder: Path, arguments: str = STUDY, flags: str = FLAGS) -> subprocess.Popen:
    config = str(ROOT / "configs" / "digits_resnet_sgd_ire.yaml")
    words = [
        str(ROOT / "cli.py"),
        "compare",
        "--config",
        config,
        "--name",
        "s",
        *arguments.split(),
        "--",
        *flags.split(),
    ]
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def runs_of(folder: Path) -> list[dict]:
    return json.loads((folder / "compare" / "s" / "results.json").read_text())["runs"]


def made(folder: Path) -> Counter:
    """How often each run was begun, by the folders that trainings leave; checks remove theirs."""
    return Counter(path.parent.name for path in (folder / "compare" / "s").glob("*trial=*/version_*"))


def test_a_comparison_of_real_runs(tmp_path: Path) -> None:
    process = start(tmp_path, f"{STUDY} --report test/accuracy --budget passes --jobs 2")
    out, err = process.communicate(timeout=560)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"^SAM is .* SGD .*points.*\.$", out, re.MULTILINE)
    runs = runs_of(tmp_path)
    assert len(runs) == RUNS + 2
    passes = {(run["method"], run["logged"]["compare/steps"], run["logged"]["compare/passes"])
              for run in runs if run["seed"] < 2000}  # fmt: skip
    assert passes == {("SGD", 3, 3), ("SAM", 2, 4)}  # half of 3 steps, rounded
    assert all({"test/accuracy", "val/accuracy"} <= run["logged"].keys() for run in runs)
    assert not list(tmp_path.glob("compare/s/check*"))


@pytest.mark.weekly
def test_killed_and_shared_each_run_counts_once(tmp_path: Path) -> None:
    """SIGKILL ends the runs with it; two processes go on at the same time, when its signs of life are too old."""
    first = start(tmp_path, f"{STUDY} --jobs 2")
    deadline = time.monotonic() + 300
    while sum(made(tmp_path).values()) < 3 and time.monotonic() < deadline:  # one is done, two are at work
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    deadline = time.monotonic() + 60
    while "lightning_ire" in processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert "lightning_ire" not in processes(tmp_path)
    both = [start(tmp_path) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=560)
        assert (process.returncode, err) == (0, "")
    runs = runs_of(tmp_path)
    assert len(runs) == RUNS
    again = [name for name, count in made(tmp_path).items() if count > 1]
    assert len(again) <= 2  # what was at work at the kill


def processes(folder: Path) -> str:
    """Command lines of the processes whose working directory is the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder.resolve():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return "\n".join(found)


@pytest.mark.weekly
def test_ctrl_c_ends_it_and_its_runs(tmp_path: Path) -> None:
    process = start(tmp_path, f"{STUDY} --jobs 2", FLAGS.replace("max_epochs 1", "max_epochs 10000"))
    deadline = time.monotonic() + 300
    while sum(made(tmp_path).values()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err == "stopped; the same command goes on from there\n"
    assert processes(tmp_path) == ""


@pytest.mark.weekly
def test_runs_on_two_devices(tmp_path: Path) -> None:
    study = STUDY.replace("--trials 2", "--trials 1")
    process = start(tmp_path, study, f"{FLAGS} --trainer.devices 2 --trainer.strategy ddp")
    _, err = process.communicate(timeout=560)
    assert (process.returncode, err) == (0, "")
    assert {run["logged"]["compare/steps"] for run in runs_of(tmp_path)} == {3}
