"""One training run, in each of the loops that IRE and SAM know: the same model, data, order and random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.fabric import Fabric
from modules import OPTIMIZERS, Classifier, Net
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_ire import IRE, AccelerateHost, FabricHost, IREStep, LocalHost, SharpnessMonitor
from lightning_ire.integrations.transformers import attach


class WithLoss(nn.Module):
    """A network that returns its loss, as models of transformers do; parameters are named as in `Classifier`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Job:
    """What is trained how.

    Attributes:
        settings: Arguments of IRE.
        optimizer: Which one.
        accumulate: Micro-batches of a step.
        clip: Largest norm of the gradient.
        epochs: Epochs in all.
        bf16: Whether the model computes in bf16.
        net: Makes the network.
        folder: Where a checkpoint is, or will be.
        stop: After how many epochs to save a checkpoint and stop.
        resume: Whether to go on from the checkpoint.
        options: More arguments of the loop: of Lightning's Trainer, of Fabric, of Accelerator, of TrainingArguments.
        sharpness: A monitor, in the two Trainers.
        after: Called after a loop by hand, with the step and what the loop calls.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    accumulate: int = 1
    clip: float | None = None
    epochs: int = 2
    bf16: bool = False
    net: Callable[[], nn.Module] = lambda: Net(batch_norm=True, dropout=0.3)
    folder: Path | None = None
    stop: int | None = None
    resume: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    sharpness: SharpnessMonitor | None = None
    after: Callable[[IREStep, Hand], None] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(9 if self.resume else 1)
        return self.net()

    @property
    def epochs_here(self) -> range:
        return range(self.epochs // 2 if self.resume else 0, self.stop or self.epochs)


@dataclass
class Run:
    """What is left of a run: everything that a resumed one would need, and the last logged values."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    logs: dict[str, float]
    model: nn.Module


def seed_step(number: int) -> None:
    """The random numbers of a step; what the loops themselves draw is not alike."""
    torch.manual_seed(100 + number)


# Lightning


class Reseed(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            seed_step(trainer.global_step)


def by_lightning(job: Job) -> Run:
    """Lightning's Trainer with the callback."""
    module = Classifier(job.model(), OPTIMIZERS[job.optimizer])
    ire = IRE(**job.settings)
    rows = cases.Rows()
    options: dict[str, Any] = {"precision": "bf16-mixed"} if job.bf16 else {}
    path = None if job.folder is None else str(job.folder / "lightning.ckpt")
    callbacks = [Reseed(), ire, *([job.sharpness] if job.sharpness else [])]
    trainer = cases.fit(
        module, callbacks, accumulate_grad_batches=job.accumulate, gradient_clip_val=job.clip, logger=rows,
        max_epochs=job.stop or job.epochs, ckpt_path=path if job.resume else None, **options, **job.options,
    )  # fmt: skip
    if job.stop:
        assert path is not None
        trainer.save_checkpoint(path)
    own = [row for _, row in rows.rows if any(tag.startswith(("ire/", "sam/")) for tag in row)]
    return _run(module, trainer.optimizers[0], ire.state_dict(), own[-1] if own else {})


def _run(module: nn.Module, optimizer: Optimizer, state: dict[str, Any], logs: dict[str, Any]) -> Run:
    own = {tag: float(value) for tag, value in logs.items() if tag.split("/")[0] in ("ire", "sam")}
    return Run(dict(module.state_dict()), optimizer.state_dict()["state"], state, own, module)


# Loops that are written by hand


@dataclass
class Hand:
    """A loop that is written by hand: what is called for what."""

    model: Any
    module: nn.Module
    optimizer: Any
    host: LocalHost
    clip: Callable[..., Any] | None
    save: Callable[[Path, IREStep], Any]
    load: Callable[[Path, IREStep], Any]
    accumulate: Callable[[], contextlib.AbstractContextManager[Any]] | None = None  # one call for each micro-batch
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    loader: Any = field(default_factory=lambda: cases.loader(cases.data()))

    def loss_of(self, batch: Any) -> Any:
        with self.autocast():
            return self.model(batch[0], batch[1])


def by_hand(job: Job, hand: Hand) -> Run:
    step = IREStep(hand.model, hand.optimizer, host=hand.host, clip=hand.clip, **job.settings)
    if job.resume:
        assert job.folder is not None
        hand.load(job.folder, step)

    for epoch in job.epochs_here:
        step.epoch = epoch
        if hand.accumulate is None:
            some = list(hand.loader)
            for index in range(0, len(some), job.accumulate):
                seed_step(step.progress.step)
                step(hand.loss_of, *some[index : index + job.accumulate])
            continue
        for index, batch in enumerate(hand.loader):
            if index % job.accumulate == 0:
                seed_step(step.progress.step)
            with hand.accumulate():
                step(hand.loss_of, batch)
    if job.stop:
        assert job.folder is not None
        hand.save(job.folder, step)
    if job.after is not None:
        job.after(step, hand)
    run = _run(hand.module, step.optimizer, step.state_dict(), step.logs)
    step.release()
    return run


def by_plain_loop(job: Job) -> Run:
    """PyTorch alone."""
    model = WithLoss(job.model())
    optimizer = OPTIMIZERS[job.optimizer](model)

    def save(folder: Path, step: IREStep) -> None:
        torch.save([model.state_dict(), optimizer.state_dict(), step.state_dict()], folder / "plain.pt")

    def load(folder: Path, step: IREStep) -> None:
        saved = torch.load(folder / "plain.pt", weights_only=True)
        for one, state in zip((model, optimizer, step), saved, strict=True):
            one.load_state_dict(state)

    clip = None if job.clip is None else (lambda some: nn.utils.clip_grad_norm_(some, job.clip))
    return by_hand(
        job,
        Hand(
            model, model, optimizer, LocalHost(), clip, save, load,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=job.bf16),
        ),
    )  # fmt: skip


def by_fabric(job: Job) -> Run:
    """Lightning Fabric."""
    precision: dict[str, Any] = {"precision": "bf16-mixed"} if job.bf16 else {}
    fabric = Fabric(accelerator="cpu", devices=1, **precision, **job.options)
    module = WithLoss(job.model())
    model, optimizer = fabric.setup(module, OPTIMIZERS[job.optimizer](module))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}

    def save(folder: Path, step: IREStep) -> None:
        fabric.save(folder / "fabric.ckpt", {**state, "ire": step.state_dict()})

    def load(folder: Path, step: IREStep) -> None:
        step.load_state_dict(fabric.load(folder / "fabric.ckpt", dict(state))["ire"])

    clip = None if job.clip is None else (lambda _: fabric.clip_gradients(model, optimizer, max_norm=job.clip))
    return by_hand(job, Hand(model, module, optimizer, FabricHost(fabric), clip, save, load))


def by_accelerate(job: Job) -> Run:
    """Accelerate, with its own way to accumulate."""
    with fresh_accelerate():
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=job.accumulate,
            mixed_precision="bf16" if job.bf16 else "no",
            **job.options,
        )
        module = WithLoss(job.model())
        model, optimizer = accelerator.prepare(module, OPTIMIZERS[job.optimizer](module))

        def save(folder: Path, step: IREStep) -> None:
            accelerator.register_for_checkpointing(step)
            accelerator.save_state(str(folder / "accelerate"))

        def load(folder: Path, step: IREStep) -> None:
            accelerator.register_for_checkpointing(step)
            accelerator.load_state(str(folder / "accelerate"))

        clip = None if job.clip is None else (lambda some: accelerator.clip_grad_norm_(some, job.clip))
        hand = Hand(
            model, module, optimizer, AccelerateHost(accelerator), clip, save, load,
            accumulate=lambda: accelerator.accumulate(model),
            loader=accelerator.prepare(cases.loader(cases.data())),
        )  # fmt: skip
        return by_hand(job, hand)


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in one place for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


# transformers


class SeedStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed_step(state.global_step)


class StopAfter(TrainerCallback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_save = state.epoch >= self.epochs


class InOrder(Trainer):
    """Batches come in the order of the data."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer_of(job: Job, folder: Path, **arguments: Any) -> Trainer:
    model = WithLoss(job.model())
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "seed": 0, "per_device_train_batch_size": 8, "num_train_epochs": job.epochs, "logging_steps": 1,
        "lr_scheduler_type": "constant", "gradient_accumulation_steps": job.accumulate,
        "max_grad_norm": job.clip or 0.0, "bf16": job.bf16, "remove_unused_columns": False,
    }  # fmt: skip
    return InOrder(
        model,
        TrainingArguments(**{**defaults, **arguments}),
        train_dataset=[{"x": x, "labels": y} for x, y in cases.data()],
        optimizers=(OPTIMIZERS[job.optimizer](model), None),
        callbacks=[SeedStep()],
    )


def by_transformers(job: Job) -> Run:
    """transformers' Trainer."""
    with fresh_accelerate():
        trainer = trainer_of(job, (job.folder or Path("unused")) / "transformers", **job.options)
        attached = attach(trainer, IRE(**job.settings), job.sharpness)
        if job.stop:
            trainer.add_callback(StopAfter(job.stop))
        model: Any = trainer.model
        trainer.train(resume_from_checkpoint=True if job.resume else None)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        inner = trainer.optimizer.optimizer
        return _run(model, inner, attached.state_dict(), rows[-1] if rows else {})


LOOPS: dict[str, Callable[[Job], Run]] = {
    "Lightning's Trainer": by_lightning,
    "plain PyTorch": by_plain_loop,
    "Fabric": by_fabric,
    "Accelerate": by_accelerate,
    "transformers' Trainer": by_transformers,
}


def resumed(loop: str, job: Job) -> Run:
    """The run, stopped in the middle and gone on with by new objects."""
    LOOPS[loop](replace(job, stop=job.epochs // 2))
    return LOOPS[loop](replace(job, resume=True))
