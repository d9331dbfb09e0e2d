"""What a range test found, and what follows from it: pure functions of lists of numbers, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RangeTest", "crossing", "diverges", "doubling", "raising", "smoothed", "spaced", "steepest_descent"]


@dataclass
class RangeTest:
    """Numbers of a range test.

    Attributes:
        key: "lr", "kappa" or "rho".
        values: The values that were tried, rising.
        losses: For "lr" and "kappa" the training loss of the step with that value, before it is made; for "rho" the
            loss of the probe at the perturbed weights.
        ratios: Pairs of a value and the `stability/ratio` of steps with it, where that was measured.
        gaps: For "rho": the loss at the perturbed weights minus the loss.
        slope: For "rho": the norm of the gradient (of T g for ASAM), which times rho is the gap's first order.
        headroom: For "kappa": the largest stable kappa at the end of the warm-up; ``None``: not known.
        diverged: Whether the test ended early because the loss rose.
        suggestion: The value to use; ``None``: the test does not tell.
        reason: Where it comes from, or why there is none.
        notes: What of the run's settings the test left out.
    """

    key: str
    values: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ratios: list[tuple[float, float]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    slope: float | None = None
    headroom: float | None = None
    diverged: bool = False
    suggestion: float | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The suggestion in one line."""
        return f"{self.key}: {'no suggestion' if self.suggestion is None else f'{self.suggestion:.3g}'} ({self.reason})"

    def figure(self) -> Figure:
        """The loss, and the stability ratio or the ascent gap, over the value; needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_xlabel({"lr": "learning rate"}.get(self.key, self.key))
        axes.set_ylabel("loss")
        axes.plot(self.values, self.losses, color="tab:blue", alpha=0.3 if self.key != "rho" else 1, label="loss")
        if self.key != "rho":
            axes.plot(self.values, smoothed(self.losses), color="tab:blue", label="loss, smoothed")
        other = axes.twinx()
        if self.key == "rho" and self.slope is not None:
            other.loglog(self.values, self.gaps, color="tab:red", label="ascent gap")
            other.loglog(
                self.values, [self.slope * rho for rho in self.values], ":", color="tab:red", label="first order"
            )
            other.set_ylabel("ascent gap")
        elif self.ratios:
            other.loglog(*zip(*self.ratios, strict=True), "o-", color="tab:red", label="stability ratio")
            other.axhline(1.0, color="tab:red", linestyle=":")
            other.set_ylabel("stability ratio (above 1: unstable)")
        if self.headroom is not None:
            axes.axvline(self.headroom, color="tab:red", linestyle="--", label="largest stable kappa")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="black", label=f"suggestion: {self.suggestion:.3g}")
        lines = [*axes.get_lines(), *other.get_lines()]
        named = [line for line in lines if not str(line.get_label()).startswith("_")]
        figure.legend(named, [str(line.get_label()) for line in named], fontsize=8, ncols=3, loc="outside lower center")
        axes.set_title(self.line, fontsize=9, wrap=True)
        return figure


def spaced(low: float, high: float, count: int) -> list[float]:
    """Numbers from `low` to `high` with equal ratios.

    Example:
        >>> spaced(1.0, 100.0, 3)
        [1.0, 10.0, 100.0]
    """
    return [low * (high / low) ** (place / max(count - 1, 1)) for place in range(count)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of the neighbours with Gaussian weights, without a lag; their width is a 25th of the length, at least 1."""
    width = max(len(losses) / 25, 1.0)
    means = []
    for place in range(len(losses)):
        weights = [math.exp(-0.5 * ((place - other) / width) ** 2) for other in range(len(losses))]
        means.append(sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights))
    return means


def steepest_descent(values: Sequence[float], losses: Sequence[float]) -> float | None:
    """The value at which the smoothed loss falls fastest, by the logarithm of the value; ``None``: it never falls.

    The slope is the one between the neighbours, so that the first and the last value are left out.
    """
    means = smoothed(losses)
    slopes = {
        place: (means[place + 1] - means[place - 1]) / math.log(values[place + 1] / values[place - 1])
        for place in range(1, len(values) - 1)
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return None if steepest is None or slopes[steepest] >= 0 else values[steepest]


def crossing(ratios: Sequence[tuple[float, float]]) -> float | None:
    """The first value at which a ratio passes 1, between the measured ones by their logarithms; ``None``: none does.

    Where the first ratio is above 1 already it is that value.

    Example:
        >>> crossing([(0.01, 0.1), (1.0, 10.0)])
        0.1
    """
    before: tuple[float, float] | None = None
    for value, ratio in ratios:
        if ratio > 1:
            if before is None or before[1] <= 0:
                return value
            share = math.log(1 / before[1]) / math.log(ratio / before[1])
            return before[0] * (value / before[0]) ** share
        before = value, ratio
    return None


def doubling(radii: Sequence[float], gaps: Sequence[float], slope: float) -> float | None:
    """The radius at which the ascent gap is twice its first order, slope * rho; ``None``: it never is.

    There the curvature adds as much to the gap as the slope: gap = rho ||g|| + rho^2 g^T H g / (2 ||g||^2) + ...
    """
    pairs = [(rho, gap / (2 * slope * rho)) for rho, gap in zip(radii, gaps, strict=True)] if slope > 0 else []
    return crossing(pairs)


def raising(radii: Sequence[float], gaps: Sequence[float], loss: float, share: float = 0.1) -> float | None:
    """The radius at which the ascent raises the loss by a share of it; ``None``: it never does, or no loss > 0."""
    return crossing([(rho, gap / (share * loss)) for rho, gap in zip(radii, gaps, strict=True)]) if loss > 0 else None


def diverges(loss: float, first: float, best: float) -> bool:
    """Whether a (smoothed) loss says that the test is over: not finite, or above its best by three times its size.

    The size is the best loss itself or, where that is larger (as with losses next to 0), how far it has fallen.
    """
    return not math.isfinite(loss) or loss - best > 3 * max(abs(best), abs(first - best))
