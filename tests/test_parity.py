"""Off means off, and an extra pass leaves no trace: bit for bit what plain Lightning does."""

import random
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from lightning.pytorch.loggers import CSVLogger
from modules import Classifier, Net
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_ire import IRE, SAM, AverageSAM, EmpiricalFisher, SampledFisher, tags

ZERO_SAM = {"kappa": 0.0, "perturbation": SAM(0.0)}


class Everything(Classifier):
    """BatchNorm, dropout, an own buffer, own draws of every kind, metrics of several kinds, several logged values."""

    def __init__(self) -> None:
        super().__init__(Net(batch_norm=True, dropout=0.3))
        self.net[1].momentum = None  # a cumulative average: counts the batches itself
        self.register_buffer("memory", torch.zeros(FEATURES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.group = MetricCollection(
            [MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)], compute_groups=True, prefix="group/"
        )
        self.seen = CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.calls += 1
        self.memory = 0.9 * self.memory + 0.1 * x.mean(0)  # a buffer that is replaced, not changed in place
        noise = torch.randn_like(x) + float(np.random.normal()) + random.gauss(0, 1)
        logits = self.net(x + 0.01 * noise)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.accuracy(logits, y)
        self.group.update(logits, y)
        self.seen.update(y.float())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "double": 2 * loss}, on_step=False, on_epoch=True)
        self.log("sum", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.group.compute())
        self.log("count", float(len(self.seen.compute())))
        self.group.reset()
        self.seen.reset()


class Outputs(pl.Callback):
    """Remembers what the loop hands to other callbacks."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows += [outputs["loss"].clone(), outputs["logits"].clone()]


def run(
    ire: list[pl.Callback], tmp_path: Path, module_class: type[Everything] = Everything, **kwargs: Any
) -> dict[str, Any]:
    cases.seed_all(5)
    module, outputs = module_class(), Outputs()
    trainer = cases.fit(
        module,
        [*ire, outputs],
        cases.loader(cases.data(60), batch_size=8, shuffle=True),  # the last batch is short
        logger=CSVLogger(tmp_path, name=f"run{len(list(tmp_path.iterdir()))}"),
        **kwargs,
    )
    metrics = {
        name: value for name, value in trainer.callback_metrics.items() if name not in tags.SAM_TAGS + tags.IRE_TAGS
    }
    return {
        "module": module,
        "metrics": metrics,
        "rows": outputs.rows,
        "steps": trainer.global_step,
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "streams": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()[1]),
        "accuracy": module.accuracy.metric_state,
    }


def assert_same_run(first: dict[str, Any], second: dict[str, Any]) -> None:
    cases.assert_same_bits(first["module"], second["module"])
    assert first["steps"] == second["steps"]
    assert first["metrics"].keys() == second["metrics"].keys()
    for name, value in first["metrics"].items():
        assert cases.same_bits(value, second["metrics"][name]), name
    assert all(cases.same_bits(a, b) for a, b in zip(first["rows"], second["rows"], strict=True))
    for key, state in first["optimizer"].items():
        for name, value in state.items():
            other = second["optimizer"][key][name]
            assert cases.same_bits(value, other) if isinstance(value, torch.Tensor) else value == other
    assert torch.equal(first["streams"][0], second["streams"][0])
    assert np.array_equal(first["streams"][1], second["streams"][1])
    assert first["streams"][2] == second["streams"][2]
    for name, value in first["accuracy"].items():
        assert torch.equal(value, second["accuracy"][name])


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},  # 8 batches: the last window is short
    "clipped": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_forced_second_pass_at_rho_0_changes_nothing(loop: dict[str, Any], tmp_path: Path) -> None:
    plain = run([], tmp_path, **loop)
    forced = run([IRE(**ZERO_SAM)], tmp_path, **loop)
    assert_same_run(plain, forced)
    assert forced["module"].calls == 2 * plain["module"].calls == 2 * 16


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_a_boost_that_moves_nothing_changes_nothing(loop: dict[str, Any], tmp_path: Path) -> None:
    """All parameters excluded: estimates are made, and not one coordinate is flat."""
    plain = run([], tmp_path, **loop)
    boosted = run([IRE(kappa=5.0, interval=2, exclude="*")], tmp_path, **loop)
    assert_same_run(plain, boosted)


def test_estimates_that_need_their_own_pass_leave_no_trace(tmp_path: Path) -> None:
    class TwoTerms(Everything):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {**output, "loss": output["loss"] + 0.01 * self.net[0].weight.square().sum()}

    plain = run([], tmp_path, TwoTerms)
    for curvature, passes in ((SampledFisher(), 1), (SampledFisher(fraction=0.99), 2)):
        estimated = run([IRE(kappa=5.0, interval=1, exclude="*", curvature=curvature)], tmp_path, TwoTerms)
        assert_same_run(plain, estimated)
        assert estimated["module"].calls == passes * plain["module"].calls


def test_a_fisher_loss_that_draws_leaves_no_trace(tmp_path: Path) -> None:
    class Draws(Everything):
        def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
            noise = torch.rand(3), np.random.normal(), random.random()
            drawn.append(noise)
            return F.cross_entropy(self.net(batch[0]), batch[1]) * noise[0].sum()

    drawn: list[Any] = []
    plain = run([], tmp_path, Draws)
    estimated = run([IRE(kappa=5.0, interval=1, exclude="*")], tmp_path, Draws)
    assert_same_run(plain, estimated)
    assert len(drawn) == 16


def test_kappa_0_is_not_there_at_all(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            hooks = trainer.optimizers[0]._optimizer_step_post_hooks
            seen.append((dict(hooks), {"training_step", "optimizer_step", "log"} & set(vars(pl_module))))

    ire = IRE(kappa=0.0)
    assert_same_run(run([], tmp_path), run([ire, Look()], tmp_path))
    assert seen == [({}, set())] * 16
    assert ire._session is None
    assert ire.state_dict() == {}
    assert not ire._progress.masks.masks


def test_before_the_start_nothing_is_wrapped_or_allocated(tmp_path: Path) -> None:
    ire = IRE(kappa=2.0, start_step=9)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            wrapped = {"training_step", "optimizer_step"} <= set(vars(pl_module))
            seen.append((wrapped, bool(ire._progress.masks.masks), pl_module.calls))

    run([ire, Look()], tmp_path)
    assert seen[:9] == [(False, False, step + 1) for step in range(9)]
    assert seen[9:] == [(True, True, step + 1) for step in range(9, 16)]


def test_the_module_is_plain_again_after_fit() -> None:
    module = Classifier(Net())
    cases.fit(module, [IRE(kappa=1.0, perturbation=SAM(0.1))])
    assert {"training_step", "optimizer_step", "log"}.isdisjoint(vars(module))
    plain, again = cases.clone(module), cases.clone(module)
    cases.fit(plain)
    cases.fit(again)
    cases.assert_same_bits(plain, again)


@pytest.mark.parametrize("where", ["training_step", "second_pass", "backward", "optimizer_step", "fisher"])
def test_an_exception_anywhere_leaves_unmoved_weights_and_no_wrappers(where: str) -> None:
    class Boom(Classifier):
        """In the third step, calls 5 and 6, something raises; call 5 notes the weights the window began with."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.calls == 4:
                self.at = [p.detach().clone() for p in self.parameters()]
            if self.calls == (4 if where == "training_step" else 5) and where in ("training_step", "second_pass"):
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

        def backward(self, loss: torch.Tensor) -> None:
            if where == "backward" and self.calls == 6:
                raise RuntimeError("boom")
            super().backward(loss)

    module = Boom(Net())
    ire = IRE(kappa=1.0, interval=1, perturbation=SAM(0.3))

    class AtException(pl.Callback):
        weights: list[torch.Tensor]

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]
            self.wrapped = {"training_step", "optimizer_step"} & set(vars(pl_module))

    look = AtException()
    if where == "optimizer_step":
        module.make_optimizer = _exploding_optimizer
    if where == "fisher":
        module.fisher_loss = lambda *args: (_ for _ in ()).throw(RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        cases.fit(module, [ire, look])
    assert not look.wrapped
    if where in ("training_step", "second_pass", "backward"):
        assert all(torch.equal(a, b) for a, b in zip(look.weights, module.at, strict=True))
    assert {"training_step", "optimizer_step", "log"}.isdisjoint(vars(module))


def _exploding_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    class Exploding(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            raise RuntimeError("boom")

    return Exploding(module.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_average_sam_puts_weights_back_before_anybody_hears_of_the_exception(accumulate: int) -> None:
    class Boom(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("boom")

    class AtException(pl.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            cases.assert_same_bits(pl_module, before)

    module = Boom(Net())
    before = cases.clone(module)
    with pytest.raises(KeyError, match="boom"):
        cases.fit(
            module, [AtException(), IRE(kappa=0.0, perturbation=AverageSAM(1.0))], accumulate_grad_batches=accumulate
        )
    cases.assert_same_bits(module, before)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("perturbation", [SAM(0.1), AverageSAM(0.1)])
def test_steps_without_a_loss_do_nothing(perturbation: Any) -> None:
    class Nothing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    module = Nothing(Net())
    before = cases.clone(module)
    trainer = cases.fit(module, [IRE(kappa=1.0, perturbation=perturbation)])
    cases.assert_same_bits(module, before)
    assert not set(trainer.callback_metrics)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_average_sam_moves_weights_only_between_forward_and_backward() -> None:
    seen: dict[str, Any] = {"forward": [], "batch_end": []}

    class Watch(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen["forward"].append(self.net[0].weight.detach().clone())
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            seen["batch_end"].append(self.net[0].weight.detach().clone())

    module = Watch(Net())
    start = module.net[0].weight.detach().clone()
    cases.fit(
        module,
        [IRE(kappa=0.0, perturbation=AverageSAM(1.0))],
        limit_train_batches=4,
        max_epochs=1,
        accumulate_grad_batches=4,
    )
    assert all(torch.equal(weight, start) for weight in seen["batch_end"][:3])
    assert all(torch.equal(weight, seen["forward"][0]) for weight in seen["forward"])  # one draw for the window
    assert not torch.equal(seen["forward"][0], start)


def test_gradients_of_other_parameters_are_not_touched() -> None:
    """A parameter outside the optimizer keeps what Lightning's own backward gave it."""
    module = Classifier(Net(), optimizer=lambda m: torch.optim.SGD(m.net[0].parameters(), lr=0.1))
    plain = cases.clone(module)
    cases.fit(plain)
    cases.fit(module, [IRE(**ZERO_SAM)])
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_gradients_kept_at_zero_instead_of_none_are_stepped_as_before() -> None:
    class Keeps(Classifier):
        def __init__(self) -> None:
            super().__init__(Net())
            self.unused = nn.Parameter(torch.ones(3))

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            self.unused.grad = torch.zeros(3)
            optimizer.zero_grad(set_to_none=False)

    module = Keeps()
    plain = cases.clone(module)
    cases.fit(plain)
    cases.fit(module, [IRE(**ZERO_SAM)])
    cases.assert_same_bits(module, plain)
    assert not torch.equal(module.unused, torch.ones(3))  # weight decay moved it


def test_empirical_fisher_adds_no_pass() -> None:
    module = Classifier(Net())
    cases.fit(module, [IRE(kappa=1.0, interval=1, curvature=EmpiricalFisher())])
    assert module.calls == 16


def test_calls_that_are_not_lightnings_are_not_replayed() -> None:
    """Another callback that runs `training_step` for its own purposes, inside and outside of a window."""

    class Curious(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                pl_module.training_step((batch[0] * 100, batch[1]), batch_idx)

    plain, module = Classifier(Net()), Classifier(Net())
    module.load_state_dict(plain.state_dict())
    perturbation = {"kappa": 1.0, "perturbation": SAM(0.1)}
    cases.fit(plain, [IRE(**perturbation)], accumulate_grad_batches=2)
    cases.fit(module, [IRE(**perturbation), Curious()], accumulate_grad_batches=2)
    cases.assert_same_bits(plain, module)
