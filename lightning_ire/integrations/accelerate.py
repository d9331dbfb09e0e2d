"""Hugging Face Accelerate as a host of :class:`~lightning_ire.IREStep`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError
from lightning_ire._patches import muted
from lightning_ire.engine.host import LocalHost

__all__ = ["AccelerateHost", "check_accelerator"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class AccelerateHost(LocalHost):
    """A loop with Accelerate: ``IREStep(model, optimizer, host=AccelerateHost(accelerator), kappa=2.0)``.

    The step goes backward by `accelerator.backward` and steps the optimizer that `accelerator.prepare` returned (a step
    that overflows in fp16 is neither counted nor boosted). Inside ``with accelerator.accumulate(model):`` each call of
    the step takes one micro-batch, and the optimizer steps where `accelerator.sync_gradients` is true;
    `scheduler.step()` follows as ever. One device and DDP, in all precisions but fp8. In extra passes `accelerator.log`
    and `accelerator.print` do nothing.

    Args:
        accelerator: The accelerator.

    Raises:
        ConfigurationError: For DeepSpeed, FSDP, Megatron-LM, XLA, tensor and context parallelism; by
            :class:`~lightning_ire.IREStep` for an optimizer that `prepare` has not returned, and for such a model where
            several processes train it (in one process `prepare` may leave a model as it is).

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from lightning_ire import AccelerateHost, IREStep
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(4, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = IREStep(
        ...     model,
        ...     optimizer,
        ...     host=AccelerateHost(accelerator),
        ...     kappa=2.0,
        ...     clip=lambda parameters: accelerator.clip_grad_norm_(parameters, 1.0),
        ... )
        >>> for batch in torch.eye(4):
        ...     with accelerator.accumulate(model):
        ...         loss = step(lambda x: torch.nn.functional.mse_loss(model(x), torch.ones(1)), batch)
        >>> step.progress.step
        2
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        check_accelerator(accelerator)
        self.accelerator = accelerator

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take up a model.

        Args:
            model: The model that `accelerator.prepare` returned.

        Returns:
            The module inside.

        Raises:
            ConfigurationError: If several processes train it, and it did not.
        """
        if self.accelerator.use_distributed and getattr(model, "no_sync", None) is None:
            raise ConfigurationError(_not_prepared("model", model))
        self._model = model
        module: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return module

    def unwrapped(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer of torch inside.

        Args:
            optimizer: The optimizer that `accelerator.prepare` returned.

        Raises:
            ConfigurationError: If it did not.
        """
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise ConfigurationError(_not_prepared("optimizer", optimizer))
        inner: Any = optimizer
        while isinstance(inner, AcceleratedOptimizer):
            inner = inner.optimizer
        return inner

    @property
    def device(self) -> torch.device:
        """The accelerator's device."""
        return self.accelerator.device

    @property
    def micro_batches(self) -> int:
        """Calls of a step, times batches in each call."""
        return self._batches * self.accelerator.gradient_accumulation_steps

    @property
    def steps_now(self) -> bool:
        """What `accelerator.accumulate` decides on; true outside of it."""
        return self.accelerator.sync_gradients

    @property
    def loss_scale(self) -> float:
        """The factor of the accelerator's GradScaler."""
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that the prepared model computes in."""
        return _DTYPES.get(self.accelerator.mixed_precision)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of one micro-batch; Accelerate divides it by its number of accumulation steps.

        Args:
            loss: The loss, a scalar.
        """
        self.accelerator.backward(loss / self._batches)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Backward passes inside leave each process with its own gradient."""
        return self.accelerator.no_sync(self._model) if self.accelerator.use_distributed else nullcontext()

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Nothing is logged or printed through the accelerator inside the block.

        Args:
            modules: The model and all below it.
        """
        return muted(self.accelerator, "log", "print")


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what splits the model or steps by itself.

    Args:
        accelerator: The accelerator.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    if not hasattr(accelerator, "distributed_type"):
        raise ConfigurationError(
            f"Expected `AccelerateHost(accelerator)` with an Accelerator, got {type(accelerator).__name__}."
        )
    kind, plan = accelerator.distributed_type, accelerator.parallelism_config
    what = ""
    if kind == DistributedType.FSDP:
        what = f"FSDP {2 if accelerator.is_fsdp2 else 1}"
    elif kind in _REFUSED:
        what = kind.value
    elif plan is not None and (plan.tp_enabled or plan.cp_enabled or getattr(plan, "sp_enabled", False)):
        what = "tensor, context or sequence parallelism"
    elif accelerator.mixed_precision == "fp8":
        what = "fp8"
    if what:
        raise ConfigurationError(
            f"Expected an Accelerator on one device or with DDP, in fp32, bf16 or fp16, got {what}: launch with "
            "`accelerate launch --multi_gpu`; sharded models train with Fabric's or Lightning's ModelParallelStrategy."
        )


def _not_prepared(what: str, given: Any) -> str:
    return (
        f"Expected the {what} that `accelerator.prepare(model, optimizer)` returned, got {type(given).__name__}: give "
        "that one."
    )
