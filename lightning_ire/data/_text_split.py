"""Which text is trained on, and which is held out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.data._text_sources import Piece, TextSource

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """What is held out of the training text, where a source has no validation or test part of its own.

    The shares are exact: of the documents, each of which is whole, or of the characters (up to the end of a line). For
    that the training text is read once more, before any of it becomes tokens (:meth:`ends`).

    Attributes:
        val_size: Share of the validation part, in [0, 1).
        test_size: Share of the test part.
        by: "document": documents drawn at random; "position": the end of the text.
        seed: Seed of the draw.
    """

    val_size: float
    test_size: float
    by: str
    seed: int

    def __post_init__(self) -> None:
        """Check the values; 0 and 0.0 are one."""
        for name in ("val_size", "test_size"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), high=1.0, high_open=True))
        check_choice("split_by", self.by, ("document", "position"))
        check_whole("split_seed", self.seed, low=0)
        if self.val_size + self.test_size >= 1:
            raise ConfigurationError(
                f"Expected `val_size` and `test_size` to leave text for training, got {self.val_size!r} and "
                f"{self.test_size!r}."
            )

    def ends(self, source: TextSource, pieces: Iterable[Piece]) -> list[tuple[str, float]]:
        """Measure the training text and say where each part of it ends.

        Args:
            source: The source.
            pieces: Its training text. It is only read if something is held out of it; as for memory, 8 bytes for each
                document are needed.

        Returns:
            The parts in the order in which they are cut: by document, of a number drawn for each; by position, of the
            characters.

        Raises:
            ConfigurationError: If there are fewer documents than parts.
        """
        val, test = (0.0 if part in source.parts else size for part, size in self._sizes())
        if val + test == 0:
            return [("train", math.inf)]
        if self.by == "position":
            total = sum(len(piece.text) for piece in pieces)
            return [("train", round(total * (1 - val - test))), ("val", round(total * (1 - test))), ("test", total)]
        draw = random.Random(self.seed)
        numbers = np.sort(np.fromiter((draw.random() for piece in pieces if piece.first), float))
        if not len(numbers):
            return [("train", math.inf)]
        counts = self._counts(len(numbers), {"val": val, "test": test})
        bounds = numbers[counts["val"]], numbers[counts["val"] + counts["test"]]
        return [("val", float(bounds[0])), ("test", float(bounds[1])), ("train", math.inf)]

    def assign(self, source: TextSource, ends: list[tuple[str, float]]) -> Iterator[tuple[str, Piece]]:
        """Read a source with the part that each piece belongs to.

        Args:
            source: The source.
            ends: What `ends` returned.
        """
        if self.by == "position":
            yield from _by_position(source, ends)
        else:
            yield from _by_document(source, ends, self.seed)
        for part in source.parts:
            if part != "train":
                yield from ((part, piece) for piece in source.pieces(part))

    def expected(self, source: TextSource) -> list[str]:
        """The parts that have to hold something.

        Args:
            source: The source.
        """
        return [*source.parts, *(part for part, size in self._sizes() if size and part not in source.parts)]

    def too_little(self, part: str, documents: int) -> ConfigurationError:
        """Return the error of a part that is left empty.

        Args:
            part: "val" or "test".
            documents: How many documents there are in all.
        """
        cut = "set `split_by` to 'position' (the end of the text is held out), " if self.by == "document" else ""
        return ConfigurationError(
            f"Expected `{part}_size` to split {documents} document(s) so that every part has text, got "
            f"{getattr(self, part + '_size')!r}: {cut}change it, or give `{part}_files`."
        )

    def _counts(self, documents: int, sizes: dict[str, float]) -> dict[str, int]:
        """Documents of each part that is held out: at least one, and one is left for training."""
        counts = {part: max(round(documents * size), 1) if size else 0 for part, size in sizes.items()}
        while sum(counts.values()) >= documents:
            part = max(counts, key=counts.__getitem__)
            if counts[part] == 1:
                raise self.too_little(part, documents)
            counts[part] -= 1
        return counts

    def _sizes(self) -> Iterator[tuple[str, float]]:
        yield from (("val", self.val_size), ("test", self.test_size))


def _by_document(source: TextSource, ends: list[tuple[str, float]], seed: int) -> Iterator[tuple[str, Piece]]:
    """The documents with the smallest numbers are held out; the draws are those that `Split.ends` has sorted."""
    draw, part = random.Random(seed), "train"
    for piece in source.pieces("train"):
        if piece.first:
            number = draw.random()
            part = next(part for part, end in ends if number < end)
        yield part, piece


def _by_position(source: TextSource, ends: list[tuple[str, float]]) -> Iterator[tuple[str, Piece]]:
    """The last characters of the text are the test part, those before them the validation part."""
    position, before = 0, ""
    for piece in source.pieces("train"):
        for part, end in ends:
            if position >= end or not piece.text:
                continue
            count = len(piece.text)
            if position + count > end:  # cut after the line in which the part ends
                cut = int(end) - position
                count = piece.text.find("\n", cut - 1) + 1 or cut
            yield part, Piece(piece.text[:count], piece.first or part != before, piece.progress)
            position, before = position + count, part
            piece = Piece(piece.text[count:], first=False, progress=0)
