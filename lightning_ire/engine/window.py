"""One accumulation window: the micro-batches of one optimizer step, and the extra passes over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature import Estimate, MicroBatch
from lightning_ire.engine._torch import differentiable_once
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import ModuleState, MovingWeights, modules_of, weights_of
from lightning_ire.engine.no_trace import Replay, no_trace, no_trace_on_the_graph
from lightning_ire.functional import perturbed
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.perturbation import Ascent, Perturbation

__all__ = ["AccumulationWindow", "loss_of"]

_BUCKET = 1 << 22  # elements per all-reduce


class AccumulationWindow:
    """Remembers the calls of `training_step` that one optimizer step is made of, and runs them again on request.

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
        replays: Whether extra passes may be asked for, so that what a pass starts from has to be kept.
        perturbation: How this step's gradient is perturbed; ``None``: not at all.

    Attributes:
        unmoved: Whether Lightning's own forward passes run at the unmoved weights.
        synchronized: Whether Lightning's own backward passes leave averaged gradients on all devices.
        estimate: The curvature estimate that watches this window, if the mask is to be made.
        stepped: Whether the optimizer's closure has run.
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
        replays: bool,
        perturbation: Perturbation | None,
    ) -> None:
        self.host = host
        self.module = module
        self.training_step = training_step
        self.forward = forward or training_step
        self.optimizer = optimizer
        self.parameters = parameters
        self.devices = devices
        self.step = step
        self.perturbation = perturbation
        self.unmoved = perturbation is None or perturbation.uses_gradient
        self.synchronized = perturbation is None or not perturbation.uses_gradient or perturbation.sync
        self.micro_batches: list[MicroBatch] = []
        self.estimate: Estimate | None = None
        self.stepped = False
        self._seed = seed
        self._moving = moving
        self._replays = replays
        self._start: ModuleState | None = None
        self._modules: list[nn.Module] | None = None
        self._weights: list[nn.Parameter] = []
        self._weights_at_start: list[tuple[nn.Parameter, Tensor]] = []
        self._unperturbed: Mapping[int, Tensor] = {}
        self._gradients_before: dict[int, Tensor] = {}

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
        """Remember a call that is about to happen.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The micro-batch, to be completed by the caller.
        """
        micro_batch = MicroBatch(args, kwargs)
        if self._replays:
            micro_batch.replay = self.replay()
            if self._start is None:
                self.keep_start()
        self.micro_batches.append(micro_batch)
        return micro_batch

    def keep_start(self) -> None:
        """Remember what the window's first pass starts from, besides a :class:`Replay`."""
        others = self._moving.parameters(self.weights, trained=False)
        self._start = ModuleState(self.modules, others, self._moving.offload)
        self._weights_at_start = [  # those of which it is not known yet only in the first few passes of a run
            (p, p.detach().to(p.device if self._moving.moves(p) else "cpu", copy=True)) for p in self._moving.trained()
        ]

    @torch.no_grad()
    def rewind(self) -> None:
        """Let the next pass start from what the window's first one started from: layers compute with what they change.

        Weights that the training pass moved itself (prototypes that it normalizes) and that are perturbed now are
        perturbed from there.
        """
        if self._start is None:
            return
        self._start.restore()
        for parameter, start in self._weights_at_start:
            if self._moving.moves(parameter):
                before = start.to(parameter.device)
                base = self._unperturbed.get(id(parameter), parameter.detach())
                parameter.copy_(torch.where(parameter == base, before, before + (parameter - base)))

    @contextmanager
    def perturbed_from(self, unperturbed: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside the block the weights are perturbed.

        Args:
            unperturbed: What they were, by `id` of the parameter; those that are missing are as they were.

        Yields:
            Nothing.
        """
        self._unperturbed = unperturbed
        try:
            yield
        finally:
            self._unperturbed = {}

    @property
    def modules(self) -> list[nn.Module]:
        """The module's modules, looked for anew after each training pass, which may make some."""
        if self._modules is None:
            self._modules = modules_of(self.module)
            self._weights = weights_of(self._modules)
        return self._modules

    @property
    def weights(self) -> list[nn.Parameter]:
        """Their parameters."""
        return self._weights if self.modules else []

    def replay(self) -> Replay:
        """What the pass that comes now starts from."""
        return Replay(self.modules, self.devices)

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """To be entered for a forward pass of the training itself, at which extra passes look back.

        Yields:
            Nothing.
        """
        watch = self._replays or not self.unmoved
        with self._moving.watched(self.weights) if watch else nullcontext():
            yield
        self._modules = None

    def no_trace(self) -> AbstractContextManager[None]:
        """An extra pass of the module inside the block leaves none."""
        weights = self._moving.parameters(self.weights)
        return no_trace(self.modules, self.host, self.devices, weights, self._moving.offload)

    def no_trace_on_the_graph(self) -> AbstractContextManager[None]:
        """A backward pass through the graph of a training pass leaves none inside the block."""
        return no_trace_on_the_graph(self.modules, self.devices)

    def keep_gradients(self) -> None:
        """Remember the gradients that are there before the window's first backward pass, usually none."""
        self._gradients_before = {id(p): p.grad.clone() for p in self.parameters if p.grad is not None}

    def had_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether there was a gradient other than zero before the window's first backward pass.

        Args:
            parameter: One of its parameters.
        """
        before = self._gradients_before.get(id(parameter))
        return before is not None and bool(before.any())

    @property
    def back_propagated(self) -> list[MicroBatch]:
        """The micro-batches whose gradients are in `.grad`."""
        return [micro_batch for micro_batch in self.micro_batches if micro_batch.backward_done]

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
    def labels(self) -> torch.Generator:
        """See :class:`~lightning_ire.curvature.Window`."""
        if not hasattr(self, "_labels"):
            seed = mixed_seed(self._seed, "labels", self.host.rank)
            self._labels = torch.Generator().manual_seed(seed)
        return self._labels

    @property
    def shared_seed(self) -> int:
        """See :class:`~lightning_ire.curvature.Window`."""
        return mixed_seed(self._seed, "shared")

    @property
    def movable(self) -> list[nn.Parameter]:
        """The parameters that the perturbation may move; in manual optimization some may be frozen at the moment."""
        chosen = self.perturbation.selects(self.module) if self.perturbation is not None else None
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        if chosen is None:
            return trained
        ids = {id(p) for name, p in self.module.named_parameters(remove_duplicate=False) if name in chosen}
        return [parameter for parameter in trained if id(parameter) in ids]

    def displacement(
        self, gradients: Sequence[Tensor | None] | None = None, moves: Sequence[Tensor | None] | None = None
    ) -> tuple[list[nn.Parameter], Sequence[Tensor | None], Tensor | None]:
        """Ask the perturbation how far to move; random ones draw the same in every micro-batch and on all ranks.

        Args:
            gradients: Gradients of :attr:`movable` as they are in `.grad`, for a perturbation that uses them.
            moves: The displacements that they were taken at; ``None``: none.

        Returns:
            The movable parameters, their displacements, and the norm to be logged.
        """
        assert self.perturbation is not None
        movable = self.movable
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        groups_of = [groups.get(id(weight), {}) for weight in movable]
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        seed = mixed_seed(self._seed, "noise")
        generators = {
            device: torch.Generator(device).manual_seed(seed) for device in {weight.device for weight in movable}
        }
        ascent = Ascent(
            parameters=movable,
            gradients=self._minimized(self._unscaled(gradients or [None] * len(movable)), groups_of),
            groups=groups_of,
            generators=[generators[weight.device] for weight in movable],
            moves=moves,
            names=[names.get(id(weight), "") for weight in movable],
        )
        moves, norm = self.perturbation.displacement(ascent)
        return movable, moves, norm

    def _minimized(
        self, gradients: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """Gradients of what the optimizer minimizes: of minus the loss for weights that it maximizes the loss over."""
        always = getattr(self.optimizer, "maximize", False)  # for the whole optimizer, as in pytorch_optimizer
        return [
            -g if g is not None and (always or group.get("maximize")) else g
            for g, group in zip(gradients, groups, strict=True)
        ]

    def _unscaled(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients without the factor of fp16's GradScaler, in at least float32 then."""
        scale = self.scale
        if scale == 1:
            return list(gradients)
        return [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in gradients]

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The weights are moved inside the block, by a perturbation that needs no gradient.

        What the pass itself changed in them stays, as a change of the unperturbed weights.

        Yields:
            Nothing.
        """
        movable, moves, _ = self.displacement()
        with perturbed(movable, moves):
            del moves
            yield
            changed = {id(p): p.detach().clone() for p in movable if self._moving.moves(p)}
        if changed:
            again = self.displacement()  # which draws the same
            with torch.no_grad():
                for parameter, move in zip(*again[:2], strict=True):
                    if move is not None and (now := changed.get(id(parameter))) is not None:
                        moved = parameter.detach().clone().add_(move)
                        parameter.copy_(torch.where(moved == parameter, now, parameter + (now - moved)))

    def mean_loss(self) -> Tensor:
        """Mean of the losses that `training_step` returned, on this device."""
        return _mean([micro_batch.loss for micro_batch in self.back_propagated if micro_batch.loss is not None])

    @contextmanager
    def rerun(
        self,
        micro_batch: MicroBatch,
        context: AbstractContextManager[Any],
        *args: Any,
        step: Callable[..., Any] | None = None,
    ) -> Iterator[Any]:
        """Another forward pass at the current weights, beside any distributed wrapper; it leaves no trace.

        The backward pass belongs inside the block: buffers are put back in place at its end.

        Args:
            micro_batch: Which call to repeat, with its random numbers.
            context: Entered for the time of the call.
            *args: Positional arguments to use instead of the recorded ones.
            step: Called instead of `training_step`; what it returns is returned as it is.

        Yields:
            The loss that `training_step` returned, with its graph.
        """
        with torch.enable_grad(), self.no_trace():
            if micro_batch is self.micro_batches[0]:
                self.rewind()
            micro_batch.replay.restore()
            with self.host.autocast(), context:
                output = (step or self.training_step)(*args, **micro_batch.kwargs)
            yield output if step is not None else loss_of(output)

    def second_pass(self, final: bool = True) -> Tensor | None:
        """Forward and backward over the whole window at the current weights; the gradients replace those in `.grad`.

        As the loop does it: loss divided by the number of micro-batches, scaled for fp16, gradients synchronized in the
        last backward pass only. The module's own hooks (`on_after_backward`, ...) do not run again.

        Args:
            final: Whether these are the gradients of the step; else they are those of a further ascent.

        Returns:
            The mean loss on this device, detached; ``None`` if no micro-batch has one.
        """
        losses = []
        todo = self.back_propagated
        synchronized = final or self.synchronized
        with torch.enable_grad(), self.no_trace(), self.fresh_gradients(final):
            self.rewind()
            for index, micro_batch in enumerate(todo):
                with nullcontext() if synchronized and index == len(todo) - 1 else self.host.no_sync():
                    micro_batch.replay.restore()
                    loss = loss_of(self.forward(*micro_batch.args, **micro_batch.kwargs))
                    if loss is None:
                        continue
                    losses.append(loss.detach())
                    self._backward(loss)
        return _mean(losses) if losses else None

    def _backward(self, loss: Tensor) -> None:
        try:
            self.host.backward(loss)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise ConfigurationError(
                f"Expected {self.host.what_steps} to make its graph anew at every call, got one that uses a tensor of "
                "the first pass again in the second pass of the perturbation: detach what it keeps between calls "
                "(hidden states, cached features), or compute it inside."
            ) from error

    @contextmanager
    def fresh_gradients(self, final: bool = True) -> Iterator[None]:
        """The optimizer's gradients start from what was there before the window; others' are as before afterwards.

        Args:
            final: Whether what was there before is needed no more.

        Yields:
            Nothing.
        """
        ours = {id(parameter) for parameter in self.parameters}
        others = [(p, p.grad) for p in self.module.parameters() if id(p) not in ours]
        before = self._gradients_before
        if final:
            self._gradients_before = {}
        for parameter in self.parameters:
            gradient = before.get(id(parameter))
            parameter.grad = gradient if gradient is None or final else gradient.clone()
        for parameter, _ in others:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in others:
                parameter.grad = gradient

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
        dense = [
            None if parameter.grad is None else parameter.grad.detach().to_dense() for parameter in self.parameters
        ]
        own = self._unscaled(dense)
        return own if self.synchronized else self.average(own)

    def average(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """See :class:`~lightning_ire.curvature.Window`. Ranks agree beforehand on which parameters have one."""
        if self.world_size == 1:
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
            parts = [self._dense(gradients[member], self.parameters[member]) for member in bucket]
            widest = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
            joined = torch.cat([part.reshape(-1).to(device, widest) for part in parts])
            mean = self.total(joined) / self.world_size
            for member, part, piece in zip(bucket, parts, mean.split([part.numel() for part in parts]), strict=True):
                result[member] = piece.view(part.shape).to(part.device)
            bucket, size = [], 0
        return result

    @staticmethod
    def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if gradient is None else gradient.contiguous()

    def total(self, value: Tensor) -> Tensor:
        """See :class:`~lightning_ire.curvature.Window`."""
        if self.world_size == 1:
            return value
        return self.host.all_reduce_sum(value.to(self.host.device, copy=True))


def loss_of(output: Any) -> Tensor | None:
    """The loss in what the user's function returned: a tensor, a mapping with "loss", or ``None``.

    Args:
        output: What it returned.
    """
    return output.get("loss") if isinstance(output, Mapping) else output


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.reshape(()) for loss in losses]).mean()
