"""The grid: its cells, their names as folders, and the numbers that stand for their values in the database."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SEED", "Cell", "Grid", "code", "in_order", "number"]

SEED = "seed_everything"
"""The key over whose values a table averages."""

_BASELINE = ("ire.kappa", "0")
_LONGEST_NAME = 120  # file systems allow 255 bytes


def number(value: str) -> float | None:
    """Return the finite number that `value` spells, or None.

    Args:
        value: As typed.

    Returns:
        The number.

    Example:
        >>> number("5e-4"), number("SAM"), number("nan")
        (0.0005, None, None)
    """
    try:
        spelt = float(value)
    except ValueError:
        return None
    return spelt if math.isfinite(spelt) else None


def code(value: str) -> float:
    """Return the number that stands for `value` in the database.

    Optuna's categorical parameters cannot be given further values later on, its numbers can. Other texts than numbers
    are coded by 48 bits of their SHA-256, so that the code depends on nothing but the text.

    Args:
        value: As typed; `0.9` and `0.90` are the same.

    Returns:
        The value itself if it is a number.
    """
    spelt = number(value)
    return float(int(hashlib.sha256(value.encode()).hexdigest()[:12], 16)) if spelt is None else spelt


def in_order(values: tuple[str, ...]) -> list[str]:
    """Sort `values`: numbers by size, then all others as they were given.

    Args:
        values: As typed.

    Returns:
        The same values.

    Example:
        >>> in_order(("SAM", "10", "9"))
        ['9', '10', 'SAM']
    """
    return sorted(values, key=lambda value: math.inf if number(value) is None else code(value))


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        pairs: Keys and values as typed.
        prefix: What its folder's name begins with.
    """

    pairs: tuple[tuple[str, str], ...]
    prefix: str = ""

    @property
    def values(self) -> dict[str, str]:
        """The values by key."""
        return dict(self.pairs)

    @property
    def params(self) -> dict[str, float]:
        """The values by key as the database holds them."""
        return {key: code(value) for key, value in self.pairs}

    @property
    def flags(self) -> list[str]:
        """The command line that sets the values."""
        return [
            part
            for key, value in self.pairs
            for part in ([f"--{key}={value}"] if value.startswith("-") else [f"--{key}", value])
        ]

    @property
    def name(self) -> str:
        """A name that every file system takes, different for every cell."""
        plain = self.prefix + ",".join(f"{key}={value}" for key, value in self.pairs)
        safe = re.sub(r"[^\w.,=+-]", "_", plain, flags=re.ASCII)[:_LONGEST_NAME]
        return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


class Grid:
    """All combinations of the values of some keys.

    Args:
        values: The values of each key, as typed.
        prefix: What the names of the cells begin with.
    """

    def __init__(self, values: Mapping[str, tuple[str, ...]], prefix: str = "") -> None:
        self.values = dict(values)
        combinations = itertools.product(*self.values.values())
        self.cells = [Cell(tuple(zip(self.values, combination, strict=True)), prefix) for combination in combinations]
        self._by_params = {frozenset(cell.params.items()): cell for cell in self.cells}

    @property
    def space(self) -> dict[str, list[float]]:
        """The search space for Optuna."""
        return {key: [code(value) for value in values] for key, values in self.values.items()}

    @property
    def keys(self) -> list[str]:
        """The keys that a table tells apart: all but the seed."""
        return [key for key in self.values if key != SEED]

    def find(self, params: Mapping[str, float]) -> Cell | None:
        """Return the cell that the database calls `params`, or None."""
        return self._by_params.get(frozenset(params.items()))

    def baseline(self) -> Grid:
        """Return the grid of the base optimizer: kappa 0, and of the other keys those that are not IRE's."""
        others = {key: values for key, values in self.values.items() if not key.startswith("ire.")}
        return Grid({_BASELINE[0]: (_BASELINE[1],), **others}, prefix="baseline,")
