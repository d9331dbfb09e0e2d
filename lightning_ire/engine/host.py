"""What the engine asks of the loop around it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Host"]


class Host(Protocol):
    """A training loop, as far as an optimizer step of IRE and SAM depends on it."""

    @property
    def rank(self) -> int:
        """Number of this process among those that train together."""

    @property
    def world_size(self) -> int:
        """How many processes train together."""

    @property
    def device(self) -> torch.device:
        """Where collectives work."""

    @property
    def micro_batches(self) -> int:
        """Backward passes per optimizer step; losses are divided by it."""

    @property
    def epoch(self) -> int:
        """Zero-based epoch."""

    @property
    def loss_scale(self) -> float:
        """Factor by which a GradScaler multiplies losses; 1 without one."""

    @property
    def will_log(self) -> bool:
        """Whether the values of the current step will be looked at, so that what costs something is worth it."""

    @property
    def what_steps(self) -> str:
        """The user's function that makes the loss, as error messages call it."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a loss as the loop does; it is the micro-batch's, not yet divided by :attr:`micro_batches`."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Backward passes inside the block leave each process with its own gradient."""

    def autocast(self) -> AbstractContextManager[Any]:
        """What the loop enters around a forward pass, for one that goes beside its distributed wrapper."""

    def quiet(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Nothing that the modules log inside the block arrives anywhere."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over the processes of a tensor on :attr:`device`, which may be overwritten."""
