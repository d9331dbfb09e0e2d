"""A mask that knows nothing of the loss: the control for experiments."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_ire.curvature.base import Curvature, Estimate, Window
from lightning_ire.functional import part_of_whole

__all__ = ["RandomMask"]


class RandomMask(Curvature):
    """h ~ U(0, 1), drawn anew at every refresh: a random share gamma of the coordinates is called flat.

    If a run with it does as well as one with an estimate, flatness was not the reason. The draws are the same on all
    devices and differ between refreshes; a resumed run draws the same ones.

    Cost: no pass; random numbers of the parameters' size inside the step (sharded: of the largest parameter's whole).
    """

    reruns: ClassVar[bool] = False

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _Draw(window)


class _Draw(Estimate):
    def __init__(self, window: Window) -> None:
        self.window = window

    def finish(self) -> list[Tensor | None] | None:
        parameters = self.window.parameters
        sources = {
            device: torch.Generator(device).manual_seed(self.window.shared_seed)
            for device in {parameter.device for parameter in parameters}
        }
        return [
            part_of_whole(
                torch.rand(parameter.shape, generator=sources[parameter.device], device=parameter.device), parameter
            )
            if parameter.requires_grad
            else None
            for parameter in parameters
        ]
