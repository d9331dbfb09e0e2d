"""The settings of IRE and SAM, checked, and the two decisions about timing that follow from them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_ire._checks import (
    ConfigurationError,
    check_choice,
    check_number,
    check_numbers,
    check_switch,
    check_whole,
)
from lightning_ire.curvature import Curvature, SampledFisher
from lightning_ire.perturbation import Perturbation
from lightning_ire.schedule import Start, checked_steps, in_steps, mask_due

__all__ = ["AUTO", "GROUP_KAPPA", "Recipe", "shown"]

AUTO: Literal["auto"] = "auto"
"""The kappa that is a share of the largest stable one, as it was measured last."""

GROUP_KAPPA = "ire_kappa"
"""Key in a parameter group of the optimizer: kappa of its parameters, in place of the recipe's."""


class Recipe:
    """What IRE and SAM are to do; the engine reads it anew at each step.

    The arguments, each kept under its own name (the three `start_*` as one `start`), are those of
    :class:`~lightning_ire.IRE`, which is a recipe itself; a subclass of it may override the two `should_*` methods.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> recipe = Recipe(kappa=2.0, gamma=0.8, interval=10, start_step=3)
        >>> [step for step in range(3, 30) if recipe.should_refresh(step, started_at=3)]
        [3, 13, 23]
    """

    def __init__(
        self,
        kappa: float | Mapping[str, float] | Literal["auto"] = 1.0,
        gamma: float | Mapping[str, float] = 0.9,
        interval: int = 10,
        start_step: int | float | None = None,
        start_epoch: int | None = None,
        start_loss: float | None = None,
        curvature: Curvature | None = None,
        perturbation: Perturbation | None = None,
        scope: Literal["global", "tensor"] = "global",
        exclude: str | Sequence[str] | None = None,
        scale_weight_decay: bool | Literal["only"] = True,
        exclude_zero_curvature: bool = False,
        kappa_schedule: Literal["constant", "lr", "ramp"] = "constant",
        beta: float = 0.0,
        ramp_steps: int | float | None = None,
        mask: Literal["hard", "soft"] = "hard",
        kappa_safety: float = 0.5,
    ) -> None:
        self.kappa = AUTO if kappa == AUTO else check_numbers("kappa", kappa)
        self.kappa_safety = check_number("kappa_safety", kappa_safety, high=1.0, low_open=True)
        self.gamma = check_numbers("gamma", gamma, high=1.0, low_open=True)
        self.interval = check_whole("interval", interval, low=1)
        self.start = Start(start_step, start_epoch, start_loss)
        self.curvature = _instance("curvature", curvature, Curvature, "SampledFisher()") or SampledFisher()
        self.perturbation = _instance("perturbation", perturbation, Perturbation, "SAM(rho=0.05)")
        self.scope = check_choice("scope", scope, ("global", "tensor"))
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or ())
        self.scale_weight_decay = check_switch("scale_weight_decay", scale_weight_decay, "only")
        self.exclude_zero_curvature = bool(exclude_zero_curvature)
        self.kappa_schedule = check_choice("kappa_schedule", kappa_schedule, ("constant", "lr", "ramp"))
        self.beta = check_number("beta", beta, high=1.0, high_open=True)
        self.ramp_steps = ramp_steps if ramp_steps is None else checked_steps("ramp_steps", ramp_steps, low=1)
        self.mask = check_choice("mask", mask, ("hard", "soft"))
        if (ramp_steps is None) == (self.kappa_schedule == "ramp"):
            raise ConfigurationError(
                f"Expected `ramp_steps` with `kappa_schedule='ramp'` and only there, got {ramp_steps!r} with "
                f"{self.kappa_schedule!r}: "
                + ("set `ramp_steps`." if ramp_steps is None else "set `kappa_schedule` to 'ramp' or leave it out.")
            )

    def __repr__(self) -> str:
        """The call that makes the same, with the arguments that differ from their defaults."""
        changed = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            owner = self.start if name.startswith("start_") else self
            value = getattr(owner, name.removeprefix("start_"), parameter.default)
            default = {"curvature": "SampledFisher()", "exclude": "[]"}.get(name, repr(parameter.default))
            if name != "self" and repr(value) != default:
                changed.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def boosts(self) -> bool:
        """Whether there is a boost at all, and so masks and estimates."""
        if isinstance(self.kappa, Mapping):
            return max(self.kappa.values()) > 0
        return self.kappa == AUTO or self.kappa > 0

    def check_start(self) -> None:
        """Refuse a start of the boost where there is a perturbation alone.

        Raises:
            ConfigurationError: With what to write in its place, in one line.
        """
        if self.boosts or self.start.at_once or self.perturbation is None:
            return
        late: Any = copy.copy(self.perturbation)
        remedy = f"leave `{self.start.key}` out"
        if self.start.loss is not None:
            remedy += " (a perturbation starts by step or epoch)"
        elif late.start.immediate:
            late.start = self.start
            remedy += f", and write {late!r} for a perturbation that starts then"
        raise ConfigurationError(
            f"Expected `kappa` > 0 for `{self.start.setting}`, which says when the boost starts, got 0: {remedy}."
        )

    def ramp_length(self, length: int | None) -> int:
        """On how many boosted steps kappa grows; 1: it does not.

        Args:
            length: Optimizer steps in the whole run; ``None``: unknown.

        Raises:
            ConfigurationError: For a fraction of a run whose length is unknown.
        """
        return 1 if self.ramp_steps is None else max(1, in_steps("ramp_steps", self.ramp_steps, length))

    def should_refresh(self, step: int, started_at: int) -> bool:
        """Whether the mask is to be made at this step: the place to change the timing.

        Args:
            step: Zero-based count of the optimizer's real steps.
            started_at: Step at which its boost was switched on.
        """
        return mask_due(step, started_at, self.interval)

    def should_perturb(self, step: int) -> bool:
        """Whether the gradient of this step is taken at moved weights.

        Args:
            step: Zero-based count of real optimizer steps.
        """
        return self.perturbation is not None and self.perturbation.second_pass(step)


def shown(value: float | Mapping[str, float] | str) -> str:
    """A number, numbers by pattern, or a word, in a line of text.

    Args:
        value: Kappa or gamma.

    Example:
        >>> shown(0.9), shown({"*embed*": 9.0, "*": 4.0})
        ('0.9', '9 for *embed*, 4 for *')
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        return f"{value:g}"
    return ", ".join(f"{number:g} for {pattern}" for pattern, number in value.items())


def _instance(name: str, value: Any, kind: type, example: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"Expected `{name}` to be a {kind.__name__} such as {example}, got {value!r}.")
    return value
