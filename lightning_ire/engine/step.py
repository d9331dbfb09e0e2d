"""One optimizer in one fit: when it is on, its masks, and the boost after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature import MicroBatch
from lightning_ire.engine._torch import run_first
from lightning_ire.engine.boost import WeightSnapshot, boost
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import MovingWeights
from lightning_ire.engine.no_trace import devices_of
from lightning_ire.engine.optimizers import named_parameters, parameters_that_fit, trainable_parameters
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.state import Progress
from lightning_ire.engine.window import AccumulationWindow, loss_of
from lightning_ire.functional import perturbed
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.perturbation import Perturbation

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

    Attributes:
        devices: Devices that hold a parameter of the module.
        moving: The weights that the module itself moves.
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
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.host = host
        self.module = module
        self.optimizer = optimizer
        self.first_step = first_step
        self.devices = devices_of(module)
        self.moving = MovingWeights(optimizers)
        self.logs: dict[str, Tensor | float] = {}
        self._names = self._current_names()
        self.window: AccumulationWindow | None = None
        self._live: tuple[MicroBatch, Tensor] | None = None
        self._moved = ExitStack()
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
        self._moved.close()

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
        pending = recipe.kappa > 0 and progress.started_at is None
        if pending and recipe.start.reached(self.moment, self.host.epoch, self.first_step):
            progress.started_at = progress.step
        return progress.started_at is not None or recipe.perturbation is not None

    @property
    def moment(self) -> int:
        """How far the run has come, in what the start counts."""
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

    def open_window(
        self, training_step: Callable[..., Any], forward: Callable[..., Any] | None = None, replays: bool = False
    ) -> AccumulationWindow:
        """The window of the next step, with an estimate if the mask is due.

        Args:
            training_step: The user's function that makes the loss, beside our wrapper and any distributed one.
            forward: The same through the distributed wrapper; ``None``: there is none.
            replays: Whether the step will be run again for other reasons than the estimate and the perturbation.
        """
        progress = self.progress
        perturbs = self.recipe.should_perturb(progress.step)
        perturbation: Perturbation | None = self.recipe.perturbation if perturbs else None
        window = AccumulationWindow(
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
            replays=replays
            or (self.refreshes and self.recipe.curvature.reruns)
            or (perturbation is not None and perturbation.uses_gradient),
            perturbation=perturbation,
        )
        if self.refreshes:
            window.estimate = self.recipe.curvature.begin(window)
        return window

    def begin(self, training_step: Callable[..., Any], forward: Callable[..., Any] | None = None) -> None:
        """A micro-batch begins: open the window of the next step, unless one is half full.

        Args:
            training_step: See :meth:`open_window`.
            forward: See :meth:`open_window`.
        """
        window = self.window
        if window is not None and window.micro_batches and not window.micro_batches[-1].backward_done:
            window.micro_batches.pop()  # nothing was back-propagated: no loss, or weight averaging's last epoch
        if window is None or not window.micro_batches:
            self.window = self.open_window(training_step, forward)

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
        if not window.unmoved:
            self._moved.enter_context(window.moved())
        try:
            with window.training_pass(), window.estimate.watch(micro_batch) if window.estimate else nullcontext():
                output = call(*args, **kwargs)
        except BaseException:
            self.put_back()
            raise
        loss = loss_of(output)
        if isinstance(loss, Tensor):
            micro_batch.loss = loss.detach()
            self._live = (micro_batch, loss)
        else:
            self.put_back()
        return output

    def before_backward(self) -> None:
        """The estimate may use the graph of the training's forward pass, which is alive for the last time."""
        window = self.window
        if self._live is None or window is None:
            return
        if window.perturbation is not None and window.unmoved and not window.back_propagated:
            window.keep_gradients()
        if window.estimate is not None and window.estimate.uses_graph:
            with window.no_trace_on_the_graph():
                window.estimate.before_backward(*self._live)

    def after_backward(self) -> bool:
        """Put weights back that were moved before the pass.

        Returns:
            Whether there was a recorded micro-batch that is back-propagated now.
        """
        self.put_back()
        if self._live is None or self.window is None:
            return False
        self._live[0].backward_done = True
        self._live = None
        return True

    def refresh(self, window: AccumulationWindow) -> None:
        """Make the mask at theta_t, or keep the old one and try again at the next step if h is not finite.

        Args:
            window: A window with an estimate.
        """
        assert window.estimate is not None
        values = window.estimate.finish()
        window.estimate = None
        self.progress.retry = values is None
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
        excluded = parameters_that_fit(self.module, self.recipe.exclude)
        names = [self._names[id(parameter)] for parameter in window.parameters]
        taking_part = [None if id(p) in excluded else h for p, h in zip(window.parameters, values, strict=True)]
        self.progress.masks.refresh(names, taking_part)

    def finish_gradient(self, window: AccumulationWindow, second_pass: Callable[[bool], Tensor | None] | None) -> None:
        """What comes between the gradients at theta_t and the optimizer's step, in this order.

        The mask, of the estimate that watched the window; the gradients at the perturbed weights; the copy of the old
        weights for the boost, which the hook after the step makes.

        Args:
            window: The window, whose gradients are in `.grad` now.
            second_pass: See :meth:`ascend`; ``None``: the perturbation is somebody else's business.
        """
        self.logs = {}
        self.moving.note_gradients(window.parameters)
        copies: dict[int, Tensor] = {}
        if window.estimate is not None:
            self.refresh(window)
        if window.perturbation is not None and second_pass is not None:
            if window.unmoved:
                copies = self.ascend(window, second_pass)
            else:
                self.logs[tags.PERTURBED_LOSS] = window.mean_loss()
        self.snapshot(copies)

    def ascend(self, window: AccumulationWindow, second_pass: Callable[[bool], Tensor | None]) -> dict[int, Tensor]:
        """Replace the gradients by those at the moved weights.

        Args:
            window: A window whose perturbation uses the gradients that are in `.grad` now.
            second_pass: Makes the gradients at the moved weights and returns the loss there, if any; it is told
                whether these are the step's.

        Returns:
            The copies of the weights that this made, by `id` of the parameter.
        """
        assert window.perturbation is not None
        moves: Sequence[Tensor | None] | None = None
        ascents = window.perturbation.ascents
        for number in range(1, ascents + 1):
            movable, moves, norm = window.displacement([parameter.grad for parameter in window.movable], moves)
            block = perturbed(movable, moves)
            if number == ascents:
                moves = None  # the block frees them once the weights are moved
            saved = self._moved.enter_context(block)
            try:
                with window.perturbed_from({id(p): copy for p, copy in zip(movable, saved, strict=True)}):
                    loss = second_pass(number == ascents)
            finally:
                self.put_back()
            if norm is not None and number == 1:
                self.logs[tags.GRAD_NORM] = self.progress.ascent_norm = norm
        if loss is not None:
            self.logs[tags.PERTURBED_LOSS] = loss
        return {id(parameter): copy for parameter, copy in zip(movable, saved, strict=True)}

    def snapshot(self, copies: Mapping[int, Tensor]) -> None:
        """Keep the weights for the boost, as late as possible before the step.

        Args:
            copies: Copies of weights that exist already, by `id` of the parameter.
        """
        masks = self.progress.masks.masks
        if masks and self.progress.started_at is not None:
            self._snapshot = WeightSnapshot.take(self.optimizer, self._names, masks, copies, self.host.will_log)

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
        follows_lr = recipe.kappa_schedule == "lr"
        progress.count_step(optimizer, with_lrs=follows_lr)
        weights, self._snapshot = self._snapshot, None
        if weights is not None:
            self.logs |= boost(
                optimizer,
                weights,
                recipe.kappa,
                peak_lrs=progress.peak_lrs if follows_lr else None,
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
        self.progress.last_logged |= {tag: torch.as_tensor(value) for tag, value in logs.items()}
        return self.progress.last_logged

    def _current_names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in named_parameters(self.module, self.optimizer).items()}
