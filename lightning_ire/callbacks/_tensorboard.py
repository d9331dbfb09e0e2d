"""The run's loggers, and what only TensorBoard can show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_ire import tags
from lightning_ire._lightning import logger_step, will_log
from lightning_ire.engine.step import OptimizerStep
from lightning_ire.functional import as_shares

__all__ = ["loggers_of", "tensorboards", "write_logs"]


def loggers_of(trainer: pl.Trainer) -> list[Any]:
    """The run's loggers; none on other devices than the first and in `fast_dev_run`.

    Args:
        trainer: The trainer.
    """
    return [] if not trainer.is_global_zero or trainer.fast_dev_run else list(trainer.loggers)  # type: ignore[attr-defined]


def tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Those of :func:`loggers_of` that are TensorBoard's.

    Args:
        trainer: The trainer.
    """
    return [logger for logger in loggers_of(trainer) if isinstance(logger, TensorBoardLogger)]


def write_logs(trainer: pl.Trainer, module: pl.LightningModule, step: OptimizerStep, suffix: str = "") -> None:
    """After a batch whose training metrics Lightning is about to write: log what its step has to say.

    Args:
        trainer: The trainer.
        module: The module being trained.
        step: The optimizer's.
        suffix: Added to the tags, to tell several optimizers apart.
    """
    logs = step.take_logs(wanted=not trainer.barebones and will_log(trainer))
    for tag, value in logs.items():
        module.log(tag + suffix, value, on_step=True, on_epoch=False, batch_size=1)
    if logs and (masks := step.progress.masks.take_new()):
        _layer_fractions(trainer, masks, suffix)


def _layer_fractions(trainer: pl.Trainer, masks: Mapping[str, Tensor], suffix: str) -> None:
    """Write the histogram of the flat fractions of the parameter tensors, each tensor counted once."""
    loggers = tensorboards(trainer) if masks else []
    if not loggers:
        return
    device = next(iter(masks.values())).device
    fractions = torch.stack([as_shares(mask, torch.float32).mean().to(device) for mask in masks.values()]).cpu()
    for logger in loggers:
        logger.experiment.add_histogram(
            tags.LAYER_FLAT_FRACTIONS + suffix, fractions, logger_step(trainer), bins=[i / 40 for i in range(41)]
        )
