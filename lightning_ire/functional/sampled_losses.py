r"""Losses as log-likelihoods: their value against targets drawn from the model, which the Fisher is made of.

Each function takes what torch's loss of the same name takes and returns, prediction by prediction, the loss against a
drawn target and the weight that the prediction has in the training loss. With l_i the drawn losses and w_i the weights

    h = (d/dtheta sum_i sqrt(w_i) l_i)^2

has the expectation sum_i w_i F_i, F_i the diagonal of the Fisher information of prediction i: the diagonal of the
generalized Gauss-Newton matrix of the training loss sum_i w_i loss_i. The mean over B predictions has w_i = 1/B, and h
is then B * G * G of eq. 6 of the IRE paper (arXiv 2405.20763), "GNB" in Sophia (Liu et al., arXiv 2305.14342).

With `labels="all"` no label is drawn: l_i is sum_c eps_c sqrt(p_c) log p_c with random signs eps, whose gradient g has
E[g g^T] = sum_c p_c grad log p_c grad log p_c^T = F_i. So h has the same expectation, for one backward pass as well,
and sees the labels that are hardly ever drawn, in which the Fisher information of a sure network sits (derived here: it
is Hutchinson's estimate with the factor (I - p 1^T) diag(p)^(1/2) of the softmax's Hessian diag(p) - p p^T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from lightning_ire.functional.state import seeded

__all__ = [
    "SampledLoss",
    "label_log_probabilities",
    "sample_labels",
    "sampled_binary_cross_entropy",
    "sampled_binary_cross_entropy_with_logits",
    "sampled_cross_entropy",
    "sampled_gaussian_nll_loss",
    "sampled_kl_div",
    "sampled_log_prob",
    "sampled_mse_loss",
    "sampled_nll_loss",
    "sampled_poisson_nll_loss",
]

Reduction = Literal["mean", "sum", "none"]
Labels = Literal["drawn", "all"]
_IGNORED = -100
_PART = 1 << 20  # logits looked at together
_PART_ON_DEVICE = 1 << 26
_MOST = 2.0**53  # a rate beyond which float64 has no whole numbers


class SampledLoss(NamedTuple):
    """A training loss against drawn targets, before its predictions are added up.

    Attributes:
        losses: Loss l_i of each prediction against its draw, with the graph.
        weights: Weight w_i >= 0 of each prediction in the training loss, of the same shape, in at least float32,
            without graph. For reduction "none": what multiplies it before the caller adds up. (`kl_div` has then
            several elements for each prediction: those of a dimension in which the losses have size 1.)
    """

    losses: Tensor
    weights: Tensor

    def times(self, factor: Tensor) -> SampledLoss:
        """A term of a loss: its predictions weigh |factor| times as much in the whole as in the term.

        Args:
            factor: d loss / d term, a scalar or (reduction "none") one number per element.
        """
        weights = self.weights * factor.detach().to(self.weights.dtype).abs()
        return SampledLoss(self.losses, weights.sum_to_size(self.losses.shape))

    @property
    def score(self) -> Tensor:
        """Sum of sqrt(w_i) l_i: the square of its gradient is h."""
        return (self.weights.sum_to_size(self.losses.shape).sqrt().to(self.losses) * self.losses).sum()


@torch.no_grad()
def sample_labels(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One label per prediction from the model's own softmax: yhat ~ softmax(logits).

    Inverse-CDF sampling with one uniform number per prediction, drawn on the CPU: a seed gives the same labels on
    every device, and N micro-batches draw what one batch of N times the size would.

    Args:
        logits: Unnormalized scores, shape [N, C, ...], or [C] for a single prediction, as `cross_entropy` takes them.
        generator: CPU generator; ``None``: torch's global one.

    Returns:
        int64 labels of shape [N, ...] (without the class dimension), on the device of the logits.

    Cost: one softmax and one cumulative sum over the logits, in parts (no second tensor of their size).

    Example:
        >>> sample_labels(torch.tensor([[0.0, 99.0], [99.0, 0.0]]))
        tensor([1, 0])
    """
    scores = logits.detach().movedim(1 if logits.dim() > 1 else 0, -1)
    shape, classes = scores.shape[:-1], scores.size(-1)
    draws = torch.rand(shape, dtype=torch.float64, generator=generator).view(-1)
    rows = max((_PART if scores.device.type == "cpu" else _PART_ON_DEVICE) // max(classes, 1), 1)
    parts = zip(scores.reshape(-1, classes).split(rows), draws.split(rows), strict=True)
    return torch.cat([_labels(part, drawn) for part, drawn in parts]).view(shape)


def _labels(scores: Tensor, draws: Tensor) -> Tensor:
    """Labels for scores of shape [n, C] and n uniform numbers."""
    cumulative = scores.to(_wide(scores)).softmax(-1).cumsum(-1)
    # below 1 in the logits' precision, or the search could fall behind the last class that has any probability
    draws = draws.clamp(max=1 - torch.finfo(cumulative.dtype).eps).to(cumulative)
    target = draws.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=scores.size(-1) - 1)


def sampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    labels: Labels = "drawn",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Cross entropy against labels drawn from the model's softmax.

    Ignored positions are those of the training loss and have weight 0. A class weight counts as that of the training
    target. (Weights of the drawn labels would make the mean of the gradient differ from zero and the estimate biased.)
    The draws are hard labels: soft targets and label smoothing do not change the curvature, but for the class weights
    that they mix.

    Args:
        logits: Shape [N, C, ...] or [C], with graph.
        target: The training targets: class indices (only the ignored positions and the class weights matter) or class
            probabilities of the logits' shape.
        weight: Class weights, shape [C].
        ignore_index: Class index of the positions that do not count.
        label_smoothing: Share of the target that is spread over all classes.
        reduction: "mean", "sum" or "none".
        labels: "drawn", or "all" with random signs.
        generator: CPU generator for the labels or signs.

    Returns:
        Losses and weights of the shape of class indices.

    Example:
        >>> sampled = sampled_cross_entropy(torch.tensor([[0.0, 99.0], [99.0, 0.0]]), torch.tensor([1, -100]))
        >>> sampled.losses.abs(), sampled.weights
        (tensor([0., 0.]), tensor([1., 0.]))
    """
    if labels == "all":
        losses = _with_signs(label_log_probabilities(F.cross_entropy, logits), generator)
    else:
        drawn = _unignored(sample_labels(logits, generator), target, ignore_index)
        losses = F.cross_entropy(logits, drawn, ignore_index=_IGNORED, reduction="none")
    return SampledLoss(losses, _class_weights(target, weight, ignore_index, logits, reduction, label_smoothing))


def sampled_nll_loss(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    labels: Labels = "drawn",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Negative log-likelihood (`nll_loss`) against labels drawn from the given probabilities.

    Args:
        log_probabilities: Shape [N, C, ...] or [C], with graph, normalized over the classes (`log_softmax`).
        target: Class indices, as in :func:`sampled_cross_entropy`.
        weight: Class weights, shape [C].
        ignore_index: Class index of the positions that do not count.
        reduction: "mean", "sum" or "none".
        labels: "drawn", or "all" with random signs.
        generator: CPU generator for the labels or signs.

    Returns:
        Losses and weights of the shape of the target.
    """
    if labels == "all":
        losses = _with_signs(label_log_probabilities(F.nll_loss, log_probabilities), generator)
    else:
        drawn = _unignored(sample_labels(log_probabilities, generator), target, ignore_index)
        losses = F.nll_loss(log_probabilities, drawn, ignore_index=_IGNORED, reduction="none")
    return SampledLoss(losses, _class_weights(target, weight, ignore_index, log_probabilities, reduction))


def sampled_binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    labels: Labels = "drawn",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Binary cross entropy against labels drawn from the model's sigmoid, each element a prediction of its own.

    Args:
        logits: Any shape, with graph.
        target: The training targets in [0, 1], of the same shape (they matter for `pos_weight` only).
        weight: Weight of each element, of a shape that broadcasts.
        pos_weight: Weight of the positive part, of a shape that broadcasts; counts as that of the training target:
            1 + (pos_weight - 1) * target.
        reduction: "mean", "sum" or "none".
        labels: "drawn", or "all" with random signs.
        generator: CPU generator for the labels or signs.

    Returns:
        Losses and weights of the logits' shape.

    Example:
        >>> sampled = sampled_binary_cross_entropy_with_logits(torch.tensor([999.0, -999.0]), torch.ones(2))
        >>> sampled.losses, sampled.weights
        (tensor([0., 0.]), tensor([0.5000, 0.5000]))
    """
    if labels == "all":
        losses = _with_signs(label_log_probabilities(F.binary_cross_entropy_with_logits, logits), generator)
    else:
        drawn = _uniform(logits, generator) < logits.detach().to(_wide(logits)).sigmoid()
        losses = F.binary_cross_entropy_with_logits(logits, drawn.to(logits.dtype), reduction="none")
    with torch.no_grad():
        positive = None if pos_weight is None else 1 + (pos_weight - 1) * target
    return SampledLoss(losses, _element_weights(losses, [weight, positive], reduction))


def sampled_binary_cross_entropy(
    probabilities: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    labels: Labels = "drawn",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Binary cross entropy of probabilities against labels drawn from them, each element a prediction of its own.

    Args:
        probabilities: Any shape, in [0, 1], with graph.
        target: The training targets (they do not matter).
        weight: Weight of each element, of a shape that broadcasts.
        reduction: "mean", "sum" or "none".
        labels: "drawn", or "all" with random signs.
        generator: CPU generator for the labels or signs.

    Returns:
        Losses and weights of the probabilities' shape.
    """
    if labels == "all":
        losses = _with_signs(label_log_probabilities(F.binary_cross_entropy, probabilities), generator)
    else:
        drawn = _uniform(probabilities, generator) < probabilities.detach().to(_wide(probabilities))
        losses = F.binary_cross_entropy(probabilities, drawn.to(probabilities.dtype), reduction="none")
    return SampledLoss(losses, _element_weights(losses, [weight], reduction))


def sampled_mse_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Squared error against targets drawn from N(prediction, 1/2), each element a prediction of its own.

    (f - y)^2 is, up to a constant, minus the log-density of a Gaussian of variance 1/2 around f. With it the Fisher
    information is the Gauss-Newton matrix of the squared error, 2 J^T J.

    Args:
        prediction: Any shape, with graph.
        target: The training targets, of a shape that broadcasts. Where they have a graph, too (two networks that are
            to agree), it is the difference that is predicted.
        weight: Weight of each element (a mean is then divided by the sum of the weights).
        reduction: "mean", "sum" or "none".
        generator: CPU generator for the targets.

    Returns:
        Losses and weights of the broadcast shape.

    Example:
        >>> torch.manual_seed(0).seed() and None
        >>> drawn = sampled_mse_loss(torch.zeros(10000), torch.ones(10000)).losses
        >>> round(float(drawn.mean()), 1)
        0.5
    """
    difference = prediction - target
    noise = math.sqrt(0.5) * _normal(difference, generator).to(difference.dtype)
    losses = (difference - difference.detach() - noise).square()
    weights = _element_weights(losses, [weight], "none" if weight is not None else reduction)
    if weight is not None and reduction == "mean":
        weights = weights / weights.sum()
    return SampledLoss(losses, weights)


def sampled_gaussian_nll_loss(
    prediction: Tensor,
    target: Tensor,
    var: Tensor | float,
    *,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Negative log-likelihood of a Gaussian against targets drawn from N(prediction, var), element by element.

    Both the mean and the variance may be predicted: the Fisher information is that of the pair.

    Args:
        prediction: Means, any shape.
        target: The training targets, as in :func:`sampled_mse_loss`.
        var: Variances >= 0, of a shape that `gaussian_nll_loss` takes, or one number.
        full: Whether the losses have their constant term.
        eps: Least variance.
        reduction: "mean", "sum" or "none".
        generator: CPU generator for the targets.

    Returns:
        Losses and weights of the shape of `prediction - target`.

    Example:
        >>> torch.manual_seed(0).seed() and None
        >>> drawn = sampled_gaussian_nll_loss(torch.zeros(10000), torch.ones(10000), 9.0).losses
        >>> round(float(drawn.mean()) - 0.5 * math.log(9), 1)
        0.5
    """
    variance = var if isinstance(var, Tensor) else torch.full_like(prediction.detach(), var)
    if variance.shape != prediction.shape and variance.shape == prediction.shape[:-1]:
        variance = variance.unsqueeze(-1)
    difference, variance = torch.broadcast_tensors(prediction - target, variance)
    spread = variance.detach().to(_wide(variance)).clamp(min=eps).sqrt()
    drawn = difference.detach() + (spread * _normal(difference, generator)).to(difference.dtype)
    losses = F.gaussian_nll_loss(difference, drawn, variance, full=full, eps=eps, reduction="none")
    return SampledLoss(losses, _element_weights(losses, [], reduction))


def sampled_poisson_nll_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Negative log-likelihood of a Poisson distribution against counts drawn from it, element by element.

    Args:
        prediction: Logarithms of the rates, or with `log_input=False` rates >= 0, any shape, with graph.
        target: The training targets (only their shape matters, which may broadcast).
        log_input: What the prediction is.
        full: Whether the losses have Stirling's term.
        eps: With `log_input=False`: what is added to the rates, in the loss and so in the draws.
        reduction: "mean", "sum" or "none".
        generator: CPU generator for the counts.

    Returns:
        Losses and weights of the broadcast shape.

    Example:
        >>> torch.manual_seed(0).seed() and None
        >>> sampled_poisson_nll_loss(torch.full((3,), -30.0), torch.zeros(3)).losses  # exp(-30) - 0 * -30
        tensor([9.3576e-14, 9.3576e-14, 9.3576e-14])
    """
    prediction = prediction.expand(torch.broadcast_shapes(prediction.shape, target.shape))
    rate = prediction.detach().to(_wide(prediction))
    counts = _counts(rate.exp() if log_input else rate + eps, generator).to(prediction.dtype)
    losses = F.poisson_nll_loss(prediction, counts, log_input=log_input, full=full, eps=eps, reduction="none")
    return SampledLoss(losses, _element_weights(losses, [], reduction))


def sampled_kl_div(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    log_target: bool = False,
    reduction: Literal["batchmean", "mean", "sum", "none"] = "mean",
    dim: int | None = None,
    labels: Labels = "drawn",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """Kullback-Leibler divergence from soft labels, as the log-likelihood of labels drawn from the given probabilities.

    The entropy of the soft labels is a constant: what is left is a cross entropy, in which a prediction weighs as much
    as its soft labels add up to.

    Args:
        log_probabilities: Shape [N, C], [N, C, ...], ..., with graph, normalized over the classes (`log_softmax`).
        target: Soft labels >= 0 of a shape that broadcasts, or their logarithms.
        log_target: What the target is.
        reduction: "batchmean", "mean" (over classes as well, as in torch), "sum" or "none".
        dim: Dimension of the classes. Default: the last, the second, ... one over which probabilities add up to 1.
        labels: "drawn", or "all" with random signs.
        generator: CPU generator for the labels or signs.

    Returns:
        Losses of shape [N, 1], with size 1 in the dimension of the classes, and weights of the same shape; for "none"
        weights of the target's, which :meth:`SampledLoss.times` adds up over the classes.

    Raises:
        ValueError: If the probabilities add up to 1 over no dimension.

    Example:
        >>> sampled = sampled_kl_div(torch.tensor([[-99.0, 0.0]]), torch.tensor([[0.3, 0.7]]), reduction="batchmean")
        >>> sampled.losses.abs(), sampled.weights
        (tensor([[0.]]), tensor([[1.]]))
    """
    axis = _class_dim(log_probabilities) if dim is None else dim
    log_p, soft = torch.broadcast_tensors(log_probabilities, target.detach())
    soft = soft.to(_wide(soft))
    weights = soft.exp() if log_target else soft
    if labels == "all":
        losses = _with_signs(log_p.movedim(axis, -1), generator).unsqueeze(axis)
    else:
        drawn = sample_labels(log_p.movedim(axis, -1).reshape(-1, log_p.size(axis)), generator)
        losses = -log_p.gather(axis, drawn.reshape(log_p.movedim(axis, -1).shape[:-1]).unsqueeze(axis))
    if reduction == "none":
        return SampledLoss(losses, weights)
    count = {"mean": log_p.numel(), "batchmean": log_probabilities.shape[0], "sum": 1}[reduction]
    return SampledLoss(losses, weights.sum(axis, keepdim=True) / max(count, 1))


def sampled_log_prob(
    distribution: Distribution, log_probabilities: Tensor, *, generator: torch.Generator | None = None
) -> SampledLoss:
    """Minus the log-probability of values drawn from a distribution, each of its batch a prediction of its own.

    Values come from the distribution's own `sample()`, with torch's streams seeded by the generator. So other than
    those of the other losses they depend on the device, and on how a batch is cut.

    Args:
        distribution: What the model predicts, with graph.
        log_probabilities: Those of the training targets; only their shape and device matter.
        generator: CPU generator; ``None``: torch's global streams.

    Returns:
        Losses of the shape of `log_probabilities`, and weights of 1.

    Raises:
        NotImplementedError: If the distribution has no `sample()`, or its batch has another shape and no `expand()`.

    Example:
        >>> certain = torch.distributions.Categorical(logits=torch.tensor([[0.0, 99.0]]))
        >>> sampled_log_prob(certain, torch.zeros(1)).losses.abs()
        tensor([0.])
    """
    shape = log_probabilities.shape
    with nullcontext() if generator is None else seeded(_seed(generator), {log_probabilities.device}):
        value = (distribution if distribution.batch_shape == shape else distribution.expand(shape)).sample()
    losses = -distribution.log_prob(value.detach())
    return SampledLoss(losses, torch.ones_like(losses, dtype=_wide(losses)).detach())


def label_log_probabilities(loss: Callable[..., Tensor], prediction: Tensor, dim: int | None = None) -> Tensor:
    """The log p_c of all labels c, for the losses whose targets are labels.

    Args:
        loss: `cross_entropy`, `nll_loss`, `kl_div` or one of the two binary cross entropies of torch.
        prediction: Its first argument, with graph.
        dim: Dimension of the classes of `kl_div`, as in :func:`sampled_kl_div`.

    Returns:
        Shape [..., C]: that of the predictions (of a binary cross entropy each element is one) and C labels.

    Example:
        >>> label_log_probabilities(F.cross_entropy, torch.zeros(1, 2)).exp()
        tensor([[0.5000, 0.5000]])
    """
    if loss is F.kl_div:
        return prediction.movedim(_class_dim(prediction) if dim is None else dim, -1)
    if loss is F.binary_cross_entropy_with_logits:
        return torch.stack([F.logsigmoid(prediction), F.logsigmoid(-prediction)], dim=-1)
    if loss is F.binary_cross_entropy:
        least = torch.finfo(prediction.dtype).tiny
        return torch.stack([prediction.clamp(min=least).log(), (1 - prediction).clamp(min=least).log()], dim=-1)
    classes = 1 if prediction.dim() > 1 else 0
    scores = prediction.log_softmax(classes) if loss is F.cross_entropy else prediction
    return scores.movedim(classes, -1)


def _with_signs(log_probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """sum_c eps_c sqrt(p_c) log p_c over the last dimension; a label of no probability counts as zero."""
    log_p = log_probabilities
    signs = torch.randint(0, 2, log_p.shape, dtype=torch.int8, generator=generator).to(log_p.device).mul_(2).sub_(1)
    factors = (log_p.detach().to(_wide(log_p)) / 2).exp() * signs
    return (torch.where(factors == 0, 0, log_p) * factors.to(log_p)).sum(-1)


SAMPLED: dict[Callable[..., Tensor], Callable[..., SampledLoss]] = {
    F.cross_entropy: sampled_cross_entropy,
    F.nll_loss: sampled_nll_loss,
    F.binary_cross_entropy_with_logits: sampled_binary_cross_entropy_with_logits,
    F.binary_cross_entropy: sampled_binary_cross_entropy,
    F.mse_loss: sampled_mse_loss,
    F.gaussian_nll_loss: sampled_gaussian_nll_loss,
    F.poisson_nll_loss: sampled_poisson_nll_loss,
    F.kl_div: sampled_kl_div,
}
"""Torch's losses that are log-likelihoods, and their counterparts; the keyword arguments have torch's names."""


@torch.no_grad()
def _unignored(labels: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mark what is ignored by an index of our own: a position may draw the class that marks ignored ones."""
    return labels if target.is_floating_point() else torch.where(target == ignore_index, _IGNORED, labels)


@torch.no_grad()
def _class_weights(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    logits: Tensor,
    reduction: Reduction,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weight of each prediction in the training loss; 0 where it is ignored."""
    wide = _wide(logits)
    if target.is_floating_point():
        shares = target.to(wide).movedim(1 if logits.dim() > 1 else 0, -1)
        weights = torch.ones_like(shares[..., 0]) if weight is None else (shares * weight.to(wide)).sum(-1)
        total: Tensor | int = weights.numel()  # torch divides by the count here
        ignored = torch.zeros_like(weights, dtype=torch.bool)
    else:
        ignored = target == ignore_index
        weights = torch.ones_like(target, dtype=wide)
        if weight is not None:
            weights = weight.to(wide)[target.masked_fill(ignored, 0)]
        weights = weights.masked_fill(ignored, 0.0)
        total = weights.sum().clamp(min=torch.finfo(wide).tiny)  # of the weights without smoothing
    if weight is not None and label_smoothing:
        weights = (weights * (1 - label_smoothing) + label_smoothing * weight.to(wide).mean()).masked_fill(ignored, 0.0)
    return weights / total if reduction == "mean" else weights


@torch.no_grad()
def _element_weights(losses: Tensor, factors: list[Tensor | None], reduction: Reduction) -> Tensor:
    """Product of the factors that are there, for each element; a mean divides by the number of elements."""
    weights = torch.ones_like(losses, dtype=_wide(losses))
    for factor in factors:
        if factor is not None:
            weights = weights * factor
    return weights / max(losses.numel(), 1) if reduction == "mean" else weights


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the CPU in float64 as in :func:`sample_labels`."""
    wide = _wide(like)
    draws = torch.rand(like.shape, dtype=torch.float64, generator=generator)
    return draws.clamp(max=1 - torch.finfo(wide).eps).to(like.device, wide)  # rounding must not reach 1


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, from :func:`_uniform` by the inverse of the distribution function."""
    uniform = _uniform(like, generator)
    edge = torch.finfo(uniform.dtype).eps
    return torch.special.ndtri(uniform.clamp(edge, 1 - edge))


def _counts(rate: Tensor, generator: torch.Generator | None) -> Tensor:
    """Poisson counts of these rates, drawn on the CPU in float64; a rate that is no number gives no error here."""
    known = rate.detach().to("cpu", torch.float64).nan_to_num(0.0).clamp(0.0, _MOST)
    return torch.poisson(known, generator=generator).to(rate)


@torch.no_grad()
def _class_dim(log_probabilities: Tensor) -> int:
    """The dimension over which the probabilities add up to 1."""
    wide = log_probabilities.detach().to(_wide(log_probabilities))
    tolerance = torch.finfo(log_probabilities.dtype).eps ** 0.5
    for dim in sorted(range(wide.dim()), key=lambda dim: (dim != wide.dim() - 1, dim != 1, dim)):
        if bool((wide.logsumexp(dim).abs() <= tolerance).all()):
            return dim
    raise ValueError("Expected log-probabilities that add up to 1 over one dimension, got none: give `log_softmax`'s.")


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
