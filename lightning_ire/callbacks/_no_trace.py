"""An extra pass that leaves no trace in the module, its metrics, its logs or the random number streams."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ire._lightning import kept_for_the_graph, muted_logging
from lightning_ire.functional import BufferState, RandomState, kept_buffers

__all__ = ["devices_of", "in_extra_pass", "no_trace", "no_trace_on_the_graph", "without_inference_tensors"]


_extra_passes = 0


def in_extra_pass() -> bool:
    """Whether `training_step` is being run in a pass that Lightning knows nothing of.

    That is the second pass of SAM, one of a curvature estimate's own, or one of the monitor's. Such passes put back
    buffers, metrics, logged values and random numbers, but not a module's Python attributes: a step that counts, or
    that keeps what it has seen in a list, asks here first.

    Example:
        >>> in_extra_pass()
        False
    """
    return _extra_passes > 0


@contextmanager
def no_trace(module: nn.Module, devices: Collection[torch.device] | None = None) -> Iterator[None]:
    """After the block buffers, metric states and random number streams are what they were; nothing was logged.

    Not put back: Python attributes that `training_step` sets, what it writes to a logger directly, and in-place
    changes of the batch.

    Args:
        module: The module whose `training_step` runs inside the block.
        devices: What :func:`devices_of` says, if it is known.

    Yields:
        Nothing.
    """
    global _extra_passes
    modules = list(module.modules())  # finding them takes longer than what is done with most of them
    streams = RandomState.capture(devices_of(module) if devices is None else devices)
    _extra_passes += 1
    try:
        with kept_buffers(modules), _kept_metrics(modules), muted_logging(modules):
            yield
    finally:
        _extra_passes -= 1
        streams.restore()


@contextmanager
def no_trace_on_the_graph(module: nn.Module, devices: Collection[torch.device]) -> Iterator[None]:
    """For a backward pass through a graph that training still needs: buffers and random numbers are put back.

    Args:
        module: The module that made the graph.
        devices: What :func:`devices_of` says.

    Yields:
        Nothing.
    """
    streams = RandomState.capture(devices)
    try:
        with kept_for_the_graph(BufferState.capture(module)):
            yield
    finally:
        streams.restore()


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
        if isinstance(owner, Metric):
            for key, value in list(vars(owner).items()):
                if isinstance(value, Tensor) and value.is_inference():
                    vars(owner)[key] = value.clone()


def devices_of(module: nn.Module) -> set[torch.device]:
    """Devices that hold a parameter of the module."""
    return {parameter.device for parameter in module.parameters()}


@contextmanager
def _kept_metrics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After the block every torchmetrics metric among `modules` holds the same objects with the same contents.

    A metric's state is made of plain attributes, tensors and lists, some changed in place and some replaced, and
    metrics of one collection may share them.
    """
    metrics = [child for child in modules if isinstance(child, Metric)]
    saved = [[(key, value, _copy(value)) for key, value in vars(metric).items()] for metric in metrics]
    try:
        yield
    finally:
        with torch.no_grad():
            for metric, attributes in zip(metrics, saved, strict=True):
                vars(metric).clear()
                for key, value, before in attributes:
                    vars(metric)[key] = value
                    if isinstance(value, Tensor):
                        value.copy_(before)
                    elif isinstance(value, list):
                        value[:] = before


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else None
