"""Losses, steps and layers of other people, in small modules."""

import copy
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from modules import Classifier, Net, OptimizerFactory, sgd
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ecosystem.batches import BATCH, BATCHES

HIDDEN = 8
Loss = Callable[..., Tensor]


class Seeded(Classifier):
    """Random numbers are a function of the batch, as Lightning does not save the state of the streams."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = 1000 * self.current_epoch + batch_idx
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes longer than a step
        np.random.seed(seed)
        random.seed(seed)


class Exercise(Seeded):
    """A module whose loss is a function of itself and the parts of a batch."""

    def __init__(
        self, net: nn.Module | None = None, loss: Loss | None = None, optimizer: OptimizerFactory = sgd
    ) -> None:
        super().__init__(net, optimizer)
        self.loss = cross_entropy if loss is None else loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self, *batch)


def pair(first: nn.Module, second: nn.Module, *names: str) -> nn.Module:
    return nn.ModuleDict(dict(zip(names, (first, second), strict=True)))


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


class TwiceDifferentiable(Exercise):
    """As optimizers want it that estimate the Hessian themselves."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(create_graph=True)


def with_loss(loss: Loss, net: Callable[[], nn.Module] = Net) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(net(), loss)


def with_net(net: Callable[[], nn.Module]) -> Callable[[], pl.LightningModule]:
    return lambda: Exercise(net())
