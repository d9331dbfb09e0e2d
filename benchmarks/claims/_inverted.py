"""The mask upside down: a control for experiments."""

from __future__ import annotations

from lightning_ire import SampledFisher
from lightning_ire.curvature import Estimate, Window

__all__ = ["InvertedFisher"]

_TINY = 1e-30  # where h = 0: the largest number, so called sharp


class InvertedFisher(SampledFisher):
    """1 / h of SampledFisher: the share gamma of the coordinates with the LARGEST curvature is boosted."""

    def begin(self, window: Window) -> Estimate:
        estimate = super().begin(window)
        finish = estimate.finish

        def inverted() -> list | None:
            values = finish()
            return None if values is None else [None if h is None else 1 / (h + _TINY) for h in values]

        estimate.finish = inverted
        return estimate
