"""All parameters as one vector: the form that estimators of a whole Hessian work with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from lightning_ire.functional._shards import Shards, part_of_whole

__all__ = [
    "Coordinates",
    "as_real",
    "coarsest",
    "flatten",
    "flatten_like",
    "in_double",
    "rademacher",
    "split_like",
    "widest_dtype",
]

_WITHOUT_FLOAT64 = ("mps",)  # types of devices
_DRAWN_TOGETHER = 1 << 24  # elements


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


def coarsest(dtypes: Collection[torch.dtype]) -> torch.dtype | None:
    """The floating-point type whose numbers next to 1 are furthest from it; ``None``: there is none.

    Args:
        dtypes: Floating-point or complex types.

    Example:
        >>> coarsest([torch.float32, torch.bfloat16])
        torch.bfloat16
    """
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


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


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of independent signs, +1 or -1, on the generator's device.

    Args:
        size: Length.
        generator: Source.
        dtype: Type of the vector.
    """
    bits = torch.empty(size, dtype=torch.int8, device=generator.device).random_(0, 2, generator=generator)
    return bits.to(dtype).mul_(2).sub_(1)


class Coordinates:
    """All elements of some parameters as the coordinates of vectors, of which each rank may hold a part.

    Where no parameter is a DTensor a vector has all elements, in order, and everything here is the operation of torch
    with its name. Else a vector has those of this rank's parts; inner products are summed over all ranks, each element
    once, so that all get the same numbers to the bit, and random vectors are drawn whole and cut. All ranks have to
    call the same methods in the same order then.

    Args:
        parameters: Tensors, at least one.

    Attributes:
        parts: Their memory as real numbers: complex ones as pairs, of DTensors this rank's parts.
        sharded: Whether there is a DTensor.
        size: Number of elements of all.

    Cost: where there is a DTensor, one all-reduce of a few numbers for each inner product or norm.

    Example:
        >>> coordinates = Coordinates([torch.zeros(2), torch.zeros(1)])
        >>> vector = coordinates.flatten([torch.tensor([3.0, 4.0]), None])
        >>> coordinates.size, float(coordinates.norm(vector))
        (3, 5.0)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._shards = Shards([parameter.detach() for parameter in parameters])
        self._wholes = parameters
        self.sharded = self._shards.sharded
        self.parts: list[Tensor] = [as_real(part) for part in self._shards.parts]
        self.size = sum(map(_numbers, parameters))
        self._counted: Tensor | None = None  # which elements this rank counts; all, if ``None``
        if not all(self._shards.owned):
            flags = [torch.full_like(part, own, dtype=torch.bool).reshape(-1) for part, own in self._with_owners()]
            self._counted = torch.cat(flags)

    @classmethod
    def of_size(cls, size: int, generator: torch.Generator, dtype: torch.dtype) -> Coordinates:
        """Those of plain vectors.

        Args:
            size: Their length.
            generator: Gives their device.
            dtype: Their type.
        """
        return cls([torch.empty(1, dtype=dtype, device=generator.device).expand(size)])

    @property
    def length(self) -> int:
        """Number of elements of a vector on this rank."""
        return sum(part.numel() for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Type of vectors."""
        return widest_dtype(self.parts)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A vector of the parts, see :func:`flatten_like`.

        Args:
            tensors: One tensor of the shape of its part for each parameter; ``None``: zeros.
        """
        return flatten_like(tensors, self.parts)

    def split(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector, see :func:`split_like`.

        Args:
            vector: A vector.
        """
        return split_like(vector, self.parts)

    def dot(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products.

        Args:
            rows: A vector, or several as the rows of a matrix.
            vector: A vector of the same type.
        """
        if not self.sharded:
            return rows @ vector
        return self._shards.sum(in_double(rows @ self._own(vector))).to(rows)

    def norm(self, vector: Tensor) -> Tensor:
        """L2 norm, a scalar.

        Args:
            vector: A vector.
        """
        if not self.sharded:
            return vector.norm()
        return self._shards.sum(in_double(self._own(vector).norm()).square()).sqrt().to(vector)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over whole tensors from those over their parts.

        Args:
            values: One number for each tensor, summed over its part.
        """
        if not self.sharded:
            return values
        owned = torch.tensor(self._shards.owned, device=values.device)
        return self._shards.sum(torch.where(owned, values, 0))

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the ranks' numbers.

        Args:
            value: What is the largest on this rank, of one shape and type on all.
        """
        return self._shards.largest(value)

    def range(self, vector: Tensor) -> tuple[float, float]:
        """The smallest and the largest element of all; NaN if one is.

        Args:
            vector: A vector.
        """
        lowest = torch.full((), -torch.inf, dtype=vector.dtype, device=vector.device)
        ends = torch.stack([-vector.amin(), vector.amax()]) if vector.numel() else torch.stack([lowest, lowest])
        least, most = self._shards.largest(in_double(ends)).tolist()
        return -least, most

    def signs(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A vector of random signs, see :func:`rademacher`.

        Args:
            generator: Source; in the same state on all ranks.
            dtype: Type of the vector.
        """
        return self._drawn(lambda size: rademacher(size, generator, dtype))

    def normal(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A vector of independent standard normal numbers.

        Args:
            generator: Source; in the same state on all ranks.
            dtype: Type of the vector.
        """
        device = generator.device
        return self._drawn(lambda size: torch.randn(size, generator=generator, dtype=dtype, device=device))

    def _with_owners(self) -> Iterator[tuple[Tensor, bool]]:
        return zip(self.parts, self._shards.owned, strict=True)

    def _own(self, vector: Tensor) -> Tensor:
        """Zero where another rank counts the element."""
        return vector if self._counted is None else torch.where(self._counted, vector, 0)

    def _drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """A random vector; a few parameters of a sharded model at a time, those of a small one all at once."""
        if not self.sharded:
            return draw(self.size)
        pieces = []
        for some in self._together():
            wholes = draw(sum(map(_numbers, some))).split(list(map(_numbers, some)))
            for parameter, whole in zip(some, wholes, strict=True):
                shaped = whole.view(parameter.shape) if not parameter.is_complex() else _as_complex(whole, parameter)
                pieces.append(as_real(part_of_whole(shaped, parameter)).reshape(-1))
        return torch.cat(pieces)

    def _together(self) -> Iterator[list[Tensor]]:
        some: list[Tensor] = []
        for parameter in self._wholes:
            if some and sum(map(_numbers, some)) + _numbers(parameter) > _DRAWN_TOGETHER:
                yield some
                some = []
            some.append(parameter)
        yield some


def _numbers(tensor: Tensor) -> int:
    """How many real numbers a tensor is."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _as_complex(vector: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(vector.view(*like.shape, 2))
