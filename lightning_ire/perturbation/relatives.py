"""Relatives of SAM: other directions, other radii, other uses of the two gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_switch, check_whole
from lightning_ire.functional import global_dot, global_norm, local, sam_displacement
from lightning_ire.perturbation.base import Ascent, Perturbation
from lightning_ire.perturbation.sam import SAM

__all__ = ["GSAM", "LESAM", "FriendlySAM", "LookSAM", "MomentumSAM", "StableSAM", "WeightedSAM"]

Gradients = Sequence[Tensor | None]

_MOMENTA = ("momentum_buffer", "exp_avg")


class _SynchronizedSAM(SAM):
    """A SAM whose two gradients have to be those of all devices together."""

    _settled: ClassVar[tuple[str, ...]] = ("sync",)

    def __init__(self, rho: float = 0.05, **sam: Any) -> None:
        if "sync" in sam:
            raise ConfigurationError(
                f"Expected {type(self).__name__} without `sync`, which is always true there, got sync={sam['sync']!r}: "
                "leave it out."
            )
        super().__init__(rho, sync=True, **sam)

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: the step's gradient is another one than SAM's."""
        return None


class FriendlySAM(_SynchronizedSAM):
    """SAM along the part of the batch's gradient that other batches do not share.

    d = g - sigma * m, epsilon = rho * d / ||d||, and m <- lam * m + (1 - lam) * g, which starts as the first g (there d
    is g). Li et al. 2024, "Friendly Sharpness-Aware Minimization" (CVPR, arXiv 2403.12350), as in the authors' code.

    Args:
        rho: Radius >= 0 in weight units.
        sigma: Share >= 0 of the mean gradient that is taken off; 0: SAM.
        lam: Weight of the past in the mean gradient, in [0, 1).
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`; `sync` is always true.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: as SAM, and one tensor of the weights' size for good.
    """

    def __init__(self, rho: float = 0.05, sigma: float = 1.0, lam: float = 0.9, **sam: Any) -> None:
        super().__init__(rho, **sam)
        self.sigma = check_number("sigma", sigma)
        self.lam = check_number("lam", lam, high=1.0, high_open=True)

    def displacement(self, ascent: Ascent) -> tuple[Gradients, Tensor | None]:
        """See the base class."""
        directions: list[Tensor | None] = []
        for gradient, weight, memory in zip(ascent.gradients, ascent.parameters, ascent.memory, strict=True):
            if gradient is None:
                directions.append(None)
                continue
            own, mean = local(gradient, weight).to_dense(), memory.get("mean_gradient")
            directions.append(own if mean is None else own - self.sigma * mean)
            memory["mean_gradient"] = own.clone() if mean is None else mean.lerp(own, 1 - self.lam)
        return self.along(directions, ascent, self.rho)


class GSAM(_SynchronizedSAM):
    """SAM whose step also closes the gap between the loss at the moved weights and the loss itself.

    The step's gradient is g_p - alpha * g_perp, g_perp = g - (g . g_p / ||g_p||^2) g_p: the part of g that is
    orthogonal to the gradient g_p at the moved weights. Zhuang et al. 2022, "Surrogate Gap Minimization Improves
    Sharpness-Aware Training" (ICLR, arXiv 2203.08065); its radius follows the learning rate (`rho_schedule="lr"`).

    Args:
        rho: Radius >= 0 in weight units.
        alpha: Weight >= 0 of the orthogonal part; 0: SAM.
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`; `sync` is always true.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: as SAM, and one copy of the gradients inside the step.
    """

    def __init__(self, rho: float = 0.05, alpha: float = 0.4, **sam: Any) -> None:
        super().__init__(rho, **sam)
        self.alpha = check_number("alpha", alpha)

    def combine(self, gradients: Gradients, perturbed: Gradients | None, ascent: Ascent) -> Gradients:
        """See the base class."""
        if perturbed is None or self.alpha == 0:
            return gradients if perturbed is None else perturbed
        share = _ratio(_dot(gradients, perturbed, ascent), _dot(perturbed, perturbed, ascent))
        return _each(
            lambda g, p: p if g is None else p * (1 + self.alpha * share.to(p)) - self.alpha * g, gradients, perturbed
        )


class WeightedSAM(_SynchronizedSAM):
    """SAM's gradient and the plain one, weighted.

    With a = gamma / (1 - gamma): the optimizer's own step with g, and then theta <- theta - lr * a * (g_p - g)
    (`decouple`); or a step with (1 - a) * g + a * g_p. Yue et al. 2023, "Sharpness-Aware Minimization Revisited:
    Weighted Sharpness as a Regularization Term" (KDD, arXiv 2305.15817).

    Args:
        rho: Radius >= 0 in weight units.
        gamma: Weight of the sharpness, in [0, 1); 0: the base run (sparse gradients are made dense); 1/2 without
            `decouple`: SAM.
        decouple: Whether the optimizer (its momentum and second moments) sees g only.
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`; `sync` is always true.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: as SAM, and one copy of the gradients inside the step, two with `decouple`.
    """

    def __init__(self, rho: float = 0.05, gamma: float = 0.9, decouple: bool = True, **sam: Any) -> None:
        super().__init__(rho, **sam)
        self.gamma = check_number("gamma", gamma, high=1.0, high_open=True)
        self.decouple = check_switch("decouple", decouple)

    @property
    def _weight(self) -> float:
        return self.gamma / (1 - self.gamma)

    def combine(self, gradients: Gradients, perturbed: Gradients | None, ascent: Ascent) -> Gradients:
        """See the base class."""
        if perturbed is None or self.gamma == 0:
            return gradients
        if not self.decouple:
            return _each(lambda g, p: p if g is None else g.lerp(p, self._weight), gradients, perturbed)
        for own, other, memory in zip(gradients, perturbed, ascent.memory, strict=True):
            if other is not None:
                memory["sharpness"] = other if own is None else other - own
        return gradients

    def after_step(self, ascent: Ascent) -> None:
        """See the base class."""
        for weight, group, memory in zip(ascent.parameters, ascent.groups, ascent.memory, strict=True):
            sharpness = memory.pop("sharpness", None)
            if sharpness is not None:
                sign = 1 if group.get("maximize") else -1
                part = local(weight.detach())
                part.add_(sharpness.to(part.dtype), alpha=sign * float(group["lr"]) * self._weight)


class StableSAM(_SynchronizedSAM):
    """SAM whose gradient is made as long as the plain one: g_p * ||g|| / ||g_p||.

    Tan et al. 2025, "Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization Strategy" (JMLR, arXiv
    2401.07250), which widens the range of learning rates at which SAM works.

    Args:
        rho: Radius >= 0 in weight units.
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`; `sync` is always true.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: as SAM, and one copy of the gradients inside the step.
    """

    def combine(self, gradients: Gradients, perturbed: Gradients | None, ascent: Ascent) -> Gradients:
        """See the base class."""
        if perturbed is None:
            return gradients
        factor = _ratio(
            global_norm(gradients, like=ascent.parameters), global_norm(perturbed, like=ascent.parameters), otherwise=1
        )
        return _each(lambda g, p: p * factor.to(p), gradients, perturbed)


class LookSAM(_SynchronizedSAM):
    """SAM at every k-th step, whose effect the steps between repeat.

    At a step with a second pass the part of g_p that is orthogonal to g is kept: g_v = g_p - (g_p . g / ||g||^2) g, and
    the step is SAM's. Between: g + alpha * (||g|| / ||g_v||) * g_v. Before the first of them: plain steps. Liu et al.
    2022, "Towards Efficient and Scalable Sharpness-Aware Minimization" (CVPR, arXiv 2203.02714).

    Args:
        rho: Radius >= 0 in weight units.
        k: Second passes at steps 0, k, 2k, ...; 1: SAM.
        alpha: Weight >= 0 of the kept part; 0: SAM with `interval=k`.
        scope: Whether norms and products are those of each tensor, as in the authors' code, or "global".
        **sam: Further arguments of :class:`SAM` (but `interval`) and :class:`Perturbation`; `sync` is always true.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: one forward and backward pass more at every k-th step, and one tensor of the weights' size for good.
    """

    _settled: ClassVar[tuple[str, ...]] = ("sync", "interval")

    def __init__(
        self,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        scope: Literal["tensor", "global"] = "tensor",
        **sam: Any,
    ) -> None:
        if "interval" in sam:
            raise ConfigurationError(
                f"Expected `k` to say how often LookSAM makes a second pass, got interval={sam['interval']!r}: set `k`."
            )
        self.k = check_whole("k", k, low=1)
        super().__init__(rho, interval=self.k, **sam)
        self.alpha = check_number("alpha", alpha)
        self.scope = check_choice("scope", scope, ("tensor", "global"))

    def combine(self, gradients: Gradients, perturbed: Gradients | None, ascent: Ascent) -> Gradients:
        """See the base class."""
        if perturbed is not None:
            dots = self._dots(perturbed, gradients, ascent)
            squares = self._dots(gradients, gradients, ascent)
            for own, other, memory, dot, square in zip(gradients, perturbed, ascent.memory, dots, squares, strict=True):
                if other is not None:
                    memory["orthogonal"] = other if own is None else other - _ratio(dot, square).to(other) * own
            return perturbed
        kept = [memory.get("orthogonal") for memory in ascent.memory]
        if all(one is None for one in kept):
            return gradients
        norms, lengths = (self._dots(each, each, ascent) for each in (gradients, kept))
        return [
            g if g is None or v is None else g + self.alpha * _ratio(norm, length).sqrt().to(g) * v
            for g, v, norm, length in zip(gradients, kept, norms, lengths, strict=True)
        ]

    def _dots(self, first: Gradients, second: Gradients, ascent: Ascent) -> list[Tensor]:
        """The inner product that belongs to each tensor."""
        if self.scope == "global":
            return [_dot(first, second, ascent)] * len(first)
        return global_dot(first, second, like=ascent.parameters, each=True)


class LESAM(SAM):
    """SAM whose radius shrinks where the gradient is large: rho_t = min(sigma / ||g||, rho_max).

    To first order the loss rises by at most sigma, whatever the gradient. "Fix the Loss, Not the Radius: Rethinking the
    Adversarial Perturbation of Sharpness-Aware Minimization" (LE-SAM, ICML 2026, arXiv 2605.10183).

    Args:
        rho_max: Largest radius >= 0 in weight units.
        sigma: Rise of the loss >= 0, in units of the loss.
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: as SAM.
    """

    _settled: ClassVar[tuple[str, ...]] = ("rho",)

    def __init__(self, rho_max: float = 0.05, sigma: float = 1.0, **sam: Any) -> None:
        if "rho" in sam:
            raise ConfigurationError(f"Expected `rho_max` for LESAM's radius, got rho={sam['rho']!r}: set `rho_max`.")
        super().__init__(rho=check_number("rho_max", rho_max), **sam)
        self.rho_max = self.rho
        self.sigma = check_number("sigma", sigma)

    def displacement(self, ascent: Ascent) -> tuple[Gradients, Tensor | None]:
        """See the base class."""
        return self.along(ascent.gradients, ascent, self.rho_max, rise=self.sigma)

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: min(sigma / ||g||, rho_max) / ||g||."""
        if self.needs_mask:
            return None
        return min(self.sigma / norm, self.rho_max) / norm if norm else 0.0


class MomentumSAM(Perturbation):
    """The gradient at theta - rho * v / ||v||, v the optimizer's momentum: SAM without a second pass.

    Becker, Altrock & Risse 2024, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead" (arXiv
    2401.12033), with v before this step's gradient is added. Under Adam and its like v is the first moment. The first
    step is a plain one. The training loss that Lightning sees and logs is the one at the moved weights.

    Parameter groups of the optimizer may have radii of their own under the key "sam_rho".

    Args:
        rho: Radius >= 0 in weight units.
        **timing: `start_*`, `stop_*` and `rho_schedule`: see :class:`Perturbation`.

    Raises:
        ConfigurationError: If `rho` is out of range; at the first step that shows it, if the optimizer has no momentum.

    Cost: no extra pass; two copies of the weights inside the step.
    """

    uses_gradient: ClassVar[bool] = False

    def __init__(self, rho: float = 0.05, **timing: Any) -> None:
        super().__init__(**timing)
        self.rho = check_number("rho", rho)

    def displacement(self, ascent: Ascent) -> tuple[Gradients, Tensor | None]:
        """See the base class."""
        momenta = [_momentum(state) for state in ascent.states]
        switched_off = bool(ascent.groups) and all(group.get("momentum") == 0 for group in ascent.groups)
        if (any(ascent.states) or switched_off) and not any(momentum is not None for momentum in momenta):
            raise ConfigurationError(
                "Expected an optimizer with a momentum for MomentumSAM (`momentum_buffer` or `exp_avg` in its state), "
                "got one without: set its momentum, or take another perturbation."
            )
        radii = [-radius for radius in ascent.radii(self.rho)]
        moves, _ = sam_displacement(ascent.parameters, momenta, radii)
        return moves, None


def _momentum(state: Any) -> Tensor | None:
    return next((state[key] for key in _MOMENTA if state.get(key) is not None), None)


def _dot(first: Gradients, second: Gradients, ascent: Ascent) -> Tensor:
    return global_dot(first, second, like=ascent.parameters)


def _ratio(above: Tensor, below: Tensor, otherwise: float = 0) -> Tensor:
    """The quotient, or another number where there is none: without waiting for a GPU."""
    return torch.where(below == 0, torch.as_tensor(otherwise, dtype=below.dtype, device=below.device), above / below)


def _each(function: Any, gradients: Gradients, perturbed: Gradients) -> list[Tensor | None]:
    """What a function makes of the two gradients of each weight that has one at the moved weights."""
    return [None if p is None else function(g, p) for g, p in zip(gradients, perturbed, strict=True)]
