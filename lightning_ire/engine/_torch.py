"""The only file with private names of torch: why each is needed, and what serves where a release lacks it.

tests/test_lightning_contract.py fails when a release changes any of this.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ire.functional import local

__all__ = [
    "change_marks",
    "differentiable_once",
    "extra_pass",
    "gathered_dtypes",
    "gradient_marks",
    "graph_number",
    "in_extra_pass",
    "own_parameters",
    "registered",
    "run_first",
    "uncounted_changes",
]

_extra_pass = contextvars.ContextVar("lightning_ire_extra_pass", default=False)
_KEY = "lightning_ire_extra_pass"


@contextmanager
def extra_pass() -> Iterator[None]:
    """Inside the block :func:`in_extra_pass` is true, in this thread and context alone.

    Private: on a GPU hooks of layers run in threads of autograd's own, to which torch hands nothing over from the
    thread that called `backward` but these objects. One that stays behind can block the end of its thread.
    """
    token = _extra_pass.set(True)
    before = _handed_over()
    hand_over(threading.get_ident())
    try:
        yield
    finally:
        _extra_pass.reset(token)
        if before is None and hasattr(torch._C, "_remove_obj_from_tls"):  # torch 2.15
            torch._C._remove_obj_from_tls(_KEY)
        else:
            hand_over(before)


def in_extra_pass() -> bool:
    """Whether `training_step`, or a hook of a layer, is being run in a pass that Lightning knows nothing of.

    That is the second pass of SAM, one of a curvature estimate's own or its backward pass through the training graph,
    or one of the monitor's. It is asked for the current thread and context: other Trainers do not matter. The README
    says what such passes put back by themselves; for the rest (a file that the step writes to, an object that holds
    one) a module asks here first.

    Example:
        >>> in_extra_pass()
        False
    """
    return _extra_pass.get() or _handed_over() not in (None, threading.get_ident())


def _takes_a_reference() -> bool:
    """Whether torch counts its own reference to what is stashed (2.11 does not, and frees what is still in use)."""
    probe = object()
    before = sys.getrefcount(probe)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    torch._C._stash_obj_in_tls(_KEY, probe)
    return sys.getrefcount(probe) == before + 2


_TAKES_A_REFERENCE = _takes_a_reference()


def hand_over(value: int | None) -> None:
    """Let autograd's threads that work for this one find a value.

    Args:
        value: The value.
    """
    if not _TAKES_A_REFERENCE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(_KEY, value)


hand_over(None)


def _handed_over() -> int | None:
    """The thread whose extra pass autograd is working for, also that thread itself."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


@contextmanager
def uncounted_changes(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block changes of the tensors in place are not counted: graphs that saved them still go backward.

    Private: torch has no public way to put contents back without counting it as a change.

    Args:
        tensors: The tensors.
    """
    with torch.autograd._unsafe_preserve_version_counter(tuple(tensors)):
        yield


def change_marks(tensors: Iterable[Tensor]) -> list[int]:
    """Marks that differ as soon as somebody changes a tensor in place, or gives it other data.

    Private: torch has no public counter of in-place changes. What is written through `tensor.data` is not counted.

    Args:
        tensors: The tensors.
    """
    # one number for both: pairs would keep Python's garbage collector busy
    return [_version(tensor) << 64 | local(tensor).data_ptr() for tensor in tensors]


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; torch counts changes of a DTensor and of its local part apart."""
    if tensor.is_inference():
        return 0
    part = local(tensor)
    return tensor._version if part is tensor else tensor._version + part._version


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module itself, not of those below it.

    Private: `module.parameters(recurse=False)` takes many times as long, and extra passes ask every layer.

    Args:
        module: Any module.
    """
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def registered(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """What is registered under which name in a module itself: its parameters, buffers, children and hooks.

    Private: what is registered as ``None`` is public nowhere, and hooks have no list.

    Args:
        module: Any module.
    """
    names: tuple[dict[Any, Any], ...] = (module._parameters, module._buffers, module._modules)
    return *names, module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def gathered_dtypes(module: nn.Module) -> set[torch.dtype]:
    """The types that FSDP2 gathers weights in to compute with them, as far as its policies name any.

    Private: the policy that `fully_shard` is given is public nowhere afterwards.

    Args:
        module: Any module.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = [] if fsdp is None else [one for one in module.modules() if isinstance(one, fsdp.FSDPModule)]
    policies = [getattr(one._get_fsdp_state(), "_mp_policy", None) for one in sharded]
    dtypes = [getattr(policy, "param_dtype", None) for policy in policies]
    return {dtype for dtype in dtypes if dtype is not None}


def gradient_marks(parameters: Sequence[nn.Parameter]) -> list[tuple[Tensor | None, int]]:
    """Marks that differ as soon as somebody replaces a gradient or changes it in place.

    Private: torch has no public counter of in-place changes.

    Args:
        parameters: The parameters.
    """
    return [(p.grad, -1 if p.grad is None else _version(p.grad)) for p in parameters]


def graph_number(tensor: Tensor | None = None) -> int:
    """When a tensor was computed; without one: now. Comparable within one thread.

    Private: torch has no public order of the nodes of its graphs.

    Args:
        tensor: A tensor with a graph.
    """
    if tensor is None or tensor.grad_fn is None:
        with torch.enable_grad():
            tensor = torch.zeros((), requires_grad=True).clone()
    return tensor.grad_fn._sequence_nr()  # type: ignore[union-attr]


def differentiable_once(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the graph behind some gradients ends at a function that is marked `once_differentiable`.

    `torch.autograd.grad` of them raises nothing then: it leaves that function out and is wrong. Only `backward` raises.

    Private: torch tells of such an end by nothing but the name of its node.

    Args:
        tensors: Gradients made with `create_graph=True`.
    """
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return False


def run_first(hook: RemovableHandle) -> RemovableHandle:
    """Let a hook run before all others of its kind.

    Private: `Optimizer.register_step_post_hook` has no `prepend`, and what a user's own hooks keep (a norm, a sign) has
    to hold after IRE's boost.

    Args:
        hook: What registering it returned.

    Returns:
        The same.
    """
    hooks = hook.hooks_dict_ref()
    if hooks is not None:
        hooks.move_to_end(hook.id, last=False)
    return hook
