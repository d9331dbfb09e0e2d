"""IRE and SAM in the optimizer steps of transformers' Trainer, and measurements of sharpness in between.

The Trainer's loop, `transformers` 5: for each micro-batch `Trainer.training_step` (`compute_loss`, then
`accelerator.backward`); after the last one, where `accelerator.sync_gradients` is true, clipping,
`on_pre_optimizer_step`, `optimizer.step()`, `on_optimizer_step`, the scheduler, `zero_grad`, `on_step_end`. Gradients
at other weights have to be there before the clipping, so they are made at the end of the last `training_step`: it is
wrapped on the instance while `train` runs, and so are `compute_loss`, `log` and `save_model`.

The only file that relies on this; tests/integrations/test_transformers.py fails when a release changes it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError
from lightning_ire._patches import Patches, muted
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.no_trace import devices_of
from lightning_ire.engine.object_state import kept
from lightning_ire.engine.recipe import AUTO, Recipe
from lightning_ire.engine.replay import loss_of
from lightning_ire.functional import seeded
from lightning_ire.integrations.accelerate import AccelerateHost, check_accelerator
from lightning_ire.loop import LoopStep
from lightning_ire.perturbation import Perturbation
from lightning_ire.sharpness import Measurement, measure_sharpness
from lightning_ire.sharpness.probe import drawn_samples
from lightning_ire.sharpness.quantities import with_headroom

if TYPE_CHECKING:
    from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = ["STATE_FILE", "Attachment", "attach"]

STATE_FILE = "lightning_ire.pt"
"""In each checkpoint folder of the Trainer: masks, counts, averages."""

_ATTACHED: WeakSet[Trainer] = WeakSet()


def attach(
    trainer: Trainer,
    ire: Recipe | Perturbation | None = None,
    sharpness: SharpnessMonitor | None = None,
    probe: Sequence[Any] | None = None,
) -> Attachment:
    """Let a Trainer take its optimizer steps with IRE and SAM, and measure sharpness; call it before `trainer.train()`.

    Nothing of the Trainer's script changes. Accumulation counts as one batch, also where the Trainer divides by the
    number of items in all of it (`num_items_in_batch`); clipping (`max_grad_norm`) sees the final gradient; masks and
    counts are saved in the Trainer's own checkpoint folders and `train(resume_from_checkpoint=...)` goes on bit for
    bit. With `IRE(kappa=0)` and no `sharpness` nothing is touched.

    Logged with the Trainer's own rows, so by its reporters: the values of :class:`~lightning_ire.IRE`
    (`ire/flat_fraction`, ...); sharpness in rows of its own. One device or DDP; fp32, bf16, fp16; PEFT, gradient
    checkpointing, `torch_compile`, subclasses that override `compute_loss` or `training_step` (as long as that calls
    `compute_loss` once).

    Cost per step: that of :class:`~lightning_ire.IRE`; of a measurement: that of
    :class:`~lightning_ire.SharpnessMonitor`.

    Args:
        trainer: The Trainer.
        ire: ``IRE(...)``, whose fractions (`start_step=0.5`) are parts of the Trainer's run, or a perturbation alone,
            such as ``SAM(0.05)``.
        sharpness: ``SharpnessMonitor(every_n_steps=100, quantities=[...])``: what is measured how, and when. Values are
            those of the loss that the Trainer computes for one batch, with the weights' own precision; no figures.
        probe: Batches to measure on, as the collator makes them; by default `num_batches` are drawn from the training
            set on each process, which a dataset without an index does not allow.

    Returns:
        What was attached: `state_dict`, the last measurement, `release()`.

    Raises:
        ConfigurationError: For what cannot work, here or when training starts: DataParallel (several GPUs in one
            process), FSDP, DeepSpeed, tensor and context parallelism, optimizers that step inside the backward pass;
            anything that :class:`~lightning_ire.IRE` refuses.

    Example:
        >>> from lightning_ire import IRE, SAM
        >>> from lightning_ire.integrations.transformers import attach
        >>> def train(trainer):  # a Trainer that already works
        ...     attach(trainer, IRE(kappa=2.0, gamma=0.6, start_step=0.1, perturbation=SAM(0.05)))
        ...     trainer.train()
    """
    return Attachment(trainer, ire, sharpness, probe)


class TransformersHost(AccelerateHost):
    """A Trainer's loop, see :class:`~lightning_ire.engine.host.Host`.

    Losses are those of the engine: means over a micro-batch, which the loop divides by their number. Where the Trainer
    divides by the number of items in all micro-batches, its loss is a part of a sum, and the engine's is that part
    times the number of micro-batches.

    Args:
        trainer: The Trainer.

    Attributes:
        scaled: Whether the Trainer's losses are such parts.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.accelerator)
        self.trainer = trainer
        self.scaled = False
        self._loss: Tensor | None = None

    @property
    def micro_batches(self) -> int:
        return self.trainer.current_gradient_accumulation_steps

    @property
    def will_log(self) -> bool:
        args, state = self.trainer.args, self.trainer.state
        if args.logging_strategy != "steps":
            return args.logging_strategy != "no"
        coming = state.global_step + 1
        return coming % state.logging_steps == 0 or (coming == 1 and args.logging_first_step)

    @property
    def what_steps(self) -> str:
        return f"`{type(self.trainer).__name__}.compute_loss`"

    def prepare(self, model: nn.Module) -> nn.Module:
        self._model = model
        module: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return module

    def of_the_engine(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch as the engine takes it.

        Args:
            loss: What `compute_loss` returned; kept for the backward pass.
        """
        self._loss = loss
        return loss * self.micro_batches if self.scaled and self.micro_batches > 1 else loss

    def backward(self, loss: Tensor) -> None:
        """As `Trainer.training_step`, to the bit, so of the very loss that `compute_loss` returned last."""
        own, self._loss = self._loss, None
        assert own is not None
        self.accelerator.backward(own if self.scaled else own / self.micro_batches)

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        return muted(self.trainer, "log")


class Attachment:
    """IRE, SAM and measurements in a Trainer; made by :func:`attach`.

    Attributes:
        step: The state of the run that is under way, or was last; ``None``: there was none.
        last: The last measurement of sharpness.
        probe: The batches that it was made on.
    """

    def __init__(
        self,
        trainer: Trainer,
        ire: Recipe | Perturbation | None,
        sharpness: SharpnessMonitor | None,
        probe: Sequence[Any] | None,
    ) -> None:
        self.recipe = _recipe(ire)
        self.sharpness = _monitor(sharpness)
        self._given = probe
        _check(trainer, self.recipe, self.sharpness, probe)
        self.step: LoopStep | None = None
        self.last: Measurement | None = None
        self._trainer = trainer
        self._host: TransformersHost
        self._callback = _Callback(self)
        self._always, self._in_training = Patches(), Patches()
        self.probe: list[Any] = []
        self._measured_at = self._epoch = -1
        self._checkpoint: str | None = None
        self._between()
        if self.idle:
            return
        if trainer in _ATTACHED:
            raise ConfigurationError(
                "Expected a Trainer to which nothing is attached yet, got one with an attachment: call `release()` of "
                "that one first."
            )
        _ATTACHED.add(trainer)
        trainer.add_callback(self._callback)
        original = trainer.train
        self._always.put(trainer, "train", lambda *args, **kwargs: self._train(original, *args, **kwargs))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: no boost, no perturbation, no measurement."""
        return self._plain and self.sharpness is None

    @property
    def _plain(self) -> bool:
        return not self.recipe.boosts and self.recipe.perturbation is None

    @property
    def logs(self) -> dict[str, Tensor]:
        """The values of the last step, by tag; norms of steps only where the Trainer was to log."""
        return {} if self.step is None else self.step.logs

    def state_dict(self) -> dict[str, Any]:
        """What is saved in checkpoints, see :meth:`~lightning_ire.IREStep.state_dict`; empty before training."""
        return {} if self.step is None else self.step.state_dict()

    def release(self) -> None:
        """Take everything off the Trainer."""
        self._end()
        self._always.remove()
        self._trainer.remove_callback(self._callback)
        _ATTACHED.discard(self._trainer)

    # A run

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        resume = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        self._checkpoint = get_last_checkpoint(self._trainer.args.output_dir) if resume is True else resume or None
        try:
            return original(*args, **kwargs)
        finally:
            self._end()

    def begin(self, loader: Any) -> None:
        """Training begins; model and optimizer are ready, and loaded where a run is resumed.

        Args:
            loader: The training loader.
        """
        self._end()
        trainer = self._trainer
        self._host = TransformersHost(trainer)  # a search for hyper-parameters makes another accelerator for each trial
        self._measured_at = self._epoch = -1
        if self.sharpness is not None:
            self.probe = list(self._given) if self._given is not None else self._drawn(loader, self.sharpness)
        if self._plain:
            return
        self.step = LoopStep(
            self.recipe, trainer.model_wrapped, trainer.optimizer, self._host, length=trainer.state.max_steps
        )
        self.step.progress.seed = trainer.args.seed
        self._load(self.step)
        self._warn_of_late_starts(self.step)
        self._host = self.step.host  # type: ignore[assignment]
        for name, replacement in (
            ("training_step", self._training_step),
            ("compute_loss", self._compute_loss),
            ("log", self._log),
            ("save_model", self._save_model),
        ):
            original = getattr(trainer, name)
            self._in_training.put(trainer, name, _bound(replacement, original))

    def _load(self, step: LoopStep) -> None:
        """Go on from a checkpoint; from one of a plain run with masks that begin anew."""
        step.progress.step = self._trainer.state.global_step
        if self._checkpoint is None:
            return
        path = Path(self._checkpoint) / STATE_FILE
        if path.is_file():
            step.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            warn_on_rank_zero(
                f"There is no {STATE_FILE} in {self._checkpoint}, which was saved without IRE or SAM: masks and "
                f"averages begin anew at step {step.progress.step}."
            )

    def _warn_of_late_starts(self, step: LoopStep) -> None:
        """Say so if the run is over before something starts."""
        total, epochs = self._trainer.state.max_steps, self._trainer.state.num_train_epochs
        parts = [("IRE", self.recipe.start)] if self.recipe.boosts and step.progress.started_at is None else []
        if self.recipe.perturbation is not None:
            parts.append((repr(self.recipe.perturbation), self.recipe.perturbation.start))
        for what, start in parts:
            if not start.immediate and start.never(total, epochs, start.first_step(total)):
                warn_on_rank_zero(
                    f"{what} starts at {start}, but the run ends before that ({epochs} epochs, {total} steps): lower "
                    "its `start_step` or `start_epoch`."
                )

    def _end(self) -> None:
        """Put moved weights back, and take the wrappers and hooks away."""
        self._in_training.remove()
        if self.step is not None:
            self.step.release()
        self._between()

    def _between(self) -> None:
        """No step is under way."""
        self._half_done = self._active = self._armed = self._inside = False
        self._output: Any = None

    def begin_epoch(self, epoch: float) -> None:
        """An epoch begins: what one that was cut short had accumulated is dropped.

        Args:
            epoch: Epochs so far.
        """
        self._between()
        # data without a length leave the Trainer's own number between two whole ones
        self._epoch = self._epoch + 1 if self._epoch >= 0 else int(epoch)
        if self.step is None:
            return
        self.step.engine.drop_window()
        self._host.epoch = self._epoch
        if self.step.progress.loss_count and epoch == int(epoch):  # saved after an epoch's last step, before its end
            self.step.end_epoch()

    def end_epoch(self) -> None:
        """An epoch is over: decide on a start by loss, and measure."""
        if self.step is not None and self.step.progress.waits_for_loss(self.recipe):
            self.step.end_epoch()
        every = None if self.sharpness is None else self.sharpness.every_n_epochs
        if every and (self._epoch + 1) % every == 0:
            self._measure()

    # A step

    def _training_step(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        step = self.step
        assert step is not None
        if not self._half_done:
            self._active = step.engine.switch_on()
        last = bool(self._trainer.accelerator.sync_gradients)
        self._inside, self._armed = True, self._active
        if self._active:
            step.engine.begin(self._loss_of)
        window = step.engine.window
        try:
            with self._host.no_sync() if last and window is not None and not window.synchronized else nullcontext():
                loss = original(*args, **kwargs)
            if self._armed:
                raise ConfigurationError(
                    f"Expected `{type(self._trainer).__name__}.training_step` to call `compute_loss`, got one that "
                    "does not: its passes could not be repeated; let it call `self.compute_loss`."
                )
            step.engine.after_backward()
            if last and window is not None:
                step.engine.finish_gradient(window.second_pass)
        except BaseException:
            step.engine.end()
            self._between()
            raise
        self._inside, self._half_done = False, not last
        if step.progress.waits_for_loss(self.recipe):
            parts = self._trainer.current_gradient_accumulation_steps
            step.progress.add_loss(loss * parts)
        return loss

    def _compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        step = self.step
        if not self._inside or step is None or not self._active:
            return original(model, inputs, *args, **kwargs)
        if not self._armed:
            raise ConfigurationError(
                f"Expected `{type(self._trainer).__name__}.training_step` to call `compute_loss` once, got a second "
                "call in the same step: let `compute_loss` return the whole loss."
            )
        self._armed = False
        self._host.scaled = self._scaled(args, kwargs)
        self._refuse_parts_of_a_sum()
        self._call = lambda batch: original(model, batch, *args, **kwargs)
        step.engine.forward(self._loss_of, inputs)
        step.engine.before_backward()
        output, self._output = self._output, None
        return output

    def _loss_of(self, inputs: Any) -> Tensor:
        """The loss of a micro-batch, for the engine."""
        output = self._call(copy.copy(inputs))  # `compute_loss` may take the labels out
        loss = loss_of(output[0] if isinstance(output, tuple) else output)
        assert loss is not None
        self._output = output
        return self._host.of_the_engine(loss)

    def _scaled(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the loss is divided by the number of items in all micro-batches, as `training_step` decides it.

        Args:
            args: What `compute_loss` got besides model and inputs: whether to return outputs, the number of items.
            kwargs: The same by name.
        """
        trainer = self._trainer
        known: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        items = kwargs.get("num_items_in_batch", next((one for one in args if not isinstance(one, bool)), None))
        return bool((trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None)

    def _refuse_parts_of_a_sum(self) -> None:
        perturbation = self.recipe.perturbation
        if self._host.scaled and perturbation is not None and perturbation.fraction < 1:
            raise ConfigurationError(
                f"Expected `fraction` 1 where the Trainer divides losses by the number of items in the batch, got "
                f"{perturbation.fraction:g}: the loss of a part of a batch would be too small; leave `fraction` out."
            )

    def after_step(self) -> None:
        """The optimizer has stepped, or a GradScaler has left the step out."""
        if self.step is None:
            return
        self.step.logs = dict(self.step.engine.take_logs(wanted=True))
        self.step.engine.end()
        self._half_done = False

    def _log(self, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        own = {tag: float(value) for tag, value in self.logs.items()} if "loss" in logs else {}
        original({**logs, **own}, *args, **kwargs)

    def _save_model(
        self, original: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint gets the state of IRE and SAM before the Trainer's own, which says that it is complete."""
        original(output_dir, *args, **kwargs)
        trainer = self._trainer
        name = Path(output_dir or trainer.args.output_dir).name
        if name != f"checkpoint-{trainer.state.global_step}" or trainer.args.save_only_model or self.step is None:
            return
        state = self.step.state_dict()
        if trainer.args.should_save:
            path = Path(str(output_dir)) / STATE_FILE
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)

    # Measurements

    def measure_if_due(self) -> None:
        """After an optimizer step."""
        every = None if self.sharpness is None else self.sharpness.every_n_steps
        if every and self._trainer.state.global_step % every == 0:
            self._measure()

    def _measure(self) -> None:
        trainer, monitor = self._trainer, self.sharpness
        assert monitor is not None
        if self._measured_at == trainer.state.global_step:
            return
        self._measured_at = trainer.state.global_step
        step = self.step
        follows = step is not None and self.recipe.kappa == AUTO and step.progress.started_at is not None
        wanted: Any = with_headroom(monitor.quantities) if follows else monitor.quantities
        host = TransformersHost(trainer)
        module = host.prepare(trainer.model_wrapped)
        accumulate, batch = trainer.args.gradient_accumulation_steps, trainer.args.train_batch_size * host.world_size
        size = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
        with _full_precision(trainer, module):
            self.last = monitor.last = measure_sharpness(
                module,
                lambda batch: self._loss_to_measure(module, batch),
                self.probe,
                wanted,
                optimizer=trainer.optimizer,
                step=step,
                host=host,
                hvp=monitor.hvp,
                seed=monitor.seed,
                **vars(monitor.settings(accumulate, train_size=size, train_batch=batch * accumulate)),
            )
        self.last.step = trainer.state.global_step
        if step is not None and tags.KAPPA_HEADROOM in self.last.values:
            step.note_headroom(self.last.values[tags.KAPPA_HEADROOM])
        if self.last.values:
            due = trainer.control.should_log
            trainer.log(dict(self.last.values))
            trainer.control.should_log = due  # of the Trainer's own row, which this one would take the place of

    def _loss_to_measure(self, module: nn.Module, batch: Any) -> Any:
        return self._trainer.compute_loss(module, send_to_device(copy.copy(batch), self._trainer.args.device))

    def _drawn(self, loader: Any, monitor: SharpnessMonitor) -> list[Any]:
        """A random part of the training set, another one on each process, the same for the same seed."""
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigurationError(_no_index(dataset))
        rank, size = self._host.rank, monitor.batch_size or self._trainer.args.train_batch_size
        parts = drawn_samples(len(dataset), size, monitor.num_batches, rank, self._host.world_size, monitor.seed)
        streams = seeded(monitor.seed + rank, devices_of(self._trainer.model))
        with kept(dataset, loader.collate_fn, leave=(Trainer,)), streams:
            return [loader.collate_fn([dataset[index] for index in part]) for part in parts]


class _Callback(TrainerCallback):
    """What the Trainer tells its callbacks."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.begin(kwargs["train_dataloader"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.begin_epoch(state.epoch or 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.after_step()
        self._attachment.measure_if_due()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attachment.end_epoch()


def _bound(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: replacement(original, *args, **kwargs)


@contextmanager
def _full_precision(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Inside the block the model computes in its weights' own precision, without the autocast of `prepare`."""
    before: dict[str, Any] = {
        name: vars(module)[name] for name in ("forward", "_original_forward") if name in vars(module)
    }
    trainer.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    try:
        yield
    finally:
        vars(module).update(before)


def _recipe(ire: Any) -> Recipe:
    if ire is None or isinstance(ire, Perturbation):
        return Recipe(kappa=0.0, perturbation=ire)
    if not isinstance(ire, Recipe):
        raise ConfigurationError(
            f"Expected `attach(trainer, IRE(...))` or a perturbation such as SAM(0.05), got {type(ire).__name__}."
        )
    if getattr(ire, "dry_run", False):
        raise ConfigurationError(
            "Expected IRE without `dry_run` in transformers' Trainer, got dry_run=True: leave it out, and make a table "
            "of the first mask with `IREStep(...).preview(loss_of, batch)`."
        )
    return ire


def _monitor(sharpness: Any) -> SharpnessMonitor | None:
    if sharpness is None:
        return None
    from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor  # which loads Lightning

    if not isinstance(sharpness, SharpnessMonitor):
        raise ConfigurationError(
            f"Expected `sharpness` to be a SharpnessMonitor(every_n_steps=100), got {type(sharpness).__name__}."
        )
    return None if sharpness.idle else sharpness


def _check(trainer: Any, recipe: Recipe, sharpness: SharpnessMonitor | None, probe: Sequence[Any] | None) -> None:
    """Refuse, before any compute, what cannot be done right."""
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"Expected a `transformers.Trainer`, got {type(trainer).__name__}: Lightning's takes callbacks "
            "(`Trainer(callbacks=[IRE(...)])`)."
        )
    active = recipe.boosts or recipe.perturbation is not None
    if active or sharpness is not None:
        check_accelerator(trainer.accelerator)
    if active:
        recipe.check_start()
        args = trainer.args
        what = ""
        if args.n_gpu > 1:
            what = (
                f"DataParallel over {args.n_gpu} GPUs: launch with `torchrun --nproc-per-node {args.n_gpu}`, or show "
            )
            what += "one GPU (CUDA_VISIBLE_DEVICES=0)"
        elif "lomo" in str(args.optim).lower() or "layerwise" in str(args.optim).lower():
            what = (
                f"`optim` {getattr(args.optim, 'value', args.optim)}, which steps inside the backward pass: set another"
            )
        elif getattr(trainer, "is_distributed_loading_by_transformers", False):
            what = "a model that is sharded while it is loaded: load it whole, and use DDP"
        if what:
            raise ConfigurationError(f"Expected one device or DDP, with an optimizer that steps by itself, got {what}.")
    if recipe.kappa == AUTO and not (sharpness and {"stability", "kappa_headroom"} & set(sharpness.quantities)):
        raise ConfigurationError(
            "Expected a measurement of the stability beside `kappa='auto'`, got none: add "
            "`sharpness=SharpnessMonitor(every_n_steps=100, quantities=['stability'])`, or set `kappa` to a number."
        )
    if probe is not None and not (isinstance(probe, Sequence) and len(probe)):
        got = "none" if isinstance(probe, Sequence) else type(probe).__name__
        raise ConfigurationError(f"Expected `probe` to be a list of at least one batch, got {got}.")
    if probe is not None and sharpness is None:
        raise ConfigurationError("Expected `sharpness` beside `probe`, got none: add a SharpnessMonitor(...).")
    if sharpness is not None and probe is None and isinstance(trainer.train_dataset, IterableDataset):
        raise ConfigurationError(_no_index(trainer.train_dataset))


def _no_index(dataset: Any) -> str:
    return (
        "Expected a training set with an index to draw the batches from that sharpness is measured on, got "
        f"{type(dataset).__name__}: give `attach` some as `probe=[...]`, as the collator makes them."
    )
