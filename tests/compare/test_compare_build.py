"""The functions for those without our command line, with real trainings of a tiny network."""

import json
import math
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ire import IRE, SAM, ConfigurationError, SampledFisher
from lightning_ire.compare import Design, Method, Range, RunRecord, compare


class Regression(pl.LightningModule):
    """A line through points with noise; logs its validation loss."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = nn.Linear(4, 1), lr
        nn.init.normal_(self.net.weight, std=0.01)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch) + 1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Points(pl.LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 4, generator=generator)
        y = x.sum(1) + 0.1 * torch.randn(64, generator=generator)
        self.train, self.val = (TensorDataset(x[part], y[part]) for part in (slice(32), slice(32, 64)))

    def train_dataloader(self) -> Any:
        return cases.loader(self.train, batch_size=8)

    def val_dataloader(self) -> Any:
        return cases.loader(self.val, batch_size=32)

    test_dataloader = val_dataloader


CALLS: list[dict[str, Any]] = []
LR = {"lr": Range(1e-3, 0.3, log=True)}
METHODS = [
    Method("SGD"),
    Method("SAM", {"sam": True}, {"rho": Range(0.01, 0.1, log=True)}),
    Method("weak", {"lr": 1e-5}),
]


def build(settings: dict[str, Any]) -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    CALLS.append(settings)
    callbacks = [IRE(kappa=0, perturbation=SAM(settings["rho"]))] if settings.get("sam") else []
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    arguments = {"max_epochs": 3, "accelerator": "cpu", "callbacks": callbacks, "num_sanity_val_steps": 0, **quiet}
    return Regression(settings["lr"]), Points(0), arguments


def study(folder: Path, **settings: Any) -> Any:
    CALLS.clear()
    known = {"trials": 4, "seeds": 3, "metric": "val/loss", "mode": "min", "folder": folder}
    return compare(build, METHODS, LR, **{**known, **settings})


@pytest.mark.slow
def test_a_crippled_method_loses_and_a_finished_study_runs_nothing(tmp_path: Path, capsys) -> None:
    found = study(tmp_path, report="test/loss", trials=8)
    assert len(CALLS) == 3 * (8 + 3)
    _, weak = found.comparisons
    assert (weak.treated, weak.base) == ("weak", "SGD")
    assert weak.clear
    assert weak.difference.mean > 0.5
    assert "weak is worse than SGD by " in found.sentence
    assert "at 1.00 times the passes" in found.sentence
    assert found.report.read_text().count("data:image/png") == 3
    assert all(call["lr"] == 1e-5 for call in CALLS if "sam" not in call and "rho" not in call and call["lr"] < 1e-3)
    capsys.readouterr()
    assert study(tmp_path, report="test/loss", trials=8) == found
    assert CALLS == []


def test_passes_steps_and_curves_are_counted(tmp_path: Path) -> None:
    records = {}
    for name in ("SGD", "SAM"):
        record = RunRecord()
        module, data, arguments = build({"lr": 0.1, "seed": 0, "sam": name == "SAM", "rho": 0.1})
        own = module.training_step
        pl.Trainer(**{**arguments, "callbacks": [*arguments["callbacks"], record]}).fit(module, data)
        assert module.training_step == own
        records[name] = record
    values = records["SGD"].values
    assert (values["compare/passes"], values["compare/steps"], values["compare/epochs"]) == (12, 12, 3)
    assert records["SAM"].values["compare/passes"] == 24
    assert not any(parameter._backward_hooks for parameter in module.parameters())
    assert [passes for passes, _ in records["SAM"].curve] == [8, 16, 24]
    assert records["SGD"].curve[-1][1] == pytest.approx(values["val/loss"])


def test_a_run_is_stopped_at_its_share_and_a_resumed_one_counts_on(tmp_path: Path) -> None:
    module, data, arguments = build({"lr": 0.1, "seed": 0})
    record = RunRecord(stop_after=1 / 3)
    trainer = pl.Trainer(**{**arguments, "callbacks": [record]})
    trainer.fit(module, data)
    assert record.values["compare/steps"] == 4
    assert "val/loss" in record.values  # validated where it is stopped
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    record = RunRecord()
    module, data, arguments = build({"lr": 0.1, "seed": 0})
    pl.Trainer(**{**arguments, "callbacks": [record]}).fit(module, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert (record.values["compare/passes"], record.values["compare/steps"]) == (12, 12)
    assert len(record.curve) == 3


def test_a_run_that_ends_inside_an_epoch_is_validated_at_its_end() -> None:
    module, data, arguments = build({"lr": 0.1, "seed": 0})
    record = RunRecord()
    pl.Trainer(**{**arguments, "max_steps": 6, "callbacks": [record]}).fit(module, data)
    assert [passes for passes, _ in record.curve] == [4, 6]


@pytest.mark.slow
def test_a_run_that_raises_is_one_line_and_ends_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    plain = Regression.training_step

    def fails(self: Regression, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.lr == 1e-5:
            raise RuntimeError("too\nweak")
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Regression, "training_step", fails)
    found = study(tmp_path, trials=2, seeds=2)
    assert [each.treated for each in found.comparisons] == ["SAM"]
    assert "failed: weak, trial 0, seed 1000: RuntimeError: too weak\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_diverged_run_is_the_worst(tmp_path: Path, monkeypatch) -> None:
    def diverges(self: Regression, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(math.nan) if self.lr < 1e-2 else self.loss(batch))

    monkeypatch.setattr(Regression, "validation_step", diverges)
    found = study(tmp_path, seeds=2)
    assert [each.treated for each in found.comparisons] == ["SAM"]
    assert "runs of weak diverged (NaN or infinity)" in (tmp_path / "study" / "report.md").read_text()


def test_what_is_wrong_is_said_before_the_second_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`--metric` to be logged, got 'val/los': a run of SGD logs val/loss"):
        study(tmp_path, metric="val/los")
    assert len(CALLS) == 1
    with pytest.raises(ConfigurationError, match="begun with, got others"):
        study(tmp_path, metric="val/loss")
    with pytest.raises(ConfigurationError, match="at least two methods"):
        compare(build, METHODS[:1], LR, metric="val/loss", mode="min", folder=tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'trails'"):
        study(tmp_path, trails=3)
    with pytest.raises(ConfigurationError, match=r"`build` to return \(module, data, arguments of Trainer\), got None"):
        compare(lambda settings: None, METHODS, LR, metric="val/loss", mode="min", folder=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="`seed` to be left to the comparison"):
        compare(build, METHODS, LR | {"seed": Range(0, 1)}, metric="val/loss", mode="min", folder=tmp_path)
    with pytest.raises(ConfigurationError, match="`effect` to be a number > 0, got -1"):
        study(tmp_path, effect=-1)


def test_passes_of_an_estimate_count(tmp_path: Path) -> None:
    """SampledFisher makes one more every second step."""
    module, data, arguments = build({"lr": 1e-3, "seed": 0})
    record = RunRecord()
    ire = IRE(kappa=0.5, interval=2, curvature=SampledFisher())
    pl.Trainer(**{**arguments, "callbacks": [ire, record]}).fit(module, data)
    assert (record.values["compare/steps"], record.values["compare/passes"]) == (12, 18)


def test_equal_passes_are_half_the_steps_of_sam(tmp_path: Path) -> None:
    study(tmp_path, trials=1, seeds=2, budget="passes")
    lines = (tmp_path / "study" / "results.json").read_text()
    runs = json.loads(lines)["runs"]
    steps = {(run["method"], run["seed"] < 1000): run["logged"]["compare/steps"] for run in runs if run["seed"] < 2000}
    assert steps == {("SGD", True): 12, ("SGD", False): 12, ("SAM", True): 6, ("SAM", False): 6,
                     ("weak", True): 12, ("weak", False): 12}  # fmt: skip
    assert all(run["logged"]["compare/passes"] == 12 for run in runs if run["seed"] < 2000)


def test_designs_and_functions_take_the_same_settings() -> None:
    assert {"tuning_seeds", "budget", "on_top", "halving", "versus", "report_mode"} <= set(Design.__dataclass_fields__)
