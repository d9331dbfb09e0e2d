"""Relatives of SAM: weight by weight what a plain loop of the formula gives; and what they share with SAM."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Classifier, Net
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ire import (
    GSAM,
    IRE,
    LESAM,
    SAM,
    AdversarialModelPerturbation,
    AverageSAM,
    ConfigurationError,
    EmpiricalFisher,
    FriendlySAM,
    FunctionalSAM,
    IREStep,
    LookSAM,
    MomentumSAM,
    Perturbation,
    RandomMask,
    StableSAM,
    WeightedSAM,
    in_extra_pass,
)

STEPS, BATCH, RATE = 30, 8, 0.1


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-3)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def net() -> nn.Module:
    torch.manual_seed(5)
    return Net().double()


def trained(
    perturbation: Perturbation | None, optimizer: Any = sgd, steps: int = STEPS, scheduler: Any = None, **kwargs: Any
) -> Classifier:
    module = Classifier(net(), optimizer, scheduler)
    ire = [] if perturbation is None else [IRE(kappa=0.0, perturbation=perturbation)]
    data = cases.loader(cases.data(steps * BATCH, torch.float64), kwargs.pop("batch", BATCH))
    cases.fit(module, [*kwargs.pop("callbacks", ire)], data, **{"max_epochs": 1, **kwargs})
    return module


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


class Plain:
    """A loop over vectors of all weights, for formulas as papers have them."""

    def __init__(self, optimizer: Any = sgd) -> None:
        self.net = net()
        self.optimizer = optimizer(self.net)
        self.named = dict(self.net.named_parameters())
        self.sizes = [parameter.numel() for parameter in self.named.values()]
        self.step_number = 0

    @property
    def weights(self) -> Tensor:
        return weights_of(self.net)

    def outputs(self, vector: Tensor, x: Tensor) -> Tensor:
        pieces = zip(self.named.items(), vector.split(self.sizes), strict=True)
        return functional_call(self.net, {name: piece.view_as(like) for (name, like), piece in pieces}, (x,))

    def gradient(self, vector: Tensor, batch: Any) -> Tensor:
        vector = vector.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(self.outputs(vector, batch[0]), batch[1]), vector)[0]

    def step(self, gradient: Tensor) -> None:
        for parameter, piece in zip(self.named.values(), gradient.split(self.sizes), strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        self.optimizer.step()
        self.step_number += 1

    def momentum(self, key: str) -> Tensor | None:
        states = [self.optimizer.state[parameter].get(key) for parameter in self.named.values()]
        return None if states[0] is None else torch.cat([state.reshape(-1) for state in states])

    def move(self, by: Tensor) -> None:
        with torch.no_grad():
            for parameter, piece in zip(self.named.values(), by.split(self.sizes), strict=True):
                parameter.add_(piece.view_as(parameter))

    def sam(self, batch: Any, rho: float, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        own = self.gradient(self.weights, batch)
        along = own if direction is None else direction
        return own, self.gradient(self.weights + rho * along / along.norm(), batch)


def friendly(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own = run.gradient(run.weights, batch)
    mean = memory.get("m")
    memory["m"] = own if mean is None else 0.8 * mean + 0.2 * own
    run.step(run.sam(batch, 0.3, own if mean is None else own - 0.7 * mean)[1])


def gsam(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, other = run.sam(batch, 0.3)
    run.step(other - 0.4 * (own - (own @ other) / (other @ other) * other))


def coupled(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, other = run.sam(batch, 0.3)
    run.step((1 - 1.5) * own + 1.5 * other)


def decoupled(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, other = run.sam(batch, 0.3)
    run.step(own)
    run.move(-run.optimizer.param_groups[0]["lr"] * 1.5 * (other - own))


def stable(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, other = run.sam(batch, 0.3)
    run.step(other * own.norm() / other.norm())


def look(run: Plain, batch: Any, memory: dict[str, Any], split: bool = True) -> None:
    sizes = run.sizes if split else [sum(run.sizes)]
    own = run.gradient(run.weights, batch)
    if run.step_number % 3 == 0:
        other = run.sam(batch, 0.3)[1]
        pairs = zip(other.split(sizes), own.split(sizes), strict=True)
        memory["v"] = torch.cat([p - (p @ g) / (g @ g) * g for p, g in pairs])
        run.step(other)
        return
    pairs = zip(own.split(sizes), memory["v"].split(sizes), strict=True)
    run.step(torch.cat([g + 0.7 * g.norm() / v.norm() * v for g, v in pairs]))


def look_global(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    look(run, batch, memory, split=False)


def momentum(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    v = run.momentum("momentum_buffer" if isinstance(run.optimizer, torch.optim.SGD) else "exp_avg")
    run.step(run.gradient(run.weights if v is None else run.weights - 0.3 * v / v.norm(), batch))


def le(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    run.step(run.sam(batch, min(0.2 / float(run.gradient(run.weights, batch).norm()), 0.3))[1])


def functional(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, _ = run.sam(batch, 0.3)
    outputs = run.outputs(run.weights, batch[0]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(outputs, batch[1]), outputs)
    moved = (run.weights + 0.3 * own / own.norm()).requires_grad_()
    run.step(torch.autograd.grad(run.outputs(moved, batch[0]), moved, slope)[0])


def fraction(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own = run.gradient(run.weights, [part[: math.ceil(0.3 * len(part))] for part in batch])
    run.step(run.gradient(run.weights + 0.3 * own / own.norm(), batch))


def late(run: Plain, batch: Any, memory: dict[str, Any]) -> None:
    own, other = run.sam(batch, 0.3)
    run.step(other if 7 <= run.step_number < 19 else own)


FORMULAS: dict[str, tuple[Callable[[], Perturbation], Callable[[Plain, Any, dict[str, Any]], None]]] = {
    "friendly": (lambda: FriendlySAM(0.3, sigma=0.7, lam=0.8), friendly),
    "gsam": (lambda: GSAM(0.3, alpha=0.4), gsam),
    "weighted-coupled": (lambda: WeightedSAM(0.3, gamma=0.6, decouple=False), coupled),
    "weighted": (lambda: WeightedSAM(0.3, gamma=0.6), decoupled),
    "stable": (lambda: StableSAM(0.3), stable),
    "look": (lambda: LookSAM(0.3, k=3), look),
    "look-global": (lambda: LookSAM(0.3, k=3, scope="global"), look_global),
    "momentum": (lambda: MomentumSAM(0.3), momentum),
    "le": (lambda: LESAM(0.3, sigma=0.2), le),
    "functional": (lambda: FunctionalSAM(0.3), functional),
    "fraction": (lambda: SAM(0.3, fraction=0.3), fraction),
    "late": (lambda: SAM(0.3, start_step=7, stop_step=19), late),
}


def by_formula(name: str, optimizer: Any = sgd) -> Tensor:
    run, memory = Plain(optimizer), {}
    for batch in cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH):
        FORMULAS[name][1](run, batch, memory)
    return run.weights


@pytest.mark.parametrize("optimizer", cases.first_at_once([sgd, adamw]))
@pytest.mark.parametrize("name", FORMULAS)
def test_thirty_steps_are_those_of_the_formula(name: str, optimizer: Any) -> None:
    ours = weights_of(trained(FORMULAS[name][0](), optimizer))
    torch.testing.assert_close(ours, by_formula(name, optimizer), rtol=1e-8, atol=1e-10)
    assert float((ours - weights_of(trained(SAM(0.3), optimizer))).abs().max()) > 1e-4
    assert float((ours - weights_of(trained(None, optimizer))).abs().max()) > 1e-4


@pytest.mark.parametrize("name", cases.first_at_once(FORMULAS, 3))
def test_accumulated_steps_are_those_of_one_large_batch(name: str) -> None:
    if name == "fraction":
        pytest.skip("the first samples of each micro-batch are others than those of the batch")
    ours = trained(FORMULAS[name][0](), batch=BATCH // 2, accumulate_grad_batches=2)
    torch.testing.assert_close(weights_of(ours), by_formula(name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", cases.first_at_once(FORMULAS, 3))
def test_a_plain_loop_has_the_same_bits(name: str) -> None:
    module = Classifier(net(), sgd)
    step = IREStep(module, module.configure_optimizers(), kappa=0.0, perturbation=FORMULAS[name][0]())
    torch.manual_seed(3)
    for batch in cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH):
        step(lambda batch: module.training_step(batch, 0), batch)
    assert cases.same_bits(weights_of(module), weights_of(trained(FORMULAS[name][0]())))


def theirs(name: str, module: nn.Module) -> Any:
    base: dict[str, Any] = {"lr": RATE, "momentum": 0.9, "weight_decay": 1e-3, "rho": 0.3}
    parameters = list(module.parameters())
    if name == "friendly":
        return pytorch_optimizer.FriendlySAM(parameters, torch.optim.SGD, sigma=0.7, lmbda=0.8, **base)
    if name == "look":
        return pytorch_optimizer.LookSAM(parameters, torch.optim.SGD, k=3, alpha=0.7, **base)
    decouple = name == "weighted"
    return pytorch_optimizer.WSAM(module, parameters, torch.optim.SGD, gamma=0.6, decouple=decouple, **base)


@pytest.mark.parametrize("name", ["friendly", "look", "weighted", "weighted-coupled", "gsam"])
def test_thirty_steps_are_those_of_a_public_implementation(name: str) -> None:
    module = net()
    if name == "gsam":
        base = sgd(module)
        radius = pytorch_optimizer.ProportionScheduler(
            pytorch_optimizer.LinearScheduler(base, t_max=1, max_lr=RATE, min_lr=RATE), 1.0, 0.0, 0.3, 0.3
        )
        optimizer: Any = pytorch_optimizer.GSAM(module.parameters(), base, module, radius, alpha=0.4)
        optimizer.rho_t = 0.3
    else:
        optimizer = theirs(name, module)
    for x, y in cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH):

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return loss

        if name == "gsam":
            optimizer.set_closure(nn.CrossEntropyLoss(), x, y)
            optimizer.step()
        else:
            if not name.startswith("weighted"):
                closure()
            optimizer.step(closure)
    ours = trained(FORMULAS[name][0]())
    tolerance = 1e-4 if name == "look" else 1e-6  # it adds 1e-8 to a norm
    torch.testing.assert_close(weights_of(ours), weights_of(module), rtol=tolerance, atol=tolerance / 100)


# The neutral setting is SAM or the base run, to the bit


NEUTRAL: dict[str, tuple[Perturbation, Perturbation | None]] = {
    "friendly": (FriendlySAM(0.3, sigma=0.0), SAM(0.3)),
    "gsam": (GSAM(0.3, alpha=0.0), SAM(0.3)),
    "gsam-base": (GSAM(0.0, alpha=0.0), None),
    "weighted": (WeightedSAM(0.3, gamma=0.0), None),
    "weighted-sam": (WeightedSAM(0.3, gamma=0.5, decouple=False), SAM(0.3)),
    "look": (LookSAM(0.3, k=1), SAM(0.3)),
    "look-alpha": (LookSAM(0.3, k=3, alpha=0.0), SAM(0.3, interval=3)),
    "le": (LESAM(0.3, sigma=1e9), SAM(0.3)),
    "le-base": (LESAM(0.3, sigma=0.0), None),
    "momentum": (MomentumSAM(0.0), None),
    "functional": (FunctionalSAM(0.0), None),
    "fraction": (SAM(0.3, fraction=1.0), SAM(0.3)),
    "stopped": (SAM(0.3, stop_step=0), None),
    "constant-rate": (SAM(0.3, rho_schedule="lr"), SAM(0.3)),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_another_run_to_the_bit(name: str) -> None:
    ours, theirs = (trained(one, adamw) for one in NEUTRAL[name])
    assert cases.same_bits(weights_of(ours), weights_of(theirs))


# Resuming, precision, schedules


def seen(folder: Any, perturbation: Perturbation, resume: str | None = None, **kwargs: Any) -> Classifier:
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    return trained(
        None,
        callbacks=[IRE(kappa=0.0, perturbation=perturbation), keep],
        steps=7,
        max_epochs=3,
        enable_checkpointing=True,
        ckpt_path=resume,
        **kwargs,
    )


REMEMBERING = ["friendly", "look", "look-global"]


@pytest.mark.parametrize("name", cases.first_at_once([*REMEMBERING, *sorted(FORMULAS.keys() - {*REMEMBERING})], 2))
def test_a_resumed_run_goes_on_to_the_bit(name: str, tmp_path: Any) -> None:
    whole = seen(tmp_path / "whole", FORMULAS[name][0]())
    again = seen(tmp_path / "again", FORMULAS[name][0](), str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert cases.same_bits(weights_of(whole), weights_of(again))
    saved = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=False)
    kept = saved["callbacks"]["IRE"]["optimizers"][0].get("memory", {})
    assert bool(kept) is (name in REMEMBERING)


def test_another_method_starts_without_what_one_has_kept(tmp_path: Any) -> None:
    seen(tmp_path / "friendly", FriendlySAM(0.3))
    start = str(tmp_path / "friendly" / "epoch=0.ckpt")
    look = seen(tmp_path / "look", LookSAM(0.3, k=100), start)
    plain = seen(tmp_path / "plain", SAM(0.3, interval=100), start)
    assert cases.same_bits(weights_of(look), weights_of(plain))


class Overflowing(Classifier):
    """The gradient of the third step overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e36 if batch_idx == 2 else loss


@pytest.mark.parametrize("name", cases.first_at_once(sorted(FORMULAS.keys() - {"late"}), 2))
def test_a_step_that_overflows_leaves_nothing_behind(name: str) -> None:
    """As if its batch had not been there."""
    dataset = cases.data(8 * BATCH)
    rest = torch.utils.data.Subset(dataset, [*range(2 * BATCH), *range(3 * BATCH, 8 * BATCH)])
    found = []
    for kind, part in ((Overflowing, dataset), (Classifier, rest)):
        torch.manual_seed(5)
        module = kind(Net(), sgd)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000, backoff_factor=0.99999)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        ire = IRE(kappa=0.0, perturbation=FORMULAS[name][0]())
        cases.fit(module, [ire], cases.loader(part, BATCH), plugins=[plugin], max_epochs=1)
        found.append((weights_of(module), ire._progress.step))
    assert found[0][1] == found[1][1] == 7
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=2e-4)


class OverflowingAbove(Classifier):
    """The gradient at the moved weights of the third step overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e36 if batch_idx == 2 and in_extra_pass() else loss


@pytest.mark.parametrize("name", ["weighted", "weighted-coupled", "gsam", "look", "friendly", "stable"])
def test_an_overflow_at_the_moved_weights_leaves_the_step_out(name: str) -> None:
    torch.manual_seed(5)
    module = OverflowingAbove(Net(), sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ire = IRE(kappa=0.0, perturbation=LookSAM(0.3, k=2) if name == "look" else FORMULAS[name][0]())
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    cases.fit(module, [ire], cases.loader(cases.data(8 * BATCH), BATCH), plugins=[plugin], max_epochs=1)
    assert ire._progress.step == 7
    assert torch.isfinite(weights_of(module)).all()


def test_a_dry_run_makes_no_second_pass(capsys: Any) -> None:
    ire = IRE(kappa=1.0, curvature=EmpiricalFisher(), perturbation=FunctionalSAM(0.1), dry_run=True)
    cases.fit(Classifier(net()), [ire], cases.loader(cases.data(16, torch.float64), BATCH))
    assert "all that take part" in capsys.readouterr().out


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 10 else 0.5)


def test_the_radius_follows_the_learning_rate() -> None:
    run = Plain()
    for index, batch in enumerate(cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH)):
        run.optimizer.param_groups[0]["lr"] = RATE * (1.0 if index < 10 else 0.5)
        run.step(run.sam(batch, 0.3 * (1.0 if index < 10 else 0.5))[1])
    ours = trained(SAM(0.3, rho_schedule="lr"), scheduler=halved)
    torch.testing.assert_close(weights_of(ours), run.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [AverageSAM, MomentumSAM, AdversarialModelPerturbation, LESAM, GSAM])
def test_every_radius_follows_the_learning_rate(kind: Any) -> None:
    """Twice the rate and half of everything else: at half the highest rate the moves are half as long."""
    moves: dict[float, float] = {}
    for share in (1.0, 0.5):
        ascent = ascent_at(share)
        found, _ = kind().displacement(ascent)
        moves[share] = float(torch.cat([one.reshape(-1) for one in found]).norm())
    assert moves[0.5] == pytest.approx(moves[1.0] / 2)


def ascent_at(share: float) -> Any:
    from lightning_ire import Ascent

    weights = [torch.full((3,), 0.5), torch.ones(2)]
    return Ascent(
        parameters=weights,
        gradients=[torch.full((3,), 4.0), torch.full((2,), 9.0)],
        groups=[{}, {}],
        generators=[torch.Generator().manual_seed(0)] * 2,
        names=["a", "b"],
        states=[{"momentum_buffer": torch.ones(3)}, {"momentum_buffer": torch.ones(2)}],
        memory=[{}, {}],
        factors=[share, share],
    )


@pytest.mark.parametrize(
    ("timing", "perturbed"),
    [
        ({}, range(20)),
        ({"start_step": 5}, range(5, 20)),
        ({"start_step": 0.9}, range(18, 20)),
        ({"start_epoch": 1}, range(10, 20)),
        ({"stop_step": 0.25}, range(5)),
        ({"stop_epoch": 1}, range(10)),
        ({"start_step": 3, "stop_epoch": 1}, range(3, 10)),
    ],
)
def test_starts_and_stops_are_counted(timing: Any, perturbed: Any) -> None:
    module = Classifier(net())
    data = cases.loader(cases.data(10 * BATCH, torch.float64), BATCH)
    calls: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            calls.append(module.calls)

    cases.fit(module, [IRE(kappa=0.0, perturbation=SAM(0.1, **timing)), Count()], data, max_epochs=2)
    per_step = [after - before for before, after in zip([0, *calls], calls, strict=False)]
    assert [index for index, passes in enumerate(per_step) if passes == 2] == list(perturbed)


def test_a_perturbation_that_stops_before_it_starts_is_said() -> None:
    data = cases.data()
    steps = len(data)  # of an epoch: they are batches
    with pytest.warns(UserWarning, match=rf"never perturbs: .* starts at step {steps} and stops at step {steps}[.]"):
        cases.fit(Classifier(), [SAM(0.1, start_step=steps, stop_epoch=1)], data, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cases.fit(Classifier(), [SAM(0.1, start_step=steps - 1, stop_epoch=1)], data, max_epochs=2)
    assert not [one for one in caught if "never perturbs" in str(one.message)]


def test_a_perturbation_that_never_starts_is_said() -> None:
    with pytest.warns(UserWarning, match="start_epoch=5. starts at epoch 5, but the run ends"):
        ours = trained(SAM(0.3, start_epoch=5))
    assert cases.same_bits(weights_of(ours), weights_of(trained(None)))


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GSAM(sync=False),
            "Expected GSAM without `sync`, which is always true there, got sync=False: leave it out",
        ),
        (lambda: LookSAM(interval=2), "Expected `k` to say how often LookSAM makes a second pass, got interval=2"),
        (lambda: LESAM(rho=0.1), "Expected `rho_max` for LESAM's radius, got rho=0.1: set `rho_max`"),
        (lambda: WeightedSAM(decouple="no"), "Expected `decouple` to be true or false, got 'no'"),
        (lambda: SAM(sync="no"), "Expected `sync` to be true or false, got 'no'"),
        (lambda: FriendlySAM(lam=1.0), r"Expected `lam` to be a number in \[0, 1\), got 1.0"),
        (lambda: SAM(fraction=0), r"Expected `fraction` to be a number in \(0, 1\], got 0"),
        (lambda: SAM(coordinates="flat"), "Expected `coordinates` to be one of 'all', 'sharp', got 'flat'"),
        (
            lambda: SAM(start_step=1, start_epoch=1),
            "Expected at most one .*`start_step` and `start_epoch`",
        ),
        (lambda: SAM(stop_step=1, stop_epoch=1), "Expected at most one of the stop_.*`stop_step` and `stop_epoch`"),
        (lambda: SAM(stop_step=-1), "Expected `stop_step` to be a whole number >= 0, got -1"),
        (lambda: SAM(start_step=5, stop_step=5), "Expected `stop_step` to be later than `start_step`=5, got 5"),
        (lambda: AverageSAM(rho_schedule="ramp"), "Expected `rho_schedule` to be one of 'constant', 'lr', got 'ramp'"),
        (lambda: FunctionalSAM(fraction=0.5), "Expected FunctionalSAM to see the same outputs in both passes"),
    ],
)
def test_arguments_that_cannot_be_meant(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def refused(message: str, ire: IRE, module: pl.LightningModule | None = None, **kwargs: Any) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        cases.fit(module or Classifier(), [ire], **kwargs)
    assert "\n" not in str(error.value)


def test_a_start_of_the_boost_without_one_says_what_to_write() -> None:
    ire = IRE(kappa=0.0, start_step=3, perturbation=SAM(0.1))
    refused(
        r"got 0: leave `start_step` out, and write SAM\(rho=0.1, start_step=3\) for a perturbation that starts", ire
    )
    refused("leave `start_loss` out .a perturbation starts", IRE(kappa=0, start_loss=1.0, perturbation=SAM(0.1)))
    cases.fit(Classifier(), [IRE(kappa=0, start_epoch=0, perturbation=SAM(0.1))])  # which is what it does
    refused("leave `start_epoch` out[.]$", IRE(kappa=0, start_epoch=1, perturbation=SAM(0.1, start_step=3)))


def test_radii_of_groups_are_not_ignored() -> None:
    def grouped(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(module.parameters()), "sam_rho": 0.2}], lr=0.1)

    ire = IRE(kappa=0, perturbation=AdversarialModelPerturbation())
    refused(
        "Expected no `sam_rho` in parameter groups for AdversarialModelPerturbation", ire, Classifier(optimizer=grouped)
    )


def test_what_needs_a_mask_needs_a_boost() -> None:
    refused("Expected `kappa` > 0 for SAM.*'sharp'.*got kappa=0", IRE(kappa=0, perturbation=SAM(coordinates="sharp")))


def test_momentum_sam_needs_a_momentum() -> None:
    module = Classifier(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    refused("Expected an optimizer with a momentum for MomentumSAM", IRE(kappa=0, perturbation=MomentumSAM()), module)


class ByHand(Classifier):
    """A loss of no known function."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = self.net(batch[0])
        return (z.exp().sum(1).log() - z[:, 0]).mean()


class OfTwoLengths(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0], batch[1][: len(batch[0])]), batch_idx)


def test_a_part_of_a_batch_needs_samples_that_can_be_cut() -> None:
    x, y = cases.data(8).tensors
    train: Any = torch.utils.data.DataLoader([(x, torch.cat([y, y]))], batch_size=None)
    message = (
        r"Expected a batch of tensors with the same first dimension, that of the samples, for SAM\(rho=0.1, "
        r"fraction=0.5\) to cut it, got first dimensions of 8, 16: set `perturbation.fraction` to 1, or put"
    )
    refused(message, IRE(kappa=0, perturbation=SAM(0.1, fraction=0.5)), OfTwoLengths(), train=train)


def test_functional_sam_needs_a_known_loss() -> None:
    refused("Expected a loss made with one of `cross_entropy`", IRE(kappa=0, perturbation=FunctionalSAM()), ByHand())


def test_combining_by_a_class_of_ones_own_has_to_be_synchronized() -> None:
    class Mean(SAM):
        def combine(self, gradients: Any, perturbed: Any, ascent: Any) -> Any:
            return [(g + p) / 2 for g, p in zip(gradients, perturbed, strict=True)]

    refused("Expected a perturbation that combines gradients to have sync=True", IRE(kappa=0, perturbation=Mean(0.1)))
    run = Plain()
    for batch in cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH):
        run.step(sum(run.sam(batch, 0.3)) / 2)
    torch.testing.assert_close(weights_of(trained(Mean(0.3, sync=True))), run.weights, rtol=1e-8, atol=1e-10)


# The mask's sharp coordinates


def test_sharp_coordinates_where_there_is_no_mask_are_all_and_of_a_mask_of_ones_none() -> None:
    found = {}
    for exclude in ("*", ()):
        module = Classifier(net())
        sharp = SAM(0.3, coordinates="sharp")
        ire = IRE(kappa=1e-12, gamma=1.0, curvature=RandomMask(), exclude=exclude, perturbation=sharp)
        cases.fit(module, [ire], cases.loader(cases.data(STEPS * BATCH, torch.float64), BATCH), max_epochs=1)
        found[exclude] = weights_of(module)
    assert cases.same_bits(found["*"], weights_of(trained(SAM(0.3))))
    torch.testing.assert_close(found[()], weights_of(trained(None)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flat", [torch.tensor([True, False, True]), torch.tensor([255, 0, 255], dtype=torch.uint8)])
def test_only_sharp_coordinates_move(flat: Tensor) -> None:
    ascent = ascent_at(1.0)
    ascent = type(ascent)(**{**vars(ascent), "flat": [flat, None]})
    moves, norm = SAM(0.5, coordinates="sharp").displacement(ascent)
    expected = math.sqrt(4.0**2 + 2 * 9.0**2)
    assert float(norm) == pytest.approx(expected)
    torch.testing.assert_close(moves[0], torch.tensor([0.0, 0.5 * 4 / expected, 0.0]))


# As a callback of its own, and what is said of it


@pytest.mark.parametrize("name", ["late", "look", "weighted", "momentum"])
def test_a_perturbation_is_a_callback(name: str) -> None:
    alone = trained(None, callbacks=[FORMULAS[name][0]()])
    assert cases.same_bits(weights_of(alone), weights_of(trained(FORMULAS[name][0]())))


def test_a_perturbation_as_a_callback_resumes_and_serves_two_trainers(tmp_path: Any) -> None:
    sam = LookSAM(0.3, k=3)

    def run(folder: str, resume: str | None = None) -> Classifier:
        keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        kwargs: dict[str, Any] = {"steps": 7, "max_epochs": 3, "enable_checkpointing": True}
        return trained(None, callbacks=[sam, keep], ckpt_path=resume, **kwargs)

    whole = run("whole")
    again = run("again", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert cases.same_bits(weights_of(whole), weights_of(again))


@pytest.mark.parametrize("others", [lambda: [IRE(kappa=1.0)], lambda: [GSAM(0.1)]])
@pytest.mark.parametrize("first", [True, False])
def test_a_perturbation_beside_ire_says_what_to_write(others: Any, first: bool) -> None:
    callbacks = [SAM(0.1), *others()] if first else [*others(), SAM(0.1)]
    with pytest.raises(
        ConfigurationError, match=r"to be the only callback of its kind, got .* as `perturbation="
    ) as error:
        cases.fit(Classifier(), callbacks)
    assert "\n" not in str(error.value)


class Stepping(Classifier):
    """By hand, counting the calls of each closure."""

    def __init__(self) -> None:
        super().__init__(net())
        self.automatic_optimization = False
        self.passes = cases.Notes()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Tensor:
            self.passes[-1] += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer: Any = self.optimizers()
        self.passes.append(0)
        optimizer.step(closure)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
@pytest.mark.parametrize(
    ("timing", "perturbed"),
    [
        ({"start_step": 5}, range(5, 12)),
        ({"start_step": 0.5}, range(6, 12)),
        ({"start_epoch": 1}, range(6, 12)),
        ({"stop_epoch": 1}, range(6)),
        ({"stop_step": 0.5}, range(6)),
    ],
)
def test_starts_and_stops_are_counted_by_hand(kappa: float, timing: Any, perturbed: Any) -> None:
    module = Stepping()
    ire = IRE(kappa=kappa, curvature=EmpiricalFisher(), perturbation=SAM(0.1, **timing))
    cases.fit(module, [ire], cases.loader(cases.data(6 * BATCH, torch.float64), BATCH), max_epochs=2)
    assert [index for index, passes in enumerate(module.passes) if passes == 2] == list(perturbed)


def test_a_failure_before_the_fit_is_the_one_that_is_seen() -> None:
    module = Classifier()
    module.prepare_data = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cases.fit(module, [SAM(0.1)])


@pytest.mark.parametrize("name", [*FORMULAS, *NEUTRAL])
def test_every_class_prints_as_what_made_it(name: str) -> None:
    import lightning_ire

    made = FORMULAS[name][0]() if name in FORMULAS else NEUTRAL[name][0]
    assert vars(eval(repr(made), vars(lightning_ire))) == vars(made)
    assert vars(copy.deepcopy(made)) == vars(made)
