"""ImageNet, or any other images in one folder per class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire.data._hidden import is_hidden, leads_up, say_left_out
from lightning_ire.data.image_data import ImageData
from lightning_ire.data.transforms import torchvision_v2

__all__ = ["ImageNet"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of image files: those of torchvision's `ImageFolder`."""

_READ = 256
"""Files whose contents are compared: of ImageNet 30 MB."""

_LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"


class ImageNet(ImageData):
    """ImageNet (ILSVRC 2012): 1.28 million training and 50,000 test images in 1000 classes, or others in its layout.

    On disk: `root/train/CLASS/*.JPEG` and `root/val/CLASS/*.JPEG`, with the same classes in both. The official
    validation images (`val/`) are the test set here, as in the papers. Batches, split, mixing and what validation
    means: see :class:`ImageData`.

    Other files are images if their names end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff or .webp, in any
    letters. Hidden files and folders (`._x.png`, `.ipynb_checkpoints`, `__MACOSX`) are no images and no classes. Links
    to folders are followed, but for those to a folder that they are in. What is left out is said in one line. Grey
    images of 16 bits or of floats in [0, 1] are scaled to 8 bits; alpha is dropped.

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
        classes = self._classes(part)
        images = _ClassFolders(self._folder(part), classes)
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


class _ClassFolders(Dataset):
    """The images in one folder per class, in the order of torchvision's `ImageFolder`.

    Attributes:
        folder: What the class folders are in.
        classes: Names of the class folders.
        samples: Path and class of each image.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self.folder = folder
        self.classes = classes
        self.samples: list[tuple[str, int]] = []
        left_out = Counter(_kind(name) for name in set(os.listdir(folder)).difference(classes))
        for label, name in enumerate(classes):
            for place, names in sorted(_visible(folder / name, left_out)):
                images = sorted(image for image in names if image.lower().endswith(_SUFFIXES))
                self.samples += [(os.path.join(place, image), label) for image in images]
                left_out.update(_kind(other) for other in set(names).difference(images))
        say_left_out(folder, left_out)
        empty = sorted(set(classes) - {classes[label] for _, label in self.samples})
        if empty:
            raise ConfigurationError(
                f"Expected `root` to hold {_LAYOUT}, got: Found no valid file for the classes {_some(empty)} in "
                f"{folder}: images end in {', '.join(_SUFFIXES)}."
            )

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """Of all names below the folder, classes with them, and of the contents of some files."""
        begin = len(os.path.join(self.folder, ""))
        digest = hashlib.blake2b(b"\0".join(os.fsencode(path[begin:]) for path, _ in self.samples), digest_size=8)
        for index in np.unique(np.linspace(0, len(self) - 1, _READ).astype(int)):
            with suppress(OSError):  # it is said when the image is needed
                digest.update(Path(self.samples[index][0]).read_bytes())
        return f"checksum {digest.hexdigest()} of names and some contents"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return read_image(path), label


def read_image(path: str) -> Any:
    """Read an image file whole.

    Args:
        path: The file. Grey images may have 16 bits (12 in TIFF), of which white is the largest number, or floats in
            [0, 1].

    Returns:
        PIL image in RGB, 8 bits per channel. An alpha channel is dropped.

    Raises:
        ConfigurationError: If the file cannot be read to its end, or its values have another range.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return Image.fromarray(_scaled(image)).convert("RGB")
            # the way over RGBA changes no colour: without it Pillow warns of palettes with transparency
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} in {path}: save it with 8 bits per channel, or remove it.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(
            f"Expected an image that can be read, got {path} ({type(error).__name__}: {error}): "
            "copy it anew, or remove it."
        ) from error


def _scaled(image: Any) -> np.ndarray:
    """A grey image of more than 8 bits as uint8; Pillow would cut its values off at 255."""
    values, tags = np.asarray(image, dtype=np.float32), getattr(image, "tag_v2", {})  # tags of TIFF
    if image.mode != "F":
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ConfigurationError("Expected a grey image of 8 or 16 bits, got one of 32 bits")
        values = values / (2 ** tags.get(258, (16,))[0] - 1)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # not a number is refused too
        raise ConfigurationError(f"Expected floats in [0, 1], got values from {low:g} to {high:g}")
    return np.rint(255 * (1 - values if tags.get(262) == 0 else values)).astype(np.uint8)  # 0: white is 0


def _visible(folder: Path, left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """The folders below one and their files, without hidden ones and links to folders above, which are counted."""
    for place, folders, names in os.walk(folder, followlinks=True):
        hidden = set(filter(is_hidden, folders))
        up = {name for name in folders if leads_up(os.path.join(place, name))} - hidden
        left_out.update([*map(_kind, hidden), *["link to a folder above"] * len(up)])
        folders[:] = [name for name in folders if name not in hidden | up]
        left_out.update(_kind(name) for name in names if is_hidden(name))
        yield place, [name for name in names if not is_hidden(name)]


def _kind(name: str) -> str:
    return "hidden" if is_hidden(name) else Path(name).suffix.lower() or "without a suffix"


def _folders(folder: Path) -> list[str]:
    folders = [entry for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)]
    return sorted(entry.name for entry in folders if not leads_up(entry.path))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
