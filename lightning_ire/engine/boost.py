"""The boost around one optimizer step: which weights, how strong, what is logged of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire.engine.optimizers import decay_factors, named_parameters, projects, strengths
from lightning_ire.engine.recipe import AUTO, GROUP_KAPPA, Recipe
from lightning_ire.engine.state import Progress
from lightning_ire.functional import as_shares, boost_, copied, global_norm, local
from lightning_ire.functional._foreach import groups_of, joined
from lightning_ire.functional._shards import Shards
from lightning_ire.schedule import scheduled_kappa

__all__ = ["WeightSnapshot", "boost", "boost_factors", "kappas_now"]

_BLOCK = 1 << 21  # elements: 16 MB in float64


@dataclass
class WeightSnapshot:
    """Weights before the base step.

    Attributes:
        parameters: The optimizer's parameters that are boosted (all of them for a step whose norms are logged); a very
            large one on a CPU in blocks.
        groups: Index of each one's parameter group.
        old: Their values before the step.
        masks: Their masks; ``None``: not boosted.
        wholes: The parameters that they are parts of (blocks; of sharded ones this rank's part).
    """

    parameters: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    wholes: list[Tensor] = field(default_factory=list)

    @classmethod
    def take(
        cls,
        optimizer: Optimizer,
        names: Mapping[int, str],
        masks: Mapping[str, Tensor],
        copies: Mapping[int, Tensor],
        everything: bool,
    ) -> WeightSnapshot:
        """Copy what the boost will need.

        Args:
            optimizer: The base optimizer, about to step.
            names: Parameter names by `id`.
            masks: Masks by parameter name.
            copies: Copies of weights that exist already, by `id` of the parameter; they are shared.
            everything: Save parameters without a mask too.
        """
        self = cls()
        to_copy: list[int] = []
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                mask = masks.get(names.get(id(parameter), ""))
                if (mask is None and not everything) or not parameter.requires_grad:
                    continue
                copy = copies.get(id(parameter))
                weight = local(parameter)
                for part, before, flat in _blocks(weight, weight if copy is None else copy, mask):
                    if copy is None:
                        to_copy.append(len(self.old))
                    self.parameters.append(part)
                    self.groups.append(index)
                    self.old.append(before)
                    self.masks.append(flat)
                    self.wholes.append(parameter)
        for place, made in zip(to_copy, copied([self.old[place] for place in to_copy]), strict=True):
            self.old[place] = made
        return self


def _blocks(weight: Tensor, old: Tensor, mask: Tensor | None) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Views of parts: a CPU's allocator asks the system anew for each copy of 32 MB or more, page by page."""
    if weight.numel() <= _BLOCK or not weight.is_cpu:
        return ((weight, old, mask),)
    if not all(one is None or one.is_contiguous() for one in (weight, old, mask)):
        return ((weight, old, mask),)
    masks = [None] * -(-weight.numel() // _BLOCK) if mask is None else mask.view(-1).split(_BLOCK)
    weight, old = weight.detach(), old.detach()
    return zip(weight.view(-1).split(_BLOCK), old.view(-1).split(_BLOCK), masks, strict=True)


@torch.no_grad()
def boost(
    optimizer: Optimizer,
    weights: WeightSnapshot,
    kappas: Mapping[int, float],
    scale_weight_decay: bool | str,
    with_norms: bool,
) -> dict[str, Tensor | float]:
    """Lengthen the step that `optimizer` has just made along the flat coordinates.

    Constraints that the step itself keeps: an optimizer that has a method `project()` is asked to put the weights back
    (on a sphere, say), and the exact zeros of one that is none of torch's (a proximal step's) stay zeros. What hooks
    after the step keep comes after the boost.

    Args:
        optimizer: The base optimizer, with the learning rates of this step.
        weights: What :meth:`WeightSnapshot.take` took.
        kappas: What :func:`kappas_now` returned.
        scale_weight_decay: Whether decoupled weight decay is boosted too; "only": it alone is.
        with_norms: Whether the norms of the whole step are wanted.

    Returns:
        Values for the log.
    """
    factors = None if scale_weight_decay is True else decay_factors(optimizer)
    masks = weights.masks
    if not type(optimizer).__module__.startswith("torch.optim"):
        pairs = zip(weights.parameters, masks, strict=True)
        masks = [None if mask is None else mask * (weight != 0) for weight, mask in pairs]
    boost_(
        weights.parameters,
        weights.old,
        masks,
        [kappas[id(whole)] for whole in weights.wholes],
        decay=None if factors is None else [factors[group] for group in weights.groups],
        decay_only=scale_weight_decay == "only",
    )
    if projects(type(optimizer)):  # type: ignore[arg-type]
        optimizer.project()  # type: ignore[attr-defined]
    logs: dict[str, Tensor | float] = {tags.KAPPA: max(kappas.values())}
    if with_norms:
        logs |= _norms(weights)
    return logs


def _norms(weights: WeightSnapshot) -> dict[str, Tensor | float]:
    """Norms of the step along the flat coordinates and along the others, of a few weights at a time."""
    flat, sharp = [], []
    shards = Shards(weights.wholes)
    own = [index for index, owned in enumerate(shards.owned) if owned]
    for group in groups_of([weights.parameters[i] for i in own], [weights.masks[i] is None for i in own]):
        members = [own[place] for place in group]
        step = joined([weights.parameters[index] for index in members])
        step = step - joined([weights.old[index] for index in members])
        masks = [mask for index in members if (mask := weights.masks[index]) is not None]
        if masks:
            boosted = step * as_shares(joined(masks), step.dtype)
            flat.append(global_norm([boosted]))
            step.sub_(boosted)
        sharp.append(global_norm([step]))
    norm = shards.norm if shards.sharded else global_norm
    return {tags.STEP_NORM_FLAT: norm(flat), tags.STEP_NORM_SHARP: norm(sharp)}


def kappas_now(
    recipe: Recipe, progress: Progress, optimizer: Optimizer, own: Mapping[int, float], step: int
) -> dict[int, float]:
    """Kappa of each parameter at a step, with the learning rates as they are.

    Args:
        recipe: The settings.
        progress: The optimizer's state.
        optimizer: The base optimizer.
        own: What :func:`strengths` said when the names were last looked up.
        step: Zero-based count of real optimizer steps.

    Returns:
        By `id` of the parameter, of all that the optimizer has.
    """
    kappas: dict[int, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        now = full = 1.0
        if recipe.kappa_schedule == "lr":
            now = float(group["lr"])
            full = progress.peak_lrs[index] if index < len(progress.peak_lrs) else now
        elif recipe.kappa_schedule == "ramp":
            boosted = step - (progress.started_at or 0) + 1
            now, full = float(min(boosted, progress.ramp)), float(progress.ramp)
        for key in map(id, group["params"]):
            kappa = progress.auto_kappa * own.get(key, 0.0) if recipe.kappa == AUTO else own.get(key, 0.0)
            kappas[key] = scheduled_kappa(float(group.get(GROUP_KAPPA, kappa)), now, full)
    return kappas


def boost_factors(
    recipe: Recipe, progress: Progress, module: nn.Module, optimizer: Optimizer, kappa: float | None = None
) -> dict[int, Tensor | float]:
    """By how much the boost lengthens the next step of an optimizer, as things are now: 1 + kappa * n.

    Args:
        recipe: The settings.
        progress: The optimizer's state.
        module: The module being trained.
        optimizer: The optimizer.
        kappa: The largest strength, in place of the one in force; different strengths keep their proportions.

    Returns:
        By `id` of the parameter a tensor of its shape; parameters that are not boosted are left out.
    """
    if not recipe.boosts or progress.started_at is None:
        return {}
    kappas = kappas_now(recipe, progress, optimizer, strengths(recipe, module, optimizer), progress.step)
    names = {id(parameter): name for name, parameter in named_parameters(module, optimizer).items()}
    masks = progress.masks.masks
    if kappa is not None:
        most = max(kappas.values())
        kappas = {key: kappa * own / most if most > 0 else kappa for key, own in kappas.items()}
    return {
        id(parameter): 1 + kappas[id(parameter)] * as_shares(masks[names[id(parameter)]], parameter.dtype)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if names.get(id(parameter)) in masks
    }
