"""What Python objects hold, and what these hold in turn: remembered, and put back."""

from __future__ import annotations

import io
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire.engine._torch import change_marks, uncounted_changes
from lightning_ire.functional.state import overwrite_, rewound

__all__ = ["DEPTH", "SCALARS", "WALKED", "DictionaryState", "ObjectState", "contents", "is_holder", "kept"]

SCALARS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype)
DEPTH = 3  # containers and objects in each other: a dictionary of lists of metrics
_CONTAINERS = (list, dict, set, deque, bytearray, tuple, frozenset)
WALKED = 10_000  # entries of a container that are looked into
_COPIED = 100_000  # entries of a container whose references are copied
_ELEMENTS = 1 << 24  # of a tensor or array that is no buffer
_BYTES = 1 << 20  # a tensor or array of more, in a dataset, is data
_OBJECTS = 100_000  # that are looked at
_HOLDERS = {"argparse", "collections", "types"}  # parts of the standard library whose objects only hold others
_LIBRARIES = {"lightning", "lightning_fabric", "lightning_ire", "numpy", "pytorch_lightning", *sys.stdlib_module_names}
_HIDDEN_PARTS = ("__self__", "__func__", "func", "args", "keywords")  # of methods and partial functions
_WITHOUT_STATE = {*_LIBRARIES, "torch", "torchvision"}  # in their functions and classes


class DictionaryState:
    """What some dictionaries hold, not what is in it.

    In three long lists: a copy of each dictionary would keep Python's garbage collector busy.

    Args:
        dictionaries: The dictionaries.
    """

    def __init__(self, dictionaries: list[dict[Any, Any]]) -> None:
        self._dictionaries = dictionaries
        self._before = _lists_of(dictionaries)

    def changed(self) -> Iterator[tuple[int, dict[Any, Any]]]:
        """Which dictionaries hold something else now, by index, and what they held."""
        if _same(self._before, _lists_of(self._dictionaries)):
            return
        counts, *entries = self._before
        pairs = zip(*entries, strict=True)
        for index, (dictionary, count) in enumerate(zip(self._dictionaries, counts, strict=True)):
            before = dict(islice(pairs, count))
            if not _same(_lists_of([before]), _lists_of([dictionary])):
                yield index, before

    def restore(self) -> None:
        """Let them hold what they held, in the order that it was in."""
        for index, before in self.changed():
            self._dictionaries[index].clear()
            self._dictionaries[index].update(before)


class ObjectState:
    """What some objects hold, what these hold in turn, and so on.

    Put back are containers, tensors, arrays, random generators and attributes of objects, each where it was changed.

    Args:
        roots: The objects, each with a name for :meth:`changed`.
        everything: False: up to three containers and objects of nothing but data inside each other; what is too large
            to be copied is watched. True: at most 100,000 objects of all classes, what functions keep in closures,
            defaults and globals, attributes of classes, and positions in files; what is large is data and left alone,
            as is what does not let itself be looked at or put back.
        leave: Objects of these classes are left alone.
        known: These objects are left alone.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        everything: bool = False,
        leave: tuple[type, ...] = (),
        known: Iterable[Any] = (),
    ) -> None:
        self._everything = everything
        self._errors = (Exception,) if everything else ()
        self._undo: list[Callable[[], Any]] = []
        self._watched: list[tuple[str, Any, Callable[[], Any]]] = []
        left = (*SCALARS, types.ModuleType, *leave)
        seen = {id(one): one for one in known}  # the objects themselves, or their ids would be used again
        waiting = [(name, root, _OBJECTS if everything else DEPTH) for name, root in roots]
        for name, one, depth in waiting:  # which grows
            if isinstance(one, left) or id(one) in seen:
                continue
            if everything and len(seen) >= _OBJECTS:
                break
            seen[id(one)] = one
            with suppress(*self._errors):
                parts = self._look_at(one, name, depth)
                waiting += [(name, part, depth - 1) for part in parts if depth]

    def changed(self) -> list[str]:
        """Names of the roots in which something changed that cannot be put back, as far as it is watched."""
        return [name for name, before, now in self._watched if now() != before]

    def restore(self) -> None:
        """Put everything back; can be called again."""
        for step in self._undo:
            with suppress(*self._errors):  # so that the others are put back
                step()

    def _look_at(self, one: Any, name: str, depth: int) -> Iterable[Any]:
        """Remember an object; returns what it consists of."""
        numpy = sys.modules.get("numpy")
        if isinstance(one, Tensor):
            self._keep_tensor(one, name)
        elif numpy is not None and isinstance(one, numpy.ndarray):
            if one.flags.writeable and not self._is_large(one.size, one.nbytes):
                self._undo.append(partial(numpy.copyto, one, one.copy()))
        elif (rewind := rewound(one)) is not None:
            self._undo.append(rewind)
        elif self._everything and isinstance(one, io.IOBase):
            self._undo.append(partial(one.seek, one.tell()))
        elif self._everything and isinstance(one, (types.FunctionType, type)):
            if one.__module__.split(".")[0] not in _WITHOUT_STATE:
                more = one.__bases__ if isinstance(one, type) else self._parts_of_function(one)
                return [*self._parts_of_object(one), *more]
        elif self._everything and isinstance(one, (types.MethodType, staticmethod, classmethod, partial)):
            return [getattr(one, part) for part in _HIDDEN_PARTS if hasattr(one, part)]
        elif isinstance(one, _CONTAINERS):
            return [*self._parts_of_container(one, name), *(self._parts_of_object(one) if self._everything else ())]
        elif self._everything or (depth and _is_data(one, depth)):
            return self._parts_of_object(one)
        return ()

    def _is_large(self, count: int, size: int) -> bool:
        return size > _BYTES if self._everything else count > _ELEMENTS

    def _keep_tensor(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad if self._everything else tensor.is_inference():
            return
        (mark,) = change_marks([tensor])
        if self._is_large(tensor.numel(), tensor.nbytes):
            self._watched.append((name, mark, lambda: change_marks([tensor])[0]))
            return
        before = tensor.detach().clone()

        def undo() -> None:
            if self._everything and torch.equal(tensor, before):  # it may be of a file that is open for reading
                return
            # what nobody was seen to change may have been changed through `.data` or an array; a graph that saved it
            # would take it for changed if this was counted
            unseen = change_marks([tensor])[0] == mark
            with uncounted_changes([tensor] if unseen else []):
                overwrite_([tensor], [before])

        self._undo.append(undo)

    def _parts_of_container(self, one: Any, name: str) -> Iterable[Any]:
        if len(one) > _COPIED and not self._everything:
            self._watched.append((name, len(one), partial(len, one)))
        elif isinstance(one, dict):
            self._undo.append(DictionaryState([one]).restore)
        elif not isinstance(one, (tuple, frozenset)):
            self._undo.append(partial(_refill, one, [*one]))
        inside = one.values() if isinstance(one, dict) else () if isinstance(one, (set, bytearray)) else one
        if len(one) <= WALKED:
            return inside
        if not self._everything:
            tensors = [inner for inner in inside if isinstance(inner, Tensor)]
            self._watched.append((name, change_marks(tensors), partial(change_marks, tensors)))
        return ()

    def _parts_of_object(self, one: Any) -> list[Any]:
        before = contents(one)
        self._undo.append(partial(_give_back, one, before))
        return [*before.values(), type(one)] if self._everything else [*before.values()]

    def _parts_of_function(self, function: types.FunctionType) -> list[Any]:
        parts: list[Any] = [function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            self._undo.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
            parts.append(cell.cell_contents)
        space = function.__globals__
        codes = [function.__code__]
        for code in codes:  # functions inside come to it
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            for name in set(code.co_names) & space.keys():
                self._undo.append(partial(space.__setitem__, name, space[name]))
                parts.append(space[name])
        return parts


@contextmanager
def kept(*roots: Any, leave: tuple[type, ...] = ()) -> Iterator[None]:
    """After the block what can be reached from some objects is as it was before.

    Args:
        *roots: A dataset, a collate function, a loader.
        leave: See :class:`ObjectState`.

    Yields:
        Nothing.

    Cost: one look at each object, at most 100,000, and copies of what is small.
    """
    state = ObjectState((("", root) for root in roots), everything=True, leave=leave)
    try:
        yield
    finally:
        state.restore()


def is_holder(value: Any) -> bool:
    """Whether an object is there to hold others: one of a class of the user's, or of one of a few others.

    Args:
        value: Any object.
    """
    if isinstance(value, (nn.Module, type, Tensor, *SCALARS)):
        return False
    roots = {kind.__module__.partition(".")[0] for kind in type(value).__mro__[:-1]}
    if "torch" in roots and callable(value):
        return False
    return bool(roots) and not roots & (_LIBRARIES - _HOLDERS)


def contents(value: Any) -> dict[str, Any]:
    """What an object holds in the slots of its classes and in its attributes, by name.

    Args:
        value: Any object.
    """
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    held = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    return held | dict(getattr(value, "__dict__", {}))


def _give_back(value: Any, before: dict[str, Any]) -> None:
    """Let an object or a class hold what it held."""
    of = type if isinstance(value, type) else object  # a class of the user's may be frozen
    now = contents(value)
    for name in now.keys() - before.keys():
        of.__delattr__(value, name)
    for name, held in before.items():
        if name not in now or now[name] is not held:
            of.__setattr__(value, name, held)


def _is_data(value: Any, depth: int) -> bool:
    """Whether an object holds nothing but data (a meter of averages, an augmentation; not what holds a file)."""
    if not is_holder(value):
        return False
    numpy = sys.modules.get("numpy")
    kinds = (*SCALARS, *_CONTAINERS, Tensor, nn.Module)
    kinds += (numpy.ndarray, numpy.generic) if numpy is not None else ()
    return all(
        isinstance(inner, kinds) or rewound(inner) is not None or (depth > 1 and _is_data(inner, depth - 1))
        for inner in contents(value).values()
    )


def _refill(container: Any, before: list[Any]) -> None:
    if len(container) != len(before) or not all(map(is_, container, before)):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


def _lists_of(dictionaries: list[dict[Any, Any]]) -> tuple[list[int], list[Any], list[Any]]:
    """How much each holds; all keys; all values."""
    filled = [dictionary for dictionary in dictionaries if dictionary]
    keys = chain.from_iterable(one.keys() for one in filled)  # those of compiled modules cannot be iterated over
    return [*map(len, dictionaries)], [*keys], [*chain.from_iterable(one.values() for one in filled)]


def _same(before: tuple[list[Any], ...], now: tuple[list[Any], ...]) -> bool:
    """Whether two such triples hold the same objects under the same keys in the same order."""
    return before[0] == now[0] and all(all(map(is_, a, b)) for a, b in zip(before[1:], now[1:], strict=True))
