"""The pictures of a comparison: differences, loss against passes, quality against what is tuned, sharpness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_ire.compare.design import Cell, Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_ire.compare._report import Report

__all__ = ["draw"]

_SHARPNESS: list[str] = [
    "sharpness/trace_hessian",
    "sharpness/trace_fisher",
    "sharpness/lambda_max",
]  # the first that is there


def draw(report: Report, curves: Mapping[Cell, list[Any]], folder: Path, curve: str) -> list[Path]:
    """Write the pictures for which there are numbers; without matplotlib there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for name, size, paint in (
        ("differences", (9, 1.8 + 0.45 * len(report.compared)), _differences),
        ("against_passes", (8, 4.5), lambda axes, one: _against_passes(axes, one, curves, curve)),
        ("against_settings", (4.2 * max(len(_tuned(report)), 1), 4), None),
        ("sharpness", (8, 4.5), _sharpness),
    ):
        figure = Figure(figsize=size, layout="constrained")
        there = _against_settings(figure, report) if paint is None else paint(figure.subplots(), report)
        if there:
            figure.savefig(folder / f"{name}.png", dpi=110)
            written.append(folder / f"{name}.png")
    return written


def _scale(report: Report) -> float:
    return 100 if report.is_accuracy else 1


def _differences(axes: Axes, report: Report) -> bool:
    if not report.compared:
        return False
    scale = _scale(report)
    for row, one in enumerate(report.compared):
        values = [report.design.reported(name, report.results) for name in (one.treated, one.base)]
        points = [scale * (values[0][seed] - values[1][seed]) for seed in values[0].keys() & values[1].keys()]
        axes.plot(points, [row + 0.2] * len(points), "|", color="grey", markersize=6)
        colour = "tab:blue" if not one.clear else "tab:green" if report.gain(one) > 0 else "tab:red"
        half = one.difference.half if math.isfinite(one.difference.half) else 0.0
        axes.errorbar(scale * one.difference.mean, row, xerr=scale * half, fmt="o", color=colour, capsize=3)
        if one.luck:
            axes.plot([scale * one.luck.low, scale * one.luck.high], [row - 0.2] * 2, color="tab:orange", linewidth=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(report.compared)), [f"{one.treated} - {one.base}" for one in report.compared])
    axes.set_ylim(len(report.compared) - 0.5, -0.5)
    axes.set_xlabel(
        f"{report.design.report}{', points' if report.is_accuracy else ''}: 95 % over seeds; grey: each seed; orange: "
        "searches with half of the trials",
        fontsize=9,
    )
    axes.set_title("Differences (green: better, red: worse, blue: not told apart)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return True


def _against_passes(axes: Axes, report: Report, curves: Mapping[Cell, list[Any]], curve: str) -> bool:
    there = False
    for number, method in enumerate(report.design.methods):
        best = report.design.best(method.name, report.results)
        found = [curves.get(Cell(method.name, best or 0, seed)) for seed in range(report.design.seeds)]
        runs = [one for one in found if one]
        if best is None or not runs:
            continue
        length = min(map(len, runs))
        passes = [one[0] for one in runs[0][:length]]
        means = [fmean(run[point][1] for run in runs) for point in range(length)]
        axes.plot(passes, means, ".-", color=f"C{number % 10}", label=method.name, markersize=4)
        axes.fill_between(
            passes,
            [min(run[point][1] for run in runs) for point in range(length)],
            [max(run[point][1] for run in runs) for point in range(length)],
            color=f"C{number % 10}", alpha=0.15, linewidth=0,
        )  # fmt: skip
        there = True
    axes.set(xlabel="forward and backward passes", ylabel=f"{curve}: mean and range over seeds")
    if there:
        low, high = axes.dataLim.intervaly
        if 0 < 10 * low < high:
            axes.set_yscale("log")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return there


def _tuned(report: Report) -> list[str]:
    return list(dict.fromkeys(key for method in report.design.methods for key in report.design.tuned(method)))


def _against_settings(figure: Any, report: Report) -> bool:
    """The reported value of each trial over each key that is tuned; what tuning chose is filled."""
    if not (keys := _tuned(report)) or report.design.trials < 2:
        return False
    row, scale = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], _scale(report)
    for axes, key in zip(row, keys, strict=True):
        for number, method in enumerate(report.design.methods):
            if (how := report.design.tuned(method).get(key)) is None:
                continue
            points = [
                (at if isinstance(how, Range) else str(at), scale * one.value)
                for trial, one in report.design.ranked(method, report.results).items()
                if math.isfinite(one.value)
                for at in [report.design.settings(method, trial, report.results)[key]]
            ]
            if points:
                style: dict[str, Any] = {"color": f"C{number % 10}", "linewidth": 0.5, "markersize": 4}
                marker = "o-" if isinstance(how, Range) else "o"
                axes.plot(*zip(*sorted(points), strict=True), marker, markerfacecolor="none", **style)
                axes.plot(*points[0], "o", color=f"C{number % 10}", label=method.name)
            if isinstance(how, Range) and how.log:
                axes.set_xscale("log")
                axes.set_xlim(how.low / 1.1, how.high * 1.1)
                axes.set_xticks(
                    ticks := [how.low, math.sqrt(how.low * how.high), how.high], [f"{at:.2g}" for at in ticks]
                )
                axes.minorticks_off()
        axes.set_xlabel(key, fontsize=9)
        axes.grid(alpha=0.3)
    unit = ", %" if report.is_accuracy else ""
    row[0].set_ylabel(f"{report.design.report}{unit} on the tuning seeds")
    figure.legend(*_all_labels(row), loc="outside upper center", ncols=4, fontsize=8)
    return True


def _all_labels(row: Any) -> tuple[list[Any], list[str]]:
    found = {label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def _sharpness(axes: Axes, report: Report) -> bool:
    """The reported value over the first sharpness that the monitor has logged, of each reporting run."""
    logged: set[str] = {
        tag for values in report.results.values() for tag in values or () if tag.startswith("sharpness/")
    }
    preferred = [tag for tag in _SHARPNESS if tag in logged]
    tags = preferred or sorted(logged)
    if not tags:
        return False
    for number, method in enumerate(report.design.methods):
        values = report.design.reported(method.name, report.results)
        sharp = report.design.reported(method.name, report.results, tags[0])
        both = sorted(values.keys() & sharp.keys())
        axes.plot([sharp[seed] for seed in both], [_scale(report) * values[seed] for seed in both], "o",
                  color=f"C{number % 10}", label=method.name)  # fmt: skip
    axes.set(xlabel=tags[0], ylabel=report.design.report + (", %" if report.is_accuracy else ""))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return True
