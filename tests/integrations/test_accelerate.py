"""What is Accelerate's own: `accumulate`, schedulers, trackers, what `prepare` returns."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from modules import Net, sgd

from integrations.features import BOOST, data
from integrations.loops import WithLoss, fresh_accelerate
from lightning_ire import SAM, AccelerateHost, IREStep, measure_sharpness, tags
from lightning_ire._checks import ConfigurationError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_accelerate():
        yield


def prepared(accelerator: Accelerator) -> tuple[Any, Any]:
    torch.manual_seed(1)
    module = WithLoss(Net())
    return accelerator.prepare(module, sgd(module))


def test_what_was_not_prepared_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepared(accelerator)
    with pytest.raises(ConfigurationError, match=r"the optimizer that `accelerator.prepare.*got SGD") as caught:
        IREStep(model, optimizer.optimizer, host=AccelerateHost(accelerator), **BOOST)
    assert "\n" not in str(caught.value)


def test_what_is_forgotten_is_said() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepared(accelerator)
    with pytest.raises(
        ConfigurationError, match=r"Expected `host=AccelerateHost\(accelerator\)`.*AcceleratedOptimizer"
    ):
        IREStep(model, optimizer, **BOOST)
    with pytest.raises(ConfigurationError, match=r"Expected `host` to be LocalHost\(\), .*got Accelerator"):
        IREStep(model, optimizer, host=accelerator, **BOOST)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="with an Accelerator, got NoneType"):
        AccelerateHost(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Expected `model` to be a torch Module, got AcceleratedOptimizer"):
        IREStep(optimizer, model, host=AccelerateHost(accelerator), **BOOST)
    with pytest.raises(ConfigurationError, match=r"`clip` to be a function of the parameters.*got 1.0"):
        IREStep(model, optimizer, host=AccelerateHost(accelerator), clip=1.0, **BOOST)  # type: ignore[arg-type]


def test_the_loops_old_lines_are_refused() -> None:
    """A step beside ours would move the weights once more."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepared(accelerator)
    step = IREStep(model, optimizer, host=AccelerateHost(accelerator), **BOOST)
    first, second = data()[:2]
    step(lambda batch: model(*batch), first)
    with pytest.raises(ConfigurationError, match=r"`optimizer.step\(\)` beside it: leave that out"):
        optimizer.step()
    step(lambda batch: model(*batch), second)
    assert step.progress.step == 2
    assert tags.STEP_NORM_FLAT in step.logs


def test_between_the_steps_of_a_window_nothing_moves() -> None:
    """The scheduler follows the steps; the values of the log are those of the last whole step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = prepared(accelerator)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    step = IREStep(model, optimizer, host=AccelerateHost(accelerator), **BOOST, perturbation=SAM(0.1))
    before = [p.detach().clone() for p in model.parameters()]
    rates, losses, moved = [], [], []
    for batch in data():
        with accelerator.accumulate(model):
            losses.append(float(step(lambda batch: model(*batch), batch)))
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
        moved.append(not all(map(torch.equal, model.parameters(), before)))
        assert (tags.PERTURBED_LOSS in step.logs) == moved[-1]
    assert moved == [False] * 3 + [True] * 5
    assert rates == [0.1] * 3 + [0.05] * 4 + [0.025]
    assert step.progress.step == 2
    assert len(set(losses)) == 8


def test_several_batches_in_a_call_and_several_calls() -> None:
    """Four batches of a step, in two calls of two, are those of one call in a plain loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    step = IREStep(model, optimizer, host=AccelerateHost(accelerator), **BOOST, perturbation=SAM(0.1))
    torch.manual_seed(1)
    alone = WithLoss(Net())
    other = IREStep(alone, sgd(alone), **BOOST, perturbation=SAM(0.1))
    for first, second, third, fourth in (data()[:4], data()[4:]):
        for pair in ((first, second), (third, fourth)):
            with accelerator.accumulate(model):
                step(lambda batch: model(*batch), *pair)
        other(lambda batch: alone(*batch), first, second, third, fourth)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert step.progress.step == other.progress.step == 2


def test_a_window_whose_loss_fails_is_dropped_with_its_gradients() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    step = IREStep(model, optimizer, host=AccelerateHost(accelerator), kappa=0.0, perturbation=SAM(0.1))

    def fails(batch: Any) -> Any:
        raise ArithmeticError

    first, second, third, fourth = data()[:4]
    with accelerator.accumulate(model):
        step(lambda batch: model(*batch), first)
    with pytest.raises(ConfigurationError, match="Expected `preview` between two steps"):
        step.preview(lambda batch: model(*batch), second)
    with pytest.raises(ArithmeticError), accelerator.accumulate(model):
        step(fails, second)
    for batch in (third, fourth):
        with accelerator.accumulate(model):
            step(lambda batch: model(*batch), batch)
    torch.manual_seed(1)
    alone = WithLoss(Net())
    other = IREStep(alone, sgd(alone), kappa=0.0, perturbation=SAM(0.1))
    other(lambda batch: alone(*batch), third, fourth)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Tracker(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "keeps"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def tracker(self) -> None:
        return None

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append(values)


def test_extra_passes_log_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("here")
    model, optimizer = prepared(accelerator)
    step = IREStep(model, optimizer, host=AccelerateHost(accelerator), **BOOST, perturbation=SAM(0.1))
    passes = 0

    def loss_of(batch: Any) -> Any:
        nonlocal passes
        passes += 1
        output = model(*batch)
        accelerator.log({"loss": float(output["loss"].detach())})
        accelerator.print("one pass")
        return output

    for batch in data()[:3]:
        step(loss_of, batch)
    accelerator.log(step.logs)
    assert passes == 6
    assert [list(row) for row in tracker.rows[:3]] == [["loss"]] * 3
    assert tags.STEP_NORM_FLAT in tracker.rows[3]
    assert capsys.readouterr().out == "one pass\n" * 3
    wanted, host = ["lambda_max", "stability"], AccelerateHost(accelerator)
    for given in (optimizer, optimizer.optimizer):
        measured = measure_sharpness(model, loss_of, data()[:1], wanted, host=host, optimizer=given)
        assert measured.values.keys() >= {tags.LAMBDA_MAX, tags.RATIO}
    assert len(tracker.rows) == 4
