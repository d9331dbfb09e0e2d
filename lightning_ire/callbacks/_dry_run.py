"""The mask that a run would begin with, shown as a table; nothing is trained."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import step_arguments
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._probe import Probe
from lightning_ire.engine.recipe import Recipe, shown
from lightning_ire.engine.state import Progress
from lightning_ire.engine.step import OptimizerStep

__all__ = ["show_mask"]


def show_mask(recipe: Recipe, progress: Progress, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Make one mask at the weights as they are, print its table, and let the fit end before its first step.

    Args:
        recipe: The settings.
        progress: The optimizer's state, which stays as it is.
        trainer: The trainer at the start of training.
        module: The module.

    Raises:
        ConfigurationError: For a module in manual optimization.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            "Expected a module in automatic optimization for `dry_run`, got manual optimization: set `dry_run` to "
            "false; the log has `ire/flat_fraction`."
        )
    host, optimizers = LightningHost(trainer, module), trainer.optimizers
    step = OptimizerStep(recipe, progress, host, module, optimizers[0], optimizers, progress.step)
    batches = Probe.first(trainer.train_dataloader, trainer.accumulate_grad_batches)
    training_step = module.training_step
    calls = (step_arguments(training_step, batches.batch(trainer, index), index) for index in range(len(batches)))
    try:
        table = step.preview(calls, training_step, trainer.strategy.training_step)
    finally:
        step.release()
    if trainer.is_global_zero:
        print(f"IRE, dry run: {recipe.curvature!r}, gamma {shown(recipe.gamma)}, step {progress.step}\n{table}")
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
    trainer.should_stop = True
