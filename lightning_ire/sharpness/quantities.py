"""All quantities by name, what they cost together, and one measurement of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from lightning_ire._checks import ConfigurationError, check_choice
from lightning_ire.engine.collectives import FailedTogether
from lightning_ire.sharpness.curvatures import Density, Eigenvalues, FisherTrace, GaussNewtonTrace, Traces
from lightning_ire.sharpness.gaps import AscentGap, CompressionGap, GeneralizationGap, NoiseGap
from lightning_ire.sharpness.job import Cost, Job, Measurement, Quantity, Settings
from lightning_ire.sharpness.samples import Coherence, DropoutVariance
from lightning_ire.sharpness.step_operator import UnknownStep
from lightning_ire.sharpness.steps import EffectiveRates, KappaHeadroom, SGDRatio, Stability

__all__ = ["KINDS", "QUANTITIES", "QuantityName", "check_quantities", "max_cost", "measure", "with_headroom"]

QuantityName = Literal[
    "trace_fisher",
    "trace_gauss_newton",
    "trace_hessian",
    "trace_normalized",
    "layer_traces",
    "block_curvature",
    "lambda_max",
    "lambda_min",
    "spectral_density",
    "ascent_gap",
    "noise_gap",
    "compression_gap",
    "gap",
    "stability",
    "kappa_headroom",
    "sgd_ratio",
    "effective_lr",
    "coherence",
    "dropout_variance",
]
QUANTITIES: tuple[str, ...] = get_args(QuantityName)
"""What can be measured."""


def with_headroom(quantities: tuple[str, ...]) -> tuple[str, ...]:
    """The quantities for a kappa that follows the largest stable one: that too, where the stability is measured.

    Args:
        quantities: Names.
    """
    add = "stability" in quantities and "kappa_headroom" not in quantities
    return (*quantities, "kappa_headroom") if add else quantities


def check_quantities(quantities: Sequence[str]) -> tuple[str, ...]:
    """Names of quantities, if they are some.

    Args:
        quantities: Names.

    Raises:
        ConfigurationError: If there are none, or one that is unknown.
    """
    if isinstance(quantities, str) or not quantities:
        raise ConfigurationError(
            f"Expected `quantities` to be a list of names like ['trace_fisher', 'lambda_max'], got {quantities!r}."
        )
    return tuple(check_choice("quantities", quantity, QUANTITIES) for quantity in quantities)


# in this order they are measured: a trace uses what the eigenvalues leave behind, the compression gap the trace
KINDS: tuple[Quantity, ...] = (
    Eigenvalues(),
    Traces(),
    Density(),
    Stability(),
    KappaHeadroom(),
    SGDRatio(),
    EffectiveRates(),
    FisherTrace(),
    GaussNewtonTrace(),
    AscentGap(),
    NoiseGap(),
    CompressionGap(),
    GeneralizationGap(),
    Coherence(),
    DropoutVariance(),
)


def measure(job: Job, quantities: Sequence[str], warn: Callable[[str, str], None]) -> Measurement:
    """Measure; a quantity that cannot be measured is skipped, the others go on.

    Args:
        job: The measurement, inside :func:`~lightning_ire.sharpness.landscape.measurement_mode`.
        quantities: Which of :data:`QUANTITIES`.
        warn: Called with a quantity and why it was skipped.
    """
    for mode, of_steps in ((job.settings.mode, False), ("train", True)):
        todo = [(kind, [one for one in kind.names if one in quantities]) for kind in KINDS if kind.of_steps == of_steps]
        if not any(wanted for _, wanted in todo):
            continue
        with job.landscape.mode(mode):
            for kind, wanted in todo:
                try:
                    if wanted:
                        kind.measure(job, wanted)
                except Exception as error:  # whatever it is: training has to go on
                    same_on_all = isinstance(error, (FailedTogether, UnknownStep, FloatingPointError))
                    if not same_on_all and job.landscape.ranks.world_size > 1:  # the others wait for this one
                        raise
                    memory = isinstance(error, torch.OutOfMemoryError) or getattr(error, "out_of_memory", False)
                    job.result.out_of_memory |= memory
                    for quantity in wanted:
                        job.result.skipped[quantity] = str(error) or type(error).__name__
                        warn(quantity, job.result.skipped[quantity])
    return job.result


def max_cost(quantities: Sequence[str], settings: Settings, batches: int, sam: bool) -> Cost:
    """The most that one measurement can take, with the passes of Hessian products.

    Args:
        quantities: Which of :data:`QUANTITIES`.
        settings: How.
        batches: Batches of the probe.
        sam: Whether the run's steps are SAM's.
    """
    forward = backward = products = 0
    for of_steps in (False, True):
        kinds = [kind for kind in KINDS if kind.of_steps == of_steps and set(kind.names) & set(quantities)]
        costs = [kind.cost(settings, batches, sam) for kind in kinds]
        own = sum(cost.products for cost in costs)
        graphs = min(own, 1) if batches == 1 else own  # the graph of a gradient is kept if there is one batch
        forward += sum(cost.forward for cost in costs) + graphs
        backward += sum(cost.backward for cost in costs) + graphs
        products += own
    return Cost(forward, backward, products)
