"""Apple's MPS device without a Mac: tensors that say `mps`, hold a tensor of the CPU, and refuse float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

MPS = torch.device("mps", 0)
_make_generator = torch.Generator


class OnMPS(Tensor):
    """A tensor of the device `mps`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnMPS":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64: the MPS framework doesn't support float64.")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=MPS, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """What asks for a guard of the device, which a torch that is built without it does not have."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READING:
                with _disable_current_modes():
                    return func(args[0].inner)
            if func is Tensor.__getitem__:
                return _item(*args)
            if func is Tensor.__setitem__:
                return torch.ops.aten.copy_.default(_item(*args[:2]), args[2])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_READING = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__repr__)


def _item(tensor: Tensor, index: Any) -> Tensor:
    if isinstance(index, (Tensor, list)):
        places = torch.as_tensor(index)
        return torch.ops.aten.index.Tensor(tensor, [places])
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, int):
            tensor = tensor.select(dim, one)
            continue
        elif one is not Ellipsis:
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, *one.indices(tensor.size(dim)))
        dim += 1
    return tensor


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Work with the tensors inside; what comes out is where torch would have put it."""
    outer: dict[int, OnMPS] = {}

    def inside(value: Any) -> Any:
        if isinstance(value, OnMPS):
            outer[id(value.inner)] = value
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_mps:
            return value
        return outer[id(value)] if id(value) in outer else OnMPS(value)

    with _disable_current_modes():
        result = func(*tree_map(inside, tuple(args)), **tree_map(inside, kwargs))
        device = kwargs.get("device")
        on_mps = bool(outer) if device is None else device.type == "mps"
        return tree_map(outside, result)


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that says it is on the device."""

    device = MPS  # type: ignore[assignment]


@contextmanager
def like_mps(monkeypatch: Any) -> Iterator[None]:
    """Inside the block there is a device `mps:0`."""
    kinds = {"mps": Generator, "cpu": _make_generator}
    with monkeypatch.context() as patch, FakeTensorMode(), _Factories():  # in fake mode torch does not start the device
        patch.setattr(torch, "Generator", lambda device="cpu": kinds[torch.device(device).type]())
        yield
