"""The interface between the callback and an estimate of the diagonal curvature.

A `Curvature` holds only settings. For every refresh it opens an `Estimate`, which watches one accumulation window go
by and then hands over h, one tensor per parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire.functional import all_finite

__all__ = ["Curvature", "Estimate", "MicroBatch", "Window", "finite_or_none"]


@dataclass(eq=False)
class MicroBatch:
    """One call of `training_step`, remembered until the optimizer step.

    Attributes:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        loss: The returned loss, detached, not divided by the number of micro-batches; ``None``: nothing to
            back-propagate.
        backward_done: Whether Lightning back-propagated it.
        replay: What the extra passes need besides the arguments (random number states); belongs to the callback.
        notes: What a perturbation remembers of the first pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Tensor | None = None
    backward_done: bool = False
    replay: Any = field(default=None, repr=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)


class Window(Protocol):
    """What an estimate may ask of the accumulation window it watches (all micro-batches of one optimizer step)."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The optimizer's parameters; estimates are in this order."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that is about to step."""

    @property
    def step(self) -> int:
        """Its real steps so far."""

    @property
    def micro_batches(self) -> Sequence[MicroBatch]:
        """The calls of `training_step` so far."""

    @property
    def module(self) -> nn.Module:
        """The module being trained."""

    @property
    def training_step(self) -> Callable[..., Any]:
        """The module's own `training_step`, without our wrapper."""

    @property
    def what_steps(self) -> str:
        """How messages call `training_step`."""

    @property
    def world_size(self) -> int:
        """Number of devices that train together."""

    @property
    def scale(self) -> float:
        """Factor by which fp16's GradScaler multiplies losses; 1 without one."""

    @property
    def share(self) -> float:
        """Factor of each micro-batch's loss in the window's: 1 / accumulate_grad_batches."""

    @property
    def gathers(self) -> bool:
        """Whether layers compute with gathered copies of sharded parameters (FSDP2).

        Then `torch.autograd.grad` finds no gradient and no error (the graph's leaves are the copies), a backward pass
        averages the gradients over the devices, and cannot be differentiated.
        """

    @property
    def precision(self) -> torch.dtype | None:
        """The coarsest type that the forward pass is known to compute in; ``None``: that of the parameters."""

    @property
    def unmoved(self) -> bool:
        """Whether the training forward runs at the unmoved weights (not so under AverageSAM)."""

    @property
    def labels(self) -> torch.Generator:
        """CPU generator for this refresh: seeded by (seed, step, rank), so independent over ranks."""

    @property
    def shared_seed(self) -> int:
        """Seed for what is drawn alike on all ranks, another one at every step."""

    def rerun(
        self,
        micro_batch: MicroBatch,
        context: AbstractContextManager[Any],
        *args: Any,
        step: Callable[..., Any] | None = None,
    ) -> AbstractContextManager[Any]:
        """Another forward pass at the unmoved weights that leaves no trace, with `context` entered around it.

        Yields the loss that `training_step` returned (or what `step`, called in its place, returned), with its graph;
        the backward pass belongs inside the block.
        """

    def differentiable_gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Gradients of a loss that can be differentiated once more; the loss's graph stays alive.

        Raises:
            RuntimeError: If the loss cannot be differentiated twice.
        """

    def gradients(self) -> list[Tensor | None]:
        """The window's unperturbed training gradients, unscaled, averaged over devices, before clipping."""

    def average(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Mean over devices, the same on all; ``None`` only where no device has a gradient.

        Of sharded parameters' gradients each device holds its own part of the mean already.
        """

    def total(self, value: Tensor) -> Tensor:
        """Sum over devices."""


class Estimate:
    """One refresh. The hooks are called in the order of the methods below; the base class does nothing in them."""

    @property
    def uses_graph(self) -> bool:
        """Whether :meth:`before_backward` does anything."""
        return type(self).before_backward is not Estimate.before_backward

    def watch(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """A context for Lightning's own `training_step` of this micro-batch."""
        return nullcontext()

    def before_backward(self, micro_batch: MicroBatch, loss: Tensor) -> None:
        """The graph of `loss`, the tensor that `training_step` returned, is alive for the last time."""

    def forget(self) -> None:
        """The gradients so far were zeroed (a module in manual optimization may do that at any time)."""

    def finish(self) -> list[Tensor | None] | None:
        """The estimate h at the unmoved weights; ``None`` if it is not finite (the same on all devices).

        Of a parameter that is a DTensor it is this device's part, a plain tensor (`DTensor.to_local`).
        """
        raise NotImplementedError


class Curvature(ABC):
    """Settings of a curvature estimate. A new one is a subclass of this and an :class:`Estimate`.

    Attributes:
        reruns: Whether its estimates may run the step again, so that what that needs is to be kept.
    """

    reruns: ClassVar[bool] = True

    @property
    def needs_whole(self) -> str:
        """Why it cannot estimate for sharded parameters, and what to set; empty: it can."""
        return ""

    @abstractmethod
    def begin(self, window: Window) -> Estimate:
        """Start an estimate on a window in which nothing has run yet."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def finite_or_none(
    values: list[Tensor | None], parameters: Sequence[Tensor] | None = None
) -> list[Tensor | None] | None:
    """The values, or ``None`` if one of them is NaN or infinite, of sharded parameters on any device."""
    if parameters is None:
        return values if bool(all_finite([value for value in values if value is not None])) else None
    pairs = [(value, p) for value, p in zip(values, parameters, strict=True) if value is not None]
    finite = all_finite([value for value, _ in pairs], like=[parameter for _, parameter in pairs])
    return values if bool(finite) else None
