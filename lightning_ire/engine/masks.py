"""The masks of a run, by parameter name: making, comparing, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ire import tags
from lightning_ire.functional import count_true, masks_and_threshold, pack_mask, unpack_mask

__all__ = ["FlatMasks"]


class FlatMasks:
    """One boolean tensor per parameter that takes part; 1 = flat.

    Args:
        gamma: Fraction of coordinates called flat.
        scope: Rank over all parameters at once ("global") or in each by itself ("tensor").
        exclude_zero: Leave coordinates with h = 0 out.
        beta: Weight of the past in the moving average of h; 0: none is kept.

    The moving average starts at zero, as in the authors' code: after k estimates h_1, ..., h_k it is
    sum_j (1 - beta) * beta^(k - j) * h_j, whose weights add up to 1 - beta^k. The ranking does not see that factor,
    which is the same for all coordinates (a parameter that joins later gets it, too); the threshold is logged without.

    Attributes:
        average: The moving average, by parameter name.
        average_weight: What its weights add up to.
    """

    def __init__(self, gamma: float, scope: str, exclude_zero: bool, beta: float) -> None:
        self.gamma = gamma
        self.scope = scope
        self.exclude_zero = exclude_zero
        self.beta = beta
        self.masks: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.average_weight = 0.0
        self.logs: dict[str, Tensor] = {}
        self._new = False

    def refresh(self, names: Sequence[str], values: Sequence[Tensor | None]) -> None:
        """Make all masks anew from finite estimates h; parameters without one (``None``) get none.

        Args:
            names: Parameter names.
            values: Estimates, in the same order.
        """
        present = {name: h for name, h in zip(names, values, strict=True) if h is not None and h.numel()}
        if self.beta:
            self.average_weight = self.beta * self.average_weight + (1 - self.beta)
            present = {name: self._averaged(name, h) for name, h in present.items()}
            self.average = present
        masks: dict[str, Tensor] = {}
        thresholds: list[Tensor] = []
        for group in [list(present)] if self.scope == "global" else [[name] for name in present]:
            if not group:
                continue
            values_of_group = [present[name] for name in group]
            made, threshold = masks_and_threshold(
                values_of_group, self.gamma, exclude_zero=self.exclude_zero, finite=True
            )
            thresholds.append(threshold / self.average_weight if self.beta else threshold)
            masks |= dict(zip(group, made, strict=True))
        self.logs = _statistics(self.masks, masks, thresholds)
        self.masks = masks
        self._new = True

    def take_new(self) -> dict[str, Tensor]:
        """The masks, if they were made since this was asked last."""
        new, self._new = self._new, False
        return self.masks if new else {}

    def _averaged(self, name: str, h: Tensor) -> Tensor:
        before = self.average.get(name)
        if before is None or before.shape != h.shape:  # as if its earlier estimates had been the same
            return h * self.average_weight
        return before.to(h).lerp(h, 1 - self.beta)

    def table(self, parameters: Mapping[str, Tensor]) -> str:
        """How many coordinates of each parameter are flat, one line each, and in the last line of all.

        Args:
            parameters: The optimizer's parameters by name; those without a mask are shown as taking no part.
        """
        rows = [("parameter", "shape", "coordinates", "flat", "share")]
        total = flat = 0
        for name, parameter in parameters.items():
            shape = " x ".join(map(str, parameter.shape)) or "scalar"
            mask = self.masks.get(name)
            if mask is None:
                rows.append((name, shape, f"{parameter.numel():,}", "-", "takes no part"))
                continue
            count = int(mask.sum())
            total, flat = total + mask.numel(), flat + count
            rows.append((name, shape, f"{mask.numel():,}", f"{count:,}", f"{100 * count / max(mask.numel(), 1):.1f} %"))
        rows.append(("all that take part", "", f"{total:,}", f"{flat:,}", f"{100 * flat / max(total, 1):.1f} %"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in (2, 3, 4))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits with their shapes, and the moving average, on the CPU."""
        return {
            "masks": {name: pack_mask(mask) for name, mask in self.masks.items()},
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
            "average": {name: h.cpu() for name, h in self.average.items()},
            "average_weight": self.average_weight,
            "logs": {tag: value.cpu() for tag, value in self.logs.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> list[str]:
        """Put saved masks on the parameters' devices.

        Args:
            state: What :meth:`state_dict` returned, of this or an older release; what it lacks is as in a new run.
            parameters: The run's parameters by name.

        Returns:
            Names in the state that fit no parameter; their masks are dropped.
        """
        misfits = []
        packed, shapes = state.get("masks", {}), state.get("shapes", {})
        average = state.get("average", {})
        self.masks, self.average = {}, {}
        for name, bits in packed.items():
            parameter = parameters.get(name)
            if parameter is None or not _fits(parameter, shapes.get(name), average.get(name)):
                misfits.append(name)
                continue
            self.masks[name] = unpack_mask(bits, parameter.shape).to(parameter.device)
            if self.beta and name in average:
                self.average[name] = average[name].to(parameter.device)
        # in the state of an older release the average starts at the first estimate, and its weights add up to 1
        self.average_weight = state.get("average_weight", 1.0 if average else 0.0)
        self.logs = dict(state.get("logs", {}))
        return misfits


def _fits(parameter: Tensor, shape: Sequence[int] | None, average: Tensor | None) -> bool:
    """Whether a saved mask is of this parameter; one whose shape is not known (an old state's) is made anew."""
    if shape is None and average is not None:
        shape = average.shape
    return shape is not None and tuple(shape) == tuple(parameter.shape)


def _statistics(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], thresholds: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Values for the log: sums of booleans, no copy to the host."""
    if not new:
        return {}
    masks = list(new.values())
    flat = count_true(masks)
    logs: dict[str, Tensor] = {
        tags.FLAT_FRACTION: flat.float() / sum(mask.numel() for mask in masks),
        tags.THRESHOLD: torch.stack([threshold.to(flat.device) for threshold in thresholds]).amax(),
    }
    shared = [name for name in new if name in old and old[name].shape == new[name].shape]
    if shared:
        before, now = [old[name] for name in shared], [new[name] for name in shared]
        size = sum(mask.numel() for mask in now)
        sharp_old = (size - count_true(before)).float()
        sharp_new = (size - (flat if len(shared) == len(new) else count_true(now))).float()
        both = (size - count_true(before, now)).float()
        either = sharp_old + sharp_new - both
        logs[tags.MASK_IOU] = torch.where(either > 0, both / either.clamp(min=1), 1.0)
        share = sharp_old / size * (sharp_new / size)
        chance = share / ((sharp_old + sharp_new) / size - share).clamp(min=torch.finfo(torch.float32).tiny)
        logs[tags.MASK_IOU_CHANCE] = torch.where(either > 0, chance, 1.0)
    return logs
