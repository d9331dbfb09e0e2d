"""Where a step's gradient is taken: SAM and its relatives. A new one is one subclass of `Perturbation`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.functional import average_sam_displacement, sam_displacement

__all__ = ["SAM", "AverageSAM", "Perturbation"]


class Perturbation(ABC):
    """Moves the weights for the gradient of a step; the step itself starts from the unmoved weights.

    A perturbation is not a callback: give it to `IRE(perturbation=...)`, with `kappa=0` for the perturbation alone.

    Attributes:
        uses_gradient: True: :meth:`displacement` gets the gradient at the unmoved weights, so a step costs a second
            forward and backward pass. False: the weights are moved before the only pass.
        interval: The weights are moved at every `interval`-th optimizer step; the other steps are plain ones.
        sync: Whether that gradient is averaged over devices first (else each device moves by its own).
    """

    uses_gradient: ClassVar[bool] = True
    interval: int = 1
    sync: bool = False

    @abstractmethod
    def displacement(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Say by how much each weight moves.

        Args:
            parameters: The weights that :meth:`selects` chose.
            gradients: Their gradients at the unmoved weights, possibly all scaled by one factor (fp16); ``None``
                where there is none. All ``None`` if the class does not use them.
            generators: One random generator per parameter, on its device, the same on every rank and in every
                micro-batch of the accumulation window.

        Returns:
            One displacement per parameter (``None``: not moved), and the gradient norm to be logged, if any.
        """

    def selects(self, module: nn.Module) -> set[str] | None:
        """Names of the parameters that may move; ``None`` for all.

        Args:
            module: The module being trained.

        Returns:
            Names as in `module.named_parameters()`.
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
    rho * T^2 g / ||T g||, T = \|theta\|, of Kwon et al. 2021 (ASAM, arXiv 2102.11600).

    Args:
        rho: Radius >= 0 in weight units. 0 runs the second pass all the same (for parity tests).
        adaptive: Whether the radius adapts to the size of each weight (useful radii are then about ten times larger).
        interval: SAM at every `interval`-th optimizer step, plain steps between.
        parameters: Move "all" weights, or only those of normalization layers ("norm": SAM-ON, Mueller et al. 2024).
            The norm of the gradient is taken over the same weights.
        sync: With several devices, whether the ascent gradient is averaged over them. Default: each device perturbs
            with its own (m-sharpness), which also saves one synchronization.

    Raises:
        ConfigurationError: If an argument is out of range.

    Cost: one more forward and backward pass at each perturbed step, and one copy of the weights inside the step.
    """

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        parameters: Literal["all", "norm"] = "all",
        sync: bool = False,
    ) -> None:
        self.rho = check_number("rho", rho)
        self.adaptive = bool(adaptive)
        self.interval = check_whole("interval", interval, low=1)
        self.parameters = check_choice("parameters", parameters, ("all", "norm"))
        self.sync = bool(sync)

    def displacement(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return sam_displacement(parameters, gradients, self.rho, adaptive=self.adaptive)

    def selects(self, module: nn.Module) -> set[str] | None:
        """See the base class. A normalization layer has "norm" in the name of its class, and no layers inside."""
        if self.parameters == "all":
            return None
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

    def __repr__(self) -> str:
        changed = [f"rho={self.rho:g}"]
        changed += ["adaptive=True"] if self.adaptive else []
        changed += [f"interval={self.interval}"] if self.interval != 1 else []
        changed += [f"parameters={self.parameters!r}"] if self.parameters != "all" else []
        changed += ["sync=True"] if self.sync else []
        return f"SAM({', '.join(changed)})"


class AverageSAM(Perturbation):
    """The gradient at theta + rho * xi / ||xi|| with random xi ~ N(0, I): eq. 8 of the IRE paper.

    The training loss that Lightning sees and logs is then the one at the moved weights. All devices draw the same xi,
    and it stays the same over an accumulation window. List IRE before callbacks that look at weights in `on_exception`:
    after an error between a forward pass and its backward pass IRE puts the weights back there.

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

    def displacement(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """See the base class."""
        return average_sam_displacement(parameters, self.rho, generators=generators), None

    def __repr__(self) -> str:
        return f"AverageSAM(rho={self.rho:g})"
