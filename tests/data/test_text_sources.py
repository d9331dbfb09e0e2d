import io
import json
import os
import random
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet
import pytest
import text_data
import zstandard
from text_data import COMPRESS, documents, jsonl, parquet, write, write_hub

from lightning_ire import ConfigurationError
from lightning_ire.data import _text_files
from lightning_ire.data._text_files import FileSource
from lightning_ire.data._text_hub import HUB, HubDataset, HubSource
from lightning_ire.data._text_sources import StandardLibrary
from lightning_ire.data.text import make_source


def source(*patterns: Path | str, text_column: str = "text", **parts: list[str]) -> FileSource:
    return FileSource({"train": [str(pattern) for pattern in patterns], **parts}, text_column)


def read(*patterns: Path | str, **settings) -> list[str]:
    return documents(source(*patterns, **settings).pieces("train"))


def fault(*patterns: Path | str, **settings) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(*patterns, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blocks(monkeypatch, size: int) -> None:
    monkeypatch.setattr(_text_files, "_BLOCK", size)


# The standard library.


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path / "lib")}[name])
    return tmp_path / "lib"


def test_standard_library(library):
    write(library / "zz.py", "last = 1\r\n")
    write(library / "package" / "__init__.py", "")
    write(library / "package" / "a.py", "grüße = 2\n")
    write(library / "aa.py", "\ufefffirst = 0")
    write(library / ".hidden.py", "no = 1\n")
    write(library / "encoding.py", "latin = 'é'".encode("latin-1"))
    for other in ("package/data.txt", "site-packages/x.py", "dist-packages/x.py", "package/__pycache__/x.py"):
        write(library / other, "no = 1\n")
    stdlib = StandardLibrary()
    pieces = list(stdlib.pieces("train"))
    assert documents(pieces) == ["first = 0", "grüße = 2\n", "last = 1\r\n"]
    assert sum(piece.progress for piece in pieces) == stdlib.size("train")
    assert stdlib.parts == ("train",)
    (library / "zz.py").rename(library / "0.py")
    assert documents(StandardLibrary().pieces("train"))[0] == "last = 1\r\n"


def test_standard_library_is_missing(library):
    library.mkdir()
    with pytest.raises(
        ConfigurationError, match=r"^Expected the standard library.* in .*lib, got no \.py file: set `s"
    ):
        StandardLibrary().files()


def test_the_real_standard_library():
    stdlib = StandardLibrary()
    files = stdlib.files()["train"]
    assert Path(os.__file__) in files
    assert len(files) > 200
    assert not any("site-packages" in path.parts for path in files)
    first = next(iter(stdlib.pieces("train")))
    assert first.text == files[0].read_text("utf-8") or not files[0].stat().st_size


# Files of text.


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo\n",
        "no newline at the end",
        "windows\r\nlines\r\n",
        "with \ufeff inside\n",
        "\n",
        "\x00",
        text_data.NASTY,
    ],
)
def test_a_text_is_one_document(tmp_path, text):
    path = write(tmp_path / "a.txt", text)
    pieces = list(source(path).pieces("train"))
    assert [(piece.text, piece.first) for piece in pieces] == [(text, True)]
    assert sum(piece.progress for piece in pieces) == source(path).size("train") == len(text.encode())


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, suffix):
    blocks(monkeypatch, 16)
    text = "".join(f"line {number}\n" for number in range(50)) + "\ufeffis a character here\n"
    path = write(tmp_path / f"a.txt{suffix}", ("\ufeff" + text).encode())
    assert read(path) == [text]
    assert sum(piece.progress for piece in source(path).pieces("train")) == path.stat().st_size
    assert read(write(tmp_path / f"b.txt{suffix}", "\ufeff")) == []
    assert read(write(tmp_path / f"c.txt{suffix}", "\ufeff\ufefftwice")) == ["\ufefftwice"]
    lines = write(tmp_path / f"a.jsonl{suffix}", "\ufeff" + jsonl(["\ufeffone", "\ufeff", "two\ufeff"]))
    assert read(lines) == ["one", "two\ufeff"]
    table = write(tmp_path / f"a.parquet{suffix}", parquet(["\ufeffone", "\ufeff", "two\ufeff"]))
    assert read(table) == ["one", "two\ufeff"]


def test_an_empty_file_is_no_document(tmp_path):
    paths = [write(tmp_path / f"{name}.txt", text) for name, text in (("a", "A"), ("b", ""), ("c", "C"))]
    assert read(*paths) == ["A", "C"]
    assert read(paths[1]) == []


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_not_unicode(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", b"caf\xe9 noir\n")
    assert fault(path).startswith(f"Expected UTF-8 text in {path}, got byte 0xe9 (invalid continuation byte): convert")
    path = write(tmp_path / f"b.txt{suffix}", "é".encode()[:1])
    assert f"in {path}, got byte 0xc3 (unexpected end of data)" in fault(path)


@pytest.mark.parametrize("size", [16, 17, 64])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_long_texts_are_cut_at_ends_of_lines(tmp_path, monkeypatch, size, newline):
    draw = random.Random(size)
    text = "".join(
        draw.choice(["é", "日本", "\U0001f680", "ab", "word"]) * draw.randint(1, 4) + newline for _ in range(400)
    )
    path = write(tmp_path / "a.txt", text)
    blocks(monkeypatch, size)
    pieces = list(source(path).pieces("train"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(piece.text.endswith(newline) for piece in pieces)
    assert len(pieces) > len(text) / (4 * size)
    assert max(len(piece.text) for piece in pieces) < 4 * size
    assert sum(piece.progress for piece in pieces) == source(path).size("train")


def test_no_cut_next_to_white_space(tmp_path, monkeypatch):
    text = "".join(f"a = {number}\nb = 2\n\n\ndef f{number}():\n    pass\n\n\n" for number in range(100))
    blocks(monkeypatch, 32)
    pieces = [piece.text for piece in source(write(tmp_path / "a.py", text)).pieces("train")]
    assert "".join(pieces) == text
    assert all(before.endswith("\n") and before[-2].isdigit() for before in pieces[:-1])
    assert all(after.startswith("b = 2") for after in pieces[1:])


@pytest.mark.parametrize("text", ["x", "日", "\n", " \n", "\r\n", "\n\nx"])
def test_a_text_without_lines_to_cut_after(tmp_path, monkeypatch, text):
    text *= 330
    blocks(monkeypatch, 10)
    pieces = list(source(write(tmp_path / "a.txt", text)).pieces("train"))
    assert "".join(piece.text for piece in pieces) == text
    assert {len(piece.text) for piece in pieces[:-1]} == {40}
    assert documents(pieces) == [text]


def test_each_file_is_a_document_when_cut(tmp_path, monkeypatch):
    blocks(monkeypatch, 8)
    texts = ["".join(f"{name}{line}\n" for line in range(40)) for name in "abc"]
    for number, text in enumerate(texts):
        write(tmp_path / f"{number}.txt", text)
    assert read(tmp_path / "*.txt") == texts


def test_reading_may_stop_anywhere(tmp_path, monkeypatch, recwarn):
    blocks(monkeypatch, 8)
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        pieces = source(write(tmp_path / name, "line\n" * 100)).pieces("train")
        next(pieces)
        pieces.close()
    assert not recwarn.list


# Rows.


def test_lines_of_json(tmp_path):
    texts = ["one", text_data.NASTY, "", None, "\u2028 is no end of a line", "last"]
    content = jsonl(texts, "body").replace("\n", "\r\n\n  \n", 2).rstrip("\n")
    path = write(tmp_path / "a.jsonl", "\ufeff" + content)
    pieces = list(source(path, text_column="body").pieces("train"))
    assert documents(pieces) == [text for text in texts if text]
    assert all(piece.first for piece in pieces)
    assert sum(piece.progress for piece in pieces) == source(path).size("train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "Expected JSON in line 3 of {path}, got: Invalid control character"),
        pytest.param("[" * 100000, "Expected JSON in line 3 of {path}, got: maximum recursion", id="deep"),
        (b'{"text": "\xff"}', "Expected JSON in line 3 of {path}, got: 'utf-8' codec can't decode byte 0xff"),
        ('{"other": "a", "id": 1}', "column of line 3 of {path} (it has: 'other', 'id'), got 'text'."),
        ('["text"]', "Expected `text_column` to be a column of line 3 of {path} (it has: none), got 'text'."),
        ('"text"', "Expected `text_column` to be a column of line 3 of {path} (it has: none), got 'text'."),
        ('{"text": ["a"]}', "Expected text under 'text' in line 3 of {path}, got list."),
        ('{"text": 0}', "Expected text under 'text' in line 3 of {path}, got int."),
        (r'{"text": "\ud83d"}', "Expected Unicode text in line 3 of {path}, got half of a surrogate pair."),
    ],
)
def test_a_broken_line(tmp_path, line, message):
    content = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + content + b"\n")
    assert message.format(path=path) in fault(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        '{"text": "cut"',
        '{"text": "cut",',
        '{"text":',
        "{text}",
        "cut",
        b'{"text": "\xff"}',
        "[]]",
        "{",
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_broken_first_line(tmp_path, line, rows):
    content = line if isinstance(line, bytes) else line.encode()
    row = b'{"text": "good"}\n'
    path = write(tmp_path / "a.jsonl", content + b"\n" + row * rows)
    if line != '{"text":' or rows > 1:  # else it is one object
        assert f"Expected JSON in line 1 of {path}, got: " in fault(path)
    path = write(tmp_path / "b.jsonl", b"\n" + content + b"\n" + row * 3)
    assert f"Expected JSON in line 2 of {path}, got: " in fault(path)


@pytest.mark.parametrize(
    "content",
    [
        '[\n{"text": "a"}\n]',
        '[\n{"text": "a"}\n,\n{"text": "b"}\n]',
        '[{"text": "a"}\n,\n{"text": "b"}]',
        '{"x":\n{"text": "a"}\n,"y":\n{"text": "b"}}',
        '{"text":\n"a"\n}',
        '{\n"text"\n:\n"a"}',
        '[{"text": "a", "n": [1,\n2]},\n{"text": "b"}]',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_one_document_in_any_lines(tmp_path, content, encoding):
    assert read(write(tmp_path / "a.json", content.encode(encoding))) == ["a", "b"][: content.count('"text"')]


@pytest.mark.parametrize(
    "name",
    [
        "c4-train.00000-of-01024.json.gz", "a.json", "A.JSON", "a.NDJSON.GZ", "a.jsonlines.zst", "a.jsonl.bz2",
        "a.ldjson", "a.json-00000-of-00010", "a.json.1.xz", "a.jsonl_3", "part-00000", "part-00000.gz", "a.jl",
        "lines.log.zst",
    ],
)  # fmt: skip
@pytest.mark.parametrize("texts", [["one", "two é", text_data.NASTY], ["only one"]])
def test_names_of_lines_of_json(tmp_path, name, texts):
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)(jsonl(texts).encode()))
    pieces = list(source(path).pieces("train"))
    assert documents(pieces) == texts
    assert sum(piece.progress for piece in pieces) == path.stat().st_size
    assert source(path).reading(path).startswith("JSON")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", jsonl(["one", "two"])),
        ("a.json.txt", jsonl(["one", "two"])),
        ("a.json.2.TXT", jsonl(["one", "two"])),
        ("a.md", '{"text": "an example"}\nis a record\n'),
        ("a.md", '\n{"text": "cut\n{"text": "one"}\n'),
        ("a", jsonl(["one", "two"], "body")),
        ("a.log", '{"text": ["one"]}\n'),
        ("a.py", '["text"]\n'),
        ("json", "one\n"),
        (".json", "one\n"),
    ],
)
def test_plain_text_is_no_json(tmp_path, name, text, suffix):
    assert read(write(tmp_path / f"{name}{suffix}", text)) == [text]


RECORDS = [{"text": text, "id": number} for number, text in enumerate(["one", "", "two\n"])]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n\n"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.zst"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (RECORDS, ["one", "two\n"]),
        ({str(number): record for number, record in enumerate(RECORDS)}, ["one", "two\n"]),
        (RECORDS[0], ["one"]),
        ([], []),
    ],
)
def test_one_array_or_object_of_json(tmp_path, value, expected, indent, mark, name):
    path = write(tmp_path / name, mark + json.dumps(value, indent=indent))
    pieces = list(source(path).pieces("train"))
    assert documents(pieces) == expected
    assert sum(piece.progress for piece in pieces) == (path.stat().st_size if expected else 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": RECORDS}, "column of record 1 of {path} (it has: 'data'), got 'text'."),
        ({"text": {"0": "one"}}, "column of record 1 of {path} (it has: '0'), got 'text'."),
        ({"text": ["one", "two"]}, "Expected text under 'text' in record 1 of {path}, got list."),
        ([*RECORDS, {"body": "three"}], "column of record 4 of {path} (it has: 'body'), got 'text'."),
        ([["one"]], "column of record 1 of {path} (it has: none), got 'text'."),
        (dict.fromkeys(map(str, range(99)), 0), "(it has: '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', ...), got"),
        ("[1, 2", "Expected JSON lines, or one array or object of records, in {path}, got: Expecting ',' delimiter"),
        ('{\n"text": "a"\n"id": 1\n}', "or one array or object of records, in {path}, got: Expecting ',' delimiter"),
    ],
)
def test_other_json_is_refused(tmp_path, value, message):
    path = write(tmp_path / "a.json", value if isinstance(value, str) else json.dumps(value))
    assert message.format(path=path) in fault(path)


def test_surrogate_pairs_are_one_character(tmp_path):
    assert read(write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude80"}')) == ["\U0001f680"]


def test_parquet(tmp_path):
    texts = [f"row {number} é" for number in range(10)]
    texts[3:5] = [None, ""]
    path = write(tmp_path / "a.parquet", parquet(texts, "body", per_group=3))
    pieces = list(source(path, text_column="body").pieces("train"))
    assert documents(pieces) == [text for text in texts if text]
    assert sum(piece.progress for piece in pieces) == source(path).size("train")
    assert all(piece.progress >= 0 for piece in pieces)


def test_parquet_of_many_rows(tmp_path):
    texts = [str(number) for number in range(2500)]
    assert read(write(tmp_path / "a.parquet", parquet(texts, per_group=1000))) == texts
    assert read(write(tmp_path / "b.parquet", parquet(["dots"], "a.b")), text_column="a.b") == ["dots"]
    with pytest.raises(StopIteration):
        next(source(write(tmp_path / "c.parquet", parquet([]))).pieces("train"))


def test_parquet_without_the_column(tmp_path):
    path = write(tmp_path / "a.parquet", parquet(["a"], "body"))
    assert fault(path) == (f"Expected `text_column` to be a column of {path} (it has: 'id', 'body'), got 'text'.")


@pytest.mark.parametrize(("values", "kind"), [([1, 2], "int"), ([[], ["a"]], "list"), ([b"a"], "bytes")])
def test_parquet_with_another_type(tmp_path, values, kind):
    path = write(tmp_path / "a.parquet", parquet(values))
    assert fault(path) == f"Expected text under 'text' in row 1 of {path}, got {kind}."


def test_a_broken_parquet_file(tmp_path):
    whole = parquet([f"row {number}" for number in range(100)], per_group=50)
    page = pyarrow.parquet.ParquetFile(io.BytesIO(whole)).metadata.row_group(1).column(1).dictionary_page_offset
    page_of_nothing = whole[:page] + bytes(20) + whole[page + 20 :]
    for content in (b"", b"text", whole[:-10], whole[: len(whole) // 2], page_of_nothing):
        path = write(tmp_path / "a.parquet", content)
        assert fault(path).startswith(f"Expected a parquet file, got {path}: ")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", parquet(["a"]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert fault(path).endswith("got an import error: pip install 'lightning-ire[text]'.")


# Compressed files.


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet", ".TXT", ""])
def test_compressed(tmp_path, suffix, kind):
    texts = ["one\n", "two é\n"] if kind in (".jsonl", ".parquet") else ["one\ntwo é\n"]
    content = {".jsonl": jsonl(texts), ".parquet": parquet(texts)}.get(kind, texts[0])
    path = write(tmp_path / f"a.b{kind}{suffix}", content)
    pieces = list(source(path).pieces("train"))
    assert documents(pieces) == texts
    assert sum(piece.progress for piece in pieces) == source(path).size("train") == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_long_compressed_texts(tmp_path, monkeypatch, suffix):
    text = "".join(f"line {number} 日本語\n" for number in range(20000))
    path = write(tmp_path / f"a.txt{suffix}", text)
    blocks(monkeypatch, 1 << 12)
    pieces = list(source(path).pieces("train"))
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.progress for piece in pieces) == path.stat().st_size
    halves = text[:1000].encode(), text[1000:].encode()
    path.write_bytes(b"".join(COMPRESS[suffix](half) for half in halves))  # as `cat` makes it
    assert read(path) == [text]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kept", [-1, -9, 0.5])
def test_a_compressed_file_that_is_cut_short(tmp_path, suffix, kind, kept):
    texts = [f"{random.Random(number).random()}\n" for number in range(800)]
    content = {".txt": "".join(texts), ".jsonl": jsonl(texts), ".parquet": parquet(texts, per_group=300)}[kind]
    path = write(tmp_path / f"a{kind}{suffix}", content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if kept > 0 else kept])
    message = fault(path)
    assert message.startswith(f"Expected a whole {suffix} file, got ")
    assert message.endswith(f" in {path}.")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_of_something_else(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_text("plain text, named wrongly\n")
    assert fault(path).startswith(f"Expected a whole {suffix} file, got ")


def test_zst_of_long_windows(tmp_path):
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packer.compress(b"reddit\n") + packer.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 28
    assert read(path) == ["reddit\n"]


def test_zip_is_refused(tmp_path):
    path = write(tmp_path / "a.txt.zip", b"PK")
    assert fault(path) == f"Expected .gz, .bz2, .xz or .zst for a compressed file, got {path}."


def test_zst_without_its_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.zst", "a")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert fault(path) == f"Expected the package zstandard to read {path}, got an import error: pip install zstandard."
    assert read(write(tmp_path / "a.txt.gz", "a")) == ["a"]  # the others do not need it


# Patterns.


def test_patterns(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.md", "x[1].txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert read("*.txt") == ["a.txt", "b.txt", "x[1].txt"]
    assert read("**/*.txt") == ["a.txt", "b.txt", "sub/deep/c.txt", "x[1].txt"]
    assert read("b.txt", "a.txt") == ["b.txt", "a.txt"]  # the order that was given
    assert read("b.txt", "*.txt", tmp_path / "sub" / ".." / "a.txt") == ["b.txt", "a.txt", "x[1].txt"]
    assert read("x[1].txt") == ["x[1].txt"]  # a name before a pattern
    assert read("[ab].txt") == ["a.txt", "b.txt"]
    assert read("sub/**") == ["sub/d.md", "sub/deep/c.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert read("~/a.txt") == ["a.txt"]
    assert source("~/a.txt").files() == {"train": [tmp_path / "a.txt"]}


def test_links_in_circles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    Path("elsewhere").mkdir()
    for name in ("a/1.txt", "a/b/2.txt", "elsewhere/3.txt"):
        Path(name).write_text(name)
    Path("a/b/up").symlink_to("..")
    Path("a/more").symlink_to("../elsewhere")
    found = source("a/**/*.txt")
    assert [path.name for path in found.files()["train"]] == ["1.txt", "2.txt", "3.txt"]
    assert not found.left_out()
    assert source("a/b/up/*.txt").files()["train"] == [tmp_path / "a/b/up/1.txt"]  # named


def test_hidden_files_are_left_out(tmp_path, monkeypatch):
    kept = ["a.txt", "sub/b.txt"]
    hidden = [".a.txt", "sub/._b.txt", ".ipynb_checkpoints/c.txt"]
    system = ["__MACOSX/d.txt", "sub/__MACOSX/e.txt", "Thumbs.db", "sub/desktop.ini"]
    for name in (*kept, *hidden, *system):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    for pattern in ("**", "**/*", str(tmp_path / "**")):
        assert read(pattern) == kept
        assert source(pattern).left_out() == {"hidden": 7 if sys.version_info >= (3, 11) else 4}
    assert read("**/*.txt") == kept
    assert source("a.txt", "sub/*.txt", val=["Thumbs.db"]).left_out() == (
        {"hidden": 1} if sys.version_info >= (3, 11) else {}
    )
    assert read(".a.txt", "Thumbs.db") == [".a.txt", "Thumbs.db"]  # asked for by name
    assert read("__MACOSX/*", ".ipynb*/*") == ["__MACOSX/d.txt", ".ipynb_checkpoints/c.txt"]
    assert fault("*.db") == "Expected `files` to match files, got '*.db'."


def test_patterns_that_match_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fault(tmp_path / "*.txt") == f"Expected `files` to match files, got '{tmp_path}/*.txt'."
    folder = tmp_path / "empty"
    assert fault(folder) == (
        f"Expected `files` to match files, got '{folder}': for all files in this folder give '{folder}/**/*.txt'."
    )
    path = str(write(tmp_path / "a.txt", "a"))
    with pytest.raises(ConfigurationError, match=r"^Expected `val_files` to match files, got 'nowhere'\.$"):
        source(path, val=["nowhere"])
    with pytest.raises(ConfigurationError, match=r"^Expected `test_files` to match files, got 'nowhere'\.$"):
        source(path, val=[], test=["nowhere"])
    with pytest.raises(ConfigurationError, match=r"^Expected `files` to name at least one file, got none\.$"):
        make_source("files", {"train": [], "val": [path], "test": []}, "text")


def test_parts(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.txt", name)
    parts = source(tmp_path / "a.txt", val=[str(tmp_path / "b.txt")], test=[str(tmp_path / "c.txt")])
    assert parts.parts == ("train", "val", "test")
    assert [documents(parts.pieces(part)) for part in parts.parts] == [["a"], ["b"], ["c"]]
    assert source(tmp_path / "a.txt", val=[]).parts == ("train",)
    with pytest.raises(ConfigurationError, match=r"^Expected `val_files` to have no file of `files`, got .*b\.txt\.$"):
        source(tmp_path / "*.txt", val=[str(tmp_path / "b.txt")])


def test_settings_are_absolute(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    assert source("a.txt").settings() == source(tmp_path / "a.txt").settings()
    assert source("a.txt").settings() != source("*.txt").settings()
    assert source("a.txt").settings() != source("a.txt", text_column="body").settings()


def test_names_of_sources():
    nothing = {"train": [], "val": [], "test": []}
    assert isinstance(make_source("stdlib", nothing, "text"), StandardLibrary)
    for name in HUB:
        assert make_source(name, nothing, "text").name == name
    assert make_source("hub:me/mine", nothing, "text").settings()["path"] == "me/mine"
    assert vars(make_source("hub:me/mine:small", nothing, "text").dataset) == {
        "path": "me/mine", "config": "small", "revision": None, "lines": False,
    }  # fmt: skip
    assert make_source("hub:me/mine:small", nothing, "text").name == "me-mine-small"
    with pytest.raises(ConfigurationError, match=r"^Expected `source` to be 'stdlib', 'files', 'wikitext-2', .*'wiki'"):
        make_source("wiki", nothing, "text")
    with pytest.raises(
        ConfigurationError, match=r"^Expected `source` to be 'files' where files are given, got 'stdlib'\.$"
    ):
        make_source("stdlib", {**nothing, "val": ["a.txt"]}, "text")


# The hub: `datasets` reads a folder as it reads a repository.

MARKED = ["\ufeffone", "\ufeff", "two \ufeff"]

LINES = {
    "train": ["", " = Title = \n", "", " one <unk> line \n", None, " another \n"],
    "validation": [" held out \n", ""],
    "test": ["", " for the test \n"],
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of `datasets` without a network, and a data set of two configurations."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()
    return write_hub(tmp_path / "mine", {"lines": LINES, "other": {"train": ["a", "b"], "test": MARKED}})


def test_hub_rows_are_documents(hub):
    rows = HubSource(f"hub:{hub}:lines", "text")
    assert rows.parts == ("train", "val", "test")
    assert [documents(rows.pieces(part)) for part in rows.parts] == [
        [text for text in LINES[split] if text] for split in ("train", "validation", "test")
    ]
    assert [rows.size(part) for part in rows.parts] == [6, 2, 2]
    assert sum(piece.progress for piece in rows.pieces("train")) == 6
    assert documents(HubSource(f"hub:{hub}:other", "text").pieces("train")) == ["a", "b"]
    assert documents(HubSource(f"hub:{hub}:other", "text").pieces("test")) == ["one", "two \ufeff"]
    assert HubSource(f"hub:{hub}:other", "text").parts == ("train", "test")


def test_hub_rows_are_lines_of_one_text(hub, monkeypatch):
    monkeypatch.setitem(HUB, "wikitext-2", HubDataset(str(hub), "lines", lines=True))
    text = make_source("wikitext-2", {}, "text")
    assert documents(text.pieces("train")) == ["\n = Title = \n\n one <unk> line \n\n another \n"]
    assert documents(text.pieces("val")) == [" held out \n\n"]
    assert documents(text.pieces("test")) == ["\n for the test \n"]
    monkeypatch.setitem(HUB, "wikitext-2", HubDataset(str(hub), "other", lines=True))
    assert documents(make_source("wikitext-2", {}, "text").pieces("test")) == ["one\n\ufeff\ntwo \ufeff\n"]
    assert text.settings() == {
        "source": "hub", "path": str(hub), "config": "lines", "revision": None, "lines": True, "text_column": "text",
    }  # fmt: skip


def test_hub_columns(hub, tmp_path):
    message = rf"^Expected `text_column` to be a column of {hub} \(it has: 'id', 'text'\), got 'body'\.$"
    with pytest.raises(ConfigurationError, match=message):
        next(HubSource(f"hub:{hub}:lines", "body").pieces("train"))
    with pytest.raises(ConfigurationError, match=message):
        HubSource(f"hub:{hub}:lines", "body").size("train")
    message = rf"^Expected `text_column` to be a column of text in {hub}, got int in 'id'\.$"
    with pytest.raises(ConfigurationError, match=message):
        next(HubSource(f"hub:{hub}:lines", "id").pieces("train"))


@pytest.mark.parametrize("name", ["hub:nobody/nothing", "hub:{hub}:nowhere", "hub:{hub}", "hub:", "wikitext-2"])
def test_hub_without_the_data_set(hub, name):
    name = name.format(hub=hub)
    with pytest.raises(ConfigurationError) as caught:
        _ = HubSource(name, "text").parts
    path = HUB[name].path if name in HUB else name.removeprefix("hub:").partition(":")[0]
    message = str(caught.value)
    assert message.startswith(f"Expected the data set {path!r} from the hub or its cache, got ")
    assert message.endswith(" Without a network set `source` to 'stdlib' or 'files'.")
    assert "\n" not in message


def test_hub_with_an_error_of_several_lines(monkeypatch):
    def fail(*args, **settings):
        raise OSError("one.\ntwo.\n")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ConfigurationError, match=r"its cache, got OSError: one\. two\. Without a network set `source`"):
        _ = HubSource("hub:a/b", "text").parts


def test_hub_without_a_training_split(hub, tmp_path):
    path = write_hub(tmp_path / "half", {"default": {"test": ["a"]}})
    with pytest.raises(
        ConfigurationError, match=r"^Expected the data set .* to have a split 'train', got \['test'\]\.$"
    ):
        _ = HubSource(f"hub:{path}", "text").parts


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"^Expected the package datasets .* 'lightning-ire\[text\]'\.$"):
        _ = HubSource("wikitext-2", "text").parts


def test_data_sets_of_the_paper():
    assert vars(HUB["wikitext-2"]) == {
        "path": "Salesforce/wikitext", "config": "wikitext-2-v1", "revision": None, "lines": True,
    }  # fmt: skip
    assert (HUB["wikitext-103"].config, HUB["wikitext-103"].lines) == ("wikitext-103-raw-v1", True)
    assert not HUB["minipile"].lines
    assert not HUB["openwebtext"].lines
