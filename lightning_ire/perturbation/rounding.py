"""Steps at rounded weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_ire._checks import ConfigurationError, check_whole
from lightning_ire.functional import rounding_displacement
from lightning_ire.perturbation.base import Ascent, Perturbation

__all__ = ["Rounding"]


class Rounding(Perturbation):
    """The gradient at Q(theta), the weights rounded to b bits; the step itself starts from the weights as they are.

    Q(w) = s round(w / s) with s = max |w| / (2^(b-1) - 1) in each tensor of two or more dimensions; other tensors stay
    as they are. This is training with a straight-through estimate of the rounding's gradient (Courbariaux et al. 2015,
    arXiv 1511.00363, for two values; Jacob et al. 2018, arXiv 1712.05877, for more), of the weights only. It finds
    weights that lose little when they are rounded: to second order the loss rises by sum_l s_l^2 Tr(H_ll) / 24, as the
    quantity `compression_gap` of :class:`~lightning_ire.SharpnessMonitor` shows.

    The training loss that Lightning sees and logs is then the one at the rounded weights. Validation and checkpoints
    have them as they are.

    Args:
        bits: b, from 2 to 32.
        **timing: `start_*` and `stop_*`: see :class:`Perturbation`. There is no radius for `rho_schedule`.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: no extra pass (an estimate of :class:`~lightning_ire.SampledFisher` then needs a forward pass of its own); two
    copies of the weights inside the step.
    """

    uses_gradient: ClassVar[bool] = False
    _settled: ClassVar[tuple[str, ...]] = ("rho_schedule",)

    def __init__(self, bits: int = 8, **timing: Any) -> None:
        if timing.get("rho_schedule", "constant") != "constant":
            raise ConfigurationError(
                f"Expected no `rho_schedule` for Rounding, which has no radius, got {timing['rho_schedule']!r}: leave "
                "it out."
            )
        super().__init__(**timing)
        self.has_radii = False
        self.bits = check_whole("bits", bits, low=2, high=32)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return rounding_displacement(ascent.parameters, self.bits)[0], None
