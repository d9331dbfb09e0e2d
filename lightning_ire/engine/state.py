"""How far a run has come: everything of the callback that a checkpoint holds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.host import Host
from lightning_ire.engine.masks import FlatMasks
from lightning_ire.engine.memory import PerturbationMemory
from lightning_ire.engine.optimizers import learning_rates
from lightning_ire.engine.recipe import AUTO, Recipe
from lightning_ire.schedule import scheduled_kappa

__all__ = ["STATE_VERSION", "Progress", "check_version", "warn_of_misfits"]

STATE_VERSION = 1
"""Of the saved state: raised when an older release could no longer read it right. States without a number are of 0."""


@dataclass
class Progress:
    """State of one optimizer's part in a run.

    Attributes:
        masks: The masks in force, with the moving average of h.
        step: Real optimizer steps so far (a step that a GradScaler skipped is none).
        started_at: Step at which the boost was switched on, for good; ``None``: not yet.
        retry: Whether the last estimate failed, so that the next step is to make another.
        loss_sum: Sum of this epoch's training losses, kept while a start by loss is pending.
        loss_count: How many losses that are.
        peak_lrs: Highest learning rate of each parameter group so far (for the "lr" schedules of kappa and rho).
        seed: Seed of all draws of the callback.
        last_logged: The values that were logged last.
        memory: What the perturbation keeps of each weight.
        perturbation: The class of that perturbation.
        ascent_norm: The norm that divided the last SAM step, not kept in checkpoints.
        auto_kappa: Kappa where it is "auto": a share of the headroom measured last, 0 before the first measurement.
        ramp: On how many boosted steps kappa grows, a setting: not kept in checkpoints either.
    """

    masks: FlatMasks
    step: int = 0
    started_at: int | None = None
    retry: bool = False
    loss_sum: Tensor | float = 0.0
    loss_count: int = 0
    peak_lrs: list[float] = field(default_factory=list)
    seed: int = field(default_factory=lambda: int(os.environ.get("PL_GLOBAL_SEED", "0")))

    last_logged: dict[str, Tensor] = field(default_factory=dict)
    memory: PerturbationMemory = field(default_factory=PerturbationMemory)
    perturbation: str = ""
    ascent_norm: Tensor | None = None
    auto_kappa: float = 0.0
    ramp: int = 1

    @classmethod
    def new(cls, recipe: Recipe, step: int = 0, seed: int | None = None) -> Progress:
        """The state at the beginning of a run.

        Args:
            recipe: The settings.
            step: The optimizer's real steps so far, of a run without IRE.
            seed: Seed of all draws; ``None``: that of the run.
        """
        masks = FlatMasks(
            recipe.gamma, recipe.scope, recipe.exclude_zero_curvature, recipe.beta, soft=recipe.mask == "soft"
        )
        self = cls(masks, step)
        if seed is not None:
            self.seed = seed
        self.perturbation = type(recipe.perturbation).__name__
        return self

    def start(self) -> None:
        """Switch the boost on, for good."""
        self.started_at = self.step

    def note_estimate(self, found: bool) -> None:
        """Remember whether the last estimate was finite.

        Args:
            found: Whether it was; if not, the next step makes another.
        """
        self.retry = not found

    def note_headroom(self, recipe: Recipe, headroom: float) -> None:
        """Set an automatic kappa; a measurement that is no number leaves it as it is.

        Args:
            recipe: The settings.
            headroom: The largest stable kappa, the same on all ranks.
        """
        if recipe.kappa == AUTO and math.isfinite(headroom):
            self.auto_kappa = recipe.kappa_safety * headroom

    def note_ascent(self, norm: Tensor) -> None:
        """Remember the norm that divided a SAM step.

        Args:
            norm: The norm.
        """
        self.ascent_norm = norm

    def note_logged(self, logs: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """All values of the log, each as it was last.

        Args:
            logs: Those of this step.
        """
        self.last_logged |= {tag: torch.as_tensor(value) for tag, value in logs.items()}
        return self.last_logged

    def count_step(self, optimizer: Optimizer, with_lrs: bool) -> None:
        """Count one real step.

        Args:
            optimizer: The optimizer, with the learning rates of this step.
            with_lrs: Whether to keep the highest ones.
        """
        self.step += 1
        if with_lrs:
            self.peak_lrs = self._peaks(learning_rates(optimizer))

    def _peaks(self, lrs: list[float]) -> list[float]:
        """The highest learning rates, these included."""
        return [max(pair) for pair in zip(lrs, self.peak_lrs + lrs[len(self.peak_lrs) :], strict=False)]

    def shares_of_peak_lrs(self, optimizer: Optimizer) -> list[float]:
        """The learning rate of each group before a step, divided by the highest one so far.

        Args:
            optimizer: The optimizer.
        """
        lrs = learning_rates(optimizer)
        return [scheduled_kappa(1.0, lr, peak) for lr, peak in zip(lrs, self._peaks(lrs), strict=True)]

    def add_loss(self, loss: Tensor) -> None:
        """Remember the training loss of a micro-batch, while a start by loss is pending.

        Args:
            loss: The loss, not divided by the number of micro-batches.
        """
        self.loss_sum = self.loss_sum + loss.detach()
        self.loss_count += 1

    def waits_for_loss(self, recipe: Recipe) -> bool:
        """Whether a start by loss is pending.

        Args:
            recipe: The settings.
        """
        return recipe.boosts and self.started_at is None and recipe.start.loss is not None

    def reaches_start_loss(self, recipe: Recipe, host: Host) -> bool | None:
        """Whether the mean of the remembered losses on all devices lets the boost start; the losses are forgotten.

        Args:
            recipe: The settings.
            host: The loop.

        Returns:
            ``None`` if there were no losses.
        """
        pair = torch.tensor([float(self.loss_sum), self.loss_count], device=host.device)
        total, count = (host.all_reduce_sum(pair) if host.world_size > 1 else pair).tolist()
        self.loss_sum, self.loss_count = 0.0, 0
        return total / count <= recipe.start.loss if count else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only: `torch.load(weights_only=True)` reads it."""
        memory = self.memory.state_dict()
        return {
            "step": self.step,
            "started_at": self.started_at,
            "retry": self.retry,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "peak_lrs": list(self.peak_lrs),
            "seed": self.seed,
            "shown": {tag: value.cpu() for tag, value in self.last_logged.items()},
            "flat": self.masks.state_dict(),
            **({"auto_kappa": self.auto_kappa} if self.auto_kappa else {}),
            **({"memory": memory, "perturbation": self.perturbation} if memory else {}),
        }

    def restore(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> list[str]:
        """Take up a saved state.

        Args:
            state: What :meth:`state_dict` returned, of this or an older release; what it lacks stays as it is.
            parameters: The run's parameters by name, on their devices.

        Returns:
            Names of parameters whose saved masks fit none of them.
        """
        self.step = state.get("step", self.step)
        self.started_at = state.get("started_at", self.started_at)
        self.loss_sum = state.get("loss_sum", self.loss_sum)
        self.loss_count = state.get("loss_count", self.loss_count)
        self.peak_lrs = list(state.get("peak_lrs", self.peak_lrs))
        self.seed = state.get("seed", self.seed)
        self.auto_kappa = state.get("auto_kappa", 0.0)
        self.last_logged = dict(state.get("shown", self.last_logged))
        if self.perturbation == type(None).__name__:  # else their last values would be logged for ever
            for tag in (tags.PERTURBED_LOSS, tags.GRAD_NORM):
                self.last_logged.pop(tag, None)
        if state.get("perturbation") == self.perturbation:
            self.memory.load_state_dict(state.get("memory", {}), parameters)
        misfits = self.masks.load_state_dict(state.get("flat", {}), parameters)
        self.retry = state.get("retry", self.retry) or bool(misfits)
        return misfits


def warn_of_misfits(misfits: Sequence[str], of: str) -> None:
    """Say which saved masks could not be used.

    Args:
        misfits: What :meth:`Progress.restore` returned.
        of: What they were saved in.
    """
    if misfits:
        warn_on_rank_zero(
            f"The {of}'s masks of {len(misfits)} parameters ({misfits[0]}, ...) fit none of this module: the mask is "
            "made anew at the next step."
        )


def check_version(state: Mapping[str, Any]) -> None:
    """Refuse a callback's state that a newer release has saved, whose meaning this one cannot know.

    Args:
        state: What the callback's `state_dict` returned.

    Raises:
        ConfigurationError: If it is of a newer version.
    """
    version = state.get("version", 0)
    if version > STATE_VERSION:
        raise ConfigurationError(
            f"Expected a checkpoint whose IRE state has version {STATE_VERSION} or an older one, got version "
            f"{version}: install the lightning_ire release that wrote it, or a newer one."
        )
