"""Seeing the losses that a training step calls, and drawing targets for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_ire.functional import SAMPLED, SampledLoss

__all__ = ["LossCall", "LossTap", "factors_in", "weighted"]


@dataclass(eq=False)
class LossCall:
    """One call that was seen.

    Attributes:
        edge: Where its result is in the graph (the tensor itself may be changed in place afterwards).
        draw: Makes its losses against targets drawn from a generator.
        sampled: The draw that was made during the call, if the tap has a generator.
    """

    edge: GradientEdge
    draw: Callable[[torch.Generator | None], SampledLoss]
    sampled: SampledLoss | None

    def made(self, loss: Any) -> bool:
        """Whether a loss is what this call returned, unchanged."""
        return isinstance(loss, Tensor) and loss.grad_fn is self.edge.node


class LossTap(TorchFunctionMode):
    """Sees every call of torch's `cross_entropy`, `nll_loss`, ... inside the block, however it was imported.

    The calls return what they always return.

    Args:
        generator: Source of the targets; ``None``: none are drawn during the calls.

    Attributes:
        calls: Calls whose result has a graph.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator
        self.calls: list[LossCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _KNOWN:  # first, and of a tuple: torch.compile traces this line for every operation
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        draw = _draws(func, args, kwargs or {}) if result.requires_grad else None
        if draw is not None:
            sampled = draw(self.generator) if self.generator is not None else None
            self.calls.append(LossCall(get_gradient_edge(result), draw, sampled))
        return result


def factors_in(loss: Tensor, calls: Sequence[LossCall]) -> list[tuple[LossCall, Tensor]]:
    """The calls that a loss depends on, each with the factor d loss / d result; the graph stays alive.

    Args:
        loss: A scalar made from the calls' results.
        calls: Calls whose results have a graph.
    """
    if len(calls) == 1 and calls[0].made(loss):
        return [(calls[0], torch.ones_like(loss))]
    edges = [call.edge for call in calls]
    factors = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) if edges else ()
    return [(call, factor) for call, factor in zip(calls, factors, strict=True) if factor is not None]


def weighted(sampled: SampledLoss, factor: Tensor) -> SampledLoss:
    """A term of a loss: its predictions weigh |factor| times as much in the whole as in the term.

    Args:
        sampled: The term against drawn targets.
        factor: d loss / d term, a scalar or (reduction "none") one number per prediction.
    """
    return SampledLoss(sampled.losses, sampled.weights * factor.detach().to(sampled.weights.dtype).abs())


def _draws(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[torch.Generator | None], SampledLoss] | None:
    """The counterpart of a call; ``None`` if it is only the targets that have a graph (soft labels)."""
    call = _signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if not given["input"].requires_grad and func is not F.mse_loss:
        return None
    settings = {
        name: given[name] for name in ("weight", "pos_weight", "ignore_index", "label_smoothing") if name in given
    }
    draw = functools.partial(SAMPLED[func], given["input"], given["target"], **settings, reduction=_reduction(given))
    return lambda generator: draw(generator=generator)


_KNOWN = tuple(SAMPLED)
_signature = functools.cache(inspect.signature)


def _reduction(given: Mapping[str, Any]) -> Any:
    """Torch's deprecated pair of flags still wins over `reduction`."""
    if given["size_average"] is None and given["reduce"] is None:
        return given["reduction"]
    if given["reduce"] is False:
        return "none"
    return "sum" if given["size_average"] is False else "mean"
