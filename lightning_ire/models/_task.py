"""What the LightningModules of this package do alike, whatever they train."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ire._checks import ConfigurationError, check_choice
from lightning_ire.models._optimization import optimization
from lightning_ire.models._sharding import is_sharded, shard_
from lightning_ire.models._throughput import Throughput

__all__ = ["Task"]


class Task(LightningModule):
    """A network with its optimizer and schedule, compiled on request, and a clock that stands still in validation.

    Under Lightning's `ModelParallelStrategy` each device keeps a part of the network.

    The arguments are those of the subclasses, which describe them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: str,
        decay_norm_and_bias: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        self.model = model
        if not callable(optimizer):
            raise ConfigurationError(f"Expected `optimizer` to be a class of optimizers, got {optimizer!r}.")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = check_choice("lr_interval", lr_interval, ("epoch", "step"))
        self.decay_norm_and_bias = decay_norm_and_bias
        self.compile_network = compile
        self.throughput = Throughput()

    def configure_model(self) -> None:
        """Spread the network over the devices of a `ModelParallelStrategy`, and compile it; again changes nothing.

        Raises:
            ConfigurationError: If the network cannot be spread so.
        """
        if self.device_mesh is None:
            if self.compile_network:
                self.model.compile()  # in place: the names in checkpoints stay
        elif not is_sharded(self.model):
            shard_(self.model, self.device_mesh, self.sharding_policy(), self.compile_network)

    def sharding_policy(self) -> MixedPrecisionPolicy:
        """What a sharded network's weights are gathered in, and its gradients summed: as they are kept."""
        return MixedPrecisionPolicy()

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if there is one, its schedule in Lightning's form.

        Raises:
            ConfigurationError: If the optimizer refuses its arguments, or the schedule does not fit the run.
        """
        return optimization(self, self.optimizer, self.lr_scheduler, self.lr_interval, self.decay_norm_and_bias)

    def on_validation_start(self) -> None:
        """Hold the clock: validation may come in the middle of an epoch."""
        self.throughput.pause(self.device)

    def on_validation_end(self) -> None:
        """Let the clock go on."""
        self.throughput.resume(self.device)
