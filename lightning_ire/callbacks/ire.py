"""The `IRE` callback: settings, and what happens at which of Lightning's hooks (how: `_session`)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError, NotForFabric
from lightning_ire._lightning import check_supported
from lightning_ire._run_length import batches_of_run, steps_of_run
from lightning_ire.callbacks._dry_run import show_mask
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._hyper_parameters import HyperParameters
from lightning_ire.callbacks._manual import ManualSession
from lightning_ire.callbacks._presets import preset_settings
from lightning_ire.callbacks._session import AutomaticSession, Session
from lightning_ire.curvature import Curvature
from lightning_ire.engine.boost import boost_factors
from lightning_ire.engine.optimizers import (
    check_kappas,
    check_optimizers,
    named_parameters,
    trainable_parameters,
)
from lightning_ire.engine.recipe import AUTO, Recipe, shown
from lightning_ire.engine.replay import loss_of
from lightning_ire.engine.state import STATE_VERSION, Progress, check_version, warn_of_misfits
from lightning_ire.perturbation import Perturbation

__all__ = ["IRE"]


class IRE(NotForFabric, Recipe, Callback):
    """Implicit Regularization Enhancement, and SAM, for any unmodified LightningModule.

    After each step of the base optimizer the weights go kappa times further along the flat coordinates (eq. 4):
    theta <- theta_old + (1 + kappa * n) * (theta_new - theta_old), n = 1 for the fraction gamma of coordinates with
    the smallest diagonal curvature (eq. 5). The optimizer's state never sees the boost. With a `perturbation` the
    gradient of a step is taken at moved weights (SAM), with or without the boost.

    When: from the start (`start_*`) on, the mask is made at every `interval`-th optimizer step, at the weights before
    that update (Alg. 1). A perturbation has a start and a stop of its own (none: all of the run). An accumulation
    window counts as one batch, for the mask and for SAM alike.

    What a step costs: one copy of the weights inside the step; with SAM one more forward and backward pass; at a
    refresh what the `curvature` says (:class:`~lightning_ire.SampledFisher`: one backward pass). For good: 1 byte per
    parameter for the mask (4 more with `beta`). With `kappa=0` and no perturbation: nothing at all; before the start:
    a step counter.

    Known limits: extra passes cannot hide numbers in Python attributes that `training_step` changes, objects of other
    kinds than data, direct calls of a logger, and in-place changes of the batch (:func:`~lightning_ire.in_extra_pass`
    tells them). Single device, DDP and ModelParallelStrategy (FSDP2, tensor parallel, both; docs/sharded.md).
    FSDPStrategy, DeepSpeed, LBFGS and (with a boost) complex parameters are refused at fit start.

    A module in manual optimization: the boost works around each step of what `self.optimizers()` returns, with masks
    and counts of its own for each optimizer; a perturbation needs `optimizer.step(closure)` and calls the closure
    twice; SampledFisher needs losses whose graph it can use, or a `fisher_loss`.

    Logged (see :mod:`lightning_ire.tags`): `ire/kappa`, `ire/flat_fraction`, `ire/threshold`, `ire/mask_iou`,
    `ire/mask_iou_chance`, `ire/step_norm_flat`, `ire/step_norm_sharp`, `sam/perturbed_loss`, `sam/grad_norm`, with
    the rows of the training metrics (`Trainer(log_every_n_steps=...)`).

    Args:
        kappa: Strength >= 0; 0 switches the boost and its estimates off, and with them all arguments but
            `perturbation` (beside which a `start_*` is refused then). Parameter groups of the optimizer may have
            strengths of their own under the key "ire_kappa" (0: not boosted, but ranked), unless `kappa` is 0. A
            mapping from name patterns (`fnmatch`) to strengths: ``{"*embed*": 9, "*norm*": 0, "*": 4}``; a parameter
            has that of the first pattern that fits any of its names (tied weights have several), and one that none fits
            is refused. A group's "ire_kappa" goes before that. "auto": `kappa_safety` times the largest kappa with
            which steps are stable near a quadratic, as a SharpnessMonitor with the quantity "stability" or
            "kappa_headroom" measured it last; 0 before its first measurement with a mask. For one optimizer, without
            "ire_kappa" in its groups.
        gamma: Fraction of the coordinates called flat, in (0, 1]; 1: all of them (a larger learning rate). A mapping as
            for `kappa`: the parameters of a pattern are ranked among themselves (with `scope="tensor"` each tensor by
            its own gamma), and their thresholds logged as `ire/threshold/PATTERN`.
        interval: K: optimizer steps between two masks.
        start_step: Zero-based optimizer step at which IRE switches on; strictly between 0 and 1: fraction of the whole
            run, by its optimizer steps (in manual optimization by its batches), refused where nobody knows how many.
        start_epoch: Zero-based epoch at which IRE switches on.
        start_loss: IRE switches on after the first epoch whose mean training loss (unperturbed, averaged over
            devices) is at or below this. At most one start_* argument; none: on from the first step.
        curvature: The estimate of h; default: :class:`~lightning_ire.SampledFisher`.
        perturbation: :class:`~lightning_ire.SAM`, :class:`~lightning_ire.AverageSAM`, ...; default: none.
        scope: Rank |h| over all parameters at once ("global", the paper) or in each tensor by itself ("tensor").
        exclude: Patterns (`fnmatch`, as in `"*.bias"`) of names of parameters that are never called flat and take no
            part in the ranking.
        scale_weight_decay: Whether the boost lengthens decoupled weight decay too (as in the authors' code). "only": it
            lengthens nothing else, a control that tells IRE's gain from that of more decay along flat directions.
        exclude_zero_curvature: Whether coordinates with h = 0 (pruned, never used) are left out of the ranking.
        kappa_schedule: "constant"; "lr": kappa * lr / (highest lr so far), per parameter group; "ramp": with T_w
            the step of the start, kappa at step t is kappa * min(1, (t - T_w + 1) / `ramp_steps`).
        beta: Weight of the past in a moving average of h over refreshes, in [0, 1).
        ramp_steps: On how many boosted steps kappa grows with `kappa_schedule="ramp"`, which needs it, >= 1; strictly
            between 0 and 1: fraction of the whole run's optimizer steps (rounded down, at least 1), refused where
            nobody knows how many, as in manual optimization.
        mask: "hard": n is 0 or 1. "soft": n in [0, 1] with the mean `gamma` (steps of 1/255, 1 byte per parameter): 1
            up to a curvature a, 0 from 2 a on, linear between (:func:`~lightning_ire.functional.soft_masks`; LITE,
            arXiv 2602.22681); `scope` says whether a is one number for all tensors or one for each, as LITE has it.
        kappa_safety: Share of the largest stable kappa that `kappa="auto"` uses, in (0, 1].
        dry_run: Train nothing: make one mask at the first batch, whatever `start_*` says, print a table of the flat
            coordinates of each parameter, and let the fit end before its first step.

    Raises:
        ConfigurationError: If an argument is out of range, or, at fit start, for what is not supported.

    Example:
        >>> IRE(kappa=2.0, gamma=0.8, interval=10, start_epoch=5).gamma
        0.8

    References:
        Wang et al., "Improving Generalization and Convergence by Enhancing Implicit Regularization", NeurIPS 2024
        (arXiv 2405.20763): eq. 4-8, Alg. 1.
    """

    def __init__(
        self,
        kappa: float | Mapping[str, float] | Literal["auto"] = 1.0,
        gamma: float | Mapping[str, float] = 0.9,
        interval: int = 10,
        start_step: int | float | None = None,
        start_epoch: int | None = None,
        start_loss: float | None = None,
        curvature: Curvature | None = None,
        perturbation: Perturbation | None = None,
        scope: Literal["global", "tensor"] = "global",
        exclude: str | Sequence[str] | None = None,
        scale_weight_decay: bool | Literal["only"] = True,
        exclude_zero_curvature: bool = False,
        kappa_schedule: Literal["constant", "lr", "ramp"] = "constant",
        beta: float = 0.0,
        ramp_steps: int | float | None = None,
        mask: Literal["hard", "soft"] = "hard",
        kappa_safety: float = 0.5,
        dry_run: bool = False,
    ) -> None:
        super().__init__(
            kappa=kappa,
            gamma=gamma,
            interval=interval,
            start_step=start_step,
            start_epoch=start_epoch,
            start_loss=start_loss,
            curvature=curvature,
            perturbation=perturbation,
            scope=scope,
            exclude=exclude,
            scale_weight_decay=scale_weight_decay,
            exclude_zero_curvature=exclude_zero_curvature,
            kappa_schedule=kappa_schedule,
            beta=beta,
            ramp_steps=ramp_steps,
            mask=mask,
            kappa_safety=kappa_safety,
        )
        self.dry_run = bool(dry_run)
        self._session: Session | None = None
        self._loaded: dict[str, Any] | None = None
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._progresses = [Progress.new(self)]
        self._warned = False
        self._windows = 0
        self._record = HyperParameters()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and spawned processes get the settings and the progress, not what belongs to a running fit."""
        return {**vars(self), "_session": None, "_trainer": None}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> IRE:
        """The callback with settings that have a name.

        The names of the paper's experiments are those of their configs, `"cifar10_wrn28_10_sam_ire"` and so on, with
        the `ire` part of these. On the command line: `--ire.preset NAME`, and other `--ire.*` flags for changes.

        - `"blockwise"`: rates by kind of block, for AdamW and networks with Llama's names (Wang et al., "The Sharpness
          Disparity Principle in Transformers", arXiv 2502.19002): kappa = ratio - 1 by name pattern, ratios 1 for norms
          and the rest, 4 for value and output, 6 for feed-forward, 8 for query and key, 10 for embeddings. All
          coordinates are flat (gamma 1), so no estimate is needed and no pass is made. In our own trial at small size
          (2 layers of width 64, 600 steps, one seed) the published ratios lost against a tuned AdamW: 1.65 to 1.69
          against 1.60 nats.
        - `"lite"`: the part of LITE for tensors that AdamW steps (arXiv 2602.22681): soft masks per tensor from the
          second moment, sharp share 0.1, chi = 1 + kappa = 3 (published: 2 to 4), growing over half of the run. Its
          start, 0.1 of the run, stands for the end of your warm-up: set `start_step`.

        Args:
            name: Name of the settings.
            **changes: Arguments that are to be other ones.

        Raises:
            ConfigurationError: If there are no settings of that name, or a change is out of range.

        Example:
            >>> IRE.preset("cifar100_resnet56_sam_ire", kappa=2.0)
            IRE(kappa=2.0, gamma=0.99, start_epoch=70, perturbation=SAM(rho=0.1))
        """
        return cls(**preset_settings(name) | changes)

    @property
    def idle(self) -> bool:
        """Whether this callback does nothing at all: no boost and no perturbation."""
        return not self.boosts and self.perturbation is None and not self.dry_run

    @property
    def for_fabric(self) -> str:
        """The same in a loop with Fabric."""
        settings = repr(self).removeprefix(type(self).__name__)[1:-1] or f"kappa={self.kappa!r}"
        return (
            ""
            if self.idle
            else f"`IREStep(model, optimizer, host=FabricHost(fabric), {settings})` after `fabric.setup`"
        )

    def flat_table(self, module: pl.LightningModule) -> str:
        """How many coordinates of each parameter are flat now (of the first optimizer), as a text of aligned lines.

        Of a sharded model on all ranks, which all have to call.

        Args:
            module: The module that is or was trained.
        """
        return self._progress.masks.table(dict(module.named_parameters()))

    @property
    def _progress(self) -> Progress:
        """The first optimizer's; the only one unless the module is in manual optimization."""
        return self._progresses[0]

    @property
    def started_at(self) -> int | None:
        """Step at which the (first) optimizer's boost was switched on in this run; ``None``: not yet."""
        return self._progress.started_at

    def boost_factors(
        self, module: pl.LightningModule, optimizer: Optimizer, kappa: float | None = None
    ) -> dict[int, Tensor | float]:
        """By how much the boost lengthens a step of this optimizer now: 1 + kappa * n.

        Args:
            module: The module being trained.
            optimizer: One of its optimizers.
            kappa: The largest strength, in place of the one in force.

        Returns:
            By `id` of the parameter a tensor of its shape; parameters that are not boosted are left out.
        """
        optimizers = module.trainer.optimizers
        index = next((i for i, one in enumerate(optimizers) if one is optimizer), 0)
        progress = self._progresses[min(index, len(self._progresses) - 1)]
        return boost_factors(self, progress, module, optimizer, kappa)

    def perturbation_in_force(self) -> tuple[Perturbation, list[float]] | None:
        """The perturbation, if the next step of the (first) optimizer is between its start and its stop.

        Returns:
            It, and what `rho_schedule` multiplies the radius of each parameter group with; outside of a fit: as without
            start, stop and schedule.
        """
        if self._session is not None:
            return self._session.first.perturbation_in_force()
        return None if self.perturbation is None else (self.perturbation, [1.0])

    @property
    def ascent_norm(self) -> float | None:
        """The norm that divided the (first) optimizer's last SAM step in this run; ``None``: there was none."""
        norm = self._progress.ascent_norm
        return None if norm is None else float(norm)

    def note_headroom(self, headroom: float) -> None:
        """Set kappa where it is "auto": `kappa_safety` times the largest stable one, from the next step on.

        SharpnessMonitor calls this after each of its own measurements in a fit.

        Args:
            headroom: `stability/kappa_headroom`, the same number on all devices.
        """
        for progress in self._progresses:
            progress.note_headroom(self, headroom)

    # Life cycle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget a state that was loaded for a fit that failed before it began; this fit's own is loaded after this."""
        if stage == "fit" and self._session is None:
            self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what is not supported, before any compute."""
        if self.idle:
            for optimizer in trainer.optimizers:
                check_kappas(self, optimizer)
            return
        if self._session is not None and self._session.trainer is not trainer:
            raise ConfigurationError(
                "Expected an IRE callback to serve one Trainer at a time, got one that is in another fit: make "
                "a second IRE(...)."
            )
        second_pass = self.perturbation is not None and self.perturbation.uses_gradient
        check_supported(
            trainer,
            pl_module,
            local_gradients=self.perturbation is not None and second_pass and not self.perturbation.sync,
            replays=second_pass or self.dry_run or (self.boosts and self.curvature.reruns),
        )
        check_optimizers(self, pl_module, trainer.optimizers, masks=self.boosts or self.dry_run)
        if self.kappa == AUTO:
            self._check_auto(trainer)
        if not self.dry_run:
            self.check_start()
        self._record.begin(trainer, pl_module)

    def _check_auto(self, trainer: pl.Trainer) -> None:
        """Refuse an automatic kappa that nobody would set."""
        from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor  # which imports this module

        if len(trainer.optimizers) != 1:
            raise ConfigurationError(
                f"Expected one optimizer for `kappa='auto'`, got {len(trainer.optimizers)}: set `kappa` to a number."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [one for one in callbacks if isinstance(one, SharpnessMonitor) and not one.idle]
        if not any({"stability", "kappa_headroom"} & set(one.quantities) for one in monitors):
            raise ConfigurationError(
                "Expected a SharpnessMonitor that measures the stability beside `kappa='auto'`, got "
                f"{'one without' if monitors else 'none'}: add SharpnessMonitor(quantities=['stability']) "
                "(`sharpness.every_n_epochs` 1 and `sharpness.quantities` [stability]), or set `kappa` to a number."
            )

    def hyper_parameters(self) -> dict[str, float | str]:
        """The settings that loggers are told, with TensorBoard's names for their groups."""
        return {
            "kappa": self.kappa if isinstance(self.kappa, float) else shown(self.kappa),
            "gamma": 0.0 if not self.boosts else self.gamma if isinstance(self.gamma, float) else shown(self.gamma),
            "rho": float(getattr(self.perturbation, "rho", 0.0)),
            "using/perturbation": type(self.perturbation).__name__ if self.perturbation is not None else "none",
            "using/curvature": repr(self.curvature) if self.boosts else "none",
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up a saved state or begin a new one; say what will happen."""
        if self.idle:
            return
        self._record.ready()
        self._release(trainer)
        self._warned = False
        self._begin_or_continue(trainer, pl_module)
        self._windows = self._progress.step
        if self.dry_run:
            show_mask(self, self._progress, trainer, pl_module)
            return
        automatic = pl_module.automatic_optimization
        total = steps_of_run(trainer) if automatic else None  # by hand nobody knows who steps how often
        pending = self.boosts and any(progress.started_at is None for progress in self._progresses)
        length = total if automatic else batches_of_run(trainer)
        first_step = self.start.first_step(length) if pending else None
        ramp = self.ramp_length(total) if self.boosts else 1
        for progress in self._progresses:
            progress.ramp = ramp
        session = AutomaticSession if automatic else ManualSession
        self._session = session(self, self._progresses, trainer, pl_module, first_step, length)
        rank_zero_info(self._summary(trainer, total))
        self._warn_of_late_ascent(trainer, total, length)
        if not self.boosts or self.started_at is not None:
            return
        if self.start.never(total, trainer.max_epochs, first_step):
            rank_zero_warn(
                f"IRE starts at {self.start}, but the run ends before that (max_epochs={trainer.max_epochs}, steps="
                f"{'unknown' if total is None else total}): lower `start_step` or `start_epoch`."
            )
        if self.start.immediate and trainer.global_step == 0 and any(map(_warms_up, trainer.optimizers)):
            rank_zero_warn(
                "IRE is on from the first step, while a learning-rate scheduler still warms up: the paper starts after "
                "the warm-up; set `start_step` or `start_epoch`."
            )

    def _warn_of_late_ascent(self, trainer: pl.Trainer, total: int | None, length: int | None) -> None:
        """Say so if the perturbation stops, or the run ends, before it starts."""
        if self.perturbation is None:
            return
        start, stop = self.perturbation.start, self.perturbation.stop
        epochs = trainer.max_epochs
        if total is not None and epochs is not None and epochs > 0 and {start.epoch, stop.epoch} != {None}:
            on, off = (
                one.first_step(length) if one.epoch is None else one.epoch * total // epochs for one in (start, stop)
            )
            if not stop.immediate and on is not None and off is not None and off <= on:
                rank_zero_warn(
                    f"{self.perturbation!r} never perturbs: in this run it starts at step {on} and stops at step {off}."
                )
                return
        if not start.immediate and start.never(total, trainer.max_epochs, start.first_step(length)):
            rank_zero_warn(
                f"{self.perturbation!r} starts at {start}, but the run ends before that: lower its `start_step` or "
                "`start_epoch`."
            )

    def _begin_or_continue(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state, self._loaded = self._loaded, None
        count = len(trainer.optimizers)
        if state:
            self._progresses = [Progress.new(self) for _ in range(count)]
            self._restore(state, trainer, module)
        elif trainer.global_step == 0 or self._trainer is None or self._trainer() is not trainer:
            steps = trainer.global_step // max(count, 1)  # not 0 when the checkpoint of a plain run goes on with IRE
            self._progresses = [Progress.new(self, steps) for _ in range(count)]
        self._trainer = weakref.ref(trainer)

    def _restore(self, state: dict[str, Any], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.perturbation is not None and state.get("perturbation"):
            self.perturbation.load_state_dict(state["perturbation"])
        misfits = []
        saved = zip(self._progresses, trainer.optimizers, state.get("optimizers", []), strict=False)
        for progress, optimizer, one in saved:
            misfits += progress.restore(one, named_parameters(module, optimizer))
        if self.boosts:
            warn_of_misfits(misfits, of="checkpoint")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the wrappers away, and say so if IRE never switched on."""
        if self.boosts and self.started_at is None and not self.dry_run:
            rank_zero_warn(f"IRE never switched on in this run: its start is {self.start}.")
        elif self.kappa == AUTO and not self._progress.auto_kappa and not self.dry_run:
            rank_zero_warn(
                "`kappa='auto'` stayed 0 in this run: the largest stable kappa was never measured while there was a "
                "mask, or was 0; let SharpnessMonitor measure more often (`every_n_steps`), or lower the learning rate."
            )
        self._record.finish(trainer)
        self._release(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """`teardown` is not called when fit raises: put everything back here."""
        self._record.finish(trainer)
        self._release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put everything back."""
        self._release(trainer)

    def _release(self, trainer: pl.Trainer) -> None:
        """End this trainer's session, not that of another one (which may validate meanwhile)."""
        if self._session is not None and self._session.trainer is trainer:
            self._session.release()
            self._session = None

    # One batch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch."""
        if self._session is not None:
            self._session.begin_epoch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch on when the time has come, and get ready to record the batch."""
        if self._session is not None:
            if batch_idx == 0 and self._progress.loss_count:  # saved after an epoch's last batch, before its end
                self._decide_by_loss(trainer, pl_module)
            self._session.begin_batch()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The graph of the training forward pass can still be used for the estimate."""
        if self._session is not None:
            self._session.before_backward()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put weights back that were moved before the pass."""
        if self._session is not None:
            self._session.after_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and look at the loss where something depends on it."""
        if self._session is None:
            return
        self._session.write_logs()
        loss = loss_of(outputs) if outputs else None
        if not isinstance(loss, Tensor) or not self.boosts:
            return
        progress = self._progress
        if progress.started_at is None:
            if self.start.loss is not None:  # Lightning reports it divided by the number of micro-batches
                progress.add_loss(loss * trainer.accumulate_grad_batches)
            if self.start.is_fraction and pl_module.automatic_optimization:
                self._refuse_missing_steps(trainer, pl_module, batch_idx)
        elif not self._warned and progress.step - progress.started_at <= self.interval:
            self._warned = not bool(torch.isfinite(loss).all())
            if self._warned:
                rank_zero_warn(
                    f"The loss became non-finite within {self.interval} steps of switching IRE on at step "
                    f"{progress.started_at}: `kappa` = {shown(self.kappa)} may be too large for this learning rate."
                )

    def _refuse_missing_steps(self, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int) -> None:
        """A fraction of a run that is measured in epochs is one of its windows: each of them has to step."""
        last = batch_idx + 1 == trainer.num_training_batches
        self._windows += last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        by_epochs = trainer.max_epochs not in (None, -1) and trainer.max_steps < 0
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # which skips steps that overflow
        if by_epochs and not scaled and is_overridden("optimizer_step", module) and self._progress.step < self._windows:
            raise ConfigurationError(
                f"Expected an optimizer step in every accumulation window for `start_step={self.start.step}` (a "
                f"fraction of the run), got `{type(module).__name__}.optimizer_step`, which left one out: give "
                "`start_step` in steps."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide on a start by loss."""
        if self._session is not None:
            self._decide_by_loss(trainer, pl_module)

    def _decide_by_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start by loss, on all devices alike, if the epoch that is over allows it."""
        progress = self._progress
        if not progress.waits_for_loss(self):
            return
        reached = progress.reaches_start_loss(self, LightningHost(trainer, pl_module))
        if reached is None:
            rank_zero_warn(
                f"`start_loss` had no loss to look at in an epoch: let {type(pl_module).__name__}.training_step return "
                "it, or set `start_step` or `start_epoch` instead."
            )
        elif reached:
            for each in self._progresses:
                each.start()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors, numbers and strings only (`torch.load(weights_only=True)`).

        Of a sharded model the masks are gathered: all ranks have to call, and rank 0 has them.
        """
        if self.idle:
            return {}
        if self._loaded is not None:  # not yet taken up
            return self._loaded
        own = {} if self.perturbation is None else self.perturbation.state_dict()
        optimizers = [progress.state_dict() for progress in self._progresses]
        return {"version": STATE_VERSION, "optimizers": optimizers, **({"perturbation": own} if own else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until training starts and the parameters are known; inside a fit, take it up at once."""
        if not self.idle:
            check_version(state_dict)
        if self._session is not None and state_dict:  # a search for a learning rate puts everything back
            self._restore(state_dict, self._session.trainer, self._session.module)
        else:
            self._loaded = state_dict or None

    def _summary(self, trainer: pl.Trainer, total: int | None) -> str:
        parameters = [parameter for optimizer in trainer.optimizers for parameter in trainable_parameters(optimizer)]
        count = sum(parameter.numel() for parameter in parameters)
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        what: list[str] = []
        passes: list[str] = []
        memory = [f"{size / 2**20:.1f} MiB inside the step"]
        if self.boosts:
            when = f"from {self.start}" if self.started_at is None else f"on since step {self.started_at}"
            length = "" if total is None else f" (run: {total} steps)"
            kappa = f"{self.kappa_safety:g} of the largest stable one" if self.kappa == AUTO else shown(self.kappa)
            what.append(f"kappa {kappa}, gamma {shown(self.gamma)}, {when}{length}")
            estimate = f"one {self.curvature!r} estimate every {_steps(self.interval)}"
            (passes if self.curvature.reruns else what).append(estimate)
            memory.append(f"{count * (5 if self.beta else 1) / 2**20:.1f} MiB for good")
        if self.perturbation is not None:
            automatic = trainer.lightning_module.automatic_optimization
            what.append(repr(self.perturbation) + ("" if automatic else " at each `optimizer.step(closure)`"))
            if self.perturbation.uses_gradient:
                more = {1: "one"}.get(self.perturbation.ascents, str(self.perturbation.ascents))
                passes.append(f"{more} more forward and backward every {_steps(self.perturbation.interval)}")
        return (
            f"IRE: {'; '.join(what)}; {count:,} parameters. Extra passes: {', '.join(passes) or 'none'}. "
            f"Extra memory: {', '.join(memory)}."
        )


def _warms_up(optimizer: Optimizer) -> bool:
    """Whether a scheduler has set the first learning rate below the one to come."""
    for group in optimizer.param_groups:
        aims = [group[key] for key in ("initial_lr", "max_lr") if group.get(key) is not None]
        if aims and group.get("lr") is not None and float(group["lr"]) < max(map(float, aims)):
            return True
    return False


def _steps(interval: int) -> str:
    return "step" if interval == 1 else f"{interval} steps"
