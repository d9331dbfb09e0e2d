"""Estimates that use the graph of the training forward pass again, and run a pass of their own where they cannot."""

from __future__ import annotations

import warnings
from abc import abstractmethod

from torch import Tensor

from lightning_ire.curvature.base import Estimate, MicroBatch, Window

__all__ = ["SharedForward", "refused_by_checkpointing"]


def refused_by_checkpointing(error: RuntimeError) -> bool:
    """Whether it is reentrant activation checkpointing that refuses `torch.autograd.grad`."""
    return "checkpoint" in str(error).lower()


class SharedForward(Estimate):
    """One refresh, micro-batch by micro-batch: :meth:`share` during training, or :meth:`own_pass` before the step.

    Args:
        window: The window it watches.
        name: Name of the estimate, for the warning.
    """

    def __init__(self, window: Window, name: str) -> None:
        self.window = window
        self.name = name
        self.done: set[MicroBatch] = set()

    @abstractmethod
    def share(self, micro_batch: MicroBatch, loss: Tensor) -> bool:
        """Add what the live graph of the training forward pass gives; it has to stay alive.

        Returns:
            False, if there is nothing to be had of it.

        Raises:
            RuntimeError: If the graph refuses; nothing was added.
        """

    @abstractmethod
    def own_pass(self, micro_batch: MicroBatch) -> None:
        """Add the same from a forward pass of its own."""

    def before_backward(self, micro_batch: MicroBatch, loss: Tensor) -> None:
        """See the base class."""
        try:
            if self.share(micro_batch, loss):
                self.done.add(micro_batch)
        except RuntimeError as error:  # reentrant checkpointing, a compiled backward that gave its buffers away, ...
            warnings.warn(
                f"{self.name} cannot share the training forward pass and runs one of its own at each estimate: "
                + str(error).split("\n")[0],
                stacklevel=2,
            )

    def forget(self) -> None:
        """See the base class."""
        self.done.clear()

    def run_own_passes(self) -> None:
        """Make up for the micro-batches that could not be shared."""
        for micro_batch in self.window.micro_batches:
            if micro_batch.backward_done and micro_batch not in self.done:
                self.own_pass(micro_batch)
