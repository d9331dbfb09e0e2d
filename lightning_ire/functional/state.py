"""Save and put back what an extra pass would otherwise change: buffers and random number streams."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire.functional._foreach import copied, copy_

__all__ = ["BufferState", "RandomState", "kept_buffers", "overwrite_", "rewound", "seeded"]


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


@dataclass(frozen=True)
class BufferState:
    """Contents of all buffers of a module and its children.

    All buffers, not only BatchNorm's: registered memories, teachers' averages and counters too.

    Example:
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> state = BufferState.capture(norm)
        >>> _ = norm(torch.randn(8, 2))
        >>> state.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    saved: tuple[tuple[nn.Module, str, Tensor, Tensor], ...]

    @classmethod
    def capture(cls, module: nn.Module | Iterable[nn.Module]) -> BufferState:
        """Copy all buffers.

        Args:
            module: Any module; or modules without their children, each once.

        Returns:
            The state; no module is changed.
        """
        modules = module.modules() if isinstance(module, nn.Module) else module
        found = [(owner, name, buffer) for owner in modules for name, buffer in owner.named_buffers(recurse=False)]
        copies = copied([buffer for _, _, buffer in found])
        return cls(tuple((*each, copy) for each, copy in zip(found, copies, strict=True)))

    @torch.no_grad()
    def restore(self) -> None:
        """Make all buffers the same tensors with the same contents again.

        A buffer that was replaced or deleted meanwhile is put back; one that was registered stays. Contents are put
        back in place, so a graph that saved a buffer for its backward pass cannot be back-propagated afterwards.
        """
        for owner, name, buffer, _ in self.saved:
            if not hasattr(owner, name):
                owner.register_buffer(name, buffer)
            elif getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)
        overwrite_([buffer for _, _, buffer, _ in self.saved], [before for _, _, _, before in self.saved])


@contextmanager
def kept_buffers(module: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """After the block all buffers of the module are as before, see :class:`BufferState`.

    Args:
        module: As in :meth:`BufferState.capture`.

    Yields:
        Nothing.

    Cost: one copy of the buffers.
    """
    state = BufferState.capture(module)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Inside the block the streams of torch, numpy and Python start from a seed; after it they are as before.

    Args:
        seed: Seed, any whole number >= 0.
        devices: As in :meth:`RandomState.capture`.

    Yields:
        Nothing.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(3)
        >>> with seeded(1):
        ...     bool((torch.rand(3) == first).all())
        True
    """
    before = RandomState.capture(devices)
    try:
        torch.set_rng_state(torch.Generator().manual_seed(seed % 2**63).get_state())
        for device, _ in before.devices:
            state = torch.Generator(device).manual_seed(seed % 2**63).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        if before.numpy is not None:
            sys.modules["numpy"].random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        before.restore()


@torch.no_grad()
def overwrite_(tensors: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Give tensors, in place, the shapes and contents of others (quantization's observers resize their buffers)."""
    pairs = [pair for pair in zip(tensors, sources, strict=True) if not _overlaps_itself(pair[0])]
    for tensor, source in pairs:
        if tensor.shape != source.shape:
            tensor.resize_(source.shape)
    copy_([tensor for tensor, _ in pairs], [source for _, source in pairs])


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory (`expand`): torch lets nobody write to such a tensor, so it cannot have changed."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def rewound(generator: Any) -> Callable[[], Any] | None:
    """What puts a random generator of torch, Python or numpy back; ``None`` for anything else.

    Args:
        generator: Any object.
    """
    numpy = sys.modules.get("numpy")
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if numpy is None:
        return None
    if isinstance(generator, numpy.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, numpy.random.BitGenerator):
        return functools.partial(setattr, generator, "state", generator.state)
    if isinstance(generator, numpy.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    return None
