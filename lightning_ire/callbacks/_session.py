"""One fit: what happens in which order inside an optimizer step.

At the last micro-batch of a window Lightning's optimizer calls the closure. In it, in this order: Lightning's own
forward, zero_grad and backward; the curvature estimate and the mask, at theta_t; the gradient at the perturbed
weights; the copy of the old weights. Then Lightning goes on (unscale, hooks, clip, update), and after an update that
really happened comes the boost.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._lightning import Takeover, loss_of, unsynchronized, will_log
from lightning_ire.callbacks._boost import OldWeights, boost
from lightning_ire.callbacks._progress import Progress
from lightning_ire.callbacks._window import AccumulationWindow, mixed_seed
from lightning_ire.curvature import MicroBatch
from lightning_ire.functional import perturbed

if TYPE_CHECKING:
    from lightning_ire.callbacks.ire import IRE

__all__ = ["Session", "named_parameters", "trainable_parameters"]


class Session:
    """Everything that belongs to one fit and is gone after it.

    Args:
        settings: The callback, for its arguments and its decisions about timing.
        progress: The state that outlives the session.
        trainer: The trainer.
        module: The module being trained.
        first_step: Optimizer step at which the boost starts, where that is known.
    """

    def __init__(
        self,
        settings: IRE,
        progress: Progress,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        first_step: int | None,
    ) -> None:
        self.settings = settings
        self.progress = progress
        self.trainer = trainer
        self.module = module
        self.optimizer: Optimizer = trainer.optimizers[0]
        self.first_step = first_step
        self.takeover: Takeover | None = None
        self.window: AccumulationWindow | None = None
        self.logs: dict[str, Tensor | float] = {}
        self._names = {id(p): name for name, p in named_parameters(module, self.optimizer).items()}
        self._armed = False
        self._live: tuple[MicroBatch, Tensor] | None = None
        self._moved = ExitStack()
        self._old: OldWeights | None = None
        self._counter = self.optimizer.register_step_post_hook(self._stepped)

    def release(self) -> None:
        """Put everything back: weights, wrappers, hooks."""
        self._moved.close()
        if self.takeover is not None:
            self.takeover.remove()
        self._counter.remove()
        self.window = self._old = self._live = None

    def begin_batch(self) -> None:
        """Before Lightning's `training_step`: switch on when the time has come, and open a window."""
        settings, progress = self.settings, self.progress
        pending = settings.kappa > 0 and progress.started_at is None
        if pending and settings.start.reached(progress.step, self.trainer.current_epoch, self.first_step):
            progress.started_at = progress.step
        if progress.started_at is None and settings.perturbation is None:
            return
        if self.takeover is None:
            self.takeover = Takeover(self.module, self._training_step, self._closure, self._close_window)
        if self.window is None or not self.window.micro_batches:
            self.window = self._open_window(self.takeover)
        self._armed = True

    def _open_window(self, takeover: Takeover) -> AccumulationWindow:
        settings, progress = self.settings, self.progress
        perturbation = settings.perturbation if settings.should_perturb(progress.step) else None
        ascends = perturbation is not None and perturbation.uses_gradient
        on = progress.started_at is not None
        refreshes = on and (progress.retry or settings.should_refresh(progress.step))
        window = AccumulationWindow(
            self.trainer,
            self.module,
            takeover.original_training_step,
            trainable_parameters(self.optimizer),
            seed=mixed_seed(progress.seed, progress.step),
            replays=ascends or refreshes,
            perturbation=perturbation,
        )
        if refreshes:
            window.estimate = settings.curvature.begin(window)
        return window

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        window, armed, self._armed = self.window, self._armed, False
        if window is None or not armed:  # an extra pass, or somebody else's call
            return original(*args, **kwargs)
        micro_batch = window.record(args, kwargs)
        if not window.unmoved:
            self._moved.enter_context(window.moved())
        try:
            with window.estimate.watch(micro_batch) if window.estimate else nullcontext():
                output = original(*args, **kwargs)
        except BaseException:
            self._moved.close()
            raise
        loss = loss_of(output)
        if isinstance(loss, Tensor):
            micro_batch.loss = loss.detach()
            self._live = (micro_batch, loss)
        else:
            self._moved.close()
        return output

    def before_backward(self) -> None:
        """Before Lightning's backward: the estimate may use the graph of the training forward pass."""
        if self._live is not None and self.window is not None and self.window.estimate is not None:
            self.window.estimate.before_backward(*self._live)

    def after_backward(self) -> None:
        """After Lightning's backward: put weights back that were moved before the pass."""
        self._moved.close()
        if self._live is not None:
            self._live[0].backward_done = True
            self._live = None

    def _closure(self, closure: Callable[[], Any]) -> Any:
        window = self.window
        if window is None:
            return closure()
        with nullcontext() if window.synchronized else unsynchronized(self.trainer.strategy):
            result = closure()
        if not window.back_propagated:
            return result
        self.logs = {}
        if window.estimate is not None:
            self._refresh(window)
        copies = self._perturbed_gradient(window) if window.perturbation is not None else {}
        masks = self.progress.masks.masks
        if masks and self.progress.started_at is not None:
            self._old = OldWeights.save(self.optimizer, self._names, masks, copies, will_log(self.trainer))
        return result

    def _refresh(self, window: AccumulationWindow) -> None:
        """Make the mask at theta_t, or keep the old one and try again at the next step if h is not finite."""
        assert window.estimate is not None
        values = window.estimate.finish()
        window.estimate = None
        self.progress.retry = values is None
        if values is None:
            return
        self._names = {id(p): name for name, p in named_parameters(self.module, self.optimizer).items()}
        excluded = _fitting(self.module, self.settings.exclude)
        names = [self._names[id(parameter)] for parameter in window.parameters]
        taking_part = [None if id(p) in excluded else h for p, h in zip(window.parameters, values, strict=True)]
        self.progress.masks.refresh(names, taking_part)

    def _perturbed_gradient(self, window: AccumulationWindow) -> dict[int, Tensor]:
        """Replace the gradients by those at the moved weights; returns the copies of the weights that this made."""
        if not window.unmoved:
            self.logs[tags.PERTURBED_LOSS] = window.mean_loss()
            return {}
        movable, moves, norm = window.displacement([parameter.grad for parameter in window.movable])
        block = perturbed(movable, moves)
        del moves  # the block frees them once the weights are moved
        with block as saved:
            loss = window.second_pass()
        if loss is not None:
            self.logs[tags.PERTURBED_LOSS] = loss
        if norm is not None:
            self.logs[tags.GRAD_NORM] = norm / window.scale
        return {id(parameter): copy for parameter, copy in zip(movable, saved, strict=True)}

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After every real step of the optimizer (a GradScaler skips those that overflowed)."""
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers are called all the same
        if overflow is not None and float(overflow):
            return
        settings, progress = self.settings, self.progress
        follows_lr = settings.kappa_schedule == "lr"
        progress.count_step(optimizer, with_lrs=follows_lr)
        weights, self._old = self._old, None
        if weights is not None:
            self.logs |= boost(
                optimizer,
                weights,
                settings.kappa,
                peak_lrs=progress.peak_lrs if follows_lr else None,
                scale_weight_decay=settings.scale_weight_decay,
                with_norms=will_log(self.trainer),
            )
            self.logs |= progress.masks.logs

    def _close_window(self) -> None:
        self._moved.close()
        self.window = self._old = self._live = None

    def write_logs(self) -> None:
        """After a step whose training metrics Lightning is about to write."""
        if self.logs and not self.trainer.barebones and will_log(self.trainer):
            for tag, value in self.logs.items():
                self.module.log(tag, value, on_step=True, on_epoch=False, batch_size=1)
        self.logs = {}


def trainable_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters that are not frozen, each once.

    Args:
        optimizer: Any optimizer.
    """
    unique = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return list(unique.values())


def named_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The module's parameters and those that only the optimizer has.

    Args:
        module: The module being trained.
        optimizer: Its optimizer.
    """
    named = dict(module.named_parameters())
    known = {id(parameter) for parameter in named.values()}
    strangers = [p for p in trainable_parameters(optimizer) if id(p) not in known]
    return named | {f"optimizer.parameter_{index}": parameter for index, parameter in enumerate(strangers)}


def _fitting(module: nn.Module, patterns: Sequence[str]) -> set[int]:
    """Parameters that one of the patterns fits, under any of their names (tied weights have several)."""
    return {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
