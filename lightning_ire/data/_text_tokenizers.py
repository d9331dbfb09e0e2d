"""What makes tokens of text: bytes, words, byte-pair encodings."""

from __future__ import annotations

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ire._checks import ConfigurationError, check_path, check_whole
from lightning_ire.data._text_sources import in_one_line

__all__ = ["Bytes", "LibraryTokenizer", "TextTokenizer", "TokenizerPlan", "load_tokenizer"]

END_OF_DOCUMENT = "<|endoftext|>"
_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Tokens that stand between documents; a tokenizer file is searched for them in this order."""

GPT2 = "openai-community/gpt2"

_WORD = re.compile(r"[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
"""What WhitespaceSplit leaves whole: Unicode's white space, which is not quite Python's (`str.split`, `\\s`)."""


class TextTokenizer(ABC):
    """Maps text to numbers below `vocab_size` and back.

    Attributes:
        vocab_size: How many tokens there are.
        end_of_document: The token between two documents; none: they follow one another without.
    """

    vocab_size: int
    end_of_document: int | None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, on all cores.

        Args:
            texts: Texts; what looks like a special token in them is ordinary text.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens.

        Args:
            tokens: Tokens; several may be needed for one character, an unfinished one becomes U+FFFD.
        """

    @abstractmethod
    def to_json(self) -> str | None:
        """All there is to know of it, as `tokenizers` writes it; none: nothing but its name."""

    def is_lossless(self, text: str) -> bool:
        """Whether a text comes back as it was.

        Args:
            text: A sample.
        """
        return self.decode(self.encode([text])[0].tolist()) == text


class Bytes(TextTokenizer):
    """The bytes of UTF-8, and 256 between documents."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One token per byte."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        runs = itertools.groupby(tokens, key=lambda token: token < 256)
        return "".join(
            bytes(run).decode(errors="replace") if ordinary else END_OF_DOCUMENT * len(list(run))
            for ordinary, run in runs
        )

    def to_json(self) -> None:
        """Nothing."""
        return None


class LibraryTokenizer(TextTokenizer):
    """A tokenizer of the package `tokenizers`, which works on all cores.

    Args:
        tokenizer: The tokenizer; cutting and padding are switched off.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # not their number: there may be gaps
        self.newline = "<eos>" if type(tokenizer.model).__name__ == "WordLevel" else None
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # a word of the text may look like one of them
        ends = [self.newline, *(token for token in _ENDS if token in added), *_ENDS]
        self.end_of_document = next((vocabulary[token] for token in ends if token in vocabulary), None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As the tokenizer does, without the tokens that it may put at the ends."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """As the tokenizer does, with special tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return re.sub(rf" ?{self.newline} ?", "\n", text) if self.newline else text

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self.tokenizer.to_str()


class TokenizerPlan:
    """Which tokenizer is asked for; it is only made when tokens have to be.

    Args:
        name: "bytes"; "words": words between spaces, and `<eos>` for the end of a line; "bpe": a byte-level byte-pair
            encoding learnt from the training part; "gpt2": that of GPT-2, from the hub or its cache; or the path of a
            `tokenizer.json`.
        vocabulary_size: Most tokens that are learnt. For "bpe" it is needed; "words" takes the most frequent, by
            default all.

    Raises:
        ConfigurationError: If the name is not known, or the size does not fit it.
    """

    def __init__(self, name: str, vocabulary_size: int | None) -> None:
        path = check_path("tokenizer", name)
        named = name in ("bytes", "words", "bpe", "gpt2")
        if not named and not os.path.isfile(path):  # unlike Path.is_file it takes a name of any length
            raise ConfigurationError(
                f"Expected `tokenizer` to be 'bytes', 'words', 'bpe', 'gpt2' or a tokenizer.json, got {name!r}."
            )
        if vocabulary_size is not None:
            if name not in ("words", "bpe"):
                raise ConfigurationError(
                    f"Expected `vocabulary_size` to be null for the tokenizer {name!r}, whose vocabulary is given, "
                    f"got {vocabulary_size!r}."
                )
            check_whole("vocabulary_size", vocabulary_size, low=257 if name == "bpe" else 3)
        elif name == "bpe":
            raise ConfigurationError("Expected `vocabulary_size` to be given for the tokenizer 'bpe', got None.")
        self.name = name
        self.vocabulary_size = vocabulary_size
        self.path = None if named else path.resolve()

    @property
    def short_name(self) -> str:
        """Goes into the name of the cache's folder."""
        if self.path is not None:
            return self.path.stem
        return self.name if self.vocabulary_size is None else f"{self.name}{self.vocabulary_size}"

    def settings(self) -> dict[str, Any]:
        """What was asked for, in JSON's types."""
        name = self.name if self.path is None else str(self.path)
        return {"tokenizer": name, "vocabulary_size": self.vocabulary_size}

    def files(self) -> list[Path]:
        """The files that it is read from."""
        return [] if self.path is None else [self.path]

    def make(self, training_texts: Callable[[], Iterator[str]], progress: bool) -> TextTokenizer:
        """Read it or learn it.

        Args:
            training_texts: Begins to read the training part.
            progress: Whether the library shows how far it is with a vocabulary.

        Raises:
            ConfigurationError: If a package or a file is missing or broken.
        """
        if self.name == "bytes":
            return Bytes()
        library = _library()
        if self.name == "words":
            return LibraryTokenizer(_word_level(library, training_texts(), self.vocabulary_size))
        if self.name == "bpe":
            assert self.vocabulary_size is not None
            return LibraryTokenizer(_byte_pairs(library, training_texts(), self.vocabulary_size, progress))
        path = self.path or _download_gpt2()
        try:
            return LibraryTokenizer(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises no other class
            raise ConfigurationError(f"Expected a tokenizer.json, got {path}: {error}.") from error


def load_tokenizer(json: str | None) -> TextTokenizer:
    """Return the tokenizer that `to_json` was taken of.

    Args:
        json: What it returned.
    """
    return Bytes() if json is None else LibraryTokenizer(_library().Tokenizer.from_str(json))


def _word_level(library: Any, texts: Iterator[str], size: int | None) -> Any:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    specials = ["<unk>", "<eos>"]
    # not by the library's trainer: it gives a special token that is also in the text a second number
    words = sorted(counts.keys() - set(specials), key=lambda word: (-counts[word], word))
    words = words[: None if size is None else size - len(specials)]
    vocabulary = {word: number for number, word in enumerate([*specials, *words])}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = library.normalizers.Replace("\n", " <eos> ")
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _byte_pairs(library: Any, texts: Iterator[str], size: int, progress: bool) -> Any:
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigurationError(
            "Expected the package tokenizers for any tokenizer but 'bytes', got an import error: "
            "pip install 'lightning-ire[text]'."
        ) from error
    return tokenizers


def _download_gpt2() -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(GPT2, "tokenizer.json"))
    except Exception as error:  # no package, no network, no such file: several families of classes
        raise ConfigurationError(
            f"Expected GPT-2's tokenizer ({GPT2}) from the hub or its cache, got {type(error).__name__}: "
            f"{in_one_line(error)}. "
            "Without a network set `tokenizer` to the path of its tokenizer.json, or to 'bpe' or 'bytes'."
        ) from error
