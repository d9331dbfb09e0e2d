"""Functions of ours in front of methods of single objects, which leave classes, copies and pickles as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

__all__ = ["Patches", "behind_wrapper", "muted", "nothing", "own_method"]

_BEHIND = "_lightning_ire_original"


def own_method(owner: Any, name: str) -> Callable[..., Any]:
    """A method without the wrappers of ours that are outermost (a stranger's around them stays, with all inside).

    Args:
        owner: The object.
        name: Name of the method.
    """
    method = getattr(owner, name)
    while (behind := behind_wrapper(method)) is not None:
        method = behind[0]
    return method


def behind_wrapper(method: Any) -> tuple[Callable[..., Any], Any] | None:
    """What a wrapper of ours stands before: the method, and what the instance itself had under its name."""
    kept = vars(method).get(_BEHIND) if isinstance(method, FunctionType) else None
    return kept[1:] if kept is not None and kept[0] is method else None  # `functools.wraps` copies the attribute


class Patches:
    """Functions of ours in front of methods, on the instance; the classes are not touched, copies and pickles plain."""

    def __init__(self) -> None:
        self._installed: list[tuple[Any, str, Callable[..., Any], Any]] = []

    def put(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Let calls of a method go to `replacement`.

        Args:
            owner: The object.
            name: Name of the method.
            replacement: What is called instead.
        """
        if not any(known is owner for known, *_ in self._installed):
            state = getattr(owner, "__getstate__", lambda: dict(vars(owner)))  # Python 3.10: not every object has one
            self.install(owner, "__getstate__", state, lambda: _without_patches(state()))
        self.install(owner, name, getattr(owner, name), replacement)

    def install(self, owner: Any, name: str, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """As :meth:`put`, without a word to `__getstate__`.

        Args:
            owner: The object.
            name: Name of the method.
            original: The method, whose name and signature the wrapper shows.
            replacement: What is called instead.
        """

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(*args, **kwargs)

        # Lightning looks one level deep to read the signature: show it what it would have seen without us
        wrapper.__wrapped__ = getattr(original, "__wrapped__", original)
        before = vars(owner).get(name)
        vars(wrapper)[_BEHIND] = (wrapper, original, before)
        self._installed.append((owner, name, wrapper, before))
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Take the wrappers away. Does nothing the second time."""
        for owner, name, wrapper, before in reversed(self._installed):
            if vars(owner).get(name) is not wrapper:
                continue  # somebody put another wrapper on top and owns the name now
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._installed = []


def _without_patches(state: Any) -> Any:
    """An object's state as it would be without us."""
    if not isinstance(state, dict):
        return state
    plain = {}
    for name, value in state.items():
        while (behind := behind_wrapper(value)) is not None:
            value = behind[1]
        if value is not None or state[name] is None:
            plain[name] = value
    return plain


@contextmanager
def muted(owner: Any, *names: str) -> Iterator[None]:
    """Inside the block methods of an object do nothing.

    Args:
        owner: The object.
        *names: Their names.

    Yields:
        Nothing.
    """
    patches = Patches()
    try:
        for name in names:
            patches.put(owner, name, nothing)
        yield
    finally:
        patches.remove()


def nothing(*args: Any, **kwargs: Any) -> None:
    """What stands in front of a method that is to do nothing.

    Args:
        *args: Not looked at.
        **kwargs: Not looked at.
    """
