"""The second moment that the base optimizer keeps anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature.base import Curvature, Estimate, Window, finite_or_none
from lightning_ire.functional import quotients

__all__ = ["SecondMoment"]

_NAMES = ("exp_avg_sq", "square_avg", "sum")  # Adam and its family, RMSprop and Adadelta, Adagrad


class SecondMoment(Curvature):
    """h = v / (1 - beta2^t): the moving average of squared gradients in the state of Adam, AdamW, RMSprop, Adagrad, ...

    Free, and smooth over many batches. But it is the square of the training gradient as the optimizer got it (true
    labels, clipped, at SAM's perturbed weights), an empirical Fisher; and Adam divides by its root already, so that IRE
    lengthens the very steps that Adam made long (Kingma & Ba 2015, arXiv 1412.6980, alg. 1: v).

    Coordinates whose optimizer has not made a step yet get no mask: at the first step of a run there is none at all.

    Raises:
        ConfigurationError: In training, if the optimizer keeps no second moment.

    Cost: no pass, nothing stored; one tensor of the parameters' size inside the step.
    """

    reruns: ClassVar[bool] = False

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _ReadMoment(window)


class _ReadMoment(Estimate):
    def __init__(self, window: Window) -> None:
        self.window = window

    def finish(self) -> list[Tensor | None] | None:
        if self.window.step == 0:  # nothing has been averaged yet
            return None
        optimizer = self.window.optimizer
        owners: list[int] = []
        found: list[Tensor] = []
        decays: list[float | None] = []
        steps: list[Any] = []
        missing = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                moment = next((state[name] for name in _NAMES if isinstance(state.get(name), Tensor)), None)
                if moment is None or moment.shape != parameter.shape:
                    missing += bool(state)
                    continue
                owners.append(id(parameter))
                found.append(moment.detach())
                decays.append(_decay(state, group))
                steps.append(state.get("step", group.get("step", 0)) or 0)
        if missing or not found:
            raise _no_second_moment(optimizer, missing)
        # without the bias towards 0 that the first steps have
        corrections = [
            1.0 if decay is None or not step else 1 - decay**step
            for decay, step in zip(decays, _numbers(steps), strict=True)
        ]
        moments = dict(zip(owners, quotients(found, corrections), strict=True))
        parameters = self.window.parameters
        return finite_or_none([moments.get(id(parameter)) for parameter in parameters], parameters)


def _numbers(values: Sequence[Any]) -> list[float]:
    """Numbers and scalar tensors as numbers, with one look at the device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    read = iter(
        torch.stack([tensor.detach().to(tensors[0].device, torch.float32) for tensor in tensors]).tolist()
        if tensors
        else []
    )
    return [float(next(read) if isinstance(value, Tensor) else value) for value in values]


def _decay(state: Mapping[str, Any], group: Mapping[str, Any]) -> float | None:
    """Weight of the past in the moving average; ``None`` for a sum."""
    if "exp_avg_sq" in state:
        return float(group["betas"][1]) if "betas" in group else None
    name = next((name for name in ("alpha", "rho") if name in group), None)  # RMSprop, Adadelta
    return float(group[name]) if name is not None and "square_avg" in state else None


def _no_second_moment(optimizer: Optimizer, missing: int) -> ConfigurationError:
    name = type(optimizer).__name__
    what = f"{name}, which keeps none" + (f" for {missing} of its parameters" if missing else "")
    return ConfigurationError(
        "Expected an optimizer that keeps a second moment of every gradient (Adam, AdamW, RMSprop, Adagrad, ...) for "
        f"SecondMoment, got {what}: set `curvature` to SampledFisher()."
    )
