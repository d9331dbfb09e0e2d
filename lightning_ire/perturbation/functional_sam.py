"""Functional SAM: the gradient of the outputs, and not of the loss, is taken at the moved weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ire._checks import ConfigurationError
from lightning_ire.functional import SAMPLED
from lightning_ire.perturbation.sam import SAM

__all__ = ["FunctionalSAM"]


class FunctionalSAM(SAM):
    """SAM that leaves the loss's gradient with respect to the outputs as it was: J(theta + eps)^T dL/dF(theta).

    The outputs F are what a loss of `torch.nn.functional` is called with (its `input`). SAM's gradient at the moved
    weights is J(theta + eps)^T dL/dF(theta + eps); the second factor, the outputs' own part of the sharpness, dominates
    in language models and does harm there. Singh et al. 2025, "Avoiding spurious sharpness minimization broadens
    applicability of SAM" (ICML, arXiv 2502.02407).

    Args:
        rho: Radius >= 0 in weight units.
        **sam: Further arguments of :class:`SAM` and :class:`Perturbation`; `fraction` is 1.

    Raises:
        ConfigurationError: If an argument is out of range; in the second pass, if the step's loss is not made with one
            of the functions that are known (those of :data:`lightning_ire.functional.SAMPLED`), or not with the same
            ones in both passes.

    Cost: as SAM, and the outputs of the window's first passes until the second ones.
    """

    def __init__(self, rho: float = 0.05, **sam: Any) -> None:
        super().__init__(rho, **sam)
        if self.fraction != 1:
            raise ConfigurationError(
                f"Expected FunctionalSAM to see the same outputs in both passes, got fraction={self.fraction:g}: leave "
                "`fraction` out."
            )

    def watch(self, notes: dict[str, Any], again: bool) -> AbstractContextManager[Any]:
        """See the base class."""
        outputs = notes.setdefault("outputs", [])
        return _SameOutputGradient(outputs) if again else _Outputs(outputs)

    def effective_radius(self, norm: float) -> float | None:
        """See the base class: the second pass is not the gradient at the moved weights."""
        return None


class _Outputs(TorchFunctionMode):
    """Keeps what the losses of the first pass are called with."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs

    def __enter__(self) -> _Outputs:
        self.outputs.clear()
        return super().__enter__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LOSSES and (output := _prediction(args, kwargs or {})) is not None:
            self.outputs.append(output.detach().clone())
        return result


class _SameOutputGradient(TorchFunctionMode):
    """Lets the losses of the second pass have the values they have, and the output gradients of the first pass."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs
        self.seen = 0

    def __exit__(self, kind: Any, *others: Any) -> None:
        super().__exit__(kind, *others)
        if kind is None and (self.seen == 0 or self.seen != len(self.outputs)):
            names = ", ".join(f"`{loss.__name__}`" for loss in _LOSSES)
            raise ConfigurationError(
                f"Expected a loss made with one of {names} in both passes of FunctionalSAM, the same number of times, "
                f"got {len(self.outputs)} calls in the first and {self.seen} in the second: compute the loss with one "
                "of them, or set `perturbation` to SAM."
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _LOSSES or (output := _prediction(args, kwargs)) is None:
            return result
        self.seen += 1
        if self.seen > len(self.outputs) or self.outputs[self.seen - 1].shape != output.shape:
            return result  # an error at the end of the block
        with torch.enable_grad():
            before = self.outputs[self.seen - 1].requires_grad_()
            value = func(before, *args[1:], **kwargs) if args else func(**{**kwargs, "input": before})
            (gradient,) = torch.autograd.grad(value.sum(), before)
        products = (output - output.detach()) * gradient
        if result.dim() == 0:
            return result.detach() + products.sum()
        if products.shape != result.shape:  # one loss for all classes
            products = products.sum(dim=1 if output.dim() > 1 else 0)
        return result.detach() + products


def _prediction(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    output = args[0] if args else kwargs.get("input")
    return output if isinstance(output, Tensor) and output.requires_grad else None


_LOSSES = tuple(SAMPLED)
