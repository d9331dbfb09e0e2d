"""SAM, average SAM and adversarial model perturbation."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_switch, check_whole
from lightning_ire.functional import as_shares, ascent_in_ball, average_sam_displacement, local, sam_displacement
from lightning_ire.perturbation.base import Ascent, Perturbation

__all__ = ["SAM", "AdversarialModelPerturbation", "AverageSAM"]


class SAM(Perturbation):
    r"""Sharpness-aware minimization: the gradient at theta + rho * g / ||g||, a nearby worst point.

    Foret et al. 2021 (arXiv 2010.01412), eq. 7 of the IRE paper (arXiv 2405.20763). `adaptive`: the perturbation
    rho * T^2 g / ||T g||, T = \|theta\| + eta, of Kwon et al. 2021 (ASAM, arXiv 2102.11600, eq. 6, where eta is 0). The
    authors' script (github.com/SamsungLabs/ASAM) is `SAM(rho, adaptive="weights", eta=0.01)`.

    Parameter groups of the optimizer may have radii of their own under the key "sam_rho" (0: not moved); the norm
    stays that of the whole gradient. In groups with `maximize=True` worse means lower: there -g stands in place of g.
    A complex weight counts as one coordinate, \|theta\| is its modulus.

    Args:
        rho: Radius >= 0 in weight units. 0 runs the second pass all the same (for parity tests).
        adaptive: Whether the radius adapts to the size of each weight (useful radii are then about ten times larger).
            "weights": only of parameters with "weight" in their name, T = 1 for the others (biases).
        interval: SAM at every `interval`-th optimizer step (0, k, 2k, ...), plain steps between. Other packages count
            from the other end (Composer: k - 1, 2k - 1, ...).
        parameters: Move "all" weights, or only those of normalization layers ("norm": SAM-ON, Mueller et al. 2023,
            arXiv 2306.04226), or only those whose names fit a pattern or one of several (`fnmatch`, as in
            `"*.bias"`). The norm of the gradient is taken over the same weights.
        sync: With several devices, whether the ascent gradient is averaged over them. Default: each device perturbs
            with its own (m-sharpness), which also saves one synchronization.
        eta: Added to \|theta\| where the radius adapts, >= 0: near 0 a weight then moves all the same.
        fraction: Part of each micro-batch, in (0, 1], that the ascent gradient is taken from: the first
            `ceil(fraction * n)` of its n samples. Lightning's own pass, with what `training_step` logs and the running
            statistics of BatchNorm, is over these then (so are estimates of the curvature); the second one is over all.
        coordinates: Move "all" coordinates, or the "sharp" ones: those that IRE's mask in force does not call flat (all
            before the first mask), as in sparse SAM (Mi et al. 2022, arXiv 2210.05177).
        **timing: `start_*`, `stop_*` and `rho_schedule`: see :class:`Perturbation`.

    Raises:
        ConfigurationError: If an argument is out of range, or `eta` is given without `adaptive`; at fit start, if
            `parameters` chooses none, or there will be no mask for `coordinates="sharp"`.

    Cost: `fraction` forward and backward passes more at each perturbed step, and one copy of the weights inside it.
    """

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool | Literal["weights"] = False,
        interval: int = 1,
        parameters: str | Sequence[str] = "all",
        sync: bool = False,
        eta: float = 0.0,
        fraction: float = 1.0,
        coordinates: Literal["all", "sharp"] = "all",
        **timing: Any,
    ) -> None:
        super().__init__(**timing)
        self.rho = check_number("rho", rho)
        self.adaptive = check_switch("adaptive", adaptive, "weights")
        self.eta = check_number("eta", eta)
        if self.eta and not self.adaptive:
            raise ConfigurationError(
                f"Expected `adaptive` to be true or 'weights' for `eta={eta}`, which is added to the size of weights, "
                "got False: set `adaptive`, or leave `eta` out."
            )
        self.interval = check_whole("interval", interval, low=1)
        self.parameters = _checked_patterns(parameters)
        self.sync = check_switch("sync", sync)
        self.fraction = check_number("fraction", fraction, high=1.0, low_open=True)
        self.coordinates = check_choice("coordinates", coordinates, ("all", "sharp"))
        self.needs_mask = self.coordinates == "sharp"

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return self.along(ascent.gradients, ascent, self.rho)

    def along(
        self, directions: Sequence[Tensor | None], ascent: Ascent, rho: float, rise: float | None = None
    ) -> tuple[list[Tensor | None], Tensor]:
        """SAM's displacement with other vectors in place of the gradients.

        Args:
            directions: One of the shape of each weight; ``None``: not moved.
            ascent: The weights.
            rho: Radius of those in groups without one.
            rise: See :func:`~lightning_ire.functional.sam_displacement`.

        Returns:
            See :func:`~lightning_ire.functional.sam_displacement`.
        """
        if self.coordinates == "sharp" and ascent.flat:
            given = zip(directions, ascent.flat, ascent.parameters, strict=True)
            directions = [
                d if d is None or flat is None else local(d, weight).to_dense() * (1 - as_shares(flat, weight.dtype))
                for d, flat, weight in given
            ]
        adaptive = [self.adapts(name) for name in ascent.names] if self.adaptive == "weights" else self.adaptive
        radii = ascent.radii(rho)
        return sam_displacement(ascent.parameters, directions, radii, adaptive=adaptive, eta=self.eta, rise=rise)

    def adapts(self, name: str) -> bool:
        """Whether the radius of a weight adapts to its size.

        Args:
            name: Its name in the module.
        """
        return "weight" in name if self.adaptive == "weights" else self.adaptive

    def selects(self, module: nn.Module) -> set[str] | None:
        """See the base class. A normalization layer has "norm" in the name of its class, and no layers inside."""
        if self.parameters == "all":
            return None
        if self.parameters == "norm":
            return _of_normalization_layers(module)
        patterns = [self.parameters] if isinstance(self.parameters, str) else self.parameters
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        chosen = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        if not chosen:
            raise ConfigurationError(
                f"Expected `parameters` to be 'all', 'norm' or patterns that fit names of {type(module).__name__}'s "
                f"parameters (such as {names[0] if names else 'layer.weight'!r}), got {self.parameters!r}."
            )
        return chosen

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: rho / ||g|| (adaptive: rho / ||T g||)."""
        if self.needs_mask:
            return None
        return self.rho / norm if norm else 0.0


class AverageSAM(Perturbation):
    """The gradient at theta + rho * xi / ||xi|| with random xi ~ N(0, I): eq. 8 of the IRE paper.

    The training loss that Lightning sees and logs is then the one at the moved weights. All devices draw the same xi,
    and it stays the same over an accumulation window. List IRE before callbacks that look at weights in `on_exception`:
    after an error between a forward pass and its backward pass IRE puts the weights back there.

    Parameter groups of the optimizer may have radii of their own under the key "sam_rho".

    Args:
        rho: Radius >= 0 in weight units, over all parameters together.
        **timing: `start_*`, `stop_*` and `rho_schedule`: see :class:`Perturbation`.

    Raises:
        ConfigurationError: If `rho` is out of range.

    Cost: no extra pass (an estimate of :class:`~lightning_ire.SampledFisher` then needs a forward pass of its own);
    two copies of the weights inside the step.
    """

    uses_gradient: ClassVar[bool] = False

    def __init__(self, rho: float = 0.05, **timing: Any) -> None:
        super().__init__(**timing)
        self.rho = check_number("rho", rho)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        radii = ascent.radii(self.rho)
        return average_sam_displacement(ascent.parameters, radii, generators=ascent.generators), None


class AdversarialModelPerturbation(Perturbation):
    """The gradient at theta + delta, delta climbed to by `ascents` plain gradient steps inside a ball.

    From delta = 0: delta <- delta + zeta * grad L(theta + delta), then back to ||delta|| <= epsilon if it is longer.
    Zheng, Zhang & Mao 2021, "Regularizing Neural Networks via Adversarial Model Perturbation" (arXiv 2010.04925).

    With one ascent and `scope="global"` it is SAM with rho = epsilon where zeta * ||g|| >= epsilon, and elsewhere
    un-normalized SAM (theta + zeta * g). The authors' script uses the defaults below, with a clipping of the gradient
    to norm 50 in every pass, the ascent's too, which is left out here: clip with the Trainer (the step's gradient).

    Args:
        epsilon: Radius >= 0 of the ball, in weight units.
        zeta: Ascent step size > 0.
        ascents: Ascent steps N >= 1.
        scope: One ball for each parameter tensor ("tensor", as in the authors' code) or for all weights together
            ("global").
        sync: As in :class:`SAM`.
        **timing: `start_*`, `stop_*` and `rho_schedule` (of `epsilon`; with `scope="global"` the largest factor of all
            parameter groups): see :class:`Perturbation`.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: `ascents` more forward and backward passes a step; one copy of the weights inside the step, and with more than
    one ascent another.
    """

    def __init__(
        self,
        epsilon: float = 0.5,
        zeta: float = 1.0,
        ascents: int = 1,
        scope: Literal["tensor", "global"] = "tensor",
        sync: bool = False,
        **timing: Any,
    ) -> None:
        super().__init__(**timing)
        self.has_radii = False
        self.epsilon = check_number("epsilon", epsilon)
        self.zeta = check_number("zeta", zeta, low_open=True)
        self.ascents = check_whole("ascents", ascents, low=1)
        self.scope: Any = check_choice("scope", scope, ("tensor", "global"))
        self.sync = check_switch("sync", sync)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return ascent_in_ball(
            ascent.parameters,
            ascent.gradients,
            ascent.moves,
            step=self.zeta,
            radius=[self.epsilon * factor for factor in ascent.factors] if ascent.factors else self.epsilon,
            scope=self.scope,
        )

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: min(zeta, epsilon / ||g||), for one ascent in one ball."""
        if self.ascents > 1 or self.scope == "tensor":
            return None
        return min(self.zeta, self.epsilon / norm) if norm else self.zeta


def _checked_patterns(parameters: Any) -> str | list[str]:
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if isinstance(patterns, Mapping) or not isinstance(patterns, Sequence) or not patterns:
        raise ConfigurationError(f"Expected `parameters` to be 'all', 'norm' or name patterns, got {parameters!r}.")
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigurationError(f"Expected `parameters` to be 'all', 'norm' or name patterns, got {parameters!r}.")
    return parameters if isinstance(parameters, str) else list(patterns)


def _of_normalization_layers(module: nn.Module) -> set[str]:
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules(remove_duplicate=False)
        if "norm" in type(layer).__name__.lower() and not any(layer.children())
        for name, _ in layer.named_parameters(recurse=False)
    }
    if not names:
        raise ConfigurationError(
            "Expected a module with normalization layers for `parameters='norm'`, got none with weights: "
            "set `parameters` to 'all'."
        )
    return names
