"""What the callback has to know of Lightning's inner order. The only file with private names of Lightning.

Lightning 2.6, one optimizer step: for every micro-batch `training_step`, zero_grad (first one), backward; at the last
one all of that runs as a closure inside `LightningModule.optimizer_step`, followed by unscaling, the
`on_before_optimizer_step` hooks, clipping and the optimizer's update. `Takeover` puts functions of ours around
`training_step` and around that closure, on the instance, and leaves the loop itself alone.

tests/test_lightning_contract.py fails when a release changes any of this.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import wrappers
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError
from lightning_ire._patches import Patches, behind_wrapper, nothing
from lightning_ire.engine._torch import in_extra_pass

__all__ = [
    "ConfigWins",
    "Takeover",
    "after_the_last_step",
    "backward_allowed",
    "check_strategy",
    "check_supported",
    "data_parallel",
    "full_precision_step",
    "loaded_fit_loop",
    "logger_step",
    "loss_scale",
    "moved_batch",
    "mute",
    "muted_logging",
    "scaled",
    "set_batches_done",
    "step_arguments",
    "unsynchronized",
    "will_log",
]


_LOUD = ("log", "print")  # `log_dict` calls `log`


def mute(patches: Patches, module: nn.Module) -> None:
    """Let extra passes log and print nothing: `self.log`, `self.log_dict` and `self.print` of each LightningModule.

    Args:
        patches: Where the wrappers are kept.
        module: The module being trained.
    """
    for owner in module.modules():
        if isinstance(owner, pl.LightningModule):
            for name in _LOUD:
                patches.put(owner, name, _muted(getattr(owner, name)))


def _muted(original: Callable[..., Any]) -> Callable[..., Any]:
    # not compiled: dynamo would compile Lightning's own code anew for every name that is logged, and in every state
    @torch.compiler.disable
    def log(*args: Any, **kwargs: Any) -> Any:
        return None if in_extra_pass() else original(*args, **kwargs)

    return log


class Takeover(Patches):
    """Functions of ours around a module's `training_step` and around the closure of its `optimizer_step`.

    Args:
        module: The module being trained.
        training_step: Called as ``training_step(original, *args, **kwargs)``.
        closure: Called as ``closure(original)`` where Lightning would call ``original()``.
        after: Called when `optimizer_step` is over, however it ended.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        training_step: Callable[..., Any],
        closure: Callable[[Callable[[], Any]], Any],
        after: Callable[[], None],
    ) -> None:
        super().__init__()
        self.original_training_step: Callable[..., Any] = module.training_step
        original_step = module.optimizer_step

        def wrapped_training_step(*args: Any, **kwargs: Any) -> Any:
            return training_step(self.original_training_step, *args, **kwargs)

        def wrapped_optimizer_step(*args: Any, **kwargs: Any) -> Any:
            # (epoch, batch_idx, optimizer, optimizer_closure), whatever an override calls them
            given = kwargs["optimizer_closure"] if "optimizer_closure" in kwargs else args[3]
            inside = Patches()
            if isinstance(given, Closure):  # an override may ask for what only Lightning's has
                inside.install(given, "closure", given.closure, functools.partial(closure, given.closure))
            elif "optimizer_closure" in kwargs:
                kwargs["optimizer_closure"] = functools.partial(closure, given)
            else:
                args = (*args[:3], functools.partial(closure, given), *args[4:])
            try:
                return original_step(*args, **kwargs)
            finally:
                inside.remove()
                after()

        self.put(module, "training_step", wrapped_training_step)
        self.put(module, "optimizer_step", wrapped_optimizer_step)
        mute(self, module)


def check_supported(trainer: pl.Trainer, module: pl.LightningModule, local_gradients: bool, replays: bool) -> None:
    """Refuse, before any compute, what the callback cannot do right.

    Args:
        trainer: The trainer at fit start.
        module: The module being trained.
        local_gradients: Whether a backward pass will have to be kept from synchronizing.
        replays: Whether `training_step` may have to run again on the same batch.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    check_strategy(trainer, "IRE")
    if replays and "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ConfigurationError(
            f"Expected `{type(module).__name__}.training_step` to take a batch, got one that takes `dataloader_iter`: "
            "its batches cannot be replayed; take `batch` instead, or do without a perturbation that makes a second "
            "pass and set `curvature` to EmpiricalFisher() or SecondMoment()."
        )
    strategy = trainer.strategy
    if local_gradients and isinstance(strategy, DDPStrategy) and getattr(strategy.model, "static_graph", False):
        raise ConfigurationError(
            "Expected DDP without static_graph for SAM with each device's own gradient, got static_graph=True: "
            "set `perturbation.sync` to true, or static_graph to false."
        )


def check_strategy(trainer: pl.Trainer, who: str) -> None:
    """Refuse strategies that are not supported.

    Args:
        trainer: The trainer.
        who: The callback that asks.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ConfigurationError(
            f"Expected a single device, DDP or ModelParallelStrategy, got {type(strategy).__name__}, whose parts of "
            f"parameters {who} cannot tell from whole ones: set `trainer.strategy` to ModelParallelStrategy and let "
            "the module's `configure_model` call `fully_shard`, or use 'ddp'."
        )
    supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not supported or isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)):  # subclasses of supported ones
        raise ConfigurationError(
            f"Expected a single device, DDP or ModelParallelStrategy, got {type(strategy).__name__}, which {who} does "
            "not support yet; set `trainer.strategy` to 'auto' or 'ddp', or remove the callback."
        )


def data_parallel(trainer: pl.Trainer) -> tuple[int, int]:
    """Over how many devices, or groups of devices that share a batch, the data are spread, and which is this one.

    Args:
        trainer: The trainer.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        dealt = strategy.distributed_sampler_kwargs
        return dealt["num_replicas"], dealt["rank"]
    return trainer.world_size, trainer.global_rank


class ConfigWins:
    """Mix-in for a LightningCLI: config and flags win over the hyper-parameters in a checkpoint.

    Private: `LightningCLI` offers no setting for it.
    """

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's own lets a checkpoint's hyper-parameters override config and flags in silence."""


def loss_scale(trainer: pl.Trainer) -> float:
    """Factor by which fp16's GradScaler multiplies losses; 1 without one."""
    scaler = _scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def scaled(trainer: pl.Trainer, loss: Tensor) -> Tensor:
    """The loss as Lightning would back-propagate it."""
    scaler = _scaler(trainer)
    return scaler.scale(loss) if scaler is not None else loss


def _scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def unsynchronized(strategy: Strategy) -> AbstractContextManager[Any]:
    """Backward passes inside the block leave each device with its own gradient."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def will_log(trainer: pl.Trainer) -> bool:
    """Whether Lightning will write a row of training metrics after the current step.

    Private: `log_every_n_steps` is public, but the counter it refers to (steps with a batch that stepped, which is not
    `global_step` for every module) and the exception for a stopping trainer are not.
    """
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def logger_step(trainer: pl.Trainer, epoch_end: bool = False) -> int:
    """The step that Lightning itself would write metrics under.

    Private: this count (batches that stepped, which is not `global_step` for every module) is public nowhere.

    Args:
        trainer: The trainer.
        epoch_end: Whether this is `on_train_epoch_end`, where Lightning counts one less.
    """
    return max(trainer.fit_loop.epoch_loop._batches_that_stepped - int(epoch_end), 0)


def moved_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch from a loader as `training_step` gets it: after the precision plugin and the three transfer hooks.

    Private: Lightning has no public call of its `on_before_batch_transfer` that looks at module and datamodule.

    Args:
        trainer: The trainer.
        batch: The batch; not changed, unless a hook does.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def step_arguments(training_step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """The arguments that Lightning would call `training_step` with: some take no `batch_idx`."""
    if is_param_in_hook_signature(training_step, "batch_idx", min_args=2):
        return batch, batch_idx
    return (batch,)


def full_precision_step(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """The context of `training_step` without autocast: where the weights are float32, all of the loss is then."""
    plugin = trainer.precision_plugin
    return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.train_step_context()


@contextmanager
def muted_logging(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block nothing that LightningModules among `modules` log or print arrives.

    Otherwise an extra pass would log the perturbed loss, and epoch means would mix both.

    Private: somebody may have been handed the bound method before, so what it writes to is put aside too, the loop's
    collection of results.

    Args:
        modules: The module being trained and all below it; those that :func:`mute` has muted stay as they are.
    """
    owners = [owner for owner in modules if isinstance(owner, pl.LightningModule)]
    loud = [(owner, name) for owner in owners for name in _LOUD if behind_wrapper(vars(owner).get(name)) is None]
    loop = getattr(owners[0]._trainer, "_active_loop", None) if owners else None
    loop = getattr(loop, "epoch_loop", loop)
    results = getattr(loop, "_results", None)
    patches = Patches()

    def unmute() -> None:
        if loop is not None and results is not None:
            loop._results = results
        patches.remove()

    try:
        try:
            for owner, name in loud:
                patches.put(owner, name, nothing)
            if loop is not None and results is not None:
                loop._results = _ResultCollection(training=results.training)
                loop._results.batch, loop._results.batch_size = results.batch, results.batch_size
            yield
        finally:
            unmute()
    except BaseException:  # also for a Ctrl-C in the middle of it
        unmute()
        raise


@contextmanager
def backward_allowed() -> Iterator[None]:
    """Inside the block a backward pass through what Fabric has wrapped may be torch's own, as those of estimates are.

    Private: with mixed precision Fabric lets outputs raise unless `fabric.backward`, which would scale and add to
    `.grad`, is under way.

    Yields:
        Nothing.
    """
    before, wrappers._in_fabric_backward = wrappers._in_fabric_backward, True
    try:
        yield
    finally:
        wrappers._in_fabric_backward = before


def loaded_fit_loop(trainer: pl.Trainer) -> dict[str, Any]:
    """The fit loop's state in the checkpoint that is being loaded; Lightning goes on with what is changed in it.

    A datamodule is shown its own state only, before Lightning reads this one.

    Args:
        trainer: The trainer.
    """
    return trainer._checkpoint_connector._loaded_checkpoint.get("loops", {}).get("fit_loop", {})


def set_batches_done(fit_loop: dict[str, Any], done: int, before: int, pending: int) -> None:
    """Change how many batches a saved fit loop has behind it.

    Args:
        fit_loop: Its state; changed.
        done: Batches of this epoch.
        before: Batches of the epochs before.
        pending: 1 if the last of them is still in `on_train_batch_end`, which Lightning 2.6 then takes as over; or 0.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    for name, count in (("current", done), ("total", before + done)):
        progress[name] |= {"ready": count, "started": count, "processed": count, "completed": count - pending}


def after_the_last_step(fit_loop: dict[str, Any], later: bool) -> None:
    """Change a saved fit loop into one that was saved in `on_train_batch_end`, when the last optimizer step was made.

    Args:
        fit_loop: Its state; changed.
        later: Whether it was saved later: then Lightning has counted the step for the loggers, and would do so again.
    """
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= later
    for epochs in fit_loop["epoch_progress"].values():
        epochs["processed"] = epochs["completed"] = epochs["started"] - 1
