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
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelPruning
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_ire import IRE, SAM, Curvature, EmpiricalFisher, SampledFisher, SharpnessMonitor, in_extra_pass

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
        if BATCHES * (trainer.current_epoch + 1) == SAVED:
            trainer.save_checkpoint(self.path)


@dataclass
class Outcome:
    """What a run has ended with: names of the exact bits, so that large networks can be kept.

    Attributes:
        weights: Of all parameters and buffers.
        optimizers: Of the optimizers' states.
        finite: Whether all weights and buffers are.
        steps: How many steps each optimizer made.
        masks: For how many parameters there is a mask.
        measured: What was measured last.
    """

    weights: dict[str, Any]
    optimizers: list[Any]
    finite: bool
    steps: float
    masks: int
    measured: dict[str, float]


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


def train(
    row: "Row", ours: Sequence[pl.Callback] = (), save: Path | None = None, resume: Path | None = None
) -> Outcome:
    """Train once, from the beginning or from a checkpoint.

    Args:
        row: What to train.
        ours: Callbacks of this package; none: plain Lightning.
        save: Where the checkpoint of the step `SAVED` goes.
        resume: Such a checkpoint.
    """
    matrix.seed_all(5)
    module = row.module()
    callbacks = [*ours, *row.callbacks(), *([SaveOnce(save)] if save else [])]
    trainer = cases.trainer(
        callbacks, max_epochs=EPOCHS, enable_checkpointing=save is not None, log_every_n_steps=STEPS // 2
    )
    matrix.seed_all(3)
    trainer.fit(module, Turning(row.batches()), ckpt_path=resume, weights_only=None if resume is None else False)
    state = module.state_dict()
    return Outcome(
        bits(state),
        [bits(optimizer.state_dict()) for optimizer in trainer.optimizers],
        all(bool(torch.isfinite(value).all()) for value in state.values()),
        trainer.global_step / len(trainer.optimizers),
        sum(len(progress.masks.masks) for one in ours if isinstance(one, IRE) for progress in one._progresses),
        next((one.last.values for one in ours if isinstance(one, SharpnessMonitor) and one.last), {}),
    )


ARMS: dict[str, Callable[["Row"], list[pl.Callback]]] = {
    "base": lambda row: [],
    "forced": lambda row: [IRE(interval=5, exclude="*", curvature=row.curvature(), perturbation=SAM(0.0))],
    "monitored": lambda row: [
        IRE(kappa=0.0, curvature=row.curvature()),
        SharpnessMonitor(10, None, ["trace_fisher", "trace_hessian"], mode="train", max_vectors=2),
    ],
    "sam-ire": lambda row: [IRE(kappa=1.0, gamma=0.8, interval=5, curvature=row.curvature(), perturbation=SAM(0.05))],
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


class MomentumContrast(Exercise):
    """MoCo (He et al., arXiv 1911.05722) as its authors write it: a step first moves the key encoder."""

    def __init__(self) -> None:
        encoder = Net(batch_norm=True)
        super().__init__(pair(encoder, copy.deepcopy(encoder).requires_grad_(False), "query", "key"))
        self.register_buffer("queue", F.normalize(torch.randn(2 * BATCH, CLASSES), dim=1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        for key, query in zip(self.net["key"].parameters(), self.net["query"].parameters(), strict=True):
            key.data = 0.9 * key.data + 0.1 * query.data
        return F.normalize(self.net["key"](x), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = two_views(batch[0])
        queries, keys = F.normalize(self.net["query"](first), dim=1), self.keys(second)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().T], dim=1) / 0.2
        place = int(self.place)
        self.queue[place : place + len(keys)] = keys
        self.place[0] = (place + len(keys)) % len(self.queue)
        return F.cross_entropy(logits, torch.zeros(len(keys), dtype=torch.long))


class SelfDistilled(Exercise):
    """DINO (Caron et al., arXiv 2104.14294): the teacher moves in the step, and so does the center of what it says."""

    def __init__(self) -> None:
        student = Net(batch_norm=True)
        super().__init__(pair(student, copy.deepcopy(student).requires_grad_(False), "student", "teacher"))
        self.register_buffer("center", torch.zeros(CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views = two_views(batch[0])
        with torch.no_grad():
            for teacher, student in zip(
                self.net["teacher"].parameters(), self.net["student"].parameters(), strict=True
            ):
                teacher.data.mul_(0.9).add_(0.1 * student.detach().data)
            aims = [self.net["teacher"](view) for view in views]
        loss = torch.zeros(())
        for view, aim in zip(views, reversed(aims), strict=True):
            soft = ((aim - self.center) / 0.5).softmax(1)
            loss = loss - (soft * F.log_softmax(self.net["student"](view), dim=1)).sum(1).mean() / 2
        self.center = 0.9 * self.center + 0.1 * torch.cat(aims).mean(0)
        return loss


class Anchored(Exercise):
    """EWC (Kirkpatrick et al., arXiv 1612.00796): after a task its weights and their Fisher diagonal are buffers."""

    def __init__(self) -> None:
        super().__init__()
        for index, parameter in enumerate(self.net.parameters()):
            self.register_buffer(f"anchor_{index}", torch.zeros_like(parameter))
            self.register_buffer(f"fisher_{index}", torch.zeros_like(parameter))

    def plain_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), (y + self.current_epoch // 2) % CLASSES)  # a task takes two epochs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        kept = [
            (getattr(self, f"fisher_{index}") * (parameter - getattr(self, f"anchor_{index}")).square()).sum()
            for index, parameter in enumerate(self.net.parameters())
        ]
        return self.plain_loss(*batch[:2]) + 5 * torch.stack(kept).sum()

    def on_train_epoch_end(self) -> None:
        if self.current_epoch % 2 == 0:
            return
        for batch in self.trainer.train_dataloader:
            gradients = torch.autograd.grad(self.plain_loss(*batch[:2]), list(self.net.parameters()))
            for index, gradient in enumerate(gradients):
                getattr(self, f"fisher_{index}").add_(gradient.square())
        for index, parameter in enumerate(self.net.parameters()):
            getattr(self, f"anchor_{index}").copy_(parameter.detach())


class Players(Seeded):
    """Two optimizers in turn, in manual optimization: WGAN-GP (Gulrajani et al., arXiv 1704.00028)."""

    def __init__(self) -> None:
        generator = nn.Sequential(nn.Linear(CLASSES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES))
        critic = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 1))
        super().__init__(pair(generator, critic, "generator", "critic"))
        self.automatic_optimization = False

    def made(self, x: Tensor) -> Tensor:
        return self.net["generator"](torch.randn(len(x), CLASSES))

    def slopes(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.net["critic"](x).sum(), x, create_graph=True)[0].norm(dim=1)

    def critics_loss(self, x: Tensor) -> Tensor:
        made = self.made(x).detach()
        penalty = (self.slopes(torch.lerp(made, x, torch.rand(len(x), 1))) - 1).square().mean()
        return self.net["critic"](made).mean() - self.net["critic"](x).mean() + 10 * penalty

    def generators_loss(self, x: Tensor) -> Tensor:
        return -self.net["critic"](self.made(x)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (self.critics_loss, self.generators_loss), strict=True):

            def closure(optimizer: Any = optimizer, loss: Loss = loss) -> Tensor:
                value = loss(batch[0])
                optimizer.zero_grad()
                self.manual_backward(value)
                return value

            self.toggle_optimizer(optimizer)
            optimizer.step(closure)
            self.untoggle_optimizer(optimizer)

    def sharpness_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.critics_loss(batch[0]) + self.generators_loss(batch[0])

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.net[name].parameters(), lr=0.01, betas=(0.0, 0.9)) for name in ("critic", "generator")
        ]


class Discriminating(Players):
    """The same with a likelihood, and a penalty on real data alone (R1; Mescheder et al., arXiv 1801.04406)."""

    def critics_loss(self, x: Tensor) -> Tensor:
        votes = self.net["critic"](torch.cat([self.made(x).detach(), x]))
        real = torch.arange(len(votes)).unsqueeze(1).ge(len(x)).float()
        return F.binary_cross_entropy_with_logits(votes, real) + 0.5 * self.slopes(x).square().mean()

    def generators_loss(self, x: Tensor) -> Tensor:
        votes = self.net["critic"](self.made(x))
        return F.binary_cross_entropy_with_logits(votes, torch.ones_like(votes))


def denoiser() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES + 1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, FEATURES))


def denoised(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The noise is predicted, at a random time (DDPM; Ho et al., arXiv 2006.11239)."""
    time, noise = torch.rand(len(x), 1), torch.randn_like(x)
    return F.mse_loss(self.net(torch.cat([time.cos() * x + time.sin() * noise, time], dim=1)), noise)


class AveragedInside(Exercise):
    """A moving average of the weights as a part of the module, moved in the step; not frozen, but in no optimizer."""

    def __init__(self) -> None:
        super().__init__(denoiser(), denoised, lambda module: torch.optim.AdamW(module.net.parameters(), lr=0.01))
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.average.update_parameters(self.net)
        return super().training_step(batch, batch_idx)


def residual(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """A physics-informed loss (Raissi et al., arXiv 1711.10561): u_t = u_xx, and u = sin x where t = 0."""
    x.requires_grad_()
    u = self.net(x)[:, :1]
    slopes = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    curved = torch.autograd.grad(slopes[:, 1].sum(), x, create_graph=True)[0][:, 1]
    start = x.detach() * torch.arange(FEATURES).ne(0)
    return F.mse_loss(slopes[:, 0], curved) + F.mse_loss(self.net(start)[:, :1], start[:, 1:2].sin())


def adapted(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """MAML (Finn et al., arXiv 1703.03400): the loss of half a batch after a step for the other half."""
    weights = dict(self.net.named_parameters())
    loss = F.cross_entropy(functional_call(self.net, weights, x[::2]), y[::2])
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: weight - 0.5 * gradient for (name, weight), gradient in zip(weights.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(self.net, moved, x[1::2]), y[1::2])


def adapted_to_tasks(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The same for two tasks at once, by transforms of torch.func."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.net, weights, x), y)

    def after_a_step(x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(loss)(weights, x[::2], y[::2])
        return loss({name: weights[name] - 0.5 * gradients[name] for name in weights}, x[1::2], y[1::2])

    weights = dict(self.net.named_parameters())
    return vmap(after_a_step)(x.unflatten(0, (2, -1)), y.unflatten(0, (2, -1))).mean()


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


class Routed(nn.Module):
    """Each sample goes to the best two of five experts, with noise and a bias that evens their loads out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, 5, bias=False)
        self.experts = nn.ModuleList(Net() for _ in range(5))
        self.register_buffer("bias", torch.zeros(5))
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(1)
        chosen = (scores + 0.1 * torch.randn_like(scores) + self.bias).topk(2, dim=1).indices
        result = x.new_zeros(len(x), CLASSES)
        loads = chosen.flatten().bincount(minlength=5) / len(x)
        for number, expert in enumerate(self.experts):
            rows = chosen.eq(number).any(1).nonzero().squeeze(1)
            if len(rows):
                result = result.index_add(0, rows, scores[rows, number, None] * expert(x[rows]))
        self.bias += 0.1 * (loads.mean() - loads).sign()
        self.balance = (scores.mean(0) * loads).sum()
        return result


def balanced(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(self.net(x), y) + 0.1 * self.net.balance


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


class Pruned(Exercise):
    """Masks of torch.nn.utils.prune, of single weights and of whole rows; more weights go at each epoch."""

    def __init__(self) -> None:
        super().__init__()
        prune.ln_structured(self.net[0], "weight", amount=2, n=2, dim=0)
        prune.random_unstructured(self.net[2], "weight", amount=1)
        self.less()

    def less(self) -> None:
        for index in (0, 2):
            layer = self.net[index]  # `weight` itself is what the last forward pass made: none after a resume
            prune.l1_unstructured(layer, "weight", amount=0.2, importance_scores=layer.weight_orig)

    def on_train_epoch_start(self) -> None:
        self.less()


class LowRank(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685): a product of two thin matrices is added to a frozen layer."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(layer.in_features, rank))
        self.up = nn.Parameter(torch.zeros(rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.dropout(x, 0.1, self.training) @ self.down @ self.up


def quantized(fused: bool) -> nn.Module:
    """Quantization-aware training: the first pass gives the observers' buffers their shape."""
    from torch.ao import quantization

    net: Any = nn.Sequential(quantization.QuantStub(), *Net(), quantization.DeQuantStub())
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=1 if fused else 0)
    return quantization.prepare_qat(net.train())


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
        callbacks: Makes the user's other callbacks.
        resumes: Whether plain Lightning resumes it bit for bit; else why not.
        slow: Whether it takes seconds, or is one of many.
        weekly: Whether it is one of very many.
    """

    id: str
    kind: str
    what: str = ""
    module: Callable[[], pl.LightningModule] = Exercise
    curvature: Callable[[], Curvature] = SampledFisher
    batches: Callable[[], list[Any]] = samples
    callbacks: Callable[[], list[pl.Callback]] = list
    resumes: bool | str = True
    slow: bool = False
    weekly: bool = False


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
    "weights": "a run with ModelPruning is not resumed exactly, with or without IRE: it saves no masks",
    "Hugging Face models": "the model computes its loss from the labels",
    "peft": "",
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
        weekly = name != OTHERS[0]
        yield Row(f"other-{name}", kind, module=module, resumes=resumes, slow=True, weekly=weekly)


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


def adapters() -> pl.LightningModule:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
    return LabelledInside(peft.get_peft_model(bert().net, config))


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
    Row("kfac", "own optimizers", "K-FAC by hooks with `in_extra_pass()`", with_optimizer("", Kronecker)),
    Row(
        "core",
        "own optimizers",
        "sizes of steps by signs (CoRe)",
        with_optimizer("", lambda module: Continual(module.parameters())),
    ),
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
    Row("ewc", "teachers and memories", "anchors and a Fisher diagonal as buffers (EWC)", Anchored),
    Row(
        "average-callback",
        "teachers and memories",
        "diffusion with EMAWeightAveraging",
        with_loss(denoised, denoiser),
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)],
    ),
    Row("average-inside", "teachers and memories", "diffusion with an EMA moved in `training_step`", AveragedInside),
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
    Row("moco", "self-supervised steps", "MoCo", MomentumContrast),
    Row("dino", "self-supervised steps", "DINO", SelfDistilled, EmpiricalFisher),
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
    Row("routed", "other steps", "a mixture of experts with routing per sample", lambda: Exercise(Routed(), balanced)),
    Row("wgan", "other steps", "GANs with a gradient penalty (two optimizers)", Players, EmpiricalFisher),
    Row("gan", "other steps", module=Discriminating, slow=True),
    Row("physics", "other steps", "physics-informed losses", with_loss(residual)),
    Row("maml", "other steps", "MAML", with_loss(adapted)),
    Row("maml-tasks", "other steps", "MAML by torch.func", with_loss(adapted_to_tasks), EmpiricalFisher),
    # weights
    Row(
        "mixout",
        "weights",
        "mixout",
        with_net(lambda: nn.Sequential(Mixout(FEATURES, HIDDEN), nn.Tanh(), Mixout(HIDDEN, CLASSES))),
    ),
    Row("tied", "weights", "tied matrices and shared kernels", with_net(Tied)),
    Row("parametrized", "weights", "parametrize and weight_norm", with_net(parametrized)),
    Row("pruned", "weights", "torch.nn.utils.prune", Pruned),
    Row(
        "model-pruning",
        "weights",
        "ModelPruning",
        callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.2)],
        resumes="the callback saves the pruned weights without their masks",
    ),
    Row(
        "lora",
        "weights",
        "LoRA by hand",
        with_net(lambda: nn.Sequential(LowRank(nn.Linear(FEATURES, HIDDEN)), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))),
    ),
    Row("quantized", "weights", "quantization-aware training", with_net(lambda: quantized(fused=False))),
    Row("quantized-fused", "weights", module=with_net(lambda: quantized(fused=True)), slow=True),
    # other packages
    Row("bert", "Hugging Face models", "BERT (classes)", bert, batches=words("classes"), slow=True),
    Row("peft", "peft", "LoRA in BERT", adapters, batches=words("classes"), slow=True),
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
