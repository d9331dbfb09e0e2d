"""Tiny corpora in the real formats, and a reader's view of what a source gives."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from lightning_ire.data._windows import CropOrder, Crops

LENGTH = 5
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}

NASTY = (
    "plain words\r\nand\rlone returns\n\n\n   indented\ttabs \x00\x1f\x7f\x85 "
    "grüße naïve 日本語 \U0001f469\u200d\U0001f680 e\u0301 \ufeff\u2028 <|endoftext|> <unk> <eos> </s> [SEP] "
    "\ud7ff\U0010ffff\n "
)


def write(path: Path, text: str | bytes) -> Path:
    """A file, compressed as its suffix says."""
    content = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[path.suffix](content) if path.suffix in COMPRESS else content)
    return path


def jsonl(texts: Iterable[Any], key: str = "text") -> str:
    return "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts))


def parquet(texts: Sequence[Any], column: str = "text", per_group: int = 3) -> bytes:
    """A table in row groups of `per_group`."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=per_group)
    return sink.getvalue().to_pybytes()


def write_hub(root: Path, configs: dict[str, dict[str, Sequence[Any]]], column: str = "text") -> Path:
    """A data set in the hub's layout: a folder per configuration with a parquet file per split."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, texts in splits.items():
            write(root / config / f"{split}-00000.parquet", parquet(texts, column))
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    write(root / "README.md", "\n".join([*lines, "---", "A data set."]))
    return root


def prose(documents: int, lines: int = 5, seed: int = 0) -> list[str]:
    """Documents of short lines; no two lines are the same."""
    draw = random.Random(seed)
    words = [f"{first}{second}" for first in "bdgklmnprst" for second in ("a", "eo", "ix", "ours", "é")]
    return [
        "".join(f"{' '.join(draw.choices(words, k=draw.randint(1, 9)))} {number}.{line}\n" for line in range(lines))
        for number in range(documents)
    ]


def row(count: int, dtype: type = np.uint16) -> np.ndarray:
    """Tokens that are their own places."""
    return np.arange(count, dtype=dtype)


def order(tokens: int, batch: int, devices: int = 1, rank: int = 0, shuffled: bool = True, **settings) -> CropOrder:
    sampler = CropOrder(
        Crops(row(tokens), settings.get("length", LENGTH)), batch, devices, rank, settings.get("seed", 0), shuffled
    )
    sampler.set_epoch(settings.get("epoch", 0))
    return sampler


def documents(pieces: Iterable[Any]) -> list[str]:
    """The texts of the documents that pieces are of."""
    texts: list[str] = []
    for piece in pieces:
        assert piece.text
        texts += [piece.text] if piece.first else []
        if not piece.first:
            texts[-1] += piece.text
    return texts
