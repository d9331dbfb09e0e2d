"""How fast training goes."""

from __future__ import annotations

import time

import torch

__all__ = ["Throughput"]


class Throughput:
    """Counts samples and the seconds in which they were trained on, pauses left out.

    The clock is `time.perf_counter`. A CUDA device finishes its work before the clock is read.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._paused = False

    def start(self, device: torch.device) -> None:
        """Forget everything and start the clock.

        Args:
            device: Where the work is done.
        """
        self.samples, self._seconds, self._paused = 0, 0.0, False
        self._since = _now(device)

    def stop(self, device: torch.device) -> None:
        """Stop the clock, if it is running.

        Args:
            device: Where the work is done.
        """
        if self._since is not None:
            self._seconds += _now(device) - self._since
            self._since = None

    def pause(self, device: torch.device) -> None:
        """Stop the clock until `resume`.

        Args:
            device: Where the work is done.
        """
        self._paused = self._since is not None
        self.stop(device)

    def resume(self, device: torch.device) -> None:
        """Let the clock go on, if it was running at the last `pause`.

        Args:
            device: Where the work is done.
        """
        if self._paused:
            self._since = _now(device)
            self._paused = False

    def rate(self) -> float | None:
        """Samples per second while the clock was running; ``None`` if there was nothing to count."""
        return self.samples / self._seconds if self.samples else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
