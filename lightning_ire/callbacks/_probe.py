"""The fixed batches of training data on which a loss landscape is measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_ire._lightning import data_parallel, moved_batch
from lightning_ire.engine.no_trace import devices_of
from lightning_ire.engine.object_state import kept
from lightning_ire.functional import seeded
from lightning_ire.sharpness.probe import common_size, drawn_samples

__all__ = ["Probe", "held_out_loader", "probe_loader", "training_sizes"]

_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)  # samplers that give all of a dataset


class Probe:
    """Batches, kept in host memory.

    Args:
        batches: The batches.
        moved: Whether they are as `training_step` gets them; else the transfer hooks run at every use.

    Attributes:
        samples: Samples in a batch, as far as that can be told from the first tensor's leading size.
    """

    def __init__(self, batches: list[Any], moved: bool) -> None:
        self._batches = batches
        self._moved = moved
        self.samples = _leading_size(batches[0]) if batches else 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def size(self) -> int | None:
        """Samples in every batch; ``None`` if that is not one known number."""
        return common_size(map(_leading_size, self._batches))

    def batch(self, trainer: pl.Trainer, index: int) -> Any:
        """A copy of a batch on the module's device; random transfer hooks are for the caller to seed.

        Args:
            trainer: The trainer.
            index: Which batch.
        """
        batch = _copied(self._batches[index])
        return move_data_to_device(batch, trainer.strategy.root_device) if self._moved else moved_batch(trainer, batch)

    def shorten(self, count: int) -> None:
        """Leave out the last batches.

        Args:
            count: How many are left.
        """
        del self._batches[count:]

    @classmethod
    def drawn(
        cls, trainer: pl.Trainer, loader: DataLoader, num_batches: int, batch_size: int | None, seed: int
    ) -> Probe:
        """A random part of the loader's dataset, another one on each device, the same for the same seed.

        Devices that share each batch of training (tensor parallel) have the same part.

        All batches are of one size and all devices have equally many: fewer or smaller ones than asked for if the
        dataset has no more. Random transforms of the dataset draw from the seed too.

        Args:
            trainer: The trainer.
            loader: A loader that :func:`probe_loader` returned.
            num_batches: Batches on each device.
            batch_size: Samples in a batch; ``None``: as in the loader.
            seed: Seed.
        """
        allowed = _indices(loader)
        devices, rank = data_parallel(trainer)
        batched = loader.batch_sampler is not None  # else every item of the dataset is a batch
        usual = getattr(loader.batch_sampler, "batch_size", 1)
        asked = (batch_size or usual) if batched else 1
        batches = drawn_samples(len(allowed), asked, num_batches, rank, devices, seed)
        part = Subset(loader.dataset, [allowed[position] for batch in batches for position in batch])
        workers = min(loader.num_workers, len(batches))
        reader: Iterable[Any] = DataLoader(
            part,
            batch_size=max(map(len, batches), default=1) if batched else None,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=torch.Generator().manual_seed(seed + rank),
        )
        own = seeded(seed + rank, devices_of(trainer.lightning_module))
        with kept(loader.dataset, loader.collate_fn, leave=(pl.Trainer,)), own:
            return cls(list(reader), moved=False)

    @classmethod
    def first(cls, loader: Any, num_batches: int) -> Probe:
        """The first batches of anything that yields batches (it is not rewound).

        Args:
            loader: The loader.
            num_batches: How many.
        """
        combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "min_size")
        with kept(loader, leave=(pl.Trainer,)):
            return cls([batch for batch, _, _ in itertools.islice(combined, num_batches)], moved=False)

    def record(self, batch: Any) -> None:
        """Add a batch that `training_step` is about to get.

        Args:
            batch: The batch; copied.
        """
        self._batches.append(apply_to_collection(_copied(batch), Tensor, Tensor.cpu))
        self.samples = self.samples or _leading_size(batch)


def probe_loader(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Any, bool]:
    """Where the probe comes from: a method `probe_dataloader()` of the datamodule or the module, or the training data.

    Args:
        trainer: The trainer.
        module: The module.

    Returns:
        The loader (``None``: there is no training data to be had) and whether it is a DataLoader whose dataset may be
        drawn from: one with an index and a sampler that is known to stand for the whole of it.
    """
    datamodule = getattr(trainer, "datamodule", None)
    loader = trainer.train_dataloader
    if loader is None:  # no fit: validation, or on demand
        if datamodule is not None:
            datamodule.setup("fit")
            loader = datamodule.train_dataloader()
        elif is_overridden("train_dataloader", module):
            loader = module.train_dataloader()
    of_its_own = getattr(datamodule, "probe_dataloader", None) or getattr(module, "probe_dataloader", None)
    if of_its_own is not None:
        loader = of_its_own()
    some = of_its_own is None and bool(trainer.overfit_batches)  # type: ignore[attr-defined]
    return loader, isinstance(loader, DataLoader) and not some and _indices(loader) is not None


def held_out_loader(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Any, bool]:
    """Where held-out data comes from: the first validation loader.

    Args:
        trainer: The trainer.
        module: The module.

    Returns:
        The loader (``None``: there is no validation data) and whether it may be drawn from, as of
        :func:`probe_loader`.
    """
    datamodule, loader = getattr(trainer, "datamodule", None), trainer.val_dataloaders
    if loader is None:
        owner: Any = module if datamodule is None else datamodule
        base = pl.LightningModule if datamodule is None else pl.LightningDataModule
        if is_overridden("val_dataloader", owner, base):
            loader = owner.val_dataloader()
    while isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    return loader, isinstance(loader, DataLoader) and _indices(loader) is not None


def training_sizes(trainer: pl.Trainer) -> tuple[int | None, int | None]:
    """How many samples the training set has, and how many a batch of all devices; ``None`` where that is not known.

    Args:
        trainer: The trainer.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        return None, None
    devices, _ = data_parallel(trainer)
    batch = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    together = None if batch is None else int(batch) * devices
    allowed = _indices(loader)
    if allowed is not None and loader.batch_sampler is not None:
        return len(allowed), together
    batches = trainer.num_training_batches
    known = together is not None and isinstance(batches, int)
    return (int(batches) * int(together) if known else None), together  # type: ignore[arg-type]


def _indices(loader: DataLoader) -> Any:
    """The indices of the dataset that the loader trains on; ``None`` if that is not known for sure."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    known = type(loader).__iter__ is DataLoader.__iter__ and type(batches) in (BatchSampler, type(None))
    if not known or isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return None
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    return range(len(loader.dataset)) if type(sampler) in _WHOLE else None


def _copied(batch: Any) -> Any:
    """A copy down to the tensors, inside objects of the user's own too."""
    return copy.deepcopy(apply_to_collection(batch, Tensor, Tensor.detach))


def _leading_size(batch: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.size(0)) if tensor.dim() else None)
    return sizes[0] if sizes else 0
