"""What a run's optimizer, SAM and IRE make of a gradient near a minimum: the operator whose stability is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ire.engine.optimizers import decay_is_decoupled
from lightning_ire.functional import (
    adam_limit,
    as_real,
    effective_product,
    local,
    sam_displacement,
    sgd_limit,
    stability_edge,
)
from lightning_ire.perturbation import GROUP_RADIUS, SAM, AverageSAM, Perturbation
from lightning_ire.sharpness.landscape import Landscape

__all__ = ["Enhanced", "StepGeometry", "UnknownStep"]


class Enhanced(Protocol):
    """What makes SAM's and IRE's steps of an optimizer's: the callback, or the step of a plain loop."""

    def perturbation_in_force(self) -> tuple[Perturbation, list[float]] | None:
        """How gradients are perturbed now, and what multiplies the radius of each parameter group."""

    @property
    def ascent_norm(self) -> float | None:
        """The norm that divided the last SAM step; ``None``: there was none."""

    def boost_factors(self, module: Any, optimizer: Optimizer, kappa: float | None = None) -> dict[int, Tensor | float]:
        """By how much the boost lengthens a step, by `id` of the parameter; with `kappa` as the largest strength."""


class UnknownStep(Exception):
    """A run for which no stability line is known; the message says why."""


@dataclass
class StepGeometry:
    """One optimizer's step as a linear map of the distance from a minimum (see `lightning_ire.functional.stability`).

    Attributes:
        step_sizes: Diagonal of S = eta D / P, one vector over the landscape's coordinates.
        lengths: Diagonal of D, 1 + kappa * n; ``None``: there is no boost.
        limit: The constant c.
        gain: Steps of momentum add up to this many learning rates.
        decay: Weight decay that is added to the gradient, over the coordinates; ``None``: none.
        most_decay: The largest of it.
        ascent: rho_e; 0 without SAM.
        ascent_scale: Diagonal of T; ``None``: 1.
        uniform: The one learning rate of all coordinates, if S is a multiple of the identity; else ``None``.
    """

    step_sizes: Tensor
    lengths: Tensor | None
    limit: float
    gain: float
    decay: Tensor | None
    most_decay: float
    ascent: float
    ascent_scale: Tensor | None
    uniform: float | None

    @property
    def edge(self) -> float | None:
        """The eigenvalue of H from which on steps blow up; ``None`` where that depends on the eigenvector.

        Weight decay adds its factor to every eigenvalue (the largest factor, where there are several).
        """
        if self.uniform is None or self.ascent_scale is not None:
            return None
        return stability_edge(self.uniform, self.limit - self.uniform * self.most_decay, self.ascent)

    def product(self, landscape: Landscape, vector: Tensor) -> Tensor:
        """K v; the largest eigenvalue of K divided by :attr:`limit` is the stability ratio.

        Args:
            landscape: The loss.
            vector: v.
        """
        return effective_product(
            landscape.product,
            vector,
            self.step_sizes,
            ascent=self.ascent,
            ascent_scale=self.ascent_scale,
            decay=self.decay,
        )

    def noise_parts(self, landscape: Landscape, vector: Tensor, batches: list[int]) -> Tensor:
        """||A v||^2 and v^T A v for A = S^(1/2) H_B S^(1/2), H_B of one training batch.

        Args:
            landscape: The loss.
            vector: v, random signs.
            batches: The probe's batches that make up one training batch.
        """
        root = self.step_sizes.sqrt()
        image = root * landscape.batch_product(root * vector, batches)
        return torch.stack([landscape.coordinates.dot(one, image) for one in (image, vector)])

    @classmethod
    def of(
        cls,
        optimizers: Sequence[Optimizer],
        module: nn.Module,
        landscape: Landscape,
        ire: Enhanced | None,
        kappa: float | None = None,
    ) -> StepGeometry:
        """Read learning rates, momentum, Adam's second moments, IRE's mask and SAM's radius as they are now.

        Args:
            optimizers: All optimizers of the module.
            module: The module.
            landscape: Gives the coordinates, and the gradient's norm where SAM has not made a step yet.
            ire: What enhances the optimizer's steps; ``None``: nothing.
            kappa: The boost's largest strength, in place of the one in force.

        Raises:
            UnknownStep: If there is no line for this run.
        """
        if not optimizers:
            raise UnknownStep("there is no optimizer outside of fit")
        if len(optimizers) != 1:
            raise UnknownStep(f"there are {len(optimizers)} optimizers, not one")
        (optimizer,) = optimizers
        if not optimizer.param_groups:  # Lightning's stand-in
            raise UnknownStep("there is no optimizer")
        if landscape.coordinates.sharded:
            landscape.release()  # else the module's parameters may be gathered copies
        limit, gain = _momentum(optimizer)
        factors = ire.boost_factors(module, optimizer, kappa) if ire is not None else {}
        sizes: dict[int, Tensor] = {}
        lengths: dict[int, Tensor] = {}
        decays: dict[int, Tensor] = {}
        moving = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                real = as_real(local(parameter.detach()))
                wide = torch.promote_types(real.dtype, torch.float32)
                lengthened = torch.as_tensor(factors.get(id(parameter), 1.0), device=parameter.device)
                if parameter.is_complex() and lengthened.dim():  # one factor for both numbers of a pair
                    lengthened = torch.stack([lengthened.real] * 2, dim=-1)
                lengths[id(parameter)] = lengthened.to(wide).broadcast_to(real.shape)
                preconditioner = _preconditioner(optimizer, parameter, group)
                moving = moving or isinstance(preconditioner, Tensor) or math.isfinite(preconditioner)
                size = float(group["lr"]) * lengthened.to(wide) / preconditioner
                sizes[id(parameter)] = size.broadcast_to(real.shape)
                added = 0.0 if decay_is_decoupled(optimizer, group) else float(group["weight_decay"])
                decays[id(parameter)] = torch.tensor(added, dtype=wide).broadcast_to(real.shape)
        if not moving:
            raise UnknownStep(
                f"{type(optimizer).__name__} has not made a step yet, and what divides its steps is not known"
            )
        coordinates = landscape.coordinates
        step_sizes = coordinates.flatten([sizes.get(id(p)) for p in landscape.parameters])
        decay = coordinates.flatten([decays.get(id(p)) for p in landscape.parameters])
        ascent, scale = _ascent(ire, optimizers, module, landscape)
        least, most = coordinates.range(step_sizes)
        decays_range = coordinates.range(decay)
        return cls(
            step_sizes,
            coordinates.flatten([lengths.get(id(p)) for p in landscape.parameters]) if factors else None,
            limit,
            gain,
            None if decays_range == (0.0, 0.0) else decay,
            decays_range[1],
            ascent,
            scale,
            least if least == most else None,
        )


def _momentum(optimizer: Optimizer) -> tuple[float, float]:
    """The constant c, and to how many learning rates the steps of one gradient add up."""
    kinds = {_kind(optimizer, group) for group in optimizer.param_groups}
    if len(kinds) > 1:
        raise UnknownStep("its parameter groups have different momentum")
    return kinds.pop()


def _kind(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[float, float]:
    if group.get("maximize"):
        raise UnknownStep("the optimizer maximizes")
    if type(optimizer) is SGD:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        gain = (1 - dampening if momentum else 1.0) / (1 - momentum)
        return sgd_limit(momentum, dampening, group["nesterov"]), gain
    if type(optimizer) in (Adam, AdamW):
        return adam_limit(float(group["betas"][0])), 1.0
    raise UnknownStep(f"the preconditioner of {type(optimizer).__name__} is not known (SGD, Adam and AdamW are)")


def _preconditioner(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> Tensor | float:
    """P: 1 for SGD, Adam's sqrt(v) + eps; infinite where Adam has not made a step (it does not move the weight)."""
    if type(optimizer) is SGD:
        return 1.0
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state or float(state["step"]) == 0:  # 0: all steps so far overflowed in fp16
        return math.inf
    moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    moment = as_real(local(moment, parameter))  # Adam takes complex numbers as pairs
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return (moment / correction).sqrt() + float(group["eps"])


def _ascent(
    ire: Enhanced | None, optimizers: Sequence[Optimizer], module: nn.Module, landscape: Landscape
) -> tuple[float, Tensor | None]:
    """rho_e and the diagonal of T: SAM's gradient is (H + rho_e H T^2 H) times the distance from the minimum.

    rho_e is the mean over the devices, and so the same on all.
    """
    found = ire.perturbation_in_force() if ire is not None else None
    if found is None or isinstance(found[0], AverageSAM):  # the mean of random moves is none
        return 0.0, None
    perturbation, factors = found
    if len(set(factors)) > 1:
        raise UnknownStep("the learning rates of parameter groups, which radii follow, are at different shares")
    if perturbation.effective_radius(1.0) is None:
        raise UnknownStep(f"the displacement of {perturbation!r} is not a number times the gradient")
    if perturbation.interval != 1:
        raise UnknownStep(f"SAM works at every {perturbation.interval}th step only")
    if any(GROUP_RADIUS in group for optimizer in optimizers for group in optimizer.param_groups):
        raise UnknownStep("parameter groups have radii of their own")
    chosen = perturbation.selects(module)
    sam = perturbation if isinstance(perturbation, SAM) and perturbation.adaptive else None
    moves = {name for name, _ in module.named_parameters()} if chosen is None else chosen
    adaptive = [sam is not None and sam.adapts(name) for name in landscape.names]
    eta = 0.0 if sam is None else sam.eta
    coordinates = landscape.coordinates
    scales = [
        (p.detach().abs() + eta if adapts else torch.ones_like(p)) if name in moves else torch.zeros_like(p)
        for name, p, adapts in zip(landscape.names, coordinates.parts, adaptive, strict=True)
    ]
    norm = ire.ascent_norm if ire is not None else None
    if norm is None:
        gradients = coordinates.split(landscape.gradient())
        moves_some = coordinates.largest(torch.tensor([float(scale.any()) for scale in scales])).tolist()
        moved = [i for i, some in enumerate(moves_some) if some]
        weights = [landscape.movable[i] for i in moved]
        ascents = [gradients[i] for i in moved]
        norm = float(sam_displacement(weights, ascents, 1.0, adaptive=[adaptive[i] for i in moved], eta=eta)[1])
    ascent = factors[0] * (perturbation.effective_radius(norm) or 0.0)
    # a zero gradient gives a zero displacement; with `sync=False` each device has a norm of its own
    ascent = landscape.average(ascent if math.isfinite(ascent) else 0.0)
    if ascent == 0:
        return 0.0, None
    plain = chosen is None and not any(adaptive)
    return ascent, None if plain else coordinates.flatten(scales)
