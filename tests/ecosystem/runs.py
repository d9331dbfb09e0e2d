"""One row of the table, its runs, and what is kept of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from ecosystem.batches import BATCHES, EPOCHS, STEPS, Turning, samples
from ecosystem.modules import Exercise
from lightning_ire import IRE, SAM, Curvature, SampledFisher, SharpnessMonitor

SAVED = 8  # the step after which a run is killed: not one of those where a mask is made


@dataclass(frozen=True)
class Row:
    """One optimizer, loss, network or kind of step.

    Attributes:
        id: Name of the test.
        kind: The line of the README's table, a key of `KINDS`.
        what: What it is called there; "": it is only counted.
        module: Makes the user's module.
        curvature: Makes the estimate of the curvature.
        batches: Makes the four batches of an epoch.
        callbacks: Makes the user's other callbacks.
        resumes: Whether plain Lightning resumes it bit for bit; else why not.
        slow: Whether it takes seconds, or is one of many.
        weekly: Whether it is one of very many.
    """

    id: str
    kind: str
    what: str = ""
    module: Callable[[], pl.LightningModule] = Exercise
    curvature: Callable[[], Curvature] = SampledFisher
    batches: Callable[[], list[Any]] = samples
    callbacks: Callable[[], list[pl.Callback]] = list
    resumes: bool | str = True
    slow: bool = False
    weekly: bool = False


class SaveOnce(Checkpoint):
    """Saves after the epoch in which a run is to be killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if BATCHES * (trainer.current_epoch + 1) == SAVED:
            trainer.save_checkpoint(self.path)


@dataclass
class Outcome:
    """What a run has ended with: names of the exact bits, so that large networks can be kept.

    Attributes:
        weights: Of all parameters and buffers.
        optimizers: Of the optimizers' states.
        finite: Whether all weights and buffers are.
        steps: How many steps each optimizer made.
        masks: For how many parameters there is a mask.
        measured: What was measured last.
    """

    weights: dict[str, Any]
    optimizers: list[Any]
    finite: bool
    steps: float
    masks: int
    measured: dict[str, float]


def bits(value: Any) -> Any:
    """A nested structure with names for the exact bits of tensors and without objects that compare by identity."""
    if isinstance(value, Tensor):
        return cases.digest([value])
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float, str, torch.dtype)) or value is None:
        return value
    if isinstance(value, Sequence) or hasattr(value, "popleft"):
        return [bits(item) for item in value]
    return getattr(value, "__qualname__", None) or {"class": type(value).__name__, **bits(vars(value))}


def train(
    row: "Row", ours: Sequence[pl.Callback] = (), save: Path | None = None, resume: Path | None = None
) -> Outcome:
    """Train once, from the beginning or from a checkpoint.

    Args:
        row: What to train.
        ours: Callbacks of this package; none: plain Lightning.
        save: Where the checkpoint of the step `SAVED` goes.
        resume: Such a checkpoint.
    """
    cases.seed_all(5)
    module = row.module()
    callbacks = [*ours, *row.callbacks(), *([SaveOnce(save)] if save else [])]
    trainer = cases.trainer(
        callbacks, max_epochs=EPOCHS, enable_checkpointing=save is not None, log_every_n_steps=STEPS // 2
    )
    cases.seed_all(3)
    trainer.fit(module, Turning(row.batches()), ckpt_path=resume, weights_only=None if resume is None else False)
    state = module.state_dict()
    return Outcome(
        bits(state),
        [bits(optimizer.state_dict()) for optimizer in trainer.optimizers],
        all(bool(torch.isfinite(value).all()) for value in state.values()),
        trainer.global_step / len(trainer.optimizers),
        sum(len(progress.masks.masks) for one in ours if isinstance(one, IRE) for progress in one._progresses),
        next((one.last.values for one in ours if isinstance(one, SharpnessMonitor) and one.last), {}),
    )


ARMS: dict[str, Callable[["Row"], list[pl.Callback]]] = {
    "base": lambda row: [],
    "forced": lambda row: [IRE(interval=5, exclude="*", curvature=row.curvature(), perturbation=SAM(0.0))],
    "monitored": lambda row: [
        IRE(kappa=0.0, curvature=row.curvature()),
        SharpnessMonitor(10, None, ["trace_fisher", "trace_hessian"], mode="train", max_vectors=2),
    ],
    "sam-ire": lambda row: [IRE(kappa=1.0, gamma=0.8, interval=5, curvature=row.curvature(), perturbation=SAM(0.05))],
}
