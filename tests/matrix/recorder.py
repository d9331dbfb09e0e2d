"""What is recorded of a run: every hook, the state at some of them, and all that is left at the end."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch

from lightning_ire import tags

MONITOR_TAGS = (*tags.SHARPNESS_TAGS, *tags.STABILITY_TAGS)
DETAILS = ("", tags.STDERR, tags.RESIDUAL, tags.CONVERGED)
OUR_TAGS = frozenset((*tags.IRE_TAGS, *tags.SAM_TAGS, *(tag + detail for tag in MONITOR_TAGS for detail in DETAILS)))


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
            "weights": cases.digest(list(module.parameters())),
            "gradients": cases.digest([parameter.grad for parameter in module.parameters()]),
            "buffers": cases.digest(list(module.buffers())),
            "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            "random": cases.random_streams(),
        }


@dataclass
class Record:
    """What was seen of a run: `parts` are compared, the rest is counted."""

    parts: dict[str, Any]
    training_steps: int
    backward_passes: int
    back_propagated: int
    steps: int


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
    return {
        name: value
        for name, value in metrics.items()
        if name not in OUR_TAGS and not name.startswith(tags.MONITOR_PREFIXES)
    }


def logged_rows(logger: cases.Rows) -> list[tuple[int | None, dict[str, float]]]:
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
