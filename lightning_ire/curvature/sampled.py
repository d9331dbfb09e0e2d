"""The Fisher information from labels drawn from the model (eq. 6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_number
from lightning_ire.curvature.base import Curvature, Estimate, MicroBatch, Window, finite_or_none
from lightning_ire.curvature.tap import CrossEntropyCall, CrossEntropyTap, factors_in
from lightning_ire.functional import fisher_diagonal, gradients_by_backward

__all__ = ["SampledFisher"]


class SampledFisher(Curvature):
    """h = B * G * G, G the gradient of the cross entropy against labels drawn from the model's own softmax.

    Eq. 6 of the IRE paper (arXiv 2405.20763), "GNB" in Sophia (Liu et al., arXiv 2305.14342): unbiased for the
    diagonal of the Fisher information, which for softmax cross entropy is that of the Gauss-Newton matrix. Class
    weights, reduction and ignored positions are those of the training loss; label smoothing and soft targets are left
    out. B = 1 / sum(w_i^2) over all micro-batches and devices for predictions weighted w_i in the loss.

    How the gradient is had, first of these that applies:

    - The module has a method ``fisher_loss(batch, batch_idx)``: it returns the mean loss against sampled labels, or a
      pair of that and its B. It runs in a pass of its own, with torch's random numbers seeded for this estimate.
    - `training_step` returns what one call of `cross_entropy` returned: the logits of that forward pass are used
      again, so that an estimate costs one more backward pass and no forward pass.
    - Otherwise (several terms, an own reduction): the step runs once more with the targets of all its
      `cross_entropy` calls replaced by draws. Only these terms count, each with the factor it has in the loss.

    Args:
        fraction: Part of each micro-batch used, in (0, 1]: the first `ceil(fraction * n)` of its n samples. Below 1
            the estimate needs a forward pass of its own, on that part.

    Raises:
        ConfigurationError: If `fraction` is out of range; during training, if there is no `cross_entropy` to be seen.

    Cost per estimate: one backward pass (shared forward) or one forward and backward pass; one gradient-sized buffer.
    """

    def __init__(self, fraction: float = 1.0) -> None:
        self.fraction = check_number("fraction", fraction, high=1.0, low_open=True)

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _SampledSquare(window, self.fraction)

    def __repr__(self) -> str:
        return "SampledFisher()" if self.fraction == 1 else f"SampledFisher(fraction={self.fraction:g})"


class _SampledSquare(Estimate):
    """Adds up G and sum(w_i^2) over the window's micro-batches; a common factor of all losses cancels in B * G * G."""

    def __init__(self, window: Window, fraction: float) -> None:
        self.window = window
        self.fraction = fraction
        self.fisher_loss = getattr(window.module, "fisher_loss", None)
        self.gradients: list[Tensor | None] = [None] * len(window.parameters)
        self.squares = torch.zeros((), dtype=torch.float64)  # sum of w_i^2
        self.tap: CrossEntropyTap | None = None
        self.done: set[MicroBatch] = set()
        self.label_states: dict[MicroBatch, Tensor] = {}
        self.by_backward = False  # reentrant checkpointing refuses autograd.grad

    def watch(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        self.tap = None
        if self.fisher_loss is not None or self.fraction < 1 or not self.window.unmoved:
            return nullcontext()
        self.label_states[micro_batch] = self.window.labels.get_state()
        self.tap = CrossEntropyTap(self.window.labels, replace=False)
        return self.tap

    def before_backward(self, micro_batch: MicroBatch, loss: Tensor) -> None:
        calls = self.tap.calls if self.tap is not None else []
        call = next((call for call in calls if call.result is loss and not call.elementwise), None)
        if call is None:
            return
        calls.remove(call)
        assert call.sampled is not None
        try:
            self._add([call.sampled.loss], [None], [call.sampled.weights], keep_graph=True)
        except RuntimeError as error:  # reentrant checkpointing, a compiled backward that gave its buffers away
            self.by_backward = _refused_by_checkpointing(error)
            warnings.warn(
                "SampledFisher cannot share the training forward pass and runs one of its own at each estimate: "
                + str(error).split("\n")[0],
                stacklevel=2,
            )
        else:
            self.done.add(micro_batch)

    def forget(self) -> None:
        """See the base class. Calls that were seen stay: their loss may be back-propagated after zero_grad."""
        self.gradients = [None] * len(self.window.parameters)
        self.squares.zero_()
        self.done.clear()

    def finish(self) -> list[Tensor | None] | None:
        self.tap = None
        for micro_batch in self.window.micro_batches:
            if micro_batch.backward_done and micro_batch not in self.done:
                self._own_pass(micro_batch)
        gradients = self.window.average(self.gradients)
        squares = float(self.window.total(self.squares)) / self.window.world_size**2
        if squares == 0:  # no prediction counted anywhere: all positions ignored, or nothing back-propagated
            return None
        return finite_or_none(fisher_diagonal(gradients, 1.0 / squares))

    def _own_pass(self, micro_batch: MicroBatch) -> None:
        """A forward and backward pass with the labels that a shared pass would have drawn."""
        labels = self.window.labels
        state = self.label_states.get(micro_batch, labels.get_state())
        for _ in range(2):
            labels.set_state(state)
            try:
                return self._forward_and_backward(micro_batch)
            except RuntimeError as error:
                if self.by_backward or not _refused_by_checkpointing(error):
                    raise
                self.by_backward = True

    def _forward_and_backward(self, micro_batch: MicroBatch) -> None:
        args = micro_batch.args
        if self.fraction < 1 and args:
            args = (_first_part(args[0], self.fraction), *args[1:])
        if self.fisher_loss is not None:
            self._users_loss(micro_batch, args)
            return
        tap = CrossEntropyTap(self.window.labels, replace=True)
        with self.window.rerun(micro_batch, tap, *args) as loss:
            self._sampled_terms(loss, [call for call in tap.calls if call.result.requires_grad])

    def _sampled_terms(self, loss: Tensor | None, calls: list[CrossEntropyCall]) -> None:
        """Add the gradient of all terms with drawn labels, each times its factor in the loss."""
        used = factors_in(loss, calls) if loss is not None else []
        if not used:
            raise _nothing_intercepted(self.window.module)
        weights = [
            call.sampled.weights * factor.to(call.sampled.weights.dtype)
            for call, factor in used
            if call.sampled is not None
        ]
        self._add([call.result for call, _ in used], [factor for _, factor in used], weights, keep_graph=False)

    def _users_loss(self, micro_batch: MicroBatch, args: tuple[Any, ...]) -> None:
        seeded = _Seeded(int(torch.randint(2**62, (), generator=self.window.labels)))
        with self.window.rerun(micro_batch, seeded, *args, step=self.fisher_loss) as returned:
            loss, count = returned if isinstance(returned, tuple) else (returned, 1.0)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ConfigurationError(
                    "Expected `fisher_loss` to return a scalar loss with a graph, or a pair of it and the number of "
                    f"predictions, got {type(returned).__name__}."
                )
            # equal weights 1/B over B predictions: the sum of their squares is 1/B
            weight = torch.as_tensor(count, dtype=torch.float64).rsqrt().reshape(1)
            self._add([loss], [None], [weight], keep_graph=False)

    def _add(
        self,
        outputs: list[Tensor],
        factors: Sequence[Tensor | None],
        weights: list[Tensor],
        keep_graph: bool,
    ) -> None:
        scale = self.window.scale * self.window.share  # as in training, where fp16 must neither under- nor overflow
        starts = [(torch.ones_like(out) if f is None else f) * scale for out, f in zip(outputs, factors, strict=True)]
        indices = [index for index, parameter in enumerate(self.window.parameters) if parameter.requires_grad]
        parameters = [self.window.parameters[index] for index in indices]
        if not parameters:  # all frozen for the time of this backward pass (`toggle_model` of another optimizer)
            return
        if self.by_backward:
            gradients: Sequence[Tensor | None] = gradients_by_backward(outputs, starts, parameters)
        else:
            gradients = torch.autograd.grad(outputs, parameters, starts, retain_graph=keep_graph, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            return
        for index, gradient in zip(indices, gradients, strict=True):
            if gradient is None:
                continue
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gradient = gradient.detach().to_dense().to(wide) / scale
            before = self.gradients[index]
            self.gradients[index] = gradient if before is None else before.add_(gradient)
        for weight in weights:
            self.squares += weight.detach().double().square().sum().cpu()


class _Seeded(AbstractContextManager[None]):
    """Seeds torch's global stream; the caller puts all streams back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        torch.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        return None


def _refused_by_checkpointing(error: RuntimeError) -> bool:
    return "checkpoint" in str(error).lower()


def _first_part(batch: Any, fraction: float) -> Any:
    """The first part of every tensor in nested tuples, lists and dicts that has the batch's leading size."""
    sizes: list[int] = []
    _each_tensor(batch, lambda tensor: sizes.append(tensor.size(0)) if tensor.dim() else None)
    if not sizes:
        return batch
    size = sizes[0]
    keep = math.ceil(fraction * size)
    return _each_tensor(batch, lambda tensor: tensor[:keep] if tensor.dim() and tensor.size(0) == size else tensor)


def _each_tensor(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return type(batch)({key: _each_tensor(value, function) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each_tensor(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_each_tensor(value, function) for value in batch)
    return batch


def _nothing_intercepted(module: nn.Module) -> ConfigurationError:
    name = type(module).__name__
    return ConfigurationError(
        f"Expected `{name}.training_step` to return a loss made with `cross_entropy`, for SampledFisher to draw labels "
        f"for it, got none: give {name} a method `fisher_loss(batch, batch_idx)` that returns its loss against labels "
        "sampled from its own predictions, or set `curvature` to EmpiricalFisher()."
    )
