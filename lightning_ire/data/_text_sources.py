"""Where text comes from: the standard library, local files, data sets of the hub. All of it is read in pieces."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_ire._checks import ConfigurationError

__all__ = ["HUB", "FileSource", "HubSource", "Piece", "StandardLibrary", "TextSource", "is_unicode", "make_source"]

_BLOCK = 1 << 20
"""Characters in a piece of a long document: what is tokenized at once."""


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

    @abstractmethod
    def size(self, part: str) -> int:
        """How much there is to read of a part.

        Args:
            part: One of `parts`.
        """

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
        """All `*.py` files of the library without those of installed packages."""
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        if not found:
            raise ConfigurationError(
                f"Expected the standard library's source code in {root}, got no .py file: set `source` to 'files'."
            )
        return {"train": sorted(found)}

    def size(self, part: str) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files()[part])

    def pieces(self, part: str) -> Iterator[Piece]:
        """Each file is one piece."""
        skipped = 0
        for path in self.files()[part]:
            content = path.read_bytes()
            skipped += len(content)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if text:
                yield Piece(text, first=True, progress=skipped)
                skipped = 0


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

    def size(self, part: str) -> int:
        """Bytes of the part's files as they are on the disk."""
        return sum(path.stat().st_size for path in self._found[part])

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
                raise self._no_column(str(path), table.schema_arrow.names)
            rows, size, done, told = max(table.metadata.num_rows, 1), path.stat().st_size, 0, 0
            for batch in table.iter_batches(batch_size=1024, columns=[self.text_column]):
                for row in batch.to_pylist():
                    done += 1
                    text = self._text(row, f"row {done} of {path}")
                    if text:
                        yield Piece(text, True, size * done // rows - told)
                        told = size * done // rows
        except (ArrowException, OSError) as error:
            raise ConfigurationError(f"Expected a parquet file, got {path}: {_one_line(error)}.") from error

    def _text(self, row: Any, where: str) -> str:
        if not isinstance(row, dict) or self.text_column not in row:
            raise self._no_column(where, list(row) if isinstance(row, dict) else [])
        text = row[self.text_column]
        if text is not None and not isinstance(text, str):
            raise ConfigurationError(f"Expected text under {self.text_column!r} in {where}, got {type(text).__name__}.")
        if text and not is_unicode(text):
            raise ConfigurationError(f"Expected Unicode text in {where}, got half of a surrogate pair.")
        return text or ""

    def _no_column(self, where: str, names: list[str]) -> ConfigurationError:
        has = ", ".join(map(repr, names)) or "none"
        return ConfigurationError(
            f"Expected `text_column` to be a column of {where} (it has: {has}), got {self.text_column!r}."
        )


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub.

    Attributes:
        path: `OWNER/NAME`, or a local folder in the same layout.
        config: Name of its configuration.
        revision: Branch, tag or commit.
        lines: Whether a row is a line of a text that runs on, an empty row an empty line (else: a document).
    """

    path: str
    config: str | None = None
    revision: str | None = None
    lines: bool = False


HUB = {
    "wikitext-2": HubDataset("Salesforce/wikitext", "wikitext-2-v1", lines=True),
    "wikitext-103": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", lines=True),
    "minipile": HubDataset("JeanKaddour/minipile"),
    # a loading script, which `datasets` no longer runs: the hub's own conversion
    "openwebtext": HubDataset("Skylion007/openwebtext", revision="refs/convert/parquet"),
}
"""The data sets of the paper. wikitext-2 is the word-level edition with `<unk>`, wikitext-103 the raw one."""

_HUB_PARTS = {"train": "train", "validation": "val", "test": "test"}


class HubSource(TextSource):
    """A data set of the Hugging Face hub, read with `datasets` (which keeps a download in its own cache).

    Args:
        name: A name in `HUB`, or `hub:OWNER/NAME`, `hub:OWNER/NAME:CONFIG`.
        text_column: Column of the text.
    """

    unit = " rows"

    def __init__(self, name: str, text_column: str) -> None:
        if name in HUB:
            self.dataset = HUB[name]
        else:
            path, _, config = name.removeprefix("hub:").partition(":")
            self.dataset = HubDataset(path, config or None)
        self.name = name.removeprefix("hub:").strip("/").replace("/", "-").replace(":", "-")
        self.text_column = text_column
        self._loaded: Any = None

    @property
    def parts(self) -> Sequence[str]:  # type: ignore[override]
        """The splits that the data set has."""
        return tuple(_HUB_PARTS[split] for split in self._splits if split in _HUB_PARTS)

    def settings(self) -> dict[str, Any]:
        """Which data set."""
        return {"source": "hub", **vars(self.dataset), "text_column": self.text_column}

    def files(self) -> dict[str, list[Path]]:
        """None: a data set is known by its name and revision."""
        return {}

    def size(self, part: str) -> int:
        """Rows."""
        return len(self._split(part))

    def pieces(self, part: str) -> Iterator[Piece]:
        """Read row after row."""
        told = 0
        for number, row in enumerate(self._split(part), start=1):
            text = row[self.text_column]
            if text is not None and not isinstance(text, str):
                raise ConfigurationError(
                    f"Expected `text_column` to be a column of text in {self.dataset.path}, got "
                    f"{type(text).__name__} in {self.text_column!r}."
                )
            if self.dataset.lines and not (text or "").endswith("\n"):
                text = (text or "") + "\n"  # an empty row is an empty line
            if text:
                yield Piece(text, first=not (self.dataset.lines and told), progress=number - told)
                told = number

    def _split(self, part: str) -> Any:
        (split,) = (split for split, ours in _HUB_PARTS.items() if ours == part)
        table = self._splits[split]
        if self.text_column not in table.column_names:
            raise ConfigurationError(
                f"Expected `text_column` to be a column of {self.dataset.path} (it has: "
                f"{', '.join(map(repr, table.column_names))}), got {self.text_column!r}."
            )
        return table

    @property
    def _splits(self) -> Any:
        if self._loaded is None:
            try:
                from datasets import load_dataset
            except ImportError as error:
                raise ConfigurationError(
                    "Expected the package datasets for data sets of the hub, got an import error: "
                    "pip install 'lightning-ire[text]'."
                ) from error
            wanted = self.dataset
            try:
                self._loaded = load_dataset(wanted.path, wanted.config, revision=wanted.revision)
            except Exception as error:  # no one class: of datasets, of the hub's client, of the network
                raise ConfigurationError(
                    f"Expected the data set {wanted.path!r} from the hub or its cache, got {type(error).__name__}: "
                    f"{_one_line(error)}. Without a network set `source` to 'stdlib' or 'files'."
                ) from error
            if "train" not in self._loaded:
                raise ConfigurationError(
                    f"Expected the data set {wanted.path!r} to have a split 'train', got {list(self._loaded)}."
                )
        return self._loaded


def make_source(name: str, patterns: dict[str, list[str]], text_column: str) -> TextSource:
    """Return the source of a name.

    Args:
        name: "stdlib", "files", a name in `HUB`, or "hub:OWNER/NAME[:CONFIG]".
        patterns: Files of each part, for "files".
        text_column: As in `FileSource` and `HubSource`.

    Raises:
        ConfigurationError: If the name is not known, or files were given and not asked for.
    """
    if name == "files":
        return FileSource(patterns, text_column)
    if any(patterns.values()):
        raise ConfigurationError(f"Expected `source` to be 'files' where files are given, got {name!r}.")
    if name == "stdlib":
        return StandardLibrary()
    if name in HUB or name.startswith("hub:"):
        return HubSource(name, text_column)
    raise ConfigurationError(
        f"Expected `source` to be 'stdlib', 'files', {', '.join(map(repr, HUB))} or 'hub:OWNER/NAME', got {name!r}."
    )


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


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
