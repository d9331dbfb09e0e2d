"""ImageNet, or any other images in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire.data.image_data import ImageData
from lightning_ire.data.transforms import torchvision, torchvision_v2

__all__ = ["ImageNet"]

_LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"


class ImageNet(ImageData):
    """ImageNet (ILSVRC 2012): 1.28 million training and 50,000 test images in 1000 classes, or others in its layout.

    On disk: `root/train/CLASS/*.JPEG` and `root/val/CLASS/*.JPEG`, with the same classes in both. The official
    validation images (`val/`) are the test set here, as in the papers. Batches, split, mixing and what validation
    means: see :class:`ImageData`.

    Images are float32 [3, S, S]. Training: a random part of 8 to 100 % of the area, scaled to S x S, and a flip (He et
    al., arXiv 1512.03385). Evaluation: the shorter side scaled to S / 0.875, and the centre.

    Attributes:
        num_classes: Number of class folders; known after `setup`.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        global_batch_size: int = 1024,
        max_batch_per_device: int | None = 256,
        image_size: int = 224,
        **settings: Any,
    ) -> None:
        """Check the settings; nothing is read yet.

        Args:
            root: Folder with `train/` and `val/`.
            global_batch_size: Images per optimizer step, over all devices and micro-batches.
            max_batch_per_device: Most images that a device takes at once; more are accumulated. `null`: no limit.
            image_size: Side S of the images in pixels.
            settings: The other settings of :class:`ImageData`.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(
            root=root, global_batch_size=global_batch_size, max_batch_per_device=max_batch_per_device, **settings
        )
        self.image_size = check_whole("image_size", image_size, low=8)

    def read(self, part: Literal["train", "test"]) -> Dataset:
        """List the images of one part; they are read when they are needed.

        Args:
            part: `train` for `root/train`, `test` for `root/val`.

        Raises:
            ConfigurationError: If folders are missing, empty, or the classes of `train/` and `val/` are not the same.
        """
        image_folder = torchvision("datasets").ImageFolder
        classes = self._classes(part)
        try:
            images = image_folder(str(self._folder(part)), loader=read_image)
        except FileNotFoundError as error:  # torchvision names the classes without images
            raise ConfigurationError(f"Expected `root` to hold {_LAYOUT}, got: {error}") from error
        other = self._folder("test" if part == "train" else "train")
        others = _folders(other) if other.is_dir() else []
        different = sorted(set(classes) ^ set(others)) if others else []
        if different:
            raise ConfigurationError(
                f"Expected `root` to have the same class folders in train/ and val/, got {len(different)} in only one "
                f"of them: {_some(different)}."
            )
        self.num_classes = len(classes)
        return images

    def geometry(self, training: bool) -> list[nn.Module]:
        """A random part and a flip, or the centre.

        Args:
            training: Whether random ones.
        """
        v2 = torchvision_v2()
        if training:
            return [v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip()]
        return [v2.Resize(round(self.image_size / 0.875)), v2.CenterCrop(self.image_size)]

    def autoaugment_policy(self) -> Any:
        """The policy found on ImageNet."""
        return torchvision_v2().AutoAugmentPolicy.IMAGENET

    def _folder(self, part: str) -> Path:
        return self.root / ("train" if part == "train" else "val")

    def _classes(self, part: str) -> list[str]:
        folder = self._folder(part)
        if not folder.is_dir():
            raise ConfigurationError(f"Expected `root` to hold {_LAYOUT}, got no folder {folder}.")
        classes = _folders(folder)
        if not classes:
            count = sum(1 for _ in os.scandir(folder))
            raise ConfigurationError(
                f"Expected `root` to hold {_LAYOUT}, got {folder} with {count} file(s) and no class folders: sort the "
                "images into one folder per class."
            )
        return classes


def read_image(path: str) -> Any:
    """Read an image file whole.

    Args:
        path: The file.

    Returns:
        PIL image in RGB.

    Raises:
        ConfigurationError: If the file cannot be read to its end.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(
            f"Expected an image that can be read, got {path} ({type(error).__name__}: {error}): "
            "copy it anew, or remove it."
        ) from error


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
