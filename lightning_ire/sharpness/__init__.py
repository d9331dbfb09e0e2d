"""How sharp a loss is around the weights, in plain torch: what :class:`~lightning_ire.SharpnessMonitor` measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from lightning_ire._checks import ConfigurationError, check_choice, check_whole
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.host import LocalHost, check_host
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.engine.state import Progress
from lightning_ire.functional import is_sharded
from lightning_ire.sharpness.landscape import Landscape, check_products, measurement_mode
from lightning_ire.sharpness.quantities import (
    QUANTITIES,
    Job,
    Measurement,
    QuantityName,
    Settings,
    check_quantities,
    measure,
)
from lightning_ire.sharpness.step_operator import Enhanced

__all__ = ["QUANTITIES", "Measurement", "measure_sharpness"]


class OneStep(Enhanced, Protocol):
    """What is asked of an :class:`~lightning_ire.IREStep`."""

    optimizer: Optimizer
    progress: Progress


def measure_sharpness(
    model: nn.Module,
    loss_of: Callable[[Any], Any],
    batches: Sequence[Any],
    quantities: Sequence[QuantityName] = ("trace_fisher", "trace_hessian", "lambda_max"),
    *,
    fisher_loss: Callable[[Any], Any] | None = None,
    optimizer: Optimizer | None = None,
    step: OneStep | None = None,
    host: LocalHost | None = None,
    hvp: str = "auto",
    seed: int = 0,
    **settings: Any,
) -> Measurement:
    """Measure how sharp the loss is around a model's weights; afterwards the model is what it was.

    What the quantities are, their formulas, log tags and cost: :class:`~lightning_ire.SharpnessMonitor`. Parameters
    that require a gradient are the coordinates. What cannot be measured is skipped with a warning.

    Args:
        model: The model, also in `DistributedDataParallel` or sharded (`fully_shard`, `parallelize_module`); then all
            processes call this, each with as many batches.
        loss_of: Called with each of the batches; returns the mean loss over the batch, a scalar, or a mapping with it
            under "loss".
        batches: Batches of training data, on the model's device, as the loss function takes them.
        quantities: What to measure.
        fisher_loss: Called as `loss_of`, for losses whose targets `trace_fisher` cannot draw by itself; returns the
            loss against labels sampled from the predictions, or a pair of it and the number of terms it is the mean of.
        optimizer: For `stability` and `sgd_ratio`: whose steps.
        step: The same for a step with SAM and IRE: an :class:`~lightning_ire.IREStep`.
        host: As of the step: ``FabricHost(fabric)``, ``AccelerateHost(accelerator)``; under tensor parallelism
            ``LocalHost(data_parallel=...)``, with the mesh over which batches are dealt.
        hvp: "exact", "finite_difference" (of gradients), or "auto": exact where that works (not in a sharded model).
        seed: Seed of all random vectors; the same ones at every call.
        **settings: As for the monitor: `mode`, `relative_error`, `max_vectors`, `tolerance`, `max_iterations`,
            `num_eigenvalues`, `rho`; and `accumulate`, how many of the batches make up one of training.

    Returns:
        The numbers by log tag in `values`; `layer_traces`, `density`; in `skipped` what could not be measured, and why.

    Raises:
        ConfigurationError: If an argument is out of range, there is nothing to measure, or, of a sharded model, `hvp`
            is "exact" or `host` is missing.

    Example:
        >>> import torch
        >>> from lightning_ire import measure_sharpness
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3) * torch.tensor([3.0, 2.0, 1.0])  # H = 2 x^T x / 3
        >>> def loss_of(batch):
        ...     return (model(batch) - 1).square().mean()
        >>> measured = measure_sharpness(model, loss_of, [x], ["lambda_max", "trace_hessian"])
        >>> {tag: round(value, 4) for tag, value in measured.values.items() if tag.endswith(("max", "hessian"))}
        {'sharpness/lambda_max': 6.0, 'sharpness/trace_hessian': 9.3333}
    """
    wanted = check_quantities(quantities)
    check_choice("hvp", hvp, ("auto", "exact", "finite_difference"))
    check_whole("seed", seed, low=0)
    known = Settings.__dataclass_fields__.keys()
    if settings.keys() - known:
        unknown = min(settings.keys() - known)
        raise ConfigurationError(f"Expected settings among {', '.join(known)}, got `{unknown}`: leave it out.")
    checked = Settings(**settings)
    if not len(batches):
        raise ConfigurationError("Expected `batches` to be a list of at least one batch, got none.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError("Expected a model with parameters that require a gradient, got one without.")
    if not isinstance(batches, Sequence):
        raise ConfigurationError(
            f"Expected `batches` to be a list of batches, got {type(batches).__name__}: give some, for instance "
            "`list(itertools.islice(loader, 2))`."
        )
    host = LocalHost() if host is None else copy.copy(check_host(host))
    if optimizer is not None:
        with suppress(ConfigurationError):  # torch's own will do as well as what the loop made of it
            optimizer = host.unwrapped(optimizer)
    module = host.prepare(model)
    check_products(hvp, module)
    if host.data_parallel is None:
        _check_that_all_have_batches_of_their_own(module)
    if optimizer is None and step is not None:
        optimizer = step.optimizer
    with measurement_mode(host, module):
        landscape = Landscape(
            host,
            module,
            lambda index: loss_of(batches[index]),
            len(batches),
            fisher_loss=None if fisher_loss is None else lambda index: fisher_loss(batches[index]),
            hvp=hvp,
            seed=seed,
        )
        result = Measurement(step=step.progress.step if step is not None else 0)
        job = Job(landscape, checked, result, [] if optimizer is None else [optimizer], step)
        return measure(
            job, wanted, lambda quantity, reason: warn_on_rank_zero(f"measure_sharpness skips {quantity}: {reason}")
        )


def _check_that_all_have_batches_of_their_own(module: nn.Module) -> None:
    """A loop without a mesh cannot say which processes share a batch, and so draw the same labels."""
    sharded: list[Any] = [parameter for parameter in module.parameters() if is_sharded(parameter)]
    fully = all(
        parameter.placements[-1].is_shard() and all(one.is_replicate() for one in parameter.placements[:-1])
        for parameter in sharded
    )
    if sharded and not (fully and GatheredWeights(module)):
        raise ConfigurationError(
            "Expected `host` for a model under tensor parallelism, to say which processes share a batch, got none: "
            "give `LocalHost(data_parallel=...)` the mesh over which batches are dealt."
        )
