"""The compatibility suite: optimizers, losses, networks and steps of other people, one row each.

`ROWS` is the table that tests/test_ecosystem.py runs, `ecosystem_table` what users are told. A row trains 20
steps, four to an epoch. Names of optimizers in `OTHERS` and `UNUSABLE` are those of pytorch_optimizer `VERSION`.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import matrix
import numpy as np
import pytorch_optimizer
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES, Net, OptimizerFactory
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_ire import IRE, SAM, Curvature, EmpiricalFisher, SampledFisher

VERSION = "4.1.0"
EPOCHS, BATCHES, BATCH = 5, 4, 8
STEPS = EPOCHS * BATCHES
SAVED = 8  # the step after which a run is killed: not one of those where a mask is made
HIDDEN = 8

Loss = Callable[..., Tensor]


# One run, and what is kept of it


class Turning:
    """Batches whose order is a function of the epoch, so that a resumed run sees them in the order of the first."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.sampler, self.epoch = list(batches), self, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        first = self.epoch % len(self)
        yield from self.batches[first:] + self.batches[:first]


class Seeded(cases.Classifier):
    """Random numbers are a function of the batch, as Lightning does not save the state of the streams."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = 1000 * self.current_epoch + batch_idx
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes longer than a step
        np.random.seed(seed)
        random.seed(seed)


class Exercise(Seeded):
    """A module whose loss is a function of itself and the parts of a batch."""

    def __init__(
        self, net: nn.Module | None = None, loss: Loss | None = None, optimizer: OptimizerFactory = cases.sgd
    ) -> None:
        super().__init__(net, optimizer)
        self.loss = cross_entropy if loss is None else loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self, *batch)


class SaveOnce(Checkpoint):
    """Saves after the epoch in which a run is to be killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)


@dataclass
class Outcome:
    """What a run has ended with: names of the exact bits, so that large networks can be kept.

    Attributes:
        weights: Of all parameters and buffers.
        optimizer: Of the optimizer's state.
        finite: Whether all weights and buffers are.
        steps: How many optimizer steps there were.
        masks: For how many parameters there is a mask.
    """

    weights: dict[str, Any]
    optimizer: Any
    finite: bool
    steps: int
    masks: int


def bits(value: Any) -> Any:
    """A nested structure with names for the exact bits of tensors and without objects that compare by identity."""
    if isinstance(value, Tensor):
        return matrix.digest([value])
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float, str, torch.dtype)) or value is None:
        return value
    if isinstance(value, Sequence) or hasattr(value, "popleft"):
        return [bits(item) for item in value]
    return getattr(value, "__qualname__", None) or {"class": type(value).__name__, **bits(vars(value))}


def train(row: "Row", ire: IRE | None, save: Path | None = None, resume: Path | None = None) -> Outcome:
    """Train once, from the beginning or from a checkpoint.

    Args:
        row: What to train.
        ire: The callback; `None`: plain Lightning.
        save: Where the checkpoint of the step `SAVED` goes.
        resume: Such a checkpoint.
    """
    matrix.seed_all(5)
    module = row.module()
    callbacks: list[pl.Callback] = [*([ire] if ire else []), *([SaveOnce(save)] if save else [])]
    trainer = cases.trainer(
        callbacks, max_epochs=EPOCHS, enable_checkpointing=save is not None, log_every_n_steps=STEPS // 2
    )
    matrix.seed_all(3)
    trainer.fit(module, Turning(row.batches()), ckpt_path=resume, weights_only=None if resume is None else False)
    state = module.state_dict()
    return Outcome(
        bits(state),
        bits(trainer.optimizers[0].state_dict()),
        all(bool(torch.isfinite(value).all()) for value in state.values()),
        trainer.global_step,
        0 if ire is None else len(ire._progress.masks.masks),
    )


ARMS: dict[str, Callable[["Row"], IRE | None]] = {
    "base": lambda row: None,
    "forced": lambda row: IRE(kappa=0.0, curvature=row.curvature(), perturbation=SAM(0.0)),
    "idle": lambda row: IRE(kappa=0.0, curvature=row.curvature()),
    "sam-ire": lambda row: IRE(kappa=1.0, gamma=0.8, interval=5, curvature=row.curvature(), perturbation=SAM(0.05)),
}


# Losses and steps


def cross_entropy(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(self.net(x), y)


def negative_log_likelihood(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(self.net(x), dim=1), y)


def binary_cross_entropy(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(self.net(x), F.one_hot(y, CLASSES).float())


def squared_error(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.mse_loss(self.net(x), x[:, :CLASSES].sin())


def focal(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Lin et al., arXiv 1708.02002."""
    losses = F.cross_entropy(self.net(x), y, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


def connectionist(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Two labels in six frames of one feature each."""
    frames = F.log_softmax(self.net(x.T.unsqueeze(-1).expand(-1, -1, FEATURES)), dim=-1)
    targets = torch.stack([y.clamp(min=1), (y + 1).clamp(max=CLASSES - 1)], dim=1)
    size = torch.full((len(y),), FEATURES), torch.full((len(y),), 2)
    return F.ctc_loss(frames, targets, *size, zero_infinity=True)


def triplet(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    anchor = self.net(x)
    return F.triplet_margin_loss(anchor, self.net(x + 0.1 * torch.randn_like(x)), anchor.roll(1, 0))


def contrast(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """InfoNCE of two random views, in both directions."""
    first, second = (F.normalize(self.net(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2))
    similarity = first @ second.T / 0.2
    labels = torch.arange(len(x))
    return (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels)) / 2


def with_square_penalty(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(self.net(x), y) + 1e-2 * sum(p.square().sum() for p in self.parameters())


def with_entropy_penalty(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    logits = self.net(x)
    return F.cross_entropy(logits, y) + 0.1 * (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def with_gradient_penalty(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The squared norm of the gradient with respect to the weights: differentiates twice."""
    loss = F.cross_entropy(self.net(x), y)
    gradients = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
    return loss + 0.1 * sum(gradient.square().sum() for gradient in gradients)


def distilled(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    logits = self.net["student"](x)
    with torch.no_grad():
        soft = F.softmax(self.net["teacher"](x) / 2, dim=1)
    return F.cross_entropy(logits, y) + 4 * F.kl_div(F.log_softmax(logits / 2, dim=1), soft, reduction="batchmean")


class WithTeacher(Exercise):
    """The teacher is frozen and in eval mode; its BatchNorm would show if it were not."""

    def __init__(self) -> None:
        teacher = Net(batch_norm=True).requires_grad_(False)
        super().__init__(nn.ModuleDict({"student": Net(), "teacher": teacher}), distilled)

    def on_train_epoch_start(self) -> None:
        self.net["teacher"].eval()


class Remembering(Exercise):
    """Early-learning regularization (Liu et al., arXiv 2007.00151): a buffer of what was predicted for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(BATCHES * BATCH, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        logits = self.net(x)
        predicted = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        self.past[index] = 0.7 * self.past[index] + 0.3 * predicted.detach()
        return F.cross_entropy(logits, y) + 3 * torch.log(1 - (predicted * self.past[index]).sum(1)).mean()


def variational(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    mean, log_variance = self.net["encoder"](x).chunk(2, dim=1)
    drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    return F.mse_loss(self.net["decoder"](drawn), x) + 0.01 * divergence


def two_views(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def stopped_gradient(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """SimSiam (Chen and He, arXiv 2011.10566)."""
    first, second = (self.net["encoder"](view) for view in two_views(x))
    ahead = F.cosine_similarity(self.net["predictor"](first), second.detach()).mean()
    back = F.cosine_similarity(self.net["predictor"](second), first.detach()).mean()
    return -(ahead + back) / 2


class OwnLatent(Exercise):
    """BYOL (Grill et al., arXiv 2006.07733): the target network follows the online one after each batch."""

    def __init__(self) -> None:
        encoder = Net(batch_norm=True)
        target = copy.deepcopy(encoder).requires_grad_(False)
        net = {"encoder": encoder, "predictor": nn.Linear(CLASSES, CLASSES), "target": target}
        super().__init__(nn.ModuleDict(net), self.step)

    @staticmethod
    def step(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        first, second = two_views(x)
        with torch.no_grad():
            aim = self.net["target"](second)
        return 2 - 2 * F.cosine_similarity(self.net["predictor"](self.net["encoder"](first)), aim).mean()

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        pairs = zip(self.net["target"].parameters(), self.net["encoder"].parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 0.1)


def three_terms(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """VICReg (Bardes et al., arXiv 2105.04906): invariance, variance and covariance."""
    views = [self.net(view) for view in two_views(x)]
    loss = F.mse_loss(*views)
    for view in views:
        centered = view - view.mean(0)
        covariance = centered.T @ centered / (len(x) - 1)
        loss = loss + F.relu(1 - (view.var(0) + 1e-4).sqrt()).mean()
        loss = loss + (covariance - covariance.diag().diag()).square().sum() / (25 * CLASSES)
    return loss


class WithLossWeights(Exercise):
    """Two tasks whose weights are learned (Kendall et al., arXiv 1705.07115)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, _ = batch
        logits = self.net(x)
        losses = torch.stack([F.cross_entropy(logits, y), F.mse_loss(logits, x[:, :CLASSES])])
        return ((-self.log_variances).exp() * losses + self.log_variances).sum()


class Experts(nn.Module):
    """Each batch goes to one of three experts; the others get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, 3)
        self.experts = nn.ModuleList(Net() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1).mean(0)
        chosen = int(x[0, 0] > 0) + int(x[0, 1] > 0)
        return weights[chosen] * self.experts[chosen](x)


class Detector(nn.Module):
    """Points of a picture, each with a class and a place; as torchvision's detectors it returns a dict of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.places = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 4)

    def forward(self, pictures: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = [self.body(picture).tanh() for picture in pictures]
        labels = torch.cat([target["labels"] for target in targets])
        boxes = torch.cat([target["boxes"] for target in targets])
        return {
            "classes": F.cross_entropy(self.classes(torch.cat(found)), labels),
            "boxes": F.smooth_l1_loss(self.places(torch.cat(found)), boxes),
        }


def sum_of_losses(self: Exercise, pictures: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    return sum(self.net(pictures, targets).values(), torch.zeros(()))


# Layers


class Mixout(nn.Linear):
    """A linear layer of which random weights are those it began with (Lee et al., arXiv 1909.11299)."""

    def __init__(self, inputs: int, outputs: int, part: float = 0.3) -> None:
        super().__init__(inputs, outputs)
        self.part = part
        self.register_buffer("first", self.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(self.weight, self.part))
        mixed = (torch.where(mask.bool(), self.first, self.weight) - self.part * self.first) / (1 - self.part)
        return F.linear(x, mixed, self.bias)


class Tied(nn.Module):
    """One matrix goes in and, transposed, out again; one kernel is used at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES, bias=False)
        self.out.weight = self.into.weight
        self.kernel = nn.Conv1d(1, 2, 3, padding="same")
        self.tail = nn.Linear(2 * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(self.into(x).tanh()).unsqueeze(1)
        wide = F.conv1d(x, self.kernel.weight, self.kernel.bias, padding=2, dilation=2)
        return self.tail((self.kernel(x) + wide).tanh().flatten(1))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized() -> nn.Module:
    symmetric = nn.Linear(FEATURES, FEATURES)
    parametrize.register_parametrization(symmetric, "weight", Symmetric())
    return nn.Sequential(symmetric, nn.Tanh(), parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)))


def matrices() -> nn.Module:
    """No biases: some optimizers take matrices only."""
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, CLASSES, bias=False))


def pair(first: nn.Module, second: nn.Module, *names: str) -> nn.Module:
    return nn.ModuleDict(dict(zip(names, (first, second), strict=True)))


# Optimizers


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


class TwiceDifferentiable(Exercise):
    """As optimizers want it that estimate the Hessian themselves."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(create_graph=True)


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
NOT_OF_TORCH = {"SparseAdam": "a row of tests/matrix.py", "LBFGS": "refused: runs the closure several times per step"}
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
# trained by the slow tests, with default arguments but for `SETTINGS`
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


# The table


def samples() -> list[Any]:
    """Four batches of features, classes and the samples' numbers."""
    dataset = cases.data(BATCHES * BATCH)
    parts = (*dataset.tensors, torch.arange(len(dataset)))
    return list(zip(*(part.split(BATCH) for part in parts), strict=True))


def pictures_with_points() -> list[Any]:
    """Lists of inputs and dicts of targets, of any number of points."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(BATCHES):
        counts = [1 + (number + index) % 4 for index in range(3)]
        pictures = [torch.randn(count, FEATURES, generator=generator) for count in counts]
        targets = [
            {
                "labels": torch.randint(3, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator),
            }
            for count in counts
        ]
        batches.append((pictures, targets))
    return batches


@dataclass(frozen=True)
class Row:
    """One optimizer, loss, network or kind of step.

    Attributes:
        id: Name of the test.
        kind: The line of the README's table, a key of `KINDS`.
        what: What it is called there; "": it is only counted.
        module: Makes the user's module.
        curvature: Makes the estimate of the curvature.
        batches: Makes the four batches of an epoch.
        resumes: Whether plain Lightning resumes it bit for bit; else why not.
        slow: Whether it takes seconds, or is one of many.
    """

    id: str
    kind: str
    what: str = ""
    module: Callable[[], pl.LightningModule] = Exercise
    curvature: Callable[[], Curvature] = SampledFisher
    batches: Callable[[], list[Any]] = samples
    resumes: bool | str = True
    slow: bool = False


def with_optimizer(name: str, optimizer: OptimizerFactory) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(matrices() if name in MATRICES else None, optimizer=optimizer)


def with_loss(loss: Loss, net: Callable[[], nn.Module] = Net) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(net(), loss)


def with_net(net: Callable[[], nn.Module]) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(net())


# line of the README's table: its note
KINDS: dict[str, str] = {
    "optimizers of torch": "LBFGS is refused: it runs the closure several times per step",
    "fused and foreach optimizers": "",
    "optimizers of pytorch_optimizer": "and {others} more of the {all} in its list; {unusable}",
    "optimizers around another": "",
    "own optimizers": "",
    "losses": "",
    "penalties and weights in the loss": "",
    "teachers and memories": "",
    "self-supervised steps": "",
    "other steps": "",
    "weights": "",
    "Hugging Face models": "the model computes its loss from the labels",
    "timm": "",
    "torchvision": "",
}


def optimizer_rows() -> Iterator[Row]:
    for name, settings in TORCH.items():
        module = with_optimizer(name, of_torch(name, **settings))
        yield Row(f"torch-{name.lower()}", "optimizers of torch", name, module)
    for name, variant, settings in VARIANTS:
        module = with_optimizer(name, of_torch(name, **{variant: True}, **settings))
        kind, slow = "fused and foreach optimizers", (name in ("SGD", "AdamW")) is (variant == "foreach")
        yield Row(f"torch-{name.lower()}-{variant}", kind, f"{name} ({variant})", module, slow=slow)
    kind = "optimizers of pytorch_optimizer"
    for name, title in PACKAGE.items():
        yield Row(name, kind, title, with_optimizer(name, of_package(name)))
    atan2 = of_package("prodigy", eps=None)
    yield Row("prodigy-atan2", kind, "Prodigy with the arctangent for eps", with_optimizer("", atan2))
    for name in OTHERS:
        resumes: bool | str = NO_QUEUES if name == "adashift" else True
        module = with_optimizer(name, of_package(name))
        yield Row(f"other-{name}", kind, module=module, resumes=resumes, slow=True)


# Networks of other packages, with random weights and without a download


class LabelledInside(Seeded):
    """A network that computes its loss itself from a dict of inputs and labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss


def words(labels: str) -> Callable[[], list[Any]]:
    """Batches of token numbers, padded at the end."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for _ in range(BATCHES):
            tokens = torch.randint(32, (4, 7), generator=generator)
            mask = torch.ones_like(tokens)
            mask[0, 5:] = 0
            wanted = torch.randint(CLASSES, (4,), generator=generator)
            if labels == "tokens":
                wanted = tokens.masked_fill(mask == 0, -100)
            batches.append({"input_ids": tokens, "attention_mask": mask, "labels": wanted})
        return batches

    return make


def images(named: bool = False, size: int = 16) -> Callable[[], list[Any]]:
    """Batches of small pictures with a class each."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        batches: list[Any] = []
        for _ in range(BATCHES):
            x = torch.randn(4, 3, size, size, generator=generator)
            y = torch.randint(CLASSES, (4,), generator=generator)
            batches.append({"pixel_values": x, "labels": y} if named else (x, y, torch.arange(4)))
        return batches

    return make


def pictures_with_boxes() -> list[Any]:
    """Pictures of two sizes with one to three boxes, as torchvision's detectors take them."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(BATCHES):
        pictures = [torch.rand(3, 32, 32 + 8 * (number % 2), generator=generator) for _ in range(2)]
        targets = []
        for index in range(2):
            corners = 16 * torch.rand(1 + (number + index) % 3, 2, generator=generator)
            labels = torch.randint(1, 3, (len(corners),), generator=generator)
            targets.append({"boxes": torch.cat([corners, corners + 12], dim=1), "labels": labels})
        batches.append((pictures, targets))
    return batches


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> pl.LightningModule:
    from transformers import BertConfig, BertForSequenceClassification

    return LabelledInside(BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=CLASSES, **SMALL)))


def gpt2() -> pl.LightningModule:
    from transformers import GPT2Config, GPT2LMHeadModel

    return LabelledInside(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)))


def llama() -> pl.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LabelledInside(LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **SMALL)))


def vision_transformer() -> pl.LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=8, num_labels=CLASSES, **SMALL)
    return LabelledInside(ViTForImageClassification(config))


def of_timm(name: str, **settings: Any) -> Callable[[], pl.LightningModule]:
    def make() -> pl.LightningModule:
        import timm

        return Exercise(timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings))

    return make


def timms_optimizer() -> pl.LightningModule:
    from timm.optim import create_optimizer_v2

    return Exercise(optimizer=lambda module: create_optimizer_v2(module, opt="lamb", lr=0.01, weight_decay=0.05))


def soft_targets() -> pl.LightningModule:
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mix, criterion = Mixup(mixup_alpha=0.8, num_classes=CLASSES), SoftTargetCrossEntropy()

    def loss(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        mixed, soft = mix(x.clone(), y)  # in place
        return criterion(self.net(mixed.flatten(1)), soft)

    return Exercise(nn.Sequential(nn.Linear(3 * 16 * 16, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)), loss)


def shufflenet() -> pl.LightningModule:
    from torchvision.models import shufflenet_v2_x0_5

    return Exercise(shufflenet_v2_x0_5(weights=None, num_classes=CLASSES))


def faster_rcnn() -> pl.LightningModule:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    backbone.out_channels = 8
    net = FasterRCNN(
        backbone, min_size=32, max_size=40, box_head=TwoMLPHead(8 * 3 * 3, 16), box_predictor=FastRCNNPredictor(16, 3),
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20,
    )  # fmt: skip
    return Exercise(net, sum_of_losses, of_torch("SGD", lr=0.02, momentum=0.9))


ROWS: list[Row] = [
    *optimizer_rows(),
    Row("lookahead", "optimizers around another", "Lookahead", with_optimizer("", wrapped("Lookahead"))),
    Row("orthograd", "optimizers around another", "OrthoGrad", with_optimizer("", wrapped("OrthoGrad")), slow=True),
    Row("trac", "optimizers around another", "TRAC", with_optimizer("", wrapped("TRAC")), slow=True),
    Row(
        "keeps-norms",
        "own optimizers",
        "weights of fixed norm (LAWN)",
        with_optimizer("", lambda module: KeepsNorms(module.parameters())),
    ),
    Row("by-width", "own optimizers", "a learning rate per width (muP)", with_optimizer("", by_width)),
    # losses
    Row("nll", "losses", "nll_loss of log_softmax", with_loss(negative_log_likelihood)),
    Row("bce", "losses", "binary_cross_entropy_with_logits", with_loss(binary_cross_entropy)),
    Row("mse", "losses", "mse_loss", with_loss(squared_error)),
    Row("focal", "losses", "focal loss", with_loss(focal)),
    Row("ctc", "losses", "ctc_loss", with_loss(connectionist), EmpiricalFisher),
    Row("triplet", "losses", "triplet_margin_loss", with_loss(triplet), EmpiricalFisher),
    Row("squares", "penalties and weights in the loss", "squared weights", with_loss(with_square_penalty)),
    Row("entropy", "penalties and weights in the loss", "entropy of the prediction", with_loss(with_entropy_penalty)),
    Row(
        "gradient-norm",
        "penalties and weights in the loss",
        "norm of the gradient",
        with_loss(with_gradient_penalty),
    ),
    Row("learned-weights", "penalties and weights in the loss", "learned weights of several losses", WithLossWeights),
    Row("distillation", "teachers and memories", "distillation from a frozen teacher", WithTeacher),
    Row("memory", "teachers and memories", "a buffer of past predictions in the loss", Remembering),
    # steps
    Row("info-nce", "self-supervised steps", "InfoNCE", with_loss(contrast)),
    Row(
        "simsiam",
        "self-supervised steps",
        "SimSiam",
        with_loss(
            stopped_gradient, lambda: pair(Net(batch_norm=True), nn.Linear(CLASSES, CLASSES), "encoder", "predictor")
        ),
        EmpiricalFisher,
    ),
    Row("byol", "self-supervised steps", "BYOL", OwnLatent, EmpiricalFisher),
    Row("vicreg", "self-supervised steps", "VICReg", with_loss(three_terms)),
    Row(
        "vae",
        "other steps",
        "variational autoencoder",
        with_loss(variational, lambda: pair(Net(), nn.Linear(CLASSES // 2, FEATURES), "encoder", "decoder")),
        EmpiricalFisher,
    ),
    Row(
        "detection",
        "other steps",
        "a dict of losses, targets of any number",
        with_loss(sum_of_losses, Detector),
        batches=pictures_with_points,
    ),
    Row("experts", "other steps", "experts without a gradient at times", with_net(Experts)),
    # weights
    Row(
        "mixout",
        "weights",
        "mixout",
        with_net(lambda: nn.Sequential(Mixout(FEATURES, HIDDEN), nn.Tanh(), Mixout(HIDDEN, CLASSES))),
    ),
    Row("tied", "weights", "tied matrices and shared kernels", with_net(Tied)),
    Row("parametrized", "weights", "parametrize and weight_norm", with_net(parametrized)),
    # other packages
    Row("bert", "Hugging Face models", "BERT (classes)", bert, batches=words("classes"), slow=True),
    Row("gpt2", "Hugging Face models", "GPT-2", gpt2, batches=words("tokens"), slow=True),
    Row("llama", "Hugging Face models", "Llama", llama, batches=words("tokens"), slow=True),
    Row("vit", "Hugging Face models", "ViT", vision_transformer, batches=images(named=True), slow=True),
    Row(
        "timm-vit",
        "timm",
        "Vision Transformer",
        of_timm(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_heads=2, drop_path_rate=0.2
        ),
        batches=images(),
        slow=True,
    ),
    Row(
        "timm-convolutions",
        "timm",
        "a convolutional network with BatchNorm",
        of_timm("mobilenetv3_small_050", drop_rate=0.2),
        batches=images(size=32),
        slow=True,
    ),
    Row("timm-mixup", "timm", "Mixup and SoftTargetCrossEntropy", soft_targets, EmpiricalFisher, images(), slow=True),
    Row("timm-lamb", "timm", "an optimizer by create_optimizer_v2", timms_optimizer, slow=True),
    Row("shufflenet", "torchvision", "ShuffleNet", shufflenet, batches=images(size=32), slow=True),
    Row("faster-rcnn", "torchvision", "Faster R-CNN", faster_rcnn, batches=pictures_with_boxes, slow=True),
]


def ecosystem_table() -> str:
    """What users are told, one line per kind."""
    numbers = {"others": len(OTHERS), "all": len(PACKAGE) + len(OTHERS) + len(UNUSABLE)}
    names: dict[str, list[str]] = {}
    for title, reason in UNUSABLE.values():
        names.setdefault(reason, []).append(title)
    unusable = "; ".join(f"not {' and '.join(titles)}: {reason}" for reason, titles in names.items())
    lines = ["| what | which | note |", "| --- | --- | --- |"]
    for kind, note in KINDS.items():
        which = [row.what for row in ROWS if row.kind == kind and row.what]
        lines.append(f"| {kind} | {', '.join(which)} | {note.format(**numbers, unusable=unusable)} |")
    return "\n".join(lines)
