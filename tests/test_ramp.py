"""Kappa that grows from 0 on the first boosted steps."""

import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Classifier
from torch import nn

from lightning_ire import IRE, ConfigurationError, IREStep, tags

STEPS = 8  # of an epoch
RAMP = {"kappa": 2.0, "gamma": 1.0, "kappa_schedule": "ramp"}


def logged(epochs: int = 2, **settings: Any) -> list[float | None]:
    """`ire/kappa` at each step of a run."""
    rows = cases.Rows()
    cases.fit(Classifier(), [IRE(**RAMP, **settings)], logger=rows, log_every_n_steps=1, max_epochs=epochs)
    return [row.get(tags.KAPPA) for _, row in rows.rows if tags.KAPPA in row]


@pytest.mark.parametrize(
    ("ramp", "count"), [(1, 1), (3, 3), (40, 40), (0.5, 8), (0.3, 4), (0.01, 1)], ids=lambda value: str(value)
)
def test_kappa_grows_by_equal_parts(ramp: Any, count: int) -> None:
    expected = [2.0 * min(1.0, (t + 1) / count) for t in range(2 * STEPS)]
    assert logged(ramp_steps=ramp) == pytest.approx(expected, rel=1e-6)


def test_it_grows_from_the_start_on() -> None:
    assert logged(ramp_steps=4, start_step=5) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 8, rel=1e-6)


def test_the_monitor_sees_the_next_step() -> None:
    model = Classifier()
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **RAMP, ramp_steps=4)
    batch = next(iter(cases.loader(cases.data())))
    for expected in (2.0, 2.5, 3.0, 3.0):
        step(cases.loss_of(model), batch)
        factors = step.boost_factors(model, step.optimizer)
        assert {float(factor.max()) for factor in factors.values()} == {expected}


@pytest.mark.parametrize("ramp", [11, 0.7])
def test_a_resumed_run_goes_on_growing(tmp_path: Path, ramp: Any) -> None:
    settings = RAMP | {"ramp_steps": ramp, "gamma": 0.7, "start_step": 2}
    torch.manual_seed(0)
    first = Classifier()
    second = cases.clone(first)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    cases.fit(first, [IRE(**settings), saving], enable_checkpointing=True)
    ire = IRE(**settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        cases.fit(second, [ire], ckpt_path=tmp_path / "epoch=0.ckpt")
    cases.assert_same_bits(first, second)
    assert ire._progress.step == 2 * STEPS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kappa_schedule": "ramp"},
            r"`ramp_steps` with `kappa_schedule='ramp'` and only there, got None.*set `ramp_st",
        ),
        ({"ramp_steps": 3}, r"got 3 with 'constant': set `kappa_schedule` to 'ramp' or leave it out"),
        ({"ramp_steps": 3, "kappa_schedule": "lr"}, r"got 3 with 'lr'"),
        ({"kappa_schedule": "ramp", "ramp_steps": 0}, r"`ramp_steps` to be a whole number >= 1, got 0"),
        ({"kappa_schedule": "ramp", "ramp_steps": 1.5}, r"`ramp_steps` to be a whole number of steps >= 1 or a fract"),
        ({"kappa_schedule": "ramp", "ramp_steps": "x"}, r"`ramp_steps` to be a whole number >= 1, got 'x'"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        IRE(**settings)
    assert "\n" not in str(error.value)


def test_a_fraction_of_an_unknown_length_is_refused() -> None:
    settings = RAMP | {"ramp_steps": 0.5}
    with pytest.raises(ConfigurationError, match=r"known length for `ramp_steps=0.5`.*give `ramp_steps` in steps"):
        cases.fit(Classifier(), [IRE(**settings)], max_epochs=-1, max_time={"seconds": 5})
    model = nn.Linear(6, 4)
    with pytest.raises(ConfigurationError, match=r"`ramp_steps` to be a number of steps for IREStep.*got 0.5"):
        IREStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def test_without_a_boost_nothing_is_asked() -> None:
    cases.fit(Classifier(), [IRE(kappa=0, kappa_schedule="ramp", ramp_steps=0.5)], max_epochs=1)
