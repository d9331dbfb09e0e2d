import math
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_ire import ConfigurationError
from lightning_ire.models import WarmupCosineLR

LRS = (0.4, 0.01)


def optimizer(lrs=LRS) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs], lr=1.0, momentum=0.9)


def rates(run: SGD, schedule: LRScheduler, steps: int) -> list[list[float]]:
    """The rates that so many steps are made with."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in run.param_groups])
        assert schedule.get_last_lr() == seen[-1]
        for group in run.param_groups:
            group["params"][0].grad = group["params"][0].detach().clone()
        run.step()
        schedule.step()
    return seen


def expected(t: int, warmup: int, total: int, ratio: float, lrs=LRS) -> list[float]:
    if t < warmup:
        share = (t + 1) / (warmup + 1)
    elif t <= total:
        angle = math.pi * (t - warmup) / (total - warmup)
        share = ratio + (1 - ratio) * (1 + math.cos(angle)) / 2
    else:
        share = ratio
    return [share * lr for lr in lrs]


@pytest.mark.parametrize(
    ("warmup", "length", "ratio"),
    [(0, 0, 0.0), (1, 1, 0.0), (4, 4, 0.1), (0.3, 3, 0.0), (0.26, 3, 0.5), (0.99, 9, 1.0)],
)
def test_rates_are_those_of_the_formula(warmup, length, ratio):
    run = optimizer()
    seen = rates(run, WarmupCosineLR(run, warmup, 10, ratio), 14)
    for t, now in enumerate(seen):
        assert now == pytest.approx(expected(t, length, 10, ratio), rel=1e-12, abs=1e-15)


def test_some_rates_by_hand():
    run = optimizer([1.0])
    seen = [rate for (rate,) in rates(run, WarmupCosineLR(run, 3, 11, 0.2), 13)]
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[5] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert seen[7] == pytest.approx(0.6)
    assert seen[11:] == pytest.approx([0.2, 0.2])


def test_rates_before_the_length_is_known():
    run = optimizer()
    schedule = WarmupCosineLR(run, 2)
    assert rates(run, schedule, 2) == [pytest.approx(expected(t, 2, 10, 0.0)) for t in range(2)]
    assert [group["lr"] for group in run.param_groups] == pytest.approx(LRS)
    message = "Expected `total`, the length of the learning-rate schedule, to be a whole number, got None: set it, or"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        schedule.step()


def test_a_fraction_of_an_unknown_length_waits_for_it():
    run, forgotten = optimizer(), optimizer()
    schedule = WarmupCosineLR(run, 0.3)
    assert [group["lr"] for group in run.param_groups] == list(LRS)
    with pytest.raises(ConfigurationError, match=r"^Expected `total`, the length"):
        rates(forgotten, WarmupCosineLR(forgotten, 0.3), 1)
    schedule.set_total(10)
    assert rates(run, schedule, 12) == [pytest.approx(expected(t, 3, 10, 0.0), abs=1e-15) for t in range(12)]


def test_set_total_is_at_once_the_rate():
    run = optimizer()
    schedule = WarmupCosineLR(run, 0, 100)
    rates(run, schedule, 5)
    schedule.set_total(10)
    assert [group["lr"] for group in run.param_groups] == pytest.approx(expected(5, 0, 10, 0.0))
    assert schedule.get_last_lr() == pytest.approx(expected(5, 0, 10, 0.0))


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resumed_run_goes_on_as_if_it_had_not_stopped(stop):
    whole, first, second = optimizer(), optimizer(), optimizer()
    wanted = rates(whole, WarmupCosineLR(whole, 4, 10, 0.1), 12)
    schedule = WarmupCosineLR(first, 4, 10, 0.1)
    seen = rates(first, schedule, stop)
    resumed = WarmupCosineLR(second, 4, 10, 0.1)
    for group, before in zip(second.param_groups, first.param_groups, strict=True):
        group["params"][0].data.copy_(before["params"][0])
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert seen + rates(second, resumed, 12 - stop) == wanted
    for ours, theirs in zip(second.param_groups, whole.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


def test_resumed_run_follows_its_own_config():
    first, second = optimizer(), optimizer([0.8, 0.02])
    before = WarmupCosineLR(first, 2, 10, 0.0)
    rates(first, before, 5)
    assert before.state_dict() == {"last_epoch": 5}
    after = WarmupCosineLR(second, 1, 20, 0.5)
    second.load_state_dict(first.state_dict())  # brings the first run's rates
    after.load_state_dict(before.state_dict())
    seen = rates(second, after, 15)
    assert seen == [pytest.approx(expected(t, 1, 20, 0.5, [0.8, 0.02])) for t in range(5, 20)]


def test_takes_the_position_of_another_schedule():
    run = optimizer([1.0, 1.0])
    other = CosineAnnealingLR(run, 10)
    rates(run, other, 4)
    schedule = WarmupCosineLR(optimizer(), 0, 10)
    schedule.load_state_dict(other.state_dict())
    assert schedule.get_last_lr() == pytest.approx(expected(4, 0, 10, 0.0))


def test_rates_that_are_tensors_stay_the_same_tensors():
    lr = torch.tensor(0.5)
    run = SGD([nn.Parameter(torch.ones(1))], lr=lr)
    schedule = WarmupCosineLR(run, 0.5)
    schedule.set_total(4)
    assert run.param_groups[0]["lr"] is lr
    assert schedule.get_last_lr() == pytest.approx([0.5 / 3])
    for t in range(1, 6):
        run.step()
        schedule.step()
        assert lr.item() == pytest.approx(expected(t, 2, 4, 0.0, [0.5])[0], abs=1e-7)


@pytest.mark.parametrize("warmup", [-1, True, 0.0, 1.0, 1.5, -0.1, math.nan, "3", None])
def test_wrong_warmup(warmup):
    message = f"Expected `warmup` to be a whole number >= 0 or a fraction in (0, 1) of `total`, got {warmup!r}."
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        WarmupCosineLR(optimizer(), warmup)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0}, "Expected `total` to be a whole number >= 1, got 0."),
        ({"total": 3.0}, "Expected `total` to be a whole number >= 1, got 3.0."),
        ({"final_lr_ratio": 1.1}, "Expected `final_lr_ratio` to be a number in [0, 1], got 1.1."),
        (
            {"warmup": 5, "total": 5},
            "Expected `warmup` to be less than the length of the learning-rate schedule (5), got 5.",
        ),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        WarmupCosineLR(optimizer(), **settings)


def test_length_that_is_set_too_short():
    schedule = WarmupCosineLR(optimizer(), 5)
    with pytest.raises(ConfigurationError, match=r"^Expected `warmup` to be less than the length"):
        schedule.set_total(5)
    assert schedule.total is None
    fraction = WarmupCosineLR(optimizer(), 0.9)
    fraction.set_total(1)  # rounded, but never as long as the run
    assert fraction.get_last_lr() == list(LRS)
