"""Text becomes tokens once: in files that are mapped into memory, made in a way that a kill cannot break."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._hidden import say_left_out
from lightning_ire.data._text_sources import Piece, TextSource
from lightning_ire.data._text_split import Split
from lightning_ire.data._text_tokenizers import TextTokenizer, TokenizerPlan, load_tokenizer

__all__ = ["TokenCache", "TokenPart"]

PARTS = ("train", "val", "test")
_FORMAT = 1
_AT_ONCE = 4 << 20
"""Characters that are handed to the tokenizer together: enough for all cores, little memory."""


@dataclass(frozen=True)
class TokenPart:
    """One part of the text as tokens.

    Attributes:
        tokens: Shape [number of tokens], uint16 or uint32, mapped from a file.
        bytes: Length of the text in UTF-8.
        documents: How many there are.
        checksum: BLAKE2b of all tokens, from when they were made.
    """

    tokens: np.ndarray
    bytes: int
    documents: int
    checksum: str


class TokenCache:
    """A folder with the tokens of one source, made by one tokenizer, split in one way.

    `manifest.json` names the files that count; it is replaced in one go when they are complete. Whoever makes or opens
    them holds a lock (of the operating system: a process that is killed lets go of it). A process that has opened
    them keeps what it opened, also when another one makes them anew.

    Args:
        root: Where such folders are.
        source: The text.
        plan: The tokenizer.
        split: What is held out.
    """

    def __init__(self, root: Path, source: TextSource, plan: TokenizerPlan, split: Split) -> None:
        self.source, self.plan, self.split = source, plan, split
        self.settings = {"format": _FORMAT, **source.settings(), **plan.settings(), "split": vars(split)}
        name = hashlib.blake2b(_json(self.settings).encode(), digest_size=5).hexdigest()
        self.folder = root / f"{source.name}-{plan.short_name}-{name}"

    def prepare(self, progress: bool, verify: bool = False) -> None:
        """Make the tokens if they are not there, or the text has changed since.

        Args:
            progress: Whether a bar is shown.
            verify: Whether the checksums of tokens that are there are compared.

        Raises:
            ConfigurationError: If the text cannot be read, or a part of it is empty.
        """
        with self._locked() as writable:
            manifest = self._manifest()
            if writable:
                self._remove_all_but(manifest)  # what a killed process left; the tokens of old stay until there are new
            inputs = {**self.source.files(), "tokenizer": self.plan.files()}
            stamps = _stamps(inputs, manifest.get("inputs", []), self.source)
            if self._is_whole(manifest, verify) and _contents(stamps) == _contents(manifest["inputs"]):
                if writable and stamps != manifest["inputs"]:  # touched or moved: remembered, not read again
                    self._write_manifest({**manifest, "inputs": stamps})
                return
            if not writable:
                raise self._not_writable("the tokens there are of another text")
            why = _read_otherwise(stamps, manifest.get("inputs", []))
            rank_zero_info(f"Making tokens of {self.source.name} in {self.folder}{why}.")
            say_left_out(self.source.name, self.source.left_out())
            try:
                made = self._make(stamps, progress)
            except BaseException:
                self._remove_all_but(manifest)
                raise
            self._write_manifest(made)
            self._remove_all_but(made)

    def open(self) -> tuple[dict[str, TokenPart], TextTokenizer, bool]:
        """Return the parts that hold something, the tokenizer, and whether it gives back every text as it was.

        Raises:
            ConfigurationError: If there are none: `prepare` was not called here.
        """
        with self._locked():
            manifest = self._manifest()
            if not self._is_whole(manifest, verify=False):
                raise ConfigurationError(f"Expected tokens in {self.folder}, got none: call `prepare_data` first.")
            parts = {
                part: TokenPart(
                    np.memmap(self.folder / entry["file"], dtype=manifest["dtype"], mode="r"),
                    entry["bytes"],
                    entry["documents"],
                    entry["checksum"],
                )
                for part, entry in manifest["parts"].items()
            }
            file = manifest["tokenizer"]["file"]
            tokenizer = load_tokenizer(None if file is None else (self.folder / file).read_text(encoding="utf-8"))
            return parts, tokenizer, manifest["tokenizer"]["lossless"]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock; the value is whether the folder can be written in."""
        lock = FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0.5)
        except Timeout:
            rank_zero_info(f"Waiting for another process that works on the tokens in {self.folder}.")
            lock.acquire()
        except OSError as error:
            if not self._is_whole(self._manifest(), verify=False):
                raise self._not_writable(error) from error
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _not_writable(self, why: object) -> ConfigurationError:
        return ConfigurationError(
            f"Expected `cache_dir` to be a folder that can be written in, got {self.folder.parent}: {why}."
        )

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) and manifest.get("settings") == self.settings else {}

    def _is_whole(self, manifest: dict[str, Any], verify: bool) -> bool:
        for entry in manifest.get("parts", {}).values():
            path = self.folder / entry["file"]
            size = entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if not path.is_file() or path.stat().st_size != size:
                return False
            if verify and _digest(path) != entry["checksum"]:
                return False
        if not manifest or manifest["tokenizer"]["file"] is None:
            return bool(manifest)
        path = self.folder / manifest["tokenizer"]["file"]
        return path.is_file() and (not verify or _digest(path) == manifest["tokenizer"]["fingerprint"])

    def _make(self, stamps: list[dict[str, Any]], progress: bool) -> dict[str, Any]:
        begun, build = time.time(), secrets.token_hex(4)
        ends = self.split.ends(self.source, self._training_pieces(progress))
        tokenizer = self.plan.make(lambda: self._training_texts(ends, progress), progress)
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        with contextlib.ExitStack() as stack:
            writers = {part: _Writer(self.folder / f"{part}.{build}.bin", dtype) for part in PARTS}
            for writer in writers.values():
                stack.enter_context(writer)
            sample = ""
            for batch in self._batches(ends, progress, "Tokenizing"):
                sample = sample or "".join(piece.text for _, piece in batch)[: 1 << 18]
                encoded = tokenizer.encode([piece.text for _, piece in batch])
                for (part, piece), tokens in zip(batch, encoded, strict=True):
                    writers[part].write(piece, tokens, tokenizer.end_of_document)
        documents = {part: writer.documents for part, writer in writers.items()}
        empty = [part for part in self.split.expected(self.source) if not writers[part].tokens]
        if empty:
            raise self._nothing_for(empty[0], documents)
        file, content = None, tokenizer.to_json()
        if content is not None:
            file = f"tokenizer.{build}.json"
            (self.folder / file).write_text(content, encoding="utf-8")
        return {
            "settings": self.settings,
            "inputs": stamps,
            "tokenizer": {
                "file": file,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": hashlib.blake2b((content or self.plan.name).encode(), digest_size=16).hexdigest(),
                "lossless": tokenizer.is_lossless(sample),
            },
            "dtype": np.dtype(dtype).name,
            "parts": {part: writer.entry() for part, writer in writers.items() if writer.tokens},
            "seconds": round(time.time() - begun, 1),
        }

    def _training_pieces(self, progress: bool) -> Iterator[Piece]:
        with self._bar(progress, "Measuring", ["train"]) as bar:
            for piece in self.source.pieces("train"):
                yield piece
                bar.update(piece.progress)

    def _training_texts(self, ends: list[tuple[str, float]], progress: bool) -> Iterator[str]:
        for batch in self._batches(ends, progress, "Learning the vocabulary"):
            yield from (piece.text for part, piece in batch if part == "train")

    def _batches(self, ends: list[tuple[str, float]], progress: bool, what: str) -> Iterator[list[tuple[str, Piece]]]:
        """All pieces with their parts, as many together as are tokenized at once."""
        with self._bar(progress, what, self.source.parts) as bar:
            for batch in _together(self.split.assign(self.source, ends)):
                yield batch
                bar.update(sum(piece.progress for _, piece in batch))

    def _bar(self, progress: bool, what: str, parts: Sequence[str]) -> tqdm:
        total = sum(self.source.size(part) for part in parts) if progress else None
        unit, name = self.source.unit, self.source.name
        return tqdm(total=total, unit=unit, unit_scale=True, desc=f"{what} ({name})", disable=not progress)

    def _nothing_for(self, part: str, documents: dict[str, int]) -> ConfigurationError:
        held_out = [other for other in self.split.expected(self.source) if other not in self.source.parts]
        total = sum(documents[other] for other in ("train", *held_out))
        if not held_out or total == 0 or part in set(self.source.parts) - {"train"}:
            return ConfigurationError(f"Expected text in the {part} part of {self.source.name}, got none.")
        if part == "train":  # all of it was held out
            part = max(held_out, key=documents.__getitem__)
        return self.split.too_little(part, total)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        temporary = self.folder / "manifest.json.partial"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_json(manifest, indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / "manifest.json")

    def _remove_all_but(self, manifest: dict[str, Any]) -> None:
        """Remove every file of ours that the manifest does not name."""
        named = {entry["file"] for entry in manifest.get("parts", {}).values()}
        named.add(manifest.get("tokenizer", {}).get("file"))
        build = "?" * 8
        ours = (*(f"{part}.{build}.bin" for part in PARTS), f"tokenizer.{build}.json", "manifest.json.partial")
        for pattern in ours:
            for path in self.folder.glob(pattern):
                if path.name not in named:
                    path.unlink()


class _Writer:
    """Writes the tokens of one part and counts them."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, dtype
        self.tokens = self.bytes = self.documents = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> None:
        self._file = self.path.open("wb")

    def __exit__(self, *exc: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self.tokens:
            self.path.unlink()

    def write(self, piece: Piece, tokens: np.ndarray, end_of_document: int | None) -> None:
        """Append a piece, with the token between documents before it where there is one."""
        if piece.first and self.documents and end_of_document is not None:
            self._append(np.array([end_of_document]))
        self.documents += piece.first
        self.bytes += len(piece.text.encode())
        self._append(tokens)

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "checksum": self._hash.hexdigest(),
        }

    def _append(self, tokens: np.ndarray) -> None:
        content = tokens.astype(self.dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.tokens += len(tokens)


def _together(pieces: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Collect pieces until there is enough to tokenize."""
    batch, size = [], 0
    for part, piece in pieces:
        batch.append((part, piece))
        size += len(piece.text)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stamps(inputs: dict[str, list[Path]], known: list[dict[str, Any]], source: TextSource) -> list[dict[str, Any]]:
    """What is known of each file; it is only read if its size or time of change is new."""
    before = {entry["path"]: entry for entry in known}
    stamps = []
    for part, path in ((part, path) for part, paths in inputs.items() for path in paths):
        stat = path.stat()
        stamp = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = before.get(str(path), {})
        same = all(old.get(key) == value for key, value in stamp.items())
        stamp["digest"] = old["digest"] if same else _digest(path)
        if part != "tokenizer":
            stamp["reading"] = old["reading"] if same and "reading" in old else source.reading(path)
        stamps.append({**stamp, "part": part})
    return stamps


def _contents(stamps: list[dict[str, Any]]) -> list[Any]:
    """What tokens depend on: of each file the part, the contents and how they are read."""
    return [(stamp.get("part"), stamp["digest"], _reading(stamp)) for stamp in stamps]


def _reading(stamp: dict[str, Any]) -> str:
    """How a file is read, or was read by releases that did not note it."""
    if "reading" in stamp or stamp.get("part") == "tokenizer":
        return stamp.get("reading", "")
    *_, kind, compression = ["", "", *(suffix.lower() for suffix in Path(stamp["path"]).suffixes)]
    if compression not in (".gz", ".bz2", ".xz", ".zst"):
        kind, compression = compression, ""
    kind = {".jsonl": "JSON", ".parquet": "parquet"}.get(kind, "text")
    return f"{kind} in {compression}" if compression else kind


def _read_otherwise(stamps: list[dict[str, Any]], known: list[dict[str, Any]]) -> str:
    """Why tokens are made anew of files that have not changed."""
    before = {(stamp["path"], stamp["digest"]): _reading(stamp) for stamp in known}
    changed = [(stamp, before.get((stamp["path"], stamp["digest"]), _reading(stamp))) for stamp in stamps]
    changed = [(stamp, old) for stamp, old in changed if old != _reading(stamp)]
    if not changed:
        return ""
    stamp, old = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f" anew: {stamp['path']}{more} is read as {_reading(stamp)} now, was read as {old}"


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True)
