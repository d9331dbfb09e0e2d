"""Argument checks: one error type and one message form, "Expected `key` to be ..., got ...".

Torch-free on purpose, so that every layer of the package may import it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = [
    "ConfigurationError",
    "NotForFabric",
    "check_choice",
    "check_folder",
    "check_number",
    "check_numbers",
    "check_path",
    "check_switch",
    "check_whole",
]


class ConfigurationError(ValueError):
    """A setting or a set-up that cannot work; the message says what was expected, what came, and what to change."""


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    where: str = "",
) -> float:
    """Return `value` as a float if it is a finite number between `low` and `high`.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        low: Smallest value allowed.
        high: Largest value allowed.
        low_open: Whether `low` itself is refused.
        high_open: Whether `high` itself is refused.
        where: Said after the name.

    Returns:
        The value as a float.

    Raises:
        ConfigurationError: If `value` is no finite number in the range.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if ok:
        ok = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    if not ok:
        raise ConfigurationError(
            f"Expected `{name}`{where} to be a number {_range(low, high, low_open, high_open)}, got {value!r}."
        )
    return float(value)


def check_numbers(name: str, value: Any, **limits: Any) -> float | dict[str, float]:
    """Return `value` if it is a number in a range, or a mapping from name patterns to such numbers.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        **limits: The range, as :func:`check_number` takes it.

    Returns:
        The value as a float, or as a dictionary of floats.

    Raises:
        ConfigurationError: If `value` is neither.
    """
    if not isinstance(value, Mapping):
        return check_number(name, value, **limits)
    if not value or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ConfigurationError(
            f"Expected `{name}` to be a number, or a mapping from name patterns to numbers such as "
            f'{{"*.bias": 0.5, "*": 1}}, got {value!r}.'
        )
    return {pattern: check_number(name, one, where=f" of {pattern!r}", **limits) for pattern, one in value.items()}


def check_whole(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Return `value` if it is a whole number that is at least `low`.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        low: Smallest value allowed.
        high: Largest value allowed; ``None``: any.

    Returns:
        The value.

    Raises:
        ConfigurationError: If `value` is no whole number, too small or too large.
    """
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ConfigurationError(f"Expected `{name}` to be a whole number {allowed}, got {value!r}.")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        choices: The values allowed.

    Returns:
        The value.

    Raises:
        ConfigurationError: If `value` is not one of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def check_switch(name: str, value: Any, word: str = "") -> Any:
    """Return `value` if it is true, false or one word.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        word: The word allowed; none by default.

    Returns:
        The value.

    Raises:
        ConfigurationError: If `value` is anything else.
    """
    if not isinstance(value, bool) and (not word or value != word):
        words = f"true, false or {word!r}" if word else "true or false"
        raise ConfigurationError(f"Expected `{name}` to be {words}, got {value!r}.")
    return value


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a path, `~` being the user's folder, if it can be one.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.

    Returns:
        The path.

    Raises:
        ConfigurationError: If `value` is anything else, such as None.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigurationError(f"Expected `{name}` to be a path, got {value!r}.")
    return Path(value).expanduser()


def check_folder(name: str, value: str | Path, folder: str | Path | None = None) -> None:
    """Make sure that a folder can be made and written to: a temporary one is made in what there is of it, and removed.

    Args:
        name: The argument's name, as the user typed it.
        value: What came; remote addresses are not checked.
        folder: Where something will be written below that; by default the same.

    Raises:
        ConfigurationError: If it cannot.
    """
    there = Path(os.path.expandvars(value if folder is None else folder)).expanduser()
    if "://" in str(value):
        return
    while there != there.parent and not os.path.lexists(there):
        there = there.parent
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"Expected `{name}` to be a folder to write to, got {str(value)!r}: {there}: {error.strerror}."
        ) from error


def _range(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if math.isinf(high):
        return f"{'>' if low_open else '>='} {low:g}"
    return f"in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"


class NotForFabric:
    """What has no effect in ``Fabric(callbacks=...)``, which calls these two methods; a Trainer calls neither."""

    @property
    def for_fabric(self) -> str:
        """What to write in a loop with Fabric; empty: nothing is lost."""
        raise NotImplementedError

    def on_after_setup(self) -> None:
        """Fabric has set up a model: say that this would do nothing.

        Raises:
            ConfigurationError: With what to write, in one line.
        """
        if instead := self.for_fabric:
            raise ConfigurationError(
                f"Expected {type(self).__name__} in `Trainer(callbacks=...)`, got it in `Fabric(callbacks=...)`, where "
                f"nothing calls it: write {instead}."
            )

    def on_after_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Fabric has stepped an optimizer.

        Args:
            *args: Not looked at.
            **kwargs: Not looked at.

        Raises:
            ConfigurationError: With what to write, in one line.
        """
        self.on_after_setup()
