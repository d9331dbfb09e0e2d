"""What data modules with a global batch size share."""

from __future__ import annotations

import itertools
from collections.abc import Sized
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire._lightning import data_parallel
from lightning_ire.data._batches import BatchPlan, EpochOrder, Share, plan_batches
from lightning_ire.data._resumable import ResumableData, ResumableLoader

__all__ = ["GlobalBatchData"]


class GlobalBatchData(ResumableData):
    """Batches of one size over all devices and accumulated micro-batches.

    An optimizer step sees `global_batch_size` samples: each of D devices gets batches of
    `global_batch_size / (D * A)`, where A, the number of accumulated micro-batches, is the smallest that keeps them
    within `max_batch_per_device` (it is set as `trainer.accumulate_grad_batches`, unless that was given already).
    Devices that share a batch (tensor parallel) are one here.
    """

    batch_key: ClassVar[str] = "global_batch_size"

    def __init__(
        self,
        global_batch_size: int,
        max_batch_per_device: int | None,
        eval_batch_size: int | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        """Check the settings.

        Args:
            global_batch_size: Samples per optimizer step.
            max_batch_per_device: Most samples that a device takes at once; none: no limit.
            eval_batch_size: Samples per batch and device in evaluation; none: as many as in training.
            num_workers: Processes per device that load data.
            pin_memory: Whether batches are put in page-locked memory where there is a CUDA device.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__()
        self.global_batch_size = check_whole("global_batch_size", global_batch_size, low=1)
        self.max_batch_per_device = _optional("max_batch_per_device", max_batch_per_device)
        self.eval_batch_size = _optional("eval_batch_size", eval_batch_size)
        self.num_workers = check_whole("num_workers", num_workers, low=0)
        self.pin_memory = pin_memory
        self._plan: BatchPlan | None = None

    @property
    def plan(self) -> BatchPlan:
        """How the batch is cut; known after `setup`."""
        assert self._plan is not None
        return self._plan

    @property
    def rank(self) -> int:
        """This process, or the group of those that share a batch (tensor parallel)."""
        return data_parallel(self.trainer)[1] if self.trainer is not None else 0

    @property
    def in_step(self) -> bool:
        """Whether devices have parts of the network, so that all have to make the same number of forward passes."""
        return self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def make_plan(self, fitting: bool) -> None:
        """Cut the batch for the devices there are, and tell the trainer how much to accumulate.

        Args:
            fitting: Whether the trainer is about to train.

        Raises:
            ConfigurationError: If the batch cannot be cut.
        """
        if self.trainer is None:
            self._plan = plan_batches(self.global_batch_size, 1, 1, self.max_batch_per_device)
            return
        trainer = self.trainer
        asked = trainer.accumulate_grad_batches
        devices, _ = data_parallel(trainer)
        self._plan = plan_batches(self.global_batch_size, devices, asked, self.max_batch_per_device)
        if not fitting or self._plan.accumulation == asked:
            return
        if not trainer.lightning_module.automatic_optimization:
            raise ConfigurationError(
                f"Expected `max_batch_per_device` to be null for a module in manual optimization (it accumulates by "
                f"itself), got {self.max_batch_per_device}."
            )
        trainer.accumulate_grad_batches = self._plan.accumulation
        rank_zero_info(f"Global batch of {self.global_batch_size}: {self._plan}.")

    def batch_per_device(self, order: EpochOrder) -> int:
        """Samples of a micro-batch.

        Args:
            order: Not used.
        """
        return self.plan.per_device

    def training_loader(self, collate: Any = None) -> DataLoader:
        """Return a loader of this device's share of the training samples; it saves its position in checkpoints.

        Args:
            collate: As in `loader`.
        """
        order = self.training_order()
        return self.resumable(self.loader(order.dataset, self.plan.per_device, order, collate, ResumableLoader))

    def evaluation_loader(self, dataset: Dataset) -> DataLoader:
        """Return a loader of this device's share of a dataset, in order.

        Args:
            dataset: What has a length.
        """
        size = self.eval_batch_size or self.plan.per_device
        if self.in_step:
            size = even_size(dataset, self.plan.devices, size)  # type: ignore[arg-type]
        return self.loader(dataset, size, Share(dataset, self.plan.devices, self.rank))  # type: ignore[arg-type]

    def loader(
        self,
        dataset: Dataset,
        batch_size: int,
        sampler: Any,
        collate: Any = None,
        kind: type[DataLoader] = DataLoader,
    ) -> DataLoader:
        """Return a loader with the settings for processes and memory.

        Args:
            dataset: The dataset.
            batch_size: Samples in a batch.
            sampler: Their order.
            collate: Makes a batch of samples; none: torch's own.
            kind: Class of the loader.
        """
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def even_size(dataset: Sized, devices: int, size: int) -> int:
    """Return a batch size with which all devices have equally many batches of their shares of a dataset.

    A device has n or n + 1 samples: these make equally many batches if the size does not divide n.

    Args:
        dataset: What has a length, at least the number of devices.
        devices: Number of devices.
        size: The size that was asked for: the result is the largest one that is not larger, or else the smallest one.
    """
    least, more = divmod(len(dataset), devices)
    sizes = itertools.chain(range(size, 1, -1), itertools.count(size + 1))
    return next(size for size in sizes if least % size) if more else size


def _optional(name: str, value: int | None) -> int | None:
    return None if value is None else check_whole(name, value, low=1)
