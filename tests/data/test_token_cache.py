import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import text_data
import tokenizers
from text_data import prose, write

from lightning_ire import ConfigurationError
from lightning_ire.data import _text_files, _token_cache
from lightning_ire.data._text_files import FileSource
from lightning_ire.data._text_hub import HubSource
from lightning_ire.data._text_sources import Piece, TextSource
from lightning_ire.data._text_split import Split
from lightning_ire.data._text_tokenizers import TokenizerPlan
from lightning_ire.data._token_cache import PARTS, TokenCache, TokenPart

DOCUMENTS = prose(40)
END = "<|endoftext|>"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 40 documents."""
    for number, text in enumerate(DOCUMENTS):
        write(tmp_path / "text" / f"{number:02}.txt", text)
    return tmp_path / "text"


def make(
    corpus: Path | TextSource, tokenizer: str = "bytes", size: int | None = None, pattern: str = "*.txt", **split
) -> TokenCache:
    source = FileSource({"train": [str(corpus / pattern)]}, "text") if isinstance(corpus, Path) else corpus
    split = {"val_size": 0.2, "test_size": 0.1, "by": "document", "seed": 0, **split}
    root = corpus.parent if isinstance(corpus, Path) else split.pop("root")
    return TokenCache(root / "cache", source, TokenizerPlan(tokenizer, size), Split(**split))


def prepared(*args, verify: bool = False, **settings) -> TokenCache:
    cache = make(*args, **settings)
    cache.prepare(progress=False, verify=verify)
    return cache


def texts(cache: TokenCache) -> dict[str, list[str]]:
    """The documents of each part, from tokens that are bytes."""
    parts, tokenizer, _ = cache.open()
    return {part: tokenizer.decode(parts[part].tokens).split(END) for part in PARTS if part in parts}


def contents(parts: dict[str, TokenPart]) -> dict[str, list[int]]:
    return {part: opened.tokens.tolist() for part, opened in parts.items()}


def manifest(cache: TokenCache) -> dict:
    return json.loads((cache.folder / "manifest.json").read_text())


def files(cache: TokenCache) -> dict[str, int]:
    """The files of the folder and their inodes."""
    return {path.name: path.stat().st_ino for path in cache.folder.iterdir() if path.name != "lock"}


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """A folder for each time that tokens are made."""
    made: list[str] = []
    make_tokens = TokenCache._make

    def counted(self, *args):
        made.append(self.folder.name)
        return make_tokens(self, *args)

    monkeypatch.setattr(TokenCache, "_make", counted)
    return made


# What is made.


def test_parts_and_manifest(corpus):
    cache = prepared(corpus, seed=3)
    draw = random.Random(3)
    order = sorted(range(40), key=[draw.random() for _ in DOCUMENTS].__getitem__)
    numbers = {"val": order[:8], "test": order[8:12], "train": order[12:]}
    expected = {part: [DOCUMENTS[number] for number in sorted(numbers[part])] for part in PARTS}
    assert texts(cache) == expected
    parts, tokenizer, lossless = cache.open()
    said = manifest(cache)
    assert (lossless, tokenizer.vocab_size, said["dtype"]) == (True, 257, "uint16")
    assert said["tokenizer"]["vocab_size"] == 257
    for part, documents in expected.items():
        opened, entry, path = parts[part], said["parts"][part], cache.folder / said["parts"][part]["file"]
        assert isinstance(opened.tokens, np.memmap)
        assert not opened.tokens.flags.writeable
        assert opened.bytes == entry["bytes"] == sum(len(text.encode()) for text in documents)
        assert opened.documents == entry["documents"] == len(documents)
        assert len(opened.tokens) == entry["tokens"] == opened.bytes + len(documents) - 1
        assert entry["checksum"] == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert [entry["path"] for entry in said["inputs"]] == sorted(map(str, corpus.iterdir()))
    for entry in said["inputs"]:
        content = Path(entry["path"]).read_bytes()
        assert (entry["size"], entry["digest"]) == (len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
    assert set(files(cache)) == {"manifest.json", *(entry["file"] for entry in said["parts"].values())}


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("words", None), ("words", 50), ("bpe", 300)])
@pytest.mark.parametrize("by", ["document", "position"])
def test_nothing_is_lost(corpus, tokenizer, size, by):
    parts, _, lossless = prepared(corpus, tokenizer, size, by=by).open()
    assert sum(part.bytes for part in parts.values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert lossless == ((tokenizer, size) in (("bytes", None), ("bpe", 300)))
    if by == "document":
        assert sum(part.documents for part in parts.values()) == len(DOCUMENTS)


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("words", None), ("bpe", 400)])
def test_tokens_do_not_depend_on_how_the_text_is_read(corpus, monkeypatch, tokenizer, size):
    whole = contents(prepared(corpus, tokenizer, size).open()[0])
    for block, at_once in ((64, 1), (1 << 20, 100), (32, 1000)):
        monkeypatch.setattr(_text_files, "_BLOCK", block)
        monkeypatch.setattr(_token_cache, "_AT_ONCE", at_once)
        other = make(corpus, tokenizer, size)
        other.folder = other.folder.with_name(f"{block}-{at_once}")
        other.prepare(progress=False)
        assert contents(other.open()[0]) == whole


def test_vocabularies_are_of_the_training_part_alone(corpus):
    parts, tokenizer, _ = prepared(corpus, "words").open()
    held_out = [text for part in ("val", "test") for text in texts(prepared(corpus))[part]]
    train = {word for text in texts(prepared(corpus))["train"] for word in text.split()}
    assert set(tokenizer.tokenizer.get_vocab()) == train | {"<unk>", "<eos>"}
    assert 0 not in parts["train"].tokens
    unknown = sum(word not in train for text in held_out for word in text.split())
    assert unknown == sum((parts[part].tokens == 0).sum() for part in ("val", "test")) > 0
    path = write(corpus / "text.jsonl", text_data.jsonl([*DOCUMENTS, *["zyzzyva " * 99] * 2]))
    _, tokenizer, _ = prepared(corpus, "bpe", 400, pattern="*.jsonl", by="position", test_size=0.0, val_size=0.3).open()
    assert len(tokenizer.encode([" zyzzyva"])[0]) > 3  # all of it is at the end
    _, tokenizer, _ = prepared(
        corpus, "bpe", 400, pattern="*.jsonl", by="position", test_size=0.0, val_size=0.01
    ).open()
    assert len(tokenizer.encode([" zyzzyva"])[0]) == 1
    path.unlink()


def word_level(path: Path, vocabulary: dict[str, int]) -> str:
    """A tokenizer file that knows these words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, **vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(("vocabulary", "dtype", "width"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_width_of_a_token(tmp_path, vocabulary, dtype, width):
    write(tmp_path / "text" / "a.txt", "last first last new")
    name = word_level(tmp_path / "a.json", {"first": 1, "last": vocabulary - 1})
    cache = prepared(tmp_path / "text", name, val_size=0.0, test_size=0.0)
    parts, tokenizer, _ = cache.open()
    assert tokenizer.vocab_size == vocabulary
    assert parts["train"].tokens.dtype == manifest(cache)["dtype"] == dtype
    assert parts["train"].tokens.tolist() == [vocabulary - 1, 1, vocabulary - 1, 0]
    assert (cache.folder / manifest(cache)["parts"]["train"]["file"]).stat().st_size == 4 * width


def test_a_tokenizer_without_an_end_of_documents(corpus):
    parts, _, _ = prepared(corpus, word_level(corpus.parent / "a.json", {"ba": 1})).open()
    assert sum(len(part.tokens) for part in parts.values()) == sum(len(text.split()) for text in DOCUMENTS)


def test_the_bar(corpus, capfd):
    make(corpus).prepare(progress=False)
    assert "Tokenizing" not in capfd.readouterr().err
    make(corpus, "words").prepare(progress=True)
    shown = capfd.readouterr().err
    assert "Learning the vocabulary (files): 100%" in shown
    assert "Tokenizing (files): 100%" in shown


# What is held out.


def test_documents_are_drawn(corpus):
    assert texts(prepared(corpus)) == texts(prepared(corpus))
    assert texts(prepared(corpus, seed=1)) != texts(prepared(corpus))
    everything = texts(prepared(corpus, val_size=0.0, test_size=0.0))
    assert everything == {"train": DOCUMENTS}
    assert set(texts(prepared(corpus, val_size=0.0, test_size=0.5))) == {"train", "test"}


@pytest.mark.parametrize(("val", "test"), [(0.05, 0.05), (0.3, 0.2), (0.5, 0.0), (0.0, 0.1), (0.9, 0.09)])
def test_shares(tmp_path, val, test):
    write(tmp_path / "text" / "a.jsonl", text_data.jsonl([f"{number} text" for number in range(4000)]))
    for by, within in (("document", 0), ("position", 80)):
        cache = prepared(tmp_path / "text", pattern="*.jsonl", val_size=val, test_size=test, by=by)
        parts, _, _ = cache.open()
        counts = {part: opened.documents for part, opened in parts.items()}
        assert set(counts) == {"train", *(["val"] if val else []), *(["test"] if test else [])}
        for part, share in (("val", val), ("test", test), ("train", 1 - val - test)):
            assert abs(counts.get(part, 0) - round(4000 * share)) <= within


@pytest.mark.parametrize(
    ("documents", "val", "test", "expected"),
    [
        (20, 0.2, 0.0, (16, 4, 0)),
        (20, 0.05, 0.05, (18, 1, 1)),
        (3, 0.05, 0.05, (1, 1, 1)),
        (2, 0.0, 0.01, (1, 0, 1)),
        (4, 0.9, 0.0, (1, 3, 0)),
        (3, 0.5, 0.4, (1, 1, 1)),
        (5, 0.3, 0.6, (1, 2, 2)),
    ],
)
def test_shares_of_few_documents(tmp_path, documents, val, test, expected):
    write(tmp_path / "text" / "a.jsonl", text_data.jsonl([f"{number}" for number in range(documents)]))
    held_out = set()
    for seed in range(8):
        parts = texts(prepared(tmp_path / "text", pattern="*.jsonl", val_size=val, test_size=test, seed=seed))
        assert tuple(len(parts.get(part, [])) for part in PARTS) == expected
        assert sorted(text for part in parts.values() for text in part) == sorted(map(str, range(documents)))
        held_out |= {text for part in ("val", "test") for text in parts.get(part, [])}
    assert len(held_out) > 1  # drawn, not the first or the last


def test_the_text_is_read_once_more_for_the_shares(corpus, monkeypatch):
    read, pieces = [], FileSource.pieces
    monkeypatch.setattr(FileSource, "pieces", lambda self, part: (read.append(part), pieces(self, part))[1])
    for split, times in (({}, 2), ({"by": "position"}, 2), ({"val_size": 0.0, "test_size": 0.0}, 1)):
        read.clear()
        prepared(corpus, **split)
        assert read == ["train"] * times
    prepared(corpus, "words")
    assert read == ["train"] * 4  # and for the vocabulary


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block", [32, 1 << 20])
@pytest.mark.parametrize(("val", "test"), [(0.05, 0.05), (0.3, 0.2), (0.5, 0.0), (0.0, 0.1)])
def test_the_end_of_the_text_is_held_out(tmp_path, monkeypatch, newline, block, val, test):
    monkeypatch.setattr(_text_files, "_BLOCK", block)
    text = "".join(DOCUMENTS).replace("\n", newline)
    write(tmp_path / "text" / "a.txt", text)
    cache = prepared(tmp_path / "text", by="position", val_size=val, test_size=test)
    parts, line = texts(cache), max(map(len, text.splitlines(keepends=True)))
    assert set(parts) == {"train", *(["val"] if val else []), *(["test"] if test else [])}
    assert "".join(documents[0] for documents in parts.values()) == text  # one document each, in their order
    assert all(documents[0].endswith("\n") for documents in parts.values())
    train, held_out = len(parts["train"][0]), len(parts.get("test", [""])[0])
    assert 0 <= train - round(len(text) * (1 - val - test)) < line  # up to the end of a line
    assert 0 <= len(text) - held_out - round(len(text) * (1 - test)) < line
    assert all(opened.documents == 1 for opened in cache.open()[0].values())


def test_documents_of_a_split_by_position(corpus):
    cache = prepared(corpus, by="position")
    parts = texts(cache)
    assert "".join(text for documents in parts.values() for text in documents) == "".join(DOCUMENTS)
    assert parts["train"][:-1] == DOCUMENTS[: len(parts["train"]) - 1]
    assert parts["test"][1:] == DOCUMENTS[len(DOCUMENTS) - len(parts["test"]) + 1 :]
    opened, _, _ = cache.open()
    assert {part: opened[part].documents for part in parts} == {part: len(parts[part]) for part in parts}


class Lines(TextSource):
    """A text that runs on over its pieces, as wikitext's rows do."""

    name = "lines"

    def __init__(self, last: str = "") -> None:
        self.last = last

    def settings(self):
        return {"source": self.name, "last": self.last}

    def files(self):
        return {}

    def size(self, part):
        return 100

    def pieces(self, part):
        for number in range(100):
            yield Piece(f"line {number}\n", number == 0, 1)
        if self.last:
            yield Piece(self.last, True, 0)


def test_a_part_begins_a_document(tmp_path):
    cache = prepared(Lines(), by="position", root=tmp_path)
    opened, _, _ = cache.open()
    assert [part.documents for part in opened.values()] == [1, 1, 1]
    assert "".join(documents[0] for documents in texts(cache).values()) == "".join(f"line {n}\n" for n in range(100))
    cache = prepared(Lines("another"), by="position", root=tmp_path)
    assert texts(cache)["test"][1] == "another"  # with the token between them


@pytest.mark.parametrize("by", ["document", "position"])
def test_parts_of_the_source_are_used(corpus, by):
    write(corpus.parent / "val.txt", "held out")
    source = FileSource({"train": [f"{corpus}/*.txt"], "val": [f"{corpus.parent}/val.txt"]}, "text")
    cache = prepared(source, by=by, val_size=0.5, test_size=0.25, root=corpus.parent)
    parts = texts(cache)
    assert parts["val"] == ["held out"]
    assert "".join(sorted("".join(parts["train"] + parts["test"]))) == "".join(sorted("".join(DOCUMENTS)))
    assert 0.05 < len("".join(parts["test"])) / len("".join(DOCUMENTS)) < 0.45


@pytest.mark.parametrize(
    ("documents", "split", "message"),
    [
        (["one", "two"], {}, r"^Expected `val_size` to split 2 document\(s\) so that every part has text, got"),
        (["only one"], {}, r"^Expected `val_size` to split 1 document\(s\) so that .*, got 0.2: set `split_by`"),
        (["only one"], {"val_size": 0.0, "test_size": 0.1}, r"^Expected `test_size` to .*, or give `test_files`"),
        (["only one"], {"val_size": 0.9, "test_size": 0.0}, r"^Expected `val_size` to split 1 .*, got 0.9:"),
        (["a"], {"by": "position"}, r"^Expected `val_size` to split 1 .*, got 0.2: change it, or give `val_files`\.$"),
        (["", ""], {}, r"^Expected text in the train part of files, got none\.$"),
        ([" "], {"val_size": 0.0, "test_size": 0.0, "tokenizer": "words"}, "^Expected text in the train part"),
    ],
)  # fmt: skip
def test_too_little_text(tmp_path, documents, split, message):
    write(tmp_path / "text" / "a.jsonl", text_data.jsonl(documents))
    cache = make(tmp_path / "text", pattern="*.jsonl", **split)
    with pytest.raises(ConfigurationError, match=message) as caught:
        cache.prepare(progress=False)
    assert "\n" not in str(caught.value)
    assert files(cache) == {}


def test_an_empty_part_of_the_source(corpus):
    write(corpus.parent / "val.txt", "")
    source = FileSource({"train": [f"{corpus}/*.txt"], "val": [f"{corpus.parent}/val.txt"]}, "text")
    with pytest.raises(ConfigurationError, match=r"^Expected text in the val part of files, got none\.$"):
        prepared(source, root=corpus.parent)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"val_size": 1.0}, r"`val_size` to be a number in \[0, 1\), got 1.0"),
        ({"test_size": -0.1}, r"`test_size` to be a number in \[0, 1\), got -0.1"),
        ({"val_size": 0.5, "test_size": 0.5}, "`val_size` and `test_size` to leave text for training, got 0.5 and 0.5"),
        ({"by": "line"}, "`split_by` to be one of 'document', 'position', got 'line'"),
        ({"seed": -1}, "`split_seed` to be a whole number >= 0, got -1"),
    ],
)
def test_splits_refused(split, message):
    with pytest.raises(ConfigurationError, match=message):
        Split(**{"val_size": 0.1, "test_size": 0.1, "by": "document", "seed": 0, **split})


# Made once.


def test_made_once(corpus, builds):
    before = files(prepared(corpus))
    assert files(prepared(corpus)) == before
    assert len(builds) == 1


def test_each_setting_has_its_folder(corpus, tmp_path):
    write(tmp_path / "a.json", "{}")
    caches = [
        make(corpus), make(corpus, "words"), make(corpus, "words", 50), make(corpus, "bpe", 300),
        make(corpus, str(tmp_path / "a.json")), make(corpus, "gpt2"), make(corpus, val_size=0.3),
        make(corpus, test_size=0.2), make(corpus, by="position"), make(corpus, seed=1), make(corpus, pattern="0*.txt"),
        make(FileSource({"train": [f"{corpus}/*.txt"], "val": [str(tmp_path / "a.json")]}, "text"), root=tmp_path),
        make(FileSource({"train": [f"{corpus}/*.txt"]}, "body"), root=tmp_path), make(Lines(), root=tmp_path),
        make(HubSource("wikitext-2", "text"), root=tmp_path), make(HubSource("wikitext-103", "text"), root=tmp_path),
        make(HubSource("hub:a/b", "text"), root=tmp_path), make(HubSource("hub:a/b:c", "text"), root=tmp_path),
        make(HubSource("hub:a/b", "body"), root=tmp_path),
    ]  # fmt: skip
    assert len({cache.folder for cache in caches}) == len(caches)
    assert caches[0].folder.name.startswith("files-bytes-")
    assert caches[2].folder.name.startswith("files-words50-")
    assert make(corpus, val_size=0, test_size=0).folder == make(corpus, val_size=0.0, test_size=0.0).folder


def test_touched_files_are_read_once_more(corpus, builds, monkeypatch):
    before = files(prepared(corpus))
    for path in corpus.iterdir():
        os.utime(path, ns=(0, 12345))
    after = files(prepared(corpus))
    assert {name: inode for name, inode in after.items() if name != "manifest.json"} == {
        name: inode for name, inode in before.items() if name != "manifest.json"
    }
    assert {entry["mtime_ns"] for entry in manifest(make(corpus))["inputs"]} == {12345}
    monkeypatch.setattr(_token_cache, "_digest", lambda path: pytest.fail(f"read {path}"))
    prepared(corpus)
    assert len(builds) == 1


def test_renamed_in_the_same_order(corpus, builds):
    before = texts(prepared(corpus))
    for path in sorted(corpus.iterdir()):
        path.rename(path.with_name(f"new-{path.name}"))
    assert texts(prepared(corpus)) == before
    assert len(builds) == 1


def append(corpus: Path) -> None:
    with (corpus / "00.txt").open("a") as file:
        file.write("more\n")


def replace_one_byte(corpus: Path) -> None:
    stat = (corpus / "00.txt").stat()
    (corpus / "00.txt").write_bytes((corpus / "00.txt").read_bytes()[:-1] + b"!")
    assert (corpus / "00.txt").stat().st_size == stat.st_size


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda corpus: (corpus / old).rename(corpus / new)


CHANGES = {
    "append": append,
    "one byte": replace_one_byte,
    "added": lambda corpus: write(corpus / "99.txt", "new\n"),
    "added, empty": lambda corpus: write(corpus / "99.txt", ""),
    "removed": lambda corpus: (corpus / "39.txt").unlink(),
    "another order": rename("00.txt", "99.txt"),
    "read in another way": rename("00.txt", "00.jsonl"),
    "to another part": rename("39.txt", "40.txt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_is_made_anew(corpus, builds, change):
    write(corpus / "41.val", "the validation part")
    write(corpus / "00.txt", text_data.jsonl(["lines"]))
    patterns = {"train": [f"{corpus}/[0-39]?.*"], "val": [f"{corpus}/4?.*"]}

    def now() -> TokenCache:
        return prepared(FileSource(patterns, "text"), test_size=0.0, root=corpus.parent)

    old = now()
    before, inodes = texts(old), files(old)
    CHANGES[change](corpus)
    new = now()
    assert new.folder == old.folder
    assert len(builds) == 2
    fresh = now()
    fresh.folder = fresh.folder.with_name("fresh")
    fresh.prepare(progress=False)
    assert texts(new) == texts(fresh)
    assert (texts(new) != before) == (change != "added, empty")
    assert len(files(new)) == len(inodes) == 3  # nothing of old is left
    assert len(builds) == 3


def test_a_changed_tokenizer_is_used(corpus, builds):
    path = corpus.parent / "a.json"
    first = prepared(corpus, word_level(path, {"la": 1}))
    assert first.open()[1].vocab_size == 2
    assert len(files(prepared(corpus, str(path)))) == 5
    word_level(path, {"la": 1, "ma": 2})
    assert first.open()[1].vocab_size == 2  # what the tokens were made with
    assert prepared(corpus, str(path)).open()[1].vocab_size == 3
    assert len(builds) == 2


def test_the_hub_is_asked_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    hub = text_data.write_hub(tmp_path / "mine", {"a": {"train": ["b", "c"], "validation": ["d"], "test": ["e"]}})
    first = prepared(HubSource(f"hub:{hub}:a", "text"), root=tmp_path)
    assert texts(first) == {"train": ["b", "c"], "val": ["d"], "test": ["e"]}
    monkeypatch.setitem(sys.modules, "datasets", None)
    again = prepared(HubSource(f"hub:{hub}:a", "text"), root=tmp_path)
    assert texts(again) == texts(first)


def of_an_older_release(cache: TokenCache, monkeypatch, **replaced: object) -> None:
    """Tokens as a release made them that did not note how a file is read: text as it is, JSON where it is `.jsonl`."""
    with monkeypatch.context() as context:
        for name, value in replaced.items():
            context.setattr(cache.source, name, value)
        stamps = _token_cache._stamps
        context.setattr(
            _token_cache,
            "_stamps",
            lambda *args: [{key: value for key, value in stamp.items() if key != "reading"} for stamp in stamps(*args)],
        )
        cache.prepare(progress=False)
    assert not any("reading" in entry for entry in manifest(cache)["inputs"])


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_old_tokens_stay_where_the_text_is_read_as_before(corpus, builds, tokenizer, monkeypatch):
    write(corpus / "41.txt.gz", "compressed")
    write(corpus / "42.jsonl", text_data.jsonl(["lines"]))
    write(corpus / "43.PARQUET", text_data.parquet(["rows"]))
    write(corpus / "44.txt", "a \ufeff inside")
    of_an_older_release(make(corpus, tokenizer, pattern="*"), monkeypatch)
    for _ in range(2):
        prepared(corpus, tokenizer, pattern="*")
        assert len(builds) == 1
    readings = [entry["reading"] for entry in manifest(make(corpus, tokenizer, pattern="*"))["inputs"]]
    assert readings == [*["text"] * 40, "text in .gz", "JSON", "parquet", "text"]


@pytest.mark.parametrize(
    ("name", "content", "was", "now"),
    [
        ("99.txt", "\ufeffmarked", "text", "text after a byte order mark"),
        ("99.txt.xz", "\ufeffmarked", "text in .xz", "text in .xz after a byte order mark"),
        ("99.json.gz", text_data.jsonl(["marked"]), "text in .gz", "JSON in .gz"),
        ("99.ndjson", text_data.jsonl(["marked"]), "text", "JSON"),
        ("99", text_data.jsonl(["marked"]), "text", "JSON"),
    ],
)
def test_old_tokens_are_made_anew_where_the_text_was_read_otherwise(
    corpus, builds, monkeypatch, caplog, name, content, was, now
):
    write(corpus / name, content)
    old = make(corpus, pattern="*", val_size=0.0, test_size=0.0)
    of_an_older_release(old, monkeypatch, pieces=lambda part: iter([Piece("as it was", True, 1)]))
    with caplog.at_level("INFO"):
        new = prepared(corpus, pattern="*", val_size=0.0, test_size=0.0)
    assert f"in {new.folder} anew: {corpus / name} is read as {now} now, was read as {was}." in caplog.text
    assert texts(new) == {"train": [*DOCUMENTS, "marked"]}
    prepared(corpus, pattern="*", val_size=0.0, test_size=0.0)
    assert len(builds) == 2


def test_what_is_left_out_is_said_once(corpus, caplog):
    write(corpus / "Thumbs.db", b"\xff")
    write(corpus / "__MACOSX" / "00.txt", "no text")
    with caplog.at_level("INFO"):
        cache = prepared(corpus, pattern="**", val_size=0.0, test_size=0.0)
        prepared(corpus, pattern="**", val_size=0.0, test_size=0.0)
    assert texts(cache) == {"train": DOCUMENTS}
    assert [line for line in caplog.messages if "Left out" in line] == ["Left out of files: 2 hidden."]


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("words", None), ("bpe", 300)])
def test_a_byte_order_mark_is_no_token(tmp_path, tokenizer, size):
    write(tmp_path / "a" / "a.txt", "one two\n" * 9)
    write(tmp_path / "b" / "a.txt", "\ufeff" + "one two\n" * 9)
    plain, marked = (
        prepared(tmp_path / name, tokenizer, size, val_size=0.0, test_size=0.0).open() for name in ("a", "b")
    )
    assert contents(plain[0]) == contents(marked[0])
    assert plain[1].to_json() == marked[1].to_json()
    assert plain[0]["train"].bytes == marked[0]["train"].bytes == 72


# What faults leave behind.


def test_leftovers_are_removed_and_other_files_kept(corpus, builds):
    cache = prepared(corpus)
    whole = files(cache)
    others = ["notes.txt", "mine.bin", "train.bin", "tokenizer.json", "train.old.bin"]
    for name in ["train.0123abcd.bin", "val.0123abcd.bin", "tokenizer.0123abcd.json", "manifest.json.partial", *others]:
        (cache.folder / name).touch()
    prepared(corpus)
    assert set(files(cache)) == {*whole, *others}
    append(corpus)
    (cache.folder / "train.0123abcd.bin").touch()
    prepared(corpus)
    assert len(files(cache)) == len(whole) + len(others)
    assert {*others} < set(files(cache))
    assert len(builds) == 2


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ConfigurationError])
@pytest.mark.parametrize("place", ["encode", "_append", "_write_manifest", "is_lossless"])
def test_an_exception_leaves_the_old_tokens(corpus, monkeypatch, tokenizer, error, place):
    cache = prepared(corpus, tokenizer)
    before, inodes = contents(cache.open()[0]), files(cache)
    append(corpus)

    def fail(*args):
        raise error("in the middle")

    kind = type(cache.open()[1])
    owner = {"_append": _token_cache._Writer, "_write_manifest": TokenCache}.get(place, kind)
    with monkeypatch.context() as context:
        context.setattr(owner, place, fail)
        with pytest.raises(error, match="in the middle"):
            prepared(corpus, tokenizer)
    if place != "_write_manifest":
        assert files(cache) == inodes
    assert contents(cache.open()[0]) == before
    new = contents(prepared(corpus, tokenizer).open()[0])
    assert new != before
    assert len(files(cache)) == len(inodes)


def test_an_error_in_the_text_leaves_nothing(corpus):
    write(corpus / "99.txt", b"\xff")
    cache = make(corpus)
    with pytest.raises(ConfigurationError, match=r"^Expected UTF-8 text in .*99\.txt"):
        cache.prepare(progress=False)
    assert files(cache) == {}
    with pytest.raises(ConfigurationError, match=r"^Expected tokens in .*, got none: call `prepare_data` first\.$"):
        cache.open()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"{}", b'{"settings": {}}', bytes(99)]
)
def test_a_damaged_manifest(corpus, builds, content):
    cache = prepared(corpus)
    before = texts(cache)
    (cache.folder / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^Expected tokens in .*, got none: call `prepare_data` first\.$"):
        cache.open()
    assert texts(prepared(corpus)) == before
    assert len(builds) == 2
    assert len(files(cache)) == 4


@pytest.mark.parametrize("damage", ["short", "long", "gone", "tokenizer gone"])
def test_damaged_tokens(corpus, builds, damage):
    cache = prepared(corpus, "words")
    before = contents(cache.open()[0])
    said = manifest(cache)
    path = cache.folder / (said["tokenizer"]["file"] if damage == "tokenizer gone" else said["parts"]["val"]["file"])
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else path.read_bytes() + b"12")
    with pytest.raises(ConfigurationError, match="got none: call `prepare_data` first"):
        cache.open()
    assert contents(prepared(corpus, "words").open()[0]) == before
    assert len(builds) == 2


@pytest.mark.parametrize("file", ["train", "test", "tokenizer"])
def test_checksums(corpus, builds, file):
    cache = prepared(corpus, "words")
    before = contents(cache.open()[0])
    said = manifest(cache)
    path = cache.folder / (said["tokenizer"]["file"] if file == "tokenizer" else said["parts"][file]["file"])
    content = bytearray(path.read_bytes())
    place = content.index(b"ba") if file == "tokenizer" else len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)
    prepared(corpus, "words", verify=False)
    assert len(builds) == 1
    prepared(corpus, "words", verify=True)
    assert len(builds) == 2
    assert contents(cache.open()[0]) == before
    prepared(corpus, "words", verify=True)
    assert len(builds) == 2


def test_who_has_opened_them_keeps_them(corpus):
    cache = prepared(corpus)
    opened, _, _ = cache.open()
    before = contents(cache.open()[0])
    append(corpus)
    prepared(corpus)
    assert contents(opened) == before
    assert contents(cache.open()[0]) != before


# Several processes: forks of this one.


def fork(work: Callable[[], object]) -> int:
    """Run it in a process of its own, which ends with status 0 if there was no exception."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def status(process: int) -> int:
    """What `os.waitpid` says; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(number: int, work: Callable[[], object]) -> Callable[[], None]:
    """`work` that is killed (SIGKILL) at the n-th change of a file: before it, or after half of it was written."""
    count = iter(range(10**9))

    def killing(function):
        def wrapped(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    def run() -> None:
        for owner, name in (
            (_token_cache._Writer, "__enter__"), (_token_cache._Writer, "_append"), (_token_cache._Writer, "__exit__"),
            (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "write_text"), (TokenCache, "_write_manifest"),
        ):  # fmt: skip
            setattr(owner, name, killing(getattr(owner, name)))
        unbuffered = _token_cache._Writer._append

        def append_and_flush(self, tokens):
            unbuffered(self, tokens)
            self._file.flush()

        _token_cache._Writer._append = append_and_flush
        work()

    return run


@pytest.fixture
def serial(monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("rebuild", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_at_each_change_of_a_file(corpus, rebuild):
    for path in sorted(corpus.iterdir())[1:]:
        path.unlink()
    settings = {"by": "position", "val_size": 0.4, "test_size": 0.0}
    old = contents(prepared(corpus, "words", **settings).open()[0]) if rebuild else None
    append(corpus)
    reference = make(corpus, "words", **settings)
    reference.folder = reference.folder.with_name("reference")
    reference.prepare(progress=False)
    new, kept = contents(reference.open()[0]), files(reference)
    assert new != old
    cache = make(corpus, "words", **settings)
    spare = cache.folder.with_name("spare")
    if rebuild:
        shutil.copytree(cache.folder, spare)
    seen = []
    for number in range(200):
        shutil.rmtree(cache.folder, ignore_errors=True)
        if rebuild:
            shutil.copytree(spare, cache.folder)
        ended = status(fork(killed_at(number, lambda: make(corpus, "words", **settings).prepare(progress=False))))
        assert ended in (0, -signal.SIGKILL)
        try:
            opened = contents(cache.open()[0])
        except ConfigurationError:
            opened = None
        assert opened in (old, new)
        seen.append(opened == new)
        assert contents(prepared(corpus, "words", **settings).open()[0]) == new
        assert len(files(cache)) == len(kept)
        if ended == 0:
            break
    assert ended == 0
    assert number > 12
    assert seen == sorted(seen)  # once they are there they stay


@pytest.mark.slow
@pytest.mark.usefixtures("serial")
def test_killed_at_any_time(corpus):
    def texts_of(number: int) -> None:
        for copy in range(40):
            write(corpus / f"{number % 2}{copy}.txt", "".join(DOCUMENTS) + f"{number} {copy}\n")

    texts_of(0)
    cache = prepared(corpus, "words")
    draw, old = random.Random(0), contents(cache.open()[0])
    begun = time.monotonic()
    append(corpus)
    prepared(corpus, "words")
    needed = time.monotonic() - begun
    for number in range(12):
        old = contents(cache.open()[0])
        texts_of(number)
        process = fork(lambda: make(corpus, "words").prepare(progress=False))
        time.sleep(draw.uniform(0, 1.2 * needed))
        os.kill(process, signal.SIGKILL)
        status(process)
        between = contents(cache.open()[0])
        new = contents(prepared(corpus, "words").open()[0])
        assert between in (old, new)
        fresh = make(corpus, "words")
        fresh.folder = fresh.folder.with_name(f"fresh{number}")
        fresh.prepare(progress=False)
        assert contents(fresh.open()[0]) == new


@pytest.mark.usefixtures("serial")
def test_processes_at_once_make_them_once(corpus, tmp_path, monkeypatch):
    log, make_tokens = tmp_path / "log", TokenCache._make

    def slow(self, *args):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        return make_tokens(self, *args)

    monkeypatch.setattr(TokenCache, "_make", slow)
    reading, writing = os.pipe()

    def work(number: int) -> Callable[[], object]:
        def run() -> None:
            os.read(reading, 1)  # all begin together
            cache = prepared(corpus, "words")
            (tmp_path / f"opened{number}").write_text(json.dumps(contents(cache.open()[0])))

        return run

    processes = [fork(work(number)) for number in range(3)]
    os.write(writing, b"123")
    assert [status(process) for process in processes] == [0, 0, 0]
    os.close(reading)
    os.close(writing)
    assert log.read_text() == "made\n"
    expected = contents(prepared(corpus, "words").open()[0])
    assert [json.loads((tmp_path / f"opened{number}").read_text()) for number in range(3)] == [expected] * 3


def test_waiting_is_told(corpus, caplog):
    prepared(corpus)
    reading, writing = os.pipe()

    def hold() -> None:
        with make(corpus)._locked():
            os.write(writing, b"1")
            time.sleep(0.8)

    process = fork(hold)
    os.read(reading, 1)
    with caplog.at_level("INFO"):
        begun = time.monotonic()
        make(corpus).open()
    assert time.monotonic() - begun > 0.5
    assert status(process) == 0
    assert any("Waiting for another process that works on the tokens" in record.message for record in caplog.records)


def test_a_folder_that_cannot_be_written_in(corpus, monkeypatch):
    """The tokens that are there can be used; others cannot be made."""
    cache = prepared(corpus)
    before, known = files(cache), manifest(cache)
    os.utime(next(corpus.iterdir()))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_token_cache.FileLock, "acquire", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    cache.prepare(progress=False)
    assert (files(cache), manifest(cache)) == (before, known)
    assert {part: len(found) for part, found in texts(cache).items()} == {"train": 28, "val": 8, "test": 4}
    message = (
        r"^Expected `cache_dir` to be a folder that can be written in, got .*cache: \[Errno 13\] Permission denied\.$"
    )
    with pytest.raises(ConfigurationError, match=message):
        make(corpus, seed=1).prepare(progress=False)
    replace_one_byte(corpus)
    with pytest.raises(ConfigurationError, match=r"got .*cache: the tokens there are of another text"):
        cache.prepare(progress=False)
