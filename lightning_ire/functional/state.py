"""Save and put back what an extra pass would otherwise change: buffers and random number streams."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "kept_buffers"]


@dataclass(frozen=True)
class RandomState:
    """State of the random number streams of torch (CPU and the given devices), numpy and Python.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> bool((torch.rand(3) == first).all())
        True
    """

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    numpy: dict[str, Any] | None
    python: tuple[Any, ...]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """Read all streams.

        Args:
            devices: Devices whose generators count besides the CPU's (CPU devices are skipped).

        Returns:
            The state; reading changes nothing.
        """
        others = {device for device in devices if device.type not in ("cpu", "meta")}
        states = tuple((device, torch.get_device_module(device).get_rng_state(device)) for device in others)
        numpy = sys.modules.get("numpy")  # a numpy that nobody imported has drawn nothing
        return cls(
            torch.get_rng_state(), states, numpy.random.get_state(legacy=False) if numpy else None, random.getstate()
        )

    def restore(self) -> None:
        """Set all streams back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """After the block all buffers of the module and its children are the same tensors with the same contents.

    All buffers, not only BatchNorm's: registered memories, teachers' averages and counters too. A buffer that the
    block replaces or deletes is put back; one that it registers stays. Contents are put back in place, so a graph made
    before the block that saved a buffer for its backward pass cannot be back-propagated after it.

    Args:
        module: Any module.

    Yields:
        Nothing.

    Cost: one copy of the buffers.
    """
    saved = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, before in saved:
                if not hasattr(owner, name):
                    owner.register_buffer(name, buffer)
                elif getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)
                if not _overlaps_itself(buffer):
                    buffer.copy_(before)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory (`expand`): torch lets nobody write to such a tensor, so it cannot have changed."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
