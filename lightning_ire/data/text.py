"""Text for language models: tokens in a file that is mapped into memory, cut into sequences."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ire._checks import ConfigurationError, check_choice, check_path, check_whole
from lightning_ire.data._batches import Share
from lightning_ire.data._text_files import FileSource
from lightning_ire.data._text_hub import HUB, HubSource
from lightning_ire.data._text_sources import StandardLibrary, TextSource, is_unicode
from lightning_ire.data._text_split import Split
from lightning_ire.data._text_tokenizers import TextTokenizer, TokenizerPlan
from lightning_ire.data._token_cache import TokenCache, TokenPart
from lightning_ire.data._windows import CropOrder, Crops, Windows
from lightning_ire.data.global_batch import GlobalBatchData

__all__ = ["Text"]


class Text(GlobalBatchData):
    """Sequences of tokens from any text.

    A batch is a pair of inputs and targets, int64 of shape [N, `sequence_length`]; targets are the inputs one token
    later. There is no padding: a sequence runs on from one document into the next, over the token that stands between
    them. Targets of -100 (in the last sequence of an evaluation) count nowhere.

    **Sources.** `stdlib`: the source code of Python's own standard library, which is on every machine. `files`: local
    files of text, JSON (`.jsonl`, `.ndjson`, `.json`: a document per line, or per record of one array or object) or
    `.parquet` (per row), also compressed (.gz, .bz2, .xz, .zst); patterns match no hidden files. Or from the Hugging
    Face hub: `wikitext-2`, `wikitext-103`, `minipile`, `openwebtext`, and `hub:OWNER/NAME` or `hub:OWNER/NAME:CONFIG`.
    A byte order mark at the beginning of a document is no part of it.

    **Tokenizers.** `bytes`; `words` (between spaces, and `<eos>` for the end of a line); `bpe`, a byte-level byte-pair
    encoding that is learnt from the training part; `gpt2`; or the path of a `tokenizer.json`.

    **Tokens are made once**, in `cache_dir`, in a folder for each combination of source, tokenizer and split, and again
    only when one of the files has changed (its size or time, and then its contents), or is read in another way than by
    the release that made them. 2 bytes each, 4 from 65,537 tokens on; what is read of them in training is not copied
    into memory as a whole.

    **Batches.** An optimizer step sees `global_batch_size` sequences, over all devices and accumulated micro-batches
    (`max_batch_per_device`); they are the same on any number of devices. With `order: random` an epoch is the text cut
    into sequences from a random place on, in random order: every token once, which the authors' independent draws do
    not give. With `contiguous` each of the `global_batch_size` rows of a batch goes on where it ended in the batch
    before.

    **Resuming** goes on after the last optimizer step that a checkpoint knows of, inside an epoch too. There
    `max_batch_per_device`, the number of devices and, with `random`, `global_batch_size` may be others: the sequences
    that the epoch has left come once, in the same order, but for fewer than a batch. Another seed, `sequence_length`,
    `order` or text is refused inside an epoch, and allowed at its end.

    **Evaluation.** Every token is a target once, on any number of devices. A source's own validation and test parts
    are used; where it has none, `val_size` and `test_size` are held out of its text: exactly these shares of the
    documents, at least one each. To count the documents the text is read once more before it becomes tokens.

    Attributes:
        vocab_size: Number of tokens; `None` until `setup`.
    """

    vocab_size: int | None = None

    def __init__(
        self,
        source: str = "stdlib",
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        text_column: str = "text",
        tokenizer: str = "bytes",
        vocabulary_size: int | None = None,
        sequence_length: int = 256,
        global_batch_size: int = 32,
        max_batch_per_device: int | None = None,
        eval_batch_size: int | None = None,
        order: Literal["random", "contiguous"] = "random",
        val_size: float = 0.05,
        test_size: float = 0.05,
        split_by: Literal["document", "position"] = "document",
        split_seed: int = 0,
        cache_dir: str | Path = "data/text",
        verify: bool = False,
        prompts: list[str] | None = None,
        prompt_length: int = 64,
        num_workers: int = 0,
        pin_memory: bool = True,
    ) -> None:
        """Check the settings; nothing is read yet.

        Args:
            source: Where the text comes from.
            files: For the source `files`: paths or patterns of the training text.
            val_files: Paths or patterns of the validation part; none: `val_size` of the training text.
            test_files: Paths or patterns of the test part; none: `test_size` of the training text.
            text_column: Key of the text in JSON, column in `.parquet` and on the hub.
            tokenizer: What makes tokens of it.
            vocabulary_size: Most tokens that `bpe` learns or `words` knows (none: all words).
            sequence_length: Tokens in a sequence.
            global_batch_size: Sequences per optimizer step, over all devices and micro-batches.
            max_batch_per_device: Most sequences that a device takes at once; more are accumulated. `null`: no limit.
            eval_batch_size: Sequences per batch and device in evaluation. `null`: as many as in training.
            order: Order of the training text.
            val_size: Share of the text that is held out for validation, if the source has no such part; 0: none.
            test_size: Share that is held out for the test.
            split_by: What is held out: documents drawn at random, or the end of the text (by `position`).
            split_seed: Seed of that draw.
            cache_dir: Folder of the tokens.
            verify: Whether checksums are compared before tokens of an earlier run are used.
            prompts: What `predict` lets the model continue; none: the beginnings of three validation sequences.
            prompt_length: Tokens of those beginnings.
            num_workers: Processes per device that load data; reading tokens needs none.
            pin_memory: Whether batches are put in page-locked memory where there is a CUDA device.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(global_batch_size, max_batch_per_device, eval_batch_size, num_workers, pin_memory)
        given = {"train": files, "val": val_files, "test": test_files}
        patterns = {
            part: [str(value)] if isinstance(value, (str, Path)) else value or [] for part, value in given.items()
        }
        self.sequence_length = check_whole("sequence_length", sequence_length, low=1)
        self.order = check_choice("order", order, ("random", "contiguous"))
        self.verify = verify
        self.prompts = prompts
        self.prompt_length = check_whole("prompt_length", prompt_length, low=1)
        self.source = make_source(source, patterns, text_column)
        split = Split(val_size, test_size, split_by, split_seed)
        plan = TokenizerPlan(tokenizer, vocabulary_size)
        self.cache = TokenCache(check_path("cache_dir", cache_dir), self.source, plan, split)
        self._parts: dict[str, TokenPart] = {}
        self._tokenizer: TextTokenizer | None = None
        self._lossless = False

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Make the tokens, in one process per machine, unless they are there.

        Raises:
            ConfigurationError: If the text or the tokenizer is missing or broken.
        """
        bar = self.trainer is None or self.trainer.progress_bar_callback is not None
        self.cache.prepare(progress=bar, verify=self.verify)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens, and cut the global batch for the devices there are.

        Args:
            stage: Lightning's stage.

        Raises:
            ConfigurationError: If there are no tokens, or the batch cannot be cut.
        """
        self._parts, self._tokenizer, self._lossless = self.cache.open()
        self.vocab_size = self._tokenizer.vocab_size
        self.make_plan(fitting=stage == "fit")

    def train_dataloader(self) -> DataLoader:
        """Return the training sequences; the loader saves its position in checkpoints."""
        return self.training_loader()

    def probe_dataloader(self) -> DataLoader:
        """Return the training sequences one after another: where SharpnessMonitor takes its probe from."""
        return DataLoader(self._windows("train", self.sequence_length), self.plan.per_device)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the validation part, or no loader if there is none."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the test part, or no loader if there is none."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """Return the prompts, each as tokens [1, T]; several devices have a share each, or, of a network each, all."""
        if self.prompts is None:
            windows = self._windows("val" if "val" in self._parts else "train", self.prompt_length)
            step = max(len(windows) // 3, 1)
            prompts = [windows[index][0] for index in range(0, len(windows), step)[:3]]
        else:
            prompts = [self._encoded(prompt) for prompt in self.prompts]
        return DataLoader(prompts, batch_size=1, sampler=Share(prompts, 1, 0) if self.in_step else None)  # type: ignore[arg-type]

    def training_order(self) -> CropOrder:
        """The order of the training sequences."""
        crops = Crops(self._part("train").tokens, self.sequence_length)
        devices, shuffled = self.plan.devices, self.order == "random"
        return CropOrder(crops, self.global_batch_size, devices, self.rank, self.order_seed(), shuffled)

    def order_depends_on(self) -> dict[str, Any]:
        """The text, how it is cut, and the seed; in rows that go on, their number."""
        part = self._part("train")
        tokens = part.tokens
        some = tokens[np.linspace(0, len(tokens) - 1, 4096).astype(int)]  # all that older releases compare
        last = ("seed_everything", self.order_seed())
        if self.order == "contiguous":
            last = ("global_batch_size", self.global_batch_size)
        return {
            "text": f"{len(tokens)} tokens, checksum {zlib.crc32(some.astype('<u4').tobytes()):08x}",
            "tokens": f"checksum {part.checksum} of {len(tokens)} tokens",
            "sequence_length": self.sequence_length,
            "order": self.order,
            last[0]: last[1],
        }

    # What a language model may ask.

    @property
    def train_tokens(self) -> int:
        """Tokens of the training part."""
        return len(self._part("train").tokens)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all devices and micro-batches."""
        return self.global_batch_size * self.sequence_length

    def bytes_per_token(self, part: str) -> float | None:
        """Length in UTF-8 of the text of one token, on average; `None` if tokens do not give back the text.

        Args:
            part: "train", "val" or "test".
        """
        tokens = self._parts.get(part)
        return tokens.bytes / len(tokens.tokens) if tokens is not None and self._lossless else None

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens.

        Args:
            tokens: Tokens.
        """
        return self._made().decode(tokens)

    # Inner parts.

    def _made(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise ConfigurationError("Expected `prepare_data` and `setup` before tokens are used, got neither.")
        return self._tokenizer

    def _part(self, part: str) -> TokenPart:
        self._made()
        return self._parts[part]

    def _windows(self, part: str, length: int) -> Windows:
        tokens = self._part(part).tokens
        if len(tokens) < 2:
            more = "give more text" if part == "train" else f"make `{part}_size` larger, or give `{part}_files`"
            raise ConfigurationError(f"Expected at least two tokens in the {part} part, got {len(tokens)}: {more}.")
        return Windows(tokens, length)

    def _evaluation(self, part: str) -> DataLoader | list[DataLoader]:
        self._made()
        return self.evaluation_loader(self._windows(part, self.sequence_length)) if part in self._parts else []

    def _encoded(self, prompt: str) -> Tensor:
        if not is_unicode(prompt) or not len(tokens := self._made().encode([prompt])[0]):
            raise ConfigurationError(f"Expected `prompts` to have text in each, got {prompt!r}.")
        return torch.from_numpy(tokens.astype("int64"))


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
