"""Text from data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._text_sources import MARK, Piece, TextSource, in_one_line, no_column

__all__ = ["HUB", "HubDataset", "HubSource"]


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
            first = not (self.dataset.lines and told)
            text = (text or "").removeprefix(MARK if first else "")
            if self.dataset.lines and not text.endswith("\n"):
                text += "\n"  # an empty row is an empty line
            if text:
                yield Piece(text, first, progress=number - told)
                told = number

    def _split(self, part: str) -> Any:
        (split,) = (split for split, ours in _HUB_PARTS.items() if ours == part)
        table = self._splits[split]
        if self.text_column not in table.column_names:
            raise no_column(self.text_column, self.dataset.path, table.column_names)
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
                    f"{in_one_line(error)}. Without a network set `source` to 'stdlib' or 'files'."
                ) from error
            if "train" not in self._loaded:
                raise ConfigurationError(
                    f"Expected the data set {wanted.path!r} to have a split 'train', got {list(self._loaded)}."
                )
        return self._loaded
