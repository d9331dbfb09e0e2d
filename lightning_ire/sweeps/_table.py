"""The table of a sweep as text: means over seeds, the baseline, the best cell, and the paper's numbers beside them."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ire.sweeps._grid import SEED, Grid, in_order
from lightning_ire.sweeps._study import code
from lightning_ire.sweeps.paper import PAPER, PaperRow

__all__ = ["Average", "Results", "averages", "markdown", "shown", "table"]

Group = tuple[tuple[str, str], ...]
"""Keys and values of the runs that differ in the seed only."""


@dataclass(frozen=True)
class Average:
    """A metric of the runs there are of those that differ in the seed only, and how many there will be."""

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
        count = len(self.values)
        spread = f" ± {shown(metric, statistics.stdev(self.values))}" if count > 1 else ""
        missing = f" of {self.expected}" if count < self.expected else ""
        return f"{shown(metric, self.mean)}{spread}" + (f" (n={count}{missing})" if self.expected > 1 else "")


@dataclass(frozen=True)
class Results:
    """A grid and all metrics of each of its trials, None where it is not done."""

    grid: Grid
    metrics: Sequence[Mapping[str, float] | None]


def shown(metric: str, value: float) -> str:
    """Return `value` as a table shows it: accuracies in percent with 2 digits, others with 4 significant digits.

    Example:
        >>> shown("test/accuracy", 0.93492), shown("test/loss", 1.23456)
        ('93.49', '1.235')
    """
    return f"{100 * value:.2f}" if "accuracy" in metric else f"{value:.4g}"


def averages(results: Results, metric: str) -> dict[Group, Average]:
    """Average a metric over the seeds, by the other keys and values, in ascending order of the values."""
    found: dict[Group, list[float]] = {}
    for trial, logged in zip(results.grid.trials, results.metrics, strict=True):
        values = found.setdefault(tuple(pair for pair in trial.items() if pair[0] != SEED), [])
        values.extend([logged[metric]] if logged and metric in logged else [])
    orders = {key: in_order(values) for key, values in results.grid.values.items()}
    ordered = sorted(found, key=lambda group: [orders[key].index(value) for key, value in group])
    return {group: Average(tuple(found[group]), len(results.grid.values.get(SEED, "1"))) for group in ordered}


def table(
    config: str,
    metric: str,
    chosen_by: str,
    mode: str,
    results: Results,
    baseline: Results | None,
    flags: Sequence[str] = (),
) -> str:
    """Return the table of `metric` in Markdown: a heading with the flags that all runs had, the grid, and the summary.

    The best cell is that with the best mean (`mode`: "max" or "min") of the metric `chosen_by`.
    """
    groups = averages(results, metric)
    runs = [logged for part in (results, baseline) if part for logged in part.metrics]
    missing = runs.count(None)
    percent = " (%)" if "accuracy" in metric else ""
    seeds = f"mean ± sample standard deviation over {SEED}; " if SEED in results.grid.values else ""
    heading = f"# {config}: {metric}{percent}\n\n{seeds}{len(runs) - missing} of {len(runs)} runs"
    heading += f", {missing} missing" if missing else ""
    heading += f"; all with `{shlex.join(flags)}`" if flags else ""
    best = _best_of(averages(results, chosen_by), mode)
    parts = [heading, _grid_lines(results.grid, groups, metric), _summary(config, metric, groups, best, baseline)]
    ran = sum(1 for average in groups.values() if average.values)
    selection = f"Best cell: the best mean {chosen_by} of {ran} cells"
    if config in PAPER and any(metric in row.percent and not row.trial for row in PAPER[config].rows):
        selection += "; the paper's number is the best of its grid as well"
    return "\n\n".join([*parts, selection + "."]) + "\n"


def _best_of(groups: Mapping[Group, Average], mode: str) -> Group | None:
    """Return the cell with the best mean, of those with all their seeds if there are any; None if there is no run."""
    ran = {group: average for group, average in groups.items() if not math.isnan(average.mean)}
    whole = {group: average for group, average in ran.items() if len(average.values) == average.expected}
    sign = 1 if mode == "max" else -1
    return max(whole or ran, key=lambda group: sign * ran[group].mean, default=None)


def _grid_lines(grid: Grid, groups: Mapping[Group, Average], metric: str) -> str:
    texts = {group: average.text(metric) for group, average in groups.items()}
    if len(grid.keys) != 2:
        return markdown([[*grid.keys, metric], *([*dict(group).values(), text] for group, text in texts.items())])
    first, second = grid.keys
    heads = in_order(grid.values[second])
    rows = [[row, *(texts[(first, row), (second, column)] for column in heads)] for row in in_order(grid.values[first])]
    return markdown([[f"{first} \\ {second}", *heads], *rows])


def _summary(
    config: str, metric: str, groups: Mapping[Group, Average], best: Group | None, baseline: Results | None
) -> str:
    """Return the baseline, the best cell and, where the paper has numbers, those beside ours."""
    paper = PAPER.get(config)
    base, theirs = (paper.baseline, paper.rows) if paper else (None, ())
    rows = [
        [f"baseline ({_spelt(group)})", average.text(metric), _quoted(base, metric)]
        for group, average in (averages(baseline, metric) if baseline else {}).items()
    ]
    if not baseline and _quoted(base, metric):
        rows.append(["baseline", "-", _quoted(base, metric)])
    label, text = (f"best cell ({_spelt(best)})", groups[best].text(metric)) if best is not None else ("best cell", "-")
    rows.append([label, text, _quoted(next((row for row in theirs if not row.trial), None), metric)])
    ours = {frozenset((key, code(value)) for key, value in group): average for group, average in groups.items()}
    for row in theirs:
        if row.trial and metric in row.percent:
            label = ", ".join(f"{key} {value:g}" for key, value in row.trial.items())
            same = ours.get(frozenset(row.trial.items()), Average((), 1))
            rows.append([f"the paper's cell ({label})", same.text(metric), _quoted(row, metric)])
    head = ["", "here", *([f"paper, {paper.table}"] if paper and any(row[2] for row in rows) else [])]
    return markdown([head, *(row[: len(head)] for row in rows)])


def _spelt(group: Group) -> str:
    return ", ".join(f"{key} {value}" for key, value in group)


def _quoted(row: PaperRow | None, metric: str) -> str:
    return f"{row.method} {row.percent[metric]:.2f}" if row and metric in row.percent else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with columns of even width; the first row is the head."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
