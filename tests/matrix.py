"""The parity matrix: what a Trainer and a module can do, one row each, and how two runs are recorded and compared.

`ROWS` is the table that tests/test_matrix.py runs; `COMPATIBILITY` is what users are told, one line per feature.
"""

import hashlib
import random
import re
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

MONITOR_TAGS = (*tags.SHARPNESS_TAGS, *tags.STABILITY_TAGS)
DETAILS = ("", tags.STDERR, tags.RESIDUAL, tags.CONVERGED)
OUR_TAGS = frozenset((*tags.IRE_TAGS, *tags.SAM_TAGS, *(tag + detail for tag in MONITOR_TAGS for detail in DETAILS)))
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


def run(row: Row, ire: pl.Callback | None, folder: Path, last: bool = False) -> Record:
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
    figures = (tags.DENSITY, tags.LAYERS)  # their numbers
    return {name: value for name, value in metrics.items() if name not in OUR_TAGS and not name.startswith(figures)}


def logged_rows(logger: Rows) -> list[tuple[int | None, dict[str, float]]]:
    rows = [(step, without_ours(metrics)) for step, metrics in logger.rows]
    return [(step, metrics) for step, metrics in rows if set(metrics) - {"epoch"}]


def checkpoint_contents(file: Path, folder: Path) -> Any:
    contents = torch.load(file, weights_only=True)
    contents["callbacks"] = {
        key: value for key, value in contents.get("callbacks", {}).items() if not key.startswith("IRE")
    }
    return without_folder(contents, str(folder))


def without_folder(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(folder, "FOLDER")
    if isinstance(value, dict):
        return {without_folder(key, folder): without_folder(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folder(item, folder) for item in value]
    return value


def profile(trainer: pl.Trainer) -> dict[str, int]:
    """How often which action ran, without those of our callback."""
    durations = getattr(trainer.profiler, "recorded_durations", {})
    ours = re.compile(r"\[Callback\](IRE|Monitored)\b")
    counts = {name: len(times) for name, times in durations.items() if not ours.search(name)}
    return {name.replace(trainer.default_root_dir, "FOLDER"): count for name, count in counts.items()}


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, to the last bit of every tensor and number."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if digest([first]) != digest([second]):
            yield f"{path}: {first} != {second}"
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        if list(first) != list(second):
            yield f"{path}: keys {list(first)} != {list(second)}"
            return
        for key in first:
            yield from differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple, cases.Notes)) and isinstance(second, (list, tuple, cases.Notes)):
        for index, pair in enumerate(zip(first, second, strict=False)):
            yield from differences(*pair, f"{path}[{index}]")
        if len(first) != len(second):
            yield f"{path}: length {len(first)} != {len(second)}"
    elif isinstance(first, float) and isinstance(second, float):
        if first != second and not (first != first and second != second):
            yield f"{path}: {first!r} != {second!r}"
    elif type(first) is not type(second) or first != second:
        yield f"{path}: {first!r} != {second!r}"


# Modules of single rows


def scheduled(**settings: Any) -> Callable[[], Subject]:
    make = settings.pop("make")
    return lambda: Subject(scheduler=lambda optimizer: {"scheduler": make(optimizer), **settings})


def adamw(**settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, **settings)


def optimized(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[], Subject]:
    return lambda: Subject(optimizer=optimizer)


def with_net(make: Callable[[], nn.Module], **settings: Any) -> Callable[[], Subject]:
    return lambda: Subject(make(), **settings)


class OwnClipping(Subject):
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.note("configure_gradient_clipping")
        for parameter in self.parameters():
            nn.utils.clip_grad_norm_(parameter, 0.05 if self.trainer.global_step % 2 else 0.1)
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="value")


class OwnSchedulerStep(Subject):
    def __init__(self) -> None:
        super().__init__(scheduler=lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.note("lr_scheduler_step")
        if self.trainer.global_step % 3 == 0:
            scheduler.step()


class Halving:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self, epoch: int | None = None) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class OwnScheduler(Subject):
    def __init__(self) -> None:
        super().__init__(scheduler=lambda optimizer: {"scheduler": Halving(optimizer), "interval": "step"})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


class DictOutput(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        return {"loss": loss, "extra": loss.detach() * 2, "names": ["a", "b"]}


class SomeNone(Subject):
    skipped = (1, 4)

    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss


class LastNone(SomeNone):
    skipped = (3, 5)  # the last of each window of four


class OneArgument(Subject):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        self.note("training_step")
        return self.step(batch, 0)


class DictBatches(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        return super().step((batch["nested"]["x"], batch["y"][0]), batch_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.trainer.training:
            return batch
        return {"nested": {"x": batch[0] + 0.01 * torch.randn_like(batch[0])}, "y": [batch[1]]}


class TwoLoaders(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        first, second = batch
        return super().step((torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), batch_idx)


class WarmUpByHand(Subject):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.note("optimizer_step")
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class EverySecond(Subject):
    """As in Lightning's documentation: the closure runs at every batch, the step at every second."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class AccumulatesByHand(EverySecond):
    """The gradients of two batches are added up, without the Trainer knowing."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class ClosureFirst(Subject):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.grad *= 0.5
        optimizer.step()


class OwnBackward(Subject):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.note("backward")
        (0.5 * loss + 1e-3 * sum(p.square().sum() for p in self.parameters())).backward()


class OwnZeroGrad(Subject):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.note("optimizer_zero_grad")
        optimizer.zero_grad(set_to_none=False)


class EditsBeforeStep(Subject):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note("on_before_optimizer_step")
        for parameter in self.parameters():
            parameter.grad.add_(0.01 * torch.randn_like(parameter.grad)).clamp_(-0.1, 0.1)


class LooksBeforeZeroGrad(Subject):
    """Sees the gradients of the step before."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note("on_before_zero_grad")
        gradient = self.net[0].weight.grad
        self.log("seen", (0.0 if gradient is None else gradient.norm()) + torch.rand(()))


class LooksAroundBackward(Subject):
    def on_before_backward(self, loss: Tensor) -> None:
        self.note("on_before_backward")
        self.log("seen_before", float(loss.detach()) + random.random())

    def on_after_backward(self) -> None:
        self.note("on_after_backward")
        norms = torch.stack([parameter.grad.norm() for parameter in self.parameters()])
        self.log("seen_after", norms.max() + np.random.random())


class EditsAfterBackward(Subject):
    def on_after_backward(self) -> None:
        self.note("on_after_backward")
        for parameter in self.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


class GradientHooks(Subject):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.1)
        self.net[0].register_full_backward_hook(lambda module, inward, outward: None)


class StopsTheEpoch(Subject):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # type: ignore[override]
        self.note("on_train_batch_start")
        return -1 if batch_idx == 3 else None


class Tuned(Subject):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9))
        self.lr, self.batch_size = 0.05, 4

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)


class FindsTwice(LearningRateFinder):
    """Lightning's documentation calls it FineTuneLearningRateFinder."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=8, early_stop_threshold=None)

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 1):
            self.lr_find(trainer, pl_module)


class Checkpointed(nn.Module):
    """Part of the network keeps no activations; with random layers and BatchNorm inside."""

    def __init__(self, reentrant: bool, batch_norm: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 8)
        self.middle = nn.Sequential(nn.BatchNorm1d(8) if batch_norm else nn.Identity(), nn.Tanh(), nn.Dropout(0.2))
        self.tail = nn.Linear(8, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(checkpoint(self.middle, self.head(x), use_reentrant=self.reentrant))


class Child(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.seen = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.layer(batch[0])
        self.seen(logits, batch[1])
        loss = F.cross_entropy(logits, batch[1])
        self.log("child/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"child/seen": self.seen})
        self.log("child/sum", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss


class Parent(Subject):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.child.log = self.log  # Lightning refuses a child's own, which no hook of the Trainer manages

    def step(self, batch: Any, batch_idx: int) -> Any:
        return super().step(batch, batch_idx) + self.child.training_step(batch, batch_idx)


class Odd(nn.Module):
    """Frozen, unused, tied and scalar parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.half_frozen = nn.Linear(FEATURES, FEATURES)
        self.half_frozen.bias.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(FEATURES, FEATURES, bias=False)
        self.twin = nn.Linear(FEATURES, FEATURES)
        self.twin.weight = self.tied.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.sometimes = nn.Linear(FEATURES, FEATURES)
        self.empty = nn.Parameter(torch.zeros(0))
        self.tail = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.half_frozen(self.frozen(x)).tanh()
        x = self.twin(self.tied(x).tanh()) * self.scale
        return self.tail(self.sometimes(x) if float(x.detach().sum()) > 0 else x)


class Words(nn.Module):
    """An embedding with sparse gradients, one row used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(20, 8, sparse=True, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x.abs() * 5).long().clamp(max=19))[:, :CLASSES]


def parametrized() -> nn.Module:
    normed = parametrizations.weight_norm(nn.Linear(FEATURES, 8))
    orthogonal = parametrizations.orthogonal(nn.Linear(8, 8))
    return nn.Sequential(normed, orthogonal, nn.Tanh(), nn.Linear(8, CLASSES))


def spectral() -> nn.Module:
    """Its buffers change at every forward pass, and what it computes depends on them."""
    return nn.Sequential(nn.Linear(FEATURES, 8), parametrizations.spectral_norm(nn.Linear(8, CLASSES)))


class LogsFromOutside(Subject):
    """The bound method `self.log` was handed to something that is no LightningModule."""

    class Reporter:
        def __init__(self, log: Callable[..., None]) -> None:
            self.log = log

        def report(self, loss: Tensor) -> None:
            self.log("reported", loss.detach() + 1, on_step=False, on_epoch=True, reduce_fx="sum")

    def __init__(self) -> None:
        super().__init__()
        self.reporter = self.Reporter(self.log)

    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        self.reporter.report(loss)
        return loss


class GradientPenalty(Subject):
    """Differentiates twice inside the step."""

    def step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.logits(x).sum(), x, create_graph=True)
        return super().step(batch, batch_idx) + 0.1 * slope.square().mean()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.count = base, 0
        super().__init__([p for group in base.param_groups for p in group["params"]], {"lr": 0.1})
        self.param_groups = base.param_groups
        self.slow = [parameter.detach().clone() for parameter in base.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)
        return loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 8, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.tail = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.attention(self.lstm(x.view(len(x), 3, 2))[0])[:, -1])


class Groups(Subject):
    """Only some parameters are optimized, with different settings."""

    def __init__(self) -> None:
        super().__init__(
            optimizer=lambda module: torch.optim.AdamW(
                [
                    {"params": [module.net[0].weight], "lr": 0.01, "weight_decay": 0.1},
                    {"params": [module.net[0].bias], "lr": 0.0},
                    {"params": module.net[1].parameters(), "amsgrad": True},
                ]
            )
        )


class Backbone(Subject):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
        self.backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES))

    def logits(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from (cases.data(28)[index] for index in range(28))


class ToCompile(Subject):
    """What torch.compile can take whole: no draws outside of torch, no metric object."""

    def step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.logits(batch[0]), batch[1], label_smoothing=0.1)


class ToCompileLogging(ToCompile):
    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def compiled(backend: str, what: str) -> Callable[[], Any]:
    def make() -> Any:
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        if what == "part":
            return Subject(torch.compile(net, backend=backend))  # type: ignore[arg-type]
        return torch.compile(ToCompile(net) if what == "module" else ToCompileLogging(net), backend=backend)

    return make


def fp16(scale: float, **settings: Any) -> Callable[[], dict[str, Any]]:
    """16-mixed on the CPU, from a given loss scale on."""

    def make() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **settings}

    return make


NORMAL, OVERFLOWS, HOPELESS = 2.0**10, 2.0**22, 2.0**126


def tune(method: str, **settings: Any) -> Callable[[pl.Trainer, Any, Any], None]:
    """Run the Tuner, then train."""

    def fit(trainer: pl.Trainer, module: Any, loaders: Any) -> None:
        getattr(Tuner(trainer), method)(module, val_dataloaders=loaders[1], **settings)
        trainer.fit(module, val_dataloaders=loaders[1])

    return fit


def from_module(trainer: pl.Trainer, module: Any, loaders: Any) -> None:
    trainer.fit(module, val_dataloaders=loaders[1])


def saver(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder / "saved", **settings)


# The table

STEP, EPOCH = {"interval": "step"}, {"interval": "epoch"}

ROWS: list[Row] = [
    Row("plain", "a plain fit with validation"),
    # clipping and accumulation
    Row("clip-norm", "gradient clipping by norm", trainer=lambda: {"gradient_clip_val": 0.1}),
    Row(
        "clip-value",
        "gradient clipping by value",
        trainer=lambda: {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ),
    Row("clip-own", "configure_gradient_clipping overridden", OwnClipping, lambda: {"gradient_clip_val": 0.05}),
    Row("accumulate", "gradient accumulation", trainer=lambda: {"accumulate_grad_batches": 4}),
    Row(
        "accumulate-clip",
        "gradient accumulation",
        trainer=lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "max_epochs": 3},
    ),
    Row(
        "accumulate-schedule",
        "GradientAccumulationScheduler",
        trainer=lambda: {"max_epochs": 3},
        callbacks=lambda folder: [GradientAccumulationScheduler({0: 1, 1: 4, 2: 5})],
    ),
    # schedulers
    Row(
        "schedule-step",
        "learning-rate schedulers per step",
        scheduled(make=lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12), **STEP),
        warns="still warms up",
    ),
    Row(
        "schedule-step-accumulate",
        "learning-rate schedulers per step",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.7), frequency=2, **STEP),
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
    ),
    Row(
        "schedule-epoch",
        "learning-rate schedulers per epoch",
        scheduled(make=lambda o: lr_scheduler.StepLR(o, 1, 0.5), frequency=2, **EPOCH),
        lambda: {"max_epochs": 5, "limit_train_batches": 3},
    ),
    Row(
        "schedule-plateau",
        "ReduceLROnPlateau",
        scheduled(
            make=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0), monitor="val_loss", **EPOCH
        ),
        lambda: {"max_epochs": 4},
    ),
    Row(
        "schedule-plateau-step",
        "ReduceLROnPlateau",
        scheduled(
            make=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, threshold=0.5),
            monitor="loss",
            **STEP,
        ),
        lambda: {"accumulate_grad_batches": 2},
    ),
    Row("schedule-own-step", "lr_scheduler_step overridden", OwnSchedulerStep),
    Row("schedule-own-class", "a scheduler that is not torch's", OwnScheduler),
    # precision
    Row("bf16-mixed", "precision bf16-mixed", trainer=lambda: {"precision": "bf16-mixed"}),
    Row(
        "bf16-mixed-accumulate-clip",
        "precision bf16-mixed",
        trainer=lambda: {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
    ),
    Row("bf16-true", "precision bf16-true", trainer=lambda: {"precision": "bf16-true"}),
    Row("16-true", "precision 16-true", trainer=lambda: {"precision": "16-true"}),
    Row("64-true", "precision 64-true", trainer=lambda: {"precision": "64-true"}),
    Row("16-mixed", "precision 16-mixed (GradScaler)", trainer=fp16(NORMAL)),
    Row("16-mixed-overflow", "precision 16-mixed, overflowing steps", trainer=fp16(OVERFLOWS, max_epochs=3)),
    Row("16-mixed-hopeless", "precision 16-mixed, overflowing steps", trainer=fp16(HOPELESS), made=False),
    Row(
        "16-mixed-accumulate-clip",
        "precision 16-mixed (GradScaler)",
        trainer=fp16(OVERFLOWS, accumulate_grad_batches=4, gradient_clip_val=0.1, max_epochs=5),
    ),
    Row("16-mixed-none", "precision 16-mixed, steps without a loss", SomeNone, fp16(NORMAL)),
    Row(
        "16-mixed-none-last",
        "precision 16-mixed, steps without a loss",
        LastNone,
        fp16(NORMAL, accumulate_grad_batches=4),
    ),
    Row("16-mixed-fused", "precision 16-mixed with a fused optimizer", optimized(adamw(fused=True)), fp16(OVERFLOWS)),
    Row(
        "16-mixed-epoch",
        "precision 16-mixed (GradScaler)",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.7), **STEP),
        fp16(OVERFLOWS),
    ),
    # batches and outputs of training_step
    Row("dict-output", "training_step returning a dict", DictOutput),
    Row("dict-output-accumulate", "training_step returning a dict", DictOutput, lambda: {"accumulate_grad_batches": 4}),
    Row("none-output", "training_step returning None at times", SomeNone),
    Row(
        "none-output-accumulate",
        "training_step returning None at times",
        SomeNone,
        lambda: {"accumulate_grad_batches": 4},
    ),
    Row("none-output-last", "training_step returning None at times", LastNone, lambda: {"accumulate_grad_batches": 4}),
    Row("one-argument", "training_step(batch) without batch_idx", OneArgument),
    Row("dict-batches", "batches of any structure, changed by the transfer hooks", DictBatches),
    Row(
        "two-loaders",
        "several training loaders (CombinedLoader)",
        TwoLoaders,
        train=lambda module: CombinedLoader([loader(), loader(30, seed=4)], "max_size_cycle"),
    ),
    Row(
        "stream",
        "training data without a length (IterableDataset)",
        trainer=lambda: {"accumulate_grad_batches": 3},
        train=lambda module: DataLoader(Stream(), batch_size=BATCH),
    ),
    # overridden hooks
    Row("own-optimizer-step", "optimizer_step overridden (warm-up by hand)", WarmUpByHand),
    Row(
        "own-optimizer-step-closure",
        "optimizer_step overridden (a step at every second batch)",
        EverySecond,
    ),
    Row(
        "own-accumulation",
        "optimizer_step and optimizer_zero_grad overridden to accumulate by hand",
        AccumulatesByHand,
    ),
    Row("own-closure-first", "optimizer_step overridden (runs the closure before the step)", ClosureFirst),
    Row("own-backward", "backward overridden", OwnBackward),
    Row("own-zero-grad", "optimizer_zero_grad overridden", OwnZeroGrad),
    Row("own-zero-grad-odd", "optimizer_zero_grad overridden", lambda: OwnZeroGrad(Odd())),
    Row("edits-before-step", "on_before_optimizer_step overridden (edits gradients)", EditsBeforeStep),
    Row(
        "edits-before-step-16",
        "on_before_optimizer_step overridden (edits gradients)",
        EditsBeforeStep,
        fp16(NORMAL, gradient_clip_val=0.1),
    ),
    Row("looks-before-zero-grad", "on_before_zero_grad overridden", LooksBeforeZeroGrad),
    Row(
        "looks-around-backward", "on_before_backward and on_after_backward overridden (read only)", LooksAroundBackward
    ),
    Row(
        "edits-after-backward",
        "on_after_backward overridden (edits gradients)",
        EditsAfterBackward,
        refused="on_after_backward",
    ),
    Row("gradient-hooks", "hooks on parameters and modules (register_hook, ...)", GradientHooks),
    Row(
        "stops-the-epoch",
        "on_train_batch_start returning -1",
        StopsTheEpoch,
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
        dropped=3,
    ),
    # callbacks
    Row(
        "checkpoint-steps",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True},
        callbacks=lambda folder: [saver(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)],
    ),
    Row(
        "checkpoint-steps-accumulate",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True, "accumulate_grad_batches": 4, "max_epochs": 3},
        callbacks=lambda folder: [saver(folder, every_n_train_steps=3, save_top_k=-1)],
    ),
    Row(
        "checkpoint-monitor",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True, "max_epochs": 3},
        callbacks=lambda folder: [
            saver(folder, monitor="val_loss", filename="{epoch}-{val_loss:.6f}", save_last=True),
            saver(folder, monitor="double", filename="b-{step}-{double:.6f}", save_on_train_epoch_end=True),
        ],
    ),
    Row(
        "early-stopping",
        "EarlyStopping",
        trainer=lambda: {"max_epochs": 6},
        callbacks=lambda folder: [EarlyStopping("val_loss", min_delta=10.0, patience=2)],
    ),
    Row(
        "lr-monitor",
        "LearningRateMonitor",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **STEP),
        callbacks=lambda folder: [LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)],
    ),
    Row(
        "weight-averaging",
        "WeightAveraging and EMAWeightAveraging",
        callbacks=lambda folder: [WeightAveraging()],
    ),
    Row(
        "ema",
        "WeightAveraging and EMAWeightAveraging",
        trainer=lambda: {"accumulate_grad_batches": 2, "enable_checkpointing": True},
        callbacks=lambda folder: [
            EMAWeightAveraging(decay=0.9, update_every_n_steps=2),
            saver(folder, every_n_train_steps=2, save_top_k=-1),
        ],
    ),
    Row(
        "swa",
        "StochasticWeightAveraging",
        trainer=lambda: {"max_epochs": 4},
        callbacks=lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=2)],
    ),
    Row(
        "swa-accumulate",
        "StochasticWeightAveraging",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **EPOCH),
        lambda: {"max_epochs": 4, "accumulate_grad_batches": 4},
        callbacks=lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=0.5)],
    ),
    Row(
        "lr-finder",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        callbacks=lambda folder: [LearningRateFinder(num_training_steps=8, early_stop_threshold=None)],
        fit=from_module,
    ),
    Row(
        "lr-finder-in-between",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        callbacks=lambda folder: [FindsTwice()],
        fit=from_module,
    ),
    Row(
        "tuner-lr",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        fit=tune("lr_find", num_training=8, early_stop_threshold=None),
    ),
    Row(
        "batch-size-finder",
        "BatchSizeFinder and Tuner.scale_batch_size",
        Tuned,
        callbacks=lambda folder: [BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=4)],
        fit=from_module,
    ),
    Row(
        "tuner-batch-size",
        "BatchSizeFinder and Tuner.scale_batch_size",
        Tuned,
        fit=tune("scale_batch_size", max_trials=2, steps_per_trial=2, init_val=4, mode="binsearch"),
        slow=True,
    ),
    Row(
        "finetuning",
        "BackboneFinetuning (parameters that join later)",
        Backbone,
        lambda: {"max_epochs": 4},
        callbacks=lambda folder: [BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)],
    ),
    Row("profiler-simple", "profilers", trainer=lambda: {"profiler": SimpleProfiler()}),
    Row("profiler-advanced", "profilers", trainer=lambda: {"profiler": AdvancedProfiler()}, slow=True),
    # the Trainer's own settings
    Row("max-steps", "max_steps", trainer=lambda: {"max_steps": 8, "max_epochs": -1}),
    Row(
        "max-steps-accumulate",
        "max_steps",
        trainer=lambda: {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 4},
    ),
    Row(
        "validation-in-between",
        "val_check_interval and check_val_every_n_epoch",
        trainer=lambda: {"val_check_interval": 3, "accumulate_grad_batches": 2},
    ),
    Row(
        "validation-seldom",
        "val_check_interval and check_val_every_n_epoch",
        trainer=lambda: {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0},
    ),
    Row(
        "limits",
        "limit_train_batches and limit_val_batches",
        trainer=lambda: {"limit_train_batches": 0.7, "limit_val_batches": 1, "accumulate_grad_batches": 3},
    ),
    Row("overfit", "overfit_batches", trainer=lambda: {"overfit_batches": 2}),
    Row("fast-dev-run", "fast_dev_run", trainer=lambda: {"fast_dev_run": 3}),
    Row("detect-anomaly", "detect_anomaly", trainer=lambda: {"detect_anomaly": True}),
    Row("barebones", "barebones", trainer=lambda: {"barebones": True}),
    Row(
        "log-every-3",
        "log_every_n_steps",
        trainer=lambda: {"log_every_n_steps": 3, "accumulate_grad_batches": 2, "max_epochs": 4},
    ),
    Row("reload", "reload_dataloaders_every_n_epochs", trainer=lambda: {"reload_dataloaders_every_n_epochs": 1}),
    Row(
        "everything",
        "many of these at once",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **STEP),
        lambda: {
            "accumulate_grad_batches": 4,
            "gradient_clip_val": 0.1,
            "precision": "bf16-mixed",
            "val_check_interval": 3,
            "max_steps": 5,
            "max_epochs": -1,
            "enable_checkpointing": True,
            "detect_anomaly": True,
            "profiler": "simple",
        },
        callbacks=lambda folder: [
            LearningRateMonitor(),
            EMAWeightAveraging(decay=0.9),
            EarlyStopping("val_loss", patience=100),
            saver(folder, every_n_train_steps=2, save_top_k=-1, save_last=True),
        ],
    ),
    # optimizers
    Row("adamw", "any first-order optimizer of torch", optimized(adamw())),
    Row("adamw-fused", "fused and foreach optimizers", optimized(adamw(fused=True, amsgrad=True))),
    Row("adamw-foreach", "fused and foreach optimizers", optimized(adamw(foreach=True))),
    Row(
        "sgd-fused",
        "fused and foreach optimizers",
        optimized(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)),
    ),
    Row("rmsprop", "any first-order optimizer of torch", optimized(lambda m: torch.optim.RMSprop(m.parameters()))),
    Row("wrapper", "optimizers around another (Lookahead)", optimized(lambda m: Wrapper(cases.sgd(m)))),
    Row("groups", "parameter groups, parameters outside the optimizer", Groups),
    # modules
    *(
        Row(
            f"compiled-{what}-{backend}",
            f"torch.compile of {'a part' if what == 'part' else 'the module'} ({backend})",
            compiled(backend, what),
            # batches of one size: for a second size inductor makes kernels that round differently, and which of them
            # serves which step depends on what was compiled before
            train=lambda module: loader(6 * BATCH),
            slow=(what, backend) != ("part", "eager"),
            warns="cannot share the training forward pass" if (what, backend) == ("part", "inductor") else "",
        )
        for what in ("module", "logging", "part")
        for backend in ("eager", "aot_eager", "inductor")
    ),
    *(
        Row(
            f"checkpointing-{'reentrant' if reentrant else 'non-reentrant'}{'-batchnorm' if batch_norm else ''}",
            f"activation checkpointing ({'reentrant' if reentrant else 'non-reentrant'})",
            with_net(lambda reentrant=reentrant, batch_norm=batch_norm: Checkpointed(reentrant, batch_norm)),
            warns="cannot share the training forward pass" if reentrant else "",
        )
        for reentrant in (True, False)
        for batch_norm in (False, True)
    ),
    Row("captured-log", "self.log handed to other objects", LogsFromOutside),
    Row("nested", "nested LightningModules that log", Parent),
    Row("odd-parameters", "frozen, unused, tied, scalar and empty parameters", with_net(Odd)),
    Row(
        "odd-parameters-accumulate",
        "frozen, unused, tied, scalar and empty parameters",
        with_net(Odd),
        lambda: {"accumulate_grad_batches": 4, "precision": "bf16-mixed"},
    ),
    Row(
        "sparse",
        "sparse gradients",
        with_net(Words, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
        lambda: {"accumulate_grad_batches": 2},
    ),
    Row("sparse-adam", "sparse gradients", with_net(Words, optimizer=lambda m: torch.optim.SparseAdam(m.parameters()))),
    Row("parametrized", "parametrizations (weight_norm, orthogonal)", with_net(parametrized)),
    Row(
        "spectral-norm",
        "layers that compute with buffers they change (spectral_norm, queues)",
        with_net(spectral),
    ),
    Row("gradient-penalty", "differentiating inside training_step (gradient penalties)", GradientPenalty),
    Row("recurrent-attention", "recurrent and attention layers", with_net(Recurrent)),
]


# What users are told: (feature, "works" or "refused", note)

COMPATIBILITY: list[tuple[str, str, str]] = [
    ("a plain fit with validation", "works", "same weights, logs and checkpoints to the last bit"),
    ("gradient clipping by norm", "works", "clips the final gradient, never the one SAM climbs with"),
    ("gradient clipping by value", "works", "clips the final gradient, never the one SAM climbs with"),
    ("configure_gradient_clipping overridden", "works", "called once per step, with the final gradient"),
    ("gradient accumulation", "works", "the whole window counts as one batch, a short last one too"),
    ("GradientAccumulationScheduler", "works", ""),
    ("learning-rate schedulers per step", "works", ""),
    ("learning-rate schedulers per epoch", "works", ""),
    ("ReduceLROnPlateau", "works", "sees the unperturbed loss"),
    ("lr_scheduler_step overridden", "works", ""),
    ("a scheduler that is not torch's", "works", ""),
    ("precision bf16-mixed", "works", ""),
    ("precision bf16-true", "works", ""),
    ("precision 16-true", "works", ""),
    ("precision 64-true", "works", ""),
    ("precision 16-mixed (GradScaler)", "works", "the scale cancels out of SAM and of the curvature estimates"),
    (
        "precision 16-mixed, overflowing steps",
        "works",
        "a skipped step is neither counted nor boosted; an estimate that overflows is made again at the next step",
    ),
    ("precision 16-mixed, steps without a loss", "works", ""),
    ("precision 16-mixed with a fused optimizer", "works", "Lightning itself refuses to clip gradients here"),
    ("training_step returning a dict", "works", ""),
    ("training_step returning None at times", "works", "these micro-batches take no part in the step"),
    ("training_step(batch) without batch_idx", "works", ""),
    (
        "batches of any structure, changed by the transfer hooks",
        "works",
        "the second pass gets the batch after the transfer; training_step must not change it in place",
    ),
    ("several training loaders (CombinedLoader)", "works", ""),
    ("training data without a length (IterableDataset)", "works", ""),
    ("optimizer_step overridden (warm-up by hand)", "works", ""),
    ("optimizer_step overridden (a step at every second batch)", "works", "as long as the closure runs at every batch"),
    ("optimizer_step and optimizer_zero_grad overridden to accumulate by hand", "works", ""),
    ("optimizer_step overridden (runs the closure before the step)", "works", ""),
    ("backward overridden", "works", "runs in the second pass too"),
    ("optimizer_zero_grad overridden", "works", ""),
    ("on_before_optimizer_step overridden (edits gradients)", "works", "called once per step, with the final gradient"),
    (
        "on_before_zero_grad overridden",
        "works",
        "called once per step; weights that it changes are changed for the second pass",
    ),
    (
        "on_before_backward and on_after_backward overridden (read only)",
        "works",
        "called once per micro-batch, with the unperturbed gradient",
    ),
    ("hooks on parameters and modules (register_hook, ...)", "works", "run in the second pass too"),
    ("on_train_batch_start returning -1", "works", "Lightning drops the window that was open"),
    ("ModelCheckpoint (every_n_train_steps, monitor, save_last)", "works", ""),
    ("EarlyStopping", "works", ""),
    ("LearningRateMonitor", "works", ""),
    ("WeightAveraging and EMAWeightAveraging", "works", "average the weights after the boost"),
    ("StochasticWeightAveraging", "works", "the pass that renews BatchNorm's statistics runs once"),
    ("LearningRateFinder and Tuner.lr_find", "works", "the search itself runs without the callback"),
    ("BatchSizeFinder and Tuner.scale_batch_size", "works", "the search itself runs without the callback"),
    ("BackboneFinetuning (parameters that join later)", "works", ""),
    ("profilers", "works", ""),
    ("max_steps", "works", "counts the same steps"),
    ("val_check_interval and check_val_every_n_epoch", "works", ""),
    ("limit_train_batches and limit_val_batches", "works", ""),
    ("overfit_batches", "works", ""),
    ("fast_dev_run", "works", ""),
    ("detect_anomaly", "works", ""),
    ("barebones", "works", "nothing is logged"),
    ("log_every_n_steps", "works", ""),
    ("reload_dataloaders_every_n_epochs", "works", ""),
    ("many of these at once", "works", ""),
    ("any first-order optimizer of torch", "works", ""),
    ("fused and foreach optimizers", "works", ""),
    ("optimizers around another (Lookahead)", "works", ""),
    ("parameter groups, parameters outside the optimizer", "works", ""),
    ("torch.compile of the module (eager)", "works", ""),
    ("torch.compile of the module (aot_eager)", "works", ""),
    ("torch.compile of the module (inductor)", "works", "to rounding where batches change their size"),
    ("torch.compile of a part (eager)", "works", ""),
    ("torch.compile of a part (aot_eager)", "works", ""),
    (
        "torch.compile of a part (inductor)",
        "works",
        "to rounding where batches change their size; SampledFisher runs a forward pass of its own, with a warning",
    ),
    (
        "activation checkpointing (reentrant)",
        "works",
        "an estimate by SampledFisher then runs a forward pass of its own, with a warning",
    ),
    ("activation checkpointing (non-reentrant)", "works", ""),
    ("self.log handed to other objects", "works", ""),
    ("nested LightningModules that log", "works", "what they log in the second pass is dropped"),
    ("frozen, unused, tied, scalar and empty parameters", "works", ""),
    ("sparse gradients", "works", ""),
    ("parametrizations (weight_norm, orthogonal)", "works", "SAM and IRE move the underlying parameters"),
    ("layers that compute with buffers they change (spectral_norm, queues)", "works", ""),
    ("differentiating inside training_step (gradient penalties)", "works", ""),
    ("recurrent and attention layers", "works", ""),
    (
        "on_after_backward overridden (edits gradients)",
        "refused",
        "edits of the first pass's gradient are lost in the second: edit in on_before_optimizer_step",
    ),
    ("FSDP", "refused", "the norms and masks of a shard are not those of the whole"),
    ("DeepSpeed", "refused", "the norms and masks of a shard are not those of the whole"),
    ("ModelParallelStrategy", "refused", "the norms and masks of a shard are not those of the whole"),
    ("training_step(dataloader_iter)", "refused", "its batches cannot be replayed"),
    ("LBFGS", "refused", "it runs the closure several times per step"),
    ("DDP with static_graph, each device with its own SAM", "refused", "set `perturbation.sync` to true"),
    ("DDP", "works", "replicas are bit-identical after every step"),
    ("DDP with find_unused_parameters, gradient_as_bucket_view or static_graph", "works", ""),
    ("resuming from a checkpoint", "works", "goes on bit for bit where Lightning itself does"),
    ("manual optimization, several optimizers", "works", "IRE around each step; SAM where step gets a closure"),
    ("manual optimization, SAM and step() without a closure", "refused", "the gradient cannot be taken again"),
]

# features of `COMPATIBILITY` that other tests than those of the table prove
ELSEWHERE = {
    "DDP": "test_ddp.py::test_replicas_are_bit_identical_after_every_step",
    "DDP with find_unused_parameters, gradient_as_bucket_view or static_graph": (
        "test_ddp.py::test_options_of_ddp_and_a_resume_change_nothing"
    ),
    "resuming from a checkpoint": "test_resume.py::test_killed_and_resumed_equals_never_interrupted",
    "manual optimization, several optimizers": "test_manual.py::test_every_optimizer_has_its_own_masks_and_counts",
    "manual optimization, SAM and step() without a closure": (
        "test_manual.py::test_sam_without_a_closure_is_an_error_that_says_what_to_do"
    ),
}


def compatibility_table() -> str:
    """`COMPATIBILITY` as the README shows it."""
    works_first = sorted(COMPATIBILITY, key=lambda line: line[1] == "refused")
    lines = [f"| {feature} | {verdict} | {note} |" for feature, verdict, note in works_first]
    return "\n".join(["| feature | | |", "| --- | --- | --- |", *lines])
