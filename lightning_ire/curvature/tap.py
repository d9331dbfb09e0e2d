"""Seeing the losses that a training step calls, and drawing targets for them."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from lightning_ire.functional import SAMPLED, SampledLoss, label_log_probabilities, sampled_kl_div, sampled_log_prob

__all__ = ["LossCall", "LossTap", "factors_in", "known_losses"]


@dataclass(eq=False)
class LossCall:
    """One call that was seen.

    Attributes:
        edge: Where its result is in the graph (the tensor itself may be changed in place afterwards).
        draw: Makes its losses against targets drawn from the generator that it is called with by name.
        sign: Sign of the factor that the result must have in a loss, a number, for it to be a likelihood: -1 for
            log-probabilities. ``None``: any factor counts with its size.
        sampled: The draw that was made during the call, if the tap has a generator.
        dim: Of a `log_softmax`, of which a loss may be made by hand: the dimension of the classes.
        source: The `log_softmax` that the call was given.
        labels: Makes log p_c of all labels c, shape [..., C], where targets are labels: `draw` takes `labels="all"`
            then, and its losses have the shape [...], with a dimension of size 1 where `dim` is.
    """

    edge: GradientEdge
    draw: Callable[..., SampledLoss]
    sign: int | None = None
    sampled: SampledLoss | None = None
    dim: int | None = None
    source: LossCall | None = None
    labels: Callable[[], Tensor] | None = None

    def made(self, loss: Any) -> bool:
        """Whether a loss is what this call returned, unchanged."""
        return isinstance(loss, Tensor) and self.sign != -1 and loss.grad_fn is self.edge.node


class LossTap(TorchFunctionMode):
    """Sees every call of a loss of `SAMPLED` in the block, however it was imported, of `log_softmax` and `log_prob`.

    The latter are methods of `torch.distributions.Distribution`. The calls return what they always return; those of
    other threads are not seen.

    Args:
        generator: Source of the targets; ``None``: none are drawn during the calls.

    Attributes:
        calls: Calls whose result has a graph.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator
        self.calls: list[LossCall] = []
        self._log_softmax: dict[int, tuple[Tensor, LossCall]] = {}
        self._in_log_prob = False  # and what that is made of is not for itself

    def __enter__(self) -> LossTap:
        self._token = _watch_distributions(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._log_softmax.clear()
        _leave_distributions(self._token)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _KNOWN:  # first, and of a tuple: torch.compile traces this line for every operation
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if result.requires_grad and not self._in_log_prob:
            if func in SAMPLED:
                self._add_loss(func, result, args, kwargs or {})
            else:
                self._add_log_softmax(result, (kwargs or {}).get("dim", args[1] if len(args) > 1 else None))
        return result

    def log_prob(self, distribution: Distribution, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a distribution's `log_prob`."""
        if self._in_log_prob:
            return original(*args, **kwargs)
        self._in_log_prob = True
        try:
            result = original(*args, **kwargs)
            values = [*args, *kwargs.values()]
            given = len(values) == 1 and not (isinstance(values[0], Tensor) and values[0].requires_grad)
            if given and isinstance(result, Tensor) and result.requires_grad:
                draw = functools.partial(sampled_log_prob, distribution, result.detach())
                self._add(LossCall(get_gradient_edge(result), draw, -1))
        finally:
            self._in_log_prob = False
        return result

    def _add_loss(
        self, func: Callable[..., Any], result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        call = _signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not _is_prediction(func, given):
            return
        settings = {name: given[name] for name in _signature(SAMPLED[func]).parameters if name in given}
        settings["reduction"] = _reduction(given)
        _, source = self._log_softmax.get(id(given["input"]), (None, None))
        if source is not None and func is F.kl_div:
            settings["dim"] = source.dim
        draw = functools.partial(SAMPLED[func], given["input"], **settings)
        sign = None if func in _ANY_FACTOR else 1
        labels = functools.partial(_labels_of, func, given, settings.get("dim")) if func in _OF_LABELS else None
        self._add(LossCall(get_gradient_edge(result), draw, sign, source=source, labels=labels))

    def _add(self, call: LossCall) -> None:
        if self.generator is not None:
            try:
                call.sampled = call.draw(generator=self.generator)
            except (NotImplementedError, ValueError):  # no probabilities, or nothing that can be drawn from
                if call.sign is None:
                    raise
                return
            except RuntimeError as error:  # inside the step's own `torch.func.vmap`, whose samples are not seen here
                if "vmap" not in str(error):
                    raise
                return
        self.calls.append(call)

    def _add_log_softmax(self, result: Tensor, dim: int | None) -> None:
        if dim is None:  # deprecated by torch
            return
        one = torch.ones((), dtype=result.dtype, device=result.device)
        draw = functools.partial(sampled_kl_div, result, one, reduction="none", dim=dim)
        call = LossCall(get_gradient_edge(result), draw, -1, dim=dim, labels=lambda: result.movedim(dim, -1))
        self._log_softmax[id(result)] = (result, call)
        self.calls.append(call)


def known_losses() -> str:
    """The losses that are seen, in words."""
    names = ", ".join(f"`{loss.__name__}`" for loss in SAMPLED)
    return f"{names}, a distribution's `log_prob` or, by hand, a weighted sum of `log_softmax`"


def factors_in(loss: Tensor, tap: LossTap) -> list[tuple[LossCall, Tensor]]:
    """The calls that a loss depends on, each with the factor d loss / d result; the graph stays alive.

    Of those with a `sign` only the ones whose factor makes them a likelihood; the others are terms like any other.

    Args:
        loss: A scalar made from the calls' results.
        tap: The tap that saw them.
    """
    known = [call for call in tap.calls if call.dim is None]
    by_hand = [call for call in tap.calls if call.dim is not None]
    if len(known) == 1 and known[0].made(loss):
        return [(known[0], torch.ones_like(loss))]
    used = _factors(loss, known)
    more = _made_by_hand(loss, by_hand, {call.edge.node for call, _ in used})
    for call, _ in more:
        if tap.generator is not None:
            call.sampled = call.draw(generator=tap.generator)
    return used + more


def _factors(loss: Tensor, calls: Sequence[LossCall]) -> list[tuple[LossCall, Tensor]]:
    edges = [call.edge for call in calls]
    graph = any(call.sign is not None for call in calls)
    factors = (
        torch.autograd.grad(loss, edges, retain_graph=True, create_graph=graph, allow_unused=True) if edges else ()
    )
    return [
        (call, factor.detach())
        for call, factor in zip(calls, factors, strict=True)
        if factor is not None and (call.sign is None or _is_weight(loss, call, factor))
    ]


def _is_weight(loss: Tensor, call: LossCall, factor: Tensor) -> bool:
    """Whether a factor is of the right sign and does not depend on any parameter that the call's result depends on."""
    if bool((factor * (call.sign or 1) < 0).any()):
        return False
    if not factor.requires_grad:
        return True
    depends_on = _leaves(_behind([get_gradient_edge(factor).node]))
    others = _leaves(_behind([get_gradient_edge(loss).node])) - _leaves(_behind([call.edge.node]))
    return bool(depends_on) and depends_on <= others


def _made_by_hand(loss: Tensor, calls: Sequence[LossCall], known: Collection[Node]) -> list[tuple[LossCall, Tensor]]:
    """The `log_softmax` calls that a loss is a weighted sum of, sum_c weight_c * log p_c: cross entropies by hand.

    All or none: what the loss is made of besides the terms in `known` may have only weights in common with them.
    """
    if not calls or loss.grad_fn is None:
        return []
    ends = {call.edge.node for call in calls}
    above = _behind([loss.grad_fn], {*ends, *known})
    reached = {node for parent in above for node, _ in parent.next_functions if node in ends}
    below = _behind(reached)
    shared = {node for node in above & below if not _is_leaf(node)}
    hidden = any(isinstance(node, BackwardCFunction) for node in above)  # its derivative may not say what it is of
    if shared or hidden or reached & _behind(known):
        return []
    used = _factors(loss, [call for call in calls if call.edge.node in reached])
    return used if len(used) == len(reached) else []


def _behind(start: Iterable[Node], stop: Collection[Node] = ()) -> set[Node]:
    """What a graph computes some nodes from, these included, up to others, these left out."""
    found: set[Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found and node not in stop:
            found.add(node)
            todo += [before for before, _ in node.next_functions if before is not None]
    return found


def _leaves(nodes: Iterable[Node]) -> set[Node]:
    return {node for node in nodes if _is_leaf(node)}


def _is_leaf(node: Node) -> bool:
    return node.name().endswith("AccumulateGrad")


_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
_KNOWN = (*SAMPLED, *_LOG_SOFTMAX)
_OF_LABELS = (
    F.cross_entropy, F.nll_loss, F.kl_div, F.binary_cross_entropy_with_logits, F.binary_cross_entropy
)  # fmt: skip
_DIFFERENCES = (F.mse_loss, F.gaussian_nll_loss)
_ANY_FACTOR = (
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.binary_cross_entropy, F.mse_loss
)  # fmt: skip
_signature = functools.cache(inspect.signature)


def _labels_of(func: Callable[..., Any], given: Mapping[str, Any], dim: int | None) -> Tensor:
    """Log-probabilities of all labels; those of `kl_div` broadcast with the target, as its losses do."""
    prediction = given["input"]
    if func is F.kl_div:
        prediction = torch.broadcast_tensors(prediction, given["target"].detach())[0]
    return label_log_probabilities(func, prediction, dim)


def _is_prediction(func: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Whether what has a graph is what the loss takes for a prediction, not only the targets (soft labels)."""
    graph = {name for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    if func in _DIFFERENCES:
        return bool(graph & {"input", "target", "var"})
    return "input" in graph and (func in _ANY_FACTOR or "target" not in graph)


def _reduction(given: Mapping[str, Any]) -> Any:
    """Torch's deprecated pair of flags still wins over `reduction`."""
    size_average, reduce = given.get("size_average"), given.get("reduce")
    if size_average is None and reduce is None:
        return given["reduction"]
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


_tap: ContextVar[LossTap | None] = ContextVar("_tap", default=None)
_taps = 0
_lock = threading.Lock()


def _attribute(distribution: Distribution, name: str) -> Any:
    """`Distribution.__getattribute__` while there is a tap: no other place is common to all distributions."""
    value = object.__getattribute__(distribution, name)
    tap = _tap.get() if name == "log_prob" else None
    return value if tap is None else functools.partial(tap.log_prob, distribution, value)


def _watch_distributions(tap: LossTap) -> Token[LossTap | None]:
    global _taps
    with _lock:
        _taps += 1
        Distribution.__getattribute__ = _attribute  # type: ignore[method-assign, assignment]
    return _tap.set(tap)


def _leave_distributions(token: Token[LossTap | None]) -> None:
    global _taps
    _tap.reset(token)
    with _lock:
        _taps -= 1
        if not _taps:
            del Distribution.__getattribute__
