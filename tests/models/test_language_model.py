import csv
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small import Clock, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ire import IRE, SAM, ConfigurationError, SampledFisher, SharpnessMonitor
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.models import LanguageModel, Llama, Transformer

VOCAB, LENGTH = 11, 6
SMALL = {"vocab_size": VOCAB, "width": 8, "num_heads": 2, "feed_forward": 12, "context_length": 8}
NETWORKS = {
    "Transformer": partial(Transformer, **SMALL, num_layers=1, position_dropout=0.0),
    "Llama": partial(Llama, **SMALL, num_layers=1),
}
SGD = partial(torch.optim.SGD, lr=0.1)
STILL = partial(torch.optim.SGD, lr=0.0)


def language_model(network=None, **settings) -> LanguageModel:
    """Of a table of bigrams, if nothing else is said."""
    torch.manual_seed(0)
    network = nn.Embedding(VOCAB, VOCAB) if network is None else network()
    return LanguageModel(network, **{"optimizer": SGD, "max_new_tokens": 5, **settings})


def loader(num: int = 22, batch_size: int = 8, ignored: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(VOCAB, (2, num, LENGTH), generator=generator)
    if ignored:  # more in the first sequences than in the last
        targets[torch.rand(num, LENGTH, generator=generator) > torch.arange(1, num + 1)[:, None] / num] = -100
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)


def mean_loss(model, data, ignored: bool = False) -> float:
    inputs, targets = data.dataset.tensors
    losses = -model(inputs).log_softmax(-1).flatten(0, 1)[range(inputs.numel()), targets.flatten().clamp(min=0)]
    return losses[targets.flatten() >= 0].mean().item()


class FakeText(LightningDataModule):
    """Says what it is told to say."""

    def __init__(self, bytes_per_token=None, ignored=False, prompts=(), **known):
        super().__init__()
        self.parts = bytes_per_token
        self.ignored, self.prompts = ignored, prompts
        for name, value in known.items():
            setattr(self, name, value)

    def bytes_per_token(self, part):
        return None if self.parts is None else self.parts[part]

    def train_dataloader(self):
        return loader(24, ignored=self.ignored)

    def val_dataloader(self):
        return loader(ignored=self.ignored)

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        return DataLoader(self.prompts, batch_size=None)


def rows(run, name) -> list[tuple[int, float]]:
    """Zero-based step and value of each row that has the metric."""
    lines = list(csv.DictReader(Path(run.logger.log_dir, "metrics.csv").read_text().splitlines()))
    return [(int(line["step"]), float(line[name])) for line in lines if line.get(name)]


# Loss and metrics


@pytest.mark.parametrize("maker", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("ignored", [False, True])
def test_training_step_returns_the_tensor_of_its_only_cross_entropy(maker, ignored, monkeypatch):
    original, returned, logged = F.cross_entropy, [], {}

    def recording(*args, **kwargs):
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(F, "cross_entropy", recording)
    model, data = language_model(maker), loader(8, ignored=ignored)
    monkeypatch.setattr(model, "log", lambda name, value, **kwargs: logged.update({name: value}))
    loss = model.training_step(next(iter(data)), 0)
    assert len(returned) == 1
    assert loss is returned[0]
    assert loss.item() == pytest.approx(mean_loss(model, data))
    assert list(logged) == ["train/loss"]
    assert logged["train/loss"].item() == loss.item()
    assert not logged["train/loss"].requires_grad


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("ignored", [False, True])
def test_evaluation_is_over_all_targets_that_count(part, ignored, tmp_path):
    model, data = language_model(), loader(ignored=ignored)  # batches of 8, 8 and 6 sequences
    loss = mean_loss(model, data)
    evaluate = "validate" if part == "val" else "test"
    (result,) = getattr(trainer(tmp_path), evaluate)(model, data, verbose=False)
    assert result == {f"{part}/loss": pytest.approx(loss), f"{part}/perplexity": pytest.approx(math.exp(loss))}
    text = FakeText({"val": 3.5, "test": 4.5}, ignored)
    getattr(trainer(tmp_path), evaluate)(model, loader(8, ignored=not ignored), verbose=False)  # leaves nothing behind
    (result,) = getattr(trainer(tmp_path), evaluate)(model, datamodule=text, verbose=False)
    assert result[f"{part}/loss"] == pytest.approx(loss)
    assert result[f"{part}/bits_per_byte"] == pytest.approx(loss / math.log(2) / text.parts[part])


@pytest.mark.filterwarnings("error:Encountered `nan` values")
def test_batch_without_targets_counts_nothing(tmp_path):
    model, data = language_model(), loader(16)
    data.dataset.tensors[1][:8] = -100
    (result,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert result["val/loss"] == pytest.approx(mean_loss(model, data))


def test_perplexity_that_overflows_is_infinite(tmp_path):
    model = language_model()
    nn.init.normal_(model.model.weight, std=1e4)
    (result,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    assert result["val/loss"] == pytest.approx(mean_loss(model, loader()))
    assert result["val/perplexity"] == math.inf


def test_fit_logs_and_shows(tmp_path):
    model, run = language_model(optimizer=STILL), trainer(tmp_path)
    run.fit(model, datamodule=FakeText({"train": 3.0, "val": 4.0}))
    losses, bits = rows(run, "train/loss"), rows(run, "train/bits_per_byte")
    assert [step for step, _ in losses] == [step for step, _ in bits] == [0, 1, 2]
    assert [b for _, b in bits] == pytest.approx([loss / math.log(2) / 3 for _, loss in losses])
    loss = mean_loss(model, loader())
    assert rows(run, "val/loss") == [(2, pytest.approx(loss))]  # without the two batches of the sanity check
    assert run.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(loss))
    assert run.callback_metrics["val/bits_per_byte"].item() == pytest.approx(loss / math.log(2) / 4)
    assert set(run.progress_bar_metrics) == {"train/loss", "train/bits_per_byte", "val/loss", "val/bits_per_byte"}
    run = trainer(tmp_path)
    run.fit(model, datamodule=FakeText())
    assert not [name for name in run.callback_metrics if name.endswith("bits_per_byte")]


def test_callbacks_watch_the_validation_loss(tmp_path):
    model = language_model(optimizer=partial(torch.optim.SGD, lr=-0.0))
    keep = ModelCheckpoint(tmp_path, monitor="val/loss")
    stop = EarlyStopping(monitor="val/loss", patience=2)
    run = trainer(tmp_path, max_epochs=9, enable_checkpointing=True, callbacks=[keep, stop])
    run.fit(model, loader(), loader())
    assert run.current_epoch == 3  # nothing gets better
    assert keep.best_model_score.item() == stop.best_score.item() == pytest.approx(mean_loss(model, loader()))
    saved = torch.load(keep.best_model_path, weights_only=True)
    assert "hyper_parameters" not in saved
    assert list(saved["state_dict"]) == ["model.weight"]


@pytest.mark.parametrize(("stage", "wanted"), [("fit", 12), ("test", 12), ("predict", 99)])
def test_vocabulary_of_the_data_must_fit(stage, wanted, tmp_path):
    model = language_model(NETWORKS["Transformer"])
    message = rf"^Expected `vocab_size` to be at least {wanted}, as the tokens of FakeText have, got 11\.$"
    with pytest.raises(ConfigurationError, match=message):
        getattr(trainer(tmp_path), stage)(model, datamodule=FakeText(vocab_size=wanted))


@pytest.mark.parametrize("vocab_size", [11, 9, None])
def test_vocabulary_that_fits(vocab_size, tmp_path):
    trainer(tmp_path).test(language_model(NETWORKS["Llama"]), datamodule=FakeText(vocab_size=vocab_size), verbose=False)
    trainer(tmp_path).test(
        language_model(), datamodule=FakeText(vocab_size=99), verbose=False
    )  # the table does not say


class Output(nn.Module):
    def forward(self, tokens):
        return SimpleNamespace(logits=tokens)


@pytest.mark.parametrize(
    ("network", "got"), [(Output, "SimpleNamespace"), (nn.Identity, r"shape \(8, 6\)"), (nn.Flatten, r"shape \(8, 6\)")]
)
def test_networks_that_return_no_logits(network, got, tmp_path):
    message = (
        r"^Expected the network \(`model`\) to return logits of shape \[batch, length, vocabulary\], got "
        rf"{got} for tokens of shape \(8, 6\)\.$"
    )
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path).validate(language_model(network), loader(), verbose=False)


# Rates: a training batch takes 2 seconds in the first epoch, a batch of validation 100


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 1}], ids=["at the end", "after each batch"])
def test_tokens_per_second_of_each_row(validation, tmp_path, clock):
    run = trainer(tmp_path, callbacks=[clock], log_every_n_steps=2, **validation)
    run.fit(language_model(), loader(38), loader())  # batches of 8, 8, 8, 8 and 6 sequences
    assert rows(run, "train/tokens_per_second") == [
        (1, pytest.approx(8 * LENGTH / 2)),
        (3, pytest.approx(8 * LENGTH / 2)),
    ]
    run = trainer(tmp_path / "all", callbacks=[clock], log_every_n_steps=5, **validation)
    run.fit(language_model(), loader(38), loader())
    assert rows(run, "train/tokens_per_second") == [(4, pytest.approx(38 * LENGTH / 10))]


def test_tokens_per_second_go_on_over_epochs(tmp_path, clock):
    run = trainer(tmp_path, max_epochs=2, callbacks=[clock], log_every_n_steps=2)
    run.fit(language_model(), loader(32))  # four steps; then callbacks take 1,000 seconds, and four slower steps come
    expected = [16 * LENGTH / seconds for seconds in (2 + 2, 2 + 2, 1000 + 4 + 4, 4 + 4)]
    assert [rate for _, rate in rows(run, "train/tokens_per_second")] == pytest.approx(expected)


def test_tokens_per_second_with_accumulation_and_extra_passes(tmp_path, clock):
    model = language_model()
    original = model.training_step

    def slow(*args):
        clock.now += 10
        return original(*args)

    model.training_step = slow
    ire = IRE(kappa=1.0, interval=9, perturbation=SAM(rho=0.05))
    run = trainer(tmp_path, callbacks=[clock, ire], accumulate_grad_batches=2)
    run.fit(model, loader(32))
    assert run.global_step == 2
    expected = pytest.approx(16 * LENGTH / (2 * (10 + 10 + 2)))
    assert rows(run, "train/tokens_per_second") == [(0, expected), (1, expected)]


def test_tokens_per_second_and_passes_of_several_devices(clock, monkeypatch):
    model, logged = language_model(), {}
    monkeypatch.setattr(model, "log", lambda name, value, **kwargs: logged.update({name: value}))
    data = SimpleNamespace(train_tokens=1000, tokens_per_step=250)
    model.trainer = SimpleNamespace(
        global_step=0, log_every_n_steps=3, world_size=4, global_rank=0, strategy=None, datamodule=data
    )
    model.on_train_start()
    batch = next(iter(loader()))
    for step in range(1, 5):
        model.trainer.global_step = step
        clock.now += 2
        model.on_train_batch_end(None, batch, 0)
        assert bool(logged) == (step >= 3)
    assert logged == {"train/tokens_per_second": 4 * 8 * LENGTH / 2, "data/passes": 3 * 250 / 1000}


def test_no_rows_where_lightning_logs_none(tmp_path):
    run = trainer(tmp_path, log_every_n_steps=0)
    run.fit(language_model(), loader())
    assert "train/tokens_per_second" not in run.logged_metrics


def test_passes_go_on_after_a_resume(tmp_path):
    known = {"train_tokens": 24 * LENGTH, "tokens_per_step": 8 * LENGTH}
    keep = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=2)
    settings = {"log_every_n_steps": 2, "enable_checkpointing": True}
    run = trainer(tmp_path, max_steps=2, callbacks=[keep], **settings)
    run.fit(language_model(), datamodule=FakeText(**known))
    assert rows(run, "data/passes") == [(1, pytest.approx(2 / 3))]
    run = trainer(tmp_path / "second", max_steps=6, max_epochs=2, **settings)
    run.fit(language_model(), datamodule=FakeText(**known), ckpt_path=tmp_path / "middle.ckpt")
    assert rows(run, "data/passes") == [(3, pytest.approx(4 / 3)), (5, pytest.approx(2))]
    assert [step for step, _ in rows(run, "train/tokens_per_second")] == [3, 5]
    run = trainer(tmp_path / "third")
    run.fit(language_model(), loader())
    assert "data/passes" not in run.logged_metrics


# Prediction

PROMPT = torch.tensor([[3, 1, 4]])


def continued(prompts=PROMPT, network=None, vocab_size=None, batch_idx=0, **settings) -> torch.Tensor:
    model = language_model(network, **settings).eval()
    model.trainer = SimpleNamespace(datamodule=SimpleNamespace(vocab_size=vocab_size))
    graphs, state = [], torch.get_rng_state()
    model.model.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    result = model.predict_step(prompts, batch_idx)
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False] * model.max_new_tokens
    assert result.dtype == torch.int64
    assert torch.equal(result[:, : prompts.shape[1]], prompts)
    assert result.shape == (len(prompts), prompts.shape[1] + model.max_new_tokens)
    return result


def test_same_command_draws_the_same(monkeypatch):
    first = continued(max_new_tokens=20)
    torch.manual_seed(7)
    assert torch.equal(continued(max_new_tokens=20), first)
    assert not torch.equal(continued(max_new_tokens=20, batch_idx=1), first)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert torch.equal(continued(max_new_tokens=20), first)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(continued(max_new_tokens=20), first)


@pytest.mark.parametrize("maker", NETWORKS.values(), ids=NETWORKS)
def test_temperature_0_takes_the_likeliest_token_of_the_last_context(maker):
    prompts = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    result = continued(prompts, maker, temperature=0)  # 6 + 5 tokens, where the network takes 8
    model = language_model(maker).eval()
    for end in range(6, 11):
        expected = model(result[:, max(0, end - 8) : end])[:, -1].argmax(dim=-1)
        assert torch.equal(result[:, end], expected)


def test_draws_follow_the_softmax_at_the_temperature():
    prompts = torch.full((4000, 1), 2)
    for temperature, top_k in ((0.8, None), (2.0, None), (2.0, 3)):
        drawn = continued(prompts, max_new_tokens=1, temperature=temperature, top_k=top_k)[:, 1]
        logits = language_model()(torch.tensor([[2]]))[0, 0]
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.sort().values[-top_k], -math.inf)
        expected = (logits / temperature).softmax(-1)
        got = drawn.bincount(minlength=VOCAB) / 4000
        assert got[expected == 0].sum() == 0
        assert (got - expected).abs().max() < 0.03


def test_top_1_is_greedy_and_top_100_is_all():
    assert torch.equal(continued(top_k=1, temperature=5), continued(temperature=0))
    assert torch.equal(continued(top_k=100), continued())
    assert torch.equal(continued(temperature=1e-100), continued(temperature=0))


@pytest.mark.parametrize("temperature", [0, 9.0])
def test_tokens_that_the_data_lack_are_never_drawn(temperature):
    prompts = torch.zeros(100, 1, dtype=torch.int64)
    assert continued(prompts, vocab_size=4, temperature=temperature)[:, 1:].max() < 4
    assert continued(prompts, vocab_size=None, temperature=9.0)[:, 1:].max() == VOCAB - 1


def test_prints_what_the_data_can_decode(tmp_path, capsys):
    text = FakeText(prompts=[PROMPT, torch.tensor([[0, 1], [1, 2]])])
    text.decode = lambda ids: "".join("abcdefghijk"[i] for i in ids)
    model = language_model(temperature=0, max_new_tokens=4)
    for _ in range(2):  # counted from 1 each time
        run = trainer(tmp_path)
        outputs = run.predict(model, datamodule=text)
        said = capsys.readouterr().out
        first, second, third = (text.decode(row.tolist()) for batch in outputs for row in batch)
        assert first.startswith("dbe")
        assert said.endswith(
            f"--- Sample 1 (the first 3 characters are the prompt) ---\n{first}\n\n"
            f"--- Sample 2 (the first 2 characters are the prompt) ---\n{second}\n\n"
            f"--- Sample 3 (the first 2 characters are the prompt) ---\n{third}\n\n"
        )
    del text.decode
    assert torch.equal(trainer(tmp_path).predict(model, datamodule=text)[0], outputs[0])
    assert "Sample" not in capsys.readouterr().out


def test_compiled_in_training_but_not_where_lengths_change(tmp_path, monkeypatch):
    compile, graphs = torch.compile, []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compile(function, backend=backend))
    torch.compiler.reset()
    try:
        models = [language_model(NETWORKS["Llama"], compile=compile) for compile in (False, True)]
        for model in models:
            run = trainer(tmp_path)
            run.fit(model, loader(16))
            assert bool(graphs) == model.compile_network
        cases.assert_same_bits(*models)
        count = len(graphs)
        outputs = [trainer(tmp_path).predict(model, DataLoader([PROMPT], batch_size=None)) for model in models]
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert len(graphs) == count
    finally:
        torch.compiler.reset()


# Under the callbacks


def sampled_fisher(model, batch, step) -> list[torch.Tensor]:
    """B * G * G over the batch's predictions that count, with the labels that the callback draws at a step."""
    inputs, targets = batch
    logits, counts = model(inputs).flatten(0, 1), targets.flatten() != -100
    generator = torch.Generator().manual_seed(mixed_seed(mixed_seed(0, step), "labels", 0))
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    draws = torch.rand(len(logits), generator=generator, dtype=torch.float64).to(logits) * cumulative[:, -1]
    labels = (cumulative <= draws[:, None]).sum(-1)
    loss = -logits.log_softmax(-1)[torch.arange(len(logits)), labels][counts].mean()
    return [counts.sum() * g * g for g in torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    "maker", [*NETWORKS.values(), partial(NETWORKS["Llama"], checkpointing=True)], ids=[*NETWORKS, "checkpointing"]
)
def test_sampled_fisher_is_that_of_all_predictions(maker, ignored):
    model, data = language_model(maker, optimizer=STILL).double(), loader(16, ignored=ignored)
    curvature = SampledFisher()
    estimates = cases.recorded(curvature)
    cases.fit(
        model, [IRE(kappa=1.0, gamma=0.8, interval=1, curvature=curvature)], data, precision="64-true", max_epochs=1
    )
    assert len(estimates) == 2
    for step, (batch, estimate) in enumerate(zip(data, estimates, strict=True)):
        for ours, expected in zip(estimate, sampled_fisher(model, batch, step), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("maker", NETWORKS.values(), ids=NETWORKS)
def test_enhanced_run_is_finite_and_an_idle_one_changes_nothing(maker):
    def run(*callbacks):
        model = language_model(maker, optimizer=partial(torch.optim.AdamW, lr=0.01))
        cases.fit(model, callbacks, loader(40), max_epochs=-1, max_steps=20)
        return model

    plain = run()
    enhanced = run(IRE(kappa=1.0, gamma=0.8, interval=5, perturbation=SAM(rho=0.05)))
    cases.assert_same_bits(plain, run(IRE(kappa=0.0, perturbation=SAM(rho=0.0))))
    assert all(p.isfinite().all() for p in enhanced.parameters())
    assert cases.moved(plain, enhanced) > 1e-3


@pytest.mark.parametrize("maker", NETWORKS.values(), ids=NETWORKS)
def test_sharpness_is_measured(maker):
    names = ["trace_fisher", "trace_hessian", "lambda_max"]
    monitor = SharpnessMonitor(every_n_steps=1, every_n_epochs=None, quantities=names, max_vectors=4, max_iterations=6)
    with cases.monitor_warnings() as said:
        run = cases.fit(language_model(maker), [monitor], loader(8), max_steps=1)
    assert not [line for line in said if "skip" in line or "differences" in line]
    values = {name: run.callback_metrics[f"sharpness/{name}"].item() for name in names}
    assert all(math.isfinite(value) for value in values.values())
    assert values["trace_fisher"] > 0
    assert values["lambda_max"] > 0


# Settings


@pytest.mark.parametrize("name", ["Transformer", "Llama"])
def test_short_names_in_configs_mean_our_networks(name):
    parser = ArgumentParser()
    parser.add_class_arguments(LanguageModel, "model", sub_configs=True)
    settings = parser.parse_args([f"--model.model={name}", "--model.model.vocab_size=7"])
    assert settings.model.model.class_path == f"lightning_ire.models.{name}"
    assert settings.model.model.init_args.vocab_size == 7


def test_weight_decay_groups():
    settings = {"optimizer": partial(torch.optim.AdamW, weight_decay=0.5), "decay_norm_and_bias": False}
    decayed, free = language_model(NETWORKS["Llama"], **settings).configure_optimizers().param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) == 2 + 7
    assert len(free["params"]) == 3


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 1.0), ("step", 0.25)])
def test_schedule_moves_on_per_epoch_or_step(interval, expected, tmp_path):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    optimizer = partial(torch.optim.SGD, lr=2.0)
    run = trainer(tmp_path)
    run.fit(language_model(optimizer=optimizer, lr_scheduler=schedule, lr_interval=interval), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_interval": "day"}, "Expected `lr_interval` to be one of 'epoch', 'step', got 'day'."),
        ({"max_new_tokens": 0}, "Expected `max_new_tokens` to be a whole number >= 1, got 0."),
        ({"temperature": -0.1}, "Expected `temperature` to be a number >= 0, got -0.1."),
        ({"top_k": 0}, "Expected `top_k` to be a whole number >= 1, got 0."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        language_model(**settings)
