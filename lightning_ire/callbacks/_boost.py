"""The boost around one optimizer step: which weights, how strong, what is logged of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire import tags
from lightning_ire._checks import ConfigurationError, check_number
from lightning_ire.functional import boost_, copied, global_norm
from lightning_ire.perturbation import GROUP_RADIUS
from lightning_ire.schedule import scheduled_kappas

__all__ = ["OldWeights", "boost", "check_decoupled_decay", "check_groups", "decay_factors", "learning_rates"]

_BLOCK = 1 << 21  # elements: 16 MB in float64
_COUPLED = {"SGD", "ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"}
_DECOUPLED = {"Adafactor", "AdamW", "Muon"}


@dataclass
class OldWeights:
    """Weights before the base step.

    Attributes:
        parameters: The optimizer's parameters that are boosted (all of them for a step whose norms are logged); a very
            large one on a CPU in blocks.
        groups: Index of each one's parameter group.
        old: Their values before the step.
        masks: Their masks; ``None``: not boosted.
    """

    parameters: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def save(
        cls,
        optimizer: Optimizer,
        names: Mapping[int, str],
        masks: Mapping[str, Tensor],
        copies: Mapping[int, Tensor],
        everything: bool,
    ) -> OldWeights:
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
                weight = parameter.detach()
                for part, before, flat in _blocks(weight, weight if copy is None else copy, mask):
                    if copy is None:
                        to_copy.append(len(self.old))
                    self.parameters.append(part)
                    self.groups.append(index)
                    self.old.append(before)
                    self.masks.append(flat)
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
    return zip(weight.view(-1).split(_BLOCK), old.view(-1).split(_BLOCK), masks, strict=True)


@torch.no_grad()
def boost(
    optimizer: Optimizer,
    weights: OldWeights,
    kappa: float,
    peak_lrs: list[float] | None,
    scale_weight_decay: bool | str,
    with_norms: bool,
) -> dict[str, Tensor | float]:
    """Lengthen the step that `optimizer` has just made along the flat coordinates.

    Constraints that the step itself keeps: an optimizer that has a method `project()` is asked to put the weights back
    (on a sphere, say), and the exact zeros of one that is none of torch's (a proximal step's) stay zeros. What hooks
    after the step keep comes after the boost.

    Args:
        optimizer: The base optimizer, with the learning rates of this step.
        weights: What :meth:`OldWeights.save` saved.
        kappa: Strength.
        peak_lrs: Highest learning rate of each group so far, for the "lr" schedule of kappa; else ``None``.
        scale_weight_decay: Whether decoupled weight decay is boosted too; "only": it alone is.
        with_norms: Whether the norms of the whole step are wanted.

    Returns:
        Values for the log.
    """
    kappas = [kappa] * len(optimizer.param_groups)
    if peak_lrs is not None:
        kappas = scheduled_kappas(kappa, learning_rates(optimizer), peak_lrs)
    factors = None if scale_weight_decay is True else decay_factors(optimizer)
    masks = weights.masks
    if not type(optimizer).__module__.startswith("torch.optim"):
        pairs = zip(weights.parameters, masks, strict=True)
        masks = [None if mask is None else mask & (weight != 0) for weight, mask in pairs]
    boost_(
        weights.parameters,
        weights.old,
        masks,
        [kappas[group] for group in weights.groups],
        decay=None if factors is None else [factors[group] for group in weights.groups],
        decay_only=scale_weight_decay == "only",
    )
    if _projects(type(optimizer)):  # type: ignore[arg-type]
        optimizer.project()  # type: ignore[attr-defined]
    logs: dict[str, Tensor | float] = {tags.KAPPA: max(kappas)}
    if with_norms:
        flat, sharp = [], []
        for weight, old, mask in zip(weights.parameters, weights.old, weights.masks, strict=True):
            step = weight.detach() - old
            boosted = None if mask is None else step * mask
            flat.append(global_norm([boosted]))  # of each by itself: only one is in memory
            sharp.append(global_norm([step if boosted is None else step.sub_(boosted)]))
        logs |= {tags.STEP_NORM_FLAT: global_norm(flat), tags.STEP_NORM_SHARP: global_norm(sharp)}
    return logs


@functools.cache
def _projects(kind: type[Optimizer]) -> bool:
    """Whether there is a `project()` without arguments (SOAP has one for gradients, with arguments)."""
    project = getattr(kind, "project", None)
    if project is None:
        return False
    return all(one.default is not one.empty for one in list(inspect.signature(project).parameters.values())[1:])


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Learning rate of each parameter group at this moment.

    Args:
        optimizer: Any optimizer with "lr" in its parameter groups.
    """
    return [float(group["lr"]) for group in optimizer.param_groups]


def check_groups(optimizer: Optimizer, with_lrs: bool) -> None:
    """Refuse radii that are none, and groups without a learning rate where that is asked for.

    Args:
        optimizer: The base optimizer.
        with_lrs: Whether kappa follows the learning rate.

    Raises:
        ConfigurationError: With the key to change.
    """
    for group in optimizer.param_groups:
        if GROUP_RADIUS in group:
            check_number(GROUP_RADIUS, group[GROUP_RADIUS])
        if with_lrs and group.get("lr") is None:
            raise ConfigurationError(
                "Expected an optimizer with a learning rate in every parameter group for `kappa_schedule='lr'`, got "
                f"{type(optimizer).__name__} without: set `kappa_schedule` to 'constant'."
            )


def decay_factors(optimizer: Optimizer) -> list[float]:
    """Lr * weight_decay of each parameter group if the decay is decoupled from the gradient, else 0.

    Args:
        optimizer: An optimizer that :func:`check_decoupled_decay` accepted.
    """
    return [
        float(group["lr"]) * float(group.get("weight_decay", 0.0)) if _decoupled(optimizer, group) else 0.0
        for group in optimizer.param_groups
    ]


def _decoupled(optimizer: Optimizer, group: Mapping[str, object]) -> bool | None:
    """Whether the group's decay is a shrinking by lr * weight_decay of its own; ``None``: nobody knows."""
    # not `weight_decouple`, as other packages call it: what their optimizers really take off is often another amount
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    known = {base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim")}
    if known & _DECOUPLED:
        return True
    return False if known & _COUPLED else None


def check_decoupled_decay(optimizer: Optimizer, scale_weight_decay: bool | str) -> None:
    """Refuse an optimizer whose decay is unknown, and "only" where there is none; warn where `False` does nothing.

    Args:
        optimizer: The base optimizer.
        scale_weight_decay: False or "only".

    Raises:
        ConfigurationError: If it decays weights in a way that is not known, or there is nothing to boost.
    """
    decaying = [group for group in optimizer.param_groups if group.get("weight_decay")]
    kinds = {_decoupled(optimizer, group) for group in decaying}
    name = type(optimizer).__name__
    if None in kinds:
        raise ConfigurationError(
            f"Expected an optimizer with decoupled weight decay for `scale_weight_decay={scale_weight_decay}` (torch's "
            f"AdamW, or one whose parameter groups say `decoupled_weight_decay`), got {name}: set `scale_weight_decay` "
            "to true."
        )
    if scale_weight_decay == "only" and True not in kinds:
        raise ConfigurationError(
            f"Expected an optimizer with decoupled weight decay for `scale_weight_decay=only`, got {name} without: set "
            "`scale_weight_decay` to true."
        )
    if kinds == {False}:
        rank_zero_warn(
            f"`scale_weight_decay=False` changes nothing here: {name}'s weight decay is part of the gradient and is "
            "boosted with it."
        )
