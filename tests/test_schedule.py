"""When IRE switches on, when masks are made, how strong the boost is."""

import math

import pytest

from lightning_ire import ConfigurationError
from lightning_ire.schedule import Start, mask_due, scheduled_kappa


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"step": 0, "epoch": 0}, "`start_step` and `start_epoch`"),
        ({"step": 0.5, "loss": 0.0}, "`start_step` and `start_loss`"),
        ({"epoch": 3, "loss": 1.0}, "`start_epoch` and `start_loss`"),
        ({"step": 1, "epoch": 1, "loss": 1.0}, "`start_step` and `start_epoch` and `start_loss`"),
    ],
)
def test_at_most_one_start(settings, names):
    with pytest.raises(ConfigurationError, match=f"Expected at most one of the start_\\* arguments, got {names}"):
        Start(**settings)


@pytest.mark.parametrize("step", [0.0, 1.0, 3000.0])
def test_a_whole_number_of_steps_may_come_as_a_float(step):
    assert Start(step=step) == Start(step=int(step))
    assert type(Start(step=step).step) is int


@pytest.mark.parametrize("step", [1.5, -0.5, math.nan, math.inf])
def test_a_fraction_is_strictly_between_0_and_1(step):
    with pytest.raises(
        ConfigurationError, match=f"`start_step` .* fraction of the run strictly between 0 and 1, got {step}"
    ):
        Start(step=step)


@pytest.mark.parametrize("value", [-1, True, "3"])
@pytest.mark.parametrize("name", ["step", "epoch"])
def test_steps_and_epochs_are_whole_numbers(name, value):
    with pytest.raises(ConfigurationError, match=f"Expected `start_{name}` to be a whole number >= 0, got {value!r}"):
        Start(**{name: value})


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (Start(), ""),
        (Start(step=0.5), "start_step=0.5"),
        (Start(epoch=0), "start_epoch=0"),
        (Start(loss=-1.0), "start_loss=-1.0"),
    ],
)
def test_the_setting_is_what_to_write(start, text):
    assert start.setting == text


def test_an_epoch_is_no_fraction():
    with pytest.raises(ConfigurationError, match=r"Expected `start_epoch` to be a whole number >= 0, got 0.5"):
        Start(epoch=0.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, "1", True])
def test_a_loss_is_a_finite_number(loss):
    with pytest.raises(ConfigurationError, match=f"Expected `start_loss` to be a number .*, got {loss!r}"):
        Start(loss=loss)


@pytest.mark.parametrize("loss", [-2.5, 0, 0.0, 3])
def test_a_loss_may_be_negative_or_zero(loss):
    assert Start(loss=loss).loss == loss


def test_errors_are_value_errors():
    assert issubclass(ConfigurationError, ValueError)


def test_immediate_without_a_start_only():
    assert Start().immediate
    assert not any(start.immediate for start in (Start(step=0), Start(step=0.5), Start(epoch=0), Start(loss=0.0)))


@pytest.mark.parametrize("total", [None, 100])
@pytest.mark.parametrize(
    ("start", "step"),
    [(Start(), 0), (Start(step=0), 0), (Start(step=7), 7), (Start(epoch=2), None), (Start(loss=0.5), None)],
)
def test_first_step_needs_no_length_without_a_fraction(start, step, total):
    assert start.first_step(total) == step


@pytest.mark.parametrize(("fraction", "total", "step"), [(0.5, 100, 50), (0.25, 10, 2), (0.6, 5, 3), (0.001, 100, 0)])
def test_a_fraction_is_rounded_down_to_a_step(fraction, total, step):
    got = Start(step=fraction).first_step(total)
    assert got == step
    assert isinstance(got, int)


def test_a_fraction_needs_a_run_of_known_length():
    with pytest.raises(ConfigurationError, match=r"known length for `start_step=0.5`.*got one without end.*: give "):
        Start(step=0.5).first_step(None)


@pytest.mark.parametrize(
    ("start", "first_step", "reached"),
    [
        # (step, epoch) = (0, 0), (4, 0), (5, 1), (6, 2), (12, 3)
        (Start(), 0, [True, True, True, True, True]),
        (Start(step=5), 5, [False, False, True, True, True]),
        (Start(step=0.5), 6, [False, False, False, True, True]),
        (Start(epoch=0), None, [True, True, True, True, True]),
        (Start(epoch=2), None, [False, False, False, True, True]),
        (Start(loss=0.5), None, [False, False, False, False, False]),
    ],
)
def test_reached(start, first_step, reached):
    moments = [(0, 0), (4, 0), (5, 1), (6, 2), (12, 3)]
    assert [start.reached(step, epoch, first_step) for step, epoch in moments] == reached


@pytest.mark.parametrize(
    ("start", "total", "epochs", "never"),
    [
        (Start(), 100, 10, False),
        (Start(), 0, 0, False),
        (Start(step=99), 100, None, False),
        (Start(step=100), 100, None, True),
        (Start(step=101), 100, 10, True),
        (Start(step=10**9), None, None, False),
        (Start(step=0.999), 100, None, False),
        (Start(epoch=9), 100, 10, False),
        (Start(epoch=10), 100, 10, True),
        (Start(epoch=11), 100, 10, True),
        (Start(epoch=10), 100, -1, False),
        (Start(epoch=10), 100, None, False),
        (Start(loss=-1e9), 1, 1, False),
    ],
)
def test_never_is_certain(start, total, epochs, never):
    assert start.never(total, epochs, start.first_step(total)) is never


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (Start(), "step 0"),
        (Start(step=7), "step 7"),
        (Start(step=0.25), "25% of the run"),
        (Start(epoch=60), "epoch 60"),
        (Start(loss=0.125), "the epoch after the mean training loss is <= 0.125"),
    ],
)
def test_start_in_words(start, text):
    assert str(start) == text


@pytest.mark.parametrize(
    ("start", "interval", "due"),
    [(0, 10, [0, 10, 20, 30]), (3, 10, [3, 13, 23, 33]), (3, 1, list(range(3, 35))), (34, 7, [34])],
)
def test_masks_are_made_every_interval_from_the_start(start, interval, due):
    assert [step for step in range(start, 35) if mask_due(step, start, interval)] == due


def test_kappa_follows_the_learning_rate_of_each_group():
    pairs = [(0.05, 0.1), (0.1, 0.1), (0.0, 0.4)]
    assert [scheduled_kappa(2.0, lr, peak) for lr, peak in pairs] == [1.0, 2.0, 0.0]


def test_kappa_is_zero_where_no_learning_rate_was_positive():
    assert [scheduled_kappa(2.0, lr, lr) for lr in (0.0, 1.0)] == [0.0, 2.0]
