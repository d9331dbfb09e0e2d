"""A small classifier, its data, a trainer and a clock, which the tests of the models share."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ire.models import ImageClassifier

CLASSES = 4


def classifier(network: nn.Module | None = None, num_classes: int = CLASSES, **settings: Any) -> ImageClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes)) if network is None else network
    return ImageClassifier(network, num_classes, **settings)


def loader(num: int = 22, num_classes: int = CLASSES, batch_size: int = 8, size: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num, 1, size, size, generator=generator)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


class Clock(Callback):
    """A training step takes 2 seconds (in the second epoch 4), a batch of validation 100, other hooks 1,000."""

    def __init__(self, monkeypatch):
        self.now = 5.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def on_before_backward(self, trainer, pl_module, loss):
        self.now += 2 * (1 + trainer.current_epoch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.now += 100

    def on_train_epoch_end(self, trainer, pl_module):  # comes before the module's own
        self.now += 1000

    def on_train_start(self, trainer, pl_module):
        self.now += 1000


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    defaults = {"max_epochs": 1, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path), "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **settings},
    )
