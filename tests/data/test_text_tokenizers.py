import json
import sys
from pathlib import Path

import numpy as np
import pytest
import text_data
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lightning_ire import ConfigurationError
from lightning_ire.data._text_tokenizers import GPT2, Bytes, LibraryTokenizer, TokenizerPlan, load_tokenizer

TEXTS = text_data.prose(30)


def make(name: str, size: int | None = None, texts: list[str] = TEXTS) -> LibraryTokenizer:
    return TokenizerPlan(name, size).make(lambda: iter(texts), progress=False)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0].tolist()


@pytest.fixture(scope="module")
def bpe():
    return make("bpe", 400)


def gpt2_like(alphabet: bool = True) -> tokenizers.Tokenizer:
    """A small tokenizer with the parts of GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    gpt2_like().save(str(path))
    return path


# All that give back the text.


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
def test_round_trip(name, bpe, file):
    tokenizer = {"bytes": Bytes(), "bpe": bpe, "file": make(str(file))}[name]
    texts = [text_data.NASTY, "\x00", "\r\n", "<|endoftext|>", "", "\U0001f680" * 50, " lead", "trail ", *TEXTS[:3]]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(tokens.tolist()) for tokens in encoded] == texts
    assert all(tokens.size == 0 or tokens.max() < tokenizer.vocab_size for tokens in encoded)
    assert all(tokenizer.end_of_document not in tokens for tokens in encoded)
    assert all(tokenizer.is_lossless(text) for text in texts)
    again = load_tokenizer(tokenizer.to_json())
    assert [tokens.tolist() for tokens in again.encode(texts)] == [tokens.tolist() for tokens in encoded]
    assert (again.vocab_size, again.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    assert tokenizer.decode([*encoded[0].tolist(), tokenizer.end_of_document, *encoded[2].tolist()]) == (
        text_data.NASTY + "<|endoftext|>" + "\r\n"
    )


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_round_trip_of_any_text(text):
    for tokenizer in (Bytes(), _BPE):
        assert tokenizer.decode(tokenizer.encode([text])[0].tolist()) == text
    assert Bytes().encode([text])[0].tolist() == list(text.encode())


_BPE = make("bpe", 300)


def test_bytes():
    tokenizer = Bytes()
    assert ids(tokenizer, "aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.to_json()) == (257, 256, None)
    assert tokenizer.decode([97, 256, 256, 98]) == "a<|endoftext|><|endoftext|>b"
    assert tokenizer.decode([0xC3, 256, 0xA9, 97]) == "\ufffd<|endoftext|>\ufffda"
    assert tokenizer.decode(np.array([97, 0xC3, 0xA9], dtype=np.uint16)) == "aé"
    assert tokenizer.decode([]) == ""


# Words.


def test_words():
    tokenizer = make("words", texts=[" b a\n", "c  a\tb a\n\n", "<unk> <eos> <unk>"])
    assert tokenizer.tokenizer.get_vocab() == {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}  # by frequency
    assert tokenizer.vocab_size == 5
    assert tokenizer.end_of_document == 1
    assert ids(tokenizer, "a new\nb\r\n\n c") == [2, 0, 1, 3, 1, 1, 4]
    assert ids(tokenizer, "<unk> <eos> a<eos> <unk>") == [0, 1, 0, 0]
    assert tokenizer.decode([2, 3, 1, 1, 4, 0, 1]) == "a b\n\nc <unk>\n"
    assert tokenizer.is_lossless("a b\n\nc\n")
    assert not tokenizer.is_lossless(" a b\n")
    assert not tokenizer.is_lossless("a new\n")
    again = load_tokenizer(tokenizer.to_json())
    assert ids(again, "<unk> a\n new") == [0, 2, 1, 0]
    assert again.decode([2, 1, 3]) == "a\nb"
    assert again.end_of_document == 1


def test_fewer_words():
    texts = ["z z z y y x x w\n"]
    assert list(make("words", 4, texts).tokenizer.get_vocab()) != []
    assert make("words", 4, texts).tokenizer.get_vocab() == {"<unk>": 0, "<eos>": 1, "z": 2, "x": 3}  # a tie: x < y
    assert make("words", 3, texts).tokenizer.get_vocab() == {"<unk>": 0, "<eos>": 1, "z": 2}
    assert make("words", 99, texts).vocab_size == 6
    assert make("words", None, ["\n"]).vocab_size == 2


@pytest.mark.parametrize("word", ["<|endoftext|>", "</s>", "[SEP]"])
def test_a_word_is_no_end_of_a_document(word):
    assert make("words", texts=[f"strike {word} through\n"]).end_of_document == 1


def test_words_of_the_text_are_known():
    text = text_data.NASTY + "a\x1cb\x1dc\x1ed\x1fe\x85f\xa0g\u2009h\u3000i\x0bj\x0ck\u200bl\u180em"
    for texts in ([text], [f"a{chr(code)}b" for code in range(0x3100)]):
        tokenizer = make("words", texts=texts)
        for one in texts:
            unknown = [word for word in one.replace("<unk>", "").split(" ") if 0 in ids(tokenizer, word)]
            assert not unknown


# Byte-pair encodings.


def test_bpe(bpe):
    assert bpe.vocab_size == 400
    assert bpe.tokenizer.get_vocab()["<|endoftext|>"] == bpe.end_of_document
    assert len(ids(bpe, TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert make("bpe", 257).vocab_size == 257
    assert make("bpe", 257, ["a"]).vocab_size == 257
    assert make("bpe", 10000, ["few words, few words"]).vocab_size < 300


def test_bpe_is_learnt_from_these_texts():
    assert len(ids(make("bpe", 400, ["zyzzyva " * 20]), " zyzzyva")) == 1
    assert len(ids(make("bpe", 400), " zyzzyva")) > 3


def test_bpe_is_learnt_the_same_twice(bpe):
    assert make("bpe", 400).to_json() == bpe.to_json()


def test_an_error_of_the_text_stops_learning():
    def texts():
        yield "some text"
        raise ConfigurationError("Expected JSON in line 3.")

    for name in ("bpe", "words"):
        with pytest.raises(ConfigurationError, match=r"^Expected JSON in line 3\.$"):
            TokenizerPlan(name, 300).make(texts, progress=False)


# Files.


def test_a_file_is_used_as_it_is(file):
    plain = tokenizers.Tokenizer.from_file(str(file))
    tokenizer = make(str(file))
    assert ids(tokenizer, TEXTS[0]) == plain.encode(TEXTS[0]).ids
    assert tokenizer.vocab_size == plain.get_vocab_size()
    assert tokenizer.end_of_document == plain.token_to_id("<|endoftext|>")
    assert plain.encode("<|endoftext|>").ids == [tokenizer.end_of_document]  # what is switched off for texts


def test_settings_of_a_file_that_would_change_tokens(file, tmp_path):
    tokenizer = gpt2_like()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=2000)
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    path = tmp_path / "odd.json"
    tokenizer.save(str(path))
    assert len(tokenizer.encode(TEXTS[0]).ids) == 2000
    for odd in (make(str(path)), load_tokenizer(make(str(path)).to_json())):
        assert odd.encode(TEXTS[:2])[0].tolist() == ids(make(str(file)), TEXTS[0])
        assert odd.is_lossless(TEXTS[0])


def test_numbers_with_gaps(tmp_path):
    path = tmp_path / "gaps.json"
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 7, "b": 70000}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    tokenizer = make(str(path))
    assert tokenizer.vocab_size == 70001
    assert ids(tokenizer, "a b c") == [7, 70000, 0]
    assert tokenizer.end_of_document is None


def test_the_end_of_a_document_in_a_file(tmp_path):
    for vocabulary, special, expected in (
        ({"[UNK]": 0, "</s>": 1, "<|endoftext|>": 2}, [], 2),
        ({"[UNK]": 0, "</s>": 1, "[SEP]": 2}, [], 1),
        ({"[UNK]": 0, "</s>": 1, "[SEP]": 2}, ["[SEP]"], 2),  # "</s>" may be a tag of HTML
        ({"[UNK]": 0, "<|end_of_text|>": 1}, [], 1),
    ):
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.add_special_tokens(special)
        path = tmp_path / "a.json"
        tokenizer.save(str(path))
        assert make(str(path)).end_of_document == expected


def test_a_lossy_file_is_known_as_such(tmp_path):
    tokenizer = gpt2_like()
    tokenizer.normalizer = normalizers.Lowercase()
    path = tmp_path / "lower.json"
    tokenizer.save(str(path))
    assert not make(str(path)).is_lossless("Upper")
    assert make(str(path)).is_lossless("lower")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}', "no json", '{"vocab": {"a": 1}}'])
def test_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        make(str(path))
    assert str(caught.value).startswith(f"Expected a tokenizer.json, got {path}: ")
    assert "\n" not in str(caught.value)


def test_names_of_files(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(file.parent)
    plans = [TokenizerPlan(name, None) for name in ("tokenizer.json", "~/tokenizer.json", str(file))]
    assert all(plan.settings() == plans[2].settings() for plan in plans)
    assert all(plan.files() == [file] for plan in plans)
    assert plans[0].short_name == "tokenizer"
    (file.parent / "words").touch()  # a name goes before a file
    assert TokenizerPlan("words", None).files() == []
    assert TokenizerPlan("bpe", 300).short_name == "bpe300"
    assert TokenizerPlan("words", None).short_name == "words"


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gpt3", None, r"^Expected `tokenizer` to be 'bytes', 'words', .* or a tokenizer\.json, got 'gpt3'\.$"),
        ("", None, r"^Expected `tokenizer` to be .*, got ''\.$"),
        (".", None, r"^Expected `tokenizer` to be .*, got '\.'\.$"),
        pytest.param("x" * 5000, None, r"^Expected `tokenizer` to be .*, got 'xxx.*'\.$", id="long"),
        ("bytes", 300, "^Expected `vocabulary_size` to be null for the tokenizer 'bytes', .*, got 300"),
        ("bpe", None, "^Expected `vocabulary_size` to be given for the tokenizer 'bpe', got None"),
        ("bpe", 256, "^Expected `vocabulary_size` to be a whole number >= 257, got 256"),
        ("words", 2, "^Expected `vocabulary_size` to be a whole number >= 3, got 2"),
        ("words", 10.0, "^Expected `vocabulary_size` to be a whole number >= 3, got 10.0"),
    ],
)  # fmt: skip
def test_plans_refused(name, size, message):
    with pytest.raises(ConfigurationError, match=message):
        TokenizerPlan(name, size)


# GPT-2 from the hub's cache.


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_gpt2_from_the_cache(hub, file):
    folder, commit = hub / f"models--{GPT2.replace('/', '--')}", "0" * 40
    text_data.write(folder / "refs" / "main", commit)
    text_data.write(folder / "snapshots" / commit / "tokenizer.json", file.read_text())
    assert ids(make("gpt2"), TEXTS[0]) == ids(make(str(file)), TEXTS[0])
    assert TokenizerPlan("gpt2", None).files() == []


def test_gpt2_without_a_network(hub):
    with pytest.raises(ConfigurationError) as caught:
        make("gpt2")
    message = str(caught.value)
    assert message.startswith(f"Expected GPT-2's tokenizer ({GPT2}) from the hub or its cache, got LocalEntryNotFoundE")
    assert message.endswith(
        ". Without a network set `tokenizer` to the path of its tokenizer.json, or to 'bpe' or 'bytes'."
    )
    assert "\n" not in message


@pytest.mark.parametrize("name", ["words", "bpe", "gpt2", "file"])
def test_without_tokenizers(monkeypatch, file, name):
    plan = TokenizerPlan(str(file) if name == "file" else name, 300 if name == "bpe" else None)
    json_text = file.read_text()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"^Expected the package tokenizers for any tokenizer but 'bytes', .* 'lightning-ire\[text\]'\.$"
    with pytest.raises(ConfigurationError, match=message):
        plan.make(lambda: iter(TEXTS), progress=False)
    with pytest.raises(ConfigurationError, match=message):
        load_tokenizer(json_text)
    assert ids(TokenizerPlan("bytes", None).make(lambda: iter(TEXTS), progress=False), "a") == [97]


def test_gpt2_with_an_error_of_several_lines(monkeypatch):
    def fail(*args):
        raise OSError("one.\ntwo.\n")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        ConfigurationError, match=r"its cache, got OSError: one\. two\. Without a network set `tokenizer`"
    ):
        make("gpt2")


def test_gpt2_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigurationError, match=r"^Expected GPT-2's tokenizer .*, got ModuleNotFoundError: "):
        make("gpt2")


def test_what_is_saved_is_json():
    assert json.loads(make("words").to_json())["model"]["type"] == "WordLevel"
