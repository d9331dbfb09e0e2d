"""What is shown of the mask: the table of a dry run, and TensorBoard's histogram of the parameters' flat fractions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from modules import Classifier, Net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ire import (
    IRE,
    SAM,
    AverageSAM,
    ConfigurationError,
    Curvature,
    EmpiricalFisher,
    HutchinsonHessian,
    RandomMask,
    SampledFisher,
    SecondMoment,
    tags,
)

CURVATURES: dict[str, Callable[[], Curvature]] = {
    "sampled": SampledFisher,
    "sampled-part": lambda: SampledFisher(fraction=0.5),
    "empirical": EmpiricalFisher,
    "hessian": HutchinsonHessian,
    "random": RandomMask,
}


def rows_of(printed: str) -> dict[str, tuple[int, int]]:
    """Name to (coordinates, flat) of a printed table; what takes no part is left out."""
    lines = re.findall(r"^(\S.*?)  +[^,\n]*?([\d,]+) +([\d,]+) +[\d.]+ %$", printed, re.MULTILINE)
    return {name.split("  ")[0]: (int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in lines}


class FirstMask(pl.Callback):
    """The masks after the first step of a run that trains."""

    def __init__(self, ire: IRE) -> None:
        self.ire = ire
        self.counts: dict[str, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.counts:
            masks = self.ire._progress.masks.masks
            self.counts = {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES.keys())
def test_a_dry_run_shows_the_first_mask_of_the_run(curvature: Any, accumulate: int, capsys: Any) -> None:
    module = Classifier(Net(batch_norm=True))
    trained = cases.clone(module)
    settings = {"gamma": 0.6, "curvature": curvature(), "perturbation": SAM(0.1), "exclude": "*.bias"}
    ire = IRE(kappa=1.0, **settings)
    look = FirstMask(ire)
    cases.fit(trained, [ire, look], accumulate_grad_batches=accumulate)
    capsys.readouterr()
    before = cases.clone(module)
    trainer = cases.fit(module, [IRE(kappa=1.0, dry_run=True, **settings)], accumulate_grad_batches=accumulate)
    printed = capsys.readouterr().out
    shown = rows_of(printed)
    total = shown.pop("all that take part")
    assert {name: flat for name, (_, flat) in shown.items()} == look.counts
    assert total == (sum(size for size, _ in shown.values()), sum(look.counts.values()))
    assert total[1] == pytest.approx(0.6 * total[0], abs=1)
    assert re.search(r"net\.0\.bias +8 +8 +- +takes no part", printed)
    cases.assert_same_bits(module, before)
    assert trainer.global_step == 0
    assert not trainer.optimizers[0].state
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 0.0},
        {"kappa": 1.0, "start_epoch": 50},
        {"kappa": 1.0, "start_loss": 0.0},
        {"kappa": 1.0, "perturbation": AverageSAM(0.1)},
        {"kappa": 1.0, "interval": 7, "beta": 0.9, "kappa_schedule": "lr"},
    ],
)
@pytest.mark.parametrize("fit", [{}, {"min_epochs": 3, "max_epochs": 5}, {"min_steps": 9}, {"max_epochs": -1}])
def test_a_dry_run_waits_for_nothing_and_trains_nothing(settings: Any, fit: Any, capsys: Any, tmp_path: Path) -> None:
    module = Classifier()
    before = cases.clone(module)
    trainer = cases.fit(
        module, [IRE(dry_run=True, **settings)], enable_checkpointing=True, default_root_dir=tmp_path, **fit
    )
    assert rows_of(capsys.readouterr().out)["all that take part"][0] == 92
    assert trainer.global_step == 0
    assert list(tmp_path.rglob("*.ckpt")) == []
    cases.assert_same_bits(module, before)


def test_a_dry_run_at_a_checkpoint(capsys: Any, tmp_path: Path) -> None:
    """The second moment exists there, and the mask is that of the run's step."""

    def adam(module: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=0.01)

    module = Classifier(optimizer=adam)
    cases.fit(module, [], max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    settings = {"gamma": 0.5, "curvature": SecondMoment()}
    cases.fit(
        Classifier(optimizer=adam),
        [IRE(dry_run=True, **settings)],
        max_epochs=3,
        ckpt_path=str(tmp_path / "plain.ckpt"),
    )
    printed = capsys.readouterr().out
    assert "step 8\n" in printed
    assert rows_of(printed)["all that take part"] == (92, 46)


def test_no_estimate_is_said(capsys: Any) -> None:
    module = Classifier(optimizer=lambda m: torch.optim.Adam(m.parameters()))
    cases.fit(module, [IRE(dry_run=True, curvature=SecondMoment())])
    assert "SecondMoment() has no finite estimate here" in capsys.readouterr().out


def test_manual_optimization_is_refused() -> None:
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic optimization for `dry_run`, got manual"):
        cases.fit(module, [IRE(dry_run=True)])


def test_the_table_after_a_fit() -> None:
    module = Classifier()
    ire = IRE(kappa=1.0, gamma=0.5, exclude="net.2.bias")
    cases.fit(module, [ire])
    table = ire.flat_table(module)
    assert rows_of(table)["all that take part"] == (88, 44)


def histograms(folder: str, tag: str = tags.LAYER_FLAT_FRACTIONS) -> list[Any]:
    events = EventAccumulator(folder, size_guidance={"histograms": 0}).Reload()
    return events.Histograms(tag) if tag in events.Tags()["histograms"] else []


def test_the_histogram_counts_each_parameter_once(tmp_path: Path) -> None:
    """One at every logged row after a new mask, at the row's step; its sum is that of the parameters' fractions."""
    module = Classifier()
    ire = IRE(kappa=1.0, gamma=0.7, interval=3)
    logger = TensorBoardLogger(tmp_path)
    sums = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            masks = ire._progress.masks.masks.values()
            sums[trainer.global_step - 1] = sum(float(mask.float().mean()) for mask in masks)

    cases.fit(module, [ire, Look()], max_epochs=1, logger=logger)
    written = histograms(logger.log_dir)
    assert [one.step for one in written] == [0, 3, 6]
    for one in written:
        value = one.histogram_value
        assert value.num == 4
        assert value.sum == pytest.approx(sums[one.step], rel=1e-6)
        assert sum(value.bucket) == 4
        assert (value.min, value.max) >= (0.0, 0.0)
        assert max(value.bucket_limit) <= 1.0


def test_no_histogram_without_a_mask_or_without_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    cases.fit(Classifier(), [IRE(kappa=0.0, perturbation=SAM(0.1))], max_epochs=1, logger=logger)
    assert histograms(logger.log_dir) == []
    cases.fit(Classifier(), [IRE(kappa=1.0)], max_epochs=1, logger=False)
