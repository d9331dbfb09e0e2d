"""What `attach` does to transformers' Trainer, and what it relies on there: real models, made from a config."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from integrations.loops import InOrder, SeedStep, StopAfter, fresh_accelerate
from lightning_ire import IRE, SAM, EmpiricalFisher, IREStep, SharpnessMonitor, measure_sharpness, tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.integrations.transformers import STATE_FILE, attach

BOOST: dict[str, Any] = {"kappa": 2.0, "gamma": 0.7, "interval": 3}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with fresh_accelerate():
        yield


def llama() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, attention_dropout=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(count: int = 24) -> list[dict[str, Tensor]]:
    """Of each another number of tokens counts."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for _ in range(count):
        tokens = torch.randint(24, (10,), generator=generator)
        labels = tokens.clone()
        labels[: int(torch.randint(1, 8, (), generator=generator))] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def trainer_of(kind: type[Trainer] = InOrder, model: Any = None, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": "out", "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return kind(
        llama() if model is None else model,
        TrainingArguments(**{**arguments, **changes}),
        train_dataset=texts(),
        callbacks=[SeedStep()],
    )


def rows_of(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged, but for our own values and times."""
    theirs = [
        {key: value for key, value in row.items() if not key.startswith(("ire/", "sam/", "train_"))}
        for row in trainer.state.log_history
    ]
    return [row for row in theirs if not any(key.startswith(("sharpness/", "stability/")) for key in row)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="accumulated"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"max_grad_norm": 0.05, "lr_scheduler_type": "cosine"}, id="clipped"),
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothed", marks=pytest.mark.slow),
        pytest.param(
            {"gradient_accumulation_steps": 5, "max_steps": -1, "num_train_epochs": 2},
            id="short-window",
            marks=pytest.mark.slow,
        ),
        pytest.param({"neftune_noise_alpha": 5.0, "optim": "adafactor"}, id="neftune", marks=pytest.mark.slow),
    ],
)
def test_a_second_pass_at_the_same_weights_is_the_plain_trainer(changes: dict[str, Any]) -> None:
    """And so are measurements in between: weights, the optimizer's state, logged rows, to the bit."""
    plain = trainer_of(**changes)
    plain.train()
    ours = trainer_of(**changes)
    attached = attach(ours, SAM(0.0), SharpnessMonitor(every_n_steps=2, quantities=["lambda_max"], max_iterations=3))
    ours.train()
    cases.assert_same_bits(ours.model, plain.model)
    assert not list(cases.differences(ours.optimizer.state_dict(), plain.optimizer.state_dict()))
    assert rows_of(ours) == rows_of(plain)
    assert attached.step is not None
    assert attached.step.progress.step == plain.state.global_step
    assert tags.LAMBDA_MAX in attached.last.values
    assert any(tags.PERTURBED_LOSS in row and "loss" in row for row in ours.state.log_history)


def test_without_anything_to_do_nothing_is_touched() -> None:
    trainer = trainer_of()
    before = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    attached = attach(trainer, IRE(kappa=0))
    assert attached.idle
    assert (dict(vars(trainer)), list(trainer.callback_handler.callbacks)) == before


@pytest.mark.parametrize("perturbation", [None, SAM(0.1)])
def test_a_sum_over_all_tokens_is_one_batch(perturbation: Any) -> None:
    """The Trainer divides by the tokens of the window, as a plain loop can do by hand."""
    settings = {**BOOST, "perturbation": perturbation}
    counts: list[Any] = []

    class Counts(InOrder):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            counts.append(kwargs["num_items_in_batch"])
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(Counts, llama().double(), lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd")
    attached = attach(trainer, IRE(**settings))
    trainer.train()
    model = llama().double().train()
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=1e-2), **settings)
    rows, losses = texts(), []
    for index in range(6):
        window = rows[4 * index : 4 * index + 4]
        count = counts[index * len(counts) // 6]
        assert 0 <= sum((row["labels"] != -100).sum() for row in window) - count <= 4  # first tokens are not predicted
        parts = [{key: torch.stack([row[key] for row in some]) for key in some[0]} for some in (window[:2], window[2:])]
        torch.manual_seed(100 + index)
        # the mean of two times the parts of a sum is the sum
        losses.append(
            step(lambda batch: 2 * model(**batch).loss, *({**part, "num_items_in_batch": count} for part in parts))
        )
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    masks, others = (
        dict(sorted(one.state_dict()["optimizers"][0]["flat"]["masks"].items())) for one in (attached, step)
    )
    assert masks
    assert not list(cases.differences(masks, others))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx([float(loss) for loss in losses], rel=1e-5)
    for tag, value in step.logs.items():
        assert logged[-1][tag] == pytest.approx(float(value), rel=1e-4)


def test_the_trainers_loss_is_that_part_of_the_sum() -> None:
    """What the test above takes from transformers, by hand."""
    model, rows = llama().eval(), texts(3)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, 24)
    total = F.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(50)).loss, total / 50)


def test_a_run_that_was_stopped_goes_on_bit_for_bit() -> None:
    """Inside an epoch, with dropout and a moving average, from the Trainer's own folder."""
    settings = {**BOOST, "beta": 0.5, "perturbation": SAM(0.1), "start_step": 0.2}
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    straight = trainer_of(output_dir="straight", **changes)
    first = attach(straight, IRE(**settings))
    straight.train()
    second = trainer_of(output_dir="straight", **changes)
    resumed = attach(second, IRE(**settings))
    second.train(resume_from_checkpoint="straight/checkpoint-3")
    cases.assert_same_bits(second.model, straight.model)
    assert not list(cases.differences(resumed.state_dict(), first.state_dict()))
    assert rows_of(second)[:-1] == rows_of(straight)[:-1]
    assert sorted(path.name for path in Path("straight").glob(f"*/{STATE_FILE}*")) == [STATE_FILE] * 3
    third = trainer_of(output_dir="straight", **changes)
    attach(third, IRE(**settings))
    third.train(resume_from_checkpoint=True)  # the last one: nothing is left to do
    cases.assert_same_bits(third.model, straight.model)


def test_a_plain_checkpoint_goes_on_with_masks_that_begin_anew() -> None:
    plain = trainer_of(save_strategy="steps", save_steps=3)
    plain.train()
    trainer = trainer_of()
    attached = attach(trainer, IRE(**BOOST))
    with pytest.warns(UserWarning, match=rf"no {STATE_FILE} in .*checkpoint-3.*begin anew at step 3"):
        trainer.train(resume_from_checkpoint="out/checkpoint-3")
    state = attached.state_dict()["optimizers"][0]
    assert (state["started_at"], state["step"]) == (3, 6)


def test_nothing_is_saved_where_only_the_model_is() -> None:
    trainer = trainer_of(save_strategy="steps", save_steps=3, save_only_model=True)
    attach(trainer, SAM(0.05))
    trainer.train()
    assert Path("out/checkpoint-3").is_dir()
    assert not list(Path("out").rglob(f"{STATE_FILE}*"))


def test_reporters_get_the_values() -> None:
    trainer = trainer_of(report_to=["tensorboard"], logging_steps=2)
    attach(trainer, IRE(**BOOST, perturbation=SAM(0.1)), SharpnessMonitor(every_n_epochs=1, max_iterations=3))
    trainer.train()
    (folder,) = {path.parent for path in Path("out").rglob("events*")} or {None}
    events = EventAccumulator(str(folder)).Reload()
    scalars = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars[f"train/{tags.STEP_NORM_FLAT}"] == [2, 4, 6]
    assert scalars[f"train/{tags.PERTURBED_LOSS}"] == [2, 4, 6]
    assert scalars[f"train/{tags.LAMBDA_MAX}"] == [6]
    assert scalars["train/loss"] == [2, 4, 6]


def test_sharpness_is_that_of_the_weights_own_precision() -> None:
    """Also where training computes in bf16."""
    trainer = trainer_of(bf16=True)
    probe = [{key: torch.stack([row[key] for row in texts()[:6]]) for key in ("input_ids", "labels")}]
    monitor = SharpnessMonitor(every_n_steps=6, every_n_epochs=None, quantities=["lambda_max", "trace_fisher"])
    attached = attach(trainer, SAM(0.05), monitor, probe=probe)
    forward = trainer.model.forward
    trainer.train()
    assert trainer.model.forward != forward  # Accelerate's, which computes in bf16
    model = llama()
    model.load_state_dict(trainer.model.state_dict())
    expected = measure_sharpness(
        model, lambda batch: model(**batch), probe, ["lambda_max", "trace_fisher"], max_vectors=64
    ).values
    assert attached.last is not None
    assert attached.last is monitor.last
    assert attached.last.step == 6
    for tag, value in expected.items():
        assert attached.last.values[tag] == pytest.approx(value, rel=1e-4)


def test_the_probe_is_drawn_without_a_trace() -> None:
    """From the training set, through the collator, which draws random numbers and counts."""

    class Collates:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            self.seen.append(float(torch.rand(())))
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    runs = []
    for monitor in (None, SharpnessMonitor(every_n_steps=3, num_batches=3, batch_size=4, max_iterations=2)):
        trainer = trainer_of()
        trainer.data_collator = collates = Collates()
        attached = attach(trainer, SAM(0.05), monitor)
        trainer.train()
        runs.append((collates.seen, trainer.model))
    assert [len(batch["labels"]) for batch in attached.probe] == [4, 4, 4]
    rows = {tuple(row["input_ids"].tolist()) for row in texts()}
    drawn = {tuple(row.tolist()) for batch in attached.probe for row in batch["input_ids"]}
    assert len(drawn & rows) == 12
    assert runs[0][0] == runs[1][0]
    cases.assert_same_bits(runs[0][1], runs[1][1])


class Twice(InOrder):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) + self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class Around(InOrder):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Own(InOrder):
    """A subclass as libraries have them: another loss, which it logs, and the outputs asked for."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.log({"own": float(loss.detach())})
        return (loss + 0.0, outputs) if return_outputs else loss + 0.0


@pytest.mark.parametrize(("kind", "words"), [(Twice, "`compute_loss` once"), (Around, "to call `compute_loss`, got")])
def test_what_cannot_be_repeated_is_refused(kind: type[Trainer], words: str) -> None:
    trainer = trainer_of(kind)
    attach(trainer, SAM(0.05))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ConfigurationError, match=words) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert not list(cases.differences(trainer.model.state_dict(), before))
    assert not {"training_step", "compute_loss", "log", "save_model"} & vars(trainer).keys()


def test_an_overridden_loss_logs_once_per_pass() -> None:
    plain, ours = trainer_of(Own), trainer_of(Own)
    plain.train()
    attach(ours, IRE(**BOOST, curvature=EmpiricalFisher(), perturbation=SAM(0.0)))
    ours.train()
    own, theirs = ([row for row in one.state.log_history if "own" in row] for one in (ours, plain))
    assert len(own) == len(theirs) == 12
    assert own[:2] == theirs[:2]  # the boost acts after the first step


def test_released_the_trainer_is_plain() -> None:
    plain, ours = trainer_of(), trainer_of()
    plain.train()
    attached = attach(ours, SAM(0.5))
    with pytest.raises(ConfigurationError, match=r"nothing is attached yet.*`release\(\)`"):
        attach(ours, SAM(0.5))
    attached.release()
    ours.train()
    cases.assert_same_bits(ours.model, plain.model)
    attach(ours, SAM(0.5)).release()


def test_it_starts_and_ends_with_every_call_of_train() -> None:
    trainer = trainer_of()
    attached = attach(trainer, IRE(**BOOST, start_epoch=1))
    with pytest.warns(UserWarning, match="IRE starts at epoch 1, but the run ends before that"):
        trainer.train()
    assert attached.state_dict()["optimizers"][0]["started_at"] is None
    trainer.args.max_steps = 9  # of 6 in an epoch
    trainer.train()
    assert attached.state_dict()["optimizers"][0]["started_at"] == 6
    assert "training_step" not in vars(trainer)


def test_a_start_that_the_run_never_reaches_is_a_warning() -> None:
    trainer = trainer_of()
    attach(trainer, IRE(**BOOST, start_step=100))
    with pytest.warns(UserWarning, match=r"IRE starts at step 100, but the run ends before that \(1 epochs, 6 steps\)"):
        trainer.train()


def test_adapters_and_checkpointed_layers() -> None:
    """PEFT's LoRA: only its weights are moved; layers that keep no activations."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    newer = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    trainer = trainer_of(model=model, **{f"{'activation' if newer else 'gradient'}_checkpointing": True})
    attached = attach(trainer, IRE(**BOOST, perturbation=SAM(0.1)))
    trainer.train()
    assert set(attached.state_dict()["optimizers"][0]["flat"]["masks"]) == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert all(cases.same_bits(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.slow
def test_a_compiled_model_is_the_plain_one() -> None:
    models = []
    for compiles in (False, True):
        trainer = trainer_of(torch_compile=compiles, torch_compile_backend="eager" if compiles else None)
        attach(trainer, IRE(**BOOST, perturbation=SAM(0.1)))
        trainer.train()
        models.append(trainer.model)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(texts())


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, {"ire": 3}, r"Expected `attach\(trainer, IRE\(...\)\)`.*got int"),
        ({}, {"ire": IRE(dry_run=True)}, "dry_run"),
        ({}, {"ire": IRE(kappa=0, start_step=3, perturbation=SAM(0.1))}, r"SAM\(rho=0.1, start_step=3\)"),
        ({}, {"ire": IRE(kappa="auto")}, r"sharpness=SharpnessMonitor"),
        ({}, {"sharpness": 3}, r"SharpnessMonitor\(every_n_steps=100\), got int"),
        ({}, {"sharpness": SharpnessMonitor(), "probe": []}, "at least one batch, got none"),
        ({}, {"sharpness": SharpnessMonitor(), "probe": 5}, "at least one batch, got int"),
        ({}, {"ire": IRE(), "probe": [1]}, "Expected `sharpness` beside `probe`"),
        ({"n_gpu": 4}, {"ire": IRE()}, "DataParallel over 4 GPUs: launch with `torchrun --nproc-per-node 4`"),
        ({"optim": "lomo"}, {"ire": IRE()}, "steps inside the backward pass"),
        ({"stream": True}, {"ire": IRE(), "sharpness": SharpnessMonitor()}, r"index.*got Stream: .*`probe=\[...\]`"),
    ],
)
def test_what_cannot_work_is_one_line(changes: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    trainer = trainer_of()
    if changes.pop("stream", False):
        trainer.train_dataset = Stream()
    for name, value in changes.items():
        vars(trainer.args)[f"_{name}" if name == "n_gpu" else name] = value
    with pytest.raises(ConfigurationError, match=words) as caught:
        attach(trainer, **arguments)
    assert "\n" not in str(caught.value)
    assert "train" not in vars(trainer)


def test_another_trainer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("got Trainer: Lightning's takes callbacks")):
        attach(cases.trainer(), SAM(0.05))  # type: ignore[arg-type]


def test_a_part_of_a_batch_is_refused_where_losses_are_parts_of_a_sum() -> None:
    trainer = trainer_of()
    attach(trainer, SAM(0.1, fraction=0.5))
    with pytest.raises(ConfigurationError, match="Expected `fraction` 1"):
        trainer.train()


def test_epochs_of_data_without_a_length() -> None:
    """The Trainer's own number of the epoch is no whole one there."""
    trainer = trainer_of(max_steps=16)  # of 6 in a pass
    trainer.train_dataset = Stream()
    probe = [{key: torch.stack([row[key] for row in texts()[:4]]) for key in ("input_ids", "labels")}]
    monitor = SharpnessMonitor(quantities=["lambda_max"], max_iterations=2)
    attached = attach(trainer, IRE(**BOOST, start_epoch=1), monitor, probe=probe)
    trainer.train()
    assert attached.state_dict()["optimizers"][0]["started_at"] == 6
    assert [row["step"] for row in trainer.state.log_history if tags.LAMBDA_MAX in row] == [6, 12, 16]


def test_a_row_that_a_callback_asks_for_has_the_values_of_its_step() -> None:
    """And a run without SAM none of the run with SAM that it goes on from."""

    class Asks(SeedStep):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_log = control.should_log or state.global_step == 5

    rows = []
    for every in (1, 3):
        trainer = trainer_of(logging_steps=every, save_strategy="steps", save_steps=3)
        trainer.add_callback(Asks())
        attach(trainer, IRE(**BOOST, perturbation=SAM(0.1)))
        trainer.train()
        rows.append({row["step"]: row[tags.GRAD_NORM] for row in trainer.state.log_history if tags.GRAD_NORM in row})
    assert rows[1] == {step: rows[0][step] for step in (3, 5, 6)}
    trainer = trainer_of()
    attach(trainer, IRE(**BOOST))
    trainer.train(resume_from_checkpoint="out/checkpoint-3")
    own = [row for row in trainer.state.log_history if row["step"] > 3 and "loss" in row]
    assert own
    assert not any(tags.GRAD_NORM in row for row in own)


def test_stopped_in_the_middle_of_a_window_the_next_epoch_begins_anew() -> None:
    """What was accumulated is dropped with the epoch."""

    class StopEpoch(StopAfter):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    trainer = trainer_of()
    trainer.add_callback(StopEpoch(99))
    attached = attach(trainer, IRE(**BOOST, perturbation=SAM(0.1)))
    trainer.train()
    assert attached.step is not None
    assert attached.step.progress.step == trainer.state.global_step
