"""One run of a sweep: its command line, its process, and what its logs say."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
from pathlib import Path

from lightning_ire.sweeps._grid import Cell
from lightning_ire.sweeps._options import Options

__all__ = ["checkpoint_of", "command", "last_line", "last_values", "log_of", "run_process", "versions"]

_PATIENCE_SECONDS = 30  # how long a process may take to end after Ctrl-C
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def checkpoint_of(options: Options, cell: Cell) -> Path | None:
    """Return the newest checkpoint that earlier attempts of a cell have left, or None."""
    left = [folder / "checkpoints" / "last.ckpt" for folder in versions(options.logs / cell.name)]
    return next((path for path in reversed(left) if path.is_file()), None)


def command(options: Options, cell: Cell) -> list[str]:
    """Return the command line of a run; it continues from what an earlier attempt left.

    The further flags come before the cell's, for a class is to be chosen before its arguments. In place of the config's
    logger, of whatever kind and settings, there is one that writes what `last_values` reads.

    Args:
        options: Those of the sweep.
        cell: Whose run.

    Returns:
        The command line with the values as typed.
    """
    fit = [sys.executable, "-m", "lightning_ire.cli", "fit", "--config", str(options.config), *options.flags]
    logger = ["--trainer.logger", "false", "--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger"]
    logger += ["--trainer.logger.default_hp_metric", "false"]
    logger += ["--trainer.logger.save_dir", str(options.logs), "--trainer.logger.name", cell.name]
    checkpoint = checkpoint_of(options, cell)
    return [*fit, *cell.flags, *logger, *([] if checkpoint is None else ["--ckpt_path", str(checkpoint)])]


def log_of(options: Options, cell: Cell) -> Path:
    """Return the file with what the runs of a cell print."""
    return options.logs / cell.name / "output.log"


def run_process(arguments: list[str], log: Path) -> int:
    """Run a command line to its end; Ctrl-C reaches it too, and its end is waited for.

    Where this process is killed, the other one gets SIGTERM (on Linux): it would train beside its own repetition.

    Args:
        arguments: The command line.
        log: File to append stdout and stderr to.

    Returns:
        The exit code; negative: the signal that ended it.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if _PRCTL else None,
        )
        try:
            return process.wait()
        except BaseException:
            _wait_for_end(process)
            raise


def last_line(log: Path) -> str:
    """Return the last line with text of a file, or that there is none."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def last_values(folder: Path) -> dict[str, float]:
    """Read the last value of every scalar from a run's event files, of several versions from the newest that has it.

    Args:
        folder: What holds `version_0`, `version_1`, ...

    Returns:
        Values by tag.
    """
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    values: dict[str, float] = {}
    for version in versions(folder):
        events = EventAccumulator(str(version), size_guidance={"scalars": 1}, purge_orphaned_data=False)
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values[tag] = float(events.Scalars(tag)[-1].value)
    return values


def versions(folder: Path) -> list[Path]:
    """Return a cell's version folders, the newest last."""
    versions = [path for path in folder.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]
    return sorted(versions, key=lambda path: int(path.name.removeprefix("version_")))


def _die_with_parent() -> None:
    if _PRCTL:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that got Ctrl-C as well; be less polite where it goes on, or where the user insists."""
    for insist in (process.terminate, process.kill):
        try:
            process.wait(_PATIENCE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            insist()
    process.wait()
