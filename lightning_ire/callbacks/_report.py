"""What TensorBoard shows beside curves: figures, histograms and the HPARAMS tab."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightning_ire import tags
from lightning_ire.callbacks._measurement import Measurement
from lightning_ire.callbacks._step_geometry import find_ire
from lightning_ire.callbacks._tensorboard import tensorboards
from lightning_ire.functional import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HyperParameters", "figures"]


def figures(trainer: pl.Trainer, result: Measurement, step: int) -> None:
    """Write the spectral density and the traces of the layers, as histograms, and as figures if there is matplotlib.

    Args:
        trainer: The trainer.
        result: The measurement.
        step: The logger's step.
    """
    traces = torch.tensor(list(result.layer_traces.values()))
    with_traces = bool(len(traces)) and bool(torch.isfinite(traces).all())  # TensorBoard takes no histogram of NaN
    for logger in tensorboards(trainer):
        writer = logger.experiment
        if result.density is not None:
            _histogram(writer, result.density, step)
        if with_traces:
            writer.add_histogram(tags.LAYERS + tags.HISTOGRAM, traces, step)
        if importlib.util.find_spec("matplotlib") is None:
            continue
        if result.density is not None:
            writer.add_figure(tags.DENSITY, density_figure(result.density), step, close=False)
        if with_traces:
            writer.add_figure(tags.LAYERS, layer_figure(result.layer_traces), step, close=False)


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


class HyperParameters:
    """One row of TensorBoard's HPARAMS tab: settings at fit start against the metrics at the end.

    TensorBoard takes the columns from the first such record of a run and the metrics' values from the curves, so the
    record is written once, when the names of all metrics are known.

    Args:
        trainer: The trainer at fit start.
        module: The module.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        ire = find_ire(trainer)
        perturbation = ire.perturbation if ire is not None else None
        # TensorBoard sorts the names and shows the first five: the numbers come before what is said in words
        self.values: dict[str, bool | str | float] = {
            "kappa": ire.kappa if ire is not None else 0.0,
            "gamma": ire.gamma if ire is not None and ire.kappa else 0.0,
            "rho": float(getattr(perturbation, "rho", 0.0)),
            "using/perturbation": type(perturbation).__name__ if perturbation is not None else "none",
            "using/curvature": repr(ire.curvature) if ire is not None and ire.kappa else "none",
        }
        for index, optimizer in enumerate(trainer.optimizers):
            suffix = f"_{index}" if index else ""
            group = optimizer.param_groups[0]
            self.values[f"using/optimizer{suffix}"] = type(optimizer).__name__
            rate = group.get("initial_lr", group.get("lr"))
            if rate is not None:  # optimizers of the user's own may have none
                self.values[f"lr{suffix}"] = float(rate)

    def write(self, trainer: pl.Trainer) -> None:
        """Write the record.

        Args:
            trainer: The trainer at the end of fit.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = [tag for tag in trainer.callback_metrics if tag in trainer.logged_metrics or tag in _OURS]
        names = [tag for tag in shown if not tag.startswith(("ire/", "sam/")) and not tag.endswith(_DETAILS)]
        names.sort(key=_place)  # TensorBoard shows the first five
        for logger in tensorboards(trainer):
            own = {str(key): _plain(value) for key, value in _flat(dict(logger.hparams)).items()}
            for record in hparams(own | self.values, dict.fromkeys(names, 0.0)):
                logger.experiment.file_writer.add_summary(record)
            logger.experiment.flush()


_OURS = (*tags.SHARPNESS_TAGS, *tags.STABILITY_TAGS)
_DETAILS = (tags.STDERR, tags.RESIDUAL, tags.CONVERGED, "_step")


def _place(tag: str) -> tuple[int, int]:
    """Accuracies of validation first, then what is ours, then other metrics of validation, then those of training."""
    if tag in _OURS:
        return 1, _OURS.index(tag)
    return (3 if tag.startswith("train") else 0 if "acc" in tag else 2), 0


def _flat(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> bool | str | float:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
