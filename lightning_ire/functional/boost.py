"""IRE's extra step along the flat coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["boost_"]


@torch.no_grad()
def boost_(
    parameters: Sequence[Tensor],
    old_parameters: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    kappa: float | Sequence[float],
    *,
    decay: Sequence[float] | None = None,
    decay_only: bool = False,
) -> None:
    """Lengthen the base optimizer's step along the flat coordinates, in place.

    Eq. 4 of the IRE paper (arXiv 2405.20763) on the weights:
    theta <- theta_old + (1 + kappa * n) * (theta - theta_old), computed as theta += kappa * n * (theta - theta_old).
    Coordinates with mask 0 keep their bits (a NaN stays a NaN). The optimizer's state never sees the boost.

    Args:
        parameters: Weights after the base step; changed in place.
        old_parameters: Weights before the base step, same shapes; not changed.
        masks: Boolean tensors, 1 = flat; ``None`` leaves that parameter alone.
        kappa: Strength >= 0, one for all or one per parameter.
        decay: Per parameter, the factor lr * weight_decay by which the base step shrank the weights (decoupled weight
            decay). That part of the step, -decay * theta_old, is then not lengthened. Default: the whole step is.
        decay_only: Lengthen that part and nothing else (a control for experiments).

    Raises:
        ValueError: If the lists differ in length.

    Cost: one temporary copy of one parameter at a time; no gradient pass.

    Example:
        >>> weight, old = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
        >>> boost_([weight], [old], [torch.tensor([True, False])], kappa=3.0)
        >>> weight
        tensor([-2.,  1.])
    """
    count = len(parameters)
    kappas = [float(kappa)] * count if isinstance(kappa, (int, float)) else list(kappa)
    decays = [0.0] * count if decay is None else list(decay)
    if not count == len(old_parameters) == len(masks) == len(kappas) == len(decays):
        raise ValueError(
            f"Expected one entry per parameter ({count}), got {len(old_parameters)} old parameters, {len(masks)} "
            f"masks, {len(kappas)} kappas and {len(decays)} decays."
        )
    for weight, old, mask, strength, shrunk in zip(parameters, old_parameters, masks, kappas, decays, strict=True):
        if mask is None or strength == 0 or (decay_only and not shrunk):
            continue
        if decay_only:
            step = old * -shrunk
        else:
            step = weight - old
            if shrunk:
                step.add_(old, alpha=shrunk)
        # -0.0 is the one number whose sum with x is x to the bit for every x, +0.0 and -0.0 included
        weight.add_(step.masked_fill_(~mask, -0.0), alpha=strength)
