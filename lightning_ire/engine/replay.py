"""Extra forward and backward passes over the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature import MicroBatch
from lightning_ire.engine.ascent import WeightAscent
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import ModuleState, MovingWeights, modules_of, weights_of
from lightning_ire.engine.no_trace import Replay, no_trace, no_trace_on_the_graph
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.functional import local

__all__ = ["ExtraPasses", "loss_of"]


class ExtraPasses:
    """Runs the forward and backward passes of one window again, as they ran first, without a trace.

    Args:
        host: The loop.
        module: The module being trained.
        training_step: The user's function that makes the loss, beside our wrapper and any distributed one.
        forward: The same through the distributed wrapper; ``None``: there is none.
        parameters: The optimizer's parameters.
        devices: Devices that hold a parameter of the module.
        moving: The weights that the module itself moves.
        gathered: Copies of whole weights in the module.
        ascent: What moves the weights for this window's gradient; ``None``: nothing does.
        expected: Whether extra passes may be asked for, so that what a pass starts from has to be kept.
    """

    def __init__(
        self,
        host: Host,
        module: nn.Module,
        training_step: Callable[..., Any],
        forward: Callable[..., Any] | None,
        parameters: Sequence[nn.Parameter],
        devices: Collection[torch.device],
        moving: MovingWeights,
        gathered: GatheredWeights,
        ascent: WeightAscent | None,
        expected: bool,
    ) -> None:
        self._host = host
        self._module = module
        self._training_step = training_step
        self._forward = forward or training_step
        self._parameters = parameters
        self._devices = devices
        self._moving = moving
        self._gathered = gathered
        self._ascent = ascent
        self._expected = expected
        self._start: ModuleState | None = None
        self._known_modules: list[nn.Module] | None = None
        self._known_weights: list[nn.Parameter] | None = None
        self._weights_at_start: list[tuple[nn.Parameter, Tensor]] = []
        self._gradients_before: dict[int, Tensor] = {}

    # What a pass starts from

    def before_first(self) -> Replay | None:
        """What the training's own pass over a micro-batch that comes now starts from, where it may be run again."""
        if not self._expected:
            return None
        if self._start is None:
            self.keep_start()
        return self.replay()

    def keep_start(self) -> None:
        """Remember what the window's first pass starts from, besides a :class:`Replay`."""
        others = self._moving.parameters(self._weights, trained=False)
        self._start = ModuleState(self._modules, others, self._moving.offload)
        self._weights_at_start = [  # those of which it is not known yet only in the first few passes of a run
            (p, local(p.detach()).to(p.device if self._moving.moves(p) else "cpu", copy=True))
            for p in self._moving.trained()
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
        bases: Mapping[int, Tensor] = {} if self._ascent is None else self._ascent.base
        for parameter, start in self._weights_at_start:
            if self._moving.moves(parameter):
                now = local(parameter.detach())
                before = start.to(now.device)
                base = bases.get(id(parameter), now)
                now.copy_(torch.where(now == base, before, before + (now - base)))

    @property
    def _modules(self) -> list[nn.Module]:
        """The module's modules, looked for anew after each training pass, which may make some."""
        if self._known_modules is None:
            self._known_modules = modules_of(self._module)
        return self._known_modules

    @property
    def _weights(self) -> list[nn.Parameter]:
        """Their parameters; not to be asked for between a forward pass and its backward pass."""
        if self._known_weights is None:
            self._gathered.drop()
            self._known_weights = weights_of(self._modules)
        return self._known_weights

    def replay(self) -> Replay:
        """What the pass that comes now starts from."""
        return Replay(self._modules, self._devices)

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """To be entered for a forward pass of the training itself, at which extra passes look back.

        Yields:
            Nothing.
        """
        watch = self._expected or (self._ascent is not None and self._ascent.before)
        with self._moving.watched(self._weights) if watch else nullcontext():
            yield
        self._known_modules = self._known_weights = None

    # What they do not leave behind

    def no_trace(self) -> AbstractContextManager[None]:
        """An extra pass of the module inside the block leaves none."""
        self._gathered.drop()
        weights = self._moving.parameters(self._weights)
        return no_trace(self._modules, self._host, self._devices, weights, self._moving.offload)

    def no_trace_on_the_graph(self) -> AbstractContextManager[None]:
        """A backward pass through the graph of a training pass leaves none inside the block."""
        return no_trace_on_the_graph(self._modules, self._host, self._devices)

    def keep_gradients(self) -> None:
        """Remember the gradients that are there before the window's first backward pass, usually none."""
        self._gradients_before = {id(p): p.grad.clone() for p in self._parameters if p.grad is not None}

    def had_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether there was a gradient other than zero before the window's first backward pass.

        Args:
            parameter: One of the optimizer's parameters.
        """
        before = self._gradients_before.get(id(parameter))
        return before is not None and bool(before.any())

    @contextmanager
    def fresh_gradients(self, final: bool = True) -> Iterator[None]:
        """The optimizer's gradients start from what was there before the window; others' are as before afterwards.

        Args:
            final: Whether what was there before is needed no more.

        Yields:
            Nothing.
        """
        ours = {id(parameter) for parameter in self._parameters}
        others = [(p, p.grad) for p in self._weights if id(p) not in ours]
        before = self._gradients_before
        if final:
            self._gradients_before = {}
        for parameter in self._parameters:
            gradient = before.get(id(parameter))
            parameter.grad = gradient if gradient is None or final else gradient.clone()
        for parameter, _ in others:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in others:
                parameter.grad = gradient

    # The passes

    @contextmanager
    def rerun(
        self,
        micro_batch: MicroBatch,
        first: bool,
        context: AbstractContextManager[Any],
        *args: Any,
        step: Callable[..., Any] | None = None,
    ) -> Iterator[Any]:
        """Another forward pass at the current weights, beside any distributed wrapper; it leaves no trace.

        The backward pass belongs inside the block: buffers are put back in place at its end.

        Args:
            micro_batch: Which call to repeat, with its random numbers.
            first: Whether it is the window's first.
            context: Entered for the time of the call.
            *args: Positional arguments to use instead of the recorded ones.
            step: Called instead of `training_step`; what it returns is returned as it is.

        Yields:
            The loss that `training_step` returned, with its graph.
        """
        with torch.enable_grad(), self.no_trace():
            if first:
                self.rewind()
            micro_batch.replay.restore()
            with self._host.autocast(), context:
                output = (step or self._training_step)(*args, **micro_batch.kwargs)
            yield output if step is not None else loss_of(output)

    def second_pass(self, micro_batches: Sequence[MicroBatch], final: bool = True) -> Tensor | None:
        """Forward and backward over the whole window at the current weights; the gradients replace those in `.grad`.

        As the loop does it: loss divided by the number of micro-batches, scaled for fp16, gradients synchronized in the
        last backward pass only. The module's own hooks (`on_after_backward`, ...) do not run again.

        Args:
            micro_batches: The window's, as far as they were back-propagated.
            final: Whether these are the gradients of the step; else they are those of a further ascent.

        Returns:
            The mean loss on this device, detached; ``None`` if no micro-batch has one.
        """
        losses = []
        synchronized = final or self._ascent is None or self._ascent.synchronized
        with torch.enable_grad(), self.no_trace(), self.fresh_gradients(final):
            self.rewind()
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                with nullcontext() if synchronized and last else self._host.no_sync():
                    micro_batch.replay.restore()
                    ascent = self._ascent if self._ascent is not None and self._ascent.base else None  # in a preview
                    with nullcontext() if ascent is None else ascent.watch(micro_batch.notes, again=True):
                        loss = loss_of(self._forward(*micro_batch.args, **micro_batch.kwargs))
                    if loss is None:
                        continue
                    losses.append(loss.detach().reshape(()))
                    self._backward(loss)
        return torch.stack(losses).mean() if losses else None

    def _backward(self, loss: Tensor) -> None:
        try:
            self._host.backward(loss)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise ConfigurationError(
                f"Expected {self._host.what_steps} to make its graph anew at every call, got one that uses a tensor of "
                "the first pass again in the second pass of the perturbation: detach what it keeps between calls "
                "(hidden states, cached features), or compute it inside."
            ) from error


def loss_of(output: Any) -> Tensor | None:
    """The loss in what the user's function returned: a tensor, a mapping with "loss", or ``None``.

    Args:
        output: What it returned.
    """
    return output.get("loss") if isinstance(output, Mapping) else output
