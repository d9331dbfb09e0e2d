"""Files and folders that are nobody's data: hidden ones, what systems leave beside files, and links in circles."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

__all__ = ["is_hidden", "is_of_the_system", "leads_up", "say_left_out"]

_OF_THE_SYSTEM = {
    "$recycle.bin", "__macosx", "@eadir", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip


def is_of_the_system(name: str) -> bool:
    """Return whether a file or folder is one that an operating system makes by itself, like `__MACOSX`, `Thumbs.db`.

    Args:
        name: Its name without the folders above it.
    """
    return name.lower() in _OF_THE_SYSTEM


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot (`._x.png`, `.ipynb_checkpoints`) or is one of the system's.

    Args:
        name: As in `is_of_the_system`.
    """
    return name.startswith(".") or is_of_the_system(name)


def leads_up(folder: str) -> bool:
    """Return whether a folder is a link to one that it is in: behind it everything would come again.

    Args:
        folder: Its path, by the links that were followed.
    """
    if not os.path.islink(folder):
        return False
    target = Path(os.path.realpath(folder))
    above = (Path(os.path.realpath(place)) for place in Path(folder).absolute().parents)
    return any(target == place or target in place.parents for place in above)


def say_left_out(place: object, counts: Counter[str]) -> None:
    """Say in one line what is not read, if there is any.

    Args:
        place: Where it is.
        counts: What kind, and how many of each.
    """
    if counts:
        rank_zero_info(
            f"Left out of {place}: {', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}."
        )
