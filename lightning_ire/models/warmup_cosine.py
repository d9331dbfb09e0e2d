"""A learning-rate schedule that knows the length of the run."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_ire._checks import ConfigurationError, check_number, check_whole

__all__ = ["WarmupCosineLR"]


class WarmupCosineLR(LRScheduler):
    """Linear warm-up, then half a cosine down to a share of the highest rate, where it stays.

    With the highest rate lr (the optimizer's own, of each parameter group), W = `warmup`, T = `total`,
    r = `final_lr_ratio` and t = 0, 1, ... the number of steps of the schedule so far, the rate is

    - `lr (t + 1) / (W + 1)` for t < W,
    - `lr (r + (1 - r) (1 + cos(pi (t - W) / (T - W))) / 2)` from t = W to T (Loshchilov and Hutter, SGDR, arXiv
      1608.03983, eq. 5, one cycle), and `r lr` after that.

    W and T count what moves the schedule on: epochs or optimizer steps (`lr_interval`). The first t with a rate of
    `r lr` is T, one past the last step of a run of length T.

    Without `total` the length of the run is meant: a module of this package gives it to `set_total` when training
    starts. Until then the rates of a warm-up of known length can be had, and no others.

    A checkpoint holds only t: a resumed run follows the schedule of its own config, from the next step on as if it had
    done so from the start, with another `total`, `warmup` or highest rate too.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = WarmupCosineLR(optimizer, warmup=1, total=3)
        >>> for _ in range(4):
        ...     print(round(schedule.get_last_lr()[0], 3))
        ...     optimizer.step()
        ...     schedule.step()
        0.5
        1.0
        0.5
        0.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | float = 0,
        total: int | None = None,
        final_lr_ratio: float = 0.0,
    ) -> None:
        """Set the rate of t = 0.

        Args:
            optimizer: Its rates are the highest ones.
            warmup: Length of the warm-up, less than `total`: a whole number, or a fraction of `total` in (0, 1), which
                is rounded (to `total` - 1 at most).
            total: Length of the schedule, warm-up included; none: the length of the run.
            final_lr_ratio: Share of the highest rate at the end, in [0, 1].

        Raises:
            ConfigurationError: If a value is out of range.
        """
        self.warmup = _checked_warmup(warmup)
        self.final_lr_ratio = check_number("final_lr_ratio", final_lr_ratio, high=1.0)
        self.total = None if total is None else self._checked_total(total)
        super().__init__(optimizer)

    def set_total(self, total: int) -> None:
        """Set the length of the schedule and, with it, the optimizer's current rates.

        Args:
            total: As in the constructor.

        Raises:
            ConfigurationError: If it is no whole number >= 1, or not greater than `warmup`.
        """
        self.total = self._checked_total(total)
        self._write_rates()

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group at the current t.

        Raises:
            ConfigurationError: If it depends on `total` and that is not known yet.
        """
        if self.last_epoch == 0 and self.total is None and isinstance(self.warmup, float):
            return [group["lr"] for group in self.optimizer.param_groups]  # to be set by set_total before it is used
        factor = self._factor(self.last_epoch)
        return [factor * lr for lr in self.base_lrs]

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the optimizer's current rates."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return t: all else comes from the config."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's t, on this schedule, and set the optimizer's current rates.

        Args:
            state_dict: What `state_dict` returned; of another schedule's, t alone is taken.
        """
        self.last_epoch = state_dict["last_epoch"]
        self._write_rates()

    def _factor(self, t: int) -> float:
        """Return the rate at t as a share of the highest."""
        if self.total is None and (isinstance(self.warmup, float) or t > self.warmup):
            raise ConfigurationError(
                "Expected `total`, the length of the learning-rate schedule, to be a whole number, got None: set it, "
                "or give the schedule as `model.lr_scheduler`, where the length of the run is filled in."
            )
        warmup = self._warmup_length(self.total)
        if self.total is None or t < warmup:
            return (t + 1) / (warmup + 1)
        done = min((t - warmup) / (self.total - warmup), 1.0)
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * done)) / 2

    def _warmup_length(self, total: int | None) -> int:
        if isinstance(self.warmup, int):
            return self.warmup
        assert total is not None
        return min(round(self.warmup * total), total - 1)

    def _checked_total(self, total: Any) -> int:
        check_whole("total", total, low=1)
        if self._warmup_length(total) >= total:
            raise ConfigurationError(
                f"Expected `warmup` to be less than the length of the learning-rate schedule ({total}), got "
                f"{self.warmup!r}."
            )
        return total

    def _write_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _checked_warmup(warmup: Any) -> int | float:
    if isinstance(warmup, float) and 0 < warmup < 1:
        return warmup
    if isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0:
        return warmup
    raise ConfigurationError(
        f"Expected `warmup` to be a whole number >= 0 or a fraction in (0, 1) of `total`, got {warmup!r}."
    )
