"""Images per second, by a clock that only these tests move."""

import csv
from pathlib import Path

import cases
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Clock, classifier, loader, trainer

from lightning_ire import IRE, SAM
from lightning_ire.models._throughput import Throughput

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def logged(run) -> list[float]:
    rows = csv.DictReader(Path(run.logger.log_dir, "metrics.csv").read_text().splitlines())
    return [float(row["train/images_per_second"]) for row in rows if row["train/images_per_second"]]


def test_counts_from_start_to_stop_without_pauses(clock):
    throughput = Throughput()
    assert throughput.rate() is None
    throughput.start(CPU)
    throughput.samples += 6
    clock.now += 2
    throughput.pause(CPU)
    clock.now += 50
    throughput.resume(CPU)
    clock.now += 1
    throughput.resume(CPU)  # nothing to resume
    throughput.stop(CPU)
    clock.now += 50
    assert throughput.rate() == 2
    throughput.pause(CPU)  # is not running
    throughput.resume(CPU)
    clock.now += 50
    throughput.stop(CPU)
    assert throughput.rate() == 2
    throughput.start(CPU)
    assert throughput.rate() is None


def test_waits_for_the_device(monkeypatch, clock):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    throughput = Throughput()
    throughput.start(CPU)
    throughput.stop(CPU)
    assert waited == []
    throughput.start(torch.device("cuda", 1))
    throughput.stop(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)] * 2


@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 1}], ids=["at the end", "after each batch"])
def test_once_per_epoch_without_validation(validation, tmp_path, clock):
    run = trainer(tmp_path, max_epochs=2, callbacks=[clock], **validation)
    run.fit(classifier(), loader(22), loader(22))
    assert logged(run) == pytest.approx([22 / 6, 22 / 12])


def test_extra_passes_take_time_but_count_no_images(tmp_path, clock):
    step = classifier()
    original = step.training_step

    def slow(*args):
        clock.now += 10
        return original(*args)

    step.training_step = slow
    run = trainer(tmp_path, callbacks=[clock, IRE(kappa=1.0, interval=2, perturbation=SAM(rho=0.05))])
    run.fit(step, loader(24))
    assert logged(run) == pytest.approx([24 / (3 * (10 + 10 + 2))], rel=1e-3)


def test_epoch_that_is_cut_short(tmp_path, clock):
    run = trainer(tmp_path, max_steps=2, callbacks=[clock])
    run.fit(classifier(), loader(24))
    assert logged(run) == pytest.approx([16 / 1004])  # that it ends is known only after the other hooks


def test_run_that_goes_on_inside_an_epoch(tmp_path, clock):
    keep = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=2)
    trainer(tmp_path, callbacks=[clock, keep], enable_checkpointing=True, max_steps=2).fit(classifier(), loader(24))
    run = trainer(tmp_path, callbacks=[clock])
    run.fit(classifier(), loader(24), ckpt_path=tmp_path / "middle.ckpt")
    assert run.global_step == 3
    assert logged(run) == pytest.approx([8 / 2])


def test_epoch_without_batches_logs_nothing(tmp_path, clock):
    model = classifier()
    model.on_train_batch_start = lambda batch, batch_idx: -1
    run = trainer(tmp_path, callbacks=[clock])
    run.fit(model, loader(24))
    assert run.current_epoch == 1
    assert "train/images_per_second" not in run.logged_metrics


@pytest.mark.slow
def test_devices_are_added_up(tmp_path):
    first, second = cases.two_processes("models/throughput_ddp_script.py", tmp_path)
    assert first["logged"] == second["logged"] == pytest.approx(first["own"] + second["own"])
    assert first["own"] == pytest.approx(16 / (2 * 1))
    assert second["own"] == pytest.approx(16 / (2 * 4))
