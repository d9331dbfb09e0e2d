"""A global batch size on any number of devices: how it is cut, and which samples each device reads."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DistributedSampler

from lightning_ire._checks import ConfigurationError

__all__ = ["BatchPlan", "Share", "WholeBatches", "plan_batches"]


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step's batch: `devices * accumulation * per_device` samples.

    Attributes:
        devices: Devices (processes) that share the batch.
        accumulation: Micro-batches that each of them takes after one another.
        per_device: Samples in a micro-batch.
    """

    devices: int
    accumulation: int
    per_device: int

    def __str__(self) -> str:
        """What is multiplied with what."""
        return f"{self.devices} device(s) x {self.accumulation} micro-batch(es) of {self.per_device}"


def plan_batches(global_batch_size: int, devices: int, accumulation: int, largest: int | None) -> BatchPlan:
    """Cut a global batch into equal micro-batches.

    Args:
        global_batch_size: Samples per optimizer step.
        devices: Number of devices.
        accumulation: Micro-batches per device that the user asked for; 1: as few as `largest` allows.
        largest: Most samples in a micro-batch; `None`: no limit.

    Returns:
        The plan.

    Raises:
        ConfigurationError: If the batch cannot be cut into equal parts.
    """
    if global_batch_size % (devices * accumulation):
        parts = f"devices {devices}, trainer.accumulate_grad_batches {accumulation}"
        raise ConfigurationError(
            f"Expected `global_batch_size` to be a multiple of {devices * accumulation} ({parts}), "
            f"got {global_batch_size}."
        )
    share = global_batch_size // devices
    if accumulation == 1 and largest is not None:
        accumulation = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= largest)
    per_device = share // accumulation
    if largest is not None and per_device > largest:
        raise ConfigurationError(
            f"Expected `max_batch_per_device` to be at least {per_device} (global_batch_size {global_batch_size} on "
            f"{devices} device(s) with trainer.accumulate_grad_batches {accumulation}), got {largest}: leave "
            "trainer.accumulate_grad_batches at 1 and it is chosen."
        )
    return BatchPlan(devices, accumulation, per_device)


class WholeBatches(DistributedSampler):
    """Shuffled indices of one device, in whole global batches.

    The order depends on (seed, epoch) alone, and device r takes every `devices`-th index from r on. So the global
    batches consist of the same samples on any number of devices and with any number of micro-batches, and an epoch
    that is run again after a resume has the same ones. The samples left over at the end of an epoch take no part in it.

    Args:
        dataset: What has a length.
        global_batch_size: Samples per optimizer step, a multiple of `devices`.
        devices: Number of devices.
        rank: This device.
        seed: Seed of the order.

    Raises:
        ConfigurationError: If there are fewer samples than one batch has.
    """

    def __init__(self, dataset: Sized, global_batch_size: int, devices: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=devices, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.total_size = len(dataset) // global_batch_size * global_batch_size
        self.num_samples = self.total_size // devices
        if self.total_size == 0:
            raise ConfigurationError(
                f"Expected `global_batch_size` to be at most the {len(dataset)} training images, "
                f"got {global_batch_size}."
            )


class Share(DistributedSampler):
    """Indices of one device in their order, each index on exactly one device.

    torch's own sampler repeats samples where the devices do not divide their number, which changes the averages.

    Args:
        dataset: What has a length.
        devices: Number of devices.
        rank: This device.

    Raises:
        ConfigurationError: If there are fewer samples than devices.
    """

    def __init__(self, dataset: Sized, devices: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=devices, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = range(rank, len(dataset), devices)
        if len(dataset) < devices:
            raise ConfigurationError(
                f"Expected at least one sample per device for evaluation, got {len(dataset)} on {devices} devices."
            )

    def __iter__(self) -> Iterator[Any]:
        """Return the indices."""
        return iter(self.mine)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.mine)
