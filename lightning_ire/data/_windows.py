"""Crops of a long row of tokens, and which ones make a batch on which device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._batches import EpochOrder

__all__ = ["CropOrder", "Crops", "Windows"]

IGNORED = -100
"""Target that counts nowhere: the `ignore_index` of torch's cross entropy."""


class Crops(Dataset):
    """All crops of `length` tokens; the index is the first token's.

    An item is a pair of inputs [length] and targets [length], int64, the targets one token later.

    Args:
        tokens: The tokens.
        length: Tokens in a crop.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return max(len(self.tokens) - self.length, 0)

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        if not 0 <= start < len(self):
            raise IndexError(start)
        crop = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
        return crop[:-1], crop[1:]

    def __getstate__(self) -> dict[str, Any]:
        """A process that is not forked maps the file by itself, instead of getting a copy of all tokens."""
        if isinstance(self.tokens, np.memmap):
            return {**vars(self), "tokens": (self.tokens.filename, self.tokens.dtype)}
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.tokens, tuple):
            path, dtype = self.tokens
            self.tokens = np.memmap(path, dtype=dtype, mode="r")


class Windows(Dataset):
    """The row cut into crops of `length` tokens, in order: every token but the first is a target exactly once.

    The last crop ends with the row; the targets that it shares with the one before are -100. A row that is shorter than
    a crop is one shorter crop.

    Args:
        tokens: The tokens, at least two.
        length: Tokens in a crop.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.crops = Crops(tokens, min(length, len(tokens) - 1))
        self.targets = len(tokens) - 1

    def __len__(self) -> int:
        return -(-self.targets // self.crops.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = self.crops.length
        overlap = max((index + 1) * length - self.targets, 0)
        inputs, targets = self.crops[index * length - overlap]
        if overlap:
            targets = targets.clone()
            targets[:overlap] = IGNORED
        return inputs, targets


class CropOrder(EpochOrder):
    """First tokens of one device's crops, in whole global batches.

    "random": in each epoch the row is cut into crops one after another, from a random place within the first crop on,
    and they come in random order; so each token is seen at most once per epoch, in other surroundings each time. The
    order depends on (seed, epoch) alone. "contiguous": the row is cut into `batch` long rows of equal length, and the
    n-th batch has the n-th crop of each: sequence b of a batch goes on where sequence b of the batch before has ended.

    Args:
        crops: The crops.
        batch: Sequences per optimizer step, a multiple of `devices`.
        devices: Number of devices.
        rank: This device.
        seed: Seed of the order.
        shuffled: "random", else "contiguous".

    Raises:
        ConfigurationError: If there are too few tokens for a batch.
    """

    def __init__(self, crops: Crops, batch: int, devices: int, rank: int, seed: int, shuffled: bool) -> None:
        last = len(crops.tokens) - 1  # the last token is a target only
        spare = crops.length - 1 if shuffled else 0  # the random first place may be so far in
        super().__init__(crops, max(last - spare, 0) // crops.length, batch, devices, rank, seed)
        self.length, self.shuffled = crops.length, shuffled
        if self.total_size == 0:
            raise ConfigurationError(
                f"Expected `global_batch_size` (times `sequence_length` {self.length}) to be at most what the "
                f"{len(crops.tokens)} tokens of the training part make, got {batch}."
            )

    def indices(self) -> np.ndarray:
        """First tokens of the crops."""
        return self._shuffled() if self.shuffled else self._side_by_side()

    def _shuffled(self) -> np.ndarray:
        draw = np.random.default_rng([self.seed, self.epoch])
        first = draw.integers(self.length)
        there = (len(self.dataset.tokens) - 1 - first) // self.length  # type: ignore[attr-defined]
        return first + self.length * draw.permutation(there)

    def _side_by_side(self) -> np.ndarray:
        batches = self.total_size // self.batch
        return self.length * (np.arange(batches)[:, None] + np.arange(self.batch) * batches).reshape(-1)
