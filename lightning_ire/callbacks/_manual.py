"""One fit of a module in manual optimization: the boost around each `optimizer.step()`, SAM where it gets a closure.

Nothing can be replayed from outside here, since `training_step` makes its own steps. So a perturbation calls the
closure twice that the module gives to `optimizer.step(closure)`, and an estimate uses the backward passes that the
module makes. Every optimizer has its own masks and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import mute
from lightning_ire._patches import Patches
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._tensorboard import write_logs
from lightning_ire.curvature import MicroBatch
from lightning_ire.curvature.tap import known_losses
from lightning_ire.engine._torch import gradient_marks, graph_number
from lightning_ire.engine.module_state import modules_of
from lightning_ire.engine.no_trace import Replay
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.state import Progress
from lightning_ire.engine.step import OptimizerStep
from lightning_ire.engine.window import AccumulationWindow
from lightning_ire.schedule import Start

__all__ = ["ManualSession"]

Marks = list[tuple[Tensor | None, int]]

_EARLIER = "a closure that goes backward through a forward pass made before it"
_SIGNS_OF_AN_EARLIER_GRAPH = ("backward through the graph a second time", "modified by an inplace operation")


class ManualStep(OptimizerStep):
    """An optimizer that the module steps by itself."""

    def __init__(self, *args: Any, trainer: pl.Trainer) -> None:
        super().__init__(*args)
        self._trainer = trainer
        self._inside = self._warned = False
        self._zeroed = self._warned_of_gradients = False

    def moment(self, start: Start) -> int:
        """Steps of this optimizer; for a fraction of the run, whose steps nobody knows beforehand, batches."""
        if not start.is_fraction:
            return self.progress.step
        return self._trainer.current_epoch * int(self._trainer.num_training_batches) + self._trainer.fit_loop.batch_idx

    def parameters(self) -> list[nn.Parameter]:
        """All of the optimizer's: which of them are frozen may change between two backward passes (`toggle_model`)."""
        return list({id(p): p for group in self.optimizer.param_groups for p in group["params"]}.values())

    def _after_step(self, optimizer: Optimizer) -> None:
        active = self.progress.started_at is not None or self.perturbation is not None
        if active and not self._inside and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(optimizer).__name__} was stepped directly, without IRE and without a perturbation: step what "
                "`self.optimizers()` returns."
            )
        super()._after_step(optimizer)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A step of what `self.optimizers()` returns happens inside the block.

        Yields:
            Nothing.
        """
        self._inside = True
        try:
            yield
        finally:
            self.end()
            self._inside = False

    def note_zero_grad(self) -> None:
        """The optimizer's gradients are zeroed."""
        self._zeroed = True

    def expect_zero_grad(self) -> None:
        """Look from now on whether they are."""
        self._zeroed = False

    def warn_of_earlier_gradients(self, window: AccumulationWindow, before: Marks, now: Marks) -> None:
        """Say, once, that a part of the gradient is from before the closure, which a second pass leaves as it is.

        Args:
            window: The step's.
            before: What :func:`gradient_marks` said before the closure.
            now: What it says after it.
        """
        if self._zeroed or self._warned_of_gradients:
            return
        self._warned_of_gradients = any(
            grad is not None and grad is same and window.passes.had_gradient(parameter)
            for parameter, (grad, _), (same, _) in zip(window.parameters, before, now, strict=True)
        )
        if self._warned_of_gradients:
            rank_zero_warn(
                f"The gradient of {type(self.optimizer).__name__}'s step has a part from before the closure, "
                f"which {window.perturbation!r} leaves as it is: call zero_grad and accumulate in the closure."
            )


class ManualSession:
    """The session of a module in manual optimization.

    Args:
        recipe: The settings.
        progresses: The state that outlives the session, one for each optimizer.
        trainer: The trainer.
        module: The module being trained.
        first_step: Step of each optimizer at which its boost starts, where that is known.
        length: Batches in the run; ``None``: unknown.
    """

    def __init__(
        self,
        recipe: Recipe,
        progresses: Sequence[Progress],
        trainer: pl.Trainer,
        module: pl.LightningModule,
        first_step: int | None,
        length: int | None,
    ) -> None:
        if recipe.perturbation is not None and recipe.perturbation.fraction != 1:
            raise ConfigurationError(
                f"Expected `perturbation.fraction` = 1 in manual optimization, whose closures have batches of their "
                f"own, got {recipe.perturbation!r}: set it to 1."
            )
        self.trainer = trainer
        self.module = module
        self.host = LightningHost(trainer, module)
        self.steppers = [
            ManualStep(
                recipe, progress, self.host, module, optimizer, trainer.optimizers, first_step, length, trainer=trainer
            )
            for progress, optimizer in zip(progresses, trainer.optimizers, strict=True)
        ]
        self.patches: Patches | None = None
        self._training_step: Callable[..., Any] = module.training_step
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._watching = ExitStack()
        self._armed = False
        self._extra_pass = False
        self._saw_backward = False
        self._perturbed: AccumulationWindow | None = None  # while its closure runs
        self._closure_began = 0
        self._back_propagated = False

    @property
    def first(self) -> OptimizerStep:
        """The step of the first optimizer."""
        return self.steppers[0]

    def release(self) -> None:
        """Put everything back."""
        for stepper in self.steppers:
            stepper.put_back()
        if self.patches is not None:
            self.patches.remove()
        for stepper in self.steppers:
            stepper.release()

    def begin_epoch(self) -> None:
        """The module decides itself what goes on over an epoch's end."""

    def begin_batch(self) -> None:
        """Switch on when the time has come."""
        active = [stepper.switch_on() for stepper in self.steppers]
        if any(active) and self.patches is None:
            self._install()
        self._armed = True

    def _install(self) -> None:
        self.patches = Patches()
        self._training_step = self.module.training_step
        self.patches.put(self.module, "training_step", self._around_training_step)
        self.patches.put(self.module, "manual_backward", self._around_backward(self.module.manual_backward))
        wrapped = self.module.optimizers()
        for stepper, optimizer in zip(self.steppers, wrapped if isinstance(wrapped, list) else [wrapped], strict=True):
            self.patches.put(optimizer, "step", self._around_step(stepper, optimizer.step))
            for owner in (optimizer, stepper.optimizer):
                self.patches.put(owner, "zero_grad", self._around_zero_grad(stepper, owner.zero_grad))
        mute(self.patches, self.module)

    def _around_training_step(self, *args: Any, **kwargs: Any) -> Any:
        armed, self._armed = self._armed, False
        if not armed:  # somebody else's call
            return self._training_step(*args, **kwargs)
        self._call = (args, kwargs)
        try:
            with self._watching:
                for stepper in self.steppers:
                    self._open(stepper)
                return self._training_step(*args, **kwargs)
        finally:
            self._call = None

    def _open(self, stepper: ManualStep) -> None:
        """Open the window of the optimizer's next step, and let its estimate watch this `training_step`."""
        if not stepper.switch_on():
            return
        window = stepper.window
        if window is None or (not window.micro_batches and window.perturbation is not stepper.perturbation):
            window = stepper.open(self._refuse_to_step_again)  # what was opened after the last step may be out of date
        if window.estimate is not None and self._call is not None:
            self._watching.enter_context(window.watch(self._micro_batch()))

    def _refuse_to_step_again(self, *args: Any, **kwargs: Any) -> None:
        """In place of `training_step` for extra passes: it would step the optimizers."""
        name = type(self.module).__name__
        moved = [one.window.perturbation for one in self.steppers if one.window is not None and not one.window.unmoved]
        if moved:
            raise ConfigurationError(
                f"Expected a curvature estimate without passes of its own beside {moved[0]!r} in manual optimization, "
                f"where the weights are moved already in the only pass, got {self.steppers[0].recipe.curvature!r}: set "
                "`curvature` to EmpiricalFisher()."
            )
        raise ConfigurationError(
            f"Expected `{name}` (manual optimization) to back-propagate a loss whose graph an estimate can use (for "
            f"SampledFisher one made with {known_losses()}), got another loss: give {name} a method "
            "`fisher_loss(batch, batch_idx)` for SampledFisher, or set `curvature` to EmpiricalFisher()."
        )

    def _micro_batch(self) -> MicroBatch:
        args, kwargs = self._call or ((), {})
        return MicroBatch(args, kwargs, replay=Replay(modules_of(self.module), self.steppers[0].devices))

    def before_backward(self) -> None:
        """Too late: a GradScaler has already made another tensor of the loss (see `_around_backward`)."""

    def _around_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._perturbed is not None and graph_number(loss) < self._closure_began:
                raise self._incomplete(self._perturbed, _EARLIER)
            self._back_propagated = self._saw_backward = True
            if not self._extra_pass and self._call is not None:
                self._add_to_estimates(loss)
            return original(loss, *args, **kwargs)

        return manual_backward

    def _add_to_estimates(self, loss: Tensor) -> None:
        """Every backward pass of the module counts for the estimates of all optimizers, as it does for `.grad`."""
        for stepper in self.steppers:
            window = stepper.window
            if window is not None and window.estimate is not None:
                micro_batch = self._micro_batch()
                window.add(micro_batch)
                window.add_loss(loss)
                window.end_backward()
                window.look_at_graph(micro_batch, loss)

    def after_backward(self) -> None:
        """Nothing to do: weights are moved and put back around the closure."""

    def _around_zero_grad(self, stepper: ManualStep, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            stepper.note_zero_grad()
            if stepper.window is not None and not self._extra_pass:
                stepper.window.forget()
            return original(*args, **kwargs)

        return zero_grad

    def _around_step(self, stepper: ManualStep, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            if self._call is None or not stepper.switch_on():
                return original(closure, **kwargs)
            if stepper.window is None:
                self._open(stepper)
            window = stepper.window
            assert window is not None
            if window.perturbation is not None and closure is None:
                raise self._incomplete(window, "`optimizer.step()`")
            try:
                with stepper.stepping():
                    return original(lambda: self._whole_closure(stepper, window, closure), **kwargs)
            finally:
                self._open(stepper)

        return step

    def _whole_closure(self, stepper: ManualStep, window: AccumulationWindow, closure: Callable[[], Any] | None) -> Any:
        """The module's closure, the mask at theta_t, the gradient at the moved weights, the copy of the old weights."""
        result = None
        state = None
        if window.ascent is not None and window.unmoved:
            window.passes.keep_start()
            state = window.passes.replay()
            window.passes.keep_gradients()
        if closure is not None:
            with torch.enable_grad(), ExitStack() as around:
                if window.ascent is not None and window.ascent.before:
                    around.enter_context(window.ascent.moved())
                around.enter_context(nullcontext() if window.synchronized else self.host.no_sync())
                around.enter_context(window.passes.training_pass())
                if window.ascent is not None:
                    around.enter_context(window.ascent.watch(window.notes, again=False))
                result = self._checked(stepper, window, closure)
        if window.estimate is not None and window.estimate.uses_graph and not self._saw_backward:
            self._refuse_raw_backward(window)
        second_pass = None
        if state is not None and closure is not None:
            second_pass = partial(self._second_pass, stepper, window, closure, state)
        stepper.finish_gradient(second_pass)
        return result

    def _refuse_raw_backward(self, window: AccumulationWindow) -> None:
        """Gradients that came by `loss.backward()`: an estimate that uses the graph has not seen it."""
        if any(parameter.grad is not None for parameter in window.parameters):
            raise ConfigurationError(
                f"Expected `{type(self.module).__name__}` (manual optimization) to call `self.manual_backward(loss)`, "
                "got gradients without it: call it in place of `loss.backward()`, or set `curvature` to "
                "EmpiricalFisher()."
            )

    def _incomplete(self, window: AccumulationWindow, got: str) -> ConfigurationError:
        return ConfigurationError(
            f"Expected `optimizer.step(closure)` for {window.perturbation!r} in manual optimization, got {got}: give "
            f"{type(self.module).__name__}'s step a closure that computes the whole gradient (zero_grad, forward, "
            "manual_backward), so that it can be taken again at moved weights."
        )

    def _checked(self, stepper: ManualStep, window: AccumulationWindow, closure: Callable[[], Any]) -> Any:
        """The module's closure; for a perturbation, which moves the weights around it, it has to do all the work."""
        if window.perturbation is None:
            return closure()
        marks = gradient_marks(window.parameters)
        self._perturbed, self._closure_began, self._back_propagated = window, graph_number(), False
        stepper.expect_zero_grad()
        try:
            result = closure()
        except RuntimeError as error:
            weights_moved = self._extra_pass or not window.unmoved
            if weights_moved and any(sign in str(error) for sign in _SIGNS_OF_AN_EARLIER_GRAPH):
                raise self._incomplete(window, _EARLIER) from error
            raise
        finally:
            self._perturbed = None
        now = gradient_marks(window.parameters)
        if not self._back_propagated and all(
            a is b and old == new for (a, old), (b, new) in zip(marks, now, strict=True)
        ):
            raise self._incomplete(window, "a closure that makes no gradient")
        if not self._extra_pass:
            stepper.warn_of_earlier_gradients(window, marks, now)
        return result

    def _second_pass(
        self,
        stepper: ManualStep,
        window: AccumulationWindow,
        closure: Callable[[], Any],
        state: Replay,
        final: bool,
    ) -> Tensor | None:
        """The closure once more, as it ran the first time; the loss it returned, if any."""
        self._extra_pass = True
        around = nullcontext() if final or window.synchronized else self.host.no_sync()
        try:
            with torch.enable_grad(), window.passes.no_trace(), window.passes.fresh_gradients(final), around:
                window.passes.rewind()
                state.restore()
                with nullcontext() if window.ascent is None else window.ascent.watch(window.notes, again=True):
                    loss = self._checked(stepper, window, closure)
        finally:
            self._extra_pass = False
        return loss.detach() if isinstance(loss, Tensor) else None

    def write_logs(self) -> None:
        """The first optimizer's values under the plain tags, the others' with a suffix."""
        for index, stepper in enumerate(self.steppers):
            write_logs(self.trainer, self.module, stepper, f"/optimizer_{index}" if index else "")
