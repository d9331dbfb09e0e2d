"""What the stdlib config's gain is due to: AdmIRE beside AdamW with a larger learning rate and with more weight decay.

    OMP_NUM_THREADS=1 python benchmarks/stdlib_controls.py

Trains `configs/stdlib_transformer_admire.yaml` six times with one seed, each run in a process of `cli.py fit` (minutes
on a CPU core), and writes the curves of the validation loss to benchmarks/results/stdlib_controls.json and
docs/stdlib_controls.png. Runs that are in the JSON already are not made again. One seed and no tuning: it shows what
the controls do, not which method is better.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_ire

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "stdlib_transformer_admire.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "stdlib_controls.json"
PICTURE = ROOT / "docs" / "stdlib_controls.png"
TAG = "val/bits_per_byte"
RUNS = {
    "AdamW": "--ire.kappa 0",
    "AdmIRE": "",
    "AdamW, learning rate x 3": "--ire.kappa 0 --model.optimizer.lr 7.2e-3",
    "AdmIRE, decay not boosted": "--ire.scale_weight_decay false",
    "AdamW, decay alone boosted": "--ire.scale_weight_decay only",
    "AdamW, decay x 2.6": "--ire.kappa 0 --model.optimizer.weight_decay 0.26",
}


def curve(flags: str) -> list[tuple[int, float]]:
    """Train once; return optimizer steps and bits per byte of each validation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(CONFIG), *flags.split()]
        command += ["--trainer.logger.save_dir", folder, "--trainer.enable_progress_bar", "false"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (version,) = Path(folder).rglob("version_*")
        log = EventAccumulator(str(version)).Reload()
        return [(event.step + 1, event.value) for event in log.Scalars(TAG)]


def draw(results: dict[str, list[tuple[int, float]]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in results.items():
        style = "-" if name.startswith("AdmIRE") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=f"{name}: {points[-1][1]:.3f}")
    axes.set(xlabel="optimizer steps", ylabel="bits per byte, validation", title=CONFIG.stem)
    axes.legend(title="last value")
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known |= {"python": sys.version.split()[0], "torch": torch.__version__, "lightning_ire": lightning_ire.__version__}
    results = known["runs"]
    for number, (name, flags) in enumerate(RUNS.items(), start=1):
        if name not in results:
            print(f"run {number} of {len(RUNS)}: {name}", flush=True)
            results[name] = curve(flags)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{results[name][-1][1]:.4f}  {name}", flush=True)
    draw(results)


if __name__ == "__main__":
    main()
