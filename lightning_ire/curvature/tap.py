"""Seeing the `cross_entropy` calls of a training step and drawing labels for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ire.functional import SampledLoss, sampled_cross_entropy

__all__ = ["CrossEntropyCall", "CrossEntropyTap"]


@dataclass(eq=False)
class CrossEntropyCall:
    """One call that was seen.

    Attributes:
        result: What the caller got.
        sampled: The loss against drawn labels, and the weights of its predictions.
        elementwise: Whether the call had reduction "none".
    """

    result: Tensor
    sampled: SampledLoss
    elementwise: bool


class CrossEntropyTap(TorchFunctionMode):
    """Sees every `cross_entropy` call inside the block, however it was imported, and draws labels for it.

    Args:
        generator: Source of the labels.
        replace: False: the calls return what they always return. True: their loss against the drawn labels.
    """

    def __init__(self, generator: torch.Generator, replace: bool) -> None:
        super().__init__()
        self.generator = generator
        self.replace = replace
        self.calls: list[CrossEntropyCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        call = _SIGNATURE.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not (given["input"].requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        reduction = _reduction(given)
        sampled = sampled_cross_entropy(
            given["input"],
            given["target"],
            weight=given["weight"],
            ignore_index=given["ignore_index"],
            reduction=reduction,
            generator=self.generator,
        )
        result = sampled.loss if self.replace else func(*args, **kwargs)
        self.calls.append(CrossEntropyCall(result, sampled, elementwise=reduction == "none"))
        return result


_SIGNATURE = inspect.signature(F.cross_entropy)


def _reduction(given: Mapping[str, Any]) -> Any:
    """Torch's deprecated pair of flags still wins over `reduction`."""
    if given["size_average"] is None and given["reduce"] is None:
        return given["reduction"]
    if given["reduce"] is False:
        return "none"
    return "sum" if given["size_average"] is False else "mean"
