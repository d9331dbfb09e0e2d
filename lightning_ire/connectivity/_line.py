"""The networks on the straight line between two, one after the other in the place of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_ire._checkpoint_files import misfit_reason, read_checkpoint
from lightning_ire._checks import ConfigurationError, check_path, check_whole
from lightning_ire.connectivity._result import Barrier
from lightning_ire.engine.module_state import ModuleState, modules_of, weights_of
from lightning_ire.engine.no_trace import devices_of
from lightning_ire.functional import BufferState, RandomState, as_real, copied, is_sharded
from lightning_ire.functional.state import overwrite_

__all__ = ["End", "barrier", "check_points", "on_the_line", "weights_in"]

_NOTE = (
    "BatchNorm's running statistics are interpolated as the weights are, and are not those of the networks between the "
    "ends: a barrier may come from that alone"
)


class End(NamedTuple):
    """One end of the line: how messages call it, where it comes from, and its state dict."""

    name: str
    source: str
    state: Mapping[str, Any]


def barrier(
    model: nn.Module,
    first: Mapping[str, Any] | str | os.PathLike[str],
    second: Mapping[str, Any] | str | os.PathLike[str],
    evaluate: Callable[[nn.Module], Any],
    *,
    points: int = 11,
    recalibrate: Iterable[Any] | Callable[[nn.Module], Any] | None = None,
) -> Barrier:
    """Loss and metrics on the straight line between two networks, and of their average.

    The loss barrier is max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1)), with L(alpha) the loss at
    (1 - alpha) theta_first + alpha theta_second (Entezari et al. 2022, arXiv 2110.06296; Frankle et al. 2020,
    arXiv 1912.05671, do the same with the error). Near 0: both are in one linearly connected region, and their average
    is as good as they are. Permutations of hidden units are not looked for: independent runs mostly have a barrier
    that these would take away in part.

    BatchNorm's running statistics between the ends are not the interpolated ones: they have to be estimated anew
    (Izmailov et al. 2018, arXiv 1803.05407; Jordan et al. 2023, arXiv 2211.08403). With `recalibrate` that is done at
    all points, the ends too, so that they can be compared; without it the ends have their own.

    At alpha 0 and 1 weights and buffers have the checkpoints' bits. Between them floating-point and complex ones are
    interpolated in at least float32 and rounded to their type; what both ends have alike stays as it is; whole numbers
    and booleans are those of the nearer end, at 1/2 of the first. Tied parameters are moved once. What
    `load_state_dict` puts elsewhere than into parameters and buffers is the second one's at all points.

    Afterwards the model is what it was, also after an exception: parameters, buffers, modes, and the random numbers of
    torch, numpy and Python, from which every point starts alike. Gradients that `evaluate` leaves stay.

    Args:
        model: The network, on one device or more, not sharded; its own weights do not count.
        first: A state dict of it (names and shapes), or the path of a file that holds one, by itself or, as Lightning's
            checkpoints do, under `state_dict`. Files are loaded with `weights_only=True`.
        second: The same for the other end.
        evaluate: Called with the model, in eval mode, at every point; returns the loss, or a mapping of numbers with it
            under "loss".
        points: Number of alphas, equally spaced from 0 to 1: an odd number >= 3, so that 1/2 is among them.
        recalibrate: Batches of training data for BatchNorm's statistics, to be gone through at every point: the model
            is called with each, or with its first element if it is a list or tuple. Or a function that calls the model
            on such batches itself; the model is in training mode then, without gradients. The statistics are means
            over all batches. A layer that sees none keeps the interpolated ones. ``None``: all are interpolated.

    Returns:
        Alphas, values by name, the barrier's height, the values of the average.

    Raises:
        ConfigurationError: If an argument is out of range, or a file or state dict is not one of this model.

    Cost: `points` evaluations, with as many passes over the batches of `recalibrate`; four copies of the weights.

    Example:
        >>> import torch
        >>> from lightning_ire import barrier
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def double_well(model):  # (w^2 - 1)^2: minima at -1 and 1
        ...     return (model.weight.square() - 1).square().sum()
        >>> found = barrier(model, {"weight": -torch.ones(1, 1)}, {"weight": torch.ones(1, 1)}, double_well)
        >>> found.height, found.at
        (1.0, 0.5)
    """
    ends = [_end("first", first), _end("second", second)]
    # the model's own tensors may be in it, and the first one is loaded before
    copy = {key: value.clone() if isinstance(value, Tensor) else value for key, value in ends[1].state.items()}
    return on_the_line(model, (ends[0], ends[1]._replace(state=copy)), evaluate, points, recalibrate)


def on_the_line(
    model: nn.Module,
    ends: tuple[End, End],
    evaluate: Callable[[nn.Module], Any],
    points: int,
    recalibrate: Iterable[Any] | Callable[[nn.Module], Any] | None,
) -> Barrier:
    """Do what :func:`barrier` says.

    Args:
        model: As there.
        ends: The two state dicts; none of the model's own tensors in the second.
        evaluate: As there.
        points: As there.
        recalibrate: As there.

    Returns:
        As there.
    """
    check_points("points", points)
    _check_model(model)
    if not callable(evaluate):
        raise ConfigurationError(f"Expected `evaluate` to be a function of the model, got {type(evaluate).__name__}.")
    batches = isinstance(recalibrate, Iterable) and not isinstance(recalibrate, str)
    if not (recalibrate is None or callable(recalibrate) or batches):
        raise ConfigurationError(
            "Expected `recalibrate` to be a list of batches or a function of the model, got "
            f"{type(recalibrate).__name__}."
        )
    if recalibrate is not None and not callable(recalibrate) and iter(recalibrate) is recalibrate:
        raise ConfigurationError(
            f"Expected `recalibrate` to be batches that can be gone through {points} times, got a "
            f"{type(recalibrate).__name__}: make a list of it."
        )
    layers = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]
    found = Barrier(recalibrated=bool(layers) and recalibrate is not None)
    found.notes += [_NOTE] if layers and recalibrate is None else []
    with _left_as_it_was(model) as begin_again:
        first, second = (_loaded(model, end) for end in ends)
        for place in range(points):
            begin_again()
            alpha = place / (points - 1)
            overwrite_(_tensors(model), [_between(*pair, alpha) for pair in zip(first, second, strict=True)])
            if layers and recalibrate is not None:
                _recalibrate(model, layers, recalibrate)
            model.eval()
            found.add(alpha, _numbers(evaluate(model)))
    return found


def check_points(name: str, points: Any) -> None:
    """Refuse a number of alphas that leaves out an end or the middle.

    Args:
        name: The argument's name, as the user typed it.
        points: What came.

    Raises:
        ConfigurationError: If it is not odd, or below 3.
    """
    if check_whole(name, points, low=3) % 2 == 0:
        raise ConfigurationError(
            f"Expected `{name}` to be an odd number, so that the averaged weights are among them, got {points}."
        )


def weights_in(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """The state dict in what a file holds.

    Args:
        content: What it holds: the state dict, or a mapping with it under `state_dict`.
        name: How messages call it.
        source: Where it comes from.

    Raises:
        ConfigurationError: If there is no tensor in it.
    """
    inner = content.get("state_dict")
    state = inner if isinstance(inner, Mapping) else content
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ConfigurationError(f"Expected `{name}` to be a state dict, got {source} without a tensor in it.")
    return state


def _end(name: str, given: Any) -> End:
    if not isinstance(given, (Mapping, str, os.PathLike)):
        raise ConfigurationError(
            f"Expected `{name}` to be a state dict, or the path of a file with one, got {type(given).__name__}."
        )
    if isinstance(given, Mapping):
        return End(name, "a mapping", weights_in(given, name, "a mapping"))
    path = str(check_path(name, given))
    content = read_checkpoint(path, f"Expected `{name}` to be a file with a state dict, got")
    return End(name, repr(path), weights_in(content, name, repr(path)))


def _check_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ConfigurationError(f"Expected a model that is not sharded, got one with `{name}` in parts.")
        if is_lazy(parameter):
            raise ConfigurationError(f"Expected a model whose weights have shapes, got `{name}` without: run it once.")


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[Callable[[], None]]:
    """After the block the model and the random numbers are as before; yields what makes them so in between."""
    modules = modules_of(model)
    modes = [(one, one.training) for one in modules]
    kept, streams = ModuleState(modules, weights_of(modules)), RandomState.capture(devices_of(model))

    def restore() -> None:
        kept.restore()
        streams.restore()
        for one, mode in modes:
            one.training = mode

    try:
        yield restore
    finally:
        restore()


def _loaded(model: nn.Module, end: End) -> list[Tensor]:
    """Copies of the model's tensors with an end's state in them."""
    inner = getattr(model, "_orig_mod", model)  # of a compiled one
    inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
    try:
        inner.load_state_dict(end.state, strict=getattr(inner, "strict_loading", True))
    except RuntimeError as error:
        if (reason := misfit_reason(error)) is None:
            raise
        raise ConfigurationError(
            f"Expected `{end.name}` to hold the weights of this {type(inner).__name__}, got {end.source}: {reason}"
        ) from error
    return copied(_tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers, each once."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """See :func:`barrier`."""
    if alpha in (0, 1) or not (first.is_floating_point() or first.is_complex()):
        return first if alpha <= 0.5 else second
    wide = torch.promote_types(first.dtype, torch.float32)
    mixed = torch.lerp(as_real(first.to(wide)), as_real(second.to(wide)), alpha)
    mixed = torch.view_as_complex(mixed) if first.is_complex() else mixed
    return torch.where(first == second, first, mixed.to(first.dtype))  # infinities in masks have no difference


def _recalibrate(model: nn.Module, layers: list[_BatchNorm], given: Any) -> None:
    """Replace BatchNorm's statistics by their means over batches."""
    before = [(layer, layer.momentum, BufferState.capture([layer])) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean
        model.train()
        with torch.no_grad():
            if callable(given):
                given(model)
            else:
                _show(model, given)
    finally:
        for layer, momentum, _ in before:
            layer.momentum = momentum
    blind = [state for layer, _, state in before if not layer.num_batches_tracked]
    if len(blind) == len(layers):
        raise ConfigurationError(
            "Expected `recalibrate` to show BatchNorm's layers some batches in training mode, got none to any of them."
        )
    for state in blind:
        state.restore()


def _show(model: nn.Module, batches: Iterable[Any]) -> None:
    device = next(model.parameters()).device
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)


def _numbers(values: Any) -> dict[str, float]:
    """What `evaluate` has returned, as numbers by name."""
    named = values if isinstance(values, Mapping) else {"loss": values}
    found = {}
    for name, value in named.items():
        try:
            found[str(name)] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"Expected `evaluate` to return numbers, got a {type(value).__name__} for {name!r}: {error}."
            ) from error
    if "loss" not in found:
        raise ConfigurationError(
            "Expected `evaluate` to return the loss, or a mapping with it under 'loss', got "
            f"{', '.join(found) or 'an empty one'}."
        )
    return found
