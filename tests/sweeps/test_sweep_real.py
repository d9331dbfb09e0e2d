"""The real command with real trainings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCHES = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1"
FLAGS = f"--trainer.max_epochs 1 {BATCHES} --trainer.accelerator cpu --trainer.enable_progress_bar false"


def command(tmp_path: Path, arguments: str, flags: str) -> subprocess.CompletedProcess:
    config = str(ROOT / "configs" / "digits_resnet_sgd_ire.yaml")
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "sweep", "--config", config, *f"{arguments} -- {flags}".split()],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_real_runs(tmp_path):
    done = command(tmp_path, "--grid ire.kappa 1 2 --grid ire.gamma .9 .8 --baseline", f"{FLAGS} --ire.start_epoch 0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    number = r"\d+\.\d\d"
    assert re.search(rf"^\| 1 +\| {number} +\| {number} +\|$", done.stdout, re.MULTILINE)
    assert re.search(rf"^\| baseline \(ire\.kappa 0\) +\| {number} \|$", done.stdout, re.MULTILINE)
    assert "5 of 5 runs\n" in done.stdout
    folder = tmp_path / "sweeps" / "digits_resnet_sgd_ire"
    saved = (folder / "ire.kappa=2,ire.gamma=.8" / "version_0" / "config.yaml").read_text()
    assert re.search(r"^  kappa: 2\.0$", saved, re.MULTILINE)
    assert re.search(r"^  gamma: 0\.8$", saved, re.MULTILINE)
    assert (folder / "test_accuracy.png").is_file()
    assert (folder / "table.md").read_text() in done.stdout


@pytest.mark.slow
def test_a_value_that_the_real_command_refuses(tmp_path):
    done = command(tmp_path, "--grid ire.gamma 1.5 2.5", FLAGS)
    assert done.returncode == 2
    assert re.fullmatch(r"error: Expected `ire\.gamma` to be a number in \(0, 1\], got [12]\.5\.\n", done.stderr)
