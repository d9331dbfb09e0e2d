"""A global batch size on any number of devices: how it is cut, and which samples each device reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from lightning_ire._checks import ConfigurationError

__all__ = ["BatchPlan", "EpochOrder", "Share", "WholeBatches", "own_draws", "plan_batches"]


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


class EpochOrder(DistributedSampler, ABC):
    """Indices of one device in whole batches, in an order that depends on (seed, epoch) alone.

    Device r takes every `devices`-th index from r on. So the batches consist of the same samples on any number of
    devices and with any number of micro-batches, and what the devices have read after some batches is a beginning of
    the order, whose length says all about it. The samples left over at the end of an epoch take no part in it.

    Args:
        dataset: The dataset.
        available: Samples that every epoch has, at least `batch`.
        batch: Samples in a batch of all devices, a multiple of `devices`.
        devices: Number of devices.
        rank: This device.
        seed: Seed of the order.

    Attributes:
        span: Where in the order of all devices the next pass begins, and where it ends.
    """

    def __init__(self, dataset: Any, available: int, batch: int, devices: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=devices, rank=rank, seed=seed, drop_last=True)
        self.available, self.batch = available, batch
        self.total_size = self.left(0)
        self.num_samples = self.total_size // devices
        self.span = (0, self.total_size)

    @abstractmethod
    def indices(self) -> np.ndarray:
        """Indices of the whole epoch, of all devices."""

    def left(self, behind: int) -> int:
        """Samples of the whole batches that an epoch still has after its first samples.

        Args:
            behind: Number of these.
        """
        return (self.available - behind) // self.batch * self.batch

    def __iter__(self) -> Iterator[Any]:
        """Return the indices."""
        return iter(self.indices()[slice(*self.span)][self.rank :: self.num_replicas].tolist())

    def __len__(self) -> int:
        """Return how many there are in a whole epoch."""
        return self.num_samples


class WholeBatches(EpochOrder):
    """Shuffled indices; each one brings a seed for what is drawn for its sample, from (seed, epoch, index) alone.

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
        super().__init__(dataset, len(dataset), global_batch_size, devices, rank, seed)
        if self.total_size == 0:
            raise ConfigurationError(
                f"Expected `global_batch_size` to be at most the {len(dataset)} training images, "
                f"got {global_batch_size}."
            )

    def indices(self) -> np.ndarray:
        """As torch's `DistributedSampler` shuffles."""
        return torch.randperm(self.available, generator=torch.Generator().manual_seed(self.seed + self.epoch)).numpy()

    def __iter__(self) -> Iterator[Any]:
        """Return the indices with their seeds."""
        seeds = np.random.default_rng([self.seed, self.epoch]).integers(1 << 32, size=self.available)
        return (_Drawn(index, int(seeds[index])) for index in super().__iter__())


class _Drawn(int):
    """An index with the seed of what is drawn for its sample; as an `int` it indexes any dataset."""

    seed: int

    def __new__(cls, index: int, seed: int) -> _Drawn:
        drawn = super().__new__(cls, index)
        drawn.seed = seed
        return drawn

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.seed


def own_draws(index: int) -> AbstractContextManager[None]:
    """A context in which torch's random numbers on the CPU are the sample's own, if its index came from `WholeBatches`.

    Args:
        index: The index; a plain number: the random numbers are whichever come next.
    """
    return _seeded(index.seed) if isinstance(index, _Drawn) else nullcontext()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


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
