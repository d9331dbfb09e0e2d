import builtins

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ire import ConfigurationError
from lightning_ire.data import Digits


def parts(**settings) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All images and labels of each part, in the order in which they are kept."""
    data = Digits(**{"augment": False, **settings})
    data.setup()
    return {
        name: (torch.stack([image for image, _ in part]), torch.stack([label for _, label in part]))
        for name, part in data._parts.items()
        if len(part)
    }


def rows(images: torch.Tensor, of: torch.Tensor) -> set[bytes]:
    """The images as they are in the source, so that parts with different seeds can be compared."""
    grey = ((images - of.min()) / (of.max() - of.min()) * 16).round().to(torch.uint8)
    return {image.numpy().tobytes() for image in grey}


def test_sizes_shapes_and_classes():
    found = parts()
    assert {name: len(labels) for name, (_, labels) in found.items()} == {"train": 1257, "val": 180, "test": 360} or {
        name: len(labels) for name, (_, labels) in found.items()
    } == {"train": 1258, "val": 180, "test": 359}
    for images, labels in found.values():
        assert images.dtype == torch.float32
        assert images.shape[1:] == (1, 8, 8)
        assert labels.dtype == torch.int64
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert share.sub(0.1).abs().max() < 0.01  # stratified: each class has its share in every part
    assert (Digits.num_classes, Digits.in_channels) == (10, 1)


def test_every_image_is_in_one_part():
    everything = torch.cat([images for images, _ in parts().values()])
    found = [rows(images, everything) for images, _ in parts().values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 1797
