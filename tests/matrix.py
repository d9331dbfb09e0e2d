"""The parity matrix: what a Trainer and a module can do, one row each, and how two runs are recorded and compared.

`ROWS` is the table that tests/test_matrix.py runs; `COMPATIBILITY` is what users are told, one line per feature.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ire import IRE, SAM, SampledFisher, tags

OUR_TAGS = frozenset((*tags.IRE_TAGS, *tags.SAM_TAGS))
EPOCHS, BATCH = 2, 8
SAMPLES = 44  # six batches, the last one short

# Recording


def digest(tensors: Sequence[Tensor | None]) -> str:
    """A name for the exact bits of some tensors."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is None:
            total.update(b"none")
            continue
        dense = tensor.detach().to_dense().contiguous().reshape(-1)
        total.update(str((tensor.dtype, tuple(tensor.shape), tensor.layout)).encode())
        total.update(dense.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def hooks_of(owner: type) -> list[str]:
    """Names of the hooks a user can override, without those whose override alone changes what Lightning does."""
    names = [name for name in dir(owner) if name.startswith("on_") and callable(getattr(owner, name))]
    return [name for name in names if "_model_" not in name and name != "on_gpu"]


def noting(owner: type) -> Callable[[type], type]:
    """Give a class all hooks of `owner`; each is noted and then does what it does without the note."""

    def decorate(cls: type) -> type:
        def make(name: str) -> Callable[..., Any]:
            def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
                self.note(name, *args)
                return getattr(super(cls, self), name)(*args, **kwargs)

            return hook

        for name in hooks_of(owner):
            if name not in vars(cls):
                setattr(cls, name, make(name))
        return cls

    return decorate


@noting(pl.Callback)
class Recorder(pl.Callback):
    """Notes every hook of callbacks and of the module in one list, and the state of the run at some of them."""

    LOOKS = frozenset(
        {"on_before_zero_grad", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_end"}
    )

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.trace: list[tuple[str, dict[str, Any]]] = []
        self.backward_passes = 0

    def note(self, name: str, trainer: pl.Trainer, *args: Any) -> None:
        self.events.append((f"callback.{name}", trainer.global_step))
        self.backward_passes += name == "on_after_backward"
        if name in self.LOOKS:
            self.trace.append((name, self.look(trainer)))

    @staticmethod
    def look(trainer: pl.Trainer) -> dict[str, Any]:
        module = trainer.lightning_module
        return {
            "weights": digest(list(module.parameters())),
            "gradients": digest([parameter.grad for parameter in module.parameters()]),
            "buffers": digest(list(module.buffers())),
            "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            "random": random_streams(),
        }


def random_streams() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
    return {
        "torch": digest([torch.get_rng_state()]),
        "numpy": (hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest(), *rest),
        "python": hash(random.getstate()),
    }


class Rows(Logger):
    """A logger that keeps what it is given."""

    name = "rows"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


# The user's module


@noting(pl.LightningModule)
class Subject(pl.LightningModule):
    """A user's module that does a lot: BatchNorm, dropout, own buffers and draws, metrics, several logged values."""

    recorder: Recorder | None = None

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = cases.sgd,
        scheduler: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if net is None:
            net = cases.Net(batch_norm=True, dropout=0.3)
            net[1].momentum = None  # a cumulative average: counts the batches itself
        self.net = net
        self.register_buffer("memory", torch.zeros(FEATURES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.training_steps = self.backward_passes = 0

    @torch.compiler.disable
    def note(self, name: str, *args: Any) -> None:
        self.training_steps += name == "training_step"
        self.backward_passes += name == "backward"
        if self.recorder is not None and self._trainer is not None:
            self.recorder.events.append((f"module.{name}", self._trainer.global_step))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("training_step")
        return self.step(batch, batch_idx)

    def step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.memory = 0.9 * self.memory + 0.1 * x.mean(0)  # a buffer that is replaced, not changed in place
        noise = torch.randn_like(x) + float(np.random.normal()) + random.gauss(0, 1)
        logits = self.logits(x + 0.01 * noise)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "double": 2 * loss}, on_step=False, on_epoch=True)
        self.log("sum", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.logits(batch[0]), batch[1]))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.note("backward")
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


# One run, and everything that can be seen of it


class Counted(SampledFisher):
    """Counts the estimates that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.made = 0

    def begin(self, window: Any) -> Any:
        self.begun += 1
        estimate = super().begin(window)
        finish = estimate.finish

        def counted() -> Any:
            values = finish()
            self.made += values is not None
            return values

        estimate.finish = counted  # type: ignore[method-assign]
        return estimate


def forced() -> IRE:
    return IRE(kappa=0.0, perturbation=SAM(0.0))


def estimated() -> IRE:
    return IRE(kappa=5.0, interval=2, exclude="*", curvature=Counted())


@dataclass(frozen=True)
class Row:
    """One feature in one setting.

    Attributes:
        id: Name of the test.
        feature: The line of `COMPATIBILITY` that it stands for.
        module: Makes the user's module.
        trainer: Makes the Trainer's arguments.
        callbacks: Makes other callbacks, given the run's folder.
        train: Makes the training loader, given the module.
        fit: Runs the training.
        estimates: Whether the run with estimates makes sense; else why not.
        made: Whether an estimate can be had at all (not so when every step overflows).
        dropped: Micro-batches that Lightning back-propagates and then drops, as the epoch ends before their step.
        leave_out: Parts of the record that cannot be equal, with the reason.
        slow: Whether the row takes seconds.
        refused: What the one line says with which a second pass is refused.
        warns: What our warning says in the run with estimates; all other warnings of ours fail the test.
    """

    id: str
    feature: str
    module: Callable[[], pl.LightningModule] = Subject
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[Path], list[pl.Callback]] = lambda folder: []
    train: Callable[[Any], Any] = lambda module: loader()
    fit: Callable[[pl.Trainer, Any, Any], None] = lambda trainer, module, loaders: trainer.fit(module, *loaders)
    estimates: bool | str = True
    made: bool = True
    dropped: int = 0
    leave_out: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    refused: str = ""
    warns: str = ""


def loader(samples: int = SAMPLES, seed: int = 1, batch_size: int = BATCH, shuffle: bool = True) -> DataLoader:
    return DataLoader(cases.data(samples, seed=seed), batch_size=batch_size, shuffle=shuffle)


@dataclass
class Record:
    """What was seen of a run: `parts` are compared, the rest is counted."""

    parts: dict[str, Any]
    training_steps: int
    backward_passes: int
    back_propagated: int
    steps: int


def run(row: Row, ire: IRE | None, folder: Path, last: bool = False) -> Record:
    """Train once from fixed random states.

    Args:
        row: What to run.
        ire: The callback; ``None``: plain Lightning.
        folder: Where files go.
        last: Whether the callback comes after all others.
    """
    seed_all(5)
    made = row.module()
    module: Subject = getattr(made, "_orig_mod", made)
    recorder, logger = Recorder(), Rows()
    module.recorder = recorder
    ours = [] if ire is None else [ire]
    others = [recorder, *row.callbacks(folder)]
    arguments: dict[str, Any] = {"max_epochs": EPOCHS, "logger": logger, "default_root_dir": folder}
    arguments |= row.trainer()
    bare = arguments.get("barebones", False)
    if bare:
        arguments = {"accelerator": "cpu", "devices": 1, **arguments, "logger": None}
        trainer = pl.Trainer(callbacks=[*others, *ours] if last else [*ours, *others], **arguments)
    else:
        trainer = cases.trainer([*others, *ours] if last else [*ours, *others], **arguments)
    steps = 0

    def count(*args: Any) -> None:
        nonlocal steps
        steps += 1

    make_optimizer = module.configure_optimizers

    def configure_optimizers() -> Any:
        made = make_optimizer()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        optimizer.register_step_post_hook(count)
        return made

    module.configure_optimizers = configure_optimizers
    seed_all(3)
    loaders = (row.train(module), None if bare else loader(16, seed=2, shuffle=False))
    row.fit(trainer, made, loaders)
    streams = random_streams()
    path = folder / "end.ckpt"
    trainer.save_checkpoint(path)
    parts = {
        "weights and buffers": {name: value.clone() for name, value in module.state_dict().items()},
        "all tensors": {name: value.clone() for name, value in (*module.named_parameters(), *module.named_buffers())},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "modes": {name: child.training for name, child in module.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [
            {k: v for k, v in vars(c.scheduler).items() if isinstance(v, (int, float, list))}
            for c in trainer.lr_scheduler_configs
        ],
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "steps": steps,
        "events": without_extra_passes(recorder.events),
        "trace": recorder.trace,
        "rows": logged_rows(logger),
        "callback_metrics": without_ours(trainer.callback_metrics),
        "logged_metrics": without_ours(trainer.logged_metrics),
        "progress_bar_metrics": without_ours(trainer.progress_bar_metrics),
        "metric": {} if not hasattr(module, "accuracy") else dict(module.accuracy.metric_state),
        "files": {
            str(file.relative_to(folder)): checkpoint_contents(file, folder) for file in sorted(folder.rglob("*.ckpt"))
        },
        "random": streams,
        "profile": profile(trainer),
        "attribute values": {name: getattr(module, name, None) for name in ("lr", "batch_size")},
    }
    return Record(
        parts,
        training_steps=module.training_steps,
        backward_passes=module.backward_passes,
        back_propagated=recorder.backward_passes,
        steps=steps,
    )


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def without_extra_passes(events: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Events without the `training_step` and `backward` calls of extra passes, which no hook announces."""
    kept: list[tuple[str, int]] = []
    stepped = False
    for event in events:
        if event[0] == "callback.on_train_batch_start":
            stepped = False
        if event[0] == "module.training_step":
            if stepped:
                continue
            stepped = True
        if event[0] == "module.backward" and kept[-1][0] != "module.on_before_backward":
            continue
        kept.append(event)
    return kept


def without_ours(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in OUR_TAGS}


def logged_rows(logger: Rows) -> list[tuple[int | None, dict[str, float]]]:
    works_first = sorted(COMPATIBILITY, key=lambda row: row[1] == "refused")
    rows = [f"| {feature} | {verdict} | {note} |" for feature, verdict, note in works_first]
    return "\n".join(["| feature | | |", "| --- | --- | --- |", *rows])
