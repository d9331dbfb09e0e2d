"""What is Fabric's own: callbacks, logs, precision plugins, what `setup` returns."""

from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.plugins import MixedPrecision
from modules import Classifier, Net, Scaler, sgd
from torch import Tensor

from integrations.features import BOOST, assert_same, data
from integrations.loops import LOOPS, Job, WithLoss
from lightning_ire import (
    IRE,
    SAM,
    AdversarialModelPerturbation,
    EmpiricalFisher,
    FabricHost,
    HutchinsonHessian,
    IREStep,
    SampledFisher,
    SharpnessMonitor,
    measure_sharpness,
    tags,
)
from lightning_ire._checks import ConfigurationError

ONE: dict[str, Any] = {"accelerator": "cpu", "devices": 1}


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (IRE(gamma=0.8), r"`IREStep\(model, optimizer, host=FabricHost\(fabric\), gamma=0.8\)` after `fabric.setup`"),
        (IRE(), r"host=FabricHost\(fabric\), kappa=1.0\)"),
        (SAM(0.05), r"host=FabricHost\(fabric\), kappa=0, perturbation=SAM\(rho=0.05\)\)"),
        (SharpnessMonitor(), r"`measure_sharpness\(model, loss_of, batches, host=FabricHost\(fabric\)\)`"),
    ],
)
def test_callbacks_that_would_do_nothing_are_refused(callback: Any, words: str) -> None:
    fabric = Fabric(**ONE, callbacks=[callback])
    module = Net()
    with pytest.raises(ConfigurationError, match=words) as caught:
        fabric.setup(module, sgd(module))
    assert "\n" not in str(caught.value)
    model = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(sgd(model))
    with pytest.raises(ConfigurationError, match=words):
        optimizer.step()


@pytest.mark.parametrize("callback", [IRE(kappa=0), SharpnessMonitor(every_n_epochs=None)])
def test_callbacks_that_are_off_are_not(callback: Any) -> None:
    module = Net()
    Fabric(**ONE, callbacks=[callback]).setup(module, sgd(module))[1].step()


def test_what_fabric_has_not_set_up_is_refused() -> None:
    fabric = Fabric(**ONE)
    module = Net()
    model, optimizer = fabric.setup(module, sgd(module))
    for what, given in (("model", (module, optimizer)), ("optimizer", (model, optimizer.optimizer))):
        with pytest.raises(ConfigurationError, match=rf"Expected the {what} that `fabric.setup\(model, optimizer\)`"):
            IREStep(*given, host=FabricHost(fabric), **BOOST)
    with pytest.raises(ConfigurationError, match=r"Expected `host=FabricHost\(fabric\)`.*got a FabricSGD without"):
        IREStep(model, optimizer, **BOOST)
    with pytest.raises(ConfigurationError, match="with a Fabric, got NoneType"):
        FabricHost(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Expected the model"):
        measure_sharpness(module, lambda batch: module(batch).sum(), [torch.ones(2, 6)], host=FabricHost(fabric))


@pytest.mark.parametrize("curvature", [SampledFisher(), SampledFisher(form="sample"), HutchinsonHessian()])
def test_estimates_go_backward_by_themselves_in_mixed_precision(curvature: Any) -> None:
    """Fabric lets every backward pass but its own raise there."""
    fabric = Fabric(**ONE, precision="bf16-mixed")
    module = WithLoss(Net())
    model, optimizer = fabric.setup(module, sgd(module))
    step = IREStep(model, optimizer, host=FabricHost(fabric), **BOOST, curvature=curvature, perturbation=SAM(0.1))

    def loss_of(batch: Any) -> Any:
        return model(*batch)

    for batch in data():
        step(loss_of, batch)
    assert step.progress.masks.masks
    measured = measure_sharpness(model, loss_of, data()[:2], host=FabricHost(fabric), step=step)
    assert not measured.skipped
    with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
        model(*data()[0])["loss"].backward()


def test_the_scale_of_a_grad_scaler_cancels_out() -> None:
    """Powers of two are exact: the values of the log too are those without one."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = Scaler(overflow=0)
    settings = {**BOOST, "curvature": EmpiricalFisher(), "perturbation": AdversarialModelPerturbation(0.2, zeta=0.5)}
    scaled = LOOPS["Fabric"](Job(settings, options={"plugins": [plugin]}))
    assert plugin.scaler.calls == 16
    assert_same(scaled, LOOPS["Fabric"](Job(settings, bf16=True)))


class Logs(Classifier):
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("inside", loss.detach())
        return loss


def test_extra_passes_log_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """Of a LightningModule, which has a log of its own, and through Fabric."""
    rows: list[dict[str, Any]] = []

    class Keeps(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append(dict(metrics))

    fabric = Fabric(**ONE, loggers=Keeps(tmp_path))
    module = Logs()
    model, optimizer = fabric.setup(module, sgd(module))
    step = IREStep(
        model, optimizer, host=FabricHost(fabric), **BOOST, perturbation=SAM(0.1), curvature=SampledFisher(fraction=0.5)
    )

    def loss_of(batch: Any) -> Tensor:
        loss = model.training_step(batch)
        fabric.log("outside", loss.detach())
        fabric.print("one pass")
        return loss

    for batch in data()[:4]:
        step(loss_of, batch)
    assert module.calls == 4 + 4 + 2  # numbers are left alone: four second passes, two estimates
    assert [list(row) for row in rows] == [["inside"], ["outside"]] * 4
    assert capsys.readouterr().out == "one pass\n" * 4


@pytest.mark.slow
def test_a_compiled_model() -> None:
    """Compiled before `setup`, which compiles it again around its own wrapper."""
    weights = []
    for compiles in (False, True):
        fabric = Fabric(**ONE)
        torch.manual_seed(1)
        module = Net()
        inside: Any = torch.compile(module, backend="eager") if compiles else module
        model, optimizer = fabric.setup(inside, sgd(module))
        step = IREStep(model, optimizer, host=FabricHost(fabric), **BOOST, perturbation=SAM(0.1))
        for batch in data():
            step(lambda batch, model=model: F.cross_entropy(model(batch[0]), batch[1]), batch)
        assert set(step.progress.masks.masks) == {name for name, _ in module.named_parameters()}
        weights.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    torch.testing.assert_close(*weights)


def test_two_models_may_share_a_host() -> None:
    """As in adversarial training: each step goes its own way."""
    fabric = Fabric(**ONE)
    host = FabricHost(fabric)
    steps, modules = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = WithLoss(Net())
        model, optimizer = fabric.setup(module, sgd(module))
        steps.append((IREStep(model, optimizer, host=host, kappa=0.0, perturbation=SAM(0.1)), model))
        modules.append(module)
    steps[0][0].epoch = 3
    assert steps[1][0].epoch == 0
    for batch in data():
        for step, model in steps:
            step(lambda batch, model=model: model(*batch), batch)
    for seed, module in zip((1, 2), modules, strict=True):
        torch.manual_seed(seed)
        alone = WithLoss(Net())
        step = IREStep(alone, sgd(alone), kappa=0.0, perturbation=SAM(0.1))
        for batch in data():
            step(lambda batch, alone=alone: alone(*batch), batch)
        cases.assert_same_bits(module, alone)
    assert tags.PERTURBED_LOSS in step.logs
