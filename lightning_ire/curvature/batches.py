"""Cutting samples out of a batch of any structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_ire._checks import ConfigurationError

__all__ = ["first_dimensions", "map_tensors", "part_of", "samples_in", "samples_to_cut", "stacked_tensors"]


def samples_in(batch: Any) -> int | None:
    """Number of samples; ``None``: there is nothing in the batch that could be cut.

    Args:
        batch: Tensors in nested tuples, lists and mappings. The first dimension goes over the samples, and the first
            tensor with more than one says how many there are; but if there is a list of mappings (detection targets),
            its entries are the samples, and so are those of all lists of its length.
    """
    return next(iter(first_dimensions(batch)), None)


def first_dimensions(batch: Any) -> list[int]:
    """Every number of samples that the batch might have, in order: more than one if its tensors do not agree.

    Args:
        batch: As in :func:`samples_in`.
    """
    items = _list_of_samples(batch)
    if items is not None:
        return [len(items)]
    sizes = list(dict.fromkeys(tensor.size(0) for tensor in _tensors(batch) if tensor.dim()))
    return [size for size in sizes if size > 1] or sizes[:1]


def samples_to_cut(batch: Any, who: object, remedy: str) -> int:
    """How many samples a batch has that is to be cut.

    Args:
        batch: As in :func:`samples_in`.
        who: What cuts it.
        remedy: What to set in place of cutting.

    Raises:
        ConfigurationError: If it is not known.
    """
    sizes = first_dimensions(batch)
    if len(sizes) == 1:
        return sizes[0]
    got = f"first dimensions of {', '.join(map(str, sizes))}" if sizes else f"none in a {type(batch).__name__}"
    raise ConfigurationError(
        f"Expected a batch of tensors with the same first dimension, that of the samples, for {who!r} to cut it, got "
        f"{got}: {remedy}, or put the samples first."
    )


def part_of(batch: Any, start: int, stop: int) -> Any:
    """The samples from `start` to `stop`, in the batch's own structure; what is no sample's stays as it is.

    Args:
        batch: As in :func:`samples_in`.
        start: First sample.
        stop: One behind the last.
    """
    size = samples_in(batch)
    listed = _list_of_samples(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() and value.size(0) == size else value
        if listed is not None and (value is listed or (value is not batch and _has_entries(value, size))):
            return type(value)(value[start:stop])
        return _rebuilt(value, cut)

    return cut(batch)


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with another value for every tensor.

    Args:
        batch: Nested tuples, lists and mappings.
        function: Makes the value.
    """
    return function(batch) if isinstance(batch, Tensor) else _rebuilt(batch, lambda inner: map_tensors(inner, function))


def stacked_tensors(batch: Any) -> list[Tensor]:
    """The tensors whose first dimension goes over the samples; none if the samples are entries of lists.

    Args:
        batch: As in :func:`samples_in`.
    """
    size = None if _list_of_samples(batch) is not None else samples_in(batch)
    return [tensor for tensor in _tensors(batch) if size is not None and tensor.dim() and tensor.size(0) == size]


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def _list_of_samples(batch: Any) -> Any:
    """The first list of mappings in the batch."""
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(item, Mapping) for item in batch):
        return batch
    found = (_list_of_samples(value) for value in _inside(batch))
    return next((items for items in found if items is not None), None)


def _has_entries(value: Any, count: int | None) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {key: function(inner) for key, inner in value.items()})
    if isinstance(value, Mapping):
        return type(value)({key: function(inner) for key, inner in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(inner) for inner in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(inner) for inner in value)
    return value
