"""IRE and SAM in a training loop of your own: one optimizer step, without Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire.engine._torch import run_first
from lightning_ire.engine.boost import boost_factors
from lightning_ire.engine.host import LocalHost, check_host
from lightning_ire.engine.optimizers import check_optimizers, named_parameters
from lightning_ire.engine.recipe import Recipe
from lightning_ire.engine.replay import loss_of as loss_in
from lightning_ire.engine.state import STATE_VERSION, Progress, check_version, warn_of_misfits
from lightning_ire.engine.step import OptimizerStep
from lightning_ire.perturbation import Perturbation

__all__ = ["IREStep", "LoopStep"]


class LoopStep:
    """IRE and SAM at the steps of one optimizer in a loop without Lightning's Trainer: what all such loops share.

    Args:
        recipe: The settings.
        model: The model that is trained, as the loss function calls it.
        optimizer: Its only optimizer, as the loop steps it.
        host: The loop.
        length: Optimizer steps in the run; ``None``: unknown.

    Attributes:
        recipe: The settings.
        host: The loop.
        module: The model beside any wrapper of the loop's.
        engine: The order of a step.
        optimizer: The optimizer beside any wrapper of the loop's.
        progress: The state that outlives the loop.
        logs: The values that the callback would log after the last step, by tag (:mod:`lightning_ire.tags`).

    Raises:
        ConfigurationError: For what is not supported.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, host: LocalHost, length: int | None
    ) -> None:
        recipe.check_start()
        for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
            if not isinstance(value, kind):
                raise ConfigurationError(
                    f"Expected `{name}` to be a torch {kind.__name__}, got {type(value).__name__}."
                )
        self.recipe = recipe
        self.host = copy.copy(check_host(host))  # of its own: one may be given for two models
        self.module = self.host.prepare(model)
        self.optimizer = inner = self.host.unwrapped(optimizer)
        self.logs: dict[str, Tensor] = {}
        self.progress = Progress.new(recipe)
        self.progress.ramp = recipe.ramp_length(length)
        check_optimizers(recipe, self.module, [inner], masks=recipe.boosts)
        if inner in _SERVED:
            raise ConfigurationError(
                f"Expected an optimizer that no other IREStep serves, got a {type(inner).__name__} that one does, so "
                "that its steps would be boosted twice: call `release()` of the other one."
            )
        _SERVED.add(inner)
        self.engine = OptimizerStep(
            recipe,
            self.progress,
            self.host,
            self.module,
            inner,
            [inner],
            recipe.start.first_step(length),
            length,
        )

    @property
    def perturbation(self) -> Perturbation | None:
        """How gradients are perturbed."""
        return self.recipe.perturbation

    def perturbation_in_force(self) -> tuple[Perturbation, list[float]] | None:
        """The perturbation, if the next step is between its start and its stop.

        Returns:
            It, and what `rho_schedule` multiplies the radius of each parameter group with.
        """
        return self.engine.perturbation_in_force()

    @property
    def ascent_norm(self) -> float | None:
        """The norm that divided the last SAM step; ``None``: there was none."""
        norm = self.progress.ascent_norm
        return None if norm is None else float(norm)

    def boost_factors(
        self, module: nn.Module, optimizer: Optimizer, kappa: float | None = None
    ) -> dict[int, Tensor | float]:
        """By how much the boost lengthens a step now: 1 + kappa * n.

        Args:
            module: The module being trained, beside any distributed wrapper.
            optimizer: Its optimizer.
            kappa: The largest strength, in place of the one in force.

        Returns:
            By `id` of the parameter a tensor of its shape; parameters that are not boosted are left out.
        """
        return boost_factors(self.recipe, self.progress, module, optimizer, kappa)

    def note_headroom(self, headroom: float) -> None:
        """Set kappa where it is "auto": `kappa_safety` times the largest stable one, from the next step on.

        Args:
            headroom: `stability/kappa_headroom` of ``measure_sharpness(..., ["kappa_headroom"], step=step)``, which
                there is once a step has made a mask; the same number in all processes. One that is not finite leaves
                kappa as it is.

        Raises:
            ConfigurationError: If it is negative, or no number.
        """
        if not isinstance(headroom, (int, float)) or headroom < 0:
            raise ConfigurationError(f"Expected `headroom` to be a number >= 0, got {headroom!r}.")
        self.progress.note_headroom(self.recipe, headroom)

    def state_dict(self) -> dict[str, Any]:
        """Masks, counts and averages: tensors, numbers and strings only (`torch.load(weights_only=True)`).

        The same as the callback saves, so that each can go on from the other's. Of a sharded model the masks are
        gathered: all ranks have to call, and rank 0 has them.
        """
        own = {} if self.perturbation is None else self.perturbation.state_dict()
        optimizers = [self.progress.state_dict()]
        return {"version": STATE_VERSION, "optimizers": optimizers, **({"perturbation": own} if own else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, after the model's and the optimizer's own.

        Args:
            state: What :meth:`state_dict` returned, or what the callback saved in a run with one optimizer.

        Raises:
            ConfigurationError: If a newer release saved it, or it is none.
        """
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                f"Expected the state that `state_dict()` returned, a mapping, got {type(state).__name__}."
            )
        check_version(state)
        saved: Sequence[Mapping[str, Any]] = state.get("optimizers", [])
        if len(saved) != 1:
            raise ConfigurationError(
                f"Expected the state of one optimizer for IREStep, got {len(saved)}: give what `state_dict()` returned."
            )
        if self.perturbation is not None and state.get("perturbation"):
            self.perturbation.load_state_dict(state["perturbation"])
        misfits = self.progress.restore(saved[0], named_parameters(self.module, self.optimizer))
        if self.recipe.boosts:
            warn_of_misfits(misfits, of="state")

    def release(self) -> None:
        """Take the hooks off the optimizer, which another `IREStep` may then have; this one is over."""
        self.engine.release()
        _SERVED.discard(self.optimizer)

    def end_epoch(self) -> bool | None:
        """Decide on a start by loss, at the end of an epoch.

        Returns:
            Whether the boost starts; ``None``: no loss was seen.
        """
        reached = self.progress.reaches_start_loss(self.recipe, self.host)
        if reached:
            self.progress.start()
        return reached


class IREStep(LoopStep):
    """One optimizer step with IRE and SAM in any loop: the numbers of :class:`~lightning_ire.IRE` under a Trainer.

    A call does all of a step: `zero_grad`, forward, backward, the mask where it is due (eq. 5 of the IRE paper), the
    second pass of a perturbation, clipping, `optimizer.step()` and the boost (eq. 4). Where nothing is due it is a
    plain step. The extra passes put buffers, random streams and Python containers of the model back, as under the
    callback.

    Cost per step: that of :class:`~lightning_ire.IRE`.

    Args:
        model: The model that is trained, as the loss function calls it: an `nn.Module`, also in
            `DistributedDataParallel`, or sharded by `fully_shard` or `parallelize_module` (docs/sharded.md).
        optimizer: Its only optimizer; learning-rate schedulers step outside.
        host: How the loop goes backward and steps; default: :class:`LocalHost`.
        clip: Called with the list of the optimizer's parameters between the last backward pass and the step, for
            instance ``lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0)``.
        **settings: The arguments of :class:`~lightning_ire.IRE`, but for `dry_run`. `start_step` and `ramp_steps` are
            numbers of steps here: no loop says how long it is.

    Attributes:
        logs: The values that the callback would log after the last step, by tag (:mod:`lightning_ire.tags`).

    Raises:
        ConfigurationError: For settings out of range, and for what is not supported.

    Example:
        >>> import torch
        >>> from lightning_ire import SAM, IREStep, LocalHost
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> def loss_of(batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> step = IREStep(model, optimizer, kappa=2.0, gamma=0.8, perturbation=SAM(0.05))
        >>> first = step(loss_of, (x, y))
        >>> for _ in range(20):
        ...     loss = step(loss_of, (x[:32], y[:32]), (x[32:], y[32:]))  # two micro-batches, one step
        >>> bool(loss < first), step.progress.step
        (True, 21)

        Resuming: save three states, and load them in a new loop.

        >>> saved = model.state_dict(), optimizer.state_dict(), step.state_dict()
        >>> step.load_state_dict(saved[2])

        With a GradScaler (its own state is saved beside these):

        >>> scaler = torch.amp.GradScaler("cpu", enabled=False)
        >>> step.release()
        >>> step = IREStep(model, optimizer, host=LocalHost(scaler), kappa=2.0)

    References:
        Wang et al., "Improving Generalization and Convergence by Enhancing Implicit Regularization", NeurIPS 2024
        (arXiv 2405.20763): eq. 4-8, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        host: LocalHost | None = None,
        clip: Callable[[list[Tensor]], Any] | None = None,
        **settings: Any,
    ) -> None:
        unknown = settings.keys() - _SETTINGS
        if unknown:
            raise ConfigurationError(
                f"Expected settings of IREStep among {', '.join(_SETTINGS)}, got `{min(unknown)}`: leave it out."
            )
        recipe = Recipe(**settings)
        _check_that_no_length_is_needed(recipe)
        if host is None:
            _check_that_no_host_is_needed(optimizer)
        if clip is not None and not callable(clip):
            raise ConfigurationError(
                "Expected `clip` to be a function of the parameters, such as "
                f"`lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0)`, got {clip!r}."
            )
        super().__init__(recipe, model, optimizer, LocalHost() if host is None else host, length=None)
        self.clip = clip
        self._stepped = optimizer
        self._stepping = self._over = False
        self._guard = run_first(self.optimizer.register_step_pre_hook(self._refuse_other_steps))
        self._losses: list[Tensor] | None = None  # of a step that is half done
        self._active = False

    def __call__(self, loss_of: Callable[[Any], Any], *batches: Any) -> Tensor:
        """One optimizer step; where the loop accumulates (``accelerator.accumulate``), a part of one.

        Args:
            loss_of: Called with each of the batches, and again in the extra passes; returns the mean loss over the
                batch, a scalar with its graph, or a mapping with it under "loss". The same function for all
                micro-batches of a step: what differs between them is in the batch.
            *batches: The micro-batches of the step, at least one; their losses are averaged.

        Returns:
            The mean of their losses at the unperturbed weights, detached (with AverageSAM at the perturbed ones).

        Raises:
            ConfigurationError: If there is no batch, or no loss.
        """
        if not batches or not callable(loss_of):
            got = "none" if not batches else f"a {type(loss_of).__name__} in place of the function"
            raise ConfigurationError(f"Expected `step(loss_of, batch)` with at least one batch, got {got}.")
        if self._over:
            raise ConfigurationError("Expected a step that is in use, got one after `release()`: make another IREStep.")
        step, host = self.engine, self.host
        host.take(len(batches))
        if self._losses is None:
            self.optimizer.zero_grad()
            self._active, self._losses = step.switch_on(), []
        completes, losses = host.steps_now, []
        try:
            for index, batch in enumerate(batches):
                losses.append(self._pass(loss_of, batch, last=completes and index == len(batches) - 1))
            self._losses += losses
            if completes:
                if step.window is not None:
                    step.finish_gradient(step.window.second_pass)
                self._stepping = True
                host.step(self._stepped, None if self.clip is None else self._clip)
        except BaseException:
            self._losses = None
            raise
        finally:
            self._stepping = False
            if completes or self._losses is None:
                step.end()
        if completes:
            if self.progress.waits_for_loss(self.recipe):
                for one in self._losses:
                    self.progress.add_loss(one)
            self._losses = None
            self.logs = dict(step.take_logs(wanted=True))
        return torch.stack(losses).mean()

    def _pass(self, loss_of: Callable[[Any], Any], batch: Any, last: bool) -> Tensor:
        """Forward and backward over a micro-batch; the last of a step averages the gradients over the processes."""
        step, host = self.engine, self.host
        if self._active:
            step.begin(loss_of)
        with nullcontext() if last and (step.window is None or step.window.synchronized) else host.no_sync():
            loss = self._checked(step.forward(loss_of, batch) if self._active else loss_of(batch))
            step.before_backward()
            host.backward(loss)
            step.after_backward()
        return loss.detach()

    @property
    def epoch(self) -> int:
        """Zero-based epoch, which the loop sets before its first step, where `start_epoch` or `start_loss` is used."""
        return self.host.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if check_whole("epoch", epoch, low=0) != self.host.epoch and self.progress.waits_for_loss(self.recipe):
            self.end_epoch()
        self.host.epoch = epoch

    def preview(self, loss_of: Callable[[Any], Any], *batches: Any) -> str:
        """The mask that IRE would begin with at these weights, as a text of aligned lines; nothing is trained.

        Args:
            loss_of: As in a step.
            *batches: The micro-batches that the estimate is made of.

        Returns:
            How many coordinates of each parameter are flat, one line each, and of all in the last one.

        Raises:
            ConfigurationError: Between the micro-batches of a step.
        """
        if self._losses is not None:
            raise ConfigurationError(
                "Expected `preview` between two steps, got it between the micro-batches of one: call it after "
                "`accelerator.sync_gradients` was true."
            )
        if not batches:
            raise ConfigurationError("Expected `preview(loss_of, batch)` with at least one batch, got none.")
        self.host.take(len(batches))
        return self.engine.preview([(batch,) for batch in batches], loss_of, None)

    def release(self) -> None:
        """Take the hooks off the optimizer, which another `IREStep` may then have; this one is over."""
        self._guard.remove()
        self._over = True
        super().release()

    def _refuse_other_steps(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step by hand beside ours would move the weights once more, and be boosted and counted."""
        if not self._stepping:
            raise ConfigurationError(
                "Expected the optimizer's steps to be made by `step(loss_of, batch)` alone, got a call of "
                "`optimizer.step()` beside it: leave that out, or call `release()` first."
            )

    def _checked(self, output: Any) -> Tensor:
        loss = loss_in(output)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            return loss.reshape(())
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        if isinstance(loss, Tensor) and loss.numel() == 1:
            got = "one without a graph"
        raise ConfigurationError(f"Expected `loss_of(batch)` to return a scalar loss with its graph, got {got}.")

    def _clip(self) -> None:
        assert self.clip is not None
        self.clip([parameter for group in self.optimizer.param_groups for parameter in group["params"]])


def _check_that_no_host_is_needed(optimizer: Optimizer) -> None:
    """An optimizer that another package has wrapped is stepped by that package's rules."""
    packages = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    hosts = {"accelerate": "AccelerateHost(accelerator)", "lightning": "FabricHost(fabric)"}
    for package, host in hosts.items():
        if package in packages:
            raise ConfigurationError(
                f"Expected `host={host}` with an optimizer that {package} has wrapped, got a "
                f"{type(optimizer).__name__} without: add it."
            )


def _check_that_no_length_is_needed(recipe: Recipe) -> None:
    """Refuse fractions of a run: no plain loop says how long it is."""
    timing = [("start_step", recipe.start.step), ("ramp_steps", recipe.ramp_steps)]
    perturbation = recipe.perturbation
    if perturbation is not None:
        timing += [("perturbation.start_step", perturbation.start.step)]
        timing += [("perturbation.stop_step", perturbation.stop.step)]
    for name, value in timing:
        if isinstance(value, float):
            raise ConfigurationError(
                f"Expected `{name}` to be a number of steps for IREStep, which does not know how long the run is, "
                f"got {value} (a fraction of it): give `{name}` in steps."
            )


_SETTINGS = tuple(Recipe.__init__.__annotations__)[:-1]
_SERVED: WeakSet[Optimizer] = WeakSet()
