"""What `lightning_ire/_lightning.py` relies on in Lightning and torch: each fails loudly when a release changes it."""

import functools
import sys
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import Rows
from lightning.pytorch.cli import LightningCLI
from modules import Classifier, sgd
from torch.overrides import TorchFunctionMode

from lightning_ire import IRE, SAM, _lightning, in_extra_pass
from lightning_ire._lightning import Takeover, muted_logging, will_log
from lightning_ire._patches import Patches, own_method
from lightning_ire.cli import IRECLI
from lightning_ire.engine import _torch


class Order(pl.Callback):
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def on_train_batch_start(self, *args: Any) -> None:
        self.events.append("batch_start")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.events.append("zero_grad")

    def on_before_backward(self, *args: Any) -> None:
        self.events.append("before_backward")

    def on_after_backward(self, *args: Any) -> None:
        self.events.append("after_backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.events.append("before_step")

    def on_train_batch_end(self, *args: Any) -> None:
        self.events.append("batch_end")


MICRO_BATCH = ["batch_start", "forward", "before_backward", "after_backward"]


@pytest.mark.parametrize("callbacks", [[], [IRE(kappa=1.0, perturbation=SAM(0.1))]], ids=["plain", "with-ire"])
def test_order_of_one_step_with_accumulation(callbacks: list[pl.Callback]) -> None:
    events: list[str] = []

    class Watch(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not in_extra_pass():
                events.append("forward")
            return super().training_step(batch, batch_idx)

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            events.append("clip")

    def hooked(module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = sgd(module)
        optimizer.register_step_pre_hook(lambda *args: events.append("torch_pre"))
        optimizer.register_step_post_hook(lambda *args: events.append("torch_post"))
        return optimizer

    cases.fit(
        Watch(optimizer=hooked),
        [*callbacks, Order(events)],
        limit_train_batches=2,
        max_epochs=1,
        accumulate_grad_batches=2,
    )
    first = [*MICRO_BATCH, "batch_end"]
    first.insert(first.index("before_backward"), "zero_grad")
    last = ["batch_start", "torch_pre", "forward", "before_backward", "after_backward"]
    assert events == [*first, *last, "before_step", "clip", "torch_post", "batch_end"]


def test_cross_entropy_is_seen_by_a_torch_function_mode() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
        torch.nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert seen.count(F.cross_entropy) == 2


def test_will_log_agrees_with_the_rows_that_lightning_writes() -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    said = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if will_log(trainer) and not trainer.fit_loop._should_accumulate():
                said.append(trainer.global_step - 1)

    rows = cases.Rows()
    cases.fit(Logs(), [Look()], logger=rows, log_every_n_steps=3, accumulate_grad_batches=2, max_epochs=3)
    assert said == [step for step, metrics in rows.rows if "train/loss" in metrics] == [2, 5, 8, 11]


def test_the_command_line_method_that_is_overridden_exists() -> None:
    assert callable(LightningCLI._parse_ckpt_path)
    assert IRECLI._parse_ckpt_path is _lightning.ConfigWins._parse_ckpt_path


def test_muted_logging_reaches_nested_modules_and_ends() -> None:
    class Child(pl.LightningModule):
        pass

    parent = Classifier()
    parent.child = Child()
    with muted_logging(parent.modules()):
        assert own_method(parent, "log") == type(parent).log.__get__(parent)
        parent.log("anything", 1.0)
        parent.child.print("anything")
        parent.log_dict({"more": 2.0})
    for owner in (parent, parent.child):
        assert not {"log", "print", "__getstate__"} & set(vars(owner))


def test_takeover_leaves_somebody_elses_wrapper_in_place() -> None:
    module = Classifier()
    before = module.training_step
    takeover = Takeover(module, lambda original, *a, **k: original(*a, **k), lambda closure: closure(), lambda: None)
    ours = module.training_step
    module.training_step = lambda *a, **k: ours(*a, **k)
    theirs = module.training_step
    takeover.remove()
    assert module.training_step is theirs
    assert module.optimizer_step == type(module).optimizer_step.__get__(module)
    assert before == type(module).training_step.__get__(module)


def test_takeover_puts_an_instance_attribute_back() -> None:
    module = Classifier()
    original = module.training_step
    replacement = lambda *a, **k: original(*a, **k)  # noqa: E731
    module.training_step = replacement
    Takeover(module, lambda f, *a, **k: f(*a, **k), lambda closure: closure(), lambda: None).remove()
    assert module.training_step is replacement


def test_a_skipped_step_of_a_grad_scaler_runs_no_post_hook() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0)
    for gradient in (float("inf"), 1.0):
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert calls == [1]


class Axes(pl.Callback):
    """Where Lightning's own metrics go, and where `logger_step` says they go."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append(_lightning.logger_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.epochs.append(_lightning.logger_step(trainer, epoch_end=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logger_step_is_lightnings_own(accumulate: int) -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    axes, rows = Axes(), Rows()
    cases.fit(Logs(), [axes], logger=rows, accumulate_grad_batches=accumulate)
    assert axes.steps == [step for step, row in rows.rows if "loss_step" in row]
    assert axes.epochs == [step for step, row in rows.rows if "loss_epoch" in row]
    assert len(axes.steps) == 16 // accumulate
    assert len(axes.epochs) == 2


def test_a_moved_batch_has_been_through_the_plugin_and_the_three_hooks() -> None:
    events: list[Any] = []

    class Hooks(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            events.append(("before", dataloader_idx, batch[0].dtype))
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            events.append(("transfer", dataloader_idx, device))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            events.append(("after", dataloader_idx))
            return [batch[0] + 1, batch[1]]

    trainer = cases.fit(Hooks(), precision="64-true", limit_train_batches=1, max_epochs=1)
    once = list(events)
    events.clear()
    x, y = torch.ones(2, cases.FEATURES), torch.zeros(2, dtype=torch.long)
    moved = _lightning.moved_batch(trainer, [x, y])
    assert events == once == [("before", 0, torch.float64), ("transfer", 0, torch.device("cpu")), ("after", 0)]
    assert torch.equal(moved[0], torch.full((2, cases.FEATURES), 2.0, dtype=torch.float64))


def test_step_arguments_are_those_that_lightning_gives() -> None:
    class One(Classifier):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return super().training_step(batch, 0)

    class Other(Classifier):
        def training_step(self, batch: Any, number: int) -> Any:  # type: ignore[override]
            assert number == self.calls
            return super().training_step(batch, number)

    for module, expected in ((One(), ("b",)), (Other(), ("b", 7)), (Classifier(), ("b", 7))):
        assert _lightning.step_arguments(module.training_step, "b", 7) == expected
        cases.fit(module, max_epochs=1)
        assert module.calls == 8


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)],
)
def test_full_precision_step_is_without_autocast_and_with_the_weights_dtype(precision: str, dtype: torch.dtype) -> None:
    trainer = cases.fit(Classifier(), precision=precision, limit_train_batches=1, max_epochs=1)
    with _lightning.full_precision_step(trainer):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).dtype == dtype
        if precision == "bf16-mixed":
            with trainer.precision_plugin.train_step_context():
                assert torch.is_autocast_enabled("cpu")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_torch_differentiates_past_a_function_that_is_marked_once_differentiable() -> None:
    """Why `differentiable_once` looks: the day that torch raises by itself, it can go."""
    x = torch.tensor([2.0], requires_grad=True)
    (wrong,) = torch.autograd.grad((Once.apply(x) * x).sum(), x, create_graph=True)
    assert _torch.differentiable_once([None, wrong])
    (product,) = torch.autograd.grad(wrong, x, torch.ones(1))
    assert product.item() != pytest.approx(48.0)  # (x^4)'' = 12 x^2
    (right,) = torch.autograd.grad((x**4).sum(), x, create_graph=True)
    assert not _torch.differentiable_once([right, None, torch.ones(1)])


def test_own_method_goes_behind_our_wrappers_only() -> None:
    module = Classifier()
    original = module.training_step
    patches, more = Patches(), Patches()
    patches.put(module, "training_step", lambda *args: "ours")
    more.put(module, "training_step", lambda *args: "ours too")
    assert own_method(module, "training_step") == original

    theirs = functools.wraps(module.training_step)(lambda *args: "theirs")
    module.training_step = theirs  # type: ignore[method-assign]
    assert own_method(module, "training_step") is theirs


def test_what_is_handed_over_to_autograd_is_kept_alive_and_let_go() -> None:
    """Torch 2.11 takes no reference of its own: what was handed over was freed while somebody used it."""

    class Value:
        pass

    value = Value()
    alone = sys.getrefcount(value)
    for _ in range(3):
        _torch.hand_over(value)  # type: ignore[arg-type]
        assert sys.getrefcount(value) == alone + 1
    _torch.hand_over(None)
    assert sys.getrefcount(value) == alone
