"""What a pass of `training_step` may change in a module: buffers, weights that it moves itself, Python attributes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_ire.engine._torch import change_marks, own_parameters, registered, uncounted_changes
from lightning_ire.engine.object_state import DEPTH, SCALARS, WALKED, DictionaryState, ObjectState, contents, is_holder
from lightning_ire.functional import BufferState, in_double, is_sharded, local

__all__ = ["AttributeState", "ModuleState", "MovingWeights", "few_of", "is_metric", "modules_of", "weights_of"]

_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, ...: not the user's attributes
_LOOKS = 3  # training passes that are looked at more closely


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module, all below it, and those in lists and dictionaries in their attributes (metrics, teachers), each once.

    Args:
        module: Any module.
    """
    found = [module]
    known = {module}
    for one in found:  # which grows
        parts = [*registered(one)[2].values()]
        for _, value in _attributes(one):
            parts += _modules_in(value, DEPTH)
        for part in parts:
            if part is not None and part not in known:
                known.add(part)
                found.append(part)
    return found


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
    return not chosen or 2 * sum(p.numel() * p.element_size() for p in chosen) <= sum(
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
        trains = {id(p) for p in self._of_optimizers()}
        others = [p for p in parameters if id(p) not in trains]
        few = few_of(others, parameters)
        self.offload = not few and self._looks > 0
        moving = others if few or self.offload else [p for p in others if id(p) in self._seen]
        more = trains & (self._seen | self._without_gradient) if trained else ()
        return moving + [p for p in parameters if id(p) in more] if more else moving

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the optimizers that a training pass may change."""
        moving = self._seen | self._without_gradient
        if not self._looks and not moving:
            return []
        unique = {id(p): p for p in self._of_optimizers()}
        return [p for key, p in unique.items() if self._looks or key in moving]

    def _of_optimizers(self) -> list[nn.Parameter]:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return [p for group in groups for p in group["params"] if p.requires_grad]

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
        without = {id(p): p.grad is None for p in parameters}
        self._without_gradient -= without.keys()
        self._without_gradient |= {key for key, none in without.items() if none}

    @contextmanager
    def watched(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Notice which weights change inside the block, a training pass.

        Args:
            parameters: What :func:`weights_of` says of the modules.

        Yields:
            Nothing.
        """
        before, sums = change_marks(parameters), self._sums(parameters)
        yield
        for old, new in ((before, change_marks(parameters)), (sums, self._sums(parameters))):
            if old != new:
                self._seen |= {id(p) for p, one, other in zip(parameters, old, new, strict=True) if one != other}
        self._looks = max(self._looks - 1, 0)

    def _sums(self, parameters: Sequence[Tensor]) -> list[float]:
        """They show what is written through `tensor.data`, at the first few looks (a teacher starts as a copy)."""
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
        sharded = any(is_sharded(parameter) for one in modules for parameter in own_parameters(one))
        # FSDP2 lets its modules hold shards or gathered copies in turn, and knows which
        self._registered = DictionaryState([names for one in modules for names in registered(one)[int(sharded) :]])
        self._buffers = BufferState.capture([one for one in modules if registered(one)[1]])
        self._parameters = [
            (part, part.detach().to("cpu" if offload else part.device, copy=True))
            for part in [local(p) for p in parameters]  # not detached: a pass may give a parameter other data
        ]

    def restore(self, for_the_graph: bool = False) -> None:
        """Put everything back; can be called again.

        Args:
            for_the_graph: Whether graphs that saved a buffer have to go backward afterwards, as a backward pass through
                a checkpointed layer runs it again, and BatchNorm's statistics with it.
        """
        self._registered.restore()
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
        self._modules = list(modules)
        self._namespaces = DictionaryState([vars(module) for module in modules])
        roots = [(f"{type(one).__name__}.{key}", value) for one in modules for key, value in _attributes(one)]
        self._objects = ObjectState(roots, known=(p for one in modules for p in own_parameters(one)))

    def restore(self, replay: bool = False) -> None:
        """Put back what can be, and warn of what cannot.

        Args:
            replay: Whether this is for running the pass again that came after: then nothing is wrong with what changed.
        """
        changed = self._objects.changed()
        for index, before in self._namespaces.changed():
            owner = self._modules[index]
            changed += [f"{type(owner).__name__}.{key}" for key in _rebind(owner, before)]
        self._objects.restore()
        for name in () if replay else changed:
            warnings.warn(
                f"An extra pass changed `{name}` and cannot put it back: let the module ask "
                "`lightning_ire.in_extra_pass()` before it does so, or make it a buffer.",
                stacklevel=2,
            )


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics.

    Args:
        module: Any module.
    """
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, torchmetrics.Metric)


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """The user's own attributes that are not scalars."""
    return [one for one in vars(module).items() if one[0] not in _OF_TORCH and type(one[1]) not in SCALARS]


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        if len(value) <= WALKED:
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _modules_in(inner, depth - 1)
    elif depth and is_holder(value):
        for inner in contents(value).values():
            yield from _modules_in(inner, depth - 1)


def _rebind(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Let a module's names mean what they meant, but for numbers; returns the names of those that changed.

    What is as it was is not written, since torch.compile guards it.
    """
    left, namespace, numbers = [], vars(module), () if is_metric(module) else (int, float)
    for key in (before | namespace).keys() - _OF_TORCH:
        now, then = namespace.get(key, namespace), before.get(key, namespace)
        if now is then:
            continue
        if isinstance(now, numbers) and not isinstance(now, bool) and now != then:
            left.append(key)
        elif then is namespace:
            del namespace[key]
        else:
            namespace[key] = then
    return left
