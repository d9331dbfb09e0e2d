"""What is shown beside curves: figures, for every logger that takes any, and TensorBoard's histograms."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ire import tags
from lightning_ire.callbacks._tensorboard import loggers_of
from lightning_ire.functional import SpectralDensity
from lightning_ire.sharpness.blocks import KINDS_OF_BLOCKS
from lightning_ire.sharpness.job import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures"]


def figures(
    trainer: pl.Trainer,
    result: Measurement,
    step: int,
    warn: Callable[[str, str], None],
    blocks: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> None:
    """Hand the spectral density, the layers' and the blocks' traces as figures to every logger that takes some.

    Without matplotlib there are the histograms in TensorBoard; the numbers are scalars in every logger anyhow.

    Args:
        trainer: The trainer.
        result: The measurement.
        step: The logger's step.
        warn: Called with what was not written and why.
        blocks: The mean curvatures by kind of block of this measurement and those before it, with their steps.
    """
    traces = torch.tensor(list(result.layer_traces.values()))
    with_traces = bool(len(traces)) and bool(torch.isfinite(traces).all())  # TensorBoard takes no histogram of NaN
    with_blocks = bool(blocks) and all(map(math.isfinite, result.blocks.values()))
    loggers = loggers_of(trainer) if with_traces or result.density is not None or with_blocks else []
    drawn: dict[str, Figure] = {}
    if loggers and importlib.util.find_spec("matplotlib") is not None:
        if result.density is not None:
            drawn[tags.DENSITY] = density_figure(result.density)
        if with_traces:
            drawn[tags.LAYERS] = layer_figure(result.layer_traces)
        if with_blocks:
            drawn[tags.BLOCKS] = block_figure(blocks)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            if result.density is not None:
                _histogram(logger.experiment, result.density, step)
            if with_traces:
                logger.experiment.add_histogram(tags.LAYERS + tags.HISTOGRAM, traces, step)
        for tag, figure in drawn.items():
            try:
                _writer(logger)(logger, tag, figure, step)
            except Exception as error:  # whatever it is: training has to go on
                warn(f"the figure {tag} in {type(logger).__name__}", str(error) or type(error).__name__)


_WRITERS: dict[str, Callable[[Any, str, Figure, int], Any]] = {
    "TensorBoardLogger": lambda logger, tag, figure, step: logger.experiment.add_figure(tag, figure, step, close=False),
    "WandbLogger": lambda logger, tag, figure, step: logger.log_image(tag, [figure], step=step),
    "MLFlowLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(
        logger.run_id, figure, f"{tag}/{step:08d}.png"
    ),
    "CometLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(tag, figure, step=step),
    "NeptuneLogger": lambda logger, tag, figure, step: logger.experiment[tag].append(figure, step=step),
}
"""How a figure is handed to the loggers that show some, by the name of the class: their packages need not be there."""


def _writer(logger: Any) -> Callable[[Any, str, Figure, int], Any]:
    names = (base.__name__ for base in type(logger).__mro__)
    return next((_WRITERS[name] for name in names if name in _WRITERS), _into_its_folder)


def _into_its_folder(logger: Any, tag: str, figure: Figure, step: int) -> None:
    """A PNG in the log folder, if the logger has one; the folder may be a remote one."""
    folder = getattr(logger, "log_dir", None)
    if not folder:
        return
    files = get_filesystem(folder)
    files.makedirs(f"{folder}/{tag}", exist_ok=True)
    with files.transaction, files.open(f"{folder}/{tag}/{step:08d}.png", "wb") as file:
        figure.savefig(file, format="png")


def density_figure(density: SpectralDensity) -> Figure:
    """The spectral density on a logarithmic axis, with the outermost eigenvalues marked.

    Args:
        density: The density.
    """
    from matplotlib.figure import Figure

    grid, values = density.smoothed()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    floor = float(values.max()) * 1e-8
    axes.fill_between(grid.numpy(), values.clamp(min=floor).numpy(), floor, alpha=0.35)
    axes.plot(grid.numpy(), values.clamp(min=floor).numpy(), linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.axvline(0.0, color="black", linewidth=0.6)
    low, high = float(density.nodes.min()), float(density.nodes.max())
    axes.set_title(f"Hessian spectrum: {low:.3g} to {high:.3g}, mean {density.mean:.3g} ± {density.stderr:.2g}")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density (log)")
    return figure


def layer_figure(traces: dict[str, float], most: int = 60) -> Figure:
    """One bar for each parameter tensor, in the order of the module.

    Args:
        traces: Tr(H_ww) by name.
        most: Tensors shown; the smallest of more are added up in one bar.
    """
    from matplotlib.figure import Figure

    shown = traces
    if len(traces) > most:
        large = set(sorted(traces, key=lambda name: abs(traces[name]), reverse=True)[: most - 1])
        shown = {name: value for name, value in traces.items() if name in large}
        rest = [value for name, value in traces.items() if name not in large]
        shown[f"{len(rest)} others, sum"] = sum(rest)
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(shown), list(shown.values()))
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.6)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("trace of the Hessian's block")
    axes.set_title(f"Sum {sum(traces.values()):.4g}")
    return figure


def block_figure(measured: Sequence[tuple[int, Mapping[str, float]]], most: int = 8) -> Figure:
    """A group of bars for each kind of block, one bar for each measurement, dark for late ones.

    Args:
        measured: Step, and mean curvature by kind.
        most: Measurements shown, evenly chosen, the first and the last among them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    count = min(len(measured), most)
    chosen = [measured[round(i * (len(measured) - 1) / max(count - 1, 1))] for i in range(count)]
    kinds = [kind for kind in KINDS_OF_BLOCKS if kind in measured[-1][1]]
    figure = Figure(figsize=(2.5 + 1.1 * len(kinds), 4), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis_r"]
    for number, (step, values) in enumerate(chosen):
        places = [place + 0.8 * ((number + 0.5) / count - 0.5) for place in range(len(kinds))]
        heights = [values.get(kind, 0.0) for kind in kinds]
        shade = colours((number + 1) / count)
        axes.bar(places, heights, 0.8 / count, color=shade, label=f"step {step}")
    axes.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=8)
    axes.set_yscale("symlog", linthresh=_linear_below(chosen))
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_ylabel("mean curvature, Tr H_bb / p_b")
    axes.legend(fontsize=7)
    return figure


def _linear_below(measured: Sequence[tuple[int, Mapping[str, float]]]) -> float:
    """Where the axis becomes linear: at the smallest of the values, but at most four decades below the largest."""
    sizes = [abs(value) for _, values in measured for value in values.values() if value]
    return max(min(sizes), max(sizes) * 1e-4) if sizes else 1.0


def _histogram(writer: Any, density: SpectralDensity, step: int, buckets: int = 60) -> None:
    """Weights of the nodes, not the nodes, are what a bucket counts (in thousandths, as counts are whole in places)."""
    nodes, weights = density.nodes, density.weights * 1000
    low, high = float(nodes.min()), float(nodes.max())
    width = max(high - low, 1e-12) / buckets
    limits = low + width * torch.arange(1, buckets + 1, dtype=torch.float64, device="cpu")
    counts = torch.zeros(buckets, dtype=torch.float64, device="cpu")
    counts.index_add_(0, ((nodes - low) / width).long().clamp(0, buckets - 1), weights)
    writer.add_histogram_raw(
        tags.DENSITY + tags.HISTOGRAM,
        min=low,
        max=high,
        num=float(weights.sum()),
        sum=float((weights * nodes).sum()),
        sum_squares=float((weights * nodes**2).sum()),
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
