"""Every shipped config parses with the real command line, trains, and keeps its promises."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ire import IRE
from lightning_ire.cli import IRECLI

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
EMBEDDED = [path for path in CONFIGS if path.name.startswith(("digits_", "stdlib_"))]


FROM_THE_FIRST_STEP = "--ire.start_step null --ire.start_epoch null --ire.start_loss null"


def by_name(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.stem) for path in paths]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # Lightning warns if both args and sys.argv are there


def test_there_are_configs():
    assert "digits_resnet_sgd_ire" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", by_name(CONFIGS))
def test_name_and_comments(path):
    assert re.fullmatch(r"[a-z0-9]+_[a-z0-9]+_(sgd_ire|sam_ire|admire)", path.stem)
    settings = [line for line in path.read_text().splitlines() if re.match(r"\s*(- )?\w+: \S", line)]
    uncommented = [line for line in settings if "#" not in line and "class_path:" not in line]
    assert settings
    assert not uncommented


@pytest.mark.parametrize("path", by_name(CONFIGS))
def test_logs_under_the_name_of_the_config(path):
    config = yaml.safe_load(path.read_text())
    logger = config["trainer"]["logger"]
    assert logger["class_path"].rsplit(".", 1)[-1] == "TensorBoardLogger"
    assert (logger["init_args"]["save_dir"], logger["init_args"]["name"]) == ("logs", path.stem)
    assert "version" not in logger["init_args"]


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_trains(path):
    flags = "--trainer.fast_dev_run 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    cli = IRECLI(["fit", "--config", str(path), *f"{flags} {FROM_THE_FIRST_STEP}".split()])
    assert cli.trainer.global_step == 2
    assert [callback for callback in cli.trainer.callbacks if isinstance(callback, IRE)]


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_ire_is_on_for_at_least_half_of_the_steps(path):
    config = yaml.safe_load(path.read_text())
    assert config["ire"].get("start_epoch", 0) <= config["trainer"]["max_epochs"] / 2


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_needs_no_worker_processes(path):
    assert yaml.safe_load(path.read_text())["data"]["init_args"].get("num_workers", 0) == 0


def test_digits_schedule_ends_with_the_run():
    (path,) = (path for path in CONFIGS if path.stem == "digits_resnet_sgd_ire")
    config = yaml.safe_load(path.read_text())
    scheduler = config["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert scheduler["T_max"] == config["trainer"]["max_epochs"]


def test_digits_keeps_the_best_and_the_last_weights():
    (path,) = (path for path in CONFIGS if path.stem == "digits_resnet_sgd_ire")
    flags = "--trainer.accelerator cpu --trainer.limit_train_batches 2 --trainer.enable_progress_bar false"
    fit = ["fit", "--config", str(path), *f"{flags} {FROM_THE_FIRST_STEP} --model.optimizer.lr 0".split()]
    IRECLI([*fit, "--trainer.max_epochs", "3"])
    folder = Path("logs/digits_resnet_sgd_ire/version_0/checkpoints")
    assert sorted(checkpoint.name for checkpoint in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2
    IRECLI([*fit, "--trainer.max_epochs", "4", "--ckpt_path", str(folder / "last.ckpt")])
    resumed = Path("logs/digits_resnet_sgd_ire/version_1/checkpoints/last.ckpt")
    assert torch.load(resumed, weights_only=True)["global_step"] == 8
