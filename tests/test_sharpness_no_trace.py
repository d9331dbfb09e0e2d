"""The SharpnessMonitor leaves no trace: training with and without it is the same bit for bit, whatever goes wrong."""

import collections
import copy
import gc
import io
import math
import pickle
import random
import re
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from csv import DictReader
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, XLAStrategy
from matrix import recorder
from matrix.modules import Subject
from matrix.modules import loader as shuffled_loader
from matrix.recorder import OUR_TAGS, Record, Recorder
from matrix.rows import ROWS
from matrix.runs import Row, assert_same, run
from modules import Classifier, Manual, Net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from lightning_ire import IRE, SAM, ConfigurationError, SharpnessMonitor, tags
from lightning_ire.engine._torch import differentiable_once
from lightning_ire.engine.object_state import kept
from lightning_ire.sharpness import landscape
from lightning_ire.sharpness.quantities import QUANTITIES

# what Lightning and torch say about the small and odd runs
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:lightning\."),
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\."),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

FEW: dict[str, Any] = {"max_vectors": 2, "max_iterations": 2}


# The table

TAGS = {
    "trace_fisher": tags.TRACE_FISHER,
    "trace_hessian": tags.TRACE_HESSIAN,
    "lambda_max": tags.LAMBDA_MAX,
    "ascent_gap": tags.ASCENT_GAP,
    "stability": tags.RATIO,
}
CHEAP = list(TAGS)


class Monitored(SharpnessMonitor):
    """Takes the module's own notes of the passes of a measurement out of the record, and keeps their names."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.noted: set[str] = set()
        self.measurements: list[Any] = []

    def on_save_checkpoint(self, *args: Any) -> None:
        """What the quantity `gap` keeps in checkpoints is meant to be there."""

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        events = module.recorder.events
        count = len(events)
        module.inside = len(self.measurements) + 1
        try:
            result = super().measure(trainer, module)
        finally:
            del module.inside
        self.noted |= {name for name, _ in events[count:]}
        del events[count:]
        self.measurements.append(result)
        return result


# rows without a single measurement, and why
NOT_MEASURED = {"barebones": "there is nowhere to log to"}
# rows where quantities are skipped, and the reason that is given
SKIPPED = {
    "rmsprop": ("stability", "the preconditioner of RMSprop is not known"),
    "wrapper": ("stability", "the preconditioner of Wrapper is not known"),
    "sparse-adam": ("stability", "the preconditioner of SparseAdam is not known"),
}
# rows whose loss cannot be differentiated twice, and what torch says about that
DIFFERENCES = {
    "checkpointing-reentrant": "checkpoint",
    "checkpointing-reentrant-batchnorm": "checkpoint",
    "sparse": "_embedding_bag_backward",
    "sparse-adam": "_embedding_bag_backward",
}


def batch_norm_has_an_end() -> bool:
    """Whether torch says that it has no third derivative of BatchNorm's (2.11 does not: there it is silently wrong)."""
    x = torch.ones(2, 1, requires_grad=True)
    (first,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True).exp().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return differentiable_once([second])


if batch_norm_has_an_end():
    DIFFERENCES["gradient-penalty"] = "cannot be differentiated twice"


def cells() -> list[Any]:
    """Every fourth row at once, the others and the slow ones in `make test-all`."""
    return [
        pytest.param(row, index % 2 == 1, id=row.id, marks=[pytest.mark.slow] if row.slow or index % 4 else [])
        for index, row in enumerate(ROWS)
    ]


def without_transfers(record: Record) -> Record:
    """The probe goes through the hooks of the transfer, which profilers count."""
    profile = {name: count for name, count in record.parts["profile"].items() if "batch_t" not in name}
    return replace(record, parts=record.parts | {"profile": profile})


@pytest.mark.parametrize(("row", "last"), cells())
def test_a_run_with_measurements_is_the_run_without(row: Row, last: bool, plain_runs: Any, tmp_path: Path) -> None:
    """Also the rows that IRE refuses. The monitor comes first in half of the rows, last in the others."""
    monitor = Monitored(every_n_steps=7, every_n_epochs=1, quantities=CHEAP, **FEW)
    plain = plain_runs(row)
    with cases.monitor_warnings() as said:
        ours = run(row, monitor, tmp_path, last=last)
    assert_same(row, without_transfers(plain), without_transfers(ours))
    # no hook of a callback and no backward pass: only the step and the transfer of its batch
    announced = {"module.training_step", "module.on_before_batch_transfer", "module.on_after_batch_transfer"}
    assert monitor.noted <= announced
    if row.id in NOT_MEASURED:
        assert not monitor.measurements
        return
    steps, epochs = plain.parts["global_step"], plain.parts["epoch"]
    assert len(monitor.measurements) >= min(epochs, 1) + (steps > 7)
    skipped, reason = SKIPPED.get(row.id, (None, ""))
    wanted = {DIFFERENCES[row.id]} if row.id in DIFFERENCES else set()
    wanted |= {reason} if skipped else set()
    assert len(said) == len(wanted)  # every reason once in the whole run
    assert all(any(words in text for text in said) for words in wanted)
    for result in monitor.measurements:
        assert set(result.skipped) == ({skipped} if skipped else set())
        assert {TAGS[name] for name in CHEAP if name != skipped} <= set(result.values) <= OUR_TAGS
        assert all(math.isfinite(value) for value in result.values.values())


# Layers with modes, buffers and draws, all quantities


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.tail = nn.Linear(8, CLASSES)
        self.head[2].eval()  # a mode of its own, that `train()` of the whole would lose

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x).view(len(x), 2, 4)
        x = x + self.attention(x, x, x)[0]
        return self.tail(self.encoder(x).flatten(1))


class OnlyPart(Subject):
    """Puts a part in eval mode in every `train()`, and counts the calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.calls = 0

    def train(self, mode: bool = True) -> Any:
        self.calls += 1
        super().train(mode)
        self.net.head[1].eval()
        return self


@pytest.mark.parametrize(
    ("mode", "accumulate", "together", "every"),
    cases.first_at_once(
        [("train", 2, "IRE", 4), ("eval", 1, "alone", 7), ("train", 2, "alone", 4), ("eval", 2, "IRE", 4)]
    ),
)
def test_all_quantities_with_batchnorm_dropout_and_attention(
    mode: str, accumulate: int, together: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With IRE (SAM) active too: IRE and the monitor is IRE alone, down to what IRE logs."""
    monkeypatch.setattr(recorder, "OUR_TAGS", OUR_TAGS - {*tags.IRE_TAGS, *tags.SAM_TAGS})

    def others(folder: Path) -> list[pl.Callback]:
        ire = IRE(kappa=2.0, gamma=0.6, interval=2, start_step=1, perturbation=SAM(0.05))
        return [ire] if together == "IRE" else []

    row = Row(
        "all", "", lambda: OnlyPart(Attentive()), lambda: {"accumulate_grad_batches": accumulate}, callbacks=others
    )
    settings = {"mode": mode, "num_batches": accumulate, "every_n_steps": every, "every_n_epochs": None}
    monitor = Monitored(quantities=QUANTITIES if together == "IRE" else cases.BARE, **settings, **FEW)
    plain = run(row, None, tmp_path / "plain")
    with cases.monitor_warnings() as said:
        ours = run(row, monitor, tmp_path / "ours", last=accumulate == 1)
    assert_same(row, plain, ours)
    assert any(name.startswith("ire/") for _, metrics in plain.parts["rows"] for name in metrics) is bool(
        others(Path())
    )
    (result,) = monitor.measurements
    without_sam = {"sgd_ratio", "coherence", "gap"}
    assert set(result.skipped) == (without_sam if together == "IRE" else set())
    assert result.density is not None
    assert len(result.layer_traces) == 22
    infinite = {tag for tag, value in result.values.items() if not math.isfinite(value)}
    assert infinite <= {tags.NOISE_SCALE}  # where noise hides the gradient
    assert len(said) == len(result.skipped)


class OnDemand(pl.Callback):
    """Measures at moments of the user's own, in the middle of an accumulation window too."""

    def __init__(self, monitor: SharpnessMonitor | None) -> None:
        self.monitor = monitor

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None and trainer.global_step < 3:
            self.monitor.measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, pl_module)


@pytest.mark.parametrize("together", ["alone", "IRE"])
def test_measurements_on_demand_between_the_batches_of_a_step(together: str, tmp_path: Path) -> None:
    def trained(monitor: Any, folder: Path) -> Record:
        ire = [IRE(kappa=2.0, gamma=0.6, interval=1, perturbation=SAM(0.05))] if together == "IRE" else []
        row = Row("", "", trainer=lambda: {"accumulate_grad_batches": 3}, callbacks=lambda _: [*ire, OnDemand(monitor)])
        return run(row, monitor, folder)

    monitor = Monitored(every_n_epochs=None, quantities=CHEAP, **FEW)
    plain = trained(None, tmp_path / "plain")
    assert_same(Row("", ""), plain, trained(monitor, tmp_path / "ours"))
    assert len(monitor.measurements) > 15
    assert not any(result.skipped for result in monitor.measurements)


# Failures


class Troubled(Subject):
    """Its step has trouble in measurements: `trouble(module, which measurement, which call in it)`."""

    def __init__(self, trouble: Any) -> None:
        super().__init__(Net(batch_norm=True, dropout=0.3))
        self.trouble, self.calls, self.inside_calls = trouble, 0, cases.Notes([0])

    def step(self, batch: Any, batch_idx: int) -> Any:
        if "inside" in vars(self):
            self.inside_calls += [0] * (self.inside - len(self.inside_calls) + 1)
            self.inside_calls[self.inside] += 1
            with torch.no_grad():  # what a step may do before it fails
                self.memory.add_(1.0)
                self.net[1].running_mean.mul_(2.0)
                torch.rand(3)
            self.trouble(self, self.inside, self.inside_calls[self.inside])
        return super().step(batch, batch_idx)


def out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")


def user_error(*args: Any) -> None:
    raise KeyError("no such thing")


def with_trouble(trouble: Any, tmp_path: Path, quantities: Any = CHEAP, **settings: Any) -> tuple[Monitored, list[str]]:
    """A run with trouble in its measurements, which has to be the run without measurements."""
    row = Row("trouble", "", lambda: Troubled(trouble))
    monitor = Monitored(every_n_steps=4, every_n_epochs=None, quantities=quantities, **{**FEW, **settings})
    plain = run(row, None, tmp_path / "plain")
    with cases.monitor_warnings() as said:
        ours = run(row, monitor, tmp_path / "ours")
    assert_same(row, plain, ours)
    assert len(monitor.measurements) == 3
    return monitor, said


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_measurement_out_of_memory_is_skipped_with_the_sizes_and_the_next_is_tried(call: int, tmp_path: Path) -> None:
    def trouble(module: Any, measurement: int, number: int) -> None:
        if measurement < 3 and number == call:
            out_of_memory()

    monitor, said = with_trouble(trouble, tmp_path)
    first, second, third = monitor.measurements
    assert len(first.skipped) == len(second.skipped) == 1
    assert first.skipped == second.skipped
    assert set(first.skipped.values()) == {"CUDA out of memory. Tried to allocate 20.00 GiB."}
    assert first.out_of_memory
    assert second.out_of_memory
    assert not third.out_of_memory
    assert not third.skipped
    assert {TAGS[name] for name in CHEAP} <= set(third.values)
    assert len(said) == 2  # the quantity, and the sizes, once in the run
    assert sum("8 samples in a batch, 108 parameters and up to 25 vectors of 0.0 MiB" in text for text in said) == 1


def test_products_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a reason to go over to differences of gradients."""
    with monkeypatch.context() as patch:
        patch.setattr(landscape, "hessian_product", out_of_memory)
        monitor, said = with_trouble(lambda *args: None, tmp_path)
    assert [set(result.skipped) for result in monitor.measurements] == [
        {"trace_hessian", "lambda_max", "stability"}
    ] * 3
    assert {tags.TRACE_FISHER, tags.ASCENT_GAP} <= set(monitor.last.values)
    assert sum("lower `batch_size`" in text for text in said) == 1
    assert not any("differences" in text for text in said)


def test_what_was_out_of_memory_is_freed_at_once() -> None:
    """No reference cycle holds the graph until the garbage collector comes by."""
    module = Classifier()
    trainer = cases.fit(module, max_steps=1)
    alive: list[Any] = []

    def step(batch: Any, batch_idx: int) -> Any:
        hidden = module.net(batch[0])
        alive.append(weakref.ref(hidden))
        out_of_memory()

    module.training_step = step
    gc.collect()
    gc.disable()
    try:
        with cases.monitor_warnings():
            SharpnessMonitor(**FEW).measure(trainer, module)
        assert alive
        assert [reference for reference in alive if reference() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_error_of_the_step_skips_what_it_was_needed_for(call: int, tmp_path: Path) -> None:
    """At one measurement: it says nothing about whether the loss can be differentiated twice."""

    def trouble(module: Any, measurement: int, number: int) -> None:
        if measurement == 2 and number >= call:
            user_error()

    monitor, said = with_trouble(trouble, tmp_path)
    first, second, third = monitor.measurements
    assert not first.skipped
    assert not third.skipped
    assert second.skipped
    assert set(second.skipped.values()) == {"'no such thing'"}
    assert len(said) == len(second.skipped)
    assert not any("differences" in text for text in said)
    assert monitor._exact


def test_what_the_data_of_the_probe_took_is_freed_at_once() -> None:
    class Large(Classifier):
        def probe_dataloader(self) -> Any:
            large = torch.ones(3)
            alive.append(weakref.ref(large))
            raise OSError("the disk is gone")

    module, alive = Large(), []
    trainer = cases.trainer(max_steps=1)
    trainer.fit(module, cases.loader(cases.data()))
    gc.collect()
    gc.disable()
    try:
        with cases.monitor_warnings() as said:
            SharpnessMonitor().measure(trainer, module)
        assert len(said) == len(alive) == 1
        assert alive[0]() is None
    finally:
        gc.enable()


class Troublesome(TensorDataset):
    """Raises when the probe reads it."""

    reading = False

    def __getitem__(self, index: Any) -> Any:
        if Troublesome.reading:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("where", ["dataset", "probe_dataloader", "loader of its own"])
def test_an_error_of_the_probes_data_skips_everything(where: str, tmp_path: Path) -> None:
    class Module(Troubled):
        def __init__(self) -> None:
            super().__init__(lambda *args: None)
            if where == "dataset":
                return
            self.probe_dataloader = self.fails if where == "probe_dataloader" else self.fails_later

        def fails(self) -> Any:
            torch.rand(1)
            raise OSError("the disk is gone")

        def fails_later(self) -> Any:
            random.random()
            yield from ()
            self.fails()

    class Reads(Monitored):
        def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
            Troublesome.reading = where == "dataset"
            try:
                return super().measure(trainer, module)
            finally:
                Troublesome.reading = False

    row = Row(
        "data",
        "",
        Module,
        train=lambda module: DataLoader(Troublesome(*cases.data(44).tensors), batch_size=8, shuffle=True),
    )
    monitor = Reads(every_n_steps=4, quantities=CHEAP, **FEW)
    plain = run(row, None, tmp_path / "plain")
    with cases.monitor_warnings() as said:
        ours = run(row, monitor, tmp_path / "ours")
    assert_same(row, plain, ours)
    assert [text for text in said if text] == ["SharpnessMonitor skips everything: the disk is gone"]
    assert all(result.skipped == dict.fromkeys(CHEAP, "the disk is gone") for result in monitor.measurements)
    assert monitor.measurements[0].values == {}


@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_weights_that_are_not_numbers(hvp: str, tmp_path: Path) -> None:
    class Diverges(Subject):
        def step(self, batch: Any, batch_idx: int) -> Any:
            if self.training_steps == 3:
                with torch.no_grad():
                    self.net[0].weight.fill_(math.nan)
            return super().step(batch, batch_idx)

    row = Row("nan", "", Diverges)
    monitor = Monitored(every_n_steps=3, quantities=cases.BARE, hvp=hvp, **FEW)
    plain = run(row, None, tmp_path / "plain")
    with cases.monitor_warnings() as said:
        ours = run(row, monitor, tmp_path / "ours")
    assert_same(row, plain, ours)
    assert math.isnan(monitor.last.values[tags.TRACE_HESSIAN])
    assert math.isnan(monitor.last.values[tags.LAMBDA_MAX])
    assert "finite products" in monitor.last.skipped["spectral_density"]
    assert len(said) == len(monitor.last.skipped)


def test_a_module_whose_only_trainable_parameter_is_empty(tmp_path: Path) -> None:
    module = Classifier()
    module.requires_grad_(False)
    module.empty = nn.Parameter(torch.zeros(0))
    trainer = cases.fit(Classifier(), max_steps=1)
    monitor = SharpnessMonitor(quantities=QUANTITIES, **FEW)
    with cases.monitor_warnings():
        result = monitor.measure(trainer, module)
    assert {"lambda_max", "spectral_density", "stability"} <= set(result.skipped)


# Ctrl-C


def state_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    return {
        **Recorder.look(trainer),
        "modes": {name: child.training for name, child in module.named_modules()},
        "identities": [(id(p), id(p.grad)) for p in module.parameters()] + [id(b) for b in module.buffers()],
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "results": (id(trainer.fit_loop.epoch_loop._results), repr(trainer.fit_loop.epoch_loop._results)),
    }


class Bar:
    """A progress bar that is interrupted."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def update(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("hvp", cases.first_at_once(["exact", "finite_difference"]))
@pytest.mark.parametrize("where", cases.first_at_once(["step", "tick"]))
def test_an_interrupt_in_a_measurement_leaves_the_module_as_it_was(
    hvp: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sampled moments, in all quantities; gradients are there, as between the micro-batches of a step."""
    module = Subject(nn.Sequential(Attentive(), parametrizations.spectral_norm(nn.Linear(CLASSES, CLASSES))))
    module.recorder = Recorder()
    trainer = cases.trainer(max_steps=3, max_epochs=-1)
    trainer.fit(module, shuffled_loader())
    monitor = SharpnessMonitor(quantities=CHEAP, num_batches=2, mode="train", hvp=hvp, **FEW)
    bar = Bar(-1)
    monkeypatch.setattr(monitor, "_progress_bar", lambda *args: bar)
    calls = 0
    step = module.step

    def interrupted(batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        loss = step(batch, batch_idx)
        if calls == at:
            raise KeyboardInterrupt
        return loss

    at = 0
    module.step = interrupted
    before = state_of(trainer, module)
    monitor.measure(trainer, module)
    assert not monitor.last.skipped
    assert not list(cases.differences(before, state_of(trainer, module)))
    total = calls if where == "step" else bar.count
    for moment in sorted({1, 2, 3, *range(5, total, max(total // 6, 1)), total}):
        bar.at, bar.count, calls, at = (moment, 0, 0, 0) if where == "tick" else (-1, 0, 0, moment)
        with pytest.raises(KeyboardInterrupt):
            monitor.measure(trainer, module)
        assert not list(cases.differences(before, state_of(trainer, module)))


# When


class Counts(Subject):
    """Logs how many steps there were, in each batch and as an epoch's mean."""

    def step(self, batch: Any, batch_idx: int) -> Any:
        self.log("before", float(self.trainer.global_step), on_step=True, on_epoch=False)
        self.log("epoch_mean", 1.0, on_step=False, on_epoch=True)
        return super().step(batch, batch_idx)


TIMES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "epochs": ({}, {}, [6, 12]),
    "every second epoch": ({"every_n_epochs": 2}, {"max_epochs": 3}, [12]),
    "steps": ({"every_n_steps": 5, "every_n_epochs": None}, {}, [5, 10]),
    "both": ({"every_n_steps": 4, "every_n_epochs": 1}, {}, [4, 6, 8, 12]),
    "accumulated": ({"every_n_steps": 1, "every_n_epochs": 1}, {"accumulate_grad_batches": 4}, [1, 2, 3, 4]),
    "max_steps": ({"every_n_steps": 3}, {"max_steps": 8, "max_epochs": -1}, [3, 6, 8]),
    "never": ({"every_n_epochs": None}, {}, []),
}


@pytest.mark.parametrize("name", TIMES)
def test_moments_of_measurements_and_their_steps_in_the_loggers(name: str, tmp_path: Path) -> None:
    """The step is that of Lightning's own metrics of the same batch or epoch, in every logger."""
    settings, kwargs, expected = TIMES[name]
    monitor = Monitored(quantities=["ascent_gap"], **settings)
    rows, csv, board = cases.Rows(), CSVLogger(tmp_path), TensorBoardLogger(tmp_path, default_hp_metric=False)
    module = Counts()
    module.recorder = Recorder()
    trainer = cases.trainer([monitor, module.recorder], logger=[rows, csv, board], default_root_dir=tmp_path, **kwargs)
    trainer.fit(module, shuffled_loader(), shuffled_loader(16))  # with the sanity check
    assert [result.step for result in monitor.measurements] == expected
    of_batches = {int(metrics["before"]) + 1: step for step, metrics in rows.rows if "before" in metrics}
    of_epochs = [step for step, metrics in rows.rows if "epoch_mean" in metrics]
    every = monitor.every_n_steps
    by_step = [step for step in expected if every and step % every == 0]
    ends = [step for step in expected if step not in by_step]
    found = [(step, metrics[tags.ASCENT_GAP]) for step, metrics in rows.rows if tags.ASCENT_GAP in metrics]
    assert [value for _, value in found] == [result.values[tags.ASCENT_GAP] for result in monitor.measurements]
    for (step, _), count in zip(found, expected, strict=True):
        assert step == of_batches[count]
        assert count not in ends or step in of_epochs
    board.finalize("success")
    reader = EventAccumulator(board.log_dir).Reload()
    if expected:
        assert [event.step for event in reader.Scalars(tags.ASCENT_GAP)] == [step for step, _ in found]
        assert {event.step for event in reader.Scalars("epoch_mean")} == set(of_epochs)
        lines = list(csv_reader(Path(csv.log_dir) / "metrics.csv"))
        assert [int(line["step"]) for line in lines if line[tags.ASCENT_GAP]] == [step for step, _ in found]
        assert float(trainer.callback_metrics[tags.ASCENT_GAP]) == pytest.approx(found[-1][1])
    else:
        assert tags.ASCENT_GAP not in trainer.callback_metrics


def csv_reader(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="") as file:
        yield from DictReader(file)


def test_checkpoints_and_stopping_by_a_measured_number(tmp_path: Path) -> None:
    class Scripted(SharpnessMonitor):
        """Gives numbers whose best is known."""

        def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
            result = super().measure(trainer, module)
            result.values[tags.TRACE_HESSIAN] = [3.0, 1.0, 2.0, 4.0, 5.0][trainer.current_epoch]
            return result

    best = ModelCheckpoint(tmp_path, "{epoch}", monitor=tags.TRACE_HESSIAN, save_on_train_epoch_end=True)
    stop = EarlyStopping(tags.TRACE_HESSIAN, patience=2, check_on_train_epoch_end=True)
    monitor = Scripted(quantities=["trace_hessian"], **FEW)
    trainer = cases.fit(Classifier(), [best, monitor, stop], max_epochs=5, enable_checkpointing=True)
    assert float(best.best_model_score) == 1.0
    assert Path(best.best_model_path).name == "epoch=1.ckpt"
    assert trainer.current_epoch == 4  # two without a better one


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}])
def test_short_and_bare_runs(settings: dict[str, Any], tmp_path: Path) -> None:
    monitor = SharpnessMonitor(every_n_steps=1, quantities=CHEAP, **FEW)
    trainer = pl.Trainer(callbacks=[monitor], accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **settings)
    trainer.fit(Classifier(), cases.loader(cases.data()))
    assert (monitor.last is None) is ("barebones" in settings)
    assert list(tmp_path.iterdir()) == []


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        if stage == "fit":
            self.train = cases.data(32)

    def train_dataloader(self) -> DataLoader:
        return cases.loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return cases.loader(cases.data(16, seed=2))


class Validated(Classifier):
    inference_mode = True

    def __init__(self, *args: Any) -> None:
        super().__init__(Net(batch_norm=True, dropout=0.3), *args)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled() is self.inference_mode
        assert not torch.is_grad_enabled()
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class WithData(Validated):
    def train_dataloader(self) -> DataLoader:
        return cases.loader(cases.data(32))


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("where", ["datamodule", "module", "val only"])
def test_validate_measures_too(where: str, inference_mode: bool, tmp_path: Path) -> None:
    """In inference mode too; the same numbers as during a fit at these weights, and everything as it was."""
    module = WithData() if where == "module" else Validated()
    quantities = [name for name in CHEAP if name != "stability"]
    monitor = SharpnessMonitor(quantities=quantities, **FEW)
    data = {"datamodule": Data()} if where == "datamodule" else {"dataloaders": Data().val_dataloader()}
    random_before = cases.random_streams()
    module.inference_mode = inference_mode
    plain = cases.trainer(inference_mode=inference_mode).validate(module, **data, verbose=False)[0]
    random_after, before = cases.random_streams(), copy.deepcopy(module.state_dict())
    data = {"datamodule": Data()} if where == "datamodule" else {"dataloaders": Data().val_dataloader()}
    trainer = cases.trainer([monitor], logger=(rows := cases.Rows()), inference_mode=inference_mode)
    with cases.monitor_warnings() as said:
        (found,) = trainer.validate(module, **data, verbose=False)
    assert (random_before == random_after) == (random_after == cases.random_streams())
    assert not list(cases.differences(before, module.state_dict()))
    assert not any(parameter.grad is not None or parameter.is_inference() for parameter in module.parameters())
    assert found["val_loss"] == plain["val_loss"]
    assert rows.rows[-1][1].keys() >= found.keys()
    if where == "val only":
        assert found.keys() == plain.keys()
        assert len(said) == 1
        assert "no training data to take the probe from" in said[0]
        return
    assert not said
    assert found == pytest.approx(plain | monitor.last.values)
    assert {TAGS[name] for name in quantities} <= set(found)
    fitted = SharpnessMonitor(quantities=quantities, **FEW)
    cases.fit(module, [fitted], cases.loader(cases.data(32)), max_epochs=1, limit_train_batches=1)
    module.load_state_dict(before)
    again = fitted.measure(trainer, module)
    assert again.values == monitor.last.values


def test_stability_is_skipped_where_there_is_no_optimizer() -> None:
    monitor = SharpnessMonitor(quantities=["stability", "sgd_ratio"])
    with cases.monitor_warnings() as said:
        cases.trainer([monitor]).validate(WithData(), Data().val_dataloader(), verbose=False)
    assert set(monitor.last.skipped.values()) == {"there is no optimizer outside of fit"}
    assert len(said) == 2


def test_a_monitor_that_never_measures_by_itself_is_silent_in_validate() -> None:
    monitor = SharpnessMonitor(every_n_epochs=None)
    (found,) = cases.trainer([monitor]).validate(WithData(), Data().val_dataloader(), verbose=False)
    assert set(found) == {"val_loss"}
    assert monitor.last is None


def test_on_demand_after_a_fit_and_copies_of_a_monitor() -> None:
    module = Classifier()
    monitor = SharpnessMonitor(quantities=CHEAP, **FEW)
    trainer = cases.fit(module, [monitor], max_epochs=1)
    last = monitor.last
    assert {TAGS[name] for name in CHEAP} <= set(last.values)
    before = state_of(trainer, module)
    for other in (monitor, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert other.last.values == last.values
        assert (other._probe is None) is (other is not monitor)
        assert other.measure(trainer, module).values == last.values
        assert (other.state_key, other.seed, other.quantities) == ("SharpnessMonitor", 0, tuple(CHEAP))
    assert not list(cases.differences(before, state_of(trainer, module)))
    assert monitor.state_dict() == {}


def test_one_monitor_in_two_fits() -> None:
    """Each has its own probe, and says again what it cannot do."""
    monitor = SharpnessMonitor(quantities=[*CHEAP, "sgd_ratio"], **FEW)
    rmsprop = Classifier(optimizer=lambda module: torch.optim.RMSprop(module.parameters()))
    other = SharpnessMonitor(quantities=[*CHEAP, "sgd_ratio"], **FEW)
    for one, module in ((monitor, rmsprop), (monitor, copy.deepcopy(rmsprop)), (other, copy.deepcopy(rmsprop))):
        data = cases.data(seed=1 if module is rmsprop else 4)
        with cases.monitor_warnings() as said:
            cases.fit(module, [one], cases.loader(data), max_epochs=1)
        assert len(said) == 2
    assert monitor.last.values == other.last.values


class WithNorm(Manual):
    def __init__(self) -> None:
        super().__init__(Net(batch_norm=True, dropout=0.3))


class WithNormAndLoss(WithNorm):
    def sharpness_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_manual_optimization_needs_a_method_for_the_loss() -> None:
    module = WithNorm()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match=r"WithNorm, which is in manual.*`sharpness_loss") as error:
        cases.fit(module, [SharpnessMonitor()])
    assert "\n" not in str(error.value)
    assert not list(cases.differences(before, module.state_dict()))
    plain, ours = WithNormAndLoss(), WithNormAndLoss()
    ours.load_state_dict(plain.state_dict())
    cases.fit(plain)
    monitor = SharpnessMonitor(every_n_steps=3, quantities=CHEAP, **FEW)
    trainer = cases.fit(ours, [monitor])
    cases.assert_same_bits(plain, ours)
    automatic = Classifier(Net(batch_norm=True, dropout=0.3))
    automatic.load_state_dict(ours.state_dict())
    for tag, value in monitor.measure(trainer, automatic).values.items():
        assert tag in tags.STABILITY_TAGS or "stability" in tag or value == monitor.measure(trainer, ours).values[tag]


def test_validate_of_a_module_in_manual_optimization_keeps_its_result() -> None:
    """Without the method nothing is measured, which is said; the batches' result is not lost."""
    for module, measured in ((WithNorm(), False), (WithNormAndLoss(), True)):
        module.validation_step = lambda batch, batch_idx, module=module: module.log("val_loss", torch.tensor(3.0))
        monitor = SharpnessMonitor(quantities=["ascent_gap"])
        module.train_dataloader = lambda: cases.loader(cases.data())
        with cases.monitor_warnings() as said:
            (found,) = cases.trainer([monitor]).validate(module, cases.loader(cases.data()), verbose=False)
        assert found["val_loss"] == 3.0
        assert (tags.ASCENT_GAP in found, monitor.last is not None) == (measured, measured)
        assert [re.sub("method.*", "", text) for text in said] == [
            "SharpnessMonitor skips everything: Expected WithNorm, which is in manual optimization, to have a "
        ] * (not measured)


MEETING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    "epochs": ({}, {}, {}, True),
    "every second and third epoch of two": ({"every_n_epochs": 2}, {"every_n_epochs": 3}, {}, False),
    "every second and third epoch of six": ({"every_n_epochs": 2}, {"every_n_epochs": 3}, {"max_epochs": 6}, True),
    "steps": ({"every_n_steps": 4, "every_n_epochs": None}, {"every_n_steps": 6, "every_n_epochs": None}, {}, True),
    "few steps": (
        {"every_n_steps": 4, "every_n_epochs": None},
        {"every_n_steps": 6, "every_n_epochs": None},
        {"max_steps": 8, "max_epochs": -1},
        False,
    ),
    "steps at the end of an epoch": ({"every_n_steps": 4, "every_n_epochs": None}, {}, {}, True),
    "steps within an epoch": ({"every_n_steps": 5, "every_n_epochs": None}, {}, {}, False),
    "accumulated": ({"every_n_steps": 3, "every_n_epochs": None}, {}, {"accumulate_grad_batches": 3}, True),
    "another quantity": ({"quantities": ["ascent_gap"]}, {}, {}, False),
    "one never": ({"every_n_epochs": None}, {}, {}, False),
}


@pytest.mark.parametrize("name", MEETING)
def test_two_monitors_do_not_measure_the_same_at_the_same_time(name: str) -> None:
    """Eight batches in an epoch."""
    one, other, kwargs, refused = MEETING[name]
    few = {"quantities": ["trace_fisher", "lambda_max"], **FEW}
    monitors = [SharpnessMonitor(**{**few, **settings}) for settings in (one, other)]
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with (
        pytest.raises(ConfigurationError, match="got trace_fisher, lambda_max from two") if refused else nullcontext()
    ) as error:
        cases.fit(module, monitors, **kwargs)
    if refused:
        assert "\n" not in str(error.value)
        assert not list(cases.differences(before, module.state_dict()))


def test_two_monitors_of_the_same_in_validate_are_refused_before_the_batches() -> None:
    module = WithData()
    module.validation_step = lambda batch, batch_idx: pytest.fail("a batch ran")
    with pytest.raises(ConfigurationError, match="got lambda_max from two"):
        cases.trainer([SharpnessMonitor(quantities=["lambda_max"]), SharpnessMonitor()]).validate(
            module, Data().val_dataloader()
        )


# The user's data


SEEN: list[int] = []
TOTAL = 0


class Augmented(Dataset):
    """Draws from generators of its own, counts, and keeps what it has made."""

    made = 0  # of the class

    def __init__(self, kind: str) -> None:
        self.x, self.y = cases.data(32).tensors
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(5),
            "numpy": lambda: np.random.default_rng(5),
            "numpy, the old one": lambda: np.random.RandomState(5),
            "python": lambda: random.Random(5),
        }[kind]()
        self.drawn, self.cache, self.uses = 0, {}, torch.zeros(32)
        self.words = io.BytesIO(bytes(range(256)) * 8)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.drawn += 1
        type(self).made += 1
        self.uses[index] += 1
        noise = torch.rand((), generator=self.generator) if isinstance(self.generator, torch.Generator) else (
            self.generator.normal() if hasattr(self.generator, "normal") else self.generator.random()
        )  # fmt: skip
        word = self.words.read(1)[0] / 256
        self.cache.setdefault(index, float(noise))  # what is drawn first stays
        return self.x[index] + float(noise) + self.cache[index] + word, self.y[index]


class Collate:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: Any) -> Any:
        self.calls += 1
        x, y = default_collate(samples)
        return x + 0.01 * self.calls, y


def counting() -> Any:
    """Functions that count, in each of the places where one can keep a count."""
    calls, total = [], 0

    def collate(samples: Any, at: Any = [0]) -> Any:  # noqa: B006
        global TOTAL
        nonlocal total
        total, TOTAL = total + 1, TOTAL + 1
        at[0] += 1
        calls.append(at[0])
        SEEN.append(1)
        collate.calls = getattr(collate, "calls", 0) + 1
        x, y = default_collate(samples)
        return x + 0.01 * (total + TOTAL + at[0] + len(calls) + len(SEEN) + collate.calls), y

    return collate


@pytest.mark.parametrize("kind", ["torch", "numpy", "numpy, the old one", "python"])
@pytest.mark.parametrize("make", [Collate, counting, lambda: partial(Collate.__call__, Collate())])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_with_a_state_of_its_own_is_left_as_it_was(kind: str, make: Any, workers: int) -> None:
    global TOTAL
    found = []
    for callbacks in ([], [SharpnessMonitor(quantities=["ascent_gap"], num_batches=2)]):
        SEEN.clear()
        TOTAL = Augmented.made = 0
        data = Augmented(kind)
        torch.manual_seed(1)
        module = Classifier()
        loader = DataLoader(Subset(data, range(30)), 8, shuffle=True, collate_fn=make(), num_workers=workers)
        cases.fit(module, callbacks, loader)
        kept = (data.drawn, data.cache, data.uses.tolist(), data.words.tell(), len(SEEN), TOTAL, Augmented.made)
        found.append((module.state_dict(), kept))
    assert not list(cases.differences(*found))


def test_a_loader_that_is_iterated_for_the_probe_is_left_as_it_was() -> None:
    """`probe_dataloader` may give what training uses, without an index too."""

    class Stream(IterableDataset):
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(2)

        def __iter__(self) -> Iterator[Any]:
            for _ in range(16):
                yield torch.randn(FEATURES, generator=self.generator), torch.tensor(1)

    found = []
    for callbacks in ([], [SharpnessMonitor(quantities=["ascent_gap"])]):
        torch.manual_seed(1)
        module, stream = Classifier(), Stream()
        module.probe_dataloader = lambda stream=stream: DataLoader(stream, 8)
        cases.fit(module, callbacks, DataLoader(stream, 8))
        found.append(module.state_dict())
    assert not list(cases.differences(*found))


def test_what_is_put_back_without_looking_at_data() -> None:
    """Large arrays are shared, long lists are not looked into; objects that cannot be looked at do not matter."""

    class Stubborn:
        __slots__ = ("count",)

        def __init__(self) -> None:
            self.count = [1]

    class Odd:
        @property
        def __dict__(self) -> Any:
            raise KeyError("no")

    large, long, slots = torch.zeros(1 << 19), [[0]] * 20_000, Stubborn()
    order, words = collections.OrderedDict(a=1, b=2), collections.deque([1, 2], maxlen=2)
    holder = {"large": large, "long": long, "slots": slots, "order": order, "words": words, "odd": Odd(), "set": {1}}

    def use() -> None:
        large.add_(1)
        long[0].append(1)
        long.append([2])
        slots.count = [2]
        order.move_to_end("a")
        words.append(3)
        holder["set"].add(2)
        holder["new"] = 1
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), kept(holder):
        use()
    assert large.sum() == 1 << 19
    assert (len(long), long[0]) == (20_000, [0, 1])
    assert slots.count == [1]
    assert list(order) == ["a", "b"]
    assert words == collections.deque([1, 2])
    assert (holder["set"], "new" in holder) == ({1}, False)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, XLAStrategy])
def test_other_strategies_are_refused(strategy: type) -> None:
    with pytest.raises(ConfigurationError, match=f"got {strategy.__name__}, .*set `trainer.strategy` to") as error:
        SharpnessMonitor().on_fit_start(cases.under(strategy), Classifier())
    assert "\n" not in str(error.value)


class WithoutRate(torch.optim.Optimizer):
    """Finds its step size by itself."""

    def __init__(self, parameters: Any, lr: float | None) -> None:
        super().__init__(parameters, {} if lr is None else {"lr": None})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize("lr", [None, 0.0])
def test_optimizers_without_a_learning_rate(lr: float | None) -> None:
    module = Classifier(optimizer=lambda module: WithoutRate(module.parameters(), lr))
    monitor = SharpnessMonitor(quantities=CHEAP, **FEW)
    with cases.monitor_warnings() as said:
        cases.fit(module, [monitor], max_epochs=1)
    assert set(monitor.last.skipped) == {"stability"}
    assert len(said) == 1
