"""What the stdlib config's gain is due to: AdmIRE beside AdamW with a larger learning rate and with more weight decay.

    OMP_NUM_THREADS=1 python benchmarks/stdlib_controls.py

Trains `configs/stdlib_transformer_admire.yaml` six times with one seed, each run in a process of `cli.py fit` (minutes
on a CPU core), and writes the curves of the validation loss to benchmarks/results/stdlib_controls.json and
docs/stdlib_controls.png. Runs that are in the JSON already are not made again. One seed and no tuning: it shows what
the controls do, not which method is better.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from runs import ROOT, remembered, scalars

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
    results = remembered(RESULTS, RUNS, lambda flags: scalars(CONFIG, flags, TAG)[0])
    for name, points in results.items():
        print(f"{points[-1][1]:.4f}  {name}", flush=True)
    draw(results)


if __name__ == "__main__":
    main()
