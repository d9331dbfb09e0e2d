"""What a text is: documents in a fixed order, read in pieces. And the one that is on every machine."""

from __future__ import annotations

import os
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._hidden import is_hidden

__all__ = ["MARK", "Piece", "StandardLibrary", "TextSource", "in_one_line", "is_unicode", "no_column"]

MARK = "\ufeff"
"""Unicode's byte order mark: at the beginning of a text it is no part of it, elsewhere it is a character."""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        text: Never empty.
        first: Whether a document begins here.
        progress: How much of `TextSource.size` was read for it.
    """

    text: str
    first: bool
    progress: int


class TextSource(ABC):
    """Documents in a fixed order.

    Attributes:
        name: Goes into the name of the cache's folder.
        parts: The parts that the source has by itself, "train" and perhaps "val", "test".
        unit: What `size` counts.
    """

    name: str
    parts: Sequence[str] = ("train",)
    unit: str = "B"

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What was asked for, in JSON's types."""

    @abstractmethod
    def files(self) -> dict[str, list[Path]]:
        """The files that each part is read from; tokens are made anew when one of them changes."""

    def reading(self, path: Path) -> str:
        """How a file is read; tokens are made anew when a release reads it in another way.

        Args:
            path: One of `files`.
        """
        with path.open("rb") as file:
            return reading_of("text", file.read(len(MARK.encode())))

    def left_out(self) -> Counter[str]:
        """What is not read where files are looked for: of each kind, how many."""
        return Counter()

    def size(self, part: str) -> int:
        """How much there is to read of a part: here the bytes of its files as they are on the disk.

        Args:
            part: One of `parts`.
        """
        return sum(path.stat().st_size for path in self.files()[part])

    @abstractmethod
    def pieces(self, part: str) -> Iterator[Piece]:
        """Read a part.

        Args:
            part: One of `parts`.
        """


class StandardLibrary(TextSource):
    """The source code of Python's own standard library: a document per file (about 30 MB with its tests).

    Files that are not UTF-8 are left out (a dozen, which test encodings).
    """

    name = "stdlib"

    def settings(self) -> dict[str, Any]:
        """The folder is not named here: the same files in another place are the same text."""
        return {"source": self.name}

    def files(self) -> dict[str, list[Path]]:
        """All `*.py` files of the library without those of installed packages and hidden ones."""
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
            found += [Path(folder, name) for name in names if name.endswith(".py") and not is_hidden(name)]
        if not found:
            raise ConfigurationError(
                f"Expected the standard library's source code in {root}, got no .py file: set `source` to 'files'."
            )
        return {"train": sorted(found)}

    def pieces(self, part: str) -> Iterator[Piece]:
        """Each file is one piece."""
        skipped = 0
        for path in self.files()[part]:
            content = path.read_bytes()
            skipped += len(content)
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                continue
            if text:
                yield Piece(text, first=True, progress=skipped)
                skipped = 0


def reading_of(kind: str, beginning: bytes) -> str:
    """Return what `TextSource.reading` says of a file.

    Args:
        kind: What it is read as.
        beginning: Its first bytes.
    """
    return f"{kind} after a byte order mark" if beginning.startswith(MARK.encode()) else kind


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON and command lines may bring half of a surrogate pair.

    Args:
        text: The text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_column(text_column: str, where: object, names: Sequence[str]) -> ConfigurationError:
    """Return the error of a table without the column of the text.

    Args:
        text_column: The column that was asked for.
        where: What has no such column.
        names: The columns that it has.
    """
    has = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "") or "none"
    return ConfigurationError(f"Expected `text_column` to be a column of {where} (it has: {has}), got {text_column!r}.")


def in_one_line(error: Exception) -> str:
    """Return the message of an error, of any number of lines, as one without a full stop.

    Args:
        error: The error.
    """
    return " ".join(str(error).split()).rstrip(".")
