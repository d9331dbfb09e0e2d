"""The table of a sweep as text: means over seeds, the baseline, the best cell, and the paper's numbers beside them."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ire.sweeps._grid import SEED, Grid, code, in_order
from lightning_ire.sweeps.paper import PAPER, PaperRow

__all__ = ["Average", "Results", "averages", "best_of", "shown", "table"]

Group = tuple[tuple[str, str], ...]
"""Keys and values of the runs that differ in the seed only."""


@dataclass(frozen=True)
class Average:
    """The runs that differ in the seed only.

    Args:
        values: A metric of the runs there are.
        expected: How many there will be.
    """

    values: tuple[float, ...]
    expected: int

    @property
    def mean(self) -> float:
        """The mean; NaN of no run."""
        return statistics.fmean(self.values) if self.values else math.nan

    def text(self, metric: str) -> str:
        """Return mean, sample standard deviation, and of how many runs."""
        if not self.values:
            return "-"
        mean = shown(metric, self.mean)
        spread = f" ± {shown(metric, statistics.stdev(self.values))}" if len(self.values) > 1 else ""
        missing = f" of {self.expected}" if len(self.values) < self.expected else ""
        return f"{mean}{spread}" + (f" (n={len(self.values)}{missing})" if self.expected > 1 else "")


@dataclass(frozen=True)
class Results:
    """What there is of one study.

    Args:
        grid: Its cells.
        metrics: All metrics of each complete cell, by the cell's name.
    """

    grid: Grid
    metrics: Mapping[str, Mapping[str, float]]

    @property
    def missing(self) -> int:
        """How many runs there are not."""
        return len(self.grid.cells) - len(self.metrics)


def shown(metric: str, value: float) -> str:
    """Return `value` as a table shows it: accuracies in percent with 2 digits, others with 4 significant digits.

    Example:
        >>> shown("test/accuracy", 0.93492), shown("test/loss", 1.23456)
        ('93.49', '1.235')
    """
    return f"{100 * value:.2f}" if "accuracy" in metric else f"{value:.4g}"


def averages(results: Results, metric: str) -> dict[Group, Average]:
    """Average a metric over the seeds.

    Args:
        results: Of one study.
        metric: Its tag.

    Returns:
        By keys and values other than the seed's, in ascending order of the values.
    """
    found: dict[Group, list[float]] = {}
    for cell in results.grid.cells:
        values = found.setdefault(tuple(pair for pair in cell.pairs if pair[0] != SEED), [])
        logged = results.metrics.get(cell.name, {})
        if metric in logged:
            values.append(logged[metric])
    orders = {key: in_order(values) for key, values in results.grid.values.items()}
    ordered = sorted(found, key=lambda group: [orders[key].index(value) for key, value in group])
    return {group: Average(tuple(found[group]), len(results.grid.values.get(SEED, "1"))) for group in ordered}


def best_of(groups: Mapping[Group, Average], mode: str) -> Group | None:
    """Return the cell with the best mean, of those with all their seeds if there are any; None if there is no run."""
    ran = {group: average for group, average in groups.items() if not math.isnan(average.mean)}
    whole = {group: average for group, average in ran.items() if len(average.values) == average.expected}
    sign = 1 if mode == "max" else -1
    return max(whole or ran, key=lambda group: sign * ran[group].mean, default=None)


def table(
    config: str,
    metric: str,
    chosen_by: str,
    mode: str,
    results: Results,
    baseline: Results | None,
    flags: Sequence[str] = (),
) -> str:
    """Return the table of one metric in Markdown.

    Args:
        config: Name of the config, to find the paper's results.
        metric: The tag to show.
        chosen_by: The tag that decides which cell is the best.
        mode: "max" or "min", for `chosen_by`.
        results: Of the grid.
        baseline: Of the base optimizer, if it ran too.
        flags: Where the runs differ from the config, beside the grid; they stand above the numbers.

    Returns:
        A heading, the grid, and the summary with baseline, best cell and the paper's numbers.
    """
    groups = averages(results, metric)
    best = best_of(averages(results, chosen_by), mode)
    both = [results, baseline] if baseline else [results]
    runs, missing = (sum(numbers) for numbers in zip(*((len(r.grid.cells), r.missing) for r in both), strict=True))
    percent = " (%)" if "accuracy" in metric else ""
    seeds = f"mean ± sample standard deviation over {SEED}; " if SEED in results.grid.values else ""
    heading = f"# {config}: {metric}{percent}\n\n{seeds}{runs - missing} of {runs} runs"
    heading += f", {missing} missing" if missing else ""
    heading += f"; all with `{shlex.join(flags)}`" if flags else ""
    parts = [heading, _grid_lines(results.grid, groups, metric), _summary(config, metric, groups, best, baseline)]
    ran = sum(1 for average in groups.values() if average.values)
    selection = f"Best cell: the best mean {chosen_by} of {ran} cells"
    if config in PAPER and any(metric in row.percent and not row.cell for row in PAPER[config].rows):
        selection += "; the paper's number is the best of its grid as well"
    return "\n\n".join([*parts, selection + "."]) + "\n"


def _grid_lines(grid: Grid, groups: Mapping[Group, Average], metric: str) -> str:
    texts = {group: average.text(metric) for group, average in groups.items()}
    if len(grid.keys) != 2:
        rows = [[*(value for _, value in group), text] for group, text in texts.items()]
        return _markdown([[*grid.keys, metric], *rows])
    first, second = grid.keys
    heads = in_order(grid.values[second])
    rows = [[row, *(texts[(first, row), (second, column)] for column in heads)] for row in in_order(grid.values[first])]
    return _markdown([[f"{first} \\ {second}", *heads], *rows])


def _summary(
    config: str, metric: str, groups: Mapping[Group, Average], best: Group | None, baseline: Results | None
) -> str:
    """Return the baseline, the best cell and, where the paper has numbers, those beside ours."""
    paper = PAPER.get(config)
    base = paper.baseline if paper else None
    rows = [
        [f"baseline ({_spelt(group)})", average.text(metric), _quoted(base, metric)]
        for group, average in (averages(baseline, metric) if baseline else {}).items()
    ]
    if not baseline and _quoted(base, metric):
        rows.append(["baseline", "-", _quoted(base, metric)])
    best_there = next((row for row in paper.rows if not row.cell), None) if paper else None
    label, text = (f"best cell ({_spelt(best)})", groups[best].text(metric)) if best is not None else ("best cell", "-")
    rows.append([label, text, _quoted(best_there, metric)])
    rows += [
        _same_cell(row, metric, groups) for row in (paper.rows if paper else ()) if row.cell and metric in row.percent
    ]
    head = ["", "here", *([f"paper, {paper.table}"] if paper and any(row[2] for row in rows) else [])]
    return _markdown([head, *(row[: len(head)] for row in rows)])


def _same_cell(row: PaperRow, metric: str, groups: Mapping[Group, Average]) -> list[str]:
    """Return our result for a cell for which the paper has one."""
    same = [average for group, average in groups.items() if {key: code(value) for key, value in group} == row.cell]
    label = ", ".join(f"{key} {value:g}" for key, value in row.cell.items())
    return [f"the paper's cell ({label})", same[0].text(metric) if same else "-", _quoted(row, metric)]


def _spelt(group: Group) -> str:
    return ", ".join(f"{key} {value}" for key, value in group)


def _quoted(row: PaperRow | None, metric: str) -> str:
    if row is None or metric not in row.percent:
        return ""
    return f"{row.method} {row.percent[metric]:.2f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with columns of even width; the first row is the head."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
