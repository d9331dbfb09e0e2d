"""The grid: its trials, their names as folders, and their command lines."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping

from lightning_ire.sweeps._study import code, number

__all__ = ["SEED", "Grid", "Trial", "in_order"]

SEED = "seed_everything"
"""The key over whose values a table averages."""

_BASELINE = ("ire.kappa", "0")
_LONGEST_NAME = 120  # file systems allow 255 bytes


def in_order(values: tuple[str, ...]) -> list[str]:
    """Sort `values`: numbers by size, then all others as they were given.

    Example:
        >>> in_order(("SAM", "10", "9"))
        ['9', '10', 'SAM']
    """
    return sorted(values, key=lambda value: math.inf if number(value) is None else code(value))


class Trial(dict[str, str]):
    """One run of the grid: values by key, as typed; `prefix` is what its folder's name begins with."""

    def __init__(self, values: Mapping[str, str], prefix: str = "") -> None:
        super().__init__(values)
        self.prefix = prefix

    @property
    def command(self) -> list[str]:
        """The flags that set the values."""
        # a number with a minus, as a word of its own, would be a flag
        words = ([f"--{key}={v}"] if v.startswith("-") else [f"--{key}", v] for key, v in self.items())
        return [word for pair in words for word in pair]

    @property
    def title(self) -> str:
        """What tells it from every other trial."""
        return self.prefix + ",".join(f"{key}={value}" for key, value in self.items())

    @property
    def name(self) -> str:
        """The title as a name that every file system takes, different for every trial."""
        plain = self.title
        safe = re.sub(r"[^\w.,=+-]", "_", plain, flags=re.ASCII)[:_LONGEST_NAME]
        return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


class Grid:
    """All combinations of the values of some keys; `prefix` is what the names of the trials begin with."""

    def __init__(self, values: Mapping[str, tuple[str, ...]], prefix: str = "") -> None:
        self.values = dict(values)
        combinations = itertools.product(*self.values.values())
        self.trials = [Trial(dict(zip(self.values, combination, strict=True)), prefix) for combination in combinations]

    @property
    def keys(self) -> list[str]:
        """The keys that a table tells apart: all but the seed."""
        return [key for key in self.values if key != SEED]

    def baseline(self) -> Grid:
        """Return the grid of the base optimizer: kappa 0, and of the other keys those that are not IRE's."""
        others = {key: values for key, values in self.values.items() if not key.startswith("ire.")}
        return Grid({_BASELINE[0]: (_BASELINE[1],), **others}, prefix="baseline,")
