"""An extra pass that leaves no trace in the module, its metrics, its logs or the random number streams."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ire.engine._torch import extra_pass
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import AttributeState, ModuleState, is_metric
from lightning_ire.functional import RandomState

__all__ = ["Replay", "devices_of", "no_trace", "no_trace_on_the_graph", "without_inference_tensors"]


class Replay:
    """What a pass over one micro-batch started from, besides weights and buffers.

    Args:
        modules: What :func:`modules_of` says.
        devices: What :func:`devices_of` says.
    """

    def __init__(self, modules: Collection[nn.Module], devices: Collection[torch.device]) -> None:
        self._streams = RandomState.capture(devices)
        self._attributes = AttributeState(modules)

    def restore(self) -> None:
        """Let the next pass start from it."""
        self._streams.restore()
        self._attributes.restore(replay=True)


@contextmanager
def no_trace(
    modules: Collection[nn.Module],
    host: Host,
    devices: Collection[torch.device],
    weights: Iterable[nn.Parameter] = (),
    offload: bool = False,
) -> Iterator[None]:
    """After the block the module, its metrics and the random number streams are what they were; nothing was logged.

    Not put back: numbers in Python attributes and objects that are more than data (see :class:`AttributeState`), what
    the step writes to a logger directly, and in-place changes of the batch.

    Args:
        modules: What :func:`modules_of` says of the module whose `training_step` runs inside the block.
        host: The loop, which keeps what is logged inside the block to itself.
        devices: What :func:`devices_of` says.
        weights: Parameters that the block may change (see :class:`MovingWeights`).
        offload: Whether to keep copies of these in host memory.

    Yields:
        Nothing.
    """
    streams = RandomState.capture(devices)
    contents, attributes = ModuleState(modules, weights, offload), AttributeState(modules)
    try:
        with extra_pass(), host.quiet(modules):
            yield
    finally:
        contents.restore()
        streams.restore()
        attributes.restore()


@contextmanager
def no_trace_on_the_graph(
    modules: Collection[nn.Module], host: Host, devices: Collection[torch.device]
) -> Iterator[None]:
    """For a backward pass through a graph that training still needs: what checkpointed layers and hooks do is undone.

    Args:
        modules: What :func:`modules_of` says of the module that made the graph.
        host: The loop.
        devices: What :func:`devices_of` says.

    Yields:
        Nothing.
    """
    streams = RandomState.capture(devices)
    contents, attributes = ModuleState(modules), AttributeState(modules)
    try:
        with extra_pass(), host.quiet(modules):
            yield
    finally:
        contents.restore(for_the_graph=True)
        streams.restore()
        attributes.restore()


def without_inference_tensors(module: nn.Module) -> None:
    """Replace buffers and metric states that inference mode made, which nothing outside of it may change, by copies.

    :func:`no_trace` around it puts the originals back.

    Args:
        module: Any module.
    """
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(owner, name, buffer.clone())
        if is_metric(owner):
            for key, value in list(vars(owner).items()):
                if isinstance(value, Tensor) and value.is_inference():
                    vars(owner)[key] = value.clone()


def devices_of(module: nn.Module) -> set[torch.device]:
    """Devices that hold a parameter of the module."""
    return {parameter.device for parameter in module.parameters()}
