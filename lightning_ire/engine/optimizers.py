"""What is known of torch's optimizers: names, rates, kinds of weight decay, constraints."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError, check_number
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.recipe import AUTO, GROUP_KAPPA, Recipe
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.functional import is_sharded
from lightning_ire.perturbation import GROUP_RADIUS, Perturbation

__all__ = [
    "check_decoupled_decay",
    "check_groups",
    "check_kappas",
    "check_optimizers",
    "decay_factors",
    "decay_is_decoupled",
    "learning_rates",
    "named_parameters",
    "parameters_that_fit",
    "patterns_in_force",
    "projects",
    "strengths",
    "trainable_parameters",
]

_COUPLED = {"SGD", "ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"}
_DECOUPLED = {"Adafactor", "AdamW", "Muon"}


def trainable_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters that are not frozen, each once.

    Args:
        optimizer: Any optimizer.
    """
    unique = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return list(unique.values())


def named_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The module's parameters and those that only the optimizer has.

    Gathered copies of sharded ones are dropped: not to be called between a forward pass and its backward pass.

    Args:
        module: The module being trained.
        optimizer: Its optimizer.
    """
    GatheredWeights(module).drop()
    named = dict(module.named_parameters())
    known = {id(parameter) for parameter in named.values()}
    strangers = [p for p in trainable_parameters(optimizer) if id(p) not in known]
    return named | {f"optimizer.parameter_{index}": parameter for index, parameter in enumerate(strangers)}


def parameters_that_fit(module: nn.Module, patterns: Sequence[str]) -> set[int]:
    """The `id` of each parameter that one of the patterns fits, under any of its names (tied weights have several).

    Args:
        module: The module being trained.
        patterns: Patterns of `fnmatch`, as in `"*.bias"`.
    """
    return {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def patterns_in_force(module: nn.Module, optimizer: Optimizer, key: str, patterns: Iterable[str]) -> dict[int, str]:
    """Which pattern each parameter of an optimizer falls under: the first that fits any of its names.

    Args:
        module: The module being trained.
        optimizer: Its optimizer.
        key: The setting that has the patterns.
        patterns: Patterns of `fnmatch`, in their order.

    Returns:
        The pattern by `id` of the parameter.

    Raises:
        ConfigurationError: If a parameter falls under none.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in named_parameters(module, optimizer).items():
        names[id(parameter)] = [name]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    found: dict[int, str] = {}
    for parameter in (one for group in optimizer.param_groups for one in group["params"] if id(one) in names):
        own = names[id(parameter)]
        fits = (pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in own))
        pattern = next(fits, None)
        if pattern is None:
            raise ConfigurationError(
                f"Expected `{key}` to have a pattern for every parameter, got none for `{own[0]}` of "
                f'{type(module).__name__}: add "*" for the rest.'
            )
        found[id(parameter)] = pattern
    return found


def strengths(recipe: Recipe, module: nn.Module, optimizer: Optimizer) -> dict[int, float]:
    """The recipe's kappa of each parameter of an optimizer, by `id`; 1 where it is "auto".

    Args:
        recipe: The settings.
        module: The module being trained.
        optimizer: Its optimizer.

    Raises:
        ConfigurationError: If kappa is a mapping and a parameter falls under none of its patterns.
    """
    kappa = recipe.kappa
    if not isinstance(kappa, Mapping):
        number = 1.0 if kappa == AUTO else kappa
        return {id(parameter): number for group in optimizer.param_groups for parameter in group["params"]}
    return {key: kappa[pattern] for key, pattern in patterns_in_force(module, optimizer, "kappa", kappa).items()}


@functools.cache
def projects(kind: type[Optimizer]) -> bool:
    """Whether there is a `project()` without arguments (SOAP has one for gradients, with arguments).

    Args:
        kind: Class of the optimizer.
    """
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


def check_optimizers(recipe: Recipe, module: nn.Module, optimizers: Sequence[Optimizer], masks: bool) -> None:
    """Refuse, before any compute, what cannot be done right with these optimizers.

    Args:
        recipe: The settings.
        module: The module that is about to be trained.
        optimizers: Its optimizers.
        masks: Whether masks will be made.

    Raises:
        ConfigurationError: With the key to change.
    """
    if recipe.perturbation is not None:
        recipe.perturbation.selects(module)
        _check_perturbation(recipe.perturbation, masks, optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                "Expected an optimizer with a plain step, got LBFGS, which runs the closure several times per step: "
                "use another optimizer or remove the callback."
            )
        if recipe.boosts and recipe.scale_weight_decay is not True:
            check_decoupled_decay(optimizer, recipe.scale_weight_decay)
        check_groups(optimizer, with_lrs=recipe.boosts and recipe.kappa_schedule == "lr")
        check_kappas(recipe, optimizer)
        if masks:
            _refuse_complex(module, optimizer)
        if any(map(is_sharded, trainable_parameters(optimizer))):
            _refuse_for_shards(recipe, masks)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for pattern in recipe.exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            warn_on_rank_zero(f"`exclude`: the pattern {pattern!r} fits no parameter of {type(module).__name__}.")
    for key, value, used in (("kappa", recipe.kappa, recipe.boosts), ("gamma", recipe.gamma, masks)):
        if used and isinstance(value, Mapping):
            _check_patterns(key, value, module, optimizers)


def _check_patterns(key: str, value: Mapping[str, float], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse parameters that fall under none, and warn of patterns under which none falls ("*" may be in reserve)."""
    in_force = {one for each in optimizers for one in patterns_in_force(module, each, key, value).values()}
    for pattern in value:
        if pattern not in in_force and pattern != "*":
            warn_on_rank_zero(
                f"`{key}`: the pattern {pattern!r} fits no parameter of {type(module).__name__}'s optimizer that an "
                "earlier one does not fit."
            )


def _check_perturbation(perturbation: Perturbation, masks: bool, optimizers: Sequence[Optimizer]) -> None:
    """What a perturbation of the user's own class may have left out, what needs a mask, and radii that it ignores."""
    if not perturbation.has_radii and any(GROUP_RADIUS in group for one in optimizers for group in one.param_groups):
        raise ConfigurationError(
            f"Expected no `{GROUP_RADIUS}` in parameter groups for {type(perturbation).__name__}, which has one ball "
            "for all of them, got some: leave it out."
        )
    if perturbation.combines and not perturbation.sync and perturbation.uses_gradient:
        raise ConfigurationError(
            f"Expected a perturbation that combines gradients to have sync=True, got {perturbation!r}: set `sync` in "
            f"{type(perturbation).__name__}, else devices would take different steps."
        )
    if perturbation.needs_mask and not masks:
        raise ConfigurationError(
            f"Expected `kappa` > 0 for {perturbation!r}, which moves the coordinates that IRE's mask calls sharp, got "
            "kappa=0, which makes none: set `kappa`, or `perturbation.coordinates` to 'all'."
        )


def _refuse_for_shards(recipe: Recipe, masks: bool) -> None:
    """What needs a device's own gradient of whole weights: gradients of sharded weights come averaged."""
    perturbation = recipe.perturbation
    if perturbation is not None and perturbation.uses_gradient and not perturbation.sync:
        raise ConfigurationError(
            f"Expected a perturbation with sync=True for sharded parameters, got {perturbation!r}: no device holds the "
            "weights that it could move by its own gradient; set `perturbation.sync` to true."
        )
    if masks and recipe.curvature.needs_whole:
        raise ConfigurationError(
            f"Expected a curvature estimate that works with sharded parameters, got {recipe.curvature!r}: "
            f"{recipe.curvature.needs_whole}."
        )


def _refuse_complex(module: nn.Module, optimizer: Optimizer) -> None:
    """Which part of a complex weight is flat is not defined."""
    trained = {id(parameter) for parameter in trainable_parameters(optimizer) if parameter.is_complex()}
    for name, parameter in named_parameters(module, optimizer).items():
        if id(parameter) in trained:
            raise ConfigurationError(
                f"Expected real parameters for IRE's masks, got the complex `{name}` of {type(module).__name__}: keep "
                "it as pairs of real numbers (`torch.view_as_complex` makes one of them), or set `kappa` to 0."
            )


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


def check_kappas(recipe: Recipe, optimizer: Optimizer) -> None:
    """Refuse strengths of parameter groups that are none, and such that would do nothing.

    Args:
        recipe: The settings.
        optimizer: The base optimizer.

    Raises:
        ConfigurationError: With the key to change.
    """
    for group in optimizer.param_groups:
        if GROUP_KAPPA not in group:
            continue
        check_number(GROUP_KAPPA, group[GROUP_KAPPA])
        if recipe.kappa == AUTO:
            raise ConfigurationError(
                f"Expected no `{GROUP_KAPPA}` in parameter groups for `kappa='auto'`, which is one number for all, got "
                f"a group with {group[GROUP_KAPPA]!r}: leave it out, or set `kappa` to a number."
            )
        if not recipe.boosts:
            raise ConfigurationError(
                f"Expected `kappa` > 0 where a parameter group has `{GROUP_KAPPA}`, got {recipe.kappa!r} and a group "
                f"with {group[GROUP_KAPPA]!r}: set `kappa`, which switches the boost on, or take `{GROUP_KAPPA}` out "
                "of the group."
            )


def decay_factors(optimizer: Optimizer) -> list[float]:
    """Lr * weight_decay of each parameter group if the decay is decoupled from the gradient, else 0.

    Args:
        optimizer: An optimizer that :func:`check_decoupled_decay` accepted.
    """
    return [
        float(group["lr"]) * float(group.get("weight_decay", 0.0)) if decay_is_decoupled(optimizer, group) else 0.0
        for group in optimizer.param_groups
    ]


def decay_is_decoupled(optimizer: Optimizer, group: Mapping[str, object]) -> bool | None:
    """Whether a group's decay is a shrinking by lr * weight_decay of its own; ``None``: nobody knows.

    Args:
        optimizer: Any optimizer.
        group: One of its parameter groups.
    """
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
    kinds = {decay_is_decoupled(optimizer, group) for group in decaying}
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
        warn_on_rank_zero(
            f"`scale_weight_decay=False` changes nothing here: {name}'s weight decay is part of the gradient and is "
            "boosted with it."
        )
