"""One fit of a module in automatic optimization: what happens in which order inside an optimizer step.

At the last micro-batch of a window Lightning's optimizer calls the closure. In it, in this order: Lightning's own
forward, zero_grad and backward; the curvature estimate and the mask, at theta_t; the gradient at the perturbed
weights; the copy of the old weights. Then Lightning goes on (unscale, hooks, clip, update), and after an update that
really happened comes the boost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import Tensor

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import Takeover
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._tensorboard import write_logs
from lightning_ire.engine._torch import gradient_marks
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.state import Progress
from lightning_ire.engine.step import OptimizerStep
from lightning_ire.engine.window import AccumulationWindow

__all__ = ["AutomaticSession", "Session"]


class Session(Protocol):
    """Everything that belongs to one fit and is gone after it; the callback's hooks call these."""

    trainer: pl.Trainer
    module: pl.LightningModule

    @property
    def first(self) -> OptimizerStep:
        """The step of the first optimizer."""

    def release(self) -> None:
        """Put everything back: weights, wrappers, hooks."""

    def begin_epoch(self) -> None:
        """Before the first batch of an epoch."""

    def begin_batch(self) -> None:
        """Before Lightning's `training_step`."""

    def before_backward(self) -> None:
        """Before Lightning's backward."""

    def after_backward(self) -> None:
        """After Lightning's backward."""

    def write_logs(self) -> None:
        """After a batch whose training metrics Lightning is about to write."""


class AutomaticSession:
    """The session of a module in automatic optimization, which has one optimizer.

    Args:
        recipe: The settings.
        progresses: The state that outlives the session, per optimizer.
        trainer: The trainer.
        module: The module being trained.
        first_step: Optimizer step at which the boost starts, where that is known.
        length: Optimizer steps in the run; ``None``: unknown.
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
        self.trainer = trainer
        self.module = module
        self.host = LightningHost(trainer, module)
        optimizers = trainer.optimizers
        self.step = OptimizerStep(
            recipe, progresses[0], self.host, module, optimizers[0], optimizers, first_step, length
        )
        self.takeover: Takeover | None = None
        self._armed = False
        self._marks: list[tuple[Tensor | None, int]] | None = None

    @property
    def first(self) -> OptimizerStep:
        """The step of the only optimizer."""
        return self.step

    def release(self) -> None:
        """Put everything back: weights, wrappers, hooks."""
        self.step.put_back()
        if self.takeover is not None:
            self.takeover.remove()
        self.step.release()

    def begin_epoch(self) -> None:
        """Lightning drops what an epoch that was cut short had accumulated."""
        self.step.drop_window()

    def begin_batch(self) -> None:
        """Switch on when the time has come, and open a window."""
        if not self.step.switch_on():
            return
        if self.takeover is None:
            self.takeover = Takeover(self.module, self._training_step, self._closure, self.step.end)
        self.step.begin(self.takeover.original_training_step, self.trainer.strategy.training_step)
        self._armed = True

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        armed, self._armed = self._armed, False
        if self.step.window is None or not armed:  # an extra pass, or somebody else's call
            return original(*args, **kwargs)
        return self.step.forward(original, *args, **kwargs)

    def before_backward(self) -> None:
        """The estimate may use the graph of the training forward pass."""
        self.step.before_backward()

    def after_backward(self) -> None:
        """Put weights back that were moved before the pass."""
        window = self.step.window
        if self.step.after_backward() and window is not None and window.ascent is not None and window.unmoved:
            self._marks = gradient_marks(window.parameters)

    def _closure(self, closure: Callable[[], Any]) -> Any:
        window = self.step.window
        if window is None:
            return closure()
        if window.finished:
            raise ConfigurationError(
                "Expected an optimizer that runs its closure once per step, got "
                f"{type(self.step.optimizer).__name__}, which runs it again at weights that it moved itself: use "
                "another optimizer or remove the callback."
            )
        with nullcontext() if window.synchronized else self.host.no_sync():
            result = closure()
        if not window.back_propagated:
            return result
        self._refuse_edited_gradients(window)
        self.step.finish_gradient(window.second_pass)
        return result

    def _refuse_edited_gradients(self, window: AccumulationWindow) -> None:
        """What a hook after backward makes of the first pass's gradients would be lost with them."""
        marks, self._marks = self._marks, None
        if marks is None:
            return
        now = gradient_marks(window.parameters)
        if any(before is not after or old != new for (before, old), (after, new) in zip(marks, now, strict=True)):
            raise ConfigurationError(
                f"Expected gradients to be edited in `on_before_optimizer_step`, got an edit in `on_after_backward` of "
                f"{type(self.module).__name__} or of a callback, which {window.perturbation!r} would lose, as it "
                "replaces them by those at the moved weights: move the edit."
            )

    def write_logs(self) -> None:
        """After a step whose training metrics Lightning is about to write."""
        write_logs(self.trainer, self.module, self.step)
