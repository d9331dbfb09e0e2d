"""The `SharpnessMonitor` callback: settings, when it measures, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError, NotForFabric, check_choice, check_whole
from lightning_ire._lightning import check_strategy, full_precision_step, logger_step, step_arguments
from lightning_ire._patches import own_method
from lightning_ire.callbacks._host import LightningHost
from lightning_ire.callbacks._hyper_parameters import HyperParameters
from lightning_ire.callbacks._probe import Probe, held_out_loader, probe_loader, training_sizes
from lightning_ire.callbacks._report import figures
from lightning_ire.callbacks.ire import IRE
from lightning_ire.engine.collectives import FailedTogether, raise_on_all_ranks
from lightning_ire.engine.module_state import modules_of
from lightning_ire.engine.no_trace import devices_of, no_trace
from lightning_ire.engine.recipe import AUTO
from lightning_ire.functional import as_real, local
from lightning_ire.sharpness.gaps import CumulativeGap
from lightning_ire.sharpness.job import BASIS, Cost, Job, Measurement, Settings
from lightning_ire.sharpness.landscape import Landscape, all_ranks, check_products, measurement_mode
from lightning_ire.sharpness.quantities import QuantityName, check_quantities, max_cost, measure, with_headroom

__all__ = ["SharpnessMonitor"]

_GAP = "SharpnessMonitor.gap"  # key in checkpoints
_UNSTABLE = 3  # measurements in a row above the limit of stability that are worth a warning


class SharpnessMonitor(NotForFabric, Callback):
    r"""Measures how sharp the loss is around the weights while a module trains, and leaves no trace in the run.

    The loss is that of the module's own `training_step` (or of its method ``sharpness_loss(batch, batch_idx)``, which a
    module in manual optimization needs), on a fixed probe: `num_batches` batches per device, drawn once with `seed`
    from the training data. They go through the training set's transforms, with fixed random numbers; a method
    ``probe_dataloader()`` of the datamodule or module may give plainer ones. Data without an index or with a sampler of
    the user's own: the first batches that training sees. Layers are in eval mode by default (BatchNorm's running
    statistics, no dropout), weights in their own precision without autocast, compiled parts run uncompiled, attention
    with torch's math kernel. All random vectors are the same at every measurement, so that curves are smooth.

    Quantities and their log tags (:mod:`lightning_ire.tags`); H is the Hessian of the mean loss over the probe in all
    parameters that require a gradient (complex ones as pairs of real numbers), g its gradient:

    - `trace_fisher`, `sharpness/trace_fisher`: Tr F = E[B \|\|G\|\|^2] with labels drawn from the model (eq. 6 of the
      IRE paper), the paper's measure of sharpness; for a loss that is no plain mean, the trace of its Gauss-Newton
      matrix. Needs a loss that SampledFisher knows or a method `fisher_loss`, see
      :class:`~lightning_ire.SampledFisher`.
    - `trace_gauss_newton`, `sharpness/trace_gauss_newton`: the same with all labels and random signs in place of drawn
      labels (:mod:`lightning_ire.functional.sampled_losses`), where targets are labels. Of a network that is sure of
      nearly every example Tr F sits in labels that are hardly ever drawn; this one sees them.
    - `trace_hessian`, `sharpness/trace_hessian`: Tr H (Hutchinson's estimate; where eigenvalues are measured too, exact
      on the subspace that they have cost, which takes most of the variance away).
    - `trace_normalized`, `sharpness/trace_normalized`: sum over the parameter tensors of \|\|w\|\|^2 Tr H_ww. Where a
      normalization layer follows w, multiplying w by c changes no output but divides Tr H_ww by c^2; this stays.
    - `layer_traces`, `sharpness/layer_traces/NAME`: Tr H_ww of every parameter tensor, and as a figure of bars.
    - `block_curvature`, `sharpness/block_curvature/KIND`: Tr H_bb / p_b, the mean curvature of the p_b coordinates of
      each kind of block (embedding, query_key, value_output, query_key_value, feed_forward, norm, convolution, head,
      other; by the classes of layers and the names that Transformers usually have), and a figure of bars over the
      measurements of the run (Wang et al. 2025, arXiv 2502.19002, find them to differ by kind).
    - `lambda_max`, `sharpness/lambda_max`: the largest eigenvalue of H (Lanczos), signed; with `num_eigenvalues` > 1
      the next ones too, `sharpness/lambda_2`, ... `lambda_min`, `sharpness/lambda_min`: the most negative one.
    - `spectral_density`, `sharpness/spectral_density/quantile_P`: the distribution of all eigenvalues (stochastic
      Lanczos) as a figure, and the values that P = 0, 1, 10, 50, 90, 99, 100 % of them do not exceed.
    - `ascent_gap`, `sharpness/ascent_gap`: L(theta + rho g / \|\|g\|\|) - L(theta). `noise_gap`, `sharpness/noise_gap`:
      E L(theta + rho xi / \|\|xi\|\|) - L(theta) over random xi and -xi together; to second order rho^2 Tr H / 2p.
    - `compression_gap`: `compression/rounding_gap`, by how much the loss rises when each tensor of two or more
      dimensions is rounded to `bits` bits with one step s = max \|w\| / (2^(bits-1) - 1) each;
      `compression/rounding_slope`, the part of that which is gradient times rounding error; and where a trace is
      measured too `compression/rounding_predicted`, the mean of the rest to second order, sum s^2 Tr(H_ww) / 24.
      `compression/deletion_gap`: by how much it rises when a random share `deleted` of the coordinates goes back to
      where training began (kept on the CPU; not known after a resume).
    - `gap`: `gap/trace_cov`, the trace of the covariance C of single samples' gradients, from the batches of the probe
      (two or more; approximate where BatchNorm is in training mode). `gap/noise_scale`, Tr C / \|\|g\|\|^2, in samples
      (McCandlish et al. 2018, arXiv 1812.06162). `gap/predicted_rate`, Tr(M C) / n for n training samples, M the step
      sizes (the learning rate for SGD; over 1 - momentum; Adam's and IRE's factors): to first order, and while the
      weights do not depend on the samples, so not beyond the first passes over the data, the growth of test loss minus
      training loss per step. `gap/predicted_cumulative`, its sum since the start (kept in checkpoints).
      `gap/measured`: the loss on as much validation data minus that on the probe, both without label smoothing (and
      without augmentation if the probe has none). The prediction is for steps without SAM.
    - `stability`: `stability/ratio`, the effective sharpness of the run's own step, with momentum, Adam's
      preconditioner, SAM or ASAM and IRE's boost, divided by its limit: near a quadratic steps blow up above 1. And
      `stability/edge`: the eigenvalue of H at which that is so (where all coordinates have one step size; 2 / lr for
      plain SGD). For SGD, Adam and AdamW (:mod:`lightning_ire.functional.stability`); gradient clipping and decoupled
      weight decay are not in it. Always in training mode, whatever `mode` says: with BatchNorm the loss that steps
      descend can be ten times less sharp than the one in eval mode.
    - `kappa_headroom`, `stability/kappa_headroom`: the largest kappa with which that ratio is at most 1, for the
      mask in force (at most 1000; strengths that differ all in proportion, and this is the largest of them); it has to
      stay above `ire/kappa`. Needs a mask. Measured with `stability` where IRE has ``kappa="auto"``.
    - `effective_lr`, in training mode too: of each tensor that may be doubled without a change of the loss, as before a
      normalization layer, `effective_lr/squared_norm/NAME`, \|\|w\|\|^2, and `effective_lr/NAME`, the mean step
      size of its coordinates (for SGD the learning rate times 1 + kappa n) over \|\|w\|\|^2: the learning rate of its
      direction.
    - `coherence`: `coherence/sigma_per_sample`, lambda_1(S) / (m max_i lambda_1(H_i)) with S_ij^2 = Tr(H_i H_j), for
      the Gauss-Newton matrices H_i of the losses of m single predictions: 1 / m where nothing overlaps, 1 for equal
      ones of rank one, up to the root of their rank for others (Dexter et al. 2024, arXiv 2401.12332).
      `coherence/ratio`: max_i lambda_1(M^(1/2) H_i M^(1/2)) (n / B - 1)^(1/2) / n: above 1 SGD with batches
      of B of n samples diverges (a sufficient condition that their proof contains; a maximum over m samples is a lower
      bound). A backward pass for each label of each sample.
    - `dropout_variance`: along the (at least 8) top eigenvectors of H the variance of the gradient over `max_vectors`
      dropout masks on the probe: `dropout/variance` along the first, and over all of them `dropout/slope` and
      `dropout/correlation` of its logarithm against that of the eigenvalue. (Zhang et al. 2023, arXiv 2305.15850, find
      dropout's noise larger along sharper directions; this is not their estimate.)
    - `sgd_ratio`, `stability/sgd_ratio`, in training mode too: (eta / 2) sum \|\|H_B v\|\|^2 / sum v^T H_B v over
      training batches B and random signs v. Above 1, SGD is unstable in the mean square (a necessary condition after
      Mulayoff and Michaeli 2024, for interpolating minima, that is where single losses have small gradients and no
      negative curvature). Momentum counts as a factor 1 / (1 - beta), which is heuristic.

    Error bars: tags that end in `_stderr` (standard error over the random vectors, not over the choice of the probe),
    `_residual` and `_converged` (an eigenvalue lies within the residual; 1 if that is within the tolerance).

    When: after each `every_n_steps`-th optimizer step, at the end of each `every_n_epochs`-th epoch, at the end of
    `Trainer.validate`, and whenever :meth:`measure` is called. Scalars go to every logger, and to
    `trainer.callback_metrics`, so that checkpoints can be chosen by them. Figures (with matplotlib) go to TensorBoard,
    W&B, MLflow, Comet and Neptune, and as PNG into the log folder of loggers that have one (`CSVLogger`); histograms
    and the HPARAMS tab (kappa, gamma, rho, learning rate, the module's own hyper-parameters against final metrics) to
    TensorBoard. Other loggers get these settings with `log_hyperparams`; where a module or datamodule has a
    hyper-parameter of the same name, ours is called `ire_...`. `last` holds the last measurement with everything in
    it: without a logger (`logger=False`) the numbers are there and in `callback_metrics` only.

    The dataset and the collate function that make the probe are put back as they were: generators, attributes,
    containers, closures, globals. Not put back: arrays of more than 1 MiB that they change in place, what is inside
    containers of more than 10,000 elements, and what is outside of this process.

    Three values of `stability/ratio` above 1 in a row are warned about once per run, with what to lower.

    What fails is skipped with a warning and training goes on: a loss that cannot be differentiated twice is measured by
    differences of gradients (`hvp="auto"`), other errors and lack of memory skip the quantity.

    Sharded models (`ModelParallelStrategy` with FSDP2, tensor parallelism or both): all quantities, the same numbers to
    the bit on all devices. Hessian products are differences of gradients (`hvp` "auto" or "finite_difference"), whose
    step is that of the coarsest type of the weights and of FSDP2's mixed-precision policies; layers that compute in a
    coarser type by themselves are measured badly. Tr F is estimated with the gradient of all devices together, which
    takes more draws for the same error than one of each device. What fails on one device alone is skipped on all, but
    not inside of the model's own collectives, where the others wait for it as in training. Models of up to 2^24
    parameters get the random vectors of a single process.

    Cost of one measurement, at most (the line at fit start has the numbers): `max_vectors` backward passes for Tr F,
    `max_vectors` Hessian products for all traces of H together, `max_iterations` for the eigenvalues (and again for
    `dropout_variance`, with `max_vectors` passes), as many for `stability` (twice with SAM), 6 times as many for
    `kappa_headroom` (half of that as a rule), 120 for the density; of the rest `coherence` takes most, 10 `num_samples`
    backward passes. A product takes about as long as two forward and backward passes (benchmarks/hessian_product.py).
    Memory: the graph of a gradient (twice what a training step saves), 25 vectors of the model's size for eigenvalues,
    10 `num_samples` of them for `coherence`, the weights of the start for `compression_gap`, the probe on the host.
    In a sharded model a product takes two forward and two backward passes over each batch, which gather all weights
    each time, and about ten all-reduces of a few numbers (:class:`~lightning_ire.sharpness.landscape.Landscape`);
    vectors have the size of the device's part (while a random one is drawn the largest parameter is there as a whole),
    and are never sent.

    Args:
        every_n_steps: Optimizer steps between two measurements; ``None``: not by steps.
        every_n_epochs: Epochs between two measurements; ``None``: not by epochs. Both may be given.
        quantities: What to measure.
        num_batches: Probe batches on each device.
        batch_size: Samples in a probe batch; default: as in the training loader.
        mode: "eval" or "train" (batch statistics, dropout with fixed masks).
        hvp: How Hessian products are made: "exact", "finite_difference", or "auto": exact where that works.
        relative_error: Draws for a trace stop when standard error / trace is this small. 0: all `max_vectors`.
        max_vectors: Most draws for a trace.
        tolerance: Residual of an eigenvalue, relative to the largest, at which Lanczos stops.
        max_iterations: Most Lanczos steps.
        num_eigenvalues: How many of the largest eigenvalues `lambda_max` gives.
        rho: Radius of the ascent gap and the noise gap, in weight units.
        bits: Bits to which `compression_gap` rounds, from 2 to 32.
        deleted: Share of the coordinates that it puts back, in (0, 1].
        num_samples: Most predictions that `coherence` looks at, of each device's first batch; fewer where there are
            more than 10 labels, so that there are at most 10 backward passes for each.
        seed: Seed of the probe and of all random vectors.

    Raises:
        ConfigurationError: If an argument is out of range; at fit start, for strategies that are not supported
            (FSDPStrategy, DeepSpeed), for `hvp="exact"` with sharded parameters, for a module in manual optimization
            without `sharpness_loss` (`Trainer.validate` warns and measures nothing) and for two monitors that would
            measure the same at the same step.

    Example:
        >>> SharpnessMonitor(every_n_epochs=5, quantities=["trace_fisher", "lambda_max"]).every_n_epochs
        5

    References:
        Sharpness as Tr F: Wang et al. 2024 (arXiv 2405.20763), Section 4. Stability: derived in
        :mod:`lightning_ire.functional.stability`.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        quantities: Sequence[QuantityName] = ("trace_fisher", "trace_hessian", "lambda_max"),
        num_batches: int = 1,
        batch_size: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        hvp: Literal["auto", "exact", "finite_difference"] = "auto",
        relative_error: float = 0.05,
        max_vectors: int = 64,
        tolerance: float = 1e-3,
        max_iterations: int = 50,
        num_eigenvalues: int = 1,
        rho: float = 0.05,
        bits: int = 8,
        deleted: float = 0.1,
        num_samples: int = 16,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = None if every_n_steps is None else check_whole("every_n_steps", every_n_steps, low=1)
        self.every_n_epochs = None if every_n_epochs is None else check_whole("every_n_epochs", every_n_epochs, low=1)
        self.quantities = check_quantities(quantities)
        self.num_batches = check_whole("num_batches", num_batches, low=1)
        self.batch_size = None if batch_size is None else check_whole("batch_size", batch_size, low=1)
        self.hvp = check_choice("hvp", hvp, ("auto", "exact", "finite_difference"))
        self.mode = mode
        self.relative_error = relative_error
        self.max_vectors = max_vectors
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.num_eigenvalues = num_eigenvalues
        self.rho = rho
        self.bits = bits
        self.deleted = deleted
        self.num_samples = num_samples
        self.settings(1)
        self.seed = check_whole("seed", seed, low=0)
        self.last: Measurement | None = None
        self._loaded_gap: dict[str, Any] | None = None
        self._record = HyperParameters()
        self._reset()

    def _reset(self) -> None:
        self._probe: Probe | None = None
        self._recording = False
        self._held_out: Probe | None = None
        self._exact = True
        self._start: list[Tensor] | None = None  # weights at the start of training, on the CPU
        self._gap = CumulativeGap()
        self._blocks: list[tuple[int, dict[str, float]]] = []  # by step
        self._warned: set[str] = set()
        self._measured_at = (-1, -1)  # epoch and step
        self._unstable = 0  # measurements in a row with a stability ratio above 1
        self._warned_of_steps = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and spawned processes get the settings, not what belongs to a running fit."""
        state = dict(vars(self))
        fresh = object.__new__(type(self))
        fresh._reset()
        return state | vars(fresh)

    @property
    def idle(self) -> bool:
        """Whether this callback never measures by itself."""
        return self.every_n_steps is None and self.every_n_epochs is None

    @property
    def for_fabric(self) -> str:
        """The same in a loop with Fabric."""
        return "" if self.idle else "`measure_sharpness(model, loss_of, batches, host=FabricHost(fabric))`"

    @property
    def state_key(self) -> str:
        """Nothing is saved in checkpoints."""
        return type(self).__qualname__

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the predicted gap since the start of training, where the quantity `gap` is measured."""
        if "gap" in self.quantities:
            checkpoint[_GAP] = asdict(self._gap)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from it."""
        self._loaded_gap = checkpoint.get(_GAP)

    # Fit

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what is not supported, before any compute; keep the HPARAMS tab free for the final metrics."""
        self._reset()
        check_strategy(trainer, "SharpnessMonitor")
        check_products(self.hvp, pl_module)
        if (missing := _loss_is_missing(pl_module)) is not None:
            raise ConfigurationError(missing)
        for other in _others(trainer, self):
            if self._meets(other, trainer):
                raise _measured_twice(self, other)
        self._record.begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what a measurement will cost."""
        self._record.ready()
        if self._loaded_gap is not None:
            self._gap, self._loaded_gap = CumulativeGap(**self._loaded_gap), None
        if "compression_gap" in self.quantities and trainer.global_step:
            self._warn(tags.DELETION_GAP, "the weights of the start of training are not known in a resumed run")
        elif "compression_gap" in self.quantities:
            trained = [local(parameter.detach()) for parameter in pl_module.parameters() if parameter.requires_grad]
            self._start = [as_real(part).cpu().clone() for part in trained]
        loader, drawable = None, True
        quiet = no_trace(modules_of(pl_module), LightningHost(trainer, pl_module), devices_of(pl_module))
        with quiet, suppress(Exception):  # what fails in the user's code, the measurement will say
            loader, drawable = probe_loader(trainer, pl_module)
        self._recording = not drawable and loader is trainer.train_dataloader
        if self._recording:
            self._probe = Probe([], moved=True)
        if not self.idle:
            rank_zero_info(self._summary(trainer, pl_module, loader))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batches where the training data cannot be drawn from."""
        if self._recording and self._probe is not None:
            self._probe.record(batch)
            self._recording = len(self._probe) < self.num_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every n-th optimizer step."""
        step = trainer.global_step
        if self._recording:  # the probe is not complete
            return
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._measured_at[1]:
            self._measure_and_log(trainer, pl_module, logger_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at the end of every n-th epoch."""
        self._recording = False  # an epoch shorter than the probe: it stays as it is
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        # without an optimizer there are epochs, but no steps
        if due and (trainer.current_epoch, trainer.global_step) != self._measured_at:
            self._measure_and_log(trainer, pl_module, logger_step(trainer, epoch_end=True))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the HPARAMS tab."""
        self._record.finish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A run that was interrupted is in the HPARAMS tab too."""
        self._record.finish(trainer)

    def _measure_and_log(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if trainer.sanity_checking or getattr(trainer, "barebones", False):
            return
        self._measured_at = trainer.current_epoch, trainer.global_step
        result = self.measure(trainer, module)
        if (rate := result.values.get(tags.GAP_RATE)) is not None:
            result.add(tags.GAP_PREDICTED, self._gap.add(trainer.global_step, rate))
        if result.blocks:
            self._blocks.append((trainer.global_step, result.blocks))
        ire = find_ire(trainer)
        if ire is not None and tags.KAPPA_HEADROOM in result.values:
            ire.note_headroom(result.values[tags.KAPPA_HEADROOM])
        self._warn_of_unstable_steps(result.values.get(tags.RATIO), ire)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                if result.values:
                    logger.log_metrics(result.values, step=step)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in result.values.items()})
        figures(trainer, result, step, self._warn, self._blocks)

    def _warn_of_unstable_steps(self, ratio: float | None, ire: IRE | None) -> None:
        """Once per run, after some measurements in a row; one that was skipped does not count."""
        if ratio is None:
            return
        self._unstable = self._unstable + 1 if ratio > 1 + self.tolerance else 0
        if self._unstable != _UNSTABLE or self._warned_of_steps:
            return
        self._warned_of_steps = True
        remedies = ["the learning rate"]
        if ire is not None and ire.boosts:
            remedies.append("`kappa_safety`" if ire.kappa == AUTO else "`kappa`")
        if ire is not None and ire.perturbation is not None:
            remedies.append("the radius of the perturbation")
        rank_zero_warn(
            f"`{tags.RATIO}` was above 1 in {_UNSTABLE} measurements in a row (now {ratio:.3g}): near a quadratic such "
            f"steps blow up; lower {' or '.join(remedies)}."
        )

    # Validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what is not supported before the batches run: afterwards their result would be lost."""
        if trainer.state.fn != TrainerFn.VALIDATING or self.idle:
            return
        self._reset()
        check_strategy(trainer, "SharpnessMonitor")
        check_products(self.hvp, pl_module)
        if (other := next(_others(trainer, self), None)) is not None:
            raise _measured_twice(self, other)
        if (missing := _loss_is_missing(pl_module)) is not None:
            self._warn("everything", missing)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """`Trainer.validate` measures too: the values join its table and its return value."""
        if trainer.state.fn != TrainerFn.VALIDATING or self.idle or _loss_is_missing(pl_module) is not None:
            return
        result = self.measure(trainer, pl_module)
        for tag, value in result.values.items():
            pl_module.log(tag, value, sync_dist=True)  # it is the same on all; else Lightning warns
        figures(trainer, result, logger_step(trainer), self._warn)

    # On demand

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Measurement:
        """Measure now; nothing is logged. To be called on all devices, not between a forward pass and its backward.

        Args:
            trainer: A trainer that is fitting or validating the module, or has done so.
            module: The module.

        Returns:
            The numbers by log tag, and what was skipped and why.
        """
        self.last = Measurement(trainer.global_step)
        host = LightningHost(trainer, module)
        with measurement_mode(host, module):
            try:
                probe = self._probe_of(trainer, module)
            except FailedTogether as error:
                self._warn("everything", str(error))
                self.last.skipped = dict.fromkeys(self.quantities, str(error))
                return self.last
            with self._progress_bar(trainer, len(probe)) as bar:
                landscape = self._landscape(trainer, module, probe, bar.update)
                settings = self._settings_of(trainer, probe)
                job = Job(landscape, settings, self.last, trainer.optimizers, find_ire(trainer), self._start)
                measure(job, self._wanted(trainer), self._warn)
        self._exact = landscape.exact
        if self.last.out_of_memory:
            self._after_out_of_memory(landscape, probe)
        return self.last

    @contextmanager
    def landscape(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Landscape]:
        """The loss on the probe as a function of the weights, for measurements of your own; no trace is left.

        Args:
            trainer: A trainer that is fitting or validating the module, or has done so.
            module: The module.

        Yields:
            The landscape, to be used in one of its modes (``with landscape.mode("train"): ...``).

        Raises:
            RuntimeError: If there is no probe to be had.
        """
        with measurement_mode(LightningHost(trainer, module), module):
            yield self._landscape(trainer, module, self._probe_of(trainer, module))

    def _landscape(
        self, trainer: pl.Trainer, module: pl.LightningModule, probe: Probe, tick: Callable[[], Any] = lambda: None
    ) -> Landscape:
        loss = getattr(module, "sharpness_loss", None) or own_method(module, "training_step")
        fisher_loss = getattr(module, "fisher_loss", None)
        held_out = self._held_out_of(trainer, module) if "gap" in self.quantities else Probe([], moved=False)
        return Landscape(
            LightningHost(trainer, module),
            module,
            _on_probe(probe, trainer, loss),
            len(probe),
            held_out=_on_probe(held_out, trainer, loss),
            held_out_batches=len(held_out),
            fisher_loss=None if fisher_loss is None else _on_probe(probe, trainer, fisher_loss),
            hvp=self.hvp if self._exact else "finite_difference",
            seed=self.seed,
            tick=tick,
        )

    def _probe_of(self, trainer: pl.Trainer, module: pl.LightningModule) -> Probe:
        def draw() -> Probe:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                raise ValueError("no parameter requires a gradient")
            if self._probe is not None and len(self._probe):
                return self._probe
            if self._recording:
                raise ValueError("training has not seen a batch yet")
            loader, drawable = probe_loader(trainer, module)
            if loader is None:
                raise ValueError(
                    "there is no training data to take the probe from: give the module or datamodule a method "
                    "`probe_dataloader`"
                )
            probe = self._taken(trainer, loader, drawable)
            if not len(probe):
                raise ValueError("the data for the probe is empty")
            return probe

        self._probe = self._on_all(trainer, module, draw)
        return self._probe

    def _held_out_of(self, trainer: pl.Trainer, module: pl.LightningModule) -> Probe:
        """A probe of the validation data, empty if there is none."""
        if self._held_out is None:

            def draw() -> Probe:
                loader, drawable = held_out_loader(trainer, module)
                return Probe([], moved=False) if loader is None else self._taken(trainer, loader, drawable)

            try:
                self._held_out = self._on_all(trainer, module, draw)
            except FailedTogether as error:
                self._warn(tags.GAP_MEASURED, str(error))
                self._held_out = Probe([], moved=False)
        return self._held_out

    def _taken(self, trainer: pl.Trainer, loader: Any, drawable: bool) -> Probe:
        if drawable:
            return Probe.drawn(trainer, loader, self.num_batches, self.batch_size, self.seed)
        return Probe.first(loader, self.num_batches)

    def _on_all(self, trainer: pl.Trainer, module: pl.LightningModule, draw: Callable[[], Probe]) -> Probe:
        """A probe of equally many batches on all devices; an error on one of them is an error on all."""
        probe = raise_on_all_ranks(all_ranks(LightningHost(trainer, module)), draw, "SharpnessMonitor")
        if trainer.world_size > 1:  # loaders of the user's own may give unequally many batches
            fewest = torch.tensor(len(probe), device=trainer.strategy.root_device)
            probe.shorten(int(trainer.strategy.reduce(fewest, reduce_op="min")))
        return probe

    def _meets(self, other: SharpnessMonitor, trainer: pl.Trainer) -> bool:
        """Whether both measure at the same moment in a fit, as far as its length is known."""
        steps, per_epoch = math.inf, 0
        with suppress(MisconfigurationException, OverflowError):  # accumulation that changes; data without a length
            steps = trainer.estimated_stepping_batches
            per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if not per_epoch and (
            (self.every_n_epochs and other.every_n_epochs) or 1 in (self.every_n_steps, other.every_n_steps)
        ):
            return True
        mine, theirs = ([one.every_n_steps or 0, (one.every_n_epochs or 0) * per_epoch] for one in (self, other))
        return any(math.lcm(first, second) <= steps for first in mine for second in theirs if first and second)

    def settings(self, accumulate: int, **known: int | None) -> Settings:
        """How the quantities are measured.

        Args:
            accumulate: How many batches of the probe make up one of training.
            **known: What else the loop knows: `samples`, `train_size`, `train_batch`.
        """
        return Settings(
            mode=self.mode,
            relative_error=self.relative_error,
            max_vectors=self.max_vectors,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            num_eigenvalues=self.num_eigenvalues,
            rho=self.rho,
            bits=self.bits,
            deleted=self.deleted,
            num_samples=self.num_samples,
            accumulate=accumulate,
            **known,
        )

    def _settings_of(self, trainer: pl.Trainer, probe: Probe) -> Settings:
        accumulate = int(trainer.accumulate_grad_batches)
        size, batch = training_sizes(trainer)
        together = None if batch is None else batch * accumulate
        return self.settings(accumulate, samples=probe.size, train_size=size, train_batch=together)

    def _wanted(self, trainer: pl.Trainer) -> tuple[str, ...]:
        """The quantities, with the largest stable kappa for an IRE whose kappa follows it."""
        ire = find_ire(trainer)
        follows = ire is not None and ire.kappa == AUTO and ire.started_at is not None
        return with_headroom(self.quantities) if follows else self.quantities

    def _max_cost(self, trainer: pl.Trainer, batches: int) -> Cost:
        ire = find_ire(trainer)
        sam = ire is not None and ire.perturbation is not None and ire.perturbation.uses_gradient
        return max_cost(self._wanted(trainer), self.settings(int(trainer.accumulate_grad_batches)), batches, sam)

    # What it says

    def _progress_bar(self, trainer: pl.Trainer, batches: int) -> tqdm:
        """Shows itself when a measurement takes longer than a few seconds."""
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        cost = self._max_cost(trainer, batches)
        total = cost.backward + cost.products
        return tqdm(desc="Sharpness (at most)", total=total, delay=3, leave=False, disable=not shown, position=1)

    def _summary(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> str:
        cost = self._max_cost(trainer, self.num_batches)
        times = [f"every {_count(self.every_n_steps, 'step')}"] if self.every_n_steps else []
        times += [f"every {_count(self.every_n_epochs, 'epoch')}"] if self.every_n_epochs else []
        size = self.batch_size or getattr(loader, "batch_size", None)
        batches = _count(self.num_batches, "batch", "batches") + (f" of {size}" if size else "")
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        held = sum(local(parameter.detach()).numel() for parameter in module.parameters() if parameter.requires_grad)
        lanczos = {"lambda_max", "lambda_min", "stability", "kappa_headroom"} & set(self.quantities)
        memory = f", {(BASIS + 5) * held * 4 / 2**20:.1f} MiB of Lanczos vectors" if lanczos else ""
        return (
            f"SharpnessMonitor: {', '.join(self.quantities)} {' and '.join(times)} on {batches} per device "
            f"({self.mode} mode); {count:,} parameters. A measurement takes at most {cost.forward} forward passes, "
            f"{cost.backward} backward passes and {cost.products} Hessian products (each about as "
            f"long as 2 training passes){memory}."
        )

    def _warn(self, quantity: str, reason: str) -> None:
        """Once per quantity and reason."""
        text = f"SharpnessMonitor skips {quantity}: {reason}"
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)

    def _after_out_of_memory(self, landscape: Landscape, probe: Probe) -> None:
        torch.cuda.empty_cache()
        vector = landscape.coordinates.length * 4 / 2**20
        self._warn(
            "a measurement",
            f"out of memory, with {probe.samples} samples in a batch, {landscape.size:,} parameters and up "
            f"to {BASIS + 5} vectors of {vector:.1f} MiB: lower `batch_size`; training goes on",
        )


def _loss_is_missing(module: pl.LightningModule) -> str | None:
    """What to say of a module whose loss is not known; else ``None``."""
    if module.automatic_optimization or hasattr(module, "sharpness_loss"):
        return None
    return (
        f"Expected {type(module).__name__}, which is in manual optimization, to have a method `sharpness_loss(batch, "
        "batch_idx)` that returns the loss to be measured, got none: its `training_step` would train; add the method, "
        "or remove SharpnessMonitor."
    )


def _others(trainer: pl.Trainer, monitor: SharpnessMonitor) -> Iterator[SharpnessMonitor]:
    """The run's other monitors that log some of the same quantities."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    monitors = [one for one in callbacks if isinstance(one, SharpnessMonitor) and one is not monitor]
    for one in monitors:
        if not (one.idle or monitor.idle) and set(one.quantities) & set(monitor.quantities):
            yield one


def _measured_twice(one: SharpnessMonitor, other: SharpnessMonitor) -> ConfigurationError:
    same = ", ".join(quantity for quantity in one.quantities if quantity in other.quantities)
    return ConfigurationError(
        f"Expected each quantity from one SharpnessMonitor at a time, got {same} from two, which would write "
        "different numbers under the same tags: give them different `quantities`, or remove one."
    )


def _on_probe(probe: Probe, trainer: pl.Trainer, step: Callable[..., Any]) -> Callable[[int], Any]:
    """A module's method as a function of the number of a batch, with weights and loss in their own precision."""

    def loss(index: int) -> Any:
        with full_precision_step(trainer):
            return step(*step_arguments(step, probe.batch(trainer, index), index))

    return loss


def find_ire(trainer: pl.Trainer) -> IRE | None:
    """The run's IRE callback, if there is one that does anything.

    Args:
        trainer: The trainer.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, IRE) and not one.idle), None)


def _count(number: int | None, one: str, many: str | None = None) -> str:
    return one if number == 1 and many is None else f"{number} {one if number == 1 else many or one + 's'}"
