"""Tiny image data in the real on-disk formats."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_cifar10(root: Path, per_file: int = 8) -> Path:
    """Five training batches and a test batch, `per_file` images each, every pixel of an image of one colour."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate(CIFAR10_NAMES):
        first = number * per_file
        _dump(folder / name, {"labels": [index % 10 for index in range(first, first + per_file)]}, first, per_file)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {index}" for index in range(10)]}))
    return root


def write_cifar100(root: Path, train: int = 40, test: int = 8) -> Path:
    """The two files of CIFAR-100."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, first, count in (("train", 0, train), ("test", train, test)):
        _dump(folder / name, {"fine_labels": [index % 100 for index in range(first, first + count)]}, first, count)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {index}" for index in range(100)]}))
    return root


def write_imagenet(
    root: Path, classes: int = 3, train: int = 8, val: int = 3, size: tuple[int, int] = (48, 40)
) -> Path:
    """`train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, so many images per class."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}_{number}.JPEG")
    return root


def _dump(path: Path, labels: dict, first: int, count: int) -> None:
    """Images are uint8 rows of 3072: red, green, blue planes; image i has the colour (i, 255 - i, 128)."""
    numbers = np.arange(first, first + count) % 256
    planes = np.stack([numbers, 255 - numbers, np.full_like(numbers, 128)], axis=1).astype(np.uint8)
    path.write_bytes(pickle.dumps({"data": np.repeat(planes, 1024, axis=1), **labels}))
