"""IRE's extra step along the flat coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_ire.functional._foreach import groups_of, joined, masked_, parts_of, subtract_
from lightning_ire.functional._shards import local
from lightning_ire.functional.soft_mask import as_shares

__all__ = ["boost_"]

_PIECE = 1 << 18  # elements: weights, old weights, mask and difference are 3 MB in float32
_PIECE_ON_DEVICE = 1 << 26


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
        parameters: Weights after the base step; changed in place. Of a DTensor this rank's part is, and what stands
            beside it in the other lists may be parts as well.
        old_parameters: Weights before the base step, same shapes; not changed.
        masks: Boolean tensors, 1 = flat, or soft ones (uint8, n = value / 255, as :func:`soft_masks` makes them);
            ``None`` leaves that parameter alone.
        kappa: Strength >= 0, one for all or one per parameter.
        decay: Per parameter, the factor lr * weight_decay by which the base step shrank the weights (decoupled weight
            decay). That part of the step, -decay * theta_old, is then not lengthened. Default: the whole step is.
        decay_only: Lengthen that part and nothing else (a control for experiments).

    Raises:
        ValueError: If the lists differ in length.

    Cost: one read of weights, old weights and masks and one write of the weights; temporary memory for a piece of a
    parameter (2^18 numbers on a CPU, 2^26 elsewhere); no gradient pass.

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
    chosen = [
        index
        for index in range(count)
        if masks[index] is not None and kappas[index] != 0 and not (decay_only and not decays[index])
    ]
    parameters = [local(parameter) for parameter in parameters]
    keys = [(kappas[index], decays[index], masks[index].dtype) for index in chosen]  # type: ignore[union-attr]
    for group in groups_of([parameters[index] for index in chosen], keys):
        members = [chosen[position] for position in group]
        strength, shrunk, _ = keys[group[0]]
        weights = [parameters[index] for index in members]
        olds = [local(old_parameters[index]) for index in members]
        flat: list[Tensor] = [local(masks[index]) for index in members]  # type: ignore[misc]
        if len(members) == 1:
            for weight, old, mask in _pieces(weights[0], olds[0], flat[0]):
                weight.sub_(_way_back(weight, old, mask, shrunk, decay_only), alpha=strength)
        else:
            back = _way_back(joined(weights), joined(olds), joined(flat), shrunk, decay_only)
            subtract_(weights, parts_of(back, weights), strength)


def _way_back(weight: Tensor, old: Tensor, mask: Tensor, shrunk: float, decay_only: bool) -> Tensor:
    """The step to be lengthened, with the opposite sign, and 0 where it is not: x - 0.0 is x to the bit for every x."""
    if decay_only:
        back = old * shrunk
    else:
        back = old - weight
        if shrunk:
            back.sub_(old, alpha=shrunk)
    if mask.dtype == torch.uint8:
        back.mul_(as_shares(mask, back.dtype))
        mask = mask != 0
    masked_([back], [mask])
    return back


def _pieces(*tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """Parts of tensors of one shape: on a CPU so small that what is computed from one stays in the cache."""
    size = _PIECE if tensors[0].device.type == "cpu" else _PIECE_ON_DEVICE
    if tensors[0].numel() <= size or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
