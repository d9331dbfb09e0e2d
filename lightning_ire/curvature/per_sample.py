"""The squares of single samples' gradients through any `training_step`, many samples at a time (torch.func)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire.curvature.base import MicroBatch, Window
from lightning_ire.curvature.batches import map_tensors, stacked_tensors
from lightning_ire.curvature.tap import LossTap
from lightning_ire.functional import in_double, per_sample_squares, seeded, twice_differentiable

__all__ = ["one_by_one", "squares_at_once"]

_ELEMENTS = 1 << 26  # of gradients that are held at a time


@contextmanager
def one_by_one(module: nn.Module) -> Iterator[None]:
    """Inside the block layers that keep running statistics (BatchNorm) use them: a sample has no statistics.

    Args:
        module: Any module.

    Yields:
        Nothing.
    """
    layers = [layer for layer in module.modules() if getattr(layer, "running_mean", None) is not None]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training = training


def squares_at_once(
    window: Window, micro_batch: MicroBatch, args: Sequence[Any]
) -> tuple[list[Tensor | None], Tensor] | None:
    """Mean over samples of the square of each one's score, and the share of the samples that counted.

    Args:
        window: The window.
        micro_batch: The call of `training_step` to repeat, sample by sample.
        args: Its arguments, the batch first.

    Returns:
        One tensor per parameter of the window (``None``: unused in training, where torch.func says 0). ``None`` if this
        step has to be taken sample by sample: a loss that is not what one call of a known function returned, a batch
        that is no stack of tensors, parameters outside the module, or what torch.func cannot do.
    """
    names = {id(parameter): name for name, parameter in window.module.named_parameters()}
    wanted = {names.get(id(p)): p.detach() for p in window.parameters if p.requires_grad}
    stacked = stacked_tensors(args[0])
    if None in wanted or not stacked:
        return None
    weights = {str(name): weight for name, weight in wanted.items()}
    size = sum(weight.numel() for weight in weights.values())
    seed = int(torch.randint(2**62, (), generator=window.labels))

    def all_samples(*args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        score = _score_of_one(window, args, kwargs, {id(tensor) for tensor in stacked})
        with seeded(seed, {weight.device for weight in weights.values()}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # still faster than a loop
            return per_sample_squares(score, weights, stacked, chunk=max(_ELEMENTS // max(size, 1), 1))

    try:
        with (
            twice_differentiable(window.module),  # what torch.func can follow, too
            window.rerun(micro_batch, one_by_one(window.module), *args, step=all_samples) as (squares, counted),
        ):
            unit = window.scale**2
            count = len(stacked[0])
            own = [None if p.grad is None else squares.get(names.get(id(p), "")) for p in window.parameters]
            return [None if square is None else square / (unit * count) for square in own], in_double(counted) / count
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None  # the next try, one sample after the other, says what is wrong if it is not torch.func


def _score_of_one(
    window: Window, args: Sequence[Any], kwargs: Mapping[str, Any], stacked: Collection[int]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The score of one sample as a function of the weights and of the sample's tensors, `stacked` by their `id`."""
    inner = _Around(window.module)

    def score(weights: Mapping[str, Tensor], *sample: Tensor) -> tuple[Tensor, Tensor]:
        parts = iter(sample)
        batch = map_tensors(args[0], lambda t: next(parts).unsqueeze(0) if id(t) in stacked else t)
        tap = LossTap(None)
        swapped = {f"module.{name}": weight for name, weight in weights.items()}
        with tap:
            output = torch.func.functional_call(inner, swapped, (window.training_step, batch, *args[1:]), dict(kwargs))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        call = next((call for call in tap.calls if call.made(loss)), None)
        if call is None:
            raise ValueError("the loss is not what one call of a known function returned")
        sampled = call.draw(generator=None)
        return sampled.score * window.scale, (sampled.weights.sum() > 0).float()

    return score


class _Around(nn.Module):
    """Calls a function of a module, so that `functional_call` can swap the module's parameters for it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)
