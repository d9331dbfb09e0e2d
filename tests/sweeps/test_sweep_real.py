"""The real command with real trainings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vision_data

ROOT = Path(__file__).parents[2]
BATCHES = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1"
FLAGS = f"--trainer.max_epochs 1 {BATCHES} --trainer.accelerator cpu --trainer.enable_progress_bar false"


NUMBER = r"\d+\.\d\d"


def command(
    tmp_path: Path, arguments: str, flags: str, name: str = "digits_resnet_sgd_ire"
) -> subprocess.CompletedProcess:
    config = str(ROOT / "configs" / f"{name}.yaml")
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
    assert re.search(rf"^\| 1 +\| {NUMBER} +\| {NUMBER} +\|$", done.stdout, re.MULTILINE)
    assert re.search(rf"^\| baseline \(ire\.kappa 0\) +\| {NUMBER} \|$", done.stdout, re.MULTILINE)
    assert f"5 of 5 runs; all with `{FLAGS} --ire.start_epoch 0`\n" in done.stdout
    folder = tmp_path / "sweeps" / "digits_resnet_sgd_ire"
    saved = (folder / "ire.kappa=2,ire.gamma=.8" / "version_0" / "config.yaml").read_text()
    assert re.search(r"^  kappa: 2\.0$", saved, re.MULTILINE)
    assert re.search(r"^  gamma: 0\.8$", saved, re.MULTILINE)
    assert (folder / "test_accuracy.png").is_file()
    assert (folder / "table.md").read_text() in done.stdout


@pytest.mark.slow
def test_the_paper_beside_runs_on_data_of_cifars_shape(tmp_path):
    images = vision_data.write_cifar10(tmp_path / "images")
    tiny = f"--data.root {images} --data.verify false --data.global_batch_size 4 --data.num_workers 0"
    small = f"--model.model.blocks [1,1,1] --ire.start_epoch 0 {FLAGS}"
    done = command(tmp_path, "--grid ire.kappa 1 2 --baseline", f"{tiny} {small}", "cifar10_resnet56_sam_ire")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^\| 2 +\| {NUMBER} +\|$", done.stdout, re.MULTILINE)
    assert re.search(r"^\| +\| here +\| paper, Table 1 \|$", done.stdout, re.MULTILINE)
    assert re.search(rf"^\| baseline \(ire\.kappa 0\) +\| {NUMBER} +\| SAM 94\.05 +\|$", done.stdout, re.MULTILINE)
    assert re.search(rf"^\| best cell .* +\| {NUMBER} +\| SAM-IRE 94\.46 +\|$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_value_that_the_real_command_refuses(tmp_path):
    done = command(tmp_path, "--grid ire.gamma 1.5 2.5", FLAGS)
    assert done.returncode == 2
    assert re.fullmatch(r"error: Expected `ire\.gamma` to be a number in \(0, 1\], got [12]\.5\.\n", done.stderr)
