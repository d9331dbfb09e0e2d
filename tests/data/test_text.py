import inspect
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import text_data
import torch
import torch.nn.functional as F
from cases import assert_same_bits, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ire import IRE, SAM, ConfigurationError
from lightning_ire.data import Text
from lightning_ire.data._resumable import ResumableLoader

DOCUMENTS = text_data.prose(60)
TEXT = "".join(DOCUMENTS)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return text_data.write(tmp_path / "text.jsonl", text_data.jsonl(DOCUMENTS))


def text(corpus: Path, **settings) -> Text:
    settings = {
        "source": "files", "files": str(corpus), "cache_dir": corpus.parent / "cache", "sequence_length": 16,
        "global_batch_size": 8, "split_by": "position", "val_size": 0.1, "test_size": 0.1, **settings,
    }  # fmt: skip
    return Text(**settings)


def ready(corpus: Path, stage: str = "fit", **settings) -> Text:
    data = text(corpus, **settings)
    data.prepare_data()
    data.setup(stage)
    return data


def read(data: Text, part: str) -> str:
    """The text of a part, from its evaluation batches."""
    loader = getattr(data, f"{part}_dataloader")()
    first = next(iter(loader))[0][0, :1].tolist()
    return data.decode(first + [token for _, targets in loader for token in targets[targets != -100].tolist()])


# Batches, without a Trainer.


def test_batches(corpus):
    data = ready(corpus)
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = list(loader)
    assert len(batches) == len(loader) == (data.train_tokens - 1 - 15) // 16 // 8
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (8, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    train = data._parts["train"].tokens.tolist()
    for inputs, targets in zip(*batches[0], strict=True):
        crop = [*inputs.tolist(), targets[-1].item()]
        assert any(train[start : start + 17] == crop for start in range(len(train)))
    assert data.vocab_size == 257
    assert data.tokens_per_step == 8 * 16
    assert data.decode(batches[0][0][0].tolist()).replace("<|endoftext|>", "") in TEXT.replace("<|endoftext|>", "")


def test_parts_are_the_text(corpus):
    data = ready(corpus)
    held_out = read(data, "val").replace("<|endoftext|>", "") + read(data, "test").replace("<|endoftext|>", "")
    assert TEXT.endswith(held_out)
    probe = data.probe_dataloader()
    train = torch.cat([targets[targets != -100] for _, targets in probe])
    first = next(iter(probe))[0][0, :1]
    assert data.decode([*first.tolist(), *train.tolist()]).replace("<|endoftext|>", "") + held_out == TEXT
    sizes = [len(inputs) for inputs, _ in data.val_dataloader()]
    assert set(sizes[:-1]) == {8}
    assert {len(inputs) for inputs, _ in list(ready(corpus, eval_batch_size=3).test_dataloader())[:-1]} == {3}


def test_contiguous_batches(corpus):
    batches = list(ready(corpus, order="contiguous").train_dataloader())
    assert all(torch.equal(old[1][:, -1], new[0][:, 0]) for old, new in itertools.pairwise(batches))
    assert bytes(batches[0][0][0].tolist()) == TEXT.encode()[:16]


def test_bytes_per_token(corpus):
    for tokenizer, size in (("bytes", None), ("bpe", 300), ("words", None)):
        data = ready(corpus, tokenizer=tokenizer, vocabulary_size=size)
        part = data._parts["val"]
        expected = None if tokenizer == "words" else part.bytes / len(part.tokens)
        assert data.bytes_per_token("val") == expected
        if tokenizer == "bpe":
            assert 1 < expected < 4
        assert data.bytes_per_token("nothing") is None
    assert ready(corpus).bytes_per_token("train") == pytest.approx(1, abs=0.01)


def test_without_a_validation_part(corpus):
    data = ready(corpus, val_size=0, test_size=0.0)
    assert data.val_dataloader() == data.test_dataloader() == []
    assert len(list(data.predict_dataloader())) == 3
    assert data.bytes_per_token("val") is None


def test_validation_files(corpus, tmp_path):
    val = text_data.write(tmp_path / "val.txt", "held out text")
    test = text_data.write(tmp_path / "test.txt.gz", "for the test")
    data = ready(corpus, val_files=val, test_files=[str(test)])
    assert (read(data, "val"), read(data, "test")) == ("held out text", "for the test")
    assert data.train_tokens == len(TEXT.encode()) + len(DOCUMENTS) - 1
    data = ready(corpus, val_files=str(val), prompts=None, prompt_length=4)
    assert [data.decode(prompt[0].tolist()) for prompt in data.predict_dataloader()] == ["held", " out", " tex"]


def test_prompts(corpus):
    data = ready(corpus, prompts=["def ", "é", "<|endoftext|>"])
    prompts = list(data.predict_dataloader())
    assert [(prompt.shape[0], prompt.dtype) for prompt in prompts] == [(1, torch.int64)] * 3
    assert [data.decode(prompt[0].tolist()) for prompt in prompts] == ["def ", "é", "<|endoftext|>"]
    assert all((prompt < 256).all() for prompt in prompts)
    for prompt in ("", "\udcff"):
        with pytest.raises(ConfigurationError, match=r"^Expected `prompts` to have text in each, got '"):
            ready(corpus, prompts=["a", prompt]).predict_dataloader()
    assert list(ready(corpus, prompts=[]).predict_dataloader()) == []
    lengths = [prompt.shape for prompt in ready(corpus, prompt_length=7).predict_dataloader()]
    assert lengths == [(1, 7)] * 3


def test_too_short_for_evaluation(corpus, tmp_path):
    val = text_data.write(tmp_path / "val.txt", "x")
    data = ready(corpus, val_files=str(val))
    message = r"^Expected at least two tokens in the val part, got 1: make `val_size` larger, or give `val_files`\.$"
    for loader in (data.val_dataloader, data.predict_dataloader):
        with pytest.raises(ConfigurationError, match=message):
            loader()
    tiny = ready(text_data.write(tmp_path / "tiny.txt", "y"), val_size=0.0, test_size=0.0)
    with pytest.raises(
        ConfigurationError, match=r"^Expected at least two tokens in the train part, got 1: give more text\.$"
    ):
        tiny.probe_dataloader()
    with pytest.raises(ConfigurationError, match="at most what the 1 tokens of the training part make, got 8"):
        tiny.train_dataloader()


def test_before_setup(corpus):
    data = text(corpus, prompts=["a"])
    assert data.vocab_size is None
    message = "^Expected `prepare_data` and `setup` before tokens are used, got neither"
    for call in (
        data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader,
        data.probe_dataloader, lambda: data.train_tokens, lambda: data.decode([1]),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            call()
    with pytest.raises(ConfigurationError, match=r"^Expected tokens in .*, got none: call `prepare_data` first\.$"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web", "files": None}, "^Expected `source` to be 'stdlib', 'files', .*, got 'web'"),
        ({"source": "stdlib"}, "^Expected `source` to be 'files' where files are given, got 'stdlib'"),
        ({"files": None}, "^Expected `files` to name at least one file, got none"),
        ({"files": "nowhere.txt"}, "^Expected `files` to match files, got 'nowhere.txt'"),
        ({"val_files": "nowhere.txt"}, "^Expected `val_files` to match files, got 'nowhere.txt'"),
        ({"test_files": ["nowhere.txt"]}, "^Expected `test_files` to match files, got 'nowhere.txt'"),
        ({"tokenizer": "gpt9"}, "^Expected `tokenizer` to be .* got 'gpt9'"),
        ({"vocabulary_size": 300}, "^Expected `vocabulary_size` to be null for the tokenizer 'bytes'"),
        ({"tokenizer": "bpe"}, "^Expected `vocabulary_size` to be given"),
        ({"sequence_length": 0}, "^Expected `sequence_length` to be a whole number >= 1, got 0"),
        ({"global_batch_size": 0}, "^Expected `global_batch_size` to be a whole number >= 1, got 0"),
        ({"max_batch_per_device": 0}, "^Expected `max_batch_per_device` to be a whole number >= 1, got 0"),
        ({"eval_batch_size": 0}, "^Expected `eval_batch_size` to be a whole number >= 1, got 0"),
        ({"order": "sorted"}, "^Expected `order` to be one of 'random', 'contiguous', got 'sorted'"),
        ({"val_size": 1.0}, r"^Expected `val_size` to be a number in \[0, 1\), got 1.0"),
        ({"test_size": -0.5}, r"^Expected `test_size` to be a number in \[0, 1\), got -0.5"),
        ({"val_size": 0.9}, "^Expected `val_size` and `test_size` to leave text for training, got 0.9 and 0.1"),
        ({"split_by": "line"}, "^Expected `split_by` to be one of 'document', 'position', got 'line'"),
        ({"split_seed": -1}, "^Expected `split_seed` to be a whole number >= 0, got -1"),
        ({"prompt_length": 0}, "^Expected `prompt_length` to be a whole number >= 1, got 0"),
        ({"num_workers": -1}, "^Expected `num_workers` to be a whole number >= 0, got -1"),
    ],
)
def test_values_out_of_range(corpus, settings, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        text(corpus, **settings)
    assert "\n" not in str(caught.value)
    assert re.search(r"`(\w+)`", str(caught.value))[1] in inspect.signature(Text).parameters  # the command line's key


def test_order_follows_seed_everything(corpus, monkeypatch):
    data = ready(corpus)

    def first() -> list[list[int]]:
        return next(iter(data.train_dataloader()))[0].tolist()

    torch.manual_seed(1)
    one = first()
    torch.manual_seed(2)
    assert first() != one
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    seeded = first()
    torch.manual_seed(3)
    assert first() == seeded


def test_devices_share_a_batch(corpus, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    alone = [sorted(inputs.tolist()) for inputs, _ in ready(corpus).train_dataloader()]
    evaluated = sorted(ready(corpus)._parts["val"].tokens.tolist()[1:])
    shares, val = [], []
    for rank in range(2):
        data = text(corpus, max_batch_per_device=2)
        data.trainer = SimpleNamespace(
            world_size=2, global_rank=rank, strategy=None, accumulate_grad_batches=1, progress_bar_callback=None,
            lightning_module=SimpleNamespace(automatic_optimization=True),
        )  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        assert data.trainer.accumulate_grad_batches == 2
        batches = [inputs.tolist() for inputs, _ in data.train_dataloader()]
        assert {len(batch) for batch in batches} == {2}
        shares.append([a + b for a, b in zip(batches[::2], batches[1::2], strict=True)])
        val += [target for _, targets in data.val_dataloader() for target in targets[targets != -100].tolist()]
    assert [sorted(first + second) for first, second in zip(*shares, strict=True)] == alone
    assert sorted(val) == evaluated
    assert len(data.train_dataloader()) == 2 * len(alone)


class Spread(ModelParallelStrategy):
    """Two groups of devices, each of which shares a batch."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    distributed_sampler_kwargs = property(lambda self: {"num_replicas": 2, "rank": self.group})


@pytest.mark.parametrize("eval_batch_size", [1, 2, 3])
def test_devices_that_share_a_batch_read_the_same(corpus, eval_batch_size, monkeypatch):
    """Tensor parallel on 4 devices: as on 2, in training; in evaluation all make equally many forward passes."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    trained, evaluated = [], []
    for rank in range(4):
        torch.manual_seed(rank)
        data = text(corpus, eval_batch_size=eval_batch_size, prompts=["a", "b", "c"])
        data.trainer = SimpleNamespace(
            world_size=4, global_rank=rank, strategy=Spread(rank // 2), accumulate_grad_batches=1,
            progress_bar_callback=None, lightning_module=SimpleNamespace(automatic_optimization=True),
        )  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        trained.append([inputs.tolist() for inputs, _ in data.train_dataloader()])
        evaluated.append([targets for _, targets in data.val_dataloader()])
        assert [prompt.shape for prompt in data.predict_dataloader()] == [(1, 1)] * 3
    assert {len(batch) for batch in trained[0]} == {4}  # of the 8 of all
    assert trained[0] == trained[1] != trained[2] == trained[3]
    assert len({len(batches) for batches in evaluated}) == 1
    seen = [token for rank in (0, 2) for targets in evaluated[rank] for token in targets[targets != -100].tolist()]
    assert sorted(seen) == sorted(ready(corpus)._parts["val"].tokens.tolist()[1:])


def test_worker_processes(corpus):
    expected = [inputs.tolist() for inputs, _ in ready(corpus).train_dataloader()]
    loader = ready(corpus, num_workers=2).train_dataloader()
    assert [inputs.tolist() for inputs, _ in loader] == expected
    assert loader.persistent_workers


def test_verify(corpus):
    data = ready(corpus)
    (path,) = (data.cache.folder).glob("train.*.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert ready(corpus)._parts["train"].tokens.tobytes() == content
    assert ready(corpus, verify=True)._parts["train"].tokens.tobytes() != content


def test_a_bar_only_where_lightning_has_one(corpus, capfd):
    for bar in (True, False):
        data = text(corpus, tokenizer="words", sequence_length=8, val_size=0.1 + bar / 100)
        data.trainer = SimpleNamespace(progress_bar_callback=object() if bar else None)
        data.prepare_data()
        assert ("Tokenizing (files): 100%" in capfd.readouterr().err) == bar


# In training.


class Model(pl.LightningModule):
    """A bigram model. Nothing in it knows of the data but its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))
        self.seen: list[list[int]] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0].flatten().tolist())
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(corpus: Path, folder: Path, ckpt_path: Path | None = None, every: int = 5, **settings) -> Model:
    """Train 12 steps with a validation after every second batch; all is new but what the checkpoint brings."""
    torch.manual_seed(0)
    model = Model()
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    run = trainer(
        [IRE(interval=4, start_step=3, perturbation=SAM(0.05)), checkpoints], max_epochs=-1, max_steps=12,
        enable_checkpointing=True, val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    torch.manual_seed(1 if ckpt_path is None else 2)
    settings = {"global_batch_size": 32, "sequence_length": 24, **settings}
    run.fit(model, datamodule=text(corpus, **settings), ckpt_path=ckpt_path)
    return model


STEPS = 8
"""Optimizer steps in an epoch: a run of 12 sees two."""


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        pytest.param({}, 5, id="random"),
        pytest.param({}, 10, id="second epoch", marks=pytest.mark.slow),
        pytest.param({}, STEPS, id="end of an epoch", marks=pytest.mark.slow),
        pytest.param({"order": "contiguous"}, 5, id="contiguous", marks=pytest.mark.slow),
        pytest.param({"order": "contiguous", "max_batch_per_device": 16}, STEPS, id="both", marks=pytest.mark.slow),
        pytest.param({"max_batch_per_device": 16}, 5, id="accumulated"),
        pytest.param({"max_batch_per_device": 16, "order": "contiguous"}, 10, id="all", marks=pytest.mark.slow),
        pytest.param({"num_workers": 1}, 5, id="workers", marks=pytest.mark.slow),
    ],
)
def test_resumed_bit_for_bit(corpus, tmp_path, monkeypatch, settings, step):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    whole = train(corpus, tmp_path / "whole", every=step, **settings)
    data = ready(corpus, global_batch_size=32, sequence_length=24, **settings)
    assert len(data.train_dataloader()) == STEPS * (1 if data.max_batch_per_device is None else 2)
    resumed = train(corpus, tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt", **settings)
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert_same_bits(resumed, whole)


@pytest.mark.parametrize(
    "now",
    [
        {"max_batch_per_device": 8}, {"global_batch_size": 16}, {"global_batch_size": 20, "max_batch_per_device": 10},
        {"order": "contiguous", "max_batch_per_device": 8},
    ],
)  # fmt: skip
def test_resumed_in_other_batches(corpus, tmp_path, monkeypatch, now):
    """After five steps of 32: the sequences that are left come once, in the same order."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    order = now.get("order", "random")
    whole = train(corpus, tmp_path / "whole", order=order)
    resumed = train(corpus, tmp_path / "resumed", tmp_path / "whole" / "step=5.ckpt", **now)

    def sequences(model: Model) -> list[tuple[int, ...]]:  # SAM looks at them twice
        cut = [tuple(seen[start : start + 24]) for seen in model.seen for start in range(0, len(seen), 24)]
        return list(dict.fromkeys(cut))

    count = 96 // (batch := now.get("global_batch_size", 32)) * batch
    assert sequences(resumed)[:count] == sequences(whole)[5 * 32 :][:count]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {},
            {"sequence_length": 12},
            "^Expected `sequence_length` to be 24 for the rest of the epoch .*, got 12: set it",
        ),
        ({}, {"order": "contiguous"}, "^Expected `order` to be 'random' for .*, got 'contiguous': "),
        ({"order": "contiguous"}, {"global_batch_size": 16}, "^Expected `global_batch_size` to be 32 for .*, got 16: "),
        ({}, {"val_size": 0.2}, r"^Expected the training text \(`source`, .*\) to be '\d+ tokens, checksum \w+' for "),
        ({}, {"tokenizer": "words"}, r"^Expected the training text .* tokens, .* got '\d+ tokens, checksum"),
    ],
)
def test_an_epoch_that_cannot_be_finished(corpus, tmp_path, before, now, message):
    train(corpus, tmp_path / "whole", **before)
    with pytest.raises(ConfigurationError, match=message):
        train(corpus, tmp_path / "resumed", tmp_path / "whole" / "step=5.ckpt", **{**before, **now})


def test_another_token_between_those_that_older_releases_compare(tmp_path):
    path = tmp_path / "a.txt"
    before, after = [], []
    for values, letters in ((before, "ab" * 20000), (after, "ab" * 10000 + "xb" + "ab" * 9999)):
        path.write_text(letters)
        data = Text(source="files", files=str(path), cache_dir=tmp_path / "cache", val_size=0, test_size=0)
        data.prepare_data()
        data.setup()
        values.append(data.order_depends_on())
    assert {key for key in before[0] if before[0][key] != after[0][key]} == {"tokens"}


def test_every_token_once_in_an_epoch(corpus, tmp_path):
    data = text(corpus)
    model = Model()
    trainer(max_epochs=2, limit_val_batches=0).fit(model, datamodule=data)
    steps = len(data.train_dataloader())
    epochs = [[tuple(seen) for seen in model.seen[:steps]], [tuple(seen) for seen in model.seen[steps:]]]
    assert len(epochs[1]) == steps
    assert sorted(epochs[0]) != sorted(epochs[1])  # cut at other places


def test_accumulation_is_set(corpus):
    data, model = text(corpus, max_batch_per_device=3), Model()
    run = trainer(max_steps=3, max_epochs=-1, limit_val_batches=1)
    run.fit(model, datamodule=data)
    assert run.accumulate_grad_batches == 4
    assert run.global_step == 3
    assert len(model.seen) == 12
    assert {len(seen) for seen in model.seen} == {2 * 16}


def test_all_stages(corpus):
    run, data, model = trainer(max_steps=2, max_epochs=-1), text(corpus, prompts=["a", "bc"]), Model()
    run.fit(model, datamodule=data)
    assert [prompt.tolist() for prompt in run.predict(model, datamodule=data)] == [[[97]], [[98, 99]]]
    (tested,) = run.test(model, datamodule=data, verbose=False)
    with torch.no_grad():
        losses = [(model.loss(batch), len(batch[0])) for batch in data.test_dataloader()]
    assert tested["test_loss"] == pytest.approx(
        float(sum(loss * count for loss, count in losses) / sum(count for _, count in losses)), rel=1e-5
    )
    assert math.isfinite(run.validate(model, datamodule=data, verbose=False)[0]["val_loss"])
    none = text(corpus, val_size=0.0, test_size=0.0)
    trainer(max_steps=2, max_epochs=-1).fit(Model(), datamodule=none)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches(corpus, tmp_path):
    model = Model()
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    run = trainer([checkpoints], max_epochs=3, overfit_batches=2, enable_checkpointing=True)
    run.fit(model, datamodule=text(corpus))
    assert len(model.seen) == 6
    assert model.seen[0] == model.seen[2] == model.seen[4] != model.seen[1]
    resumed = Model()
    trainer(max_epochs=3, overfit_batches=2).fit(
        resumed, datamodule=text(corpus), ckpt_path=tmp_path / "checkpoints" / "step=3.ckpt"
    )
    assert len(resumed.seen) == 3


def test_made_again_by_lightning(corpus):
    """As `Trainer` does it where it puts another sampler into a loader."""
    from lightning.pytorch.utilities.data import _update_dataloader

    data = ready(corpus)
    loader = data.train_dataloader()
    again = _update_dataloader(loader, loader.sampler)
    assert type(again) is ResumableLoader
    assert [inputs.tolist() for inputs, _ in again] == [inputs.tolist() for inputs, _ in loader]
    assert isinstance(data.val_dataloader(), DataLoader)


def test_help_tells_of_every_argument():
    lines = inspect.getdoc(Text.__init__).splitlines()
    told = {line.split(":")[0].strip() for line in lines if line.startswith("    ") and ":" in line}
    assert set(inspect.signature(Text).parameters) <= told
