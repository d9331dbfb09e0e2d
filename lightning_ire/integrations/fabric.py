"""Lightning Fabric as a host of :class:`~lightning_ire.IREStep`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.fabric.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.fabric.wrappers import is_wrapped
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import backward_allowed, muted_logging
from lightning_ire._patches import muted
from lightning_ire.engine.host import LocalHost, dtype_of_autocast

__all__ = ["FabricHost"]


class FabricHost(LocalHost):
    """A loop with Lightning Fabric: ``IREStep(model, optimizer, host=FabricHost(fabric), kappa=2.0)``.

    The step goes backward by `fabric.backward`, keeps micro-batches from synchronizing by `fabric.no_backward_sync`,
    and steps the optimizer that `fabric.setup` returned, through the precision plugin (a step that overflows in
    "16-mixed" is neither counted nor boosted). A single device, DDP and ModelParallelStrategy (`fully_shard`,
    `parallelize_module`, both), all precisions. In extra passes `fabric.log`, `fabric.log_dict`, `fabric.print` and
    a LightningModule's `self.log` do nothing.

    Args:
        fabric: After `fabric.launch()`, if that is called.

    Raises:
        ConfigurationError: For strategies that are not supported; by :class:`~lightning_ire.IREStep` for a model or an
            optimizer that `fabric.setup` has not returned.

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> from lightning_ire import FabricHost, IREStep
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = torch.nn.Linear(4, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = IREStep(
        ...     model,
        ...     optimizer,
        ...     host=FabricHost(fabric),
        ...     kappa=2.0,
        ...     clip=lambda _: fabric.clip_gradients(model, optimizer, max_norm=1.0),
        ... )
        >>> x = torch.eye(4)
        >>> float(step(lambda batch: torch.nn.functional.mse_loss(model(batch), torch.ones(4, 1)), x)) > 0
        True
    """

    def __init__(self, fabric: Fabric) -> None:
        super().__init__()
        if not hasattr(fabric, "strategy"):
            raise ConfigurationError(f"Expected `FabricHost(fabric)` with a Fabric, got {type(fabric).__name__}.")
        strategy = fabric.strategy
        supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
        if not supported or isinstance(strategy, SingleDeviceXLAStrategy):
            raise ConfigurationError(
                f"Expected a Fabric on a single device, with DDP or with ModelParallelStrategy, got "
                f"{type(strategy).__name__}: set `strategy` to 'auto' or 'ddp', or to ModelParallelStrategy with a "
                "`parallelize_fn` that calls `fully_shard`."
            )
        self.fabric = fabric
        if isinstance(strategy, ModelParallelStrategy):
            self.data_parallel = strategy.device_mesh["data_parallel"]

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take up a model.

        Args:
            model: The model that `fabric.setup` returned.

        Returns:
            The module inside.

        Raises:
            ConfigurationError: If it did not.
        """
        self._model = model
        return _set_up(model, "model").module

    def unwrapped(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer of torch inside.

        Args:
            optimizer: The optimizer that `fabric.setup` returned.

        Raises:
            ConfigurationError: If it did not.
        """
        return _set_up(optimizer, "optimizer").optimizer

    @property
    def device(self) -> torch.device:
        """Fabric's device of this process."""
        return self.fabric.device

    @property
    def loss_scale(self) -> float:
        """The factor of the precision plugin's GradScaler."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that the precision plugin lets the forward pass compute in."""
        return dtype_of_autocast(self.device, self.fabric.autocast())

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of one micro-batch.

        Args:
            loss: The loss, a scalar.
        """
        self.fabric.backward(loss / self._batches)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Backward passes inside leave each process with its own gradient (of sharded weights: none does)."""
        if not isinstance(self.fabric.strategy, DDPStrategy):
            return nullcontext()
        return self.fabric.no_backward_sync(self._model)  # type: ignore[arg-type]

    @contextmanager
    def quiet(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Nothing is logged or printed through Fabric inside the block.

        Args:
            modules: The model and all below it.

        Yields:
            Nothing.
        """
        with muted_logging(modules), muted(self.fabric, "log", "log_dict", "print"), backward_allowed():
            yield


def _set_up(given: Any, what: str) -> Any:
    """What `fabric.setup` returned, also where it was compiled after that."""
    if not is_wrapped(given):
        raise ConfigurationError(
            f"Expected the {what} that `fabric.setup(model, optimizer)` returned, got {type(given).__name__}: give "
            "that one."
        )
    return given._orig_mod if type(given).__name__ == "OptimizedModule" else given
