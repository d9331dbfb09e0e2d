"""What a user's dataset and collate function change in Python objects while they make a probe, put back."""

from __future__ import annotations

import collections
import functools
import io
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ire.engine.module_state import in_slots
from lightning_ire.functional.state import rewound

__all__ = ["kept"]

_DATA = 10_000  # elements: a container of more is data; it is put back itself, what is in it is not looked at
_LARGE = 1 << 20  # bytes: a tensor or array of more is data
_MOST = 100_000  # objects looked at
_ATOMS = (str, bytes, int, float, complex, type(None), types.ModuleType, pl.Trainer)
_LIBRARIES = {"builtins", "lightning", "lightning_ire", "numpy", "torch", "torchvision", *sys.stdlib_module_names}
Undo = Callable[[], Any]


@contextmanager
def kept(*roots: Any) -> Iterator[None]:
    """After the block what can be reached from some objects is as it was before.

    Put back are random generators (of torch, numpy and Python), attributes, containers, small tensors and arrays, what
    functions keep in closures, defaults and globals, attributes of classes, and positions in files.

    Args:
        *roots: A dataset, a collate function, a loader.

    Yields:
        Nothing.

    Cost: one look at each object, at most 100,000, and copies of what is small.
    """
    undo: list[Undo] = []
    seen: dict[int, Any] = {}  # the objects themselves, or their ids would be used again
    waiting = list(roots)
    while waiting and len(seen) < _MOST:
        one = waiting.pop()
        if isinstance(one, _ATOMS) or id(one) in seen:
            continue
        seen[id(one)] = one
        with suppress(Exception):  # objects that do not let themselves be looked at
            waiting += _look_at(one, undo)
    try:
        yield
    finally:
        for step in undo:
            with suppress(Exception):  # so that the others are put back
                step()


def _look_at(one: Any, undo: list[Undo]) -> list[Any]:
    """Add what puts an object back; return what it consists of."""
    numpy = sys.modules.get("numpy")
    if isinstance(one, Tensor):
        if one.nbytes <= _LARGE and not one.requires_grad:
            undo.append(functools.partial(_refill, one, one.detach().clone()))
    elif numpy is not None and isinstance(one, numpy.ndarray):
        if one.nbytes <= _LARGE and one.flags.writeable and not one.dtype.hasobject:
            undo.append(functools.partial(numpy.copyto, one, one.copy()))
    elif (rewind := rewound(one)) is not None:
        undo.append(rewind)
    elif isinstance(one, io.IOBase):
        undo.append(functools.partial(one.seek, one.tell()))
    elif isinstance(one, types.FunctionType):
        return _parts_of_function(one, undo)
    elif isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    elif isinstance(one, (staticmethod, classmethod)):
        return [one.__func__]
    elif isinstance(one, functools.partial):
        return [one.func, *one.args, one.keywords]
    elif isinstance(one, type):
        return _parts_of_class(one, undo)
    else:
        return _parts_of_object(one, undo)
    return []


def _refill(tensor: Tensor, before: Tensor) -> None:
    if not torch.equal(tensor, before):
        with torch.no_grad():
            tensor.copy_(before)


def _parts_of_function(function: types.FunctionType, undo: list[Undo]) -> list[Any]:
    if function.__module__.split(".")[0] in _LIBRARIES:
        return []
    parts: list[Any] = [function.__dict__, function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        undo.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
        parts.append(cell.cell_contents)
    space = function.__globals__
    codes = [function.__code__]
    for code in codes:  # functions inside come to it
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in set(code.co_names) & space.keys():
            undo.append(functools.partial(space.__setitem__, name, space[name]))
            parts.append(space[name])
    return parts


def _parts_of_class(kind: type, undo: list[Undo]) -> list[Any]:
    if kind.__module__.split(".")[0] in _LIBRARIES:
        return []
    before = dict(vars(kind))

    def restore() -> None:
        for name in [*vars(kind)]:
            if name not in before:
                delattr(kind, name)
            elif vars(kind)[name] is not before[name]:
                setattr(kind, name, before[name])

    undo.append(restore)
    return [*before.values(), *kind.__bases__]


def _parts_of_object(one: Any, undo: list[Undo]) -> list[Any]:
    parts: list[Any] = [type(one)]
    if isinstance(one, (list, collections.deque, bytearray)):
        undo.append(functools.partial(_refill_container, one, list(one), "extend"))
        parts += one if len(one) <= _DATA else []
    elif isinstance(one, set):
        undo.append(functools.partial(_refill_container, one, list(one), "update"))
    elif isinstance(one, dict):
        undo.append(functools.partial(_refill_dict, one, list(one.items())))
        parts += one.values() if len(one) <= _DATA else []
    elif isinstance(one, (tuple, frozenset)):
        parts += one if len(one) <= _DATA else []
    if hasattr(one, "__dict__"):
        parts.append(vars(one))
    for name, held in in_slots(one).items():
        undo.append(functools.partial(setattr, one, name, held))
        parts.append(held)
    return parts


def _refill_container(one: Any, before: list[Any], put: str) -> None:
    if len(one) != len(before) or any(now is not then for now, then in zip(one, before, strict=True)):
        one.clear()
        getattr(one, put)(before)


def _refill_dict(one: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    now = list(one.items())
    if len(now) != len(before) or any(a is not b or x is not y for (a, x), (b, y) in zip(now, before, strict=True)):
        one.clear()
        one.update(before)
