"""The masks of a run, by parameter name: making, comparing, saving."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.functional import (
    count_true,
    is_sharded,
    masks_and_threshold,
    pack_mask,
    part_of_whole,
    soft_masks_and_threshold,
    unpack_mask,
    whole_of_part,
)
from lightning_ire.functional._shards import Shards

__all__ = ["FlatMasks"]


class FlatMasks:
    """One boolean tensor per parameter that takes part; 1 = flat. Of a sharded parameter: of this rank's part.

    Soft masks are uint8 tensors with 255 n. After a resume with the other kind the loaded ones stay in force until the
    next refresh; everything here goes by the dtype.

    Args:
        gamma: Fraction of coordinates called flat, or such fractions by pattern: then the parameters of a pattern are
            ranked among themselves.
        scope: Rank over all parameters at once ("global") or in each by itself ("tensor").
        exclude_zero: Leave coordinates with h = 0 out.
        beta: Weight of the past in the moving average of h; 0: none is kept.
        soft: Make soft masks.

    The moving average starts at zero, as in the authors' code: after k estimates h_1, ..., h_k it is
    sum_j (1 - beta) * beta^(k - j) * h_j, whose weights add up to 1 - beta^k. The ranking does not see that factor,
    which is the same for all coordinates (a parameter that joins later gets it, too); the threshold is logged without.

    Attributes:
        average: The moving average, by parameter name.
        average_weight: What its weights add up to.
    """

    def __init__(
        self, gamma: float | Mapping[str, float], scope: str, exclude_zero: bool, beta: float, soft: bool = False
    ) -> None:
        self.gamma = gamma
        self.scope = scope
        self.exclude_zero = exclude_zero
        self.beta = beta
        self.soft = soft
        self.masks: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.average_weight = 0.0
        self.logs: dict[str, Tensor] = {}
        self._sharded: dict[str, Tensor] = {}
        self._new = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies get no parameters."""
        return {**vars(self), "_sharded": {}}

    def refresh(
        self,
        names: Sequence[str],
        values: Sequence[Tensor | None],
        parameters: Sequence[Tensor] | None = None,
        patterns: Sequence[str] | None = None,
    ) -> None:
        """Make all masks anew from finite estimates h; parameters without one (``None``) get none.

        Args:
            names: Parameter names.
            values: Estimates, in the same order.
            parameters: The parameters, where some may be sharded; of these all ranks have an estimate, maybe empty.
            patterns: The pattern of each one's gamma, where there are several.
        """
        given = {name: h for name, h in zip(names, values, strict=True) if h is not None}
        wholes = given if parameters is None else dict(zip(names, parameters, strict=True))
        present = {name: h for name, h in given.items() if wholes[name].numel()}
        self._sharded = {name: wholes[name] for name in present if is_sharded(wholes[name])}
        if self.beta:
            self.average_weight = self.beta * self.average_weight + (1 - self.beta)
            present = {name: self._averaged(name, h) for name, h in present.items()}
            self.average = present
        masks: dict[str, Tensor] = {}
        thresholds: dict[str, Tensor] = {}
        for tag, gamma, members in self._ranked_together(names, patterns, present):
            make = soft_masks_and_threshold if self.soft else masks_and_threshold
            made, threshold = make(
                [present[name] for name in members],
                gamma,
                scope=self.scope,  # type: ignore[arg-type]
                exclude_zero=self.exclude_zero,
                finite=True,
                like=[wholes[name] for name in members],
            )
            masks |= zip(members, made, strict=True)
            thresholds[tag] = threshold / self.average_weight if self.beta else threshold
        masks = {name: masks[name] for name in present}
        self.logs = _statistics(self.masks, masks, thresholds, wholes) if masks else {}
        self.masks = masks
        self._new = True

    def _ranked_together(
        self, names: Sequence[str], patterns: Sequence[str] | None, present: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, float, list[str]]]:
        """Parameters with one gamma: the tag of their threshold, it, and their names."""
        if isinstance(self.gamma, float):
            groups = [(tags.THRESHOLD, self.gamma, list(present))]
        else:
            of_each = dict(zip(names, patterns or (), strict=True))
            groups = [
                (f"{tags.THRESHOLD}/{pattern}", gamma, [name for name in present if of_each[name] == pattern])
                for pattern, gamma in self.gamma.items()
            ]
        return (group for group in groups if group[2])

    def take_new(self) -> dict[str, Tensor]:
        """The masks, if they were made since this was asked last."""
        new, self._new = self._new, False
        return self.masks if new else {}

    def _averaged(self, name: str, h: Tensor) -> Tensor:
        before = self.average.get(name)
        if before is None or before.shape != h.shape:  # as if its earlier estimates had been the same
            return h * self.average_weight
        return before.to(h).lerp(h, 1 - self.beta)

    def flat_counts(self) -> dict[str, int]:
        """How many coordinates of each parameter are flat (soft: the sum of n); sharded: all ranks have to call."""
        if not self.masks:
            return {}
        masks = list(self.masks.values())
        shards = Shards(masks, [self._sharded.get(name, mask) for name, mask in self.masks.items()])
        own = [
            mask.sum() if owned else mask.new_zeros((), dtype=torch.int64)
            for mask, owned in zip(masks, shards.owned, strict=True)
        ]
        counts = shards.sum(torch.stack([count.to(masks[0].device) for count in own]))
        unit = _unit(masks[0])
        return {name: round(count / unit) for name, count in zip(self.masks, counts.tolist(), strict=True)}

    def table(self, parameters: Mapping[str, Tensor]) -> str:
        """How many coordinates of each parameter are flat, one line each, and in the last line of all.

        Args:
            parameters: The optimizer's parameters by name; those without a mask are shown as taking no part.
        """
        counts = self.flat_counts()
        rows = [("parameter", "shape", "coordinates", "flat", "share")]
        total = flat = 0
        for name, parameter in parameters.items():
            shape = " x ".join(map(str, parameter.shape)) or "scalar"
            size, count = parameter.numel(), counts.get(name)
            if count is None:
                rows.append((name, shape, f"{size:,}", "-", "takes no part"))
                continue
            total, flat = total + size, flat + count
            rows.append((name, shape, f"{size:,}", f"{count:,}", f"{100 * count / max(size, 1):.1f} %"))
        rows.append(("all that take part", "", f"{total:,}", f"{flat:,}", f"{100 * flat / max(total, 1):.1f} %"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in (2, 3, 4))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits (soft ones as bytes) with their shapes, and the moving average, on the CPU.

        Of sharded parameters the whole, one after the other: all ranks have to call, and the first one has them.
        """
        state: dict[str, Any] = {
            "masks": {},
            "shapes": {name: list(self._sharded.get(name, mask).shape) for name, mask in self.masks.items()},
            "average": {},
            "average_weight": self.average_weight,
            "logs": {tag: value.cpu() for tag, value in self.logs.items()},
        }
        if any(mask.dtype == torch.uint8 for mask in self.masks.values()):
            state["soft"] = True
        first = True
        for name, mask in self.masks.items():
            parameter = self._sharded.get(name, mask)
            first = not is_sharded(parameter) or distributed.get_rank() == 0
            whole = whole_of_part(mask, parameter)
            average = whole_of_part(self.average[name], parameter) if name in self.average else None
            if first:
                state["masks"][name] = pack_mask(whole) if whole.dtype == torch.bool else whole.cpu()
                state["average"] |= {} if average is None else {name: average.cpu()}
        return state if first else state | {"of_rank": distributed.get_rank()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> list[str]:
        """Put saved masks on the parameters' devices.

        Args:
            state: What :meth:`state_dict` returned, of this or an older release; what it lacks is as in a new run.
            parameters: The run's parameters by name.

        Returns:
            Names in the state that fit no parameter; their masks are dropped.

        Raises:
            ConfigurationError: If it is the state that a rank other than the first has of sharded parameters.
        """
        if "of_rank" in state:
            raise ConfigurationError(
                f"Expected the state of IRE that rank 0 has, which holds the masks of sharded parameters, got that of "
                f"rank {state['of_rank']}: save what `state_dict()` returned on rank 0 (all ranks have to call it)."
            )
        misfits = []
        self._sharded = {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}
        packed, shapes = state.get("masks", {}), state.get("shapes", {})
        average = state.get("average", {})
        self.masks, self.average = {}, {}
        for name, bits in packed.items():
            parameter = parameters.get(name)
            if parameter is None or not _fits(parameter, shapes.get(name), average.get(name)):
                misfits.append(name)
                continue
            whole = bits if state.get("soft") else unpack_mask(bits, parameter.shape)
            self.masks[name] = part_of_whole(whole, parameter).to(parameter.device)
            if self.beta and name in average:
                self.average[name] = part_of_whole(average[name], parameter).to(parameter.device)
        # in the state of an older release the average starts at the first estimate, and its weights add up to 1
        self.average_weight = state.get("average_weight", 1.0 if average else 0.0)
        self.logs = dict(state.get("logs", {}))
        return misfits


def _fits(parameter: Tensor, shape: Sequence[int] | None, average: Tensor | None) -> bool:
    """Whether a saved mask is of this parameter; one whose shape is not known (an old state's) is made anew."""
    if shape is None and average is not None:
        shape = average.shape
    return shape is not None and tuple(shape) == tuple(parameter.shape)


def _alike(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype


def _unit(mask: Tensor) -> int:
    """What a mask has where n = 1."""
    return 255 if mask.dtype == torch.uint8 else 1


def _total(*masks: Sequence[Tensor]) -> Tensor:
    """Sum over all places of the largest of several masks there."""
    if masks[0][0].dtype == torch.bool:
        return count_true(*masks)
    sums = [functools.reduce(torch.maximum, some).sum() for some in zip(*masks, strict=True)]
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()


def _statistics(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    thresholds: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Values for the log: sums of booleans over all ranks that hold a part, no copy to the host."""
    shards = Shards(list(new.values()), [parameters[name] for name in new])
    shared = [name for name in new if name in old and _alike(old[name], new[name])]
    mine = dict(zip(new, shards.owned, strict=True))
    own = [name for name in shared if mine[name]]
    before, now = [old[name] for name in own], [new[name] for name in own]
    device = next(iter(new.values())).device
    unit = _unit(next(iter(new.values())))
    none = torch.zeros((), dtype=torch.int64, device=device)
    counts = [_total(shards.mine(list(new.values()))) if any(shards.owned) else none]
    if own:
        all_now = counts[0] if len(own) == len(new) else _total(now)
        counts += [_total(before), all_now, _total(before, now)]
    else:
        counts += [none] * 3
    flat, flat_before, flat_now, flat_either = shards.sum(torch.stack([count.to(device) for count in counts]))
    logs: dict[str, Tensor] = {
        tags.FLAT_FRACTION: flat.float() / unit / sum(shards.sizes),
        **{tag: threshold.to(device) for tag, threshold in thresholds.items()},
    }
    if shared:
        size = unit * sum(parameters[name].numel() for name in shared)
        sharp_old, sharp_new = (size - flat_before).float(), (size - flat_now).float()
        both = (size - flat_either).float()
        either = sharp_old + sharp_new - both
        logs[tags.MASK_IOU] = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    if shared and unit == 1:
        share = sharp_old / size * (sharp_new / size)
        chance = share / ((sharp_old + sharp_new) / size - share).clamp(min=torch.finfo(torch.float32).tiny)
        logs[tags.MASK_IOU_CHANCE] = torch.where(either > 0, chance, 1.0)
    return logs
