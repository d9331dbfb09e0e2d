"""What the image datamodules share: batches, split, transforms, mixing."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_path, check_whole
from lightning_ire.data._batches import WholeBatches, own_draws
from lightning_ire.data.global_batch import GlobalBatchData
from lightning_ire.data.transforms import batch_mixing, evaluation_chain, torchvision_v2, training_chain

__all__ = ["ImageData"]

AUGMENTATIONS = ("none", "basic", "autoaugment", "randaugment")


class ImageData(GlobalBatchData, ABC):
    """Images in classes, from files; subclasses say where they are.

    **Batches.** An optimizer step sees `global_batch_size` images: each of D devices gets batches of
    `global_batch_size / (D * A)`, where A, the number of accumulated micro-batches, is the smallest that keeps them
    within `max_batch_per_device` (it is set as `trainer.accumulate_grad_batches`, unless that was given already). The
    global batches are the same on any number of devices: their images depend on (`seed_everything`, epoch) alone, and
    what is drawn for an image on these and the image. Epochs consist of whole global batches; what is left over takes
    no part in that epoch.

    **Resuming** goes on after the last optimizer step that a checkpoint knows of, in the same order and with the same
    augmentation, inside an epoch too. There `global_batch_size`, `max_batch_per_device` and the number of devices may
    be others: the images that the epoch has left come once, but for fewer than a batch. Another seed or other training
    images are refused inside an epoch, and allowed at its end. Images in memory are compared by all pixels and labels,
    those in folders by all names and by the contents of 256 files, spread evenly.

    **Evaluation.** With `val_size` 0 (the whole training set is trained on, as in the papers) validation shows the test
    images: do not choose checkpoints or settings by it, give `val_size` for that. Every image counts once, on any
    number of devices.

    **Mixing** happens after a batch is on the device, so that all passes of a SAM step see the same mixed batch. The
    draw is another one in each process and micro-batch: so it is the same after a resume, but not in other batches.
    Labels are then probabilities [N, num_classes].

    The probe of `SharpnessMonitor` has the evaluation transforms, on training images.

    Attributes:
        num_classes: Number of classes; `None` until it is known.
        in_channels: 3.
    """

    num_classes: int | None = None
    in_channels: int = 3

    def __init__(
        self,
        root: str | Path,
        global_batch_size: int,
        max_batch_per_device: int | None = None,
        eval_batch_size: int | None = None,
        val_size: int | float = 0,
        split_seed: int = 0,
        augmentation: Literal["none", "basic", "autoaugment", "randaugment"] = "basic",
        randaugment_ops: int = 2,
        randaugment_magnitude: int = 15,
        cutout_size: int = 0,
        cutout_probability: float = 1.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        num_workers: int = 4,
        pin_memory: bool = True,
    ) -> None:
        """Check the settings; nothing is read yet.

        Args:
            root: Folder of the data.
            global_batch_size: Images per optimizer step, over all devices and micro-batches.
            max_batch_per_device: Most images that a device takes at once; more are accumulated. `null`: no limit.
            eval_batch_size: Images per batch and device in evaluation. `null`: as many as in training.
            val_size: Training images held out for validation: a number, or a fraction below 1. 0: none.
            split_seed: Seed of that choice.
            augmentation: `none`; `basic`: crop and flip; `autoaugment`, `randaugment`: these as well.
            randaugment_ops: Operations per image of RandAugment.
            randaugment_magnitude: Their magnitude on torchvision's scale, 0 to 30.
            cutout_size: Side in pixels of the square that Cutout zeroes; 0: no Cutout.
            cutout_probability: Share of the training images with Cutout.
            mixup_alpha: MixUp with lambda ~ Beta(alpha, alpha); 0: off.
            cutmix_alpha: CutMix likewise; with both, one is drawn for each batch.
            num_workers: Processes per device that load data.
            pin_memory: Whether batches are put in page-locked memory where there is a CUDA device.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(global_batch_size, max_batch_per_device, eval_batch_size, num_workers, pin_memory)
        self.root = check_path("root", root)
        self.val_size = _check_size(val_size)
        self.split_seed = check_whole("split_seed", split_seed, low=0)
        self.augmentation = check_choice("augmentation", augmentation, AUGMENTATIONS)
        self.randaugment_ops = check_whole("randaugment_ops", randaugment_ops, low=1)
        self.randaugment_magnitude = check_whole("randaugment_magnitude", randaugment_magnitude, low=0)
        if randaugment_magnitude > 30:
            raise ConfigurationError(
                f"Expected `randaugment_magnitude` to be a whole number in [0, 30], got {randaugment_magnitude!r}."
            )
        self.cutout_size = check_whole("cutout_size", cutout_size, low=0)
        self.cutout_probability = check_number("cutout_probability", cutout_probability, high=1.0)
        self.mixup_alpha = check_number("mixup_alpha", mixup_alpha)
        self.cutmix_alpha = check_number("cutmix_alpha", cutmix_alpha)
        self._sources: dict[str, Any] = {}
        self._held_out: Tensor = torch.empty(0, dtype=torch.long)
        self._kept: Tensor = torch.empty(0, dtype=torch.long)
        self._mixing: nn.Module | None = None

    # What a subclass provides.

    mean: Sequence[float]
    std: Sequence[float]

    @abstractmethod
    def read(self, part: Literal["train", "test"]) -> Dataset:
        """Open one part as a dataset of (PIL image, class index); it has to have a length.

        Where it has an attribute `fingerprint`, a text that is another one for other images or labels, an epoch is
        only finished with the images it was begun with.

        Args:
            part: Which part.

        Raises:
            ConfigurationError: If it is not there or broken.
        """

    @abstractmethod
    def geometry(self, training: bool) -> list[nn.Module]:
        """Crops, flips and resizing of a PIL image.

        Args:
            training: Whether random ones.
        """

    @abstractmethod
    def autoaugment_policy(self) -> Any:
        """The AutoAugment policy (`v2.AutoAugmentPolicy`) for this kind of images."""

    # What Lightning calls.

    def setup(self, stage: str | None = None) -> None:
        """Open the data, split it, and cut the global batch for the devices there are.

        Args:
            stage: Lightning's stage; the training images are only opened where they are needed.

        Raises:
            ConfigurationError: If data is missing or broken, or the batch cannot be cut.
        """
        needs_train = stage in (None, "fit") or (stage == "validate" and self.val_size != 0)
        if needs_train and "train" not in self._sources:
            self._sources["train"] = self.read("train")
            self._split(len(self._sources["train"]))
        needs_test = stage in (None, "test", "predict") or self.val_size == 0
        if needs_test and "test" not in self._sources:
            self._sources["test"] = self.read("test")
        self.make_plan(fitting=stage == "fit")
        if self.num_classes is not None:
            self._mixing = batch_mixing(self.mixup_alpha, self.cutmix_alpha, self.num_classes)

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled, augmented training images."""
        return self.training_loader(_with_seed if self._mixing is not None else None)

    def training_order(self) -> WholeBatches:
        """The order of the training images."""
        train = _Images(self._sources["train"], self._kept, self._training_transform(), self._mixing is not None)
        devices = self.plan.devices
        return WholeBatches(train, self.global_batch_size, devices, self.rank, self.order_seed())

    def order_depends_on(self) -> dict[str, Any]:
        """The images that are trained on, and the seed."""
        source = self._sources["train"]
        checksum = zlib.crc32(self._kept.numpy().tobytes())
        with suppress(TypeError, ValueError):  # a dataset may have anything under these names
            labels = np.asarray(getattr(source, "targets", getattr(source, "labels", ())), dtype="<i8")
            checksum = zlib.crc32(labels.tobytes(), checksum)
        fingerprint = getattr(source, "fingerprint", None)
        return {
            "images": f"{len(self._kept)} images, checksum {checksum:08x}",
            **({} if fingerprint is None else {"contents": fingerprint}),
            "seed_everything": self.order_seed(),
        }

    def probe_dataloader(self) -> DataLoader:
        """Return the training images without augmentation: where SharpnessMonitor takes its probe from."""
        train = _Images(self._sources["train"], self._kept, self._evaluation_transform())
        return DataLoader(train, self.plan.per_device, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the images held out of training, or the test images if there are none."""
        if self.val_size == 0:
            return self.test_dataloader()
        return self.evaluation_loader(_Images(self._sources["train"], self._held_out, self._evaluation_transform()))

    def test_dataloader(self) -> DataLoader:
        """Return the test images."""
        return self.evaluation_loader(_Images(self._sources["test"], None, self._evaluation_transform()))

    def predict_dataloader(self) -> DataLoader:
        """Return the test images."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix a training batch on its device.

        Args:
            batch: Images and labels; from the training loader, if mixing is on, a seed as well.
            dataloader_idx: Not used.

        Returns:
            Images and labels.
        """
        if self._mixing is None or len(batch) == 2:
            return batch
        images, labels, seed = batch
        with torch.random.fork_rng(devices=()):  # MixUp and CutMix draw on the CPU
            torch.default_generator.manual_seed(seed + self.rank)
            return list(self._mixing(images, labels))

    # Inner parts.

    def _split(self, count: int) -> None:
        held_out = self.val_size if isinstance(self.val_size, int) else round(self.val_size * count)
        if self.val_size and not 0 < held_out < count:
            raise ConfigurationError(
                f"Expected `val_size` to hold out at least one of {count} training images and leave one, "
                f"got {self.val_size!r}."
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        self._held_out, self._kept = order[:held_out].sort().values, order[held_out:].sort().values

    def _training_transform(self) -> Callable[[Any], Tensor]:
        geometry = self.geometry(training=self.augmentation != "none")
        v2 = torchvision_v2()
        policy = None
        if self.augmentation == "autoaugment":
            policy = v2.AutoAugment(self.autoaugment_policy())
        elif self.augmentation == "randaugment":
            policy = v2.RandAugment(
                self.randaugment_ops, self.randaugment_magnitude, interpolation=v2.InterpolationMode.BILINEAR
            )
        return training_chain(geometry, policy, self.mean, self.std, self.cutout_size, self.cutout_probability)

    def _evaluation_transform(self) -> Callable[[Any], Tensor]:
        return evaluation_chain(self.geometry(training=False), self.mean, self.std)


class _Images(Dataset):
    """Some images of a dataset, with a transform on each as it is read, and perhaps a random number."""

    def __init__(
        self, source: Any, indices: Tensor | None, transform: Callable[[Any], Tensor], numbered: bool = False
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.numbered = numbered

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label = self.source[index if self.indices is None else int(self.indices[index])]
        with own_draws(index):
            image = self.transform(image)
            return (image, label, int(torch.randint(2**62, ()))) if self.numbered else (image, label)


def _with_seed(items: list[Any]) -> list[Any]:
    """A batch with a seed, its first image's number, for what is drawn once the batch is on its device."""
    return [*default_collate([item[:2] for item in items]), items[0][2]]


def _check_size(size: int | float) -> int | float:
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    if not whole and not (isinstance(size, float) and 0 <= size < 1):
        raise ConfigurationError(f"Expected `val_size` to be a count >= 0 or a fraction in [0, 1), got {size!r}.")
    return size
