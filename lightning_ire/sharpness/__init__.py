"""How sharp a loss is around the weights, in plain torch: what :class:`~lightning_ire.SharpnessMonitor` measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from lightning_ire._checks import ConfigurationError, check_choice, check_whole
from lightning_ire.curvature.batches import stacked_tensors
from lightning_ire.engine.collectives import warn_on_rank_zero
from lightning_ire.engine.host import LocalHost, check_host
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.engine.state import Progress
from lightning_ire.functional import as_real, is_sharded, local
from lightning_ire.sharpness.job import Job, Measurement, Settings
from lightning_ire.sharpness.landscape import Landscape, check_products, measurement_mode
from lightning_ire.sharpness.probe import common_size
from lightning_ire.sharpness.quantities import QUANTITIES, QuantityName, check_quantities, max_cost, measure
from lightning_ire.sharpness.step_operator import Enhanced

__all__ = ["QUANTITIES", "Measurement", "fisher_information", "measure_sharpness"]


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
    held_out: Sequence[Any] = (),
    start: Mapping[str, Tensor] | None = None,
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
        held_out: Batches of other data, for `gap/measured`; with several processes equally many in each.
        start: The weights at the start of training, as `model.state_dict()` had them, for `compression/deletion_gap`.
        fisher_loss: Called as `loss_of`, for losses whose targets `trace_fisher` cannot draw by itself; returns the
            loss against labels sampled from the predictions, or a pair of it and the number of terms it is the mean of.
        optimizer: For `stability` and `sgd_ratio`: whose steps.
        step: The same for a step with SAM and IRE: an :class:`~lightning_ire.IREStep`.
        host: As of the step: ``FabricHost(fabric)``, ``AccelerateHost(accelerator)``; under tensor parallelism
            ``LocalHost(data_parallel=...)``, with the mesh over which batches are dealt.
        hvp: "exact", "finite_difference" (of gradients), or "auto": exact where that works (not in a sharded model).
        seed: Seed of all random vectors; the same ones at every call.
        **settings: As for the monitor: `mode`, `relative_error`, `max_vectors`, `tolerance`, `max_iterations`,
            `num_eigenvalues`, `rho`, `bits`, `deleted`, `num_samples`; and what only the loop knows: `accumulate`, how
            many of the batches make up one of training, `train_size`, the samples of the training set (for `gap` and
            `coherence`), `train_batch`, those of one step on all processes, and `samples`, those of a batch here
            (default: the first dimension of its tensors, if it is the same in all).

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
    known = Settings.__dataclass_fields__.keys()
    if settings.keys() - known:
        unknown = min(settings.keys() - known)
        raise ConfigurationError(f"Expected settings among {', '.join(known)}, got `{unknown}`: leave it out.")
    checked = Settings(**settings)
    if start is not None and not isinstance(start, Mapping):
        raise ConfigurationError(
            f"Expected `start` to be a copy of the `model.state_dict()` of the start, got {type(start).__name__}."
        )
    if optimizer is not None:
        with suppress(ConfigurationError):  # torch's own will do as well as what the loop made of it
            optimizer = (LocalHost() if host is None else check_host(host)).unwrapped(optimizer)
    if optimizer is None and step is not None:
        optimizer = step.optimizer
    with (
        tqdm(desc="Sharpness (at most)", delay=3, leave=False, disable=None) as bar,
        _landscape(
            model, loss_of, batches, held_out=held_out, fisher_loss=fisher_loss, host=host, hvp=hvp, seed=seed, bar=bar
        ) as landscape,
    ):
        if checked.samples is None:
            sizes = (len(next(iter(stacked_tensors(batch)), ())) for batch in batches)
            checked = replace(checked, samples=common_size(sizes))
        cost = max_cost(
            wanted, checked, len(batches), sam=step is not None and step.perturbation_in_force() is not None
        )
        bar.total = cost.backward + cost.products
        result = Measurement(step=step.progress.step if step is not None else 0)
        job = Job(landscape, checked, result, [] if optimizer is None else [optimizer], step)
        if start is not None:
            job.start = _parts_at_start(landscape, model, start)
        return measure(
            job, wanted, lambda quantity, reason: warn_on_rank_zero(f"measure_sharpness skips {quantity}: {reason}")
        )


def fisher_information(
    model: nn.Module,
    loss_of: Callable[[Any], Any],
    batches: Sequence[Any],
    *,
    draws: int = 16,
    labels: Literal["all", "drawn"] = "all",
    mode: Literal["eval", "train"] = "eval",
    fisher_loss: Callable[[Any], Any] | None = None,
    host: LocalHost | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a fitted model, by parameter; afterwards the model is what it was.

    F_k = sum_i w_i E_{y ~ p(.|x_i)} (d_k log p(y|x_i))^2, w_i the weight of prediction i in the mean loss: as elastic
    weight consolidation takes it to say which weights a task needs (Kirkpatrick et al. 2017, arXiv 1612.00796), with
    the penalty lambda / 2 sum_k F_k (theta_k - theta*_k)^2 on the next one. An unbiased estimate; the relative standard
    deviation of an entry is about sqrt(2 / (draws x batches)).

    Args:
        model: As for :func:`measure_sharpness`.
        loss_of: As there; a cross entropy or another loss that :class:`~lightning_ire.SampledFisher` knows.
        batches: As there; all of them count alike.
        draws: Estimates that are averaged, at least 1.
        labels: "all": all labels of each prediction with random signs, which misses no rare one; "drawn": from the
            model (for losses of other targets they always are).
        mode: "eval" or "train".
        fisher_loss: As there; needs `labels="drawn"`.
        host: As there.
        seed: Seed of labels and signs.

    Returns:
        Tensors >= 0 of the parameters' shapes, in at least float32; complex parameters have one number for the real and
        one for the imaginary part, in a last dimension of 2. Of a sharded parameter this process's part.

    Raises:
        ConfigurationError: If an argument is out of range or there is nothing to measure.
        RuntimeError: If the loss is not known.

    Cost: a forward and a backward pass for each draw and batch (of a single batch one forward pass for all draws).

    Example:
        >>> import torch
        >>> from lightning_ire import fisher_information
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> def loss_of(batch):
        ...     return torch.nn.functional.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))
        >>> found = fisher_information(model, loss_of, [torch.ones(4, 1)], draws=2000)["weight"]
        >>> probability = model.weight.detach().softmax(0)
        >>> torch.allclose(found, probability * (1 - probability), rtol=0.2)
        True
    """
    check_whole("draws", draws, low=1)
    check_choice("labels", labels, ("all", "drawn"))
    check_choice("mode", mode, ("eval", "train"))
    if fisher_loss is not None and labels == "all":
        raise ConfigurationError("Expected `labels` 'drawn' with a `fisher_loss`, which draws them itself, got 'all'.")
    with (
        tqdm(desc="Fisher information", delay=3, leave=False, disable=None) as bar,
        _landscape(model, loss_of, batches, fisher_loss=fisher_loss, host=host, seed=seed, bar=bar) as landscape,
        landscape.mode(mode),
    ):
        bar.total = draws * len(batches)
        total = [torch.zeros_like(part) for part in landscape.coordinates.parts]
        total = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in total]
        for draw in range(draws):
            for sum_so_far, one in zip(total, landscape.fisher_diagonal(draw, labels == "all"), strict=True):
                sum_so_far += one / draws
        return dict(zip(landscape.names, total, strict=True))


@contextmanager
def _landscape(
    model: nn.Module,
    loss_of: Callable[[Any], Any],
    batches: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    fisher_loss: Callable[[Any], Any] | None = None,
    host: LocalHost | None = None,
    hvp: str = "auto",
    seed: int = 0,
    bar: tqdm,
) -> Iterator[Landscape]:
    """Check what was given; inside the block the loss on the batches as a function of the weights."""
    check_choice("hvp", hvp, ("auto", "exact", "finite_difference"))
    check_whole("seed", seed, low=0)
    for name, given in (("batches", batches), ("held_out", held_out)):
        if not isinstance(given, Sequence):
            raise ConfigurationError(
                f"Expected `{name}` to be a list of batches, got {type(given).__name__}: give some, for instance "
                "`list(itertools.islice(loader, 2))`."
            )
    if not len(batches):
        raise ConfigurationError("Expected `batches` to be a list of at least one batch, got none.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError("Expected a model with parameters that require a gradient, got one without.")
    host = LocalHost() if host is None else copy.copy(check_host(host))
    module = host.prepare(model)
    check_products(hvp, module)
    if host.data_parallel is None:
        _check_that_all_have_batches_of_their_own(module)
    bar.disable = bool(bar.disable) or host.rank > 0
    with measurement_mode(host, module):
        yield Landscape(
            host,
            module,
            lambda index: loss_of(batches[index]),
            len(batches),
            held_out=(lambda index: loss_of(held_out[index])) if held_out else None,
            held_out_batches=len(held_out),
            fisher_loss=None if fisher_loss is None else lambda index: fisher_loss(batches[index]),
            hvp=hvp,
            seed=seed,
            tick=bar.update,
        )


def _parts_at_start(landscape: Landscape, model: nn.Module, start: Mapping[str, Tensor]) -> list[Tensor]:
    """The given weights, in the order of the landscape's coordinates."""
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = []
    for parameter, part in zip(landscape.parameters, landscape.coordinates.parts, strict=True):
        name = named[id(parameter)]
        then = start.get(name)
        if then is None or then.shape != parameter.shape:
            got = "nothing" if then is None else f"{tuple(then.shape)}"
            raise ConfigurationError(
                f"Expected `start` to have the parameter {name!r} of shape {tuple(parameter.shape)}, got {got}: give "
                "the `model.state_dict()` of the start, copied."
            )
        parts.append(as_real(local(then.detach(), parameter)).to(part.device))
    return parts


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
