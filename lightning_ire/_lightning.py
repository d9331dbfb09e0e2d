"""What the callback has to know of Lightning's inner order. The only file with private names of Lightning or torch.

Lightning 2.6, one optimizer step: for every micro-batch `training_step`, zero_grad (first one), backward; at the last
one all of that runs as a closure inside `LightningModule.optimizer_step`, followed by unscaling, the
`on_before_optimizer_step` hooks, clipping and the optimizer's update. `Takeover` puts functions of ours around
`training_step` and around that closure, on the instance, and leaves the loop itself alone.

tests/test_lightning_contract.py fails when a release changes any of this.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
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
from lightning_ire.functional import BufferState

__all__ = [
    "ConfigWins",
    "Patches",
    "Takeover",
    "check_strategy",
    "check_supported",
    "differentiable_once",
    "full_precision_step",
    "gradient_marks",
    "graph_number",
    "kept_for_the_graph",
    "logger_step",
    "loss_of",
    "loss_scale",
    "moved_batch",
    "muted_logging",
    "own_method",
    "scaled",
    "step_arguments",
    "unsynchronized",
    "will_log",
]


_BEHIND = "_lightning_ire_original"


def own_method(owner: Any, name: str) -> Callable[..., Any]:
    """A method without the wrappers of ours that are outermost (a stranger's around them stays, with all inside).

    Args:
        owner: The object.
        name: Name of the method.
    """
    method = getattr(owner, name)
    while (pair := getattr(method, _BEHIND, None)) is not None and pair[0] is method:
        method = pair[1]
    return method


class Patches:
    """Functions of ours in front of methods, on the instance; the classes are not touched."""

    def __init__(self) -> None:
        self._installed: list[tuple[Any, str, Callable[..., Any], Any]] = []

    def put(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Let calls of a method go to `replacement`.

        Args:
            owner: The object.
            name: Name of the method.
            replacement: What is called instead.
        """
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(*args, **kwargs)

        # Lightning looks one level deep to read the signature: show it what it would have seen without us
        wrapper.__wrapped__ = getattr(original, "__wrapped__", original)
        vars(wrapper)[_BEHIND] = (wrapper, original)
        self._installed.append((owner, name, wrapper, vars(owner).get(name)))
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Take the wrappers away. Does nothing the second time."""
        for owner, name, wrapper, before in reversed(self._installed):
            if vars(owner).get(name) is not wrapper:
                continue  # somebody put another wrapper on top and owns the name now
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._installed = []


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
            if "optimizer_closure" in kwargs:
                kwargs["optimizer_closure"] = functools.partial(closure, kwargs["optimizer_closure"])
            else:
                args = (*args[:3], functools.partial(closure, args[3]), *args[4:])
            try:
                return original_step(*args, **kwargs)
            finally:
                after()

        self.put(module, "training_step", wrapped_training_step)
        self.put(module, "optimizer_step", wrapped_optimizer_step)


def check_supported(trainer: pl.Trainer, module: pl.LightningModule, local_gradients: bool) -> None:
    """Refuse, before any compute, what the callback cannot do right.

    Args:
        trainer: The trainer at fit start.
        module: The module being trained.
        local_gradients: Whether a backward pass will have to be kept from synchronizing.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    check_strategy(trainer, "IRE")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ConfigurationError(
            f"Expected `{type(module).__name__}.training_step` to take a batch, got one that takes `dataloader_iter`: "
            "its batches cannot be replayed; take `batch` instead."
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                "Expected an optimizer with a plain step, got LBFGS, which runs the closure several times per step: "
                "use another optimizer or remove the callback."
            )
    strategy = trainer.strategy
    if local_gradients and isinstance(strategy, DDPStrategy) and getattr(strategy.model, "static_graph", False):
        raise ConfigurationError(
            "Expected DDP without static_graph for SAM with each device's own gradient, got static_graph=True: "
            "set `perturbation.sync` to true, or static_graph to false."
        )


def check_strategy(trainer: pl.Trainer, who: str) -> None:
    """Refuse strategies under which a device does not hold the whole model.

    Args:
        trainer: The trainer.
        who: The callback that asks.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    strategy = trainer.strategy
    others = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)  # subclasses of the two that are supported
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, others):
        raise ConfigurationError(
            f"Expected a single device or DDP, got {type(strategy).__name__}: {who} does not support sharded or other "
            "strategies yet; set `trainer.strategy` to 'auto' or 'ddp', or remove the callback."
        )


class ConfigWins:
    """Mix-in for a LightningCLI: config and flags win over the hyper-parameters in a checkpoint.

    Private: `LightningCLI` offers no setting for it.
    """

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's own lets a checkpoint's hyper-parameters override config and flags in silence."""


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned (a tensor, a mapping with "loss", or ``None``)."""
    return output.get("loss") if isinstance(output, Mapping) else output


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
def kept_for_the_graph(buffers: BufferState) -> Iterator[None]:
    """After the block the buffers are as they were captured, and graphs that saved them still go backward.

    A backward pass through a checkpointed layer runs it again, and BatchNorm's statistics with it.

    Private: torch has no public way to put contents back without counting it as a change.

    Args:
        buffers: The state of all buffers at this moment.
    """
    try:
        yield
    finally:
        with torch.autograd._unsafe_preserve_version_counter(tuple(buffer for _, _, buffer, _ in buffers.saved)):
            buffers.restore()


def gradient_marks(parameters: Sequence[nn.Parameter]) -> list[tuple[Tensor | None, int]]:
    """Marks that differ as soon as somebody replaces a gradient or changes it in place.

    Private: torch has no public counter of in-place changes.

    Args:
        parameters: The parameters.
    """
    return [(p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]


def graph_number(tensor: Tensor | None = None) -> int:
    """When a tensor was computed; without one: now. Comparable within one thread.

    Private: torch has no public order of the nodes of its graphs.

    Args:
        tensor: A tensor with a graph.
    """
    if tensor is None or tensor.grad_fn is None:
        with torch.enable_grad():
            tensor = torch.zeros((), requires_grad=True).clone()
    return tensor.grad_fn._sequence_nr()  # type: ignore[union-attr]


def differentiable_once(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the graph behind some gradients ends at a function that is marked `once_differentiable`.

    `torch.autograd.grad` of them raises nothing then: it leaves that function out and is wrong. Only `backward` raises.

    Private: torch tells of such an end by nothing but the name of its node.

    Args:
        tensors: Gradients made with `create_graph=True`.
    """
    nodes = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return False


@contextmanager
def muted_logging(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block `self.log` and `self.log_dict` of every LightningModule among `modules` do nothing.

    Otherwise an extra pass would log the perturbed loss, and epoch means would mix both.

    Private: somebody may have been handed the bound method before, so what it writes to is put aside too, the loop's
    collection of results.

    Args:
        modules: The module being trained and all below it.
    """
    owners = [owner for owner in modules if isinstance(owner, pl.LightningModule)]
    before = [vars(owner).get("log") for owner in owners]
    loop = getattr(owners[0]._trainer, "_active_loop", None) if owners else None
    loop = getattr(loop, "epoch_loop", loop)
    results = getattr(loop, "_results", None)

    def unmute() -> None:
        if loop is not None and results is not None:
            loop._results = results
        for owner, log in zip(owners, before, strict=True):
            if log is not None:
                owner.log = log  # type: ignore[method-assign]
            elif "log" in vars(owner):
                del owner.log

    try:
        try:
            for owner in owners:
                owner.log = _no_log  # type: ignore[method-assign]
            if loop is not None and results is not None:
                loop._results = _ResultCollection(training=results.training)
                loop._results.batch, loop._results.batch_size = results.batch, results.batch_size
            yield
        finally:
            unmute()
    except BaseException:  # also for a Ctrl-C in the middle of it
        unmute()
        raise


def _no_log(*args: Any, **kwargs: Any) -> None:
    return None
