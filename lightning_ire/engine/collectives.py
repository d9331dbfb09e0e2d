"""What the ranks of a distributed run do together, or one for all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

from lightning_ire.engine.host import Host

__all__ = ["FailedTogether", "mean_over_ranks", "raise_on_all_ranks", "warn_on_rank_zero"]

T = TypeVar("T")


class FailedTogether(RuntimeError):
    """What could not be computed on some rank; raised on all of them.

    Attributes:
        out_of_memory: Whether that was the reason.
    """

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


def raise_on_all_ranks(host: Host, compute: Callable[[], T], who: str) -> T:
    """What this rank computes, if all ranks can do their part; else an error on all of them.

    Args:
        host: The loop.
        compute: Called once; may raise anything.
        who: Who says so in the warning of a rank other than the first.

    Raises:
        FailedTogether: If it failed on some rank.
    """
    results: list[T] = []

    def flagged() -> Tensor:
        results.append(compute())
        return torch.zeros(0)

    mean_over_ranks(host, flagged, torch.zeros(0), who)
    return results[0]


def mean_over_ranks(host: Host, compute: Callable[[], Tensor], like: Tensor, who: str) -> Tensor:
    """The mean of what the ranks compute, the same on all, in one all-reduce; an error on one is an error on all.

    Args:
        host: The loop.
        compute: Called once; may raise anything.
        like: A tensor of the result's size, type and device.
        who: Who says so in the warning of a rank other than the first.

    Raises:
        FailedTogether: If it failed on some rank.
    """
    error: Exception | None = None
    value = like
    try:
        value = compute().detach().to(like.dtype)  # of one type on all ranks, whatever it was computed in
    except FailedTogether:  # on all ranks at the same place inside
        raise
    except Exception as caught:  # whatever the user's code raises: training has to go on
        error = caught
    failed = error is not None
    memory = error is not None and _is_out_of_memory(error)
    if host.world_size > 1:
        marks = torch.tensor([float(failed), float(memory)])
        packed = torch.cat([value.to(host.device), marks.to(host.device, value.dtype)])
        packed = host.all_reduce_sum(packed)
        value = (packed[:-2] / host.world_size).to(value.device)
        failed, memory = bool(packed[-2]), bool(packed[-1])
    if failed:
        # the traceback of `error` holds this frame and keeps the tensors of an out-of-memory error alive
        reason, error = _reason(host, error, who), None
        raise FailedTogether(reason, memory)
    return value


def warn_on_rank_zero(message: str) -> None:
    """Warn, once in a distributed run.

    Args:
        message: One sentence that says what to change.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        warnings.warn(message, stacklevel=3)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _reason(host: Host, error: Exception | None, who: str) -> str:
    """The first line of an error, for the warning on rank 0; other ranks that have one say so themselves."""
    if error is None:
        return "it failed on another device, see the warning from there"
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    if host.rank:
        warnings.warn(f"{who} on device {host.rank}: {reason}", stacklevel=2)
    return reason
