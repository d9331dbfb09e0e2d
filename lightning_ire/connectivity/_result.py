"""What was found on the line: pure functions of lists of numbers, and the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_ire._checks import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Barrier"]

_PANELS = 3


@dataclass
class Barrier:
    """Numbers along the straight line (1 - alpha) theta_first + alpha theta_second.

    Attributes:
        alphas: Equally spaced from 0, the first network, to 1, the second; 1/2 is among them.
        values: By name what was evaluated at each alpha; "loss" is one of the names.
        recalibrated: Whether BatchNorm's statistics were estimated anew at every point, the ends too.
        notes: What else to know about the numbers.

    Example:
        >>> found = Barrier([0.0, 0.5, 1.0], {"loss": [1.0, 4.0, 2.0]})
        >>> found.height, found.at, found.average
        (2.5, 0.5, {'loss': 4.0})
    """

    alphas: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    recalibrated: bool = False
    notes: list[str] = field(default_factory=list)

    def add(self, alpha: float, values: Mapping[str, float]) -> None:
        """Take up one more point.

        Args:
            alpha: Where.
            values: What was evaluated there.

        Raises:
            ConfigurationError: If the names are not those of the points before.
        """
        if self.alphas and values.keys() != self.values.keys():
            raise ConfigurationError(
                f"Expected `evaluate` to return the same names at every point, got {', '.join(values)} at {alpha:g} "
                f"and {', '.join(self.values)} before."
            )
        self.alphas.append(alpha)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def excess(self, name: str = "loss") -> list[float]:
        """By how much a value is above the straight line between its values at the ends, at each alpha.

        Args:
            name: Which of the values.

        Returns:
            L(alpha) - ((1 - alpha) L(0) + alpha L(1)); exactly 0 at the ends, where these are finite.
        """
        values = self.values[name]
        return [value - self._chord(name, alpha) for alpha, value in zip(self.alphas, values, strict=True)]

    @property
    def height(self) -> float:
        """The loss barrier: the largest excess of the loss, >= 0 as the ends count.

        Infinite where the loss between the ends is not finite, nan where it is not at an end.
        """
        return max(self._rises())

    @property
    def at(self) -> float:
        """The alpha of the largest excess of the loss; 0 without a barrier."""
        rises = self._rises()
        return self.alphas[rises.index(max(rises))] if not math.isnan(rises[0]) else math.nan

    @property
    def average(self) -> dict[str, float]:
        """The values of the averaged weights, alpha = 1/2."""
        middle = self.alphas.index(0.5)
        return {name: values[middle] for name, values in self.values.items()}

    @property
    def line(self) -> str:
        """What was found in one sentence."""
        loss, height = self.values["loss"], self.height
        ends = f"{loss[0]:.3g} and {loss[-1]:.3g} at the ends"
        if math.isnan(height):
            text = f"no barrier can be told: the loss is {ends}"
        elif height > 0:
            top = loss[self.alphas.index(self.at)]
            text = f"the loss barrier is {height:.3g}, at alpha = {self.at:.3g}: {top:.3g} there, {ends}"
        else:
            text = f"no loss barrier: none of {len(loss) - 2} points between is above the chord of {ends}"
        shown = [f"loss {self.average['loss']:.3g}"]
        for name in [name for name in self.values if "acc" in name][:1]:
            first, *_, last = self.values[name]
            shown.append(f"{name} {self.average[name]:.4g}, at the ends {first:.4g} and {last:.4g}")
        return f"{text}; averaged weights: {', '.join(shown)}"

    def figure(self) -> Figure:
        """The loss with the chord of the ends, and up to two other values, over alpha; needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = ["loss", *(name for name in self.values if name != "loss")][:_PANELS]
        figure = Figure(figsize=(4.4 * len(names) + 0.6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(1, len(names), place)
            axes.plot(self.alphas, self.values[name], "o-", color="tab:blue", label=name)
            ends = [self.values[name][0], self.values[name][-1]]
            axes.plot([0, 1], ends, "--", color="tab:gray", label="between the ends")
            if name == "loss" and 0 < self.height < math.inf:
                chord = self._chord(name, self.at)
                axes.vlines(self.at, chord, chord + self.height, colors="tab:red", label=f"barrier: {self.height:.3g}")
            axes.axvline(0.5, color="tab:gray", linestyle=":", label="averaged weights")
            axes.set_xlabel("alpha (0: first, 1: second)")
            axes.set_ylabel(name)
            axes.legend(fontsize=8)
        figure.suptitle(self.line, fontsize=9, wrap=True)
        return figure

    def _chord(self, name: str, alpha: float) -> float:
        """Exact at the ends, and where both are equal."""
        first, *_, last = self.values[name]
        return first + alpha * (last - first) if alpha < 0.5 else last - (1 - alpha) * (last - first)

    def _rises(self) -> list[float]:
        loss = self.values["loss"]
        if not (math.isfinite(loss[0]) and math.isfinite(loss[-1])):
            return [math.nan] * len(loss)
        return [math.inf if math.isnan(rise) else rise for rise in self.excess()]
