"""Handwritten digits that come with scikit-learn: a real data set that needs no download."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire._lightning import data_parallel
from lightning_ire.data._batches import EpochOrder, WholeBatches, own_draws
from lightning_ire.data._resumable import ResumableData, ResumableLoader

__all__ = ["Digits"]

_INSTALL = (
    "Expected scikit-learn and torchvision for `Digits`, got an import error: pip install 'lightning-ire[vision]'"
)


class Digits(ResumableData):
    """The 1,797 handwritten digits of scikit-learn's `load_digits`, as images of 8 x 8 pixels in 10 classes.

    The split is stratified by class and depends on `seed` alone. Images are float32 of shape [1, 8, 8], standardised
    with the mean and the standard deviation of all pixels of the training part.

    Training batches are all full (the last, smaller one is dropped: the next epoch has another order), so that every
    optimizer step, BatchNorm statistic and curvature estimate sees equally many images. A training part smaller than
    one batch is kept as it is, but for images left over by the number of devices.

    Under a Trainer the order of an epoch depends on (`seed_everything`, epoch) alone, and what is drawn for an image on
    these and the image: a run that is resumed, also inside an epoch, sees the same. In a loop of your own every pass
    has the order that torch's random numbers give.

    Attributes:
        num_classes: 10.
        in_channels: 1.

    Example:
        >>> Digits(batch_size=128, augment=False).num_classes
        10
    """

    batch_key: ClassVar[str] = "batch_size"
    num_classes: int = 10
    in_channels: int = 1
    _num_images: int = 1797

    def __init__(
        self,
        batch_size: int = 64,
        val_size: int | float = 0.1,
        test_size: int | float = 0.2,
        seed: int = 0,
        augment: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Check the settings; the data is read in `setup`.

        Args:
            batch_size: Images per batch and process.
            val_size: Validation part: a number of images, or a fraction (below 1) of all images. 0 leaves it out.
            test_size: Test part, given in the same way.
            seed: Seed of the split; another seed gives other parts.
            augment: Whether training images are turned by up to 10 degrees and shifted by up to one pixel, at random.
            num_workers: Processes that load data; at this size 0 (the main process) is fastest.
            pin_memory: Whether batches are put in page-locked memory, for faster copies to a GPU.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size, low=1)
        self.seed = check_whole("seed", seed, low=0)
        self.num_workers = check_whole("num_workers", num_workers, low=0)
        self.augment = augment
        self.pin_memory = pin_memory
        self.num_val = self._count("val_size", val_size)
        self.num_test = self._count("test_size", test_size)
        if self.num_val + self.num_test > self._num_images - self.num_classes:
            raise ConfigurationError(
                f"Expected `val_size` and `test_size` to leave at least {self.num_classes} of {self._num_images} "
                f"images for training, got {val_size!r} and {test_size!r}."
            )
        self._parts: dict[str, _Images] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split and standardise the images; every stage needs all of it, so it is done once.

        Args:
            stage: Lightning's stage; not used.

        Raises:
            ConfigurationError: If scikit-learn or torchvision is not installed.
        """
        if self._parts:
            return
        try:
            from sklearn.datasets import load_digits
            from torchvision.transforms import v2
        except ImportError as error:
            raise ConfigurationError(_INSTALL) from error
        source = load_digits()
        images = torch.from_numpy(source.images).float().unsqueeze(1) / 16.0
        labels = torch.from_numpy(source.target).long()
        train, val, test = self._split(labels)
        normalize = v2.Normalize([images[train].mean().item()], [images[train].std().item()])
        # The background is 0, and so is what a shift moves in: it has to come before the normalisation.
        move = v2.RandomAffine(degrees=10, translate=(0.125, 0.125), interpolation=v2.InterpolationMode.BILINEAR)
        self._parts = {
            "train": _Images(
                images[train], labels[train], v2.Compose([move, normalize]) if self.augment else normalize
            ),
            "val": _Images(images[val], labels[val], normalize),
            "test": _Images(images[test], labels[test], normalize),
        }

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled, augmented training part in full batches."""
        if self.trainer is None:
            full = len(self._parts["train"]) >= self.batch_size
            return self._loader("train", shuffle=True, drop_last=full)
        order = self.training_order()
        return self.resumable(self._loader("train", ResumableLoader, self.batch_per_device(order), sampler=order))

    def training_order(self) -> WholeBatches:
        """The order of the training images."""
        trainer, train = self.trainer, self._parts["train"]
        assert trainer is not None
        devices, rank = data_parallel(trainer)
        batch = min(self.batch_size, len(train) // devices) * devices
        return WholeBatches(train, batch, devices, rank, self.order_seed())

    def batch_per_device(self, order: EpochOrder) -> int:
        """Images of a batch on a device.

        Args:
            order: The order of the training images.
        """
        return order.batch // order.num_replicas

    def order_depends_on(self) -> dict[str, Any]:
        """The images that are trained on, and the seed."""
        order, images = self.training_order(), self._parts["train"].images
        return {
            "images": f"{len(images)} images, checksum {zlib.crc32(images.numpy().tobytes()):08x}",
            "seed_everything": order.seed,
        }

    def probe_dataloader(self) -> DataLoader:
        """Return the training part without augmentation: where SharpnessMonitor takes its probe from."""
        train = self._parts["train"]
        return DataLoader(_Images(train.images, train.labels, self._parts["test"].transform), self.batch_size)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the validation part, or no loader if `val_size` is 0."""
        return self._loader("val") if self.num_val else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the test part, or no loader if `test_size` is 0."""
        return self._loader("test") if self.num_test else []

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the test part, or no loader if `test_size` is 0."""
        return self.test_dataloader()

    def _loader(
        self, part: str, kind: type[DataLoader] = DataLoader, batch_size: int | None = None, **settings: Any
    ) -> DataLoader:
        return kind(
            self._parts[part],
            batch_size=batch_size or self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            **settings,
        )

    def _count(self, name: str, size: int | float) -> int:
        """Return the number of images that a part of this size has."""
        count = -1
        if isinstance(size, int) and not isinstance(size, bool):
            count = size
        elif isinstance(size, float) and 0 <= size < 1:
            count = round(size * self._num_images)
        if count < 0 or 0 < count < self.num_classes:  # every part needs images of every class
            raise ConfigurationError(
                f"Expected `{name}` to be 0, a count >= {self.num_classes} or a fraction in (0, 1) of "
                f"{self._num_images} images, got {size!r}."
            )
        return count

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices of the training, validation and test images; the shares of the classes are kept."""
        from sklearn.model_selection import train_test_split

        rest, held_out = torch.arange(len(labels)), []
        for count in (self.num_val, self.num_test):
            part = rest[:0]
            if count:
                kept, taken = train_test_split(
                    rest.numpy(), test_size=count, stratify=labels[rest].numpy(), random_state=self.seed
                )
                rest, part = torch.from_numpy(kept), torch.from_numpy(taken)
            held_out.append(part)
        return rest, held_out[0], held_out[1]


class _Images(Dataset):
    """Images and labels in memory, with a transform on each image as it is read."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with own_draws(index):
            return self.transform(self.images[index]), self.labels[index]
