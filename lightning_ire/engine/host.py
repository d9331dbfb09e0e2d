"""What the engine asks of the loop around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError

__all__ = ["Host", "LocalHost", "check_host", "dtype_of_autocast"]


class Host(Protocol):
    """A training loop, as far as an optimizer step of IRE and SAM depends on it."""

    @property
    def rank(self) -> int:
        """Which part of each batch this process has; processes that hold one replica together have the same."""

    @property
    def world_size(self) -> int:
        """Into how many parts a batch is dealt."""

    @property
    def device(self) -> torch.device:
        """Where collectives work."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, by whose number the loop divides their losses."""

    @property
    def epoch(self) -> int:
        """Zero-based epoch."""

    @property
    def loss_scale(self) -> float:
        """Factor by which a GradScaler multiplies losses; 1 without one."""

    @property
    def will_log(self) -> bool:
        """Whether the values of the current step will be looked at, so that what costs something is worth it."""

    @property
    def what_steps(self) -> str:
        """The user's function that makes the loss, as error messages call it."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a loss as the loop does; it is the micro-batch's, not yet divided by :attr:`micro_batches`."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Backward passes inside the block leave each process with its own gradient."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that autocast lets the forward pass compute in; ``None``: there is none, or it is not known."""

    def autocast(self) -> AbstractContextManager[Any]:
        """What the loop enters around a forward pass, for one that goes beside its distributed wrapper."""

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Around extra passes: nothing that the modules log inside the block arrives anywhere."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over the parts of a batch of a tensor on :attr:`device`, which may be overwritten; same on all ranks."""


class LocalHost:
    """How a plain PyTorch loop goes backward, steps and talks to other processes (see `lightning_ire.engine.host`).

    Other processes are those of `torch.distributed`, where it is initialized; the model is then expected in
    `DistributedDataParallel`, or sharded (`fully_shard`, `parallelize_module`). What the loss function itself needs
    (autocast, moving the batch) is its own business.

    Args:
        scaler: The GradScaler of fp16 training; ``None``: none. It is asked to unscale before `clip`, to step and to
            update its scale; steps that it skips are neither counted nor boosted.
        data_parallel: Mesh over which batches are dealt; ``None``: every process has its own part. Under tensor
            parallelism give the data-parallel dimension of the mesh, as processes of a group have the same batch.

    Example:
        >>> LocalHost().world_size
        1
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None = None, data_parallel: distributed.DeviceMesh | None = None
    ) -> None:
        self.scaler = scaler
        self.data_parallel = data_parallel
        self._batches = 1
        self.epoch = 0
        self._model: nn.Module | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take up a model; called once, by :class:`IREStep`.

        Args:
            model: The model that the loss function calls.

        Returns:
            The model beside any wrapper of the loop's.

        Raises:
            ConfigurationError: If FSDP1 has sharded it, whose parts of parameters are plain tensors.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and any(isinstance(one, fsdp.FullyShardedDataParallel) for one in model.modules()):
            raise ConfigurationError(
                "Expected a whole model or one that `fully_shard` has sharded, got FullyShardedDataParallel (FSDP1), "
                "whose parts of parameters nothing tells from whole ones: use `torch.distributed.fsdp.fully_shard`."
            )
        self._model = model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def unwrapped(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer of torch inside what the loop has made of it.

        Args:
            optimizer: What the loop steps.
        """
        return optimizer

    def take(self, batches: int) -> None:
        """So many batches come in one call of :class:`IREStep`.

        Args:
            batches: Their number.
        """
        self._batches = batches

    @property
    def micro_batches(self) -> int:
        """By how many a micro-batch's loss is divided."""
        return self._batches

    @property
    def steps_now(self) -> bool:
        """Whether the batches of this call complete the gradient of a step."""
        return True

    @property
    def rank(self) -> int:
        """Which part of each batch this process has."""
        if self.data_parallel is not None:
            return self.data_parallel.get_local_rank()
        return distributed.get_rank() if _is_distributed() else 0

    @property
    def world_size(self) -> int:
        """Into how many parts a batch is dealt."""
        if self.data_parallel is not None:
            return self.data_parallel.size()
        return distributed.get_world_size() if _is_distributed() else 1

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        first = next(self._model.parameters(), None) if self._model is not None else None
        return torch.device("cpu") if first is None else first.device

    @property
    def loss_scale(self) -> float:
        """The GradScaler's factor."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    @property
    def will_log(self) -> bool:
        """Whoever steps by hand may look at the values of each step."""
        return True

    @property
    def what_steps(self) -> str:
        """The name of the loss function in messages."""
        return "the loss function"

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of one micro-batch.

        Args:
            loss: The loss, a scalar.
        """
        loss = loss / self._batches
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Backward passes inside leave each process with its own gradient."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Not known: autocast is the loss function's own business."""
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        """A forward pass of an estimate, which goes through the wrapper here: its gradients stay on this process."""
        return self.no_sync()

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Nothing logs here.

        Args:
            modules: The model and all below it.
        """
        return nullcontext()

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over the parts of a batch.

        Args:
            value: A tensor; overwritten.
        """
        distributed.all_reduce(value)
        copies = distributed.get_world_size() // self.world_size
        return value if copies == 1 else value / copies

    def step(self, optimizer: Optimizer, clip: Callable[[], Any] | None) -> None:
        """Clip and step.

        Args:
            optimizer: The optimizer, whose gradients are complete.
            clip: What clips them; ``None``: nothing does.
        """
        if self.scaler is None:
            if clip is not None:
                clip()
            optimizer.step()
            return
        if clip is not None:
            self.scaler.unscale_(optimizer)
            clip()
        self.scaler.step(optimizer)
        self.scaler.update()


def check_host(host: Any) -> LocalHost:
    """A host, if it is one.

    Args:
        host: What came.

    Raises:
        ConfigurationError: If it is something else, such as the object that a host is made of.
    """
    if not isinstance(host, LocalHost):
        raise ConfigurationError(
            "Expected `host` to be LocalHost(), FabricHost(fabric) or AccelerateHost(accelerator), got "
            f"{getattr(host, '__name__', type(host).__name__)}."
        )
    return host


def dtype_of_autocast(device: torch.device, context: AbstractContextManager[Any]) -> torch.dtype | None:
    """The type that autocast has inside a context; ``None``: it is off.

    Args:
        device: Where the forward pass computes.
        context: What is entered around it.
    """
    with context:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
