"""One run of a sweep: its command line, what it is made with, its process, and what its logs say."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_ire import __version__
from lightning_ire._checks import ConfigurationError, check_folder
from lightning_ire._cli_options import content, pairs
from lightning_ire.sweeps._grid import Trial
from lightning_ire.sweeps._options import Options

__all__ = ["Run", "last_line", "last_values", "replace_text", "run_process", "versions"]

_MADE_WITH = "made_with.json"
_PATIENCE_SECONDS = 30  # how long a process may take to end after Ctrl-C
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


class Run:
    """The run of a trial."""

    def __init__(self, options: Options, trial: Trial) -> None:
        self.options, self.trial = options, trial
        self.folder = options.logs / trial.name
        self.log = self.folder / "output.log"

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint that earlier attempts have left."""
        left = [version / "checkpoints" / "last.ckpt" for version in versions(self.folder)]
        return next((path for path in reversed(left) if path.is_file()), None)

    @property
    def command(self) -> list[str]:
        """The command line with the values as typed; it continues from what an earlier attempt left.

        The further flags come before the trial's, for a class is to be chosen before its arguments. In place of the
        config's logger, of whatever kind and settings, there is one that writes what `last_values` reads.
        """
        options, checkpoint = self.options, self.checkpoint
        fit = [sys.executable, "-m", "lightning_ire.cli", "fit", "--config", str(options.config), *options.flags]
        logger = ["--trainer.logger", "false", "--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger"]
        logger += ["--trainer.logger.default_hp_metric", "false"]
        logger += ["--trainer.logger.save_dir", str(options.logs), "--trainer.logger.name", self.trial.name]
        return [*fit, *self.trial.command, *logger, *(["--ckpt_path", str(checkpoint)] if checkpoint else [])]

    @property
    def settings(self) -> dict[str, str]:
        """Version, config, further flags and the trial's values by key; several values of a flag in their order."""
        flags: dict[str, str] = {}
        for key, value in [*pairs(self.options.flags), *self.trial.items()]:
            flags[f"--{key}"] = " ".join(filter(None, (flags.get(f"--{key}"), value)))
        return {"lightning_ire": __version__, **dict(_flat(content(self.options.config))), **flags}

    def check(self) -> None:
        """Refuse a folder in which there are runs with other settings than these, or one that cannot be made."""
        check_folder("--folder", self.options.folder, self.folder)
        if not versions(self.folder):
            return
        ours = self.settings
        try:
            theirs = json.loads((self.folder / _MADE_WITH).read_text())
        except (OSError, ValueError):
            difference = f"no {_MADE_WITH} that says it"
        else:
            key = next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), None)
            if key is None:
                return
            there, here = (repr(made[key]) if key in made else "nothing" for made in (theirs, ours))
            difference = f"`{key}` {there} there and {here} here"
        raise ConfigurationError(
            f"Expected the runs in {self.folder} to be made with the settings of this study, got {difference}: give "
            "another `--name` or `--folder`, or remove that folder."
        )

    def execute(self) -> int:
        """Write down what the run is made with, run it, and return its exit code."""
        self.write_settings()
        return run_process(self.command, self.log)

    def write_settings(self) -> None:
        """Write down what the run is made with."""
        replace_text(self.folder / _MADE_WITH, json.dumps(self.settings, indent=1))


def run_process(arguments: list[str], log: Path) -> int:
    """Run a command line to its end; Ctrl-C reaches it too, and its end is waited for.

    Its output is appended to `log`; a negative exit code is the signal that ended it. Where this process is killed, the
    other one gets SIGTERM (on Linux): it would train beside its own repetition.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, **files, preexec_fn=_die_with_parent if _PRCTL else None)
        try:
            return process.wait()
        except BaseException:
            for insist in (process.terminate, process.kill):  # less politely where it goes on, or the user insists
                try:
                    process.wait(_PATIENCE_SECONDS)
                except (subprocess.TimeoutExpired, KeyboardInterrupt):
                    insist()
            process.wait()
            raise


def last_line(log: Path) -> str:
    """Return the last line with text of a file, or that there is none."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def last_values(folder: Path) -> dict[str, float]:
    """Read the last value of every scalar from a run's event files, of several versions from the newest that has it."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    values: dict[str, float] = {}
    for version in versions(folder):
        events = EventAccumulator(str(version), size_guidance={"scalars": 1}, purge_orphaned_data=False)
        events.Reload()
        values.update({tag: float(events.Scalars(tag)[-1].value) for tag in events.Tags()["scalars"]})
    return values


def replace_text(path: Path, text: str) -> None:
    """Write a file such that others read the old text or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all nested values of the config with their dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _flat(item, f"{key}.{name}".strip("."))
    if not items:
        yield key, str(value)


def versions(folder: Path) -> list[Path]:
    """Return a run's version folders, the newest last."""
    versions = [path for path in folder.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]
    return sorted(versions, key=lambda path: int(path.name.removeprefix("version_")))


def _die_with_parent() -> None:
    if _PRCTL:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
