"""How long a run will be."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["batches_of_run", "steps_of_run"]


def steps_of_run(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, with those before a resume, if it is in automatic optimization.

    Unlike `Trainer.estimated_stepping_batches` it follows a GradientAccumulationScheduler, and where the length is not
    known it says so. Early stopping, `max_time` and steps that a GradScaler skips are left out.

    Args:
        trainer: The trainer, from `configure_optimizers` on.

    Returns:
        The number; ``None``: nobody knows beforehand (no end, a loader without a length, loaders that are made anew).
    """
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps if trainer.max_steps >= 0 else None
    batches = _batches_per_epoch(trainer)
    if batches is None:
        return None
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    if schedulers:  # the last one wins
        changes = [epoch for epoch in schedulers[-1].epochs if epoch < trainer.max_epochs]
        parts = [(schedulers[-1].get_accumulate_grad_batches(epoch), epoch) for epoch in changes]
    else:
        parts = [(trainer.accumulate_grad_batches, 0)]
    ends = [*(epoch for _, epoch in parts[1:]), trainer.max_epochs]
    # an epoch's last window steps too, however short
    steps = sum((end - begin) * math.ceil(batches / window) for (window, begin), end in zip(parts, ends, strict=True))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def batches_of_run(trainer: Trainer) -> int | None:
    """Batches of the whole run, with those before a resume: the measure of one in manual optimization.

    Args:
        trainer: The trainer, from `configure_optimizers` on.

    Returns:
        The number; ``None``: nobody knows beforehand (as for steps, or the run ends at `max_steps`, which counts the
        steps of all optimizers together there).
    """
    by_steps = trainer.max_steps >= 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs in (None, -1) or by_steps:
        return None
    batches = _batches_per_epoch(trainer)
    return None if batches is None else batches * trainer.max_epochs


def _batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches of every epoch, if that is one number that is known."""
    trainer.estimated_stepping_batches  # noqa: B018  # loads the training data, in `configure_optimizers` not yet there
    reload = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    changing = 0 < reload < (trainer.max_epochs or 0)
    return None if changing or math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
