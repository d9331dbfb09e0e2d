"""What the tests of the shipped configs share."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
EMBEDDED = [path for path in CONFIGS if path.name.startswith(("digits_", "stdlib_"))]
VISION = [path for path in CONFIGS if path.name.startswith(("cifar", "imagenet_"))]
TEXT = [
    path for path in CONFIGS if path.name.startswith(("stdlib_", "wikitext", "minipile_", "openwebtext_", "fineweb_"))
]

QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
FROM_THE_FIRST_STEP = "--ire.start_step null --ire.start_epoch null --ire.start_loss null"


def value(config: dict, key: str) -> Any:
    """The value of a key as it is typed on the command line; `None` if it is not there."""
    here: Any = config
    for name in key.split("."):
        here = here.get(name, here.get("init_args", {}).get(name)) if here else None
    return here


def by_name(paths: list[Path], slow: str = "") -> list:
    """One case per config; those whose name contains one of the words in `slow` are slow ones."""
    marks = [[pytest.mark.slow] if any(word in path.stem for word in slow.split()) else [] for path in paths]
    return [pytest.param(path, id=path.stem, marks=mark) for path, mark in zip(paths, marks, strict=True)]


def in_two_processes(commands: list[list[str]], folder: Path, strategy: str = "--trainer.strategy ddp") -> None:
    """The command line in two CPU processes, begun at the same time as torchrun or Slurm would, once per command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    devices = ["--trainer.devices", "2", *strategy.split()]
    (folder / "commands.json").write_text(json.dumps([[*arguments, *devices] for arguments in commands]))
    environment = {**cases.script_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "cli_ddp_script.py"), "commands.json"],
            cwd=folder,
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"rank{rank}.txt").open("w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:  # a process that failed leaves the other one waiting
        for process in processes:
            process.kill()
    assert codes == [0, 0], [(folder / f"rank{rank}.txt").read_text()[-2000:] for rank in range(2)]


def scalars(folder: Path) -> dict[str, float]:
    """The last value of each tag that the run in this folder has logged."""
    (version,) = folder.rglob("version_*")
    log = EventAccumulator(str(version)).Reload()
    return {tag: log.Scalars(tag)[-1].value for tag in log.Tags()["scalars"]}
