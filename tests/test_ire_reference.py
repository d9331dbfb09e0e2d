"""The callback against the slow plain loop of `reference.py`: weights, buffers, masks after 32 steps in float64."""

from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import reference
import torch
from modules import Classifier, Net
from torch import nn

from lightning_ire import (
    IRE,
    SAM,
    AdversarialModelPerturbation,
    AverageSAM,
    EmpiricalFisher,
    HutchinsonHessian,
    RandomMask,
    SecondMoment,
)

STEPS, EPOCHS = 8, 4


def two_groups(make: Any, **kwargs: Any) -> Any:
    """Two parameter groups with different learning rates and weight decays."""

    def factory(module: nn.Module) -> torch.optim.Optimizer:
        parameters = list(module.parameters())
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": kwargs["lr"] / 3, "weight_decay": 0.05}]
        return make(groups, **kwargs)

    return factory


def one_group(make: Any, **kwargs: Any) -> Any:
    return lambda module: make(module.parameters(), **kwargs)


OPTIMIZERS = {
    "sgd": one_group(torch.optim.SGD, lr=0.1),
    "sgd-nesterov": one_group(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-groups": two_groups(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "sgd-foreach": one_group(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": one_group(torch.optim.Adam, lr=0.01, weight_decay=1e-2),
    "adamw": one_group(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw-fused": one_group(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-groups": two_groups(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "sgd-radii": lambda module: torch.optim.SGD(
        [
            {"params": list(module.parameters())[:2], "sam_rho": 0.3},
            {"params": list(module.parameters())[2:3], "sam_rho": 0.0},
            {"params": list(module.parameters())[3:]},
        ],
        lr=0.1,
    ),
    "sgd-kappas": lambda module: torch.optim.SGD(
        [
            {"params": list(module.parameters())[:1], "ire_kappa": 0.5},
            {"params": list(module.parameters())[1:2], "ire_kappa": 0},
            {"params": list(module.parameters())[2:], "lr": 0.05},
        ],
        lr=0.1,
    ),
    "sgd-mixed": lambda module: torch.optim.SGD(
        [
            {"params": list(module.parameters())[:2]},
            {"params": list(module.parameters())[2:], "lr": 0.01, "maximize": True},
        ],
        lr=0.1,
    ),
    "rmsprop": one_group(torch.optim.RMSprop, lr=0.003),
}


@dataclass
class Case:
    """One row: the callback's arguments, the same for the reference, and what else differs from the default."""

    ire: dict[str, Any]
    recipe: dict[str, Any]
    optimizer: str = "sgd-groups"
    batch_norm: bool = False
    micro_batches: int = 1
    scheduler: bool = False
    fit: dict[str, Any] = field(default_factory=dict)


BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 5}
METHODS = {
    "ire": Case(BOOST, BOOST),
    "sam": Case({"kappa": 0.0, "perturbation": SAM(0.05)}, {"rho": 0.05}),
    "sam-ire": Case({**BOOST, "perturbation": SAM(0.05)}, {**BOOST, "rho": 0.05}),
}
ROWS = {
    f"{method}-{name}": Case(case.ire, case.recipe, optimizer=name)
    for method, case in METHODS.items()
    for name in OPTIMIZERS
    if name not in ("sgd-radii", "sgd-kappas")
}
BY_NAME = {
    "kappa": {"*.bias": 0.5, "net.2*": 3.0, "*": 1.0},
    "gamma": {"net.0*": 0.9, "*": 0.4},
    "interval": 5,
}
ROWS |= {
    "ire-batchnorm": Case(BOOST, BOOST, batch_norm=True),
    "sam-ire-batchnorm": Case({**BOOST, "perturbation": SAM(0.05)}, {**BOOST, "rho": 0.05}, batch_norm=True),
    "ire-late": Case({**BOOST, "start_step": 7}, {**BOOST, "start": 7}),
    "ire-fraction": Case({**BOOST, "start_step": 0.25}, {**BOOST, "start": 8}),
    "ire-epoch": Case({**BOOST, "start_epoch": 2}, {**BOOST, "start": 16}),
    "sam-then-ire": Case(
        {**BOOST, "start_epoch": 2, "perturbation": SAM(0.05)}, {**BOOST, "start": 16, "rho": 0.05}
    ),
    "ire-accumulated": Case(BOOST, BOOST, micro_batches=2),
    "sam-ire-accumulated": Case({**BOOST, "perturbation": SAM(0.1)}, {**BOOST, "rho": 0.1}, micro_batches=4),
    "ire-own-kappas": Case(BOOST, BOOST, optimizer="sgd-kappas"),
    "ire-own-kappas-lr-schedule": Case(
        {**BOOST, "kappa_schedule": "lr", "start_step": 6},
        {**BOOST, "kappa_schedule": "lr", "start": 6},
        optimizer="sgd-kappas",
        scheduler=True,
    ),
    "ire-by-name": Case(BY_NAME, BY_NAME),
    "ire-by-name-per-tensor": Case({**BY_NAME, "scope": "tensor"}, {**BY_NAME, "scope": "tensor"}),
    "ire-by-name-own-kappas-lr-schedule": Case(
        {**BY_NAME, "kappa_schedule": "lr", "start_step": 6, "exclude": "net.0.bias"},
        {**BY_NAME, "kappa_schedule": "lr", "start": 6, "exclude": ["net.0.bias"]},
        optimizer="sgd-kappas",
        scheduler=True,
    ),
    "ire-ramp": Case(
        {**BY_NAME, "kappa_schedule": "ramp", "ramp_steps": 9, "start_step": 6}, {**BY_NAME, "ramp": 9, "start": 6}
    ),
    "ire-ramp-fraction": Case(
        {**BOOST, "kappa_schedule": "ramp", "ramp_steps": 0.4}, {**BOOST, "ramp": 12}, micro_batches=2
    ),
    "ire-every-step": Case({**BOOST, "interval": 1}, {**BOOST, "interval": 1}),
    "ire-all-flat": Case({**BOOST, "gamma": 1.0}, {**BOOST, "gamma": 1.0}),
    "ire-per-tensor": Case({**BOOST, "scope": "tensor"}, {**BOOST, "scope": "tensor"}),
    "ire-exclude": Case({**BOOST, "exclude": ["*.bias", "net.0*"]}, {**BOOST, "exclude": ["*.bias", "net.0*"]}),
    "ire-moving-average": Case({**BOOST, "beta": 0.6}, {**BOOST, "beta": 0.6}),
    "ire-lr-schedule": Case(
        {**BOOST, "kappa_schedule": "lr", "start_step": 6},
        {**BOOST, "kappa_schedule": "lr", "start": 6},
        scheduler=True,
    ),
    "ire-decay-apart": Case(
        {**BOOST, "scale_weight_decay": False}, {**BOOST, "scale_weight_decay": False}, optimizer="adamw-groups"
    ),
    "ire-decay-only": Case(
        {**BOOST, "scale_weight_decay": "only"}, {**BOOST, "scale_weight_decay": "only"}, optimizer="adamw-groups"
    ),
    "ire-empirical": Case({**BOOST, "curvature": EmpiricalFisher()}, {**BOOST, "curvature": "empirical"}),
    "sam-ire-empirical": Case(
        {**BOOST, "curvature": EmpiricalFisher(), "perturbation": SAM(0.05)},
        {**BOOST, "curvature": "empirical", "rho": 0.05},
    ),
    "ire-empirical-clipped": Case(
        {**BOOST, "curvature": EmpiricalFisher()},
        {**BOOST, "curvature": "empirical", "clip": 0.05},
        fit={"gradient_clip_val": 0.05},
    ),
    "sam-ire-clipped": Case(
        {**BOOST, "perturbation": SAM(0.05)}, {**BOOST, "rho": 0.05, "clip": 0.05}, fit={"gradient_clip_val": 0.05}
    ),
    "asam-ire": Case(
        {**BOOST, "perturbation": SAM(0.5, adaptive=True)}, {**BOOST, "rho": 0.5, "adaptive": True}, optimizer="adam"
    ),
    "asam-weights": Case(
        {"kappa": 0.0, "perturbation": SAM(0.5, adaptive="weights", eta=0.01)},
        {"rho": 0.5, "adaptive": "weights", "eta": 0.01}, batch_norm=True,
    ),
    "asam-eta": Case(
        {**BOOST, "perturbation": SAM(0.5, adaptive=True, eta=0.3)}, {**BOOST, "rho": 0.5, "adaptive": True, "eta": 0.3}
    ),
    "asam-mixed": Case(
        {"kappa": 0.0, "perturbation": SAM(0.5, adaptive=True)}, {"rho": 0.5, "adaptive": True}, optimizer="sgd-mixed"
    ),
    "amp-mixed": Case(
        {"kappa": 0.0, "perturbation": AdversarialModelPerturbation(0.2, zeta=0.5, ascents=3, scope="global")},
        {"ball": (0.5, 0.2, 3, "global")}, optimizer="sgd-mixed",
    ),
    "sam-on": Case(
        {"kappa": 0.0, "perturbation": SAM(0.1, parameters="norm")}, {"rho": 0.1, "norm_only": True}, batch_norm=True
    ),
    "sam-sometimes": Case(
        {**BOOST, "perturbation": SAM(0.1, interval=3)}, {**BOOST, "rho": 0.1, "sam_interval": 3}
    ),
    "sam-sync": Case({"kappa": 0.0, "perturbation": SAM(0.1, sync=True)}, {"rho": 0.1}),
    "sam-pattern": Case(
        {**BOOST, "perturbation": SAM(0.1, parameters=["*.weight", "nothing"])},
        {**BOOST, "rho": 0.1, "only": "*.weight"},
    ),
    "sam-radii": Case({"kappa": 0.0, "perturbation": SAM(0.1)}, {"rho": 0.1}, optimizer="sgd-radii"),
    "asam-radii": Case(
        {"kappa": 0.0, "perturbation": SAM(0.1, adaptive=True)}, {"rho": 0.1, "adaptive": True}, optimizer="sgd-radii"
    ),
    "amp": Case(
        {**BOOST, "perturbation": AdversarialModelPerturbation(0.1)}, {**BOOST, "ball": (1.0, 0.1, 1, "tensor")},
        batch_norm=True,
    ),
    "amp-three-ascents": Case(
        {"kappa": 0.0, "perturbation": AdversarialModelPerturbation(0.2, zeta=0.5, ascents=3, scope="global")},
        {"ball": (0.5, 0.2, 3, "global")}, micro_batches=2, batch_norm=True,
    ),
    "amp-inside-the-ball": Case(
        {**BOOST, "perturbation": AdversarialModelPerturbation(9.0, zeta=0.3, ascents=2)},
        {**BOOST, "ball": (0.3, 9.0, 2, "tensor")},
    ),
    "ire-second-moment": Case(
        {**BOOST, "curvature": SecondMoment(), "start_step": 4},
        {**BOOST, "curvature": "second-moment", "start": 4}, optimizer="adamw",
    ),
    "ire-random": Case({**BOOST, "curvature": RandomMask()}, {**BOOST, "curvature": "random"}),
    "ire-hessian": Case({**BOOST, "curvature": HutchinsonHessian()}, {**BOOST, "curvature": "hessian"}),
    "sam-ire-hessian-accumulated": Case(
        {**BOOST, "curvature": HutchinsonHessian(), "perturbation": SAM(0.1), "beta": 0.5},
        {**BOOST, "curvature": "hessian", "rho": 0.1, "beta": 0.5}, micro_batches=4,
    ),
    "average-sam": Case({"kappa": 0.0, "perturbation": AverageSAM(0.1)}, {"rho": 0.1, "average": True}),
    "average-sam-ire": Case(
        {**BOOST, "perturbation": AverageSAM(0.1)}, {**BOOST, "rho": 0.1, "average": True}, micro_batches=2,
        batch_norm=True,
    ),
}  # fmt: skip


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.1, 0.03, 0.05][: len(optimizer.param_groups)], total_steps=STEPS * EPOCHS + 1
    )


@pytest.mark.parametrize("case", cases.every_second(ROWS.values()), ids=ROWS.keys())
def test_callback_equals_the_reference(case: Case) -> None:
    dataset = cases.data(samples=STEPS * 8, dtype=torch.float64)
    module = Classifier(
        Net(batch_norm=case.batch_norm).double(), OPTIMIZERS[case.optimizer], schedule if case.scheduler else None
    )
    plain = cases.clone(module)
    size = 8 // case.micro_batches
    ire = IRE(**case.ire)
    cases.fit(
        module,
        [ire],
        cases.loader(dataset, batch_size=size),
        max_epochs=EPOCHS,
        precision="64-true",
        accumulate_grad_batches=case.micro_batches,
        **case.fit,
    )

    batches = [(x, y) for x, y in cases.loader(dataset, batch_size=size)]
    windows = [batches[i : i + case.micro_batches] for i in range(0, len(batches), case.micro_batches)] * EPOCHS
    recipe = reference.Recipe(**case.recipe)
    masks = reference.train(_Reference(plain), plain.make_optimizer, windows, recipe, plain.make_scheduler)

    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=1e-9, atol=1e-11)
    if recipe.kappa:
        names = [name for name, _ in plain.named_parameters()]
        kept = ire._progress.masks.masks
        for name, mask in zip(names, masks[-1], strict=True):
            assert torch.equal(kept.get(name, torch.zeros_like(mask)), mask), name


class _Reference(nn.Module):
    """The classifier as a function of x, with the parameter names of the LightningModule."""

    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.net = module.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_the_rows_really_differ() -> None:
    """The comparison has teeth: another kappa, gamma or rho is seen at once."""
    dataset = cases.data(samples=STEPS * 8, dtype=torch.float64)
    start = Classifier(Net().double(), OPTIMIZERS["sgd-groups"])
    results = []
    for settings in (
        {"kappa": 0.0, "perturbation": SAM(0.0)},
        BOOST,
        {**BOOST, "kappa": 2.01},
        {**BOOST, "gamma": 0.75},
        {**BOOST, "perturbation": SAM(0.05)},
        {**BOOST, "perturbation": SAM(0.051)},
        {**BOOST, "perturbation": AverageSAM(0.05)},
    ):
        module = cases.clone(start)
        cases.fit(module, [IRE(**settings)], cases.loader(dataset), max_epochs=EPOCHS, precision="64-true")
        results.append(module)
    for first in range(len(results)):
        for second in range(first):
            assert cases.moved(results[first], results[second]) > 1e-6
