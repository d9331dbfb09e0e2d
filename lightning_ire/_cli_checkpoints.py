"""What `ckpt_path` means on the command line: `last`, `best` and `hpc` as files, and whether a file is a checkpoint."""

from __future__ import annotations

import glob
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.migration import pl_legacy_patch

from lightning_ire._checkpoint_files import misfit_reason, read_checkpoint
from lightning_ire._checks import ConfigurationError

__all__ = ["NAMES", "TRUST", "check_checkpoint", "find_checkpoint", "misfit", "on_this_machine"]

NAMES = ("last", "best", "hpc")
"""Values of `ckpt_path` that stand for a file of an earlier run."""

TRUST = "trust it with --weights_only false"
"""What to write for a checkpoint with classes in it."""
_EXPECTED = "Expected `ckpt_path` to be a checkpoint of Lightning (or one of last, best, hpc), got"
_SHARDED = "meta.pt"  # in the folder that a sharded strategy saves


def check_checkpoint(path: str, weights_only: bool | None, *, resume: bool) -> None:
    """Refuse what Lightning could not load; the weights themselves are not read.

    Args:
        path: A file; what is in remote ones, a registry's and the folders of sharded strategies is left to Lightning.
        weights_only: As for `Trainer.fit`.
        resume: Whether a training is to go on from it.

    Raises:
        ConfigurationError: If there is no such file, or no checkpoint in it.
    """
    if re.match("registry(:|$)", path, re.IGNORECASE):
        if find_spec("litmodels") is None:
            raise ConfigurationError(f"{_EXPECTED} {path!r}, which needs a package: pip install litmodels")
        return
    local = on_this_machine("ckpt_path", path, readable=True)
    if local is None or Path(local, _SHARDED).is_file():
        return
    content = _read(local, weights_only)
    for key in ("state_dict", "pytorch-lightning_version"):
        if key not in content:
            raise ConfigurationError(f"{_EXPECTED} {path!r}, which holds something else: there is no `{key}` in it.")
    if resume and "optimizer_states" not in content:
        raise ConfigurationError(
            f"Expected `ckpt_path` to be a checkpoint to go on from, got {path!r}, which was saved with "
            "`save_weights_only`."
        )


def on_this_machine(name: str, value: str, *, readable: bool = False) -> str | None:
    """Return the path that `value` stands for (`file:///x` is /x), or None if it is an address elsewhere.

    Args:
        name: The argument's name, as the user typed it.
        value: A path, or the address of a file or folder, `PROTOCOL://...`.
        readable: Whether it has to be a file that can be read, if it is elsewhere.

    Raises:
        ConfigurationError: If the package for the protocol is missing, or its file system fails.
    """
    if "://" not in value:
        return value
    try:
        system, path = url_to_fs(value)
        if isinstance(system, LocalFileSystem):
            return path
        if readable:
            with system.open(path, "rb") as file:
                file.read(1)
    except Exception as error:  # whatever is wrong with somebody's file system
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigurationError(
            f"Expected `{name}` to be an address that answers, got {value!r}: {reason}."
        ) from error
    return None


def find_checkpoint(
    name: str, trainer: Trainer, version: str | None, weights_only: bool | None, *, resume: bool
) -> tuple[str | None, str]:
    """Return the file that `last`, `best` or `hpc` stands for, of the newest run in the folders where this one saves.

    Of several versions it is the one with the highest number that has such a file; without numbers, the file written
    last. `last` is what is called `last*.ckpt`, or what an `OnExceptionCheckpoint` saved if that is newer; `best` the
    best one of the first `ModelCheckpoint` that monitors something; `hpc` what was saved at the end of Slurm's time.

    Args:
        name: One of `NAMES`.
        trainer: The trainer, before its run.
        version: Name of the version's folder if the logger is set to one; then no other one is searched.
        weights_only: As for `Trainer.fit`.
        resume: Whether a training is to go on from it.

    Returns:
        The path, and what was searched as a pattern. The path is None to begin a training: `last` where there is no
        checkpoint of any name yet.

    Raises:
        ConfigurationError: If there is none; it names what was searched.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # its loggers are those of no run
        raise ConfigurationError(f"Expected `ckpt_path` to be a file with `trainer.fast_dev_run`, got {name!r}.")
    begins = False
    saving = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if name == "hpc":
        patterns = [f"{glob.escape(trainer.default_root_dir)}/hpc_ckpt_*.ckpt"]
        found = max(glob.iglob(patterns[0]), key=lambda path: _number(Path(path).stem, "hpc_ckpt_"), default=None)
    elif name == "best":
        saving = [callback for callback in saving if callback.monitor is not None]
        if not saving:
            raise ConfigurationError(
                "Expected a ModelCheckpoint with `monitor` in `trainer.callbacks` for `ckpt_path` best, got none."
            )
        patterns = [f"{_folder(saving[0], trainer, version)}/*.ckpt"]
        found = _best(saving[0], _oldest_first(patterns[0]), weights_only)
    else:
        folders = dict.fromkeys(_folder(callback, trainer, version) for callback in saving or [ModelCheckpoint()])
        patterns = [f"{folder}/{ModelCheckpoint.CHECKPOINT_NAME_LAST}*.ckpt" for folder in folders]
        newest = [path for pattern in patterns for path in _oldest_first(pattern)[-1:]]
        saved = [c.ckpt_path for c in trainer.checkpoint_callbacks if isinstance(c, OnExceptionCheckpoint)]
        newest += [path for path in saved if Path(path).is_file()]
        found = max(newest, key=lambda path: Path(path).stat().st_mtime_ns, default=None)
        begins = resume and not any(glob.glob(f"{folder}/*.ckpt") for folder in folders)
    searched = " or ".join(patterns)
    if found is None and not begins:
        raise ConfigurationError(f"Expected `ckpt_path` {name} to find {searched}, got none.")
    return found, searched


def misfit(error: Exception, path: str | None) -> str | None:
    """Say in one line that a checkpoint is of another model or optimizer.

    Args:
        error: What was raised in a run that loads a checkpoint.
        path: The checkpoint, if any.

    Returns:
        The line; None if the error is about something else.
    """
    reason = misfit_reason(error)
    return reason and f"Expected `ckpt_path` to be a checkpoint of this model and optimizer, got {path!r}: {reason}"


def _folder(callback: ModelCheckpoint, trainer: Trainer, version: str | None) -> str:
    """Return where a callback saves, as a pattern for all versions if the logger is to choose a new one."""
    if callback.dirpath is not None:
        return glob.escape(str(callback.dirpath))
    if not trainer.loggers:
        return f"{glob.escape(trainer.default_root_dir)}/checkpoints"
    first = trainer.loggers[0]
    above = Path(trainer.default_root_dir if first.save_dir is None else first.save_dir, str(first.name))
    below = "*" if version is None else glob.escape(version)
    return f"{glob.escape(str(above))}/{below}/checkpoints"


def _best(callback: ModelCheckpoint, paths: list[str], weights_only: bool | None) -> str | None:
    """Return the best checkpoint by the state of `callback` in the newest one that has it."""
    for path in reversed(paths):
        states = _read(path, weights_only).get("callbacks", {})
        best = states.get(callback.state_key, {}).get("best_model_path")
        if best and (beside := Path(path).with_name(Path(best).name)).is_file():  # the folder may have been moved
            return str(beside)
    return None


def _oldest_first(pattern: str) -> list[str]:
    """Return files by the number of their `version_N/checkpoints/`, then by the time of writing."""
    return sorted(
        glob.iglob(pattern),
        key=lambda path: (_number(Path(path).parents[1].name, "version_"), Path(path).stat().st_mtime_ns),
    )


def _number(name: str, prefix: str) -> int:
    """Return the number behind `prefix`; -1 if there is none."""
    digits = name.removeprefix(prefix)
    return int(digits) if name.startswith(prefix) and digits.isdecimal() else -1


def _read(path: str, weights_only: bool | None) -> dict[str, Any]:
    with pl_legacy_patch():
        return read_checkpoint(path, _EXPECTED, weights_only, TRUST)
