"""Which samples of a training set sharpness is measured on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["common_size", "drawn_samples"]


def common_size(sizes: Iterable[int]) -> int | None:
    """The number of samples that all batches have; ``None`` if it is not one, or not known (0).

    Args:
        sizes: That of each batch.
    """
    different = set(sizes)
    return (different.pop() or None) if len(different) == 1 else None


def drawn_samples(total: int, size: int, count: int, rank: int, ranks: int, seed: int) -> list[list[int]]:
    """A random part of a training set for this rank, another one on each, the same for the same seed.

    All batches are of one size and all ranks have equally many: fewer or smaller ones than asked for if there are no
    more samples.

    Args:
        total: Samples of the training set.
        size: Samples in a batch.
        count: Batches on each rank.
        rank: Which rank this is.
        ranks: How many there are.
        seed: Seed.

    Returns:
        For each batch the positions of its samples.
    """
    per_rank = max(total // ranks, 1)
    size = min(size, per_rank)
    count = min(count, per_rank // size)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: count * size * ranks]
    mine = order[rank::ranks].tolist() or order[:1].tolist()
    return [mine[start : start + size] for start in range(0, len(mine), size)]
