"""SampledFisher in training: which losses it sees, what it squares, in whose forward pass, and that h is unbiased."""

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, recorded
from modules import Custom, Net, standing_still
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.functional import cross_entropy as imported_directly
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_ire import IRE, SAM, AverageSAM, ConfigurationError, Curvature, SampledFisher, in_extra_pass
from lightning_ire.curvature.tap import LossTap
from lightning_ire.functional import SAMPLED, sampled_losses

SLOW = "takes the samples one by one here, which is slow"


def estimates(
    module: pl.LightningModule, train: DataLoader | None = None, curvature: Curvature | None = None, **kwargs: Any
) -> list[Any]:
    """The estimates of a run in which the weights stay where they are."""
    curvature = SampledFisher() if curvature is None else curvature
    module.make_optimizer = standing_still  # type: ignore[assignment]
    return cases.estimates(module, curvature, train, **kwargs)


def assert_same_estimates(first: list[Any], second: list[Any], exact: bool = True, **tolerances: float) -> None:
    assert len(first) == len(second) > 0
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if exact:
                assert cases.same_bits(a, b)
            else:
                torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-14, **tolerances})


def shared(logits: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(logits, y)


def two_terms(logits: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(logits, y) + 0.3 * F.mse_loss(logits, logits.detach().tanh())


# one forward pass


@pytest.mark.parametrize("loss", [shared, two_terms])
@pytest.mark.parametrize(
    "loop", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "64-true"}]
)
@pytest.mark.parametrize("net", [Net(), Net(batch_norm=True, dropout=0.4)], ids=["plain", "batchnorm-dropout"])
def test_shared_forward_equals_a_separate_one_to_the_last_bit(loop: dict[str, Any], net: nn.Module, loss: Any) -> None:
    """AverageSAM(0) makes it run its own pass, at the same weights."""
    first, second = cases.clone(Custom(loss, net)), cases.clone(Custom(loss, net))
    assert_same_estimates(estimates(first, **loop), estimates(second, **loop, perturbation=AverageSAM(0.0)))
    assert first.calls == 8
    assert second.calls == 16


WEIGHTS = torch.tensor([0.2, 1.0, 2.0, 0.5])
LOSSES: dict[str, tuple[Any, Any, float]] = {
    "class": (lambda z, y, m: nn.CrossEntropyLoss()(z, y), shared, 1),
    "imported": (lambda z, y, m: imported_directly(z, y), shared, 1),
    "keywords": (lambda z, y, m: F.cross_entropy(target=y, input=z), shared, 1),
    "in-a-mapping": (lambda z, y, m: {"loss": F.cross_entropy(z, y), "logits": z.detach()}, shared, 1),
    "label-smoothing": (lambda z, y, m: F.cross_entropy(z, y, label_smoothing=0.3), shared, 1),
    "soft-targets": (lambda z, y, m: F.cross_entropy(z, F.one_hot(y, CLASSES).float() * 0.9 + 0.025), shared, 1),
    "sum": (lambda z, y, m: F.cross_entropy(z, y, reduction="sum"), shared, 8),
    "sum-flag": (lambda z, y, m: F.cross_entropy(z, y, size_average=False), shared, 8),
    "none-then-mean": (lambda z, y, m: F.cross_entropy(z, y, reduction="none").mean(), shared, 1),
    "none-then-sum": (lambda z, y, m: F.cross_entropy(z, y, reduction="none").sum(), shared, 8),
    "none-flag": (lambda z, y, m: F.cross_entropy(z, y, reduce=False).mean(), shared, 1),
    "penalty": (lambda z, y, m: F.cross_entropy(z, y) + m.net[0].weight.square().sum(), shared, 1),
    "scaled": (lambda z, y, m: 7.0 * F.cross_entropy(z, y), shared, 7),
    "negative": (lambda z, y, m: -7.0 * F.cross_entropy(z, y), shared, 7),
    "shape-1": (lambda z, y, m: F.cross_entropy(z, y).reshape(1), shared, 1),
    "halves": (lambda z, y, m: 0.5 * F.cross_entropy(z[:4], y[:4]) + 0.5 * F.cross_entropy(z[4:], y[4:]), shared, 1),
    "metric-beside": (lambda z, y, m: (F.cross_entropy(z.detach(), y), F.cross_entropy(z, y))[1], shared, 1),
    "nll": (lambda z, y, m: F.nll_loss(z.log_softmax(-1), y), shared, 1),
    "nll-layer": (lambda z, y, m: nn.NLLLoss()(z.log_softmax(-1), y), shared, 1),
    "class-weights-own": (
        lambda z, y, m: 1.0 * F.cross_entropy(z, y, weight=WEIGHTS),
        lambda z, y, m: F.cross_entropy(z, y, weight=WEIGHTS),
        1,
    ),
    "segmentation": (
        lambda z, y, m: F.cross_entropy(z.T[None], y[None]),  # [1, C, N] against [1, N]
        shared,
        1,
    ),
    "binary-probabilities": (
        lambda z, y, m: F.binary_cross_entropy(z.sigmoid(), z.detach().sigmoid()),
        lambda z, y, m: F.binary_cross_entropy_with_logits(z, z.detach().sigmoid()),
        1,
    ),
    "binary-layers": (
        lambda z, y, m: nn.BCELoss(reduction="sum")(z.sigmoid(), z.detach().sigmoid()),
        lambda z, y, m: nn.BCEWithLogitsLoss()(z, z.detach().sigmoid()),
        8 * CLASSES,
    ),
    "squared-error-layer": (
        lambda z, y, m: nn.MSELoss(reduction="sum")(z, z.detach() + 1),
        lambda z, y, m: F.mse_loss(z, z.detach() - 5),
        8 * CLASSES,
    ),
    "by-hand": (lambda z, y, m: -(soft(y, z) * z.log_softmax(-1)).sum(-1).mean(), shared, 1),
    "by-hand-timm": (lambda z, y, m: torch.sum(-soft(y, z) * F.log_softmax(z, dim=-1), dim=-1).mean(), shared, 1),
    "by-hand-layer": (lambda z, y, m: -nn.LogSoftmax(-1)(z).gather(1, y[:, None]).mean(), shared, 1),
    "by-hand-index": (lambda z, y, m: -torch.log_softmax(z, 1)[torch.arange(len(y)), y].sum(), shared, 8),
    "by-hand-einsum": (lambda z, y, m: -torch.einsum("nc,nc->", soft(y, z), z.log_softmax(-1)) / len(y), shared, 1),
    "by-hand-smoothed": (lambda z, y, m: smoothed_by_hand(z, y), shared, 1),
    "by-hand-transposed": (lambda z, y, m: -(soft(y, z).T * z.T.log_softmax(0)).sum(0).mean(), shared, 1),
    "by-hand-masked": (
        lambda z, y, m: (-(soft(y, z) * z.log_softmax(-1)).sum(-1) * (y > 0)).mean(),
        lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * (y > 0)).mean(),
        1,
    ),
    "by-hand-class-weights": (
        lambda z, y, m: -(F.one_hot(y, CLASSES) * WEIGHTS * z.log_softmax(-1)).sum() / WEIGHTS[y].sum(),
        lambda z, y, m: F.cross_entropy(z, y, weight=WEIGHTS),
        1,
    ),
    "by-hand-penalty": (
        lambda z, y, m: -(soft(y, z) * z.log_softmax(-1)).sum(-1).mean() + m.net[0].weight.square().sum(), shared, 1
    ),
    "by-hand-kl": (
        lambda z, y, m: (soft(y, z) * (soft(y, z).log() - z.log_softmax(-1))).sum(-1).mean(), shared, 1
    ),
    "kl": (lambda z, y, m: F.kl_div(z.log_softmax(-1), soft(y, z), reduction="batchmean"), shared, 1),
    "kl-mean": (
        lambda z, y, m: F.kl_div(z.log_softmax(-1), soft(y, z).log(), log_target=True), shared, 1 / CLASSES
    ),
    "kl-sum": (lambda z, y, m: nn.KLDivLoss(reduction="sum")(z.log_softmax(-1), soft(y, z)), shared, 8),
    "kl-none": (
        lambda z, y, m: F.kl_div(z.log_softmax(-1), soft(y, z), reduction="none").sum(-1).mean(), shared, 1
    ),
    "kl-class-weights": (
        lambda z, y, m: (F.kl_div(z.log_softmax(-1), soft(y, z), reduction="none") * WEIGHTS).sum(-1).mean(),
        lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * (soft(y, z) * WEIGHTS).sum(-1)).mean(),
        1,
    ),
    "kl-classes-first": (
        lambda z, y, m: F.kl_div(z.T.log_softmax(0) + 0.0, soft(y, z).T, reduction="sum") / 8, shared, 1
    ),
    "kl-of-probabilities": (
        lambda z, y, m: F.kl_div(z.softmax(-1).log(), soft(y, z), reduction="batchmean"), shared, 1
    ),
    "distillation": (
        lambda z, y, m: F.kl_div((z / 2).log_softmax(-1), (3 * z.detach()).softmax(-1), reduction="batchmean") * 4,
        lambda z, y, m: F.cross_entropy(z / 2, y) * 4,
        1,
    ),
    "two-dimensional-gaussian": (
        lambda z, y, m: F.gaussian_nll_loss(z, z.detach() + 1, torch.full_like(z, 0.5)),
        lambda z, y, m: F.mse_loss(z, z.detach()),
        1,
    ),
    "one-variance-for-all": (
        lambda z, y, m: nn.GaussianNLLLoss(reduction="sum", full=True)(z, z.detach() + 1, torch.ones(8, 1)),
        lambda z, y, m: F.mse_loss(z, z.detach()),
        8 * CLASSES / 2,
    ),
    "least-variance": (
        lambda z, y, m: F.gaussian_nll_loss(z, z.detach() + 1, torch.zeros(8), eps=2.0),
        lambda z, y, m: F.mse_loss(z, z.detach()),
        1 / 4,
    ),
}  # fmt: skip


def soft(y: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).to(like) * 0.9 + 0.025


def smoothed_by_hand(z: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return (-0.9 * log_p.gather(1, y[:, None]).squeeze(1) - 0.1 * log_p.mean(-1)).mean()


@pytest.mark.filterwarnings("ignore:size_average and reduce args", "ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize(("loss", "same_as", "factor"), LOSSES.values(), ids=LOSSES.keys())
def test_losses_that_mean_the_same_give_the_same_estimate(loss: Any, same_as: Any, factor: float) -> None:
    """A multiple of a loss has the same multiple of its curvature."""
    net, loop = Net(), {"precision": "32-true", "limit_train_batches": 3}
    module = cases.clone(Custom(loss, net))
    first = estimates(module, **loop)
    second = estimates(cases.clone(Custom(same_as, net)), **loop)
    assert_same_estimates(first, [[factor * h for h in one] for one in second], False, rtol=2e-4, atol=1e-8 * factor)
    assert module.calls == 3


@pytest.mark.parametrize("perturbation", [None, AverageSAM(0.0)], ids=["shared", "own"])
def test_micro_batches_are_one_batch(perturbation: Any) -> None:
    net = Net().double()
    dataset = cases.data(dtype=torch.float64)
    whole = estimates(cases.clone(Custom(shared, net)), cases.loader(dataset, 32), precision="64-true")
    parts = estimates(
        cases.clone(Custom(shared, net)),
        cases.loader(dataset, 8),
        precision="64-true",
        accumulate_grad_batches=4,
        perturbation=perturbation,
    )
    assert_same_estimates(whole, parts, exact=False)


# the expectation, exactly: every draw that there is, each weighed by its probability


class EveryDraw:
    """In place of the draws: the k-th refresh of a run gets the k-th of all combinations of targets.

    Labels are enumerated; so are the two sides of a probability (`kind` "logits" or "probabilities"). Noise
    (`kind` "noise") takes the two values -sqrt(1/2) and sqrt(1/2), which have the variance of the Gaussian; h is a
    quadratic form of it, and its mean the same. Where the variance is predicted, too, h is of fourth order in the
    noise, and its values are -sqrt(3), 0 and sqrt(3) (`kind` "gauss"), which have the Gaussian's first five moments.
    Counts take two values of their mean and variance. Distributions draw in the same way.

    Attributes:
        chances: Probability of each refresh's combination; they add up to 1 if the run was of the right length.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "noise") -> None:
        self.kind = kind
        self.chances: list[Tensor] = []
        self.rest = 0
        monkeypatch.setattr(sampled_losses, "sample_labels", self.labels)
        monkeypatch.setattr(sampled_losses, "_uniform", self.uniform)
        monkeypatch.setattr(sampled_losses, "_counts", lambda rate, generator: self.counts(rate))
        for kind, draw in {
            td.Categorical: lambda d: self.digits(d.probs.reshape(-1, d.probs.size(-1))).view(d.batch_shape),
            td.Bernoulli: lambda d: (
                1.0 - self.digits(torch.stack([d.probs, 1 - d.probs], -1).reshape(-1, 2)).view(d.probs.shape)
            ),
            td.Normal: lambda d: d.loc + d.scale * torch.special.ndtri(self.uniform(d.loc)),
            td.Poisson: lambda d: self.counts(d.rate),
            td.MultivariateNormal: lambda d: (
                d.loc + d.scale_tril.matmul(torch.special.ndtri(self.uniform(d.loc))[..., None])[..., 0]
            ),
        }.items():
            monkeypatch.setattr(kind, "sample", lambda self, sample_shape=(), draw=draw: draw(self).detach())

    def attach(self, curvature: Curvature) -> None:
        begin = curvature.begin

        def begin_next(window: Any) -> Any:
            self.rest = len(self.chances)
            self.chances.append(torch.ones((), dtype=torch.float64))
            return begin(window)

        curvature.begin = begin_next  # type: ignore[method-assign]

    def digits(self, probabilities: Tensor) -> Tensor:
        """One digit for each row of probabilities [N, values], whose chance is noted."""
        found = []
        for row in probabilities:
            self.rest, digit = divmod(self.rest, len(row))
            found.append(digit)
        chosen = torch.tensor(found)
        self.chances[-1] = self.chances[-1] * probabilities.gather(1, chosen[:, None]).prod()
        return chosen

    def labels(self, logits: Tensor, generator: Any = None) -> Tensor:
        p = logits.detach().movedim(1, -1).softmax(-1)
        return self.digits(p.reshape(-1, p.size(-1))).reshape(p.shape[:-1])

    def uniform(self, like: Tensor, generator: Any = None) -> Tensor:
        like = like.detach()
        if self.kind == "gauss":
            digits = self.digits(torch.tensor([[1.0, 4.0, 1.0]]).double().expand(like.numel(), 3) / 6)
            return torch.special.ndtr(3**0.5 * (digits.double() - 1)).reshape(like.shape).to(like)
        if self.kind == "noise":
            p, low, high = torch.full_like(like, 0.5), *torch.special.ndtr(torch.tensor([-1.0, 1.0]).double())
        else:
            p, low, high = like.sigmoid() if self.kind == "logits" else like, torch.tensor(0.0), torch.tensor(1 - 1e-15)
        digits = self.digits(torch.stack([p.reshape(-1), 1 - p.reshape(-1)], dim=1)).reshape(like.shape)
        return torch.where(digits == 0, low, high).to(like)

    def counts(self, rate: Tensor) -> Tensor:
        rate = rate.detach()
        digits = self.digits(torch.full((rate.numel(), 2), 0.5, dtype=torch.float64)).reshape(rate.shape)
        return rate + (2 * digits - 1) * rate.sqrt()

    def mean(self, found: list[Any]) -> list[Tensor | None]:
        """The expectation of h."""
        chances = self.chances[: len(found)]  # by hand a window is opened for the step after the last, too
        assert sum(chances).item() == pytest.approx(1.0)
        columns = zip(*found, strict=True)
        return [
            None if column[0] is None else sum(chance * h for chance, h in zip(chances, column, strict=True))
            for column in columns
        ]


def gauss_newton(module: Custom, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Diagonal of J' H J, J the Jacobian of the outputs and H the dense Hessian of the training loss in them."""
    parameters = list(module.net.parameters())
    outputs = module.net(x)
    size = outputs.numel()
    hessian = torch.autograd.functional.hessian(loss, outputs.detach()).reshape(size, size)
    rows = [torch.autograd.grad(outputs.reshape(-1)[index], parameters, retain_graph=True) for index in range(size)]
    jacobians = [torch.stack([row[index] for row in rows]) for index in range(len(parameters))]
    return [torch.einsum("i...,ij,j...->...", jacobian, hessian, jacobian) for jacobian in jacobians]


def sharp_net() -> Net:
    net = Net().double()
    with torch.no_grad():
        net[2].weight.mul_(3)  # some classes likelier than others
    return net


def expectation(
    monkeypatch: pytest.MonkeyPatch,
    module: Custom,
    draws: int,
    x: Tensor,
    y: Tensor,
    curvature: SampledFisher | None = None,
    kind: str = "noise",
    micro_batches: int = 1,
    **loop: Any,
) -> list[Tensor | None]:
    """Mean of h over all draws, through the real callback, always the same window of micro-batches."""
    curvature = SampledFisher() if curvature is None else curvature
    every = EveryDraw(monkeypatch, kind)
    every.attach(curvature)
    window = TensorDataset(x.repeat(draws, 1), y.repeat(draws))
    train = cases.loader(window, len(x) // micro_batches)
    loop = {"accumulate_grad_batches": micro_batches, "precision": "64-true", **loop}
    return every.mean(estimates(module, train, curvature, **loop))


def padded(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z, torch.where(torch.arange(len(y)) == 0, -100, y))


def padded_with_a_class(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    """Padding is class 0, which the model may also predict at a position that counts."""
    return F.cross_entropy(z, torch.where(torch.arange(len(y)) == 0, 0, y.clamp(min=1)), ignore_index=0)


def masked(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    mask = torch.arange(len(y)) > 0
    return (F.cross_entropy(z, y, reduction="none") * mask).sum() / mask.sum()


def rising(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    weights = torch.arange(1.0, len(y) + 1, dtype=z.dtype)
    return (F.cross_entropy(z, y, reduction="none") * weights).sum() / weights.sum()


def in_place(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss += 0.3 * F.mse_loss(z[:, :1], y[:, None].to(z))
    return loss


def scaled_in_place(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss *= 0.3
    loss += F.mse_loss(z[:, :1], y[:, None].to(z))
    return loss


def logged_beside(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    module.log("beside", F.cross_entropy(z[:1], y[:1]))
    return F.cross_entropy(z, y)


def with_a_penalty(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return 2.0 * F.cross_entropy(z, y) + 5.0 * z.detach().square().sum() + module.net[0].weight.square().sum()


def two_binary(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    target, weight = (y[:, None] % 2).to(z).expand(2, 1), torch.tensor([[0.5], [3.0]], dtype=z.dtype)
    first = F.binary_cross_entropy_with_logits(z[:, :1], target, pos_weight=torch.tensor([4.0], dtype=z.dtype))
    return first + 0.2 * F.binary_cross_entropy_with_logits(z[:, 1:2], target, weight=weight, reduction="sum")


def uncertain(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return torch.exp(-module.s) * F.cross_entropy(z, y) + module.s


def odd(y: Tensor, z: Tensor) -> Tensor:
    return (y[:, None] % 2).expand(len(y), 2).to(z)


# loss; number of draws for two samples; kind
UNBIASED: dict[str, tuple[Any, int, str]] = {
    "mean": (shared, 16, "noise"),
    "sum": (lambda z, y, m: F.cross_entropy(z, y, reduction="sum"), 16, "noise"),
    "class-weights": (lambda z, y, m: F.cross_entropy(z, y, weight=WEIGHTS.to(z)), 16, "noise"),
    "padded": (padded, 16, "noise"),
    "padded-with-a-class": (padded_with_a_class, 16, "noise"),
    "masked": (masked, 16, "noise"),
    "rising-weights": (rising, 16, "noise"),
    "nll": (lambda z, y, m: F.nll_loss(z.log_softmax(1), y, weight=WEIGHTS.to(z)), 16, "noise"),
    "squared-error": (lambda z, y, m: F.mse_loss(z, torch.ones_like(z)), 256, "noise"),
    "squared-error-of-each": (
        lambda z, y, m: (F.mse_loss(z, 0 * z.detach(), reduction="none") * WEIGHTS).mean(), 256, "noise"
    ),
    "binary": (lambda z, y, m: F.binary_cross_entropy_with_logits(z[:, :2], odd(y, z)), 16, "logits"),
    "binary-probabilities": (
        lambda z, y, m: F.binary_cross_entropy(z[:, :2].sigmoid(), odd(y, z)), 16, "probabilities"
    ),
    "cross-entropy-and-squared-error": (
        lambda z, y, m: F.cross_entropy(z, y) + 0.3 * F.mse_loss(z[:, :1], y[:, None].to(z)), 64, "noise"
    ),
    "two-heads": (lambda z, y, m: F.cross_entropy(z, y) + 0.4 * F.cross_entropy(z[:, :2], y % 2), 64, "noise"),
    "two-binary": (two_binary, 16, "logits"),
    "in-place": (in_place, 64, "noise"),
    "scaled-in-place": (scaled_in_place, 64, "noise"),
    "logged-beside": (logged_beside, 64, "noise"),
    "with-a-penalty": (with_a_penalty, 16, "noise"),
    "the-same-term-twice": (lambda z, y, m: (lambda loss: loss + 0.5 * loss)(F.cross_entropy(z, y)), 16, "noise"),
}  # fmt: skip


def two_samples() -> tuple[Tensor, Tensor]:
    return cases.data(2, dtype=torch.float64).tensors  # type: ignore[return-value]


def of_outputs(loss: Any, y: Tensor, module: Custom) -> Callable[[Tensor], Tensor]:
    """The training loss as a function of the outputs; logging is left out."""
    silent = Custom(loss, module.net)
    silent.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    return lambda z: loss(z, y, silent)


@pytest.mark.parametrize("name", cases.every_second(UNBIASED))
def test_the_mean_over_all_draws_is_the_gauss_newton_diagonal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    loss, draws, kind = UNBIASED[name]
    module, (x, y) = Custom(loss, sharp_net()), two_samples()
    expected = gauss_newton(module, x, of_outputs(loss, y, module))
    got = expectation(monkeypatch, module, draws, x, y, kind=kind)
    assert_unbiased(got, expected)
    assert module.calls == draws


def assert_unbiased(got: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-14)


def heteroscedastic(z: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z[:, 0], y.to(z), z[:, 1].exp())


def expected_gaussian(z: Tensor, at: Tensor) -> Tensor:
    """Mean over y ~ N(m, v) of the loss, m and v as predicted at `at`."""
    return 0.5 * (z[:, 1] + ((z[:, 0] - at[:, 0]).square() + at[:, 1].exp()) / z[:, 1].exp())


def expected_normal(z: Tensor, at: Tensor) -> Tensor:
    return z[:, 1] + ((z[:, 0] - at[:, 0]).square() + (2 * at[:, 1]).exp()) / (2 * (2 * z[:, 1]).exp())


def log_mixture(z: Tensor) -> Tensor:
    """Two categorical distributions of two classes each: weights z_0, classes z_1 to z_3."""
    first, second = z[:, 1:3].log_softmax(-1), torch.stack([z[:, 3], 0 * z[:, 3]], 1).log_softmax(-1)
    weights = torch.stack([z[:, 0], 0 * z[:, 0]], 1).log_softmax(-1)
    return torch.stack([first, second], 1).add(weights[..., None]).logsumexp(1)


def mixture(z: Tensor) -> td.Distribution:
    classes = torch.stack([z[:, 1:3], torch.stack([z[:, 3], 0 * z[:, 3]], 1)], 1)
    return td.MixtureSameFamily(
        td.Categorical(logits=torch.stack([z[:, 0], 0 * z[:, 0]], 1)), td.Categorical(logits=classes)
    )


def triangle(z: Tensor) -> td.Distribution:
    return td.MultivariateNormal(z[:, :2], scale_tril=torch.tensor([[2.0, 0.0], [-1.0, 0.5]], dtype=z.dtype))


# training loss; its mean over targets drawn at `at`, up to a constant, as a function of the outputs z (``None``: the
# training loss has the same Hessian); number of draws for two samples; kind
LIKELIHOODS: dict[str, tuple[Any, Any, int, str]] = {
    "gaussian": (lambda z, y, m: heteroscedastic(z, y), lambda z, at: expected_gaussian(z, at).mean(), 9, "gauss"),
    "gaussian-sum": (
        lambda z, y, m: F.gaussian_nll_loss(z[:, 0], y.to(z), z[:, 1].exp(), full=True, reduction="sum"),
        lambda z, at: expected_gaussian(z, at).sum(), 9, "gauss",
    ),
    "gaussian-weighted": (
        lambda z, y, m: (
            F.gaussian_nll_loss(z[:, :1], y.to(z)[:, None], z[:, 1:2].exp(), reduction="none")[:, 0]
            * torch.arange(1.0, 1 + len(y))
        ).sum(),
        lambda z, at: (expected_gaussian(z, at) * torch.arange(1.0, 1 + len(z))).sum(), 9, "gauss",
    ),
    "gaussian-one-variance": (
        lambda z, y, m: F.gaussian_nll_loss(z[:, :2], y.to(z)[:, None].expand(-1, 2), z[:, 2].exp()),
        lambda z, at: (
            (z[:, 2] + ((z[:, :2] - at[:, :2]).square().sum(-1) / 2 + at[:, 2].exp()) / z[:, 2].exp()) / 2
        ).mean(),
        81, "gauss",
    ),
    "gaussian-variance-alone": (
        lambda z, y, m: nn.GaussianNLLLoss()(y.to(z), 0 * y.to(z), z[:, 0].exp()),
        lambda z, at: (0.5 * (z[:, 0] + at[:, 0].exp() / z[:, 0].exp())).mean(), 9, "gauss",
    ),
    "poisson": (lambda z, y, m: F.poisson_nll_loss(z[:, 0], y.to(z)), None, 4, "noise"),
    "poisson-full-sum": (
        lambda z, y, m: nn.PoissonNLLLoss(full=True, reduction="sum")(z[:, :2], y.to(z)[:, None]), None, 16, "noise"
    ),
    "poisson-rates": (
        lambda z, y, m: F.poisson_nll_loss(z[:, 0].exp(), y.to(z), log_input=False, eps=0.3),
        lambda z, at: (z[:, 0].exp() - (at[:, 0].exp() + 0.3) * (z[:, 0].exp() + 0.3).log()).mean(), 4, "noise",
    ),
    "kl": (lambda z, y, m: F.kl_div(z.log_softmax(-1), soft(y, z), reduction="batchmean"), None, 16, ""),
    "by-hand": (lambda z, y, m: -(soft(y, z) * z.log_softmax(-1)).sum(-1).mean(), None, 16, ""),
    "kl-of-unequal-weights": (
        lambda z, y, m: F.kl_div(z.log_softmax(-1), soft(y, z) * torch.arange(1.0, 1 + len(y))[:, None]), None, 16, ""
    ),
    "kl-beside-cross-entropy": (
        lambda z, y, m: 0.3 * F.cross_entropy(z[:, :2], y % 2)
        + 0.7 * F.kl_div((z[:, 2:] / 3).log_softmax(-1), soft(y, z)[:, :2], reduction="batchmean"),
        None, 16, "",
    ),
    "by-hand-of-unequal-weights": (
        lambda z, y, m: -(soft(y, z) * torch.arange(1.0, 1 + len(y))[:, None] * z.log_softmax(-1)).sum(), None, 16, ""
    ),
    "by-hand-beside-squared-error": (
        lambda z, y, m: F.mse_loss(z[:, :1], y.to(z)[:, None]) - (soft(y, z)[:, :2] * z[:, 2:].log_softmax(-1)).mean(),
        None, 16, "noise",
    ),
    "by-hand-beside-a-metric": (
        lambda z, y, m: (
            lambda log_p: (F.nll_loss(log_p, y % 2), -log_p.gather(1, y[:, None] % 2).mean())[1]
        )(z[:, :2].log_softmax(-1)),
        None, 16, "",
    ),
    "by-hand-two-heads": (
        lambda z, y, m: -z[:, :2].log_softmax(-1)[torch.arange(len(y)), y % 2].mean()
        - 0.4 * z[:, 2:].log_softmax(-1)[:, 0].mean(),
        None, 16, "",
    ),
    "categorical": (lambda z, y, m: -td.Categorical(logits=z).log_prob(y).mean(), None, 16, ""),
    "one-hot": (
        lambda z, y, m: -td.OneHotCategorical(logits=z).log_prob(F.one_hot(y, CLASSES).to(z)).sum(), None, 16, ""
    ),
    "bernoulli": (lambda z, y, m: -td.Bernoulli(logits=z[:, :2]).log_prob(odd(y, z)).mean(), None, 16, ""),
    "normal": (
        lambda z, y, m: -td.Normal(z[:, 0], z[:, 1].exp()).log_prob(y.to(z)).mean(),
        lambda z, at: expected_normal(z, at).mean(), 9, "gauss",
    ),
    "independent": (
        lambda z, y, m: -td.Independent(td.Normal(z[:, 0::2], z[:, 1::2].exp()), 1)
        .log_prob(y.to(z)[:, None].expand(-1, 2))
        .mean(),
        lambda z, at: (expected_normal(z[:, :2], at[:, :2]) + expected_normal(z[:, 2:], at[:, 2:])).mean(),
        81, "gauss",
    ),
    "of-a-smaller-batch": (
        lambda z, y, m: -td.Normal(z[:, :1], 1.0).log_prob(y.to(z)[:, None].expand(-1, 2)).sum(), None, 16, "noise"
    ),
    "counts": (lambda z, y, m: -td.Poisson(z[:, 0].exp(), False).log_prob(y.to(z)).mean(), None, 4, ""),
    "multivariate": (lambda z, y, m: -triangle(z).log_prob(z.detach()[:, 2:]).mean(), None, 16, "noise"),
    "mixture": (
        lambda z, y, m: -mixture(z).log_prob(y % 2).mean(),
        lambda z, at: -(log_mixture(at).exp() * log_mixture(z)).sum(-1).mean(), 64, "",
    ),
}  # fmt: skip


def expected_hessian(module: Custom, x: Tensor, y: Tensor, name: str) -> list[Tensor]:
    """Diagonal of the Fisher information, densely: of the mean loss over targets that the model draws."""
    loss, expected, _, _ = LIKELIHOODS[name]
    at = module.net(x).detach()
    return gauss_newton(module, x, of_outputs(loss, y, module) if expected is None else lambda z: expected(z, at))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", cases.every_second(LIKELIHOODS))
def test_likelihoods_are_unbiased_for_their_fisher_information(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    loss, _, draws, kind = LIKELIHOODS[name]
    module, (x, y) = Custom(loss, sharp_net()), two_samples()
    expected = expected_hessian(module, x, y, name)
    got = expectation(monkeypatch, module, draws, x, y, kind=kind)
    assert_unbiased(got, expected)


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize(
    ("form", "size", "micro_batches"),
    [("batch", None, 2), ("micro_batch", None, 2), ("micro_batch", 1, 1), ("sample", None, 1)],
)
@pytest.mark.parametrize("name", cases.every_second(["gaussian", "poisson", "kl", "by-hand", "categorical", "normal"]))
def test_likelihoods_in_every_form(
    monkeypatch: pytest.MonkeyPatch, name: str, form: Any, size: int | None, micro_batches: int
) -> None:
    loss, _, draws, kind = LIKELIHOODS[name]
    module, (x, y) = Custom(never_shown(loss) if form == "sample" else loss, sharp_net()), two_samples()
    expected = expected_hessian(module, x, y, name)
    curvature = SampledFisher(form=form, micro_batch_size=size)
    got = expectation(monkeypatch, module, draws, x, y, curvature, kind=kind, micro_batches=micro_batches)
    assert_unbiased(got, expected)


def advantage(y: Tensor, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, len(y)).to(like)


class Hidden(torch.autograd.Function):
    """The square of its argument, with a derivative that does not say that it depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.double = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.double


def hand(z: Tensor, y: Tensor) -> Tensor:
    return -(soft(y, z) * z.log_softmax(-1)).sum(-1)


def of_a_mixture(z: Tensor, y: Tensor) -> Tensor:
    """A mixture density network, its components' losses at hand."""
    each = F.gaussian_nll_loss(z, y.to(z)[:, None].expand_as(z), torch.ones_like(z), reduction="none")
    return -(z.log_softmax(-1) - each).logsumexp(-1).mean()


# nothing that is the likelihood of targets
REFUSED: dict[str, Any] = {
    "focal-by-hand": lambda z, y: -((1 - z.softmax(-1)).square() * soft(y, z) * z.log_softmax(-1)).sum(-1).mean(),
    "focal-of-the-result": lambda z, y: ((1 - (-hand(z, y)).exp()).square() * hand(z, y)).mean(),
    "entropy": lambda z, y: (hand(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1)).mean(),
    "entropy-of-a-distribution": lambda z, y: (hand(z, y) - 0.1 * td.Categorical(logits=z).entropy()).mean(),
    "entropy-alone": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "logits-elsewhere": lambda z, y: hand(z, y).mean() + 0.1 * z.square().mean(),
    "scaled-logits": lambda z, y: hand(z / 2, y).mean() + 0.1 * z.square().mean(),
    "reverse-kl": lambda z, y: (z.log_softmax(-1).exp() * (z.log_softmax(-1) - soft(y, z).log())).sum(-1).mean(),
    "reverse-kl-div": lambda z, y: F.kl_div(soft(y, z).log(), z.softmax(-1), reduction="batchmean"),
    "both-ways": lambda z, y: F.kl_div(z.log_softmax(-1), z.flip(0).softmax(-1), reduction="batchmean"),
    "no-probabilities": lambda z, y: F.kl_div(z, soft(y, z), reduction="batchmean"),
    "maximized": lambda z, y: -hand(z, y).mean(),
    "contrast": lambda z, y: (advantage(y, z) * hand(z, y)).mean(),
    "hidden": lambda z, y: Hidden.apply(hand(z, y)).mean(),
    "squared": lambda z, y: hand(z, y).square().mean(),
    "policy-gradient": lambda z, y: -(td.Categorical(logits=z).log_prob(y) * advantage(y, z)).mean(),
    "proximal": lambda z, y: -(td.Categorical(logits=z).log_prob(y) - 1.0).exp().mean(),
    "log-prob-maximized": lambda z, y: td.Normal(z[:, 0], 1.0).log_prob(y.to(z)).mean(),
    "log-prob-alone": lambda z, y: td.Normal(z[0, 0], 1.0).log_prob(y[0].to(z)),
    "prior": lambda z, y: -td.Normal(0.0, 1.0).log_prob(z).mean(),
    "own-sample": lambda z, y: -(lambda d: d.log_prob(d.rsample()))(td.Normal(z[:, 0], z[:, 1].exp())).mean(),
    "mixture-by-hand": lambda z, y: of_a_mixture(z, y),
    "gaussian-maximized": lambda z, y: -F.gaussian_nll_loss(z[:, 0], y.to(z), z[:, 1].exp()),
    "ctc": lambda z, y: F.ctc_loss(
        z[:, None].log_softmax(-1), y[None, :2] % 3 + 1, torch.tensor([len(z)]), torch.tensor([2])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_likelihood_is_refused(name: str) -> None:
    """By the shared pass and then by one of its own."""
    module = Custom(lambda z, y, m: REFUSED[name](z, y))
    with pytest.raises(ConfigurationError, match=r"fisher_loss\(batch, batch_idx\).*EmpiricalFisher\(\)") as caught:
        estimates(module, None, limit_train_batches=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_beside_a_known_loss_what_is_no_likelihood_does_not_count(name: str) -> None:
    """As any other penalty."""
    net = Net()
    both = Custom(lambda z, y, m: 1.0 * F.cross_entropy(z, y) + REFUSED[name](z, y), net)
    alone = Custom(lambda z, y, m: 1.0 * F.cross_entropy(z, y), net)
    runs = [estimates(cases.clone(module), limit_train_batches=1) for module in (both, alone)]
    assert_same_estimates(*runs, exact="log-prob" in name or "prior" in name)


@pytest.mark.parametrize("name", ["by-hand", "gaussian", "normal"])
def test_a_likelihood_with_a_learned_factor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """exp(-s) * loss + s with an s that no prediction depends on."""
    loss, _, draws, kind = LIKELIHOODS[name]
    plain, (x, y) = Custom(loss, sharp_net()), two_samples()
    expected = [math.exp(-0.7) * h for h in expected_hessian(plain, x, y, name)]
    module = Custom(lambda z, y, m: torch.exp(-m.s) * loss(z, y, m) + m.s, plain.net)
    module.s = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    names = [key for key, _ in module.named_parameters()]
    got = dict(zip(names, expectation(monkeypatch, module, draws, x, y, kind=kind), strict=True))
    assert got.pop("s") is None
    assert_unbiased(list(got.values()), expected)


def test_distributions_are_left_as_they_were() -> None:
    """Also while another thread trains, and after an error."""
    distribution = td.Normal(torch.zeros(3, requires_grad=True), 1.0, validate_args=True)
    tap, seen = LossTap(None), []
    with tap:
        distribution.log_prob(torch.ones(3)).sum()
        thread = threading.Thread(target=lambda: seen.append(distribution.log_prob))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="within the support"), LossTap(None) as inner:
            distribution.log_prob(torch.ones(3)) + distribution.log_prob(torch.full((3,), math.nan))
        distribution.log_prob(torch.ones(3))
    distribution.log_prob(torch.ones(3))
    assert (len(tap.calls), len(inner.calls)) == (2, 1)
    assert seen[0].__func__ is td.Normal.log_prob
    assert "__getattribute__" not in vars(td.Distribution)


def test_every_list_of_losses_is_the_table() -> None:
    """In the error, in the docstring and in the README."""
    with pytest.raises(ConfigurationError, match="for SampledFisher to draw targets") as caught:
        estimates(Custom(lambda z, y, m: z.square().mean()))
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for text in (str(caught.value), SampledFisher.__doc__ or "", readme):
        missing = [loss.__name__ for loss in SAMPLED if f"`{loss.__name__}`" not in text]
        assert not missing


def test_a_term_with_a_learned_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-s) * loss + s (Kendall, Gal & Cipolla 2018): s has no part in the predictions, and no estimate."""
    module, (x, y) = Custom(uncertain, sharp_net()), two_samples()
    module.s = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    expected = gauss_newton(module, x, lambda z: math.exp(-0.7) * F.cross_entropy(z, y))
    names = [name for name, _ in module.named_parameters()]
    got = dict(zip(names, expectation(monkeypatch, module, 16, x, y), strict=True))
    assert got.pop("s") is None
    assert_unbiased(list(got.values()), expected)


def test_label_smoothing_with_class_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(z, y, weight=WEIGHTS.to(z), label_smoothing=0.3)

    module, (x, y) = Custom(loss, sharp_net()), two_samples()
    expected = gauss_newton(module, x, of_outputs(loss, y, module))
    assert_unbiased(expectation(monkeypatch, module, 16, x, y), expected)


def test_micro_batches_with_a_window_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loss of a window is the mean over its micro-batches, whatever each of them weighs its samples by."""
    module, (x, y) = Custom(rising, sharp_net()), cases.data(4, dtype=torch.float64).tensors
    y = y % 2
    module.net[2] = nn.Linear(8, 2).double()

    def mean_over_both(z: Tensor) -> Tensor:
        return (rising(z[:2], y[:2], module) + rising(z[2:], y[2:], module)) / 2

    expected = gauss_newton(module, x, mean_over_both)
    for form in ("batch", "micro_batch"):
        got = expectation(monkeypatch, module, 16, x, y, SampledFisher(form=form), micro_batches=2)
        assert_unbiased(got, expected)


@pytest.mark.parametrize("form", ["batch", "micro_batch"])
def test_two_backward_passes_of_one_step_by_hand(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    """Each is a micro-batch of its own; the diagonal is that of their mean."""

    class ByHand(Custom):
        def __init__(self) -> None:
            super().__init__(shared, sharp_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            z = self.net(batch[0])
            self.manual_backward(F.cross_entropy(z, batch[1]), retain_graph=True)
            self.manual_backward(0.3 * F.mse_loss(z[:, :1], batch[1][:, None].to(z)))
            optimizer.step()

    module, (x, y) = ByHand(), two_samples()
    expected = gauss_newton(
        module, x, lambda z: (F.cross_entropy(z, y) + 0.3 * F.mse_loss(z[:, :1], y[:, None].to(z))) / 2
    )
    assert_unbiased(expectation(monkeypatch, module, 64, x, y, SampledFisher(form=form)), expected)


class OwnLoss(Custom):
    """No cross_entropy anywhere: the module brings its own sampled-label loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self.net(x).log_softmax(-1)[torch.arange(len(x)), y].mean()

    def fisher_loss(self, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
        log_p = self.net(batch[0]).log_softmax(-1)
        labels = torch.distributions.Categorical(logits=log_p.detach()).sample()
        return -log_p[torch.arange(len(labels)), labels].mean(), len(labels)


@pytest.mark.parametrize("make", cases.first_at_once([Custom, OwnLoss]), ids=["shared", "fisher_loss"])
def test_the_mean_of_real_draws_converges_to_the_gauss_newton_diagonal(make: Any) -> None:
    """Through the real callback, always the same batch of 8, weights fixed: the mean of 300 draws.

    One draw of a coordinate has a relative standard deviation of about 1.5, so 0.09 is to be expected of the diagonal.
    """
    module = make(shared, sharp_net())
    x, y = cases.data(8, dtype=torch.float64).tensors
    expected = gauss_newton(module, x, lambda z: F.cross_entropy(z, y))
    same_batch = TensorDataset(x.repeat(300, 1), y.repeat(300))
    draws = estimates(module, cases.loader(same_batch), precision="64-true")
    assert len(draws) == 300

    def error(count: int) -> float:
        means = [torch.stack([draw[index] for draw in draws[:count]]).mean(0) for index in range(len(expected))]
        off = sum(float((mean - exact).square().sum()) for mean, exact in zip(means, expected, strict=True))
        return (off / sum(float(exact.square().sum()) for exact in expected)) ** 0.5

    assert error(300) < 0.2
    assert error(300) < error(20)
    traces = torch.tensor([sum(float(h.sum()) for h in draw) for draw in draws])
    exact_trace = sum(float(exact.sum()) for exact in expected)
    standard_error = float(traces.std()) / len(draws) ** 0.5
    assert standard_error < 0.08 * exact_trace
    assert abs(float(traces.mean()) - exact_trace) < 4 * standard_error


# what is squared


def counted(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    """torch.func cannot follow `.item()`."""
    loss = F.cross_entropy(z, y)
    module.last = loss.item()
    return loss


def never_shown(loss: Any) -> Any:
    """The same loss in a step that has to be taken sample by sample."""

    def step(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        float(z.detach().sum())
        return loss(z, y, module)

    return step


PIECES = {
    "accumulated": (SampledFisher(form="micro_batch"), 2),
    "cut": (SampledFisher(form="micro_batch", micro_batch_size=1), 1),
    "whole": (SampledFisher(form="micro_batch", micro_batch_size=1), 2),
    "samples": (SampledFisher(form="sample"), 1),
    "samples-accumulated": (SampledFisher(form="sample"), 2),
}


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize(("curvature", "micro_batches"), PIECES.values(), ids=PIECES.keys())
def test_all_forms_have_the_expectation_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, curvature: SampledFisher, micro_batches: int
) -> None:
    loss = counted if curvature.form == "sample" else shared
    module, (x, y) = Custom(loss, sharp_net()), two_samples()
    expected = gauss_newton(module, x, lambda z: F.cross_entropy(z, y))
    curvature = SampledFisher(form=curvature.form, micro_batch_size=curvature.micro_batch_size)
    got = expectation(monkeypatch, module, 16, x, y, curvature, micro_batches=micro_batches)
    assert_unbiased(got, expected)


def with_class_weights(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.tensor([1.0, 5.0], dtype=z.dtype))


# a loss and the size of the pieces
UNEQUAL: dict[str, tuple[Any, int]] = {
    "mean": (shared, 1),
    "short-last-piece": (shared, 2),
    "class-weights": (with_class_weights, 1),
    "class-weights-short-last-piece": (with_class_weights, 2),
    "sum": (lambda z, y, m: F.cross_entropy(z, y, reduction="sum"), 1),
    "none-then-mean": (lambda z, y, m: F.cross_entropy(z, y, reduction="none").mean(), 2),
}


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize("form", ["micro_batch", "sample"])
@pytest.mark.parametrize("name", UNEQUAL)
def test_pieces_count_by_their_samples_as_if_the_loss_were_their_mean(
    monkeypatch: pytest.MonkeyPatch, form: Any, name: str
) -> None:
    """Of three samples; a sum has the expectation of the mean then, and class weights within a piece only."""
    loss, size = UNEQUAL[name]
    module, (x, _) = Custom(never_shown(loss), sharp_net()), cases.data(3, dtype=torch.float64).tensors
    module.net[2] = nn.Linear(8, 2).double()
    y = torch.tensor([0, 1, 1])
    size = 1 if form == "sample" else size

    def mean_of_pieces(z: Tensor) -> Tensor:
        pieces = [slice(start, min(start + size, 3)) for start in range(0, 3, size)]
        return sum((piece.stop - piece.start) / 3 * loss(z[piece], y[piece], module) for piece in pieces)

    expected = gauss_newton(module, x, mean_of_pieces)
    curvature = SampledFisher(form=form, micro_batch_size=size if form == "micro_batch" else None)
    got = expectation(monkeypatch, module, 8, x, y, curvature)
    assert_unbiased(got, expected)
    if loss is shared:
        assert_unbiased(got, gauss_newton(module, x, lambda z: F.cross_entropy(z, y)))


def test_a_piece_with_nothing_that_counts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=1)

    module, (x, _) = Custom(loss, sharp_net()), cases.data(3, dtype=torch.float64).tensors
    module.net[2] = nn.Linear(8, 2).double()
    y = torch.tensor([0, 1, 0])
    expected = gauss_newton(module, x, of_outputs(loss, y, module))
    curvature = SampledFisher(form="micro_batch", micro_batch_size=1)
    assert_unbiased(expectation(monkeypatch, module, 8, x, y, curvature), expected)


def test_k_equal_micro_batches_have_exactly_a_kth_of_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw enumerated: the mean stays, the variance of each coordinate is half of that of one."""

    def moments(count: int, curvature: SampledFisher, micro_batches: int) -> tuple[Tensor, Tensor]:
        module = Custom(shared, sharp_net())
        with torch.no_grad():
            for weight, value in zip(module.parameters(), start.parameters(), strict=True):
                weight.copy_(value)
        every = EveryDraw(monkeypatch)
        every.attach(curvature)
        draws = CLASSES**count
        window = TensorDataset(x[:1].repeat(draws * count, 1), y[:1].repeat(draws * count))
        found = estimates(
            module,
            cases.loader(window, count // micro_batches),
            curvature,
            precision="64-true",
            accumulate_grad_batches=micro_batches,
        )
        chances, h = torch.stack(every.chances), torch.stack([torch.cat([t.reshape(-1) for t in one]) for one in found])
        assert chances.sum().item() == pytest.approx(1.0)
        mean = chances @ h
        return mean, chances @ h.square() - mean.square()

    start, (x, y) = Custom(shared, sharp_net()), two_samples()
    mean, variance = moments(1, SampledFisher(), 1)
    assert (variance > 0.1 * mean.square()).all()
    for curvature, micro_batches in (
        (SampledFisher(form="micro_batch"), 2),
        (SampledFisher(form="micro_batch", micro_batch_size=1), 1),
    ):
        same_mean, half = moments(2, curvature, micro_batches)
        torch.testing.assert_close(same_mean, mean, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(half, variance / 2, rtol=1e-8, atol=1e-16)


@pytest.mark.parametrize(
    ("curvature", "expected"),
    [
        (SampledFisher(), 2.0),
        (SampledFisher(form="micro_batch", micro_batch_size=8), 2 / 8),
        (SampledFisher(form="sample"), 2 / 64),
    ],
    ids=repr,
)
def test_relative_variance_is_about_2_over_the_pieces(curvature: SampledFisher, expected: float) -> None:
    """Scores are no Gaussians, so a factor of 1.6 is left; the pieces here are 1, 8 and 64."""
    module, dataset = Custom(shared, Net().double()), cases.data(64, dtype=torch.float64)
    x, y = dataset.tensors
    found = estimates(
        module, cases.loader(TensorDataset(x.repeat(80, 1), y.repeat(80)), 64), curvature, precision="64-true"
    )
    h = torch.stack([torch.cat([t.reshape(-1) for t in one]) for one in found])
    exact = torch.cat([t.reshape(-1) for t in gauss_newton(module, x[:8], lambda z: F.cross_entropy(z, y[:8]))])
    assert len(h) == 80
    assert exact.shape == h[0].shape
    relative = float((h.var(0) / h.mean(0).square()).mean())
    assert expected / 1.6 < relative < expected * 1.6


@pytest.mark.parametrize("size", [4, 3, 8, 100])
def test_micro_batch_size_cuts_every_batch(size: int) -> None:
    seen: list[int] = []
    module = Custom(lambda z, y, m: (seen.append(len(z)), F.cross_entropy(z, y))[1])
    curvature = SampledFisher(form="micro_batch", micro_batch_size=size)
    loop = {"limit_train_batches": 2, "max_epochs": 1}
    if size >= 8:
        with pytest.warns(UserWarning, match=r"one micro-batch only.*`micro_batch_size`.*accumulate_grad_batches"):
            estimates(module, None, curvature, **loop)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*one micro-batch only")
            estimates(module, None, curvature, **loop)
    pieces = [min(size, 8 - start) for start in range(0, 8, size)]
    assert seen == [8, *pieces] * 2


def test_micro_batch_size_and_fraction_together() -> None:
    seen: list[int] = []
    module = Custom(lambda z, y, m: (seen.append(len(z)), F.cross_entropy(z, y))[1])
    estimates(module, None, SampledFisher(0.5, "micro_batch", 3), limit_train_batches=1)
    assert seen == [8, 3, 1]


# sample by sample

ALWAYS = 2


def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw is the same: class 2, and uniform numbers of 0.8."""
    monkeypatch.setattr(
        sampled_losses, "sample_labels", lambda logits, generator=None: torch.full_like(logits[:, 0], ALWAYS).long()
    )
    monkeypatch.setattr(sampled_losses, "_uniform", lambda like, generator: torch.full_like(like.detach(), 0.8))
    monkeypatch.setattr(sampled_losses, "_counts", lambda rate, generator: torch.full_like(rate, 3.0))


NOISE = math.sqrt(0.5) * float(torch.special.ndtri(torch.tensor(0.8, dtype=torch.float64)))
TEACHER = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# training loss; score of one sample's outputs z [C = 4] against the fixed draws
SCORES: dict[str, tuple[Any, Any]] = {
    "cross-entropy": (shared, lambda z: -z.log_softmax(0)[ALWAYS]),
    "smoothed": (lambda z, y, m: F.cross_entropy(z, y, label_smoothing=0.1), lambda z: -z.log_softmax(0)[ALWAYS]),
    "soft-targets": (
        lambda z, y, m: F.cross_entropy(z, TEACHER.to(z)[y].softmax(-1)), lambda z: -z.log_softmax(0)[ALWAYS]
    ),
    "nll": (lambda z, y, m: F.nll_loss(z.log_softmax(1), y), lambda z: -z.log_softmax(0)[ALWAYS]),
    "kl": (
        lambda z, y, m: F.kl_div(z.log_softmax(1), TEACHER.to(z)[y].softmax(-1), reduction="batchmean"),
        lambda z: -z.log_softmax(0)[ALWAYS],
    ),
    "poisson": (lambda z, y, m: F.poisson_nll_loss(z, TEACHER.to(z)[y].exp()), lambda z: (z.exp() - 3 * z).sum() / 2),
    "mapping": (lambda z, y, m: {"loss": F.cross_entropy(z, y), "z": z.detach()}, lambda z: -z.log_softmax(0)[ALWAYS]),
    "squared-error": (
        lambda z, y, m: F.mse_loss(z, TEACHER.to(z)[y]), lambda z: (z - z.detach() - NOISE).square().sum() / 2
    ),
    "binary": (
        lambda z, y, m: F.binary_cross_entropy_with_logits(z, TEACHER.to(z)[y].sigmoid()),
        lambda z: F.binary_cross_entropy_with_logits(z, (z > math.log(4)).to(z), reduction="sum") / 2,
    ),
    "binary-probabilities": (
        lambda z, y, m: F.binary_cross_entropy(z.sigmoid(), TEACHER.to(z)[y].sigmoid()),
        lambda z: F.binary_cross_entropy_with_logits(z, (z > math.log(4)).to(z), reduction="sum") / 2,
    ),
}  # fmt: skip


def squares_of_samples(module: Custom, x: Tensor, score: Any) -> list[Tensor]:
    """Mean over samples of the squared gradient of each one's score, with running statistics as they are."""
    net = cases.clone(module).net.eval()
    parameters = list(net.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for sample in x:
        gradients = torch.autograd.grad(score(net(sample[None])[0]), parameters)
        for into, gradient in zip(total, gradients, strict=True):
            into += gradient.square() / len(x)
    return total


def with_statistics() -> Net:
    """BatchNorm that has seen data."""
    net = Net(batch_norm=True).double()
    net(cases.data(30, dtype=torch.float64, seed=5).tensors[0])
    return net


@pytest.mark.parametrize("net", [lambda: Net().double(), with_statistics], ids=["plain", "batchnorm"])
@pytest.mark.parametrize(("loss", "score"), SCORES.values(), ids=SCORES.keys())
def test_samples_at_once_are_exact_given_the_draws(
    monkeypatch: pytest.MonkeyPatch, loss: Any, score: Any, net: Any
) -> None:
    fixed_draws(monkeypatch)
    module, (x, y) = Custom(loss, net()), cases.data(8, dtype=torch.float64).tensors
    expected = squares_of_samples(module, x, score)
    (got,) = estimates(module, cases.loader(TensorDataset(x, y)), SampledFisher(form="sample"), precision="64-true")
    assert_unbiased(got, expected)
    assert module.calls == 2  # once for training, once for all samples together


def with_an_if(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z, y) if float(z.detach().sum()) < 1e9 else z.sum()


def with_numpy(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    module.seen = z.detach().numpy().sum()
    return F.cross_entropy(z, y)


def not_one_call(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return 1.0 * F.cross_entropy(z, y)


@pytest.mark.parametrize("loss", [counted, with_an_if, with_numpy, not_one_call])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_torch_func_cannot_follow_is_done_in_a_loop(
    monkeypatch: pytest.MonkeyPatch, loss: Any, accumulate: int
) -> None:
    fixed_draws(monkeypatch)
    net = with_statistics() if accumulate == 1 else Net().double()
    module, (x, y) = Custom(loss, net), cases.data(8, dtype=torch.float64).tensors
    expected = squares_of_samples(module, x, SCORES["cross-entropy"][1])
    statistics = cases.clone(module)
    with pytest.warns(UserWarning, match=SLOW):
        (got,) = estimates(
            module,
            cases.loader(TensorDataset(x, y), 8 // accumulate),
            SampledFisher(form="sample"),
            precision="64-true",
            accumulate_grad_batches=accumulate,
        )
    assert_unbiased(got, expected)
    assert all(layer.training for layer in module.modules())
    for part in x.split(8 // accumulate):
        statistics.net(part)  # what training does to the statistics, and nothing more
    cases.assert_same_bits(module.net, statistics.net)


def test_samples_draw_labels_of_their_own() -> None:
    """The same sample 64 times: at a single refresh the mean of its squares is near the diagonal, 25 are nearer."""
    module, (x, y) = Custom(shared, sharp_net()), two_samples()
    expected = gauss_newton(module, x[:1], lambda z: F.cross_entropy(z, y[:1]))
    same = TensorDataset(x[:1].repeat(1600, 1), y[:1].repeat(1600))
    found = estimates(module, cases.loader(same, 64), SampledFisher(form="sample"), precision="64-true")
    for count, tolerance in ((1, 0.8), (25, 0.15)):
        means = [torch.stack([one[index] for one in found[:count]]).mean(0) for index in range(len(expected))]
        off = sum(float((mean - exact).square().sum()) for mean, exact in zip(means, expected, strict=True))
        assert (off / sum(float(exact.square().sum()) for exact in expected)) ** 0.5 < tolerance
    assert not torch.equal(found[0][0], found[1][0])


def test_samples_have_dropout_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one mask for all, about half of the units of this layer would get no gradient from any sample."""
    fixed_draws(monkeypatch)
    module = Custom(shared, Net(dropout=0.5))
    (got, *_) = estimates(module, cases.loader(cases.data(64), 64), SampledFisher(form="sample"))
    assert (got[2] > 0).all()


PRECISIONS = {"bf16-mixed": 0.05, "fp16": 0.01, "32-true": 1e-4, "64-true": 1e-4}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "curvature",
    [SampledFisher(), SampledFisher(form="micro_batch", micro_batch_size=2), SampledFisher(form="sample")],
    ids=repr,
)
def test_every_form_in_every_precision(
    monkeypatch: pytest.MonkeyPatch, curvature: SampledFisher, precision: str
) -> None:
    """The loss scale cancels, and squares are at least float32."""
    fixed_draws(monkeypatch)
    net = Net()
    fresh = [SampledFisher(form=curvature.form, micro_batch_size=curvature.micro_batch_size) for _ in range(2)]
    exact = estimates(Custom(shared, cases.clone(Custom(shared, net)).net), None, fresh[0], limit_train_batches=2)
    loop: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        loop = {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
    module, train = cases.clone(Custom(shared, net)), None
    if precision == "64-true":
        module, train = module.double(), cases.loader(cases.data(dtype=torch.float64))
    got = estimates(module, train, fresh[1], limit_train_batches=2, **loop)
    for ours, theirs in zip(got, exact, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == (torch.float64 if precision == "64-true" else torch.float32)
            off = (a.double() - b.double()).norm() / b.double().norm()
            assert off < PRECISIONS[precision]


@pytest.mark.parametrize("form", ["micro_batch", "sample"])
def test_forms_with_the_modules_own_loss(form: str) -> None:
    """A loss without chance: the squares can be told."""

    class Certain(OwnLoss):
        def fisher_loss(self, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
            return F.cross_entropy(self.net(batch[0]), (batch[1] + 1) % CLASSES), len(batch[0])

    module, (x, y) = Certain(shared, Net().double()), cases.data(8, dtype=torch.float64).tensors
    curvature = SampledFisher(form=form, micro_batch_size=1 if form == "micro_batch" else None)
    parameters, expected = list(module.net.parameters()), [torch.zeros_like(p) for p in module.net.parameters()]
    for sample, label in zip(x, (y + 1) % CLASSES, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(module.net(sample[None]), label[None]), parameters)
        expected = [total + gradient.square() / 8 for total, gradient in zip(expected, gradients, strict=True)]
    train = cases.loader(TensorDataset(x, y))
    if form == "sample":
        with pytest.warns(UserWarning, match=SLOW):
            (got,) = estimates(module, train, curvature, precision="64-true")
    else:
        (got,) = estimates(module, train, curvature, precision="64-true")
    assert_unbiased(got, expected)


class Detector(Custom):
    """Lists of images of several sizes and of mappings, as torchvision's detectors take them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        images, targets = batch
        self.sizes.append((len(images), len(targets)))
        x = torch.stack([image.reshape(-1)[: cases.FEATURES] for image in images])
        return F.cross_entropy(self.net(x), torch.stack([target["label"] for target in targets]))


def test_a_list_of_samples_is_cut_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch)

    def collate(samples: Any) -> Any:
        images = [torch.cat([x, torch.zeros(index)]).double() for index, (x, _) in enumerate(samples)]
        return images, [{"label": y, "boxes": torch.zeros(index, 4)} for index, (_, y) in enumerate(samples)]

    dataset = cases.data(4, dtype=torch.float64)
    module = Detector(shared, Net().double())
    expected = squares_of_samples(module, dataset.tensors[0], SCORES["cross-entropy"][1])
    train = DataLoader(dataset, batch_size=4, collate_fn=collate)
    with pytest.warns(UserWarning, match=SLOW):
        (got,) = estimates(module, train, SampledFisher(form="sample"), precision="64-true")
    assert_unbiased(got, expected)
    assert module.sizes == [(4, 4), *[(1, 1)] * 4]
    module.sizes = cases.Notes()
    estimates(module, train, SampledFisher(form="micro_batch", micro_batch_size=2), precision="64-true")
    assert module.sizes == [(4, 4), (2, 2), (2, 2)]


def test_a_batch_that_is_a_mapping_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch)
    module = DictBatch(shared, Net().double())
    expected = squares_of_samples(module, cases.data(dtype=torch.float64).tensors[0][:8], SCORES["cross-entropy"][1])
    got, *_ = estimates(
        module, dict_batches(8), SampledFisher(form="sample"), precision="64-true", limit_train_batches=1
    )
    assert_unbiased(got, expected)
    assert module.sizes == [8, 1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("loss", [shared, counted], ids=["at-once", "loop"])
@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
def test_samples_leave_the_module_as_it_was(loss: Any, fails: bool) -> None:
    """The very same parameters and buffers, no wrapper of torch.func's among them, though the step fails midway."""

    class Fails(Custom):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if fails and len(batch[0]) == 1 and batch_idx == 1:
                raise KeyError("midway")
            return super().training_step(batch, batch_idx)

    module = Fails(loss, with_statistics().float())
    tensors = [*module.parameters(), *module.buffers()]
    statistics = cases.clone(module)
    failure = pytest.raises(ConfigurationError, match=r"KeyError \('midway'\): set `form` to 'batch'")
    with failure if fails else nullcontext():
        estimates(module, None, SampledFisher(form="sample"), limit_train_batches=2)
    assert [id(tensor) for tensor in (*module.parameters(), *module.buffers())] == [id(tensor) for tensor in tensors]
    assert all(layer.training for layer in module.modules())
    assert all(cases.same_bits(p, q) for p, q in zip(module.parameters(), statistics.parameters(), strict=True))
    for part in cases.data().tensors[0][:16].split(8):
        statistics.net(part)
    cases.assert_same_bits(module.net, statistics.net)


def test_an_unused_parameter_has_no_estimate_in_any_form() -> None:
    for form in ("batch", "sample"):
        module = Custom(shared)
        module.unused = nn.Linear(2, 2)
        (first, *_) = estimates(module, None, SampledFisher(form=form), limit_train_batches=1)
        assert [h is None for h in first] == [False] * 4 + [True] * 2


def test_a_step_that_keeps_its_losses_in_a_list() -> None:
    """Lightning's own advice since 2.0. What torch.func gives it is of no use afterwards: the step asks first."""

    class Keeps(Custom):
        def on_train_epoch_start(self) -> None:
            self.kept: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not in_extra_pass():
                self.kept.append(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.mean = float(torch.stack(self.kept).mean())

    module = Keeps(shared)
    estimates(module, None, SampledFisher(form="sample"))
    assert math.isfinite(module.mean)
    assert len(module.kept) == 8


def test_one_micro_batch_is_said_to_be_one() -> None:
    with pytest.warns(UserWarning, match=r"SampledFisher\(form='micro_batch'\) has one micro-batch only"):
        ours = estimates(Custom(shared), None, SampledFisher(form="micro_batch"), limit_train_batches=2)
    assert all(h is not None for one in ours for h in one)


def test_one_sample_is_not_called_a_micro_batch() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimates(Custom(shared), cases.loader(cases.data(2), 1), SampledFisher(form="sample"))
    assert not [one for one in caught if "form='micro_batch'" in str(one.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "both"}, "Expected `form` to be one of 'batch', 'micro_batch', 'sample', got 'both'."),
        ({"form": None}, "Expected `form` to be one of 'batch', 'micro_batch', 'sample', got None."),
        (
            {"form": "micro_batch", "micro_batch_size": 0},
            "Expected `micro_batch_size` to be a whole number >= 1, got 0.",
        ),
        (
            {"form": "micro_batch", "micro_batch_size": 2.0},
            "Expected `micro_batch_size` to be a whole number >= 1, got 2.0.",
        ),
        (
            {"form": "sample", "micro_batch_size": 4},
            "Expected `micro_batch_size` with form='micro_batch' only, got form='sample': set `form` to 'micro_batch' "
            "or `micro_batch_size` to null.",
        ),
        (
            {"micro_batch_size": 4},
            "Expected `micro_batch_size` with form='micro_batch' only, got form='batch': set `form` to 'micro_batch' "
            "or `micro_batch_size` to null.",
        ),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match="Expected") as caught:
        SampledFisher(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("curvature", "text"),
    [
        (SampledFisher(), "SampledFisher()"),
        (SampledFisher(0.25), "SampledFisher(fraction=0.25)"),
        (
            SampledFisher(form="micro_batch", micro_batch_size=3),
            "SampledFisher(form='micro_batch', micro_batch_size=3)",
        ),
        (SampledFisher(0.5, "sample"), "SampledFisher(fraction=0.5, form='sample')"),
    ],
)
def test_the_representation_is_what_was_written(curvature: SampledFisher, text: str) -> None:
    assert repr(curvature) == text


# draws, batches, errors


def test_draws_differ_between_steps_and_repeat_between_runs() -> None:
    net = Net()
    one_batch = cases.loader(cases.data(8))
    first = estimates(cases.clone(Custom(shared, net)), one_batch, max_epochs=3)
    again = estimates(cases.clone(Custom(shared, net)), one_batch, max_epochs=3, seed=99)
    assert_same_estimates(first, again)  # the user's own seed plays no part unless it is a global one
    assert not torch.equal(first[0][0], first[1][0])


def test_seed_everything_seeds_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    one_batch = cases.loader(cases.data(8))
    runs = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        runs.append(estimates(cases.clone(Custom(shared, net)), one_batch))
    assert_same_estimates(runs[0], runs[1])
    assert not torch.equal(runs[0][0][0], runs[2][0][0])


def test_average_sam_estimates_at_the_unmoved_weights() -> None:
    net = Net()
    moved = estimates(cases.clone(Custom(shared, net)), perturbation=AverageSAM(5.0))
    sam = estimates(cases.clone(Custom(shared, net)), perturbation=SAM(5.0))
    plain = estimates(cases.clone(Custom(shared, net)))
    assert_same_estimates(moved, plain)
    assert_same_estimates(sam, plain)


class DictBatch(Custom):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        self.sizes.append(len(batch["inputs"]["x"]))
        assert batch["scale"].dim() == 0
        return F.cross_entropy(self.net(batch["inputs"]["x"]) * batch["scale"], batch["targets"][0])


def dict_batches(batch_size: int) -> DataLoader:
    def collate(samples: Any) -> Any:
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return {"inputs": {"x": x, "name": "text stays"}, "targets": [y], "scale": torch.tensor(1.0)}

    return DataLoader(cases.data(dtype=torch.float64), batch_size=batch_size, collate_fn=collate)


def test_fraction_estimates_on_the_first_part_of_any_batch() -> None:
    net = Net().double()
    quarter = cases.clone(DictBatch(shared, net))
    ours = estimates(quarter, dict_batches(8), SampledFisher(0.25), precision="64-true")
    assert quarter.sizes == [8, 2] * 8
    x, y = cases.data(dtype=torch.float64).tensors
    keep = torch.arange(64) % 8 < 2
    first_parts = TensorDataset(x[keep], y[keep])
    theirs = estimates(cases.clone(Custom(shared, net)), cases.loader(first_parts, 2), precision="64-true")
    assert_same_estimates(ours, theirs, exact=False)


class Sequences(Custom):
    """Many-to-one over time-major sequences [T, N, features], targets [N]."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].mean(0)), batch[1])


class ToMany(Custom):
    """One prediction per time step, and a check of the user's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if len(x) != 5:
            raise KeyError("no such length")
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())


class Graph(Custom):
    """Nodes, edges between them, labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, edges, y = batch
        if isinstance(edges, list):
            edges = torch.stack(edges)
        return F.cross_entropy(self.net(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])), y)


class Opaque(Custom):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


class Data:
    """A batch that is no tuple, list or mapping of tensors, as those of graph libraries."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(5, cases.FEATURES), torch.tensor([0, 1, 2, 3, 0])


EDGES = torch.tensor([[0, 1, 4], [4, 3, 2]])
NODES, LABELS = torch.randn(5, cases.FEATURES), torch.tensor([0, 1, 2, 3, 0])
UNFIT: dict[str, tuple[Any, Any, str]] = {
    "time-major": (Sequences, (torch.randn(7, 5, cases.FEATURES), LABELS), "got first dimensions of 7, 5"),
    "as-many-steps": (Sequences, (torch.randn(5, 5, cases.FEATURES), LABELS), "got ValueError .Expected input"),
    "own-check": (ToMany, (torch.randn(5, 3, cases.FEATURES), torch.ones(5, 3).long()), "got KeyError .'no such"),
    "graph": (Graph, (NODES, EDGES, LABELS), "got first dimensions of 5, 2"),
    "edges-in-a-list": (Graph, (NODES, [*EDGES], LABELS), "got first dimensions of 5, 3"),
    "packed": (
        Sequences,
        (nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)]), LABELS),
        "got AssertionError",
    ),
    "opaque": (Opaque, Data(), "got none in a Data"),
    "edges-inside": (Graph, (NODES, torch.stack([EDGES[0], EDGES[1]]).expand(1, 2, 3)[0][None], LABELS), "got Index"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("curvature", "remedy"),
    [
        (SampledFisher(0.5), "set `fraction` to 1"),
        (SampledFisher(form="micro_batch", micro_batch_size=2), "set `micro_batch_size` to null"),
        (SampledFisher(form="sample"), "set `form` to 'batch'"),
        (SampledFisher(0.5, "sample"), "set `fraction` to 1 and `form` to 'batch'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
def test_a_batch_that_cannot_be_cut_is_one_line_that_names_the_setting(name: str, curvature: Any, remedy: str) -> None:
    kind, batch, message = UNFIT[name]
    module = kind(shared)
    if name == "packed":
        module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(NODES), LABELS)
    if name == "edges-inside":
        module = Graph(shared)
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step((batch[0], batch[1][0], batch[2]), batch_idx)
    train = DataLoader([0], batch_size=None, collate_fn=lambda _: batch)
    fresh = SampledFisher(curvature.fraction, curvature.form, curvature.micro_batch_size)
    with pytest.raises(ConfigurationError, match=message) as caught:
        estimates(module, train, fresh)
    assert f"{remedy}, or put the samples first." in str(caught.value)
    assert repr(curvature) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fraction_of_the_modules_own_loss_that_does_not_fit() -> None:
    module = OwnLoss(shared)
    module.fisher_loss = lambda batch, batch_idx: module.net(batch[0]).reshape(8, 4).sum()
    with pytest.raises(ConfigurationError, match=r"`OwnLoss.fisher_loss` to take a batch.*got RuntimeError \(shape"):
        estimates(module, None, SampledFisher(0.5))


def test_no_loss_to_be_seen_is_an_error_that_names_the_ways_out() -> None:
    module = Custom(lambda z, y, m: z.square().mean())
    with pytest.raises(ConfigurationError, match=r"fisher_loss\(batch, batch_idx\).*EmpiricalFisher\(\)") as caught:
        estimates(module)
    assert "\n" not in str(caught.value)
    assert "Custom.training_step" in str(caught.value)


def test_cross_entropy_that_the_loss_does_not_depend_on_is_an_error_too() -> None:
    module = Custom(lambda z, y, m: z.square().mean() + F.cross_entropy(z, y).detach())
    with pytest.raises(ConfigurationError, match="fisher_loss"):
        estimates(module)


def test_fisher_loss_that_returns_no_loss_is_an_error() -> None:
    module = OwnLoss(shared)
    module.fisher_loss = lambda batch, batch_idx: 3.0
    with pytest.raises(ConfigurationError, match=r"Expected `fisher_loss` to return a scalar loss.*got float"):
        estimates(module)


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, float("nan"), "half"])
def test_fraction_out_of_range(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `fraction` to be a number in \(0, 1\], got"):
        SampledFisher(bad)


def test_a_non_finite_estimate_keeps_the_mask_and_is_tried_again() -> None:
    class Overflows(Custom):
        """The sampled-label gradient is infinite in steps 4 and 5, the training gradient is not."""

        def fisher_loss(self, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
            factor = float("inf") if batch_idx in (4, 5) else 1.0
            return F.cross_entropy(self.net(batch[0]), batch[1]) * factor, len(batch[0])

    masks = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            masks.append(ire._progress.masks.masks["net.0.weight"])

    curvature = SampledFisher()
    found = recorded(curvature)
    ire = IRE(kappa=1.0, gamma=0.5, interval=4, curvature=curvature)
    cases.fit(Overflows(shared), [ire, Look()], max_epochs=1)
    assert [values is None for values in found] == [False, True, True, False]
    assert masks[3] is masks[4] is masks[5]
    assert masks[6] is not masks[5]


def test_all_positions_ignored_makes_no_mask() -> None:
    ire = IRE(kappa=1.0, interval=1)
    cases.fit(Custom(lambda z, y, m: F.cross_entropy(z, y * 0 - 100, reduction="sum")), [ire], limit_train_batches=2)
    assert not ire._progress.masks.masks


@pytest.mark.parametrize("perturbation", [None, AverageSAM(0.0)], ids=["shared", "own"])
def test_a_term_that_is_switched_off_makes_no_mask(perturbation: Any) -> None:
    """As with a warm-up of an auxiliary loss from factor 0."""
    module = Custom(lambda z, y, m: 0.0 * F.cross_entropy(z, y) + z.square().mean())
    found = estimates(module, None, perturbation=perturbation, limit_train_batches=2)
    assert found == [None, None]


def test_a_switched_off_term_beside_another_does_not_count() -> None:
    net = Net()
    both = Custom(lambda z, y, m: F.cross_entropy(z, y) + 0.0 * F.mse_loss(z, 0 * z.detach()))
    ours = estimates(cases.clone(Custom(both.loss, net)), None)
    assert_same_estimates(ours[:1], estimates(cases.clone(Custom(shared, net)), None)[:1], False, rtol=1e-4, atol=1e-9)


def test_reentrant_checkpoints_under_accumulation() -> None:
    """The second micro-batch's shared pass must not free the graph that training still needs."""

    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(checkpoint(module.head, z.tanh(), use_reentrant=True), y)

    module = Custom(loss)
    module.head = nn.Sequential(nn.Linear(CLASSES, CLASSES))
    plain = Custom(lambda z, y, m: F.cross_entropy(m.head(z.tanh()), y), module.net)
    plain.head = module.head
    expected = estimates(cases.clone(plain), accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="cannot share the training forward pass"):
        got = estimates(module, accumulate_grad_batches=2)
    assert_same_estimates(got, expected, exact=False, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(checkpoint(module.head, z, use_reentrant=reentrant), y)

    net = Net(dropout=0.3)
    checkpointed, plain = Custom(loss, net), Custom(lambda z, y, m: F.cross_entropy(m.head(z), y), net)
    head = nn.Sequential(nn.Linear(CLASSES, CLASSES), nn.Dropout(0.3))
    checkpointed.head, plain.head = head, head
    checkpointed, plain = cases.clone(checkpointed), cases.clone(plain)
    expected = estimates(plain)
    if reentrant:
        with pytest.warns(UserWarning, match="cannot share the training forward pass"):
            got = estimates(checkpointed)
    else:
        got = estimates(checkpointed)
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert checkpointed.calls == (16 if reentrant else 8)
