"""Lightning's Trainer as a host of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_ire._lightning import data_parallel, loss_scale, muted_logging, scaled, unsynchronized, will_log
from lightning_ire.engine.host import dtype_of_autocast

__all__ = ["LightningHost"]


class LightningHost:
    """See :class:`~lightning_ire.engine.host.Host`.

    Args:
        trainer: The trainer.
        module: The module being trained.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module

    @property
    def rank(self) -> int:
        return data_parallel(self._trainer)[1]

    @property
    def world_size(self) -> int:
        return data_parallel(self._trainer)[0]

    @property
    def device(self) -> torch.device:
        return self._trainer.strategy.root_device

    @property
    def micro_batches(self) -> int:
        return self._trainer.accumulate_grad_batches

    @property
    def epoch(self) -> int:
        return self._trainer.current_epoch

    @property
    def loss_scale(self) -> float:
        return loss_scale(self._trainer)

    @property
    def will_log(self) -> bool:
        return will_log(self._trainer)

    @property
    def what_steps(self) -> str:
        return f"`{type(self._module).__name__}.training_step`"

    def backward(self, loss: Tensor) -> None:
        # by the full number in a short last window too, as Lightning does
        closure_loss = scaled(self._trainer, loss / self._trainer.accumulate_grad_batches)
        self._trainer.strategy.pre_backward(closure_loss)
        self._module.backward(closure_loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        return unsynchronized(self._trainer.strategy)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return dtype_of_autocast(self.device, self.autocast())

    def autocast(self) -> AbstractContextManager[Any]:
        return self._trainer.precision_plugin.train_step_context()

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        return muted_logging(modules)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        total = self._trainer.strategy.reduce(value, reduce_op="sum")
        copies = self._trainer.world_size // self.world_size  # devices that share a batch (tensor parallel)
        return total if copies == 1 else total / copies
