"""Runs of a sweep that take no time: in place of a training they write an event file with a known result."""

import itertools
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_ire.sweeps import main

CONFIG = "test_after_fit: true\n"
GRID = "--grid ire.kappa 1 2 --grid ire.gamma 0.9 0.8"


class StubRuns:
    """Stands in for `run_process`; remembers the command lines.

    Args:
        outcomes: What a cell does instead of succeeding, by its name: an exit code or an exception; used up by a run.
    """

    def __init__(self, outcomes: dict | None = None) -> None:
        self.outcomes = outcomes or {}
        self.commands: list[list[str]] = []
        self.tag = "test/accuracy"

    def __call__(self, arguments: list[str], log: Path) -> int:
        self.commands.append(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write("first line\nerror: the last line\n\n")
        outcome = self.outcomes.pop(log.parent.name, 0)
        if outcome:
            if outcome != 2:  # a wrong key: nothing has begun
                leave_checkpoint(log.parent)
            if isinstance(outcome, int):
                return outcome
            raise outcome
        values = flags_of(arguments)
        accuracy = 0.9 + 0.01 * float(values["ire.kappa"]) + 0.001 * float(values.get("seed_everything", 0))
        accuracy -= 0.005 * (values.get("ire.gamma") == "0.8")
        version = log.parent / f"version_{len(list(log.parent.glob('version_*')))}"
        write_events(version, {self.tag: [0.0, accuracy], "test/loss": [2 - accuracy]})
        return 0

    @property
    def cells(self) -> list[str]:
        """Names of the cells that ran, in the order of the alphabet."""
        return sorted(flags_of(arguments)["trainer.logger.name"] for arguments in self.commands)


def flags_of(arguments: list[str]) -> dict[str, str]:
    """The keys and values of a run's command line."""
    return {key[2:]: value for key, value in itertools.pairwise(arguments) if key.startswith("--")}


def write_events(folder: Path, scalars: dict[str, list[float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def leave_checkpoint(cell: Path, version: int = 0) -> Path:
    path = cell / f"version_{version}" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def sweep(arguments: str = GRID, *, config: str = CONFIG) -> int:
    """Run the command with a config in the working directory."""
    if not os.path.exists("c.yaml") or Path("c.yaml").read_text() != config:
        Path("c.yaml").write_text(config)
    return main(["--config", "c.yaml", *arguments.split()])
