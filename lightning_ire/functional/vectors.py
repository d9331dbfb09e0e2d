"""All parameters as one vector: the form that estimators of a whole Hessian work with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_real", "flatten", "flatten_like", "in_double", "split_like", "widest_dtype"]

_WITHOUT_FLOAT64 = ("mps",)  # types of devices


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, in a last dimension of 2; any other as it is.

    Args:
        tensor: Any tensor.

    Returns:
        A view, with its graph.

    Example:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def in_double(number: Tensor | float | Sequence[float]) -> Tensor:
    """In float64; on the CPU if it is on a device that has no such type (Apple's MPS), else where it is.

    Args:
        number: A tensor; or a number or numbers, for a tensor on the CPU.

    Returns:
        A float64 tensor of the same shape.

    Example:
        >>> in_double(torch.tensor([0.5]))
        tensor([0.5000], dtype=torch.float64)
    """
    if not isinstance(number, Tensor):
        return torch.tensor(number, dtype=torch.float64, device="cpu")
    return (number.cpu() if number.device.type in _WITHOUT_FLOAT64 else number).double()


def widest_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if one of the tensors is, else float32 (half types are too coarse for sums over a whole model).

    Args:
        tensors: Tensors of floating-point types.
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all elements, in order, on the first tensor's device and of :func:`widest_dtype`.

    Args:
        tensors: Dense or sparse tensors, at least one.
    """
    return flatten_like(tensors, tensors)


def flatten_like(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """As :func:`flatten`, with zeros where a tensor is ``None``.

    Args:
        tensors: One tensor or ``None`` for each of `like`, of its shape.
        like: Tensors that give shapes, device and dtype; at least one.

    Returns:
        A detached vector of as many elements as `like` has.

    Example:
        >>> flatten_like([None, torch.ones(2)], [torch.zeros(1), torch.zeros(2)])
        tensor([0., 1., 1.])
    """
    device, dtype = like[0].device, widest_dtype(like)
    return torch.cat(
        [
            torch.zeros(shape.numel(), device=device, dtype=dtype)
            if tensor is None
            else tensor.detach().to_dense().to(device, dtype).reshape(-1)
            for tensor, shape in zip(tensors, like, strict=True)
        ]
    )


def split_like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a vector with the shapes, dtypes and devices of `like`.

    Args:
        vector: As many elements as all of `like` together.
        like: The tensors.

    Example:
        >>> split_like(torch.tensor([1.0, 2.0, 3.0]), [torch.zeros(1), torch.zeros(2, 1)])[1]
        tensor([[2.],
                [3.]])
    """
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape).to(tensor) for piece, tensor in zip(pieces, like, strict=True)]
