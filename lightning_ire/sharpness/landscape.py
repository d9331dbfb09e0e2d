"""A loss over some batches as a function of the weights: value, gradient, Hessian and Fisher, on all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from lightning_ire._checks import ConfigurationError
from lightning_ire.curvature.tap import LossTap, factors_in, known_losses
from lightning_ire.engine._torch import differentiable_once, gathered_dtypes
from lightning_ire.engine.collectives import FailedTogether, mean_over_ranks, raise_on_all_ranks, warn_on_rank_zero
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import AttributeState, ModuleState, few_of, modules_of, weights_of
from lightning_ire.engine.no_trace import devices_of, no_trace, without_inference_tensors
from lightning_ire.engine.replay import loss_of
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.functional import (
    Coordinates,
    as_real,
    coarsest,
    finite_difference_product,
    gradients_by_backward,
    hessian_product,
    in_double,
    is_sharded,
    local,
    perturbed,
    sam_displacement,
    seeded,
    twice_differentiable,
)
from lightning_ire.functional.seeds import mixed_seed

__all__ = ["LABELS_OF_A_SAMPLE", "Landscape", "all_ranks", "check_products", "measurement_mode"]

T = TypeVar("T")

LABELS_OF_A_SAMPLE = 10
"""How many backward passes may be made for each of the samples whose labels are looked at."""
_WHO = "SharpnessMonitor"


def all_ranks(host: Host) -> Host:
    """A host as far as collectives go, over all ranks: those too that share a batch, each with a part of every layer.

    Args:
        host: The loop.
    """
    there_are_more = _is_distributed() and distributed.get_world_size() != host.world_size
    return cast("Host", _AllRanks(host)) if there_are_more else host


class _AllRanks:
    """See :func:`all_ranks`."""

    def __init__(self, host: Host) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.device = host.device

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        distributed.all_reduce(value)
        return value


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def check_products(hvp: str, module: nn.Module) -> None:
    """Refuse exact Hessian products where they cannot be had.

    Args:
        hvp: The setting.
        module: The module, sharded by now.

    Raises:
        ConfigurationError: With the remedy, in one line.
    """
    GatheredWeights(module).drop()
    if hvp == "exact" and any(map(is_sharded, module.parameters())):
        raise ConfigurationError(
            "Expected Hessian products by differences of gradients for sharded parameters, got hvp='exact': torch's "
            "second derivatives through them are missing or wrong; set `hvp` to 'auto' or 'finite_difference'."
        )


@contextmanager
def measurement_mode(host: Host, module: nn.Module) -> Iterator[None]:
    """Inside the block the module can be differentiated twice; after it there is no trace of what was done.

    Autograd is on whatever Lightning has switched off, attention uses the math kernel, recurrent layers do without
    cuDNN, compiled parts run uncompiled.

    Args:
        host: The loop.
        module: The module.

    Yields:
        Nothing.
    """
    gathered = GatheredWeights(module)
    gathered.drop()  # else its parameters may be gathered copies
    with ExitStack() as stack:
        stack.callback(gathered.drop)  # of weights that were moved
        # outermost: in validation things are put back in inference mode; whatever the module moves, and when
        modules = modules_of(module)
        stack.enter_context(no_trace(modules, host, devices_of(module), weights_of(modules), offload=True))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        without_inference_tensors(module)
        stack.enter_context(twice_differentiable(module))
        yield


class Landscape:
    """The mean loss over some batches of all ranks; to be used inside :func:`measurement_mode`.

    Random layers draw the same numbers at every evaluation.

    Sharded parameters (FSDP2, tensor parallelism): vectors are this rank's parts (see
    :class:`~lightning_ire.functional.Coordinates`), products are central differences of gradients, and Tr F is
    estimated with the gradient of all devices together. Exact products are not to be had: autograd finds no sharded
    parameter of FSDP2 in a graph, and its second derivatives through tensor-parallel layers are wrong without an error
    (tests/test_sharded_monitor.py).

    An error that only some ranks meet skips a quantity on all if it comes before or after the collectives of the model
    in a forward pass. Between them, or in a backward pass, the others wait for this rank, as in training.

    Cost where parameters are sharded: gathered copies are dropped before every evaluation, so that each forward pass
    gathers all weights, those of the root too. Vectors are never sent; beside the collectives of the model's own passes
    there are all-reduces of a few numbers (as many as there are tensors, batches or Lanczos vectors): two for the value
    or the gradient on one batch; for a product two forward and two backward passes and six, for w^T H u seven; for a
    draw of Tr F a backward pass and three, and one more with its forward pass.

    Args:
        host: The loop.
        module: The module; its parameters that require a gradient are the coordinates.
        loss: Called with the number of a batch; returns the mean loss over it, a scalar, or a mapping with it.
        batches: How many batches there are, on every rank.
        held_out: Called with the number of a batch of other data; returns what `loss` returns.
        held_out_batches: How many of them there are, on every rank.
        fisher_loss: Called alike; returns the loss against labels sampled from the predictions, or a pair of it and the
            number of terms it is the mean of; ``None``: labels are drawn for the functions that `loss` calls.
        hvp: "exact": differentiate twice; "finite_difference": differences of gradients; "auto": exact, and
            differences from the first failure on, or from the beginning where parameters are sharded.
        seed: Seed of everything random.
        tick: Called after every gradient or product.

    Attributes:
        parameters: What is differentiated in.
        coordinates: What vectors consist of.
        movable: The tensors whose parts they are, to be moved.
        ranks: All ranks together.
        names: Their names.
        exact: Whether products are exact.
    """

    def __init__(
        self,
        host: Host,
        module: nn.Module,
        loss: Callable[[int], Any],
        batches: int,
        *,
        held_out: Callable[[int], Any] | None = None,
        held_out_batches: int = 0,
        fisher_loss: Callable[[int], Any] | None = None,
        hvp: str = "auto",
        seed: int = 0,
        tick: Callable[[], Any] = lambda: None,
    ) -> None:
        check_products(hvp, module)
        self.host = host
        self.ranks = all_ranks(host)
        self.module = module
        self.batches = range(batches)
        self.held_out_batches = range(held_out_batches if held_out is not None else 0)
        self._loss_of = loss
        self._held_out = held_out
        self._fisher_loss = fisher_loss
        self.seed = seed
        self.tick = tick
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.coordinates = Coordinates(self.parameters)
        self._sharded = self.coordinates.sharded
        self.movable = self.parameters if self._sharded else self.coordinates.parts
        self._gathered = GatheredWeights(module)
        self._precision = coarsest(gathered_dtypes(module))
        self.exact = hvp != "finite_difference" and not self._sharded
        self._may_fall_back = hvp == "auto"
        self._graph: list[Tensor | None] | None = None
        self._sampled: list[Any] | None = None
        self._start: ModuleState | None = None
        self._attributes: AttributeState | None = None
        self._noise: int | None = None

    def generator(self, *purpose: object) -> torch.Generator:
        """A random generator on the first parameter's device, the same on all ranks and in every measurement.

        Args:
            *purpose: What it is for: different purposes get unrelated streams.
        """
        return torch.Generator(self.parameters[0].device).manual_seed(mixed_seed(self.seed, *purpose))

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Inside the block every layer is in one mode; after it each is in its own again.

        Args:
            mode: "eval": BatchNorm's running statistics, no dropout; "train": statistics of the batches, the
                same dropout masks at every evaluation.

        Yields:
            Nothing.
        """
        modes = [(part, part.training) for part in self.module.modules()]
        self.release()
        modules = modules_of(self.module)
        frozen = [weight for weight in weights_of(modules) if not weight.requires_grad]
        frozen = frozen if few_of(frozen, weights_of(modules)) else []  # a backbone: put back by `measuring` alone
        self._start, self._attributes = ModuleState(modules, frozen), AttributeState(modules)
        try:
            for part, _ in modes:  # the attribute itself: `train()` may be overridden to do more
                part.training = mode == "train"
            yield
        finally:
            for part, training in modes:
                part.training = training
            self.release()
            self._start.restore()

    @contextmanager
    def noise(self, number: int) -> Iterator[None]:
        """Inside the block random layers draw other numbers: the same ones for the same number.

        Args:
            number: Which ones.

        Yields:
            Nothing.
        """
        before, self._noise = self._noise, number
        self.release()
        try:
            yield
        finally:
            self._noise = before
            self.release()

    @property
    def dtype(self) -> torch.dtype:
        """Type of flat vectors."""
        return self.coordinates.dtype

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.coordinates.size

    def of_all_devices(self, compute: Callable[[], T]) -> T:
        """What this device computes, if all devices can do their part; else an error on all of them.

        Args:
            compute: Called once.
        """
        return self._together(compute)

    def of_each_device(self, compute: Callable[[], float]) -> Tensor:
        """The numbers of all devices that have batches of their own, the same on all; an error on one is one on all.

        Args:
            compute: Gives this device's; called once.
        """
        return self._of_each_device(lambda: torch.tensor([compute()], dtype=self.dtype), 1).flatten()

    def average(self, number: float) -> float:
        """The mean of the devices' numbers.

        Args:
            number: This device's.
        """
        return float(self._mean_over_devices(lambda: torch.tensor([number], dtype=self.dtype), 1))

    def check_memory(self, vectors: int) -> None:
        """Raise on all devices if one of them has no room for some vectors of the coordinates' size.

        Args:
            vectors: How many.
        """
        device = self.parameters[0].device
        length = self.coordinates.length
        raise_on_all_ranks(self.ranks, lambda: torch.empty(vectors, length, dtype=self.dtype, device=device), _WHO)

    def release(self) -> None:
        """Free the graphs that are kept between products, and gathered weights; to be called before weights move."""
        self._graph = self._sampled = None
        self._gathered.drop()

    # Values and gradients

    def loss(self) -> float:
        """The loss at the current weights."""
        return self._mean_of(lambda index: local(self._loss(index).detach()))

    def loss_at(self, moves: Sequence[Tensor | None]) -> float:
        """The loss where the weights are moved.

        Args:
            moves: By how much, one tensor for each of :attr:`movable`.
        """
        with perturbed(self.movable, moves):
            return self.loss()

    def losses(self, held_out: bool = False) -> Tensor:
        """The loss on each batch of each device, the same numbers on all devices.

        Args:
            held_out: Whether on the batches of other data.

        Returns:
            Shape [devices that have batches of their own, batches].
        """
        which = self.held_out_batches if held_out else self.batches
        step = self._held_out if held_out else self._loss_of

        def compute() -> Tensor:
            found = [local(self._loss(index, step).detach()).to(self.parameters[0].device) for index in which]
            return torch.stack(found).reshape(-1)

        return self._of_each_device(compute, len(which))

    def gradient(self) -> Tensor:
        """The gradient at the current weights, as one vector."""
        return self._vector(self._local_gradient)

    def ascent_gap(self, rho: float) -> float:
        """L(theta + rho g / ||g||) - L(theta).

        Args:
            rho: Radius in weight units.
        """
        return self.ascent_gaps([rho])[0][0]

    def ascent_gaps(
        self, radii: Sequence[float], adaptive: bool | Sequence[bool] = False, eta: float = 0.0
    ) -> tuple[list[float], float, float]:
        r"""L(theta + d(rho)) - L(theta) for several radii of SAM's displacement d, at one gradient.

        Args:
            radii: In weight units, or relative to the weights.
            adaptive: See :func:`~lightning_ire.functional.sam_displacement`; one truth for each of :attr:`names`.
            eta: Added to the size of weights.

        Returns:
            The gaps, L(theta), and \|\|g\|\| (adaptive: \|\|T g\|\|), which times rho is a gap's first order.

        Cost: one forward and backward pass, and a forward pass for each radius and one more.
        """
        gradient = self.coordinates.split(self.gradient())
        before, gaps, norm = self.loss(), [], torch.zeros(())
        for rho in radii:
            moves, norm = sam_displacement(self.movable, gradient, rho, adaptive=adaptive, eta=eta)
            gaps.append(self.loss_at(moves) - before)
        return gaps, before, float(norm)

    def gradient_deviations(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        r"""How much the gradients g_j of single batches differ from their mean g.

        Args:
            scale: s, one number for each coordinate.

        Returns:
            g; and of every batch \|\|g_j - g\|\|^2 and sum_k s_k (g_j - g)_k^2, shape [batches of all devices, 2].
            Of sharded parameters only the gradient of all devices together is known: a batch is then those of all.

        Cost: two forward and backward passes over each batch; three vectors.
        """
        mean = self.gradient()

        def of_batch(index: int) -> Tensor:
            self.tick()
            return self.coordinates.flatten(self._first_order(self._loss(index))) - mean

        def squares(deviation: Tensor) -> Tensor:
            pairs = (deviation, scale * deviation)
            return in_double(torch.stack([self.coordinates.dot(deviation, one) for one in pairs]))

        if self._sharded:
            parts = [squares(self._together(lambda index=index: of_batch(index))) for index in self.batches]  # type: ignore[misc]
            return mean, torch.stack(parts)
        found = self._of_each_device(
            lambda: torch.stack([squares(of_batch(index)) for index in self.batches]).reshape(-1), 2 * len(self.batches)
        )
        return mean, in_double(found).reshape(-1, 2)

    # Hessian

    def product(self, vector: Tensor) -> Tensor:
        """H v, one all-reduce of a vector (of sharded parameters: none).

        Args:
            vector: v, the same on all devices.
        """
        return self.batch_product(vector, self.batches)

    def batch_product(self, vector: Tensor, batches: Sequence[int]) -> Tensor:
        """H_B v for the mean loss over some of the batches (the same ones of each device).

        Args:
            vector: v, the same on all devices.
            batches: Which batches.
        """
        return self._with_fallback(lambda: self._vector(lambda: self._local_product(vector, batches)))

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """w^T H u in parts: w_l . (H u)_l for each parameter tensor l; only these numbers are all-reduced.

        Args:
            left: w, the same on all devices.
            right: u, the same on all devices.
        """

        def compute() -> Tensor:
            pieces = self._local_product(right, self.batches)
            parts = self.coordinates.split(left)
            dots = [
                left.new_zeros(()) if piece is None else (part.to(left) * piece.to(left)).sum()
                for part, piece in zip(parts, pieces, strict=True)
            ]
            return torch.stack(dots)

        def all_devices() -> Tensor:
            if self._sharded:
                return self.coordinates.sums(self._together(compute))
            return self._mean_over_devices(compute, len(self.parameters))

        return self._with_fallback(all_devices)

    # Fisher

    def fisher_trace(self, draw: int, all_labels: bool = False) -> float:
        """One draw of B ||G||^2 (eq. 6), each batch and device with targets of its own; unbiased for Tr F.

        The trace is linear, so that the mean over batches and devices is that of all of them. Of sharded parameters
        only the gradient of all devices together is known: their targets together make one draw, of more variance.

        Args:
            draw: Number of the draw; the same number gives the same labels.
            all_labels: Whether, where targets are labels, all of them are taken with random signs, none drawn
                (see :mod:`lightning_ire.functional.sampled_losses`).
        """
        return self._mean_of(lambda index: self._local_fisher(index, draw, all_labels))

    def fisher_diagonal(self, draw: int, all_labels: bool = False) -> list[Tensor]:
        """One draw of the diagonal of F, as :meth:`fisher_trace` is one of its trace; unbiased.

        Args:
            draw: Number of the draw.
            all_labels: As there.

        Returns:
            One tensor for each parameter (complex ones as pairs, of sharded ones this rank's part).
        """

        def compute() -> list[Tensor | None]:
            total: list[Tensor | None] = [None] * len(self.parameters)
            for index in self.batches:
                gradients = self._score_gradients(index, draw, all_labels)
                squares = [None if g is None else g.detach().to_dense().to(self.dtype).square() for g in gradients]
                total = _sum(total, squares, 1 / len(self.batches))
            return total

        found = self._vector(compute)
        return self.coordinates.split(found * self.host.world_size if self._sharded else found)

    def label_scores(self, predictions: int) -> Tensor:
        r"""The factors of the Gauss-Newton matrices H_i of single predictions' losses, on this device's first batch.

        Row (i, c) is sqrt(n w_i p_c) grad log p_c, of label c with probability p_c, for n predictions that weigh w_i in
        the mean loss, so that H_i = sum_c row row^T (1 / n is what the mean loss divides by).

        Args:
            predictions: How many, spread evenly over those of the batch; so many fewer that there are at most 10 rows
                for each of this number.

        Returns:
            Shape [predictions, labels, coordinates].

        Raises:
            ValueError: If the loss is not one of labels, or has so many that not even two predictions are left.

        Cost: a backward pass over the whole batch, and a vector, for each row.
        """
        terms = self._sampled_terms(self.batches[0])
        if len(terms) != 1 or terms[0][0].labels is None:
            raise ValueError("the loss is not one cross entropy, of labels with probabilities, but something else")
        ((call, factor),) = terms
        log_p = call.labels()
        log_p = log_p.reshape(-1, log_p.size(-1))
        weights = call.draw(generator=torch.Generator().manual_seed(0)).times(factor).weights.reshape(-1)
        counted = weights.nonzero().flatten()
        if not len(counted):
            raise ValueError("no prediction of the probe counts in the loss")
        rows_at_most, labels = LABELS_OF_A_SAMPLE * predictions, log_p.size(-1)
        count = min(predictions, len(counted), rows_at_most // labels)
        if count < 2:
            raise ValueError(
                f"{labels} labels of two samples are more than {rows_at_most} backward passes: raise `num_samples` to "
                f"{math.ceil(2 * labels / LABELS_OF_A_SAMPLE)}"
                if len(counted) > 1
                else "two samples are compared and the batch has one: raise `batch_size`"
            )
        chosen = counted[torch.linspace(0, len(counted) - 1, count, device=counted.device).round().long()]
        rows = []
        for i in chosen.tolist():
            for c in range(labels):
                one = log_p[i, c]
                start = (one.detach().to(self.dtype) / 2).exp() * (weights[i].to(self.dtype) * len(counted)).sqrt()
                rows.append(self.coordinates.flatten(self._gradients([one], [start.to(one)], keep=True)))
                self.tick()
        return torch.stack(rows).reshape(count, -1, self.size)

    # One device, one batch

    def _output(self, index: int, step: Callable[[int], Any], seed: int | None = None) -> Any:
        """What a function returns on a batch: always the same random numbers and buffers."""
        self.release()  # a kept graph may use the buffers
        if self._start is not None and self._attributes is not None:
            self._start.restore()
            self._attributes.restore(replay=True)
        if seed is None:
            other = () if self._noise is None else ("noise", self._noise)
            seed = mixed_seed(self.seed, "pass", index, self.host.rank, *other)
        with seeded(seed, devices_of(self.module)):
            return step(index)

    def _loss(self, index: int, step: Callable[[int], Any] | None = None) -> Tensor:
        return self._if_all_can(lambda: self._own_loss(index, step or self._loss_of))

    def _own_loss(self, index: int, step: Callable[[int], Any]) -> Tensor:
        loss = loss_of(self._output(index, step))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"{type(self.module).__name__} returned no loss on the probe")
        return loss if loss.dim() == 0 else loss.reshape(())

    def _local_gradient(self) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * len(self.parameters)
        for index in self.batches:
            total = _sum(total, self._first_order(self._loss(index)), 1 / len(self.batches))
            self.tick()
        return total

    def _first_order(self, loss: Tensor) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(self.parameters)
        return self._gradients([loss], [torch.ones_like(loss)], keep=False)

    def _gradients(self, outputs: list[Tensor], starts: list[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """Of this device; of sharded parameters the parts of the mean over the devices."""
        found: Sequence[Tensor | None]
        if self._gathered:  # the graph's leaves are the gathered copies
            found = gradients_by_backward(outputs, starts, self.parameters, keep_graph=keep)
            if all(gradient is None for gradient in found):
                raise RuntimeError(
                    "the backward pass left no gradient in the sharded parameters: call "
                    "`set_requires_gradient_sync(True)` of the FSDP modules before measuring"
                )
            return _real(found)
        try:  # the graph is kept for a second try, and freed with the last reference to it
            found = torch.autograd.grad(outputs, self.parameters, starts, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():  # reentrant checkpointing refuses autograd.grad
                raise
            with self.host.no_sync():
                found = gradients_by_backward(outputs, starts, self.parameters, keep_graph=keep)
        return _real([local(gradient, parameter) for gradient, parameter in zip(found, self.parameters, strict=True)])

    def _local_product(self, vector: Tensor, batches: Sequence[int]) -> list[Tensor | None]:
        pieces = self.coordinates.split(vector)
        total: list[Tensor | None] = [None] * len(self.parameters)
        for index in batches:
            if self.exact:
                product = _real(hessian_product(self._gradient_with_graph(index), self.parameters, pieces))
            else:
                product = finite_difference_product(
                    lambda index=index: self._first_order(self._loss(index)),  # type: ignore[misc]
                    self.movable,
                    pieces,
                    precision=self._precision,
                )
            total = _sum(total, product, 1 / len(batches))
            self.tick()
        return total

    def _gradient_with_graph(self, index: int) -> list[Tensor | None]:
        """Kept between products if there is only one batch."""
        if self._graph is not None:
            return self._graph
        loss = self._loss(index)
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        if loss.requires_grad:
            gradients = _real(torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True))
            if differentiable_once(gradients):
                raise RuntimeError("a function in the loss has a backward pass without a derivative")
        if len(self.batches) == 1:
            self._graph = gradients
        return gradients

    def _score_gradients(self, index: int, draw: int, all_labels: bool) -> Sequence[Tensor | None]:
        outputs, starts = self._if_all_can(lambda: self._score(index, draw, all_labels))
        gradients = self._gradients(outputs, starts, keep=self._sampled is not None)
        self.tick()
        return gradients

    def _local_fisher(self, index: int, draw: int, all_labels: bool) -> Tensor:
        gradients = self._score_gradients(index, draw, all_labels)
        wide = self.dtype
        squares = [0.0 if g is None else float(g.detach().to_dense().to(wide).square().sum()) for g in gradients]
        if self._sharded:  # of the mean of the devices' gradients, each with the factor of its own batch
            return self.host.world_size * self.coordinates.sums(torch.tensor(squares, dtype=wide)).sum()
        return torch.tensor(sum(squares), dtype=wide)

    def _score(self, index: int, draw: int, all_labels: bool) -> tuple[list[Tensor], list[Tensor]]:
        """What the gradient of a draw is that of, outputs and their weights."""
        labels = mixed_seed(self.seed, "labels", index, draw, self.host.rank)
        if self._fisher_loss is not None and all_labels:
            raise ValueError("it takes all labels of a known loss, and a `fisher_loss` draws them itself")
        if self._fisher_loss is not None:
            returned = self._output(index, self._fisher_loss, seed=labels)
            loss, count = returned if isinstance(returned, tuple) else (returned, 1.0)
            return [loss], [torch.ones_like(loss) * float(count) ** 0.5]
        source = torch.Generator().manual_seed(labels)
        drawn = [
            call.draw(generator=source, **({"labels": "all"} if all_labels and call.labels else {})).times(factor)
            for call, factor in self._sampled_terms(index)
        ]
        return [term.losses for term in drawn], [term.weights.sqrt().to(term.losses) for term in drawn]

    def _sampled_terms(self, index: int) -> list[Any]:
        """The losses that targets can be drawn for, with their factors; kept if there is only one batch."""
        if self._sampled is not None:
            return self._sampled
        tap = LossTap(None)
        with tap:
            loss = self._loss(index)
        used = factors_in(loss, tap)
        if not used:
            raise ValueError(
                f"the loss of {type(self.module).__name__} is not made with {known_losses()}: give it a method "
                "`fisher_loss(batch, batch_idx)` (in a loop of your own: the argument `fisher_loss`) that returns its "
                "loss against labels sampled from its predictions"
            )
        if len(self.batches) == 1:
            self._sampled = used
        return used

    # All devices

    def _if_all_can(self, compute: Callable[[], T]) -> T:
        """What this device computes; where a backward pass comes next that none can do alone, if all could do it."""
        return raise_on_all_ranks(self.ranks, compute, _WHO) if self._sharded else compute()

    def _together(self, compute: Callable[[], T]) -> T:
        """What this device computes, an error on one of them being an error on all."""
        try:
            return raise_on_all_ranks(self.ranks, compute, _WHO)
        except FailedTogether:
            self.release()
            raise

    def _vector(self, compute: Callable[[], Sequence[Tensor | None]]) -> Tensor:
        """The mean of the devices' tensors as a vector; of sharded parameters they are the mean's parts by now."""
        if self._sharded:
            return self.coordinates.flatten(self._together(compute))
        return self._mean_over_devices(lambda: self.coordinates.flatten(compute()), self.size)

    def _with_fallback(self, compute: Callable[[], Tensor]) -> Tensor:
        try:
            return compute()
        except FailedTogether as error:
            if error.out_of_memory or not (self.exact and self._may_fall_back):
                raise
            self.exact = False
            self.release()
            try:
                product = compute()
            except FailedTogether:  # it is not the second derivative that fails
                self.exact = True
                raise
            warn_on_rank_zero(
                "SharpnessMonitor: the loss cannot be differentiated twice, so Hessian products are differences of "
                f"gradients from now on (less accurate; set `hvp` to 'finite_difference' to choose that): {error}"
            )
            return product

    def _mean_of(self, value: Callable[[int], Tensor]) -> float:
        """Mean of a number over all batches of all devices."""

        def compute() -> Tensor:
            return torch.stack([value(index).to(self.parameters[0].device) for index in self.batches]).reshape(-1)

        return float(in_double(self._mean_over_devices(compute, len(self.batches))).mean())

    def _of_each_device(self, compute: Callable[[], Tensor], size: int) -> Tensor:
        """What each device that has batches of its own computes, a row for each, the same on all."""
        rows = self.host.world_size

        def padded() -> Tensor:
            found = compute()
            place = found.new_zeros(rows, size)
            place[self.host.rank] = found * rows
            return place.reshape(-1)

        return self._mean_over_devices(padded, rows * size).reshape(rows, size)

    def _mean_over_devices(self, compute: Callable[[], Tensor], size: int) -> Tensor:
        """The mean of what the devices compute, the same on all; an error on one of them is an error on all."""
        like = torch.zeros(size, dtype=self.dtype, device=self.parameters[0].device)
        try:
            return mean_over_ranks(self.ranks, compute, like, _WHO)
        except FailedTogether:
            self.release()
            raise


def _real(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else as_real(gradient) for gradient in gradients]


def _sum(total: Sequence[Tensor | None], more: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
    pairs = zip(total, more, strict=True)
    return [
        before if new is None else new.detach() * factor if before is None else before + new.detach() * factor
        for before, new in pairs
    ]
