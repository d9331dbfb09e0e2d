"""Optimizers: lists of those of torch and of pytorch_optimizer, and some of our own.

Names in `OTHERS` and `UNUSABLE` are those of pytorch_optimizer `VERSION`.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytorch_optimizer
import torch
from modules import OptimizerFactory
from torch import Tensor, nn

from ecosystem.batches import STEPS
from ecosystem.modules import Exercise, matrices
from lightning_ire import in_extra_pass

VERSION = "4.1.0"


class KeepsNorms(torch.optim.Optimizer):
    """Steps along the sphere on which each weight tensor began, as LAWN does (arXiv 2106.05337)."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("norm", parameter.norm())
                parameter.sub_(parameter.grad, alpha=group["lr"])
        self.project()
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """Put the weights back on their spheres; IRE calls it after its boost."""
        for parameter, state in self.state.items():
            parameter.mul_(state["norm"] / parameter.norm())


class Kronecker(torch.optim.Optimizer):
    """K-FAC (Martens and Grosse, arXiv 1503.05671), its factors collected by hooks of the linear layers."""

    def __init__(self, module: nn.Module, lr: float = 0.02) -> None:
        super().__init__(module.parameters(), {"lr": lr})
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self.see_inputs)
                layer.register_full_backward_hook(self.see_gradients)

    def see_inputs(self, layer: nn.Linear, inputs: tuple[Tensor]) -> None:
        self.see(layer, "inputs", inputs[0])

    def see_gradients(self, layer: nn.Linear, inputs: Any, outputs: tuple[Tensor]) -> None:
        self.see(layer, "outputs", len(outputs[0]) * outputs[0])

    def see(self, layer: nn.Linear, name: str, rows: Tensor) -> None:
        """A moving average of the factor, and how many passes it has seen."""
        if in_extra_pass():
            return
        factor, state = rows.detach().T @ rows.detach() / len(rows), self.state[layer.weight]
        state[name] = factor.lerp(state.get(name, factor), 0.9)
        state[f"{name}_seen"] = state.get(f"{name}_seen", 0) + 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                update, state = parameter.grad, self.state[parameter]
                if "inputs" in state:
                    left, right = (state[name] + torch.eye(len(state[name])) for name in ("outputs", "inputs"))
                    update = torch.linalg.solve(right, torch.linalg.solve(left, update).T).T
                parameter.sub_(update, alpha=group["lr"])
        return loss


class Continual(torch.optim.Optimizer):
    """CoRe (Eckhoff and Reiher, arXiv 2307.15663): sizes of steps by signs, and the most important weights stay."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    zero = torch.zeros_like(weight)
                    state |= {"step": 0, "g": zero, "h": zero, "score": zero, "size": zero + group["lr"]}
                state["step"] += 1
                before, state["g"] = state["g"], state["g"].lerp(weight.grad, 0.3)
                state["h"] = state["h"].lerp(weight.grad.square(), 0.01)
                unbiased = [state[name] / (1 - beta ** state["step"]) for name, beta in (("g", 0.7), ("h", 0.99))]
                direction = unbiased[0] / (unbiased[1].sqrt() + 1e-8)
                agreement = (before * state["g"]).sign()
                factor = torch.where(agreement > 0, 1.2, torch.where(agreement < 0, 0.7375, 1.0))
                state["size"] = (state["size"] * factor).clamp(1e-6, 0.1)
                stays = state["score"] > state["score"].flatten().quantile(0.9) if state["step"] > 10 else False
                update = (direction * state["size"]).masked_fill(torch.as_tensor(stays), 0.0)
                state["score"] = state["score"].lerp(state["g"] * update, 0.1)
                weight.sub_(update + 1e-3 * update.abs() * weight)
        return loss


class Twice(KeepsNorms):
    """SGD with a SAM of its own: runs the closure twice per step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        with torch.enable_grad():
            loss = closure()
        old = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for parameter, before in zip(parameters, old, strict=True):
            parameter.copy_(before).sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
        return loss


def of_torch(name: str, **settings: Any) -> OptimizerFactory:
    return lambda module: getattr(torch.optim, name)(module.parameters(), **settings)


def matrices_and_rest(module: nn.Module) -> list[dict[str, Any]]:
    """The groups that optimizers of Muon's family want in pytorch_optimizer."""
    parameters = list(module.parameters())
    return [{"params": [p for p in parameters if (p.dim() == 2) is use], "use_muon": use} for use in (True, False)]


def of_package(name: str, **settings: Any) -> OptimizerFactory:
    """An optimizer of pytorch_optimizer, with what its constructor wants."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        wanted: Any = module.parameters()
        if name in OF_MODULE:
            wanted = module
        elif name in GROUPED:
            wanted = matrices_and_rest(module)
        return pytorch_optimizer.load_optimizer(name)(wanted, **{**SETTINGS.get(name, {}), **settings})

    return make


def wrapped(name: str) -> OptimizerFactory:
    """An optimizer of pytorch_optimizer around another."""
    return lambda module: getattr(pytorch_optimizer, name)(torch.optim.AdamW(module.parameters(), lr=0.01))


def by_width(module: nn.Module) -> torch.optim.Optimizer:
    """MuP (arXiv 2203.03466): the learning rate of a matrix goes down with its inputs."""
    groups = [
        {"params": [parameter], "lr": 0.02 / (parameter.shape[1] if parameter.dim() == 2 else 1)}
        for parameter in module.parameters()
    ]
    return torch.optim.AdamW(groups)


# what the constructors of some of them want
GROUPED = {"muon", "adago", "adamuon", "muonclip", "normuon"}
OF_MODULE = {"adammini"}
MATRICES = {"Muon", "spectralsphere"}
SETTINGS: dict[str, dict[str, Any]] = {
    "ranger21": {"num_iterations": STEPS},
    "sara": {"threshold": 0.2, "lr": 0.01},  # by default it trains weights below 0.001 only: none here
    "scalableshampoo": {"start_preconditioning_step": 3, "preconditioning_compute_steps": 2},
    "spectralsphere": {"solver_max_iterations": 4, "power_iteration_steps": 2},
}
TORCH: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"weight_decay": 0.01},
    "AdamW": {},
    "Adamax": {},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
}
# which of torch's are no row, and why
NOT_OF_TORCH = {
    "SparseAdam": "a row of tests/matrix/rows.py",
    "LBFGS": "refused: runs the closure several times per step",
}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    (name, variant, settings)
    for name, settings in (
        ("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True}), ("AdamW", {}), ("Adagrad", {"lr": 0.1})
    )
    for variant in ("fused", "foreach")
]  # fmt: skip
PACKAGE: dict[str, str] = {
    "lion": "Lion", "gravity": "Gravity", "shampoo": "Shampoo", "scalableshampoo": "ScalableShampoo", "soap": "SOAP",
    "kron": "Kron (PSGD)", "adan": "Adan", "muon": "Muon", "lars": "LARS", "lamb": "LAMB",
    "schedulefreeadamw": "ScheduleFreeAdamW", "alig": "AliG",
}  # fmt: skip
# trained by `make test-weekly`, the first of them by `make test-all` too, with default arguments but for `SETTINGS`
OTHERS: tuple[str, ...] = (
    "a2grad", "accsgd", "adabelief", "adabound", "adadelta", "adafactor", "adagc", "adago", "adai", "adalite", "adam",
    "adamax", "adamc", "adamg", "adammini", "adamod", "adamp", "adams", "adamuon", "adamw", "adamwsn", "adanorm",
    "adapnm", "adashift", "adasmooth", "adatam", "ademamix", "adopt", "aggmo", "aida", "alice", "amos", "ano", "apollo",
    "apollodqn", "asgd", "avagrad", "bcos", "came", "conda", "dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion",
    "dadaptsgd", "dash", "diffgrad", "dualadam", "emofact", "emolynx", "emonavi", "exadam", "fadam", "fira",
    "flashadamw", "focus", "fromage", "ftrl", "galore", "grams", "grokfastadamw", "kate", "laprop", "lorarite",
    "madgrad", "magma", "mars", "msvag", "muonclip", "nadam", "nero", "normuon", "novograd", "padam", "pid", "pnm",
    "prodigy", "qhadam", "qhm", "racs", "radam", "ranger", "ranger21", "rmsprop", "rose", "sara", "schedulefreeradam",
    "schedulefreesgd", "scion", "scionlight", "sgd", "sgdp", "sgdsai", "sgdw", "signsgd", "simplifiedademamix", "sm3",
    "spam", "spectralsphere", "splus", "srmm", "stableadamw", "stablespam", "swats", "tam", "tiger", "vsgd", "yogi",
)  # fmt: skip
# those that a plain `configure_optimizers` cannot train, or not with the callback: name, why
UNUSABLE: dict[str, tuple[str, str]] = {
    "lbfgs": ("LBFGS", "runs the closure several times per step"),
    "bsam": ("BSAM", "runs the closure several times per step"),
    "adahessian": ("AdaHessian", "differentiates gradients again, which works with IRE alone, without SAM"),
    "sophiah": ("SophiaH", "differentiates gradients again, which works with IRE alone, without SAM"),
    "lomo": ("LOMO", "steps inside its own backward pass"),
    "adalomo": ("AdaLOMO", "steps inside its own backward pass"),
    "demo": ("DeMo", "needs a process group"),
    "distributedmuon": ("DistributedMuon", "needs a process group"),
}
NO_QUEUES = "the optimizer keeps a queue of gradients that torch's `load_state_dict` does not restore"


def with_optimizer(name: str, optimizer: OptimizerFactory) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(matrices() if name in MATRICES else None, optimizer=optimizer)
