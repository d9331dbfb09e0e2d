"""When IRE is on and how strong it is: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_ire._checks import ConfigurationError, check_number, check_whole

__all__ = ["Start", "checked_steps", "in_steps", "mask_due", "scheduled_kappa"]


@dataclass(frozen=True)
class Start:
    """The moment something switches on: at most one of the three; none: the first step.

    Attributes:
        step: Zero-based optimizer step, or a fraction of the run strictly between 0 and 1.
        epoch: Zero-based epoch.
        loss: Epoch-mean training loss at or below which the next epoch starts with it.
        name: What the arguments begin with ("stop": the moment something switches off).
    """

    step: int | float | None = None
    epoch: int | None = None
    loss: float | None = None
    name: str = "start"

    def __post_init__(self) -> None:
        if len(self._given) > 1:
            names = " and ".join(f"`{self.name}_{unit}`" for unit in self._given)
            raise ConfigurationError(f"Expected at most one of the {self.name}_* arguments, got {names}.")
        if self.step is not None:
            object.__setattr__(self, "step", checked_steps(f"{self.name}_step", self.step, low=0))
        if self.epoch is not None:
            check_whole(f"{self.name}_epoch", self.epoch, low=0)
        if self.loss is not None:
            check_number(f"{self.name}_loss", self.loss, low=-math.inf)

    @property
    def _given(self) -> list[str]:
        return [unit for unit in ("step", "epoch", "loss") if getattr(self, unit) is not None]

    @property
    def immediate(self) -> bool:
        """Whether nothing was set: on from the first step."""
        return not self._given

    @property
    def at_once(self) -> bool:
        """Whether it is on from the first step, as asked for or because nothing was set."""
        return self.immediate or 0 in (self.step, self.epoch)

    @property
    def setting(self) -> str:
        """What was set, as `start_epoch=60`."""
        return ", ".join(f"{self.name}_{unit}={getattr(self, unit)!r}" for unit in self._given)

    @property
    def key(self) -> str:
        """The argument that was set, as `start_epoch`."""
        return "".join(f"{self.name}_{unit}" for unit in self._given)

    @property
    def is_fraction(self) -> bool:
        """Whether IRE starts after a fraction of the run."""
        return isinstance(self.step, float)

    def first_step(self, length: int | None) -> int | None:
        """The moment at which IRE starts, as far as it is known beforehand.

        Args:
            length: Optimizer steps in the whole run, or batches where those are counted; ``None``: unknown.

        Returns:
            The zero-based step (or batch, for a fraction), or ``None`` for a start by epoch or loss.

        Raises:
            ConfigurationError: For a fraction of a run whose length is unknown.
        """
        if self.immediate:
            return 0
        return None if self.step is None else in_steps(f"{self.name}_step", self.step, length)

    def reached(self, step: int, epoch: int, first_step: int | None) -> bool:
        """Whether IRE is to be on at this step (a start by loss is decided at the end of an epoch instead).

        Args:
            step: Zero-based optimizer step, or batch, as :meth:`first_step`.
            epoch: Zero-based epoch.
            first_step: What :meth:`first_step` said.
        """
        if self.epoch is not None:
            return epoch >= self.epoch
        return first_step is not None and step >= first_step

    def never(self, total_steps: int | None, max_epochs: int | None, first_step: int | None) -> bool:
        """Whether the run is certain to end before the start.

        Args:
            total_steps: Optimizer steps in the run; ``None``: unknown.
            max_epochs: Epochs in the run; ``None`` or -1: no limit.
            first_step: What :meth:`first_step` said.
        """
        if self.epoch is not None:
            return max_epochs is not None and 0 <= max_epochs <= self.epoch
        return first_step is not None and total_steps is not None and first_step >= max(total_steps, 1)

    def __str__(self) -> str:
        if self.epoch is not None:
            return f"epoch {self.epoch}"
        if self.loss is not None:
            return f"the epoch after the mean training loss is <= {self.loss:g}"
        return f"step {self.step or 0}" if not isinstance(self.step, float) else f"{100 * self.step:g}% of the run"


def checked_steps(name: str, value: int | float, low: int) -> int | float:
    """Return `value` if it is a number of steps, or a fraction of the run.

    Args:
        name: The argument's name, as the user typed it.
        value: What came.
        low: Smallest number of steps allowed.

    Returns:
        An int, or a float strictly between 0 and 1.

    Raises:
        ConfigurationError: If it is neither.
    """
    if isinstance(value, float) and value.is_integer():
        # what a command line makes of "3000" where `float | int` was imported before `int | float`: typing's cache
        # takes the two for the same
        value = int(value)
    if not isinstance(value, float):
        return check_whole(name, value, low=low)
    if not 0 < value < 1:
        raise ConfigurationError(
            f"Expected `{name}` to be a whole number of steps >= {low} or a fraction of the run strictly between 0 and "
            f"1, got {value!r}."
        )
    return value


def in_steps(name: str, value: int | float, length: int | None) -> int:
    """A number of steps, or a fraction of the run in steps (or in batches, where those are counted).

    Args:
        name: The argument's name, as the user typed it.
        value: What :func:`checked_steps` returned.
        length: Of the whole run; ``None``: unknown.

    Raises:
        ConfigurationError: For a fraction of a run whose length is unknown.
    """
    if not isinstance(value, float):
        return value
    if length is None:
        raise ConfigurationError(
            f"Expected a run of known length for `{name}={value}` (a fraction of it), got one without end, or with a "
            "loader that has no length or is reloaded, or in manual optimization with `max_steps` (`ramp_steps`: in "
            f"any): give `{name}` in steps, or let `trainer.max_steps` alone end the run (`trainer.max_epochs` -1)."
        )
    return int(value * length)


def mask_due(step: int, start: int, interval: int) -> bool:
    """Alg. 1 of the IRE paper: the mask is made where (t - T_w) mod K = 0, before the update.

    Args:
        step: Zero-based optimizer step t.
        start: Step T_w at which IRE switched on.
        interval: K.

    Example:
        >>> [step for step in range(3, 30) if mask_due(step, start=3, interval=10)]
        [3, 13, 23]
    """
    return (step - start) % interval == 0


def scheduled_kappa(kappa: float, now: float, full: float) -> float:
    """Kappa where it follows something that grows or shrinks: kappa * now / full.

    The "lr" schedule is this with a group's learning rate now and its highest so far, "ramp" with the count of boosted
    steps (this one included) and that of the steps on which kappa grows.

    Args:
        kappa: The strength at `full`.
        now: What it follows.
        full: The highest of that; 0: there has been none.

    Example:
        >>> scheduled_kappa(2.0, 0.05, 0.1)
        1.0
    """
    return kappa * now / full if full > 0 else 0.0
