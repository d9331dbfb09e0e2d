"""One accumulation window: the micro-batches of one optimizer step, as recorded, and their curvature estimate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire.curvature import Curvature, Estimate, MicroBatch
from lightning_ire.engine._torch import differentiable_once, gathered_dtypes
from lightning_ire.engine.ascent import WeightAscent, unscaled
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import MovingWeights
from lightning_ire.engine.replay import ExtraPasses
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.engine.state import Progress
from lightning_ire.functional import coarsest, is_sharded, local
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.perturbation import Perturbation

__all__ = ["AccumulationWindow"]

_BUCKET = 1 << 22  # elements per all-reduce


class AccumulationWindow:
    """Remembers the calls of `training_step` that one optimizer step is made of.

    Args:
        host: The loop.
        module: The module being trained.
        training_step: The user's function that makes the loss, beside our wrapper and any distributed one.
        forward: The same through the distributed wrapper; ``None``: there is none.
        optimizer: The optimizer that is about to step.
        parameters: Its parameters.
        devices: Devices that hold a parameter of the module.
        step: Its real steps so far.
        seed: Seed of this window's draws: the same on all ranks.
        moving: The weights that the module itself moves.
        gathered: Copies of whole weights in the module.
        replays: Whether the step will be run again for other reasons than the estimate and the perturbation.
        curvature: What estimates the curvature for a mask; ``None``: no mask is to be made.
        perturbation: How this step's gradient is perturbed; ``None``: not at all.
        progress: The optimizer's state that outlives the fit.
        second: Whether the perturbation moves the weights at this step.

    Attributes:
        passes: The extra passes over the window.
        ascent: What moves the weights; ``None``: nothing does.
        unmoved: Whether the training's own forward passes run at the unmoved weights.
        synchronized: Whether the training's own backward passes leave averaged gradients on all devices.
        gathers: See :class:`~lightning_ire.curvature.Window`.
        micro_batches: The calls so far.
        notes: What the perturbation remembers of a closure's first call (manual optimization).
        estimate: The curvature estimate that watches this window, until it is finished.
        finished: Whether its gradients are complete, so that the next thing is the optimizer's step.
    """

    def __init__(
        self,
        host: Host,
        module: nn.Module,
        training_step: Callable[..., Any],
        forward: Callable[..., Any] | None,
        optimizer: Optimizer,
        parameters: list[nn.Parameter],
        *,
        devices: Collection[torch.device],
        step: int,
        seed: int,
        moving: MovingWeights,
        gathered: GatheredWeights,
        replays: bool,
        curvature: Curvature | None,
        perturbation: Perturbation | None,
        progress: Progress,
        second: bool,
    ) -> None:
        self.host = host
        self.module = module
        self.training_step = training_step
        self.optimizer = optimizer
        self.parameters = parameters
        self.step = step
        self.perturbation = perturbation
        self.ascent = (
            None
            if perturbation is None
            else WeightAscent(
                perturbation, host, module, optimizer, parameters, moving, gathered, seed, progress, second
            )
        )
        self.unmoved = self.ascent is None or not self.ascent.before
        self.synchronized = self.ascent is None or self.ascent.synchronized
        reruns = curvature is not None and curvature.reruns
        second = self.ascent is not None and self.ascent.second and self.unmoved
        self.passes = ExtraPasses(
            host,
            module,
            training_step,
            forward,
            parameters,
            devices,
            moving,
            gathered,
            self.ascent,
            expected=replays or reruns or second,
        )
        self.gathers = bool(gathered)
        self._sharded = any(map(is_sharded, parameters))
        self.micro_batches: list[MicroBatch] = []
        self.finished = False
        self.notes: dict[str, Any] = {}
        self._seed = seed
        self._labels: torch.Generator | None = None
        self.estimate: Estimate | None = None if curvature is None else curvature.begin(self)

    # Recording

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
        """Remember a call that is about to happen.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The micro-batch, which :meth:`add_loss` and :meth:`end_backward` complete.
        """
        micro_batch = MicroBatch(args, kwargs, replay=self.passes.before_first())
        self.micro_batches.append(micro_batch)
        return micro_batch

    def add_loss(self, loss: Tensor) -> None:
        """The last call returned a loss.

        Args:
            loss: The loss, not divided by the number of micro-batches.
        """
        self.micro_batches[-1].loss = loss.detach()

    def end_backward(self) -> None:
        """The last call's loss is back-propagated: its gradient is in `.grad`."""
        self.micro_batches[-1].backward_done = True

    def add(self, micro_batch: MicroBatch) -> None:
        """Remember a micro-batch that somebody else recorded.

        Args:
            micro_batch: The micro-batch.
        """
        self.micro_batches.append(micro_batch)

    def drop_unfinished(self) -> None:
        """Forget a last call that was not back-propagated: it had no loss, or it was weight averaging's last epoch."""
        if self.micro_batches and not self.micro_batches[-1].backward_done:
            self.micro_batches.pop()

    def forget(self) -> None:
        """The gradients so far were zeroed: let the estimate start again."""
        if self.estimate is not None:
            self.micro_batches.clear()
            self.estimate.forget()

    def watch(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """The estimate watches a call inside the block.

        Args:
            micro_batch: The call.
        """
        return nullcontext() if self.estimate is None else self.estimate.watch(micro_batch)

    def look_at_graph(self, micro_batch: MicroBatch, loss: Tensor) -> None:
        """The estimate may use the graph of the training's forward pass, which is alive for the last time.

        Args:
            micro_batch: The call.
            loss: What it returned.
        """
        if self.estimate is not None and self.estimate.uses_graph:
            with self.passes.no_trace_on_the_graph():
                self.estimate.before_backward(micro_batch, loss)

    def finish_estimate(self) -> list[Tensor | None] | None:
        """The estimate's values, and the end of it; ``None``: they are not finite."""
        assert self.estimate is not None
        estimate, self.estimate = self.estimate, None
        return estimate.finish()

    def finish(self) -> None:
        """The window's gradients are complete."""
        self.finished = True

    @property
    def back_propagated(self) -> list[MicroBatch]:
        """The micro-batches whose gradients are in `.grad`."""
        return [micro_batch for micro_batch in self.micro_batches if micro_batch.backward_done]

    def mean_loss(self) -> Tensor:
        """Mean of the losses that `training_step` returned, on this device."""
        losses = [micro_batch.loss for micro_batch in self.back_propagated if micro_batch.loss is not None]
        return torch.stack([loss.reshape(()) for loss in losses]).mean()

    def second_pass(self, final: bool = True) -> Tensor | None:
        """See :meth:`ExtraPasses.second_pass`.

        Args:
            final: Whether these are the gradients of the step.
        """
        return self.passes.second_pass(self.back_propagated, final)

    # What an estimate may ask, see `lightning_ire.curvature.Window`

    @property
    def what_steps(self) -> str:
        """See :class:`~lightning_ire.curvature.Window`."""
        return self.host.what_steps

    @property
    def world_size(self) -> int:
        """See :class:`~lightning_ire.curvature.Window`."""
        return self.host.world_size

    @property
    def share(self) -> float:
        """See :class:`~lightning_ire.curvature.Window`."""
        return 1.0 / self.host.micro_batches

    @property
    def scale(self) -> float:
        """See :class:`~lightning_ire.curvature.Window`."""
        return self.host.loss_scale

    @property
    def precision(self) -> torch.dtype | None:
        """See :class:`~lightning_ire.curvature.Window`."""
        autocast = self.host.autocast_dtype
        return coarsest(gathered_dtypes(self.module) | ({autocast} if autocast is not None else set()))

    @property
    def labels(self) -> torch.Generator:
        """See :class:`~lightning_ire.curvature.Window`."""
        if self._labels is None:
            self._labels = torch.Generator().manual_seed(mixed_seed(self._seed, "labels", self.host.rank))
        return self._labels

    @property
    def shared_seed(self) -> int:
        """See :class:`~lightning_ire.curvature.Window`."""
        return mixed_seed(self._seed, "shared")

    def rerun(
        self,
        micro_batch: MicroBatch,
        context: AbstractContextManager[Any],
        *args: Any,
        step: Callable[..., Any] | None = None,
    ) -> AbstractContextManager[Any]:
        """See :class:`~lightning_ire.curvature.Window`."""
        return self.passes.rerun(micro_batch, micro_batch is self.micro_batches[0], context, *args, step=step)

    def differentiable_gradients(self, loss: Tensor) -> list[Tensor | None]:
        """See :class:`~lightning_ire.curvature.Window`."""
        wanted = [parameter for parameter in self.parameters if parameter.requires_grad]
        found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True) if wanted else ()
        if differentiable_once(found):
            raise RuntimeError("a function in the loss has a backward pass without a derivative")
        gradients = iter(found)
        return [next(gradients) if parameter.requires_grad else None for parameter in self.parameters]

    def gradients(self) -> list[Tensor | None]:
        """See :class:`~lightning_ire.curvature.Window`."""
        dense = [None if p.grad is None else local(p.grad.detach(), p).to_dense() for p in self.parameters]
        own = unscaled(dense, self.scale)
        return own if self.synchronized else self.average(own)

    def average(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """See :class:`~lightning_ire.curvature.Window`. Ranks agree beforehand on which parameters have one."""
        if self.world_size == 1 or self._sharded:
            return list(gradients)
        device = self.host.device
        seen = self.total(torch.tensor([gradient is not None for gradient in gradients], dtype=torch.float32))
        result: list[Tensor | None] = [None] * len(gradients)
        bucket: list[int] = []
        size = 0
        wanted = [index for index, count in enumerate(seen.tolist()) if count]
        for position, index in enumerate(wanted):
            bucket.append(index)
            size += self.parameters[index].numel()
            if size < _BUCKET and position < len(wanted) - 1:
                continue
            parts = [_dense(gradients[member], self.parameters[member]) for member in bucket]
            widest = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
            joined = torch.cat([part.reshape(-1).to(device, widest) for part in parts])
            mean = self.total(joined) / self.world_size
            for member, part, piece in zip(bucket, parts, mean.split([part.numel() for part in parts]), strict=True):
                result[member] = piece.view(part.shape).to(part.device)
            bucket, size = [], 0
        return result

    def total(self, value: Tensor) -> Tensor:
        """See :class:`~lightning_ire.curvature.Window`."""
        if self.world_size == 1:
            return value
        return self.host.all_reduce_sum(value.to(self.host.device, copy=True))


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
