"""A small classifier, its data and a trainer, which the tests of the models share."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
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


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    defaults = {"max_epochs": 1, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path), "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **settings},
    )
