"""Text from local files, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._text_sources import Piece, TextSource, in_one_line, is_unicode, no_column

__all__ = ["FileSource"]

_BLOCK = 1 << 20
"""Characters in a piece of a long document: what is tokenized at once."""


class FileSource(TextSource):
    """Local files, compressed or not (.gz, .bz2, .xz, .zst).

    `.jsonl` has a document per line, `.parquet` one per row; any other file is a document of UTF-8 text.

    Args:
        patterns: Paths or glob patterns of each part; "train" is needed.
        text_column: Key of the text in `.jsonl`, column in `.parquet`.

    Raises:
        ConfigurationError: If there are none, or a file is in two parts.
    """

    name = "files"
    _keys = {"train": "files", "val": "val_files", "test": "test_files"}  # noqa: RUF012

    def __init__(self, patterns: dict[str, list[str]], text_column: str) -> None:
        self.patterns = {part: given for part, given in patterns.items() if given}
        self.text_column = text_column
        self.parts = tuple(self.patterns)
        if "train" not in self.patterns:
            raise ConfigurationError("Expected `files` to name at least one file, got none.")
        self._found = {part: self._find(part) for part in self.parts}
        seen: dict[Path, str] = {}
        for part, paths in self._found.items():
            for path in paths:
                if seen.setdefault(path, part) != part:
                    raise ConfigurationError(
                        f"Expected `{self._keys[part]}` to have no file of `{self._keys[seen[path]]}`, got {path}."
                    )

    def settings(self) -> dict[str, Any]:
        """Absolute paths: the same pattern in another folder is another text."""
        patterns = {part: [_absolute(pattern) for pattern in given] for part, given in self.patterns.items()}
        return {"source": self.name, "patterns": patterns, "text_column": self.text_column}

    def files(self) -> dict[str, list[Path]]:
        """What the patterns match, each file once: pattern after pattern, each in alphabetical order."""
        return self._found

    def pieces(self, part: str) -> Iterator[Piece]:
        """Read file after file."""
        for path in self._found[part]:
            yield from self._read(path)

    def _find(self, part: str) -> list[Path]:
        found: dict[Path, None] = {}
        for pattern in self.patterns[part]:
            path = _absolute(pattern)
            paths = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            files = [Path(path) for path in paths if not os.path.isdir(path)]
            if not files:
                hint = f": for all files in this folder give '{pattern}/**/*.txt'" if paths else ""
                raise ConfigurationError(f"Expected `{self._keys[part]}` to match files, got {pattern!r}{hint}.")
            found.update(dict.fromkeys(files))
        return list(found)

    def _read(self, path: Path) -> Iterator[Piece]:
        *_, kind, compression = ["", "", *(suffix.lower() for suffix in path.suffixes)]
        if compression == ".zip":
            raise ConfigurationError(f"Expected .gz, .bz2, .xz or .zst for a compressed file, got {path}.")
        if compression not in _READERS:
            kind, compression = compression, ""
        with path.open("rb") as raw:
            opened: Any = _READERS[compression](raw) if compression else raw
            meter = _Meter(raw)
            try:
                if kind == ".jsonl":
                    yield from meter.count(self._lines(path, opened))
                elif kind == ".parquet":  # it is not read from the beginning to the end
                    yield from self._rows(path, io.BytesIO(opened.read()) if compression else raw)
                else:
                    yield from meter.count(_blocks(path, opened))
            except _broken() as error:
                if not compression:
                    raise
                raise ConfigurationError(
                    f"Expected a whole {compression} file, got {type(error).__name__} ({error}) in {path}."
                ) from error

    def _lines(self, path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError
                raise ConfigurationError(f"Expected JSON in line {number} of {path}, got: {error}.") from error
            yield self._text(row, f"line {number} of {path}"), True

    def _rows(self, path: Path, stream: IO[bytes]) -> Iterator[Piece]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ConfigurationError(
                f"Expected pyarrow to read {path}, got an import error: pip install 'lightning-ire[text]'."
            ) from error
        try:
            table = ParquetFile(stream)
            if self.text_column not in table.schema_arrow.names:
                raise no_column(self.text_column, path, table.schema_arrow.names)
            rows, size, done, told = max(table.metadata.num_rows, 1), path.stat().st_size, 0, 0
            for batch in table.iter_batches(batch_size=1024, columns=[self.text_column]):
                for row in batch.to_pylist():
                    done += 1
                    text = self._text(row, f"row {done} of {path}")
                    if text:
                        yield Piece(text, True, size * done // rows - told)
                        told = size * done // rows
        except (ArrowException, OSError) as error:
            raise ConfigurationError(f"Expected a parquet file, got {path}: {in_one_line(error)}.") from error

    def _text(self, row: Any, where: str) -> str:
        if not isinstance(row, dict) or self.text_column not in row:
            raise no_column(self.text_column, where, list(row) if isinstance(row, dict) else [])
        text = row[self.text_column]
        if text is not None and not isinstance(text, str):
            raise ConfigurationError(f"Expected text under {self.text_column!r} in {where}, got {type(text).__name__}.")
        if text and not is_unicode(text):
            raise ConfigurationError(f"Expected Unicode text in {where}, got half of a surrogate pair.")
        return text or ""


class _Meter:
    """Tells how far a file was read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.told = 0

    def count(self, texts: Iterator[tuple[str, bool]]) -> Iterator[Piece]:
        """Pieces with their progress, empty texts left out."""
        for text, first in texts:
            if text:
                position = self.raw.tell()
                yield Piece(text, first, position - self.told)
                self.told = position


def _blocks(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Cut a text at ends of lines into blocks; what they are put together again is the text."""
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    rest, first = "", True
    try:
        while block := reader.read(_BLOCK):
            rest += block
            end = _end_of_a_line(rest)
            if end:
                yield rest[:end], first
                rest, first = rest[end:], False
        yield rest, first
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"Expected UTF-8 text in {path}, got byte 0x{error.object[error.start]:02x} ({error.reason}): convert the "
            "file, or name a compressed, .jsonl or .parquet file by its suffix."
        ) from error
    finally:
        reader.detach()


def _end_of_a_line(text: str) -> int:
    """Where a long text can be cut so that a tokenizer makes the same of both parts: after a line that is not blank.

    0: nowhere yet. A text without such lines is cut anywhere once it has grown to several blocks.
    """
    if len(text) < _BLOCK:
        return 0
    end = len(text) - 1
    while (end := text.rfind("\n", 0, end)) > 0:
        before = text[max(end - 2, 0) : end].removesuffix("\r")
        if before and not before[-1].isspace() and not text[end + 1].isspace():
            return end + 1
    return len(text) if len(text) >= 4 * _BLOCK else 0


class _Zstandard(io.RawIOBase):
    """A .zst file of any number of frames. The package's own reader takes a file that is cut short for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            from zstandard import ZstdDecompressor
        except ImportError as error:
            raise ConfigurationError(
                f"Expected the package zstandard to read {raw.name}, got an import error: pip install zstandard."
            ) from error
        self._raw, self._decompressor = raw, ZstdDecompressor(max_window_size=1 << 31)  # as of `zstd --long=31`
        self._frame: Any = None
        self._packed, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._raw.read(1 << 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


_READERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(_Zstandard(raw)),
}


def _absolute(pattern: str) -> str:
    return os.path.abspath(os.path.expanduser(pattern))


def _broken() -> tuple[type[Exception], ...]:
    """What the readers of compressed files raise if one is cut short or damaged."""
    errors: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)
    try:
        from zstandard import ZstdError
    except ImportError:
        return errors
    return (*errors, ZstdError)
