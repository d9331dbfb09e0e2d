"""The picture of a sweep over two numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_ire.sweeps._grid import SEED, number
from lightning_ire.sweeps._table import Results, averages, shown

__all__ = ["save_heat_map"]


def save_heat_map(path: Path, config: str, metric: str, results: Results) -> bool:
    """Draw a metric over two keys, the first downwards; nothing where that cannot be drawn.

    Args:
        path: File to write, a PNG.
        config: What the title begins with.
        metric: Tag of the metric.
        results: Of the grid.

    Returns:
        Whether there is a picture: exactly two keys vary beside the seed, all values are numbers, some run is complete,
        and matplotlib is installed.
    """
    keys = [key for key in results.grid.keys if len(results.grid.values[key]) > 1]
    groups = averages(results, metric)
    numeric = all(number(value) is not None for key in keys for value in results.grid.values[key])
    if len(results.grid.keys) != 2 or len(keys) != 2 or not numeric or all(not a.values for a in groups.values()):
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, columns = (list(dict.fromkeys(group[axis][1] for group in groups)) for axis in (0, 1))
    means = [[groups[(keys[0], row), (keys[1], column)].mean for column in columns] for row in rows]
    figure = Figure(figsize=(2.5 + 1.2 * len(columns), 1.7 + 0.8 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(means, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    unit, seeds = " (%)" if "accuracy" in metric else "", ", mean over seeds" if SEED in results.grid.values else ""
    axes.set_title(f"{config}\n{metric}{unit}{seeds}", fontsize=10)
    _write_values(axes, metric, means)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _write_values(axes: Any, metric: str, means: list[list[float]]) -> None:
    """Write the values into the picture, white on the dark colours of the lower half."""
    there = [mean for row in means for mean in row if not math.isnan(mean)]
    middle = (min(there) + max(there)) / 2
    for row, numbers in enumerate(means):
        for column, mean in enumerate(numbers):
            text = "-" if math.isnan(mean) else shown(metric, mean)
            axes.text(column, row, text, ha="center", va="center", color="white" if mean < middle else "black")
