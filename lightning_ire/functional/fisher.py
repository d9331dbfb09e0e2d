"""The sampled-label estimate of the diagonal of the Fisher information (eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SampledLoss", "fisher_diagonal", "sample_labels", "sampled_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]
_IGNORED = -100


class SampledLoss(NamedTuple):
    """Cross entropy against sampled labels.

    Attributes:
        loss: The loss, with its graph; a scalar, or one value per prediction for reduction "none".
        weights: Weight w_i of each prediction in the sum (for "none": of each value), shape of the labels, no graph.
    """

    loss: Tensor
    weights: Tensor


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

    Cost: one softmax and one cumulative sum over the logits.

    Example:
        >>> sample_labels(torch.tensor([[0.0, 99.0], [99.0, 0.0]]))
        tensor([1, 0])
    """
    scores = logits.detach().movedim(1 if logits.dim() > 1 else 0, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    cumulative = scores.softmax(-1).cumsum(-1)
    draws = torch.rand(cumulative.shape[:-1], dtype=torch.float64, generator=generator)
    # below 1 in the logits' precision, or the search could fall behind the last class that has any probability
    draws = draws.clamp(max=1 - torch.finfo(cumulative.dtype).eps).to(cumulative)
    target = draws.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=scores.size(-1) - 1)


def sampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> SampledLoss:
    """The training loss with its labels replaced by draws from the model: what eq. 6 differentiates.

    Reduction and ignored positions are those of the training loss, and so is the weight that a class weight gives to
    each prediction: the weight of its training target. (Weights of the drawn labels would make the gradient's mean
    differ from zero and the estimate biased.) There is no label smoothing and there are no soft targets.

    Args:
        logits: Shape [N, C, ...] or [C], with graph.
        target: The training targets: class indices (only the ignored positions matter) or class probabilities of the
            logits' shape.
        weight: Class weights, shape [C].
        ignore_index: Class index of the positions that do not count.
        reduction: "mean", "sum" or "none".
        generator: CPU generator for the labels.

    Returns:
        The loss and the weight of every prediction in it.

    References:
        Liu et al., "Sophia" (arXiv 2305.14342), where the estimator is called GNB; eq. 6 of arXiv 2405.20763.
    """
    labels = sample_labels(logits, generator)
    if not target.is_floating_point():  # an index of our own: a position may draw the class that marks ignored ones
        labels = torch.where(target == ignore_index, _IGNORED, labels)
    weights = _training_weights(target, weight, ignore_index, logits)
    if reduction == "mean":  # torch divides by the weights' sum for class indices, by the count for probabilities
        weights = weights / (labels.numel() if target.is_floating_point() else weights.sum())
    if weight is None:
        return SampledLoss(F.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction=reduction), weights)
    losses = weights.to(logits.dtype) * F.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="none")
    return SampledLoss(losses if reduction == "none" else losses.sum(), weights)


@torch.no_grad()
def _training_weights(target: Tensor, weight: Tensor | None, ignore_index: int, logits: Tensor) -> Tensor:
    """Weight of each prediction in the training loss before the reduction; 0 where it is ignored."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if target.is_floating_point():
        classes = 1 if logits.dim() > 1 else 0
        shares = target.to(wide).movedim(classes, -1)
        return torch.ones_like(shares[..., 0]) if weight is None else shares @ weight.to(wide)
    ignored = target == ignore_index
    weights = torch.ones_like(target, dtype=wide) if weight is None else weight.to(wide)[target.masked_fill(ignored, 0)]
    return weights.masked_fill(ignored, 0.0)


@torch.no_grad()
def fisher_diagonal(gradients: Sequence[Tensor | None], batch: float | Tensor) -> list[Tensor | None]:
    """H = B * G * G, eq. 6: an unbiased estimate of the diagonal of the Fisher information.

    Args:
        gradients: Gradient G of the mean sampled-label loss, one tensor per parameter, ``None`` where there is none.
        batch: B = 1 / sum(w_i^2) for predictions weighted w_i in the loss: their number, for a plain mean.

    Returns:
        h, in at least float32 (squares of half types would underflow).

    Example:
        >>> fisher_diagonal([torch.tensor([0.5, -2.0]), None], batch=8)
        [tensor([ 2., 32.]), None]
    """
    return [
        None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)).square().mul_(batch) for g in gradients
    ]
