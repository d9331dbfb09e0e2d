"""One row of the table: its run without the callback, with it, and with passes and estimates that change nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl

from lightning_ire import IRE, SAM, SampledFisher
from matrix.modules import EPOCHS, Subject, loader
from matrix.recorder import (
    Record,
    Recorder,
    checkpoint_contents,
    logged_rows,
    profile,
    without_extra_passes,
    without_ours,
)


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


def run(row: Row, ire: pl.Callback | None, folder: Path, last: bool = False) -> Record:
    """Train once from fixed random states.

    Args:
        row: What to run.
        ire: The callback; ``None``: plain Lightning.
        folder: Where files go.
        last: Whether the callback comes after all others.
    """
    cases.seed_all(5)
    made = row.module()
    module: Subject = getattr(made, "_orig_mod", made)
    recorder, logger = Recorder(), cases.Rows()
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
    cases.seed_all(3)
    loaders = (row.train(module), None if bare else loader(16, seed=2, shuffle=False))
    row.fit(trainer, made, loaders)
    streams = cases.random_streams()
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


def assert_same(row: Row, plain: Record, ours: Record) -> None:
    different = []
    for part in plain.parts:
        if part not in row.leave_out:
            different += list(cases.differences(plain.parts[part], ours.parts[part], part))
    assert not different, f"{len(different)} differences:\n" + "\n".join(line[:300] for line in different[:12])
