import math
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from small import CLASSES, classifier, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ire import ConfigurationError
from lightning_ire.models import WarmupCosineLR
from lightning_ire.models._optimization import parameter_groups

LR = 0.5


class Rates(Callback):
    """The rate that each optimizer step is made with."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


class Endless(IterableDataset):
    """Does not know its length."""

    def __iter__(self):
        while True:
            yield torch.ones(1, 2, 2), 0


def scheduled(lr_interval, **schedule):
    return classifier(
        optimizer=partial(torch.optim.SGD, lr=LR),
        lr_scheduler=partial(WarmupCosineLR, **schedule),
        lr_interval=lr_interval,
    )


def expected(t, warmup, total):
    return LR * (
        (t + 1) / (warmup + 1) if t < warmup else (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2
    )


def fitted(tmp_path, model, data=None, ckpt_path=None, **settings):
    rates = Rates()
    run = trainer(tmp_path, callbacks=[rates, *settings.pop("callbacks", [])], **settings)
    run.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)  # three batches
    return rates.seen


@pytest.mark.parametrize("epochs", [3, 4])
def test_length_is_the_runs_epochs(epochs, tmp_path):
    seen = fitted(tmp_path, scheduled("epoch", warmup=1), max_epochs=epochs)
    assert seen == pytest.approx([expected(t, 1, epochs) for t in range(epochs) for _ in range(3)])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 3}, 9),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 4}, 4),
    ],
)
def test_length_is_the_runs_steps(settings, steps, tmp_path):
    seen = fitted(tmp_path, scheduled("step", warmup=0.4), **settings)
    assert seen[:-1] == pytest.approx([expected(t, round(0.4 * steps), steps) for t in range(steps - 1)])
    assert len(seen) == steps


def test_length_in_steps_needs_no_length_of_the_loader(tmp_path):
    endless = DataLoader(Endless(), batch_size=2)
    seen = fitted(tmp_path, scheduled("step"), endless, max_epochs=-1, max_steps=4)
    assert seen == pytest.approx([expected(t, 0, 4) for t in range(4)])
    message = (
        "Expected `trainer.max_steps`, or `trainer.max_epochs` and a loader with a fixed length, to give the learning-"
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}.*got -1 and 3: set `trainer.max_steps` "):
        fitted(tmp_path, scheduled("step"), endless, max_epochs=3)
    with pytest.raises(ConfigurationError, match=r"^Expected `trainer.max_steps`, or .*got -1 and -1: set"):
        fitted(tmp_path, scheduled("step"), max_epochs=-1)
    with pytest.raises(ConfigurationError, match=r"^Expected `trainer.max_steps`, or .*got 9 and 3: set"):
        fitted(tmp_path, scheduled("step"), endless, max_epochs=3, max_steps=9)


def test_length_in_steps_follows_the_accumulation(tmp_path):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})  # 3 + 2 + 2 steps
    seen = fitted(tmp_path, scheduled("step"), max_epochs=3, callbacks=[accumulation])
    assert seen == pytest.approx([expected(t, 0, 7) for t in range(7)])


@pytest.mark.parametrize("steps", [4, -1])
def test_length_in_epochs_needs_a_number_of_epochs(steps, tmp_path):
    message = (
        "Expected `trainer.max_epochs` to give the learning-rate schedule its length in epochs, got -1: set it, or "
        "`lr_scheduler.total`, or `lr_interval` to 'step'."
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        fitted(tmp_path, scheduled("epoch"), max_epochs=-1, max_steps=steps)


def test_given_length_is_kept(tmp_path):
    seen = fitted(tmp_path, scheduled("step", total=20), max_epochs=2)
    assert seen == pytest.approx([expected(t, 0, 20) for t in range(6)])


def test_warmup_as_long_as_the_run(tmp_path):
    with pytest.raises(ConfigurationError, match=r"^Expected `warmup` to be less than .* \(2\), got 2\.$"):
        fitted(tmp_path, scheduled("epoch", warmup=2), max_epochs=2)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_config_can_be_tried_out(interval, tmp_path):
    assert fitted(tmp_path, scheduled(interval, warmup=9), fast_dev_run=2)[0] == pytest.approx(expected(0, 9, 10))


def test_length_of_a_run_of_no_epochs(tmp_path):
    assert fitted(tmp_path, scheduled("epoch", warmup=2), max_epochs=0) == []
    assert fitted(tmp_path, scheduled("step", warmup=0.1), limit_train_batches=0) == []


def test_module_by_itself_leaves_the_length_open():
    made = scheduled("epoch", warmup=3).configure_optimizers()
    assert made["lr_scheduler"]["scheduler"].total is None
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(LR / 4)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_resumed_run_has_the_rates_of_an_uninterrupted_or_longer_one(interval, tmp_path):
    settings = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]}
    fitted(tmp_path, scheduled(interval, warmup=1), max_epochs=4, **settings)
    first = tmp_path / "epoch=0.ckpt"
    assert torch.load(first, weights_only=True)["epoch"] == 0
    for epochs in (4, 7):
        seen = fitted(tmp_path, scheduled(interval, warmup=1), ckpt_path=first, max_epochs=epochs)
        wanted = [
            expected(step if interval == "step" else step // 3, 1, epochs * 3 if interval == "step" else epochs)
            for step in range(3, epochs * 3)
        ]
        assert seen == pytest.approx(wanted)


def test_parameter_groups_of_any_module():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, CLASSES))
    assert list(parameter_groups(module, True)) == list(module.parameters())
    matrices, vectors = parameter_groups(module, False)
    assert matrices == {"params": [module[0].weight, module[2].weight]}
    assert vectors == {
        "params": [module[0].bias, module[1].weight, module[1].bias, module[2].bias],
        "weight_decay": 0.0,
    }
