"""The order of one optimizer step: when IRE is on, the mask, the ascent, and the boost after the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature import MicroBatch
from lightning_ire.engine._torch import run_first
from lightning_ire.engine.boost import WeightSnapshot, boost, kappas_now
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import MovingWeights
from lightning_ire.engine.no_trace import devices_of
from lightning_ire.engine.optimizers import (
    named_parameters,
    parameters_that_fit,
    patterns_in_force,
    strengths,
    trainable_parameters,
)
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.replay import loss_of
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.engine.state import Progress
from lightning_ire.engine.window import AccumulationWindow
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.perturbation import Perturbation
from lightning_ire.schedule import Start

__all__ = ["OptimizerStep"]

_PATIENCE = 20  # a GradScaler that starts too high overflows less often


class OptimizerStep:
    """Counts the real steps of one optimizer and boosts them.

    Args:
        recipe: The settings.
        progress: The optimizer's state that outlives the fit.
        host: The loop.
        module: The module being trained.
        optimizer: The optimizer.
        optimizers: All optimizers of the module.
        first_step: Optimizer step at which the boost starts, where that is known.
        length: Length of the run, in what starts and stops count; ``None``: unknown.

    Attributes:
        devices: Devices that hold a parameter of the module.
        moving: The weights that the module itself moves.
        gathered: Copies of whole weights in the module.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        host: Host,
        module: nn.Module,
        optimizer: Optimizer,
        optimizers: Sequence[Optimizer],
        first_step: int | None,
        length: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.host = host
        self.module = module
        self.optimizer = optimizer
        self.first_step = first_step
        perturbation = recipe.perturbation
        self._ascent_ends = (
            (None, None)
            if perturbation is None
            else (perturbation.start.first_step(length), perturbation.stop.first_step(length))
        )
        self.devices = devices_of(module)
        self.moving = MovingWeights(optimizers)
        self.gathered = GatheredWeights(module)
        self.logs: dict[str, Tensor | float] = {}
        self._names = self._current_names()
        self._strengths = strengths(recipe, module, optimizer)
        self.window: AccumulationWindow | None = None
        self._live: tuple[MicroBatch, Tensor] | None = None
        self._snapshot: WeightSnapshot | None = None
        self._depth = self._failures = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._stepping),
            run_first(optimizer.register_step_post_hook(self._stepped)),  # others may keep constraints
        ]

    def release(self) -> None:
        """Put moved weights back, and take the hooks away."""
        self.end()
        for hook in self._hooks:
            hook.remove()

    def put_back(self) -> None:
        """Put weights back that are moved, whatever line an interrupt hit."""
        if self.window is not None and self.window.ascent is not None:
            self.window.ascent.put_back()

    def end(self) -> None:
        """The step is over, however it ended."""
        self.put_back()
        self.window = self._live = None
        self._snapshot = None
        self._depth = 0

    def switch_on(self) -> bool:
        """Switch the boost on when the time has come.

        Returns:
            Whether the next step needs anything but counting.
        """
        recipe, progress = self.recipe, self.progress
        pending = recipe.boosts and progress.started_at is None
        if pending and recipe.start.reached(self.moment(recipe.start), self.host.epoch, self.first_step):
            progress.start()
        return progress.started_at is not None or self.perturbation is not None

    @property
    def perturbation(self) -> Perturbation | None:
        """The perturbation, if it has a part in the next step."""
        if not self._perturbs:
            return None
        perturbation = self.recipe.perturbation
        assert perturbation is not None
        return perturbation if perturbation.combines or self.recipe.should_perturb(self.progress.step) else None

    @property
    def _perturbs(self) -> bool:
        """Whether there is a perturbation between its start and its stop."""
        perturbation = self.recipe.perturbation
        if perturbation is None:
            return False
        moments = [self.moment(one) for one in (perturbation.start, perturbation.stop)]
        return perturbation.is_on(*moments, self.host.epoch, *self._ascent_ends)

    def perturbation_in_force(self) -> tuple[Perturbation, list[float]] | None:
        """The perturbation, if it is on, and what its schedule multiplies the radius of each parameter group with."""
        perturbation = self.recipe.perturbation
        if perturbation is None or not self._perturbs:
            return None
        follows = perturbation.rho_schedule == "lr"
        return perturbation, self.progress.shares_of_peak_lrs(self.optimizer) if follows else [1.0]

    def moment(self, start: Start) -> int:
        """How far the run has come, in what a start counts.

        Args:
            start: That start.
        """
        return self.progress.step

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that an estimate is made for."""
        return trainable_parameters(self.optimizer)

    @property
    def refreshes(self) -> bool:
        """Whether the mask is to be made at the next step."""
        started_at = self.progress.started_at
        if started_at is None:
            return False
        return self.progress.retry or self.recipe.should_refresh(self.progress.step, started_at)

    def open(
        self, training_step: Callable[..., Any], forward: Callable[..., Any] | None = None, replays: bool = False
    ) -> AccumulationWindow:
        """Open the window of the next step, with an estimate if the mask is due.

        Args:
            training_step: The user's function that makes the loss, beside our wrapper and any distributed one.
            forward: The same through the distributed wrapper; ``None``: there is none.
            replays: Whether the step will be run again for other reasons than the estimate and the perturbation.

        Returns:
            The window.
        """
        recipe, progress, perturbation = self.recipe, self.progress, self.perturbation
        self.gathered.drop()
        self.window = AccumulationWindow(
            self.host,
            self.module,
            training_step,
            forward,
            self.optimizer,
            self.parameters(),
            devices=self.devices,
            step=progress.step,
            seed=mixed_seed(progress.seed, progress.step),
            moving=self.moving,
            gathered=self.gathered,
            replays=replays,
            curvature=recipe.curvature if self.refreshes else None,
            perturbation=perturbation,
            progress=progress,
            second=perturbation is not None and recipe.should_perturb(progress.step),
        )
        return self.window

    def begin(self, training_step: Callable[..., Any], forward: Callable[..., Any] | None = None) -> None:
        """A micro-batch begins: open the window of the next step, unless one is half full.

        Args:
            training_step: See :meth:`open`.
            forward: See :meth:`open`.
        """
        if self.window is not None:
            self.window.drop_unfinished()
        if self.window is None or not self.window.micro_batches:
            self.open(training_step, forward)

    def drop_window(self) -> None:
        """Forget the micro-batches so far: the loop has dropped their gradients."""
        self.put_back()
        self.window = None

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the training itself over one micro-batch, recorded; at weights that may be moved.

        Args:
            call: The user's function that makes the loss.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What it returned.
        """
        window = self.window
        assert window is not None
        micro_batch = window.record(args, kwargs)
        try:
            if window.ascent is not None and window.ascent.before:
                window.ascent.move()
            first: tuple[Any, ...] = args
            sight: AbstractContextManager[Any] = nullcontext()
            if window.ascent is not None:
                first, sight = window.ascent.part_of(args), window.ascent.watch(micro_batch.notes, again=False)
            with window.passes.training_pass(), window.watch(micro_batch), sight:
                output = call(*first, **kwargs)
        except BaseException:
            self.put_back()
            raise
        loss = loss_of(output)
        if isinstance(loss, Tensor):
            window.add_loss(loss)
            self._live = (micro_batch, loss)
        else:
            self.put_back()
        return output

    def before_backward(self) -> None:
        """The estimate may use the graph of the training's forward pass, which is alive for the last time."""
        window = self.window
        if self._live is None or window is None:
            return
        if window.ascent is not None and window.unmoved and not window.back_propagated:
            window.passes.keep_gradients()
        window.look_at_graph(*self._live)

    def after_backward(self) -> bool:
        """Put weights back that were moved before the pass.

        Returns:
            Whether there was a recorded micro-batch that is back-propagated now.
        """
        self.put_back()
        if self._live is None or self.window is None:
            return False
        self.window.end_backward()
        self._live = None
        return True

    def refresh(self, window: AccumulationWindow) -> None:
        """Make the mask at theta_t, or keep the old one and try again at the next step if h is not finite.

        Args:
            window: A window with an estimate.
        """
        values = window.finish_estimate()
        self.progress.note_estimate(found=values is not None)
        self._failures = self._failures + 1 if values is None else 0
        if values is None:
            if self._failures == _PATIENCE:
                warn_on_rank_zero(
                    f"{self.recipe.curvature!r} had no finite estimate in {_PATIENCE} steps, up to step "
                    f"{self.progress.step}, so that {'the mask stays' if self.progress.masks.masks else 'no step is'} "
                    f"{'as it was' if self.progress.masks.masks else 'boosted'}: set `curvature` to another one."
                )
            return
        self._names = self._current_names()
        self._strengths = strengths(self.recipe, self.module, self.optimizer)
        excluded = parameters_that_fit(self.module, self.recipe.exclude)
        names = [self._names[id(parameter)] for parameter in window.parameters]
        taking_part = [None if id(p) in excluded else h for p, h in zip(window.parameters, values, strict=True)]
        patterns = None
        if not isinstance(self.recipe.gamma, float):
            of_each = patterns_in_force(self.module, self.optimizer, "gamma", self.recipe.gamma)
            patterns = [of_each[id(p)] for p in window.parameters]
        self.progress.masks.refresh(names, taking_part, window.parameters, patterns)

    def finish_gradient(self, second_pass: Callable[[bool], Tensor | None] | None) -> None:
        """What comes between the gradients at theta_t and the optimizer's step, in this order.

        The mask, of the estimate that watched the window; the gradients at the perturbed weights; the copy of the old
        weights for the boost, which the hook after the step makes.

        Args:
            second_pass: Makes the gradients at the moved weights (see :meth:`WeightAscent.ascend`); ``None``: the
                perturbation is somebody else's business.
        """
        window = self.window
        assert window is not None
        window.finish()
        self.logs = {}
        self.moving.note_gradients(window.parameters)
        copies: dict[int, Tensor] = {}
        if window.estimate is not None:
            self.refresh(window)
        if window.ascent is not None and second_pass is not None:
            if window.unmoved or window.ascent.perturbation.combines:
                copies, norm, loss = window.ascent.ascend(second_pass)
                if norm is not None:
                    self.progress.note_ascent(norm)
                    self.logs[tags.GRAD_NORM] = norm
            else:
                loss = window.mean_loss()
            if loss is not None:
                self.logs[tags.PERTURBED_LOSS] = loss
        self.gathered.drop()
        masks = self.progress.masks.masks
        if masks and self.progress.started_at is not None:  # as late as possible before the step
            self._snapshot = WeightSnapshot.take(self.optimizer, self._names, masks, copies, self.host.will_log)

    def preview(
        self, calls: Iterable[tuple[Any, ...]], training_step: Callable[..., Any], forward: Callable[..., Any] | None
    ) -> str:
        """The mask that the next step would begin with, as a text of aligned lines; nothing is trained.

        Args:
            calls: Positional arguments of `training_step` for each micro-batch of a step.
            training_step: See :meth:`open`.
            forward: See :meth:`open`.

        Returns:
            A table of the flat coordinates of each parameter, or a sentence that there is no finite estimate.
        """
        progress, self.progress = self.progress, Progress.new(self.recipe, self.progress.step, self.progress.seed)
        try:
            self.progress.start()
            self.progress.note_estimate(found=False)
            window = self.open(training_step, forward, replays=True)
            for args in calls:
                window.record(args, {})
                window.end_backward()
            window.second_pass()  # for estimates that are made of the training gradient
            self.refresh(window)
            self.optimizer.zero_grad()
            masks = self.progress.masks
        finally:
            self.end()
            self.progress = progress
        if not masks.masks:
            return f"{self.recipe.curvature!r} has no finite estimate here (SecondMoment: before the first step)."
        return masks.table(named_parameters(self.module, self.optimizer))

    def _stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Torch runs the hooks for a step and again for the `super().step()` inside it: only the outer one counts."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ConfigurationError(
                f"Expected {type(optimizer).__name__} to step outside of a CUDA graph, got a step that is being "
                "captured: its replays would be neither counted nor boosted. Capture the network alone "
                '(`torch.compile(net, mode="reduce-overhead")`), or leave IRE out.'
            )
        self._depth += 1

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self._after_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        """After every real step of the optimizer (a GradScaler skips those that overflowed)."""
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers are called all the same
        if overflow is not None and float(overflow):
            return
        recipe, progress = self.recipe, self.progress
        rho_too = recipe.perturbation is not None and recipe.perturbation.rho_schedule == "lr"
        progress.count_step(optimizer, with_lrs=recipe.kappa_schedule == "lr" or rho_too)
        if self.window is not None and self.window.finished and self.window.ascent is not None:
            self.window.ascent.after_step()
        weights, self._snapshot = self._snapshot, None
        if weights is not None:
            self.logs |= boost(
                optimizer,
                weights,
                kappas_now(recipe, progress, optimizer, self._strengths, progress.step - 1),
                scale_weight_decay=recipe.scale_weight_decay,
                with_norms=self.host.will_log,
            )
            self.logs |= progress.masks.logs

    def take_logs(self, wanted: bool) -> dict[str, Tensor]:
        """The values of the log after this step, each as it was last; the next step begins with none.

        Args:
            wanted: Whether they will be written; else nothing is returned.
        """
        logs, self.logs = self.logs, {}
        if not wanted:
            return {}
        # Lightning repeats the last value of what is not logged anew; so does a resumed run that knows them all
        return self.progress.note_logged(logs)

    def _current_names(self) -> dict[int, str]:
        self.gathered.drop()
        return {id(parameter): name for name, parameter in named_parameters(self.module, self.optimizer).items()}
