"""The mask that a run would begin with, shown as a table; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import step_arguments
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._probe import Probe
from lightning_ire.engine.optimizers import named_parameters
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.state import Progress
from lightning_ire.engine.step import OptimizerStep

__all__ = ["flat_table", "show_mask"]


def show_mask(recipe: Recipe, step: int, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Make one mask at the weights as they are, print its table, and let the fit end before its first step.

    Args:
        recipe: The settings.
        step: The optimizer's real steps so far.
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
    progress = Progress.new(recipe)
    progress.step, progress.started_at, progress.retry = step, step, True
    host, optimizers = LightningHost(trainer, module), trainer.optimizers
    stepper = OptimizerStep(recipe, progress, host, module, optimizers[0], optimizers, step)
    try:
        window = stepper.open_window(module.training_step, trainer.strategy.training_step, replays=True)
        batches = Probe.first(trainer.train_dataloader, trainer.accumulate_grad_batches)
        for index in range(len(batches)):
            arguments = step_arguments(module.training_step, batches.batch(trainer, index), index)
            window.record(arguments, {}).backward_done = True
        window.second_pass()  # for estimates that are made of the training gradient
        stepper.refresh(window)
        trainer.optimizers[0].zero_grad()
    finally:
        stepper.release()
    masks = progress.masks.masks
    table = flat_table(masks, named_parameters(module, trainer.optimizers[0]))
    if not masks:
        table = f"{recipe.curvature!r} has no finite estimate here (SecondMoment: before the first step)."
    if trainer.is_global_zero:
        print(f"IRE, dry run: {recipe.curvature!r}, gamma {recipe.gamma:g}, step {step}\n{table}")
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
    trainer.should_stop = True


def flat_table(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """How many coordinates of each parameter are flat, one line each, and in the last line of all.

    Args:
        masks: Masks by parameter name.
        parameters: The optimizer's parameters by name; those without a mask are shown as taking no part.
    """
    rows = [("parameter", "shape", "coordinates", "flat", "share")]
    total = flat = 0
    for name, parameter in parameters.items():
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        mask = masks.get(name)
        if mask is None:
            rows.append((name, shape, f"{parameter.numel():,}", "-", "takes no part"))
            continue
        count = int(mask.sum())
        total, flat = total + mask.numel(), flat + count
        rows.append((name, shape, f"{mask.numel():,}", f"{count:,}", f"{100 * count / max(mask.numel(), 1):.1f} %"))
    rows.append(("all that take part", "", f"{total:,}", f"{flat:,}", f"{100 * flat / max(total, 1):.1f} %"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in (2, 3, 4))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
