"""Seeing the `cross_entropy` calls of a training step and drawing labels for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ire.functional import SampledLoss, sampled_cross_entropy

__all__ = ["CrossEntropyCall", "CrossEntropyTap", "factors_in"]


@dataclass(eq=False)
class CrossEntropyCall:
    """One call that was seen.

    Attributes:
        result: What the caller got.
        draw: Makes the same loss against labels from a generator, and the weights of its predictions.
        sampled: The draw that was made during the call, if the tap has a generator.
        elementwise: Whether the call had reduction "none".
    """

    result: Tensor
    draw: Callable[[torch.Generator], SampledLoss]
    sampled: SampledLoss | None
    elementwise: bool


class CrossEntropyTap(TorchFunctionMode):
    """Sees every `cross_entropy` call inside the block, however it was imported, and draws labels for it.

    Args:
        generator: Source of the labels; ``None``: none are drawn during the calls.
        replace: False: the calls return what they always return. True: their loss against the drawn labels.
    """

    def __init__(self, generator: torch.Generator | None, replace: bool = False) -> None:
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
        draw = functools.partial(
            sampled_cross_entropy,
            given["input"],
            given["target"],
            weight=given["weight"],
            ignore_index=given["ignore_index"],
            reduction=reduction,
        )
        sampled = draw(generator=self.generator) if self.generator is not None else None
        result = sampled.loss if self.replace and sampled is not None else func(*args, **kwargs)
        self.calls.append(
            CrossEntropyCall(result, lambda source: draw(generator=source), sampled, elementwise=reduction == "none")
        )
        return result


def factors_in(loss: Tensor, calls: Sequence[CrossEntropyCall]) -> list[tuple[CrossEntropyCall, Tensor]]:
    """The calls that a loss depends on, each with the factor d loss / d result; the graph stays alive.

    Args:
        loss: A scalar made from the calls' results.
        calls: Calls whose results have a graph.
    """
    if len(calls) == 1 and calls[0].result is loss:
        return [(calls[0], torch.ones_like(loss))]
    results = [call.result for call in calls]
    factors = torch.autograd.grad(loss, results, retain_graph=True, allow_unused=True) if results else ()
    return [(call, factor) for call, factor in zip(calls, factors, strict=True) if factor is not None]


_SIGNATURE = inspect.signature(F.cross_entropy)


def _reduction(given: Mapping[str, Any]) -> Any:
    """Torch's deprecated pair of flags still wins over `reduction`."""
    if given["size_average"] is None and given["reduce"] is None:
        return given["reduction"]
    if given["reduce"] is False:
        return "none"
    return "sum" if given["size_average"] is False else "mean"
