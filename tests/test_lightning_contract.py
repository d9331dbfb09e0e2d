"""What `lightning_ire/_lightning.py` relies on in Lightning and torch: each fails loudly when a release changes it."""

from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import Classifier
from lightning.pytorch.cli import LightningCLI
from torch.overrides import TorchFunctionMode

from lightning_ire import IRE, SAM, _lightning
from lightning_ire._lightning import Takeover, muted_logging, will_log
from lightning_ire.cli import IRECLI


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
            if "log" not in vars(self):  # not in an extra pass
                events.append("forward")
            return super().training_step(batch, batch_idx)

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            events.append("clip")

    def hooked(module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = cases.sgd(module)
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
    class Rows(pl.loggers.logger.Logger):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []

        name = "rows"
        version = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "train/loss" in metrics:
                self.steps.append(step)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

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

    rows = Rows()
    cases.fit(Logs(), [Look()], logger=rows, log_every_n_steps=3, accumulate_grad_batches=2, max_epochs=3)
    assert said == rows.steps == [2, 5, 8, 11]


def test_the_command_line_method_that_is_overridden_exists() -> None:
    assert callable(LightningCLI._parse_ckpt_path)
    assert IRECLI._parse_ckpt_path is _lightning.ConfigWins._parse_ckpt_path


def test_muted_logging_reaches_nested_modules_and_ends() -> None:
    class Child(pl.LightningModule):
        pass

    parent = Classifier()
    parent.child = Child()
    with muted_logging(parent):
        assert parent.log is parent.child.log is _lightning._no_log
        parent.log("anything", 1.0)
        parent.log_dict({"more": 2.0})
    assert "log" not in vars(parent)
    assert "log" not in vars(parent.child)


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
