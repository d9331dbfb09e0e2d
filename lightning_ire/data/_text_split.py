"""Which text is trained on, and which is held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.data._text_sources import Piece, TextSource

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """What is held out of the training text, where a source has no validation or test part of its own.

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

    def assign(self, source: TextSource) -> Iterator[tuple[str, Piece]]:
        """Read a source with the part that each piece belongs to.

        Args:
            source: The source.
        """
        val, test = (0.0 if part in source.parts else size for part, size in self._sizes())
        if self.by == "position" and val + test > 0:
            yield from _by_position(source, val, test)
        else:
            yield from _by_document(source, val, test, self.seed)
        for part in source.parts:
            if part != "train":
                yield from ((part, piece) for piece in source.pieces(part))

    def expected(self, source: TextSource) -> list[str]:
        """The parts that have to hold something.

        Args:
            source: The source.
        """
        return [*source.parts, *(part for part, size in self._sizes() if size and part not in source.parts)]

    def _sizes(self) -> Iterator[tuple[str, float]]:
        yield from (("val", self.val_size), ("test", self.test_size))


def _by_document(source: TextSource, val: float, test: float, seed: int) -> Iterator[tuple[str, Piece]]:
    draw, part = random.Random(seed), "train"
    for piece in source.pieces("train"):
        if piece.first:
            number = draw.random()
            part = "val" if number < val else "test" if number < val + test else "train"
        yield part, piece


def _by_position(source: TextSource, val: float, test: float) -> Iterator[tuple[str, Piece]]:
    """The last characters of the text are the test part, those before them the validation part."""
    total = sum(len(piece.text) for piece in source.pieces("train"))
    ends = [("train", round(total * (1 - val - test))), ("val", round(total * (1 - test))), ("test", total)]
    position, before = 0, ""
    for piece in source.pieces("train"):
        for part, end in ends:
            if position >= end or not piece.text:
                continue
            count = len(piece.text)
            if position + count > end:  # cut after the line in which the part ends
                count = piece.text.find("\n", end - position - 1) + 1 or end - position
            yield part, Piece(piece.text[:count], piece.first or part != before, piece.progress)
            position, before = position + count, part
            piece = Piece(piece.text[count:], first=False, progress=0)
