"""Optimizer and learning-rate schedule of a module: what all LightningModules of this package do alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_ire._checks import ConfigurationError
from lightning_ire._run_length import steps_of_run
from lightning_ire.models.warmup_cosine import WarmupCosineLR

__all__ = ["optimization", "parameter_groups"]


def optimization(
    module: LightningModule,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    lr_interval: str,
    decay_norm_and_bias: bool,
) -> Any:
    """Return what `configure_optimizers` has to: the optimizer and, if there is one, its schedule in Lightning's form.

    A `WarmupCosineLR` without `total` gets the length of the run, in what `lr_interval` counts. In a `fast_dev_run` and
    where nothing is trained it is at least one more than the warm-up, so that a config can be tried out in two steps.

    Args:
        module: The module being trained; without a trainer the schedule keeps its length.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule from the optimizer.
        lr_interval: `epoch` or `step`.
        decay_norm_and_bias: As in `parameter_groups`.

    Raises:
        ConfigurationError: If the optimizer refuses its arguments, the run has no length that could be filled in, or
            the warm-up is as long as the run.
    """
    try:
        made = optimizer(parameter_groups(module, decay_norm_and_bias))
    except ValueError as error:  # what torch raises for a value out of range
        raise ConfigurationError(f"Expected `optimizer` to have values in range, got: {error}.") from error
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    if isinstance(scheduler, WarmupCosineLR) and scheduler.total is None:
        _fill_in_total(scheduler, module, lr_interval)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": lr_interval}
    if hasattr(scheduler, "monitor"):  # Lightning's ReduceLROnPlateau
        config["monitor"] = scheduler.monitor
    return {"optimizer": made, "lr_scheduler": config}


def parameter_groups(module: nn.Module, decay_norm_and_bias: bool) -> Any:
    """Return a module's parameters for an optimizer.

    Args:
        module: Any module.
        decay_norm_and_bias: True: all alike. False: those with fewer than two dimensions (biases and normalisation
            weights) in a second group without weight decay.
    """
    if decay_norm_and_bias:
        return module.parameters()
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _fill_in_total(scheduler: WarmupCosineLR, module: LightningModule, lr_interval: str) -> None:
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's word for a module that is used by itself
        return
    length = 0 if trainer.limit_train_batches == 0 else _run_length(trainer, lr_interval)
    if trainer.fast_dev_run or length == 0:  # type: ignore[attr-defined]
        length = max(length, scheduler.warmup + 1 if isinstance(scheduler.warmup, int) else 1)
    scheduler.set_total(length)


def _run_length(trainer: Trainer, lr_interval: str) -> int:
    if lr_interval == "epoch":
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ConfigurationError(
                "Expected `trainer.max_epochs` to give the learning-rate schedule its length in epochs, got "
                f"{trainer.max_epochs}: set it, or `lr_scheduler.total`, or `lr_interval` to 'step'."
            )
        return trainer.max_epochs
    steps = steps_of_run(trainer)
    if steps is None:
        raise ConfigurationError(
            "Expected `trainer.max_steps`, or `trainer.max_epochs` and a loader with a fixed length, to give the "
            f"learning-rate schedule its length in steps, got {trainer.max_steps} and {trainer.max_epochs}: set "
            "`trainer.max_steps` (`max_epochs` -1) or `lr_scheduler.total`."
        )
    return steps
