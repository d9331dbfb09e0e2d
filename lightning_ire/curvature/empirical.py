"""The square of the training gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_ire.curvature.base import Curvature, Estimate, Window, finite_or_none
from lightning_ire.functional import fisher_diagonal

__all__ = ["EmpiricalFisher"]


class EmpiricalFisher(Curvature):
    """h = g * g: the square of the window's unperturbed training gradient, averaged over devices, before clipping.

    Free, but no estimate of the Fisher: the labels are the true ones and the square is of the batch's mean, so that
    h vanishes where the training loss is fitted.

    Under :class:`~lightning_ire.AverageSAM` there is no unperturbed gradient: h is then that of the only pass.

    Cost: no pass; one gradient-sized copy inside the step. With `SAM(sync=False)` on several devices one all-reduce.
    """

    reruns: ClassVar[bool] = False

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _SquaredGradient(window)


class _SquaredGradient(Estimate):
    def __init__(self, window: Window) -> None:
        self.window = window

    def finish(self) -> list[Tensor | None] | None:
        return finite_or_none(fisher_diagonal(self.window.gradients()), self.window.parameters)
