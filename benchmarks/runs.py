"""Runs of `cli.py fit` in processes of their own, and a JSON that remembers which were made."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_ire

ROOT = Path(__file__).parents[1]


def scalars(config: Path, flags: str, *tags: str) -> list[list[tuple[int, float]]]:
    """Train once; return optimizer steps and values of what was logged under each tag."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(config), *flags.split()]
        command += ["--trainer.logger.save_dir", folder, "--trainer.enable_progress_bar", "false"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (version,) = Path(folder).rglob("version_*")
        log = EventAccumulator(str(version), size_guidance={"scalars": 0}).Reload()
        return [[(event.step + 1, event.value) for event in log.Scalars(tag)] for tag in tags]


def remembered(file: Path, runs: Mapping[str, str], make: Callable[[str], Any]) -> dict[str, Any]:
    """What `make` returns for the flags of each run, by name; a run that is in the JSON file is not made again."""
    known = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    known |= {"python": sys.version.split()[0], "torch": torch.__version__, "lightning_ire": lightning_ire.__version__}
    for number, (name, flags) in enumerate(runs.items(), start=1):
        if name not in known["runs"]:
            print(f"run {number} of {len(runs)}: {name}", flush=True)
            known["runs"][name] = make(flags)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(known, indent=1) + "\n")
    return known["runs"]
