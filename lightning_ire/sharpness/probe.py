"""Which samples of a training set sharpness is measured on."""

from __future__ import annotations

import torch

__all__ = ["drawn_samples"]


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
