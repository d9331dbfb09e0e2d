"""The four batches of an epoch, of samples, pictures, points or words."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cases
import torch
from cases import CLASSES, FEATURES

EPOCHS, BATCHES, BATCH = 5, 4, 8
STEPS = EPOCHS * BATCHES


class Turning:
    """Batches whose order is a function of the epoch, so that a resumed run sees them in the order of the first."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.sampler, self.epoch = list(batches), self, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        first = self.epoch % len(self)
        yield from self.batches[first:] + self.batches[:first]


def samples() -> list[Any]:
    """Four batches of features, classes and the samples' numbers."""
    dataset = cases.data(BATCHES * BATCH)
    parts = (*dataset.tensors, torch.arange(len(dataset)))
    return list(zip(*(part.split(BATCH) for part in parts), strict=True))


def pictures_with_points() -> list[Any]:
    """Lists of inputs and dicts of targets, of any number of points."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(BATCHES):
        counts = [1 + (number + index) % 4 for index in range(3)]
        pictures = [torch.randn(count, FEATURES, generator=generator) for count in counts]
        targets = [
            {
                "labels": torch.randint(3, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator),
            }
            for count in counts
        ]
        batches.append((pictures, targets))
    return batches


def words(labels: str) -> Callable[[], list[Any]]:
    """Batches of token numbers, padded at the end."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for _ in range(BATCHES):
            tokens = torch.randint(32, (4, 7), generator=generator)
            mask = torch.ones_like(tokens)
            mask[0, 5:] = 0
            wanted = torch.randint(CLASSES, (4,), generator=generator)
            if labels == "tokens":
                wanted = tokens.masked_fill(mask == 0, -100)
            batches.append({"input_ids": tokens, "attention_mask": mask, "labels": wanted})
        return batches

    return make


def images(named: bool = False, size: int = 16) -> Callable[[], list[Any]]:
    """Batches of small pictures with a class each."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        batches: list[Any] = []
        for _ in range(BATCHES):
            x = torch.randn(4, 3, size, size, generator=generator)
            y = torch.randint(CLASSES, (4,), generator=generator)
            batches.append({"pixel_values": x, "labels": y} if named else (x, y, torch.arange(4)))
        return batches

    return make


def pictures_with_boxes() -> list[Any]:
    """Pictures of two sizes with one to three boxes, as torchvision's detectors take them."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(BATCHES):
        pictures = [torch.rand(3, 32, 32 + 8 * (number % 2), generator=generator) for _ in range(2)]
        targets = []
        for index in range(2):
            corners = 16 * torch.rand(1 + (number + index) % 3, 2, generator=generator)
            labels = torch.randint(1, 3, (len(corners),), generator=generator)
            targets.append({"boxes": torch.cat([corners, corners + 12], dim=1), "labels": labels})
        batches.append((pictures, targets))
    return batches
