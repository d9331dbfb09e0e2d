"""What a pass of `training_step` may change in a module: buffers, weights that it moves itself, Python attributes."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_ire.engine._torch import change_marks, own_parameters, registered, uncounted_changes
from lightning_ire.functional import BufferState, in_double, is_sharded, local
from lightning_ire.functional.state import overwrite_, rewound

__all__ = [
    "AttributeState",
    "ModuleState",
    "MovingWeights",
    "few_of",
    "in_slots",
    "is_metric",
    "modules_of",
    "weights_of",
]

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype)
_CONTAINERS = (list, dict, set, deque)
_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, ...: not the user's attributes
_DEPTH = 3  # containers and objects in each other: a dictionary of lists of metrics
_WALKED = 10_000  # entries of a container that are looked into
_COPIED = 100_000  # entries of a container whose references are copied
_ELEMENTS = 1 << 24  # of a tensor or array that is no buffer
_HOLDERS = {"argparse", "collections", "types"}  # parts of the standard library whose objects only hold others
_LIBRARIES = {"lightning", "lightning_fabric", "lightning_ire", "numpy", "pytorch_lightning", *sys.stdlib_module_names}
_NOTHING: dict[Any, Any] = {}
_LOOKS = 3  # training passes that are looked at more closely


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module, all below it, and those in lists and dictionaries in their attributes (metrics, teachers), each once.

    Args:
        module: Any module.
    """
    found = dict.fromkeys(module.modules())
    todo = list(found)
    while todo:
        hidden = [one for value in _attributes(todo.pop()).values() for one in _modules_in(value, _DEPTH)]
        new = [one for root in hidden for one in root.modules() if one not in found]
        found |= dict.fromkeys(new)
        todo += new
    return list(found)


def weights_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that belong to the modules themselves, not to those below them, each once.

    Args:
        modules: Modules.
    """
    return list({id(p): p for module in modules for p in own_parameters(module) if not is_lazy(p)}.values())


def few_of(chosen: Collection[Tensor], parameters: Iterable[Tensor]) -> bool:
    """Whether some weights are at most half of all: a teacher is as large as its student, a frozen backbone larger.

    Args:
        chosen: Some of the weights.
        parameters: All of them.
    """
    return 2 * sum(p.numel() * p.element_size() for p in chosen) <= sum(
        p.numel() * p.element_size() for p in parameters
    )


class MovingWeights:
    """The weights that `training_step` itself writes to: momentum encoders, teachers, normalized prototypes.

    Any weight that no optimizer has may be one. As long as those are at most half of all, they are copied for every
    extra pass. Where they are more, only those that one of the first training passes, or a counted change later, was
    seen to move; until then all of them, in host memory. So are those that an optimizer has, and always those that had
    no gradient in its last step.

    Args:
        optimizers: The optimizers of the module being trained.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._seen: set[int] = set()
        self._without_gradient: set[int] = set()
        self._looks = _LOOKS
        self.offload = False

    def parameters(self, parameters: Sequence[nn.Parameter], trained: bool = True) -> list[nn.Parameter]:
        """The parameters that an extra pass may change.

        Args:
            parameters: What :func:`weights_of` says of the modules.
            trained: Whether those count that an optimizer trains.
        """
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        by_optimizers = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        others = [p for p in parameters if id(p) not in by_optimizers]
        few = few_of(others, parameters)
        self.offload = not few and self._looks > 0
        moving = others if few or self.offload else [p for p in others if id(p) in self._seen]
        return moving + [p for p in parameters if trained and id(p) in by_optimizers and self.moves(p)]

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the optimizers that a training pass may change."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad}
        return [p for p in unique.values() if self._looks > 0 or self.moves(p)]

    def moves(self, parameter: nn.Parameter) -> bool:
        """Whether a training pass was seen to change a parameter, or may do so.

        Args:
            parameter: The parameter.
        """
        return id(parameter) in self._seen or id(parameter) in self._without_gradient

    def note_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Look which parameters an optimizer trains indeed.

        Args:
            parameters: The optimizer's, before its step.
        """
        for parameter in parameters:
            (self._without_gradient.add if parameter.grad is None else self._without_gradient.discard)(id(parameter))

    @contextmanager
    def watched(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Notice which weights change inside the block, a training pass.

        Args:
            parameters: What :func:`weights_of` says of the modules.

        Yields:
            Nothing.
        """
        before, contents = change_marks(map(local, parameters)), self._contents(parameters)
        yield
        now = zip(change_marks(map(local, parameters)), self._contents(parameters), strict=True)
        then = zip(before, contents, strict=True)
        self._seen |= {id(p) for p, old, new in zip(parameters, then, now, strict=True) if old != new}
        self._looks = max(self._looks - 1, 0)

    def _contents(self, parameters: Sequence[Tensor]) -> list[float]:
        """Sums that show what is written through `tensor.data`, at the first few looks (a teacher starts as a copy)."""
        if not self._looks:
            return [0.0] * len(parameters)
        return [0.0 if p.is_complex() else float(in_double(local(p.detach())).sum()) for p in parameters]


class ModuleState:
    """What is registered in modules, the contents of all buffers and of some parameters.

    Args:
        modules: What :func:`modules_of` says.
        parameters: The parameters.
        offload: Whether to keep the copies of parameters in host memory.
    """

    def __init__(
        self, modules: Collection[nn.Module], parameters: Iterable[nn.Parameter] = (), offload: bool = False
    ) -> None:
        # FSDP2 lets its modules hold shards or gathered copies in turn, and knows which
        self._registered = [
            (now, dict(now) if now else _NOTHING)
            for one in modules
            for now in registered(one)
            if now is not one._parameters or not any(map(is_sharded, now.values()))
        ]
        self._buffers = BufferState.capture(modules)
        self._parameters = [
            (part, part.to("cpu" if offload else part.device, copy=True))
            for part in (local(parameter.detach()) for parameter in parameters)
        ]

    def restore(self, for_the_graph: bool = False) -> None:
        """Put everything back; can be called again.

        Args:
            for_the_graph: Whether graphs that saved a buffer have to go backward afterwards, as a backward pass through
                a checkpointed layer runs it again, and BatchNorm's statistics with it.
        """
        for now, names in self._registered:
            if len(now) != len(names) or any(now.get(name, now) is not one for name, one in names.items()):
                now.clear()
                now.update(names)
        with uncounted_changes([buffer for _, _, buffer, _ in self._buffers.saved] if for_the_graph else []):
            self._buffers.restore()
        with torch.no_grad(), uncounted_changes([parameter for parameter, _ in self._parameters]):
            for parameter, before in self._parameters:
                parameter.copy_(before)


class AttributeState:
    """What the Python attributes of modules hold.

    All names mean again what they meant. Containers, tensors and arrays (of up to 2^24 elements), random generators and
    objects of nothing but data have their contents back. Left alone are a module's numbers (not a metric's): it may
    count its passes; one that changed in an extra pass is warned about, and so is what was too large to be copied.

    Args:
        modules: What :func:`modules_of` says.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self._namespaces = [(module, vars(module), _attributes(module)) for module in modules]
        self._undo: list[Callable[[], Any]] = []
        self._watched: list[tuple[str, Any, Callable[[], Any]]] = []
        known = {id(parameter) for module in modules for parameter in own_parameters(module)}
        for owner, _, attributes in self._namespaces:
            for key, value in attributes.items():
                self._keep(value, f"{type(owner).__name__}.{key}", known, _DEPTH)

    def restore(self, replay: bool = False) -> None:
        """Put back what can be, and warn of what cannot.

        Args:
            replay: Whether this is for running the pass again that came after: then nothing is wrong with what changed.
        """
        changed = [name for name, before, now in self._watched if now() != before]
        for owner, namespace, before in self._namespaces:
            left = _rebind(namespace, before, numbers=is_metric(owner))
            changed += [f"{type(owner).__name__}.{key}" for key in left]
        for undo in self._undo:
            undo()
        for name in () if replay else changed:
            warnings.warn(
                f"An extra pass changed `{name}` and cannot put it back: let the module ask "
                "`lightning_ire.in_extra_pass()` before it does so, or make it a buffer.",
                stacklevel=2,
            )

    def _keep(self, value: Any, name: str, known: set[int], depth: int) -> None:
        """Remember the contents of a value that can be changed in place."""
        if isinstance(value, _SCALARS) or id(value) in known:
            return
        known.add(id(value))
        numpy = sys.modules.get("numpy")
        if isinstance(value, Tensor):
            if not value.is_inference():
                self._keep_tensor(value, name)
        elif isinstance(value, (*_CONTAINERS, tuple)):
            if len(value) > _COPIED:
                self._watched.append((name, len(value), partial(len, value)))
            elif not isinstance(value, tuple):
                self._undo.append(partial(_refill, value, value.copy()))
            inside = () if isinstance(value, set) else value.values() if isinstance(value, dict) else value
            if len(value) > _WALKED:
                tensors = [inner for inner in inside if isinstance(inner, Tensor)]
                self._watched.append((name, change_marks(tensors), partial(change_marks, tensors)))
            elif depth:
                for inner in inside:
                    self._keep(inner, name, known, depth - 1)
        elif (rewind := rewound(value)) is not None:
            self._undo.append(rewind)
        elif numpy is not None and isinstance(value, numpy.ndarray):
            if value.size <= _ELEMENTS and value.flags.writeable:
                self._undo.append(partial(numpy.copyto, value, value.copy()))
        elif depth and _is_data(value, depth):
            before = _contents(value)
            self._undo.append(partial(_give_back, value, before))
            for inner in before.values():
                self._keep(inner, name, known, depth - 1)

    def _keep_tensor(self, tensor: Tensor, name: str) -> None:
        (mark,) = change_marks([tensor])
        if tensor.numel() > _ELEMENTS:
            self._watched.append((name, mark, lambda: change_marks([tensor])[0]))
            return
        before = tensor.detach().clone()

        def undo() -> None:
            # what nobody was seen to change may have been changed through `.data` or an array; a graph that saved it
            # would take it for changed if this was counted
            unseen = change_marks([tensor])[0] == mark
            with uncounted_changes([tensor] if unseen else []):
                overwrite_([tensor], [before])

        self._undo.append(undo)


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics.

    Args:
        module: Any module.
    """
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, torchmetrics.Metric)


def _attributes(module: nn.Module) -> dict[str, Any]:
    namespace = vars(module)
    return {key: namespace[key] for key in namespace.keys() - _OF_TORCH}


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        if len(value) <= _WALKED:
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _modules_in(inner, depth - 1)
    elif depth and _is_holder(value):
        for inner in _contents(value).values():
            yield from _modules_in(inner, depth - 1)


def _is_holder(value: Any) -> bool:
    """Whether an object is there to hold others: one of a class of the user's, or of one of a few others."""
    if isinstance(value, (nn.Module, type, Tensor, *_SCALARS)):
        return False
    roots = {kind.__module__.partition(".")[0] for kind in type(value).__mro__[:-1]}
    if "torch" in roots and callable(value):
        return False
    return bool(roots) and not roots & (_LIBRARIES - _HOLDERS)


def _contents(value: Any) -> dict[str, Any]:
    """What an object holds, by name of the attribute."""
    return in_slots(value) | dict(getattr(value, "__dict__", {}))


def in_slots(value: Any) -> dict[str, Any]:
    """What an object holds in the slots of its classes, by name.

    Args:
        value: Any object.
    """
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    return {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}


def _give_back(value: Any, before: dict[str, Any]) -> None:
    """Let an object hold what it held."""
    now = _contents(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, held in before.items():
        if name not in now or now[name] is not held:
            object.__setattr__(value, name, held)  # its class may be frozen


def _is_data(value: Any, depth: int) -> bool:
    """Whether an object holds nothing but data (a meter of averages, an augmentation; not what holds a file)."""
    if not _is_holder(value):
        return False
    numpy = sys.modules.get("numpy")
    kinds = (*_SCALARS, *_CONTAINERS, tuple, Tensor, nn.Module)
    kinds += (numpy.ndarray, numpy.generic) if numpy is not None else ()
    return all(
        isinstance(inner, kinds) or rewound(inner) is not None or (depth > 1 and _is_data(inner, depth - 1))
        for inner in _contents(value).values()
    )


def _rebind(namespace: dict[str, Any], before: dict[str, Any], numbers: bool) -> list[str]:
    """Let a module's names mean what they meant; what is as it was is not written, since torch.compile guards it.

    Args:
        namespace: The module's.
        before: What its names meant.
        numbers: Whether numbers are put back too.

    Returns:
        Names of the numbers that are not.
    """
    left = []
    for key, now in list(namespace.items()):
        if key in _OF_TORCH or now is before.get(key, before):
            continue
        if not numbers and isinstance(now, (int, float)) and not isinstance(now, bool):
            left += [key] if now != before.get(key) else []
        elif key not in before:
            del namespace[key]
    for key, value in before.items():
        if namespace.get(key, namespace) is not value and key not in left:
            namespace[key] = value
    return left


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        (container.extend if isinstance(container, deque) else container.update)(before)
