"""The picture of a sweep over two numbers."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_ire.sweeps._grid import SEED
from lightning_ire.sweeps._study import number
from lightning_ire.sweeps._table import Results, averages, shown

__all__ = ["save_heat_map"]


def save_heat_map(path: Path, config: str, metric: str, results: Results) -> bool:
    """Draw a metric over two keys, the first downwards, into a PNG; return whether that could be drawn.

    It is if two keys vary beside the seed, all values are numbers, some run is done, and there is matplotlib.
    """
    grid, groups = results.grid, averages(results, metric)
    numeric = all(number(value) is not None for key in grid.keys for value in grid.values[key])
    varied = [key for key in grid.keys if len(grid.values[key]) > 1]
    there = [average.mean for average in groups.values() if not math.isnan(average.mean)]
    if len(grid.keys) != 2 or len(varied) != 2 or not numeric or not any(a.values for a in groups.values()):
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, columns = (list(dict.fromkeys(group[axis][1] for group in groups)) for axis in (0, 1))
    means = [[groups[(grid.keys[0], row), (grid.keys[1], column)].mean for column in columns] for row in rows]
    figure = Figure(figsize=(2.5 + 1.2 * len(columns), 1.7 + 0.8 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(means, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(grid.keys[1])
    axes.set_ylabel(grid.keys[0])
    unit, seeds = " (%)" if "accuracy" in metric else "", ", mean over seeds" if SEED in grid.values else ""
    axes.set_title(f"{config}\n{metric}{unit}{seeds}", fontsize=10)
    middle = (min(there) + max(there)) / 2  # white on the dark colours of the lower half
    for y, x in ((y, x) for y in range(len(rows)) for x in range(len(columns))):
        mean = means[y][x]
        text, color = "-" if math.isnan(mean) else shown(metric, mean), "white" if mean < middle else "black"
        axes.text(x, y, text, ha="center", va="center", color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
