"""Where a step's gradient is taken: SAM and its relatives. A new one is one subclass of `Perturbation`."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_switch, check_whole
from lightning_ire.functional import ascent_in_ball, average_sam_displacement, sam_displacement

__all__ = ["GROUP_RADIUS", "SAM", "AdversarialModelPerturbation", "Ascent", "AverageSAM", "Perturbation"]

GROUP_RADIUS = "sam_rho"
"""Key of an optimizer's parameter group that gives its weights a radius of their own."""


@dataclass(frozen=True)
class Ascent:
    """What a perturbation may look at; everything in the order of the parameters that it moves.

    Of a sharded model weights and gradients are DTensors: arithmetic element by element works on them as it is; norms
    over all of them are :func:`lightning_ire.functional.global_norm`.

    Attributes:
        parameters: The weights, unmoved.
        gradients: Gradients of what the optimizer minimizes (of minus the loss in a group with `maximize`), unscaled;
            ``None`` where there is none. All ``None`` if the class does not use them.
        groups: The optimizer's parameter group of each weight.
        generators: One random generator per weight, on its device, the same on every rank and in every micro-batch of
            the accumulation window.
        moves: Displacements at which the gradients were taken; ``None``: at the unmoved weights.
        names: Their names in the module ("": the optimizer alone has it).
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    groups: Sequence[Mapping[str, Any]]
    generators: Sequence[torch.Generator]
    moves: Sequence[Tensor | None] | None = None
    names: Sequence[str] = ()

    def radii(self, rho: float) -> list[float]:
        """The radius of each weight: that of its parameter group, or this one.

        Args:
            rho: For groups without a radius.
        """
        return [float(group.get(GROUP_RADIUS, rho)) for group in self.groups]


class Perturbation(ABC):
    """Moves the weights for the gradient of a step; the step itself starts from the unmoved weights.

    A perturbation is not a callback: give it to `IRE(perturbation=...)`, with `kappa=0` for the perturbation alone.

    Attributes:
        uses_gradient: True: :meth:`displacement` gets the gradient at the unmoved weights, so a step costs a second
            forward and backward pass. False: the weights are moved before the only pass.
        ascents: How often :meth:`displacement` is called for a step, with the gradient at the weights that the last
            call moved: so many forward and backward passes more than a plain step.
        interval: The weights are moved at every `interval`-th optimizer step; the other steps are plain ones.
        sync: Whether that gradient is averaged over devices first (else each device moves by its own).
    """

    uses_gradient: ClassVar[bool] = True
    ascents: int = 1
    interval: int = 1
    sync: bool = False

    @abstractmethod
    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Say by how much each weight moves.

        Args:
            ascent: The weights that :meth:`selects` chose, their gradients, ...

        Returns:
            One displacement per weight (``None``: not moved), and the gradient norm to be logged, if any.
        """

    def selects(self, module: nn.Module) -> set[str] | None:
        """Names of the parameters that may move; ``None`` for all.

        Args:
            module: The module being trained.

        Returns:
            Names as in `module.named_parameters()`.
        """
        return None

    def effective_radius(self, norm: float) -> float | None:
        """rho_e: by how many gradients the weights move, for the stability of steps; ``None``: not one number.

        Args:
            norm: The norm that :meth:`displacement` gave.
        """
        return None

    def state_dict(self) -> dict[str, object]:
        """Nothing; Lightning's Trainer asks objects with this method for their `state_key`, see there."""
        return {}

    @property
    def state_key(self) -> str:
        """Lightning asks every callback for this name: the place to say that a perturbation is none."""
        name = type(self).__name__
        raise ConfigurationError(
            f"Expected `callbacks` to hold callbacks, got the perturbation {self!r}: "
            f"for {name} alone write callbacks=[IRE(kappa=0, perturbation={self!r})]."
        )


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

    Raises:
        ConfigurationError: If an argument is out of range, or `eta` is given without `adaptive`; at fit start, if
            `parameters` chooses none.

    Cost: one more forward and backward pass at each perturbed step, and one copy of the weights inside the step.
    """

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool | Literal["weights"] = False,
        interval: int = 1,
        parameters: str | Sequence[str] = "all",
        sync: bool = False,
        eta: float = 0.0,
    ) -> None:
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
        self.sync = bool(sync)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        adaptive = [self.adapts(name) for name in ascent.names] if self.adaptive == "weights" else self.adaptive
        return sam_displacement(
            ascent.parameters, ascent.gradients, ascent.radii(self.rho), adaptive=adaptive, eta=self.eta
        )

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
        return self.rho / norm if norm else 0.0

    def __repr__(self) -> str:
        changed = [f"rho={self.rho:g}"]
        changed += [f"adaptive={self.adaptive!r}"] if self.adaptive else []
        changed += [f"interval={self.interval}"] if self.interval != 1 else []
        changed += [f"parameters={self.parameters!r}"] if self.parameters != "all" else []
        changed += ["sync=True"] if self.sync else []
        changed += [f"eta={self.eta:g}"] if self.eta else []
        return f"SAM({', '.join(changed)})"


class AverageSAM(Perturbation):
    """The gradient at theta + rho * xi / ||xi|| with random xi ~ N(0, I): eq. 8 of the IRE paper.

    The training loss that Lightning sees and logs is then the one at the moved weights. All devices draw the same xi,
    and it stays the same over an accumulation window. List IRE before callbacks that look at weights in `on_exception`:
    after an error between a forward pass and its backward pass IRE puts the weights back there.

    Parameter groups of the optimizer may have radii of their own under the key "sam_rho".

    Args:
        rho: Radius >= 0 in weight units, over all parameters together.

    Raises:
        ConfigurationError: If `rho` is out of range.

    Cost: no extra pass (an estimate of :class:`~lightning_ire.SampledFisher` then needs a forward pass of its own);
    two copies of the weights inside the step.
    """

    uses_gradient: ClassVar[bool] = False

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = check_number("rho", rho)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        radii = ascent.radii(self.rho)
        return average_sam_displacement(ascent.parameters, radii, generators=ascent.generators), None

    def __repr__(self) -> str:
        return f"AverageSAM(rho={self.rho:g})"


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
    ) -> None:
        self.epsilon = check_number("epsilon", epsilon)
        self.zeta = check_number("zeta", zeta, low_open=True)
        self.ascents = check_whole("ascents", ascents, low=1)
        self.scope: Any = check_choice("scope", scope, ("tensor", "global"))
        self.sync = bool(sync)

    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return ascent_in_ball(
            ascent.parameters,
            ascent.gradients,
            ascent.moves,
            step=self.zeta,
            radius=self.epsilon,
            scope=self.scope,
        )

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: min(zeta, epsilon / ||g||), for one ascent in one ball."""
        if self.ascents > 1 or self.scope == "tensor":
            return None
        return min(self.zeta, self.epsilon / norm) if norm else self.zeta

    def __repr__(self) -> str:
        changed = [f"epsilon={self.epsilon:g}", f"zeta={self.zeta:g}"]
        changed += [f"ascents={self.ascents}"] if self.ascents != 1 else []
        changed += [f"scope={self.scope!r}"] if self.scope != "tensor" else []
        changed += ["sync=True"] if self.sync else []
        return f"AdversarialModelPerturbation({', '.join(changed)})"


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
