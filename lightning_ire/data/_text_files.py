"""Text from local files, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._hidden import is_of_the_system, leads_up
from lightning_ire.data._text_sources import MARK, Piece, TextSource, in_one_line, is_unicode, no_column, reading_of

__all__ = ["FileSource"]

_BLOCK = 1 << 20
"""Characters in a piece of a long document: what is tokenized at once."""

_LONGEST_ROW = 1 << 24
"""Bytes of a line that is looked at to find out whether a file has rows."""

_ROWS = re.compile(r"\.(?:(parquet)|jsonl?|jsonlines|ndjson|ldjson)(?:[-._]\d[\w-]*)?$", re.ASCII | re.IGNORECASE)
"""How the name of a file with rows ends, perhaps with the number of a shard (`.json-00000-of-00010`)."""


class FileSource(TextSource):
    """Local files, compressed or not (.gz, .bz2, .xz, .zst).

    JSON has a document per line (`.jsonl`, `.jsonlines`, `.ndjson`, `.json`), or is one array or object of records,
    which is read into memory as a whole; `.parquet` has a document per row. Any other file is a document of UTF-8 text,
    unless it is no `.txt` and its first two lines are JSON objects that have the text's key.

    A byte order mark with which a document begins is no part of it. Patterns match no hidden files, nor those that
    operating systems leave beside others.

    Args:
        patterns: Paths or glob patterns of each part; "train" is needed.
        text_column: Key of the text in JSON, column in `.parquet`.

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

    def reading(self, path: Path) -> str:
        """Text, JSON or parquet, and how it is compressed."""
        kind, compression, beginning = self._look(path)
        return reading_of(f"{kind} in {compression}" if compression else kind, beginning if kind == "text" else b"")

    def left_out(self) -> Counter[str]:
        """Hidden files that the patterns would match if hidden ones were matched; Python 3.10 cannot say that."""
        find = partial(_found, include_hidden=True) if sys.version_info >= (3, 11) else _found
        every = {
            path
            for patterns in self.patterns.values()
            for pattern in map(_absolute, patterns)
            if not os.path.isfile(pattern)
            for path in find(pattern)
            if not os.path.isdir(path)
        }
        count = len(every - {str(path) for paths in self._found.values() for path in paths})
        return Counter({"hidden": count} if count else {})

    def _find(self, part: str) -> list[Path]:
        found: dict[Path, None] = {}
        for pattern in self.patterns[part]:
            path = _absolute(pattern)
            paths = [path] if os.path.isfile(path) else _matches(path)
            files = [Path(path) for path in paths if not os.path.isdir(path)]
            if not files:
                hint = f": for all files in this folder give '{pattern}/**/*.txt'" if paths else ""
                raise ConfigurationError(f"Expected `{self._keys[part]}` to match files, got {pattern!r}{hint}.")
            found.update(dict.fromkeys(files))
        return list(found)

    def _read(self, path: Path) -> Iterator[Piece]:
        if path.suffix.lower() == ".zip":
            raise ConfigurationError(f"Expected .gz, .bz2, .xz or .zst for a compressed file, got {path}.")
        kind, compression, _ = self._look(path)
        with path.open("rb") as raw:
            opened = _READERS[compression](raw)
            meter = _Meter(raw)
            try:
                if kind == "JSON":
                    yield from meter.count(self._records(path, opened))
                elif kind == "parquet":  # it is not read from the beginning to the end
                    yield from self._rows(path, io.BytesIO(opened.read()) if compression else raw)
                else:
                    yield from meter.count(_blocks(path, opened))
            except _broken() as error:
                if not compression:
                    raise
                raise ConfigurationError(
                    f"Expected a whole {compression} file, got {type(error).__name__} ({error}) in {path}."
                ) from error

    def _look(self, path: Path) -> tuple[str, str, bytes]:
        """What a file is (text, JSON, parquet), its compression, and its first line where the name does not tell."""
        compression = path.suffix.lower() if path.suffix.lower() in _READERS else ""
        name = path.stem if compression else path.name
        if named := _ROWS.search(name, 1):
            return "parquet" if named[1] else "JSON", compression, b""
        try:
            with path.open("rb") as raw, _READERS[compression](raw) as stream:
                first = stream.readline(_LONGEST_ROW)
                lines = itertools.chain([first], iter(lambda: stream.readline(_LONGEST_ROW), b""))
                rows = list(itertools.islice((line for line in lines if line.strip()), 2))
        except _broken():  # it comes again when the file is read
            return "text", compression, b""
        has_rows = rows and not name.lower().endswith(".txt") and all(map(self._is_row, rows))
        return "JSON" if has_rows else "text", compression, first

    def _is_row(self, line: bytes) -> bool:
        row = _parsed_or_none(line)
        return isinstance(row, dict) and isinstance(row.get(self.text_column), str)

    def _records(self, path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
        """The rows of JSON lines, or of one array or object."""
        lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        beginning = list(itertools.islice(lines, 3))
        if _are_rows([line for _, line in beginning]):
            for number, line in itertools.chain(beginning, lines):
                where = f"line {number} of {path}"
                yield self._text(_parsed(line, f"JSON in {where}"), where), True
        elif beginning:
            content = b"".join(line for _, line in itertools.chain(beginning, lines))
            value = _parsed(content, f"JSON lines, or one array or object of records, in {path}")
            if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
                value = list(value.values())
            for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
                yield self._text(row, f"record {number} of {path}"), True

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
        return (text or "").removeprefix(MARK)


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
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
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
            "file, or name a compressed or .parquet file by its suffix."
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
    "": lambda raw: raw,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(_Zstandard(raw)),
}


def _parsed(content: bytes, what: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError
        raise ConfigurationError(f"Expected {what}, got: {error}.") from error


def _parsed_or_none(content: bytes) -> Any:
    try:
        return _parsed(content, "JSON")
    except ConfigurationError:
        return None


def _are_rows(lines: list[bytes]) -> bool:
    """Whether these first lines of a file are a record each, the first one whole or broken, and no one document."""
    if len(lines) < 2 or _parsed_or_none(lines[0]) is not None:
        return len(lines) > 1
    together = b"".join(lines)
    return not _goes_on(lines[0]) or (not _goes_on(together) and _parsed_or_none(lines[1]) is not None)


def _goes_on(content: bytes) -> bool:
    """Whether this is JSON or may be the beginning of some; of other encodings than UTF-8 it is not known."""
    if b"\0" in content:
        return True
    try:
        text = content.decode("utf-8-sig").rstrip()
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)  # nothing is wrong but that it ends
    except UnicodeDecodeError:
        return False
    except RecursionError:
        return True
    return True


def _absolute(pattern: str) -> str:
    return os.path.abspath(os.path.expanduser(pattern))


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, without files and folders of the system, in alphabetical order."""
    named = _named(pattern)
    return [path for path in sorted(_found(pattern)) if not any(map(is_of_the_system, Path(path).parts[named:]))]


def _found(pattern: str, **settings: Any) -> list[str]:
    """What a pattern matches, but for what is behind links to folders above."""
    named, up = _named(pattern), cache(leads_up)
    found = glob.glob(pattern, recursive=True, **settings)
    return [
        path for path in found if not any(up(str(folder)) for folder in Path(path).parents if len(folder.parts) > named)
    ]


def _named(pattern: str) -> int:
    """How many folders of a pattern are without wildcards."""
    return len(list(itertools.takewhile(lambda name: not set(name) & set("*?["), Path(pattern).parts)))


def _broken() -> tuple[type[Exception], ...]:
    """What the readers of compressed files raise if one is cut short or damaged."""
    errors: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)
    try:
        from zstandard import ZstdError
    except ImportError:
        return errors
    return (*errors, ZstdError)
