"""The Fisher information from targets drawn from the model (eq. 6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.curvature.base import Curvature, Estimate, MicroBatch, Window, finite_or_none
from lightning_ire.curvature.batches import part_of, samples_to_cut
from lightning_ire.curvature.per_sample import one_by_one, squares_at_once
from lightning_ire.curvature.shared_forward import SharedForward, refused_by_checkpointing
from lightning_ire.curvature.tap import LossCall, LossTap, factors_in, known_losses
from lightning_ire.functional import fisher_diagonal, gradients_by_backward, in_double, local, products

__all__ = ["SampledFisher"]

Form = Literal["batch", "micro_batch", "sample"]


class SampledFisher(Curvature):
    r"""h = B * G * G, G the gradient of the loss against targets drawn from the model.

    Eq. 6 of the IRE paper (arXiv 2405.20763), "GNB" in Sophia (Liu et al., arXiv 2305.14342): an unbiased estimate of
    the diagonal of the generalized Gauss-Newton matrix of the training loss, which is its Fisher information.

    Which losses: whatever `training_step` makes with these functions of torch, or the layers of these names:

    - `cross_entropy`, `nll_loss` and `kl_div` from soft labels: labels are drawn from the softmax.
    - `binary_cross_entropy_with_logits` and `binary_cross_entropy`: labels are drawn from the sigmoid.
    - `mse_loss`: targets are drawn from N(prediction, 1/2). `gaussian_nll_loss`: from N(prediction, variance).
    - `poisson_nll_loss`: counts are drawn from the predicted rates.
    - `log_prob` of a `torch.distributions` distribution: values are drawn with its `sample()`.
    - Cross entropies by hand: sums of `log_softmax` with weights <= 0, if nothing else but known losses and penalties
      on weights follows from the predictions. Labels are drawn from the softmax.

    In a loss of several terms each such term counts with its factor in the loss; other terms (penalties) do not count.
    In the last four kinds and `kl_div` a term counts only where it is a likelihood: its factor has the right sign and
    depends on no parameter that the prediction depends on, so no policy gradients, focal losses by hand, or entropies.
    Weights, reduction and ignored positions are those of the training loss; a class weight counts as that of the
    training target; label smoothing and soft targets do not change the curvature. (How:
    :mod:`lightning_ire.functional.sampled_losses`.)

    How the gradient is had, first of these that applies:

    - The module has a method ``fisher_loss(batch, batch_idx)``: it returns the mean loss against sampled targets, or a
      pair of that and its number of predictions. It runs in a pass of its own, with torch's random numbers seeded.
    - The training forward pass is used again: an estimate costs one more backward pass and no forward pass.
    - Where that cannot be (`fraction`, `form="sample"`, AverageSAM, some compiled or checkpointed modules): a pass of
      its own.

    What is squared (`form`), all with the same expectation where the loss is a mean over samples of equal weight:

    - "batch": the gradient of the whole window on all devices (the paper). One draw of a coordinate is like one
      chi-squared number: relative standard deviation about sqrt(2).
    - "micro_batch": the gradient of each micro-batch on each device, and the squares are averaged: with k of them about
      sqrt(2 / k). Free under gradient accumulation, or on several devices; with `micro_batch_size` the batch is cut,
      and each piece counts by its number of samples, as if the loss were their mean.
    - "sample": each sample's gradient, with `torch.func`: sqrt(2 / n) for n samples. Layers with running statistics
      (BatchNorm) use them. Needs a step that returns what one call of a loss function returned; else, and where
      torch.func cannot follow the step (`.item()`, ...), a slow loop over samples, with a warning.

    Args:
        fraction: Part of each micro-batch used, in (0, 1]: the first `ceil(fraction * n)` of its n samples. Below 1
            the estimate needs a forward pass of its own, on that part. To be cut, a batch is made of tensors in
            tuples, lists and mappings whose first dimension goes over the samples (size 1 and no dimension: of all).
        form: "batch", "micro_batch" or "sample".
        micro_batch_size: With form "micro_batch": cut batches into pieces of so many samples, each with a forward pass
            of its own. Default: the micro-batches of gradient accumulation, each device's by itself.

    Raises:
        ConfigurationError: If an argument is out of range; during training, if none of these losses is to be seen, or
            a batch that is to be cut does not fit.

    Cost per estimate: one backward pass (shared forward), or the forward and backward passes of the part of the batch
    that is used; one gradient-sized buffer ("sample": gradients of up to 2^26 numbers more).
    """

    def __init__(self, fraction: float = 1.0, form: Form = "batch", micro_batch_size: int | None = None) -> None:
        self.fraction = check_number("fraction", fraction, high=1.0, low_open=True)
        self.form = check_choice("form", form, ("batch", "micro_batch", "sample"))
        self.micro_batch_size = None
        if micro_batch_size is not None:
            self.micro_batch_size = check_whole("micro_batch_size", micro_batch_size, low=1)
            if form != "micro_batch":
                raise ConfigurationError(
                    f"Expected `micro_batch_size` with form='micro_batch' only, got form={form!r}: set `form` to "
                    "'micro_batch' or `micro_batch_size` to null."
                )

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _SampledSquare(window, self)

    @property
    def needs_whole(self) -> str:
        """See the base class."""
        if self.form == "batch":
            return ""
        return "no device has a gradient of its own to square; set `curvature.form` to 'batch'"

    @property
    def remedy(self) -> str:
        """What to change for whole batches to be taken; empty: they are."""
        changes = ["`fraction` to 1"] if self.fraction < 1 else []
        changes += ["`micro_batch_size` to null"] if self.micro_batch_size is not None else []
        changes += ["`form` to 'batch'"] if self.form == "sample" else []
        return "set " + " and ".join(changes) if changes else ""

    def __repr__(self) -> str:
        changed = [f"fraction={self.fraction:g}"] if self.fraction != 1 else []
        changed += [f"form={self.form!r}"] if self.form != "batch" else []
        changed += [f"micro_batch_size={self.micro_batch_size}"] if self.micro_batch_size else []
        return f"SampledFisher({', '.join(changed)})"


class _SampledSquare(SharedForward):
    """Adds up gradients of scores ("batch") or their squares, piece by piece; a piece is what one pass goes over."""

    def __init__(self, window: Window, settings: SampledFisher) -> None:
        super().__init__(window, "SampledFisher")
        self.settings = settings
        self.fisher_loss = getattr(window.module, "fisher_loss", None)
        self.sums: list[Tensor | None] = [None] * len(window.parameters)
        self.pieces: list[Tensor] = []  # 1, or 0 without a prediction that counts, times its share of its micro-batch
        self.share_of_batch = 1.0
        self.squared = 0
        self.tap: LossTap | None = None
        self.label_states: dict[MicroBatch, Tensor] = {}
        self.by_backward = False  # reentrant checkpointing refuses autograd.grad
        self.cuts = bool(settings.remedy)
        self.shares = self.fisher_loss is None and window.unmoved and not self.cuts

    def watch(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        self.tap = None
        if not self.shares:
            return nullcontext()
        self.label_states[micro_batch] = self.window.labels.get_state()
        self.tap = LossTap(self.window.labels)
        return self.tap

    def share(self, micro_batch: MicroBatch, loss: Tensor) -> bool:
        if self.tap is None or self.by_backward:
            return False
        try:
            used = factors_in(loss, self.tap)
            if not used:
                return False
            self._add_terms(used, keep_graph=True)
        except RuntimeError as error:
            self.by_backward = refused_by_checkpointing(error)
            raise
        done = {id(one) for call, _ in used for one in (call, call.source)}
        # in manual optimization one step may go backward several times
        self.tap.calls = [call for call in self.tap.calls if id(call) not in done]
        return True

    def forget(self) -> None:
        """See the base class. Calls that were seen stay: their loss may be back-propagated after zero_grad."""
        super().forget()
        self.sums = [None] * len(self.window.parameters)
        self.pieces = []
        self.squared = 0

    def finish(self) -> list[Tensor | None] | None:
        self.tap = None
        self.run_own_passes()
        sums = self.window.average(self.sums)
        device = next((total.device for total in sums if total is not None), None)
        if device is None:  # nothing back-propagated
            return None
        counted = [piece.to(device, torch.float32) for piece in self.pieces] or [torch.zeros((), device=device)]
        pieces = self.window.total(torch.stack(counted).sum())
        # without a prediction that counts anywhere (all positions ignored) 0 / 0 below, which is not finite
        world = self.window.world_size
        if self.settings.form == "batch":
            return finite_or_none(fisher_diagonal(sums, world**2 / pieces), self.window.parameters)
        if self.settings.form == "micro_batch" and self.squared == world == 1:
            warnings.warn(
                "SampledFisher(form='micro_batch') has one micro-batch only, which is form='batch': set "
                "`micro_batch_size`, or `trainer.accumulate_grad_batches`.",
                stacklevel=2,
            )
        means = [None if total is None else total * (world / pieces).to(total.device) for total in sums]
        return finite_or_none(means, self.window.parameters)

    def own_pass(self, micro_batch: MicroBatch) -> None:
        """With the labels that a shared pass would have drawn."""
        labels = self.window.labels
        state = self.label_states.get(micro_batch, labels.get_state())
        for _ in range(2):
            labels.set_state(state)
            try:
                return self._passes(micro_batch)
            except RuntimeError as error:
                if self.by_backward or not refused_by_checkpointing(error):
                    raise
                self.by_backward = True

    def _passes(self, micro_batch: MicroBatch) -> None:
        """All pieces of a micro-batch."""
        if not self.cuts:
            self._forward_and_backward(micro_batch, micro_batch.args)
            return
        with self._blaming_the_cut():
            batch, *rest = micro_batch.args or (None,)
            samples = samples_to_cut(batch, self.settings, self.settings.remedy)
            count = math.ceil(self.settings.fraction * samples)
            args = (batch if self.settings.fraction == 1 else part_of(batch, 0, count), *rest)
            if self.settings.form != "sample":
                self._one_after_the_other(micro_batch, args, count, self.settings.micro_batch_size or count)
                return
            at_once = None if self.fisher_loss is not None else squares_at_once(self.window, micro_batch, args)
            if at_once is not None:
                squares, counted = at_once
                self._add_to_sums(squares)
                self.pieces.append(counted)
                return
            warnings.warn(
                "SampledFisher(form='sample') takes the samples one by one here, which is slow.", stacklevel=2
            )
            with one_by_one(self.window.module):
                self._one_after_the_other(micro_batch, args, count, 1)

    def _one_after_the_other(self, micro_batch: MicroBatch, args: tuple[Any, ...], count: int, size: int) -> None:
        """Pieces of so many of the `count` samples, each with its share of them."""
        for start in range(0, count, max(size, 1)):
            stop = min(start + size, count)
            self.share_of_batch = (stop - start) / count
            piece = args[0] if stop - start == count else part_of(args[0], start, stop)
            self._forward_and_backward(micro_batch, (piece, *args[1:]))
        self.share_of_batch = 1.0

    @contextmanager
    def _blaming_the_cut(self) -> Iterator[None]:
        """What fails on a part of a batch has just worked on the whole of it."""
        try:
            yield
        except (ConfigurationError, torch.OutOfMemoryError, Warning):
            raise
        except Exception as error:  # whatever the user's code raises
            if isinstance(error, RuntimeError) and not self.by_backward and refused_by_checkpointing(error):
                raise
            own = f"`{type(self.window.module).__name__}.fisher_loss`"
            what = self.window.what_steps if self.fisher_loss is None else own
            reason = (str(error).strip() or "no reason given").split("\n")[0]
            raise ConfigurationError(
                f"Expected {what} to take a batch that {self.settings!r} has cut "
                f"in its first dimension, got {type(error).__name__} ({reason}): {self.settings.remedy}, or put the "
                "samples first."
            ) from error

    def _forward_and_backward(self, micro_batch: MicroBatch, args: tuple[Any, ...]) -> None:
        if self.fisher_loss is not None:
            self._users_loss(micro_batch, args)
            return
        tap = LossTap(self.window.labels)
        with self.window.rerun(micro_batch, tap, *args) as loss:
            used = factors_in(loss, tap) if isinstance(loss, Tensor) else []
            if not used:
                raise _nothing_intercepted(self.window)
            self._add_terms(used, keep_graph=False)

    def _users_loss(self, micro_batch: MicroBatch, args: tuple[Any, ...]) -> None:
        seeded = _Seeded(int(torch.randint(2**62, (), generator=self.window.labels)))
        with self.window.rerun(micro_batch, seeded, *args, step=self.fisher_loss) as returned:
            loss, count = returned if isinstance(returned, tuple) else (returned, 1.0)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ConfigurationError(
                    "Expected `fisher_loss` to return a scalar loss with a graph, or a pair of it and the number of "
                    f"predictions, got {type(returned).__name__}."
                )
            root = in_double(count).sqrt()
            self._add([loss], [torch.ones_like(loss)], root, root > 0, keep_graph=False)

    def _add_terms(self, used: Sequence[tuple[LossCall, Tensor]], keep_graph: bool) -> None:
        """Add the gradient of sum_i sqrt(w_i) l_i over the predictions of all terms, w_i their weight in the loss."""
        drawn = [call.sampled.times(factor) for call, factor in used if call.sampled is not None]
        device = drawn[0].weights.device
        total = torch.stack([term.weights.sum().to(device) for term in drawn]).sum()
        # backward passes as large as those of training, where fp16 must neither under- nor overflow: sqrt(w_i) times
        # the root of the mean weight is w_i where all are equal
        root = (total / max(sum(term.weights.numel() for term in drawn), 1)).sqrt()
        root = root.clamp(min=torch.finfo(root.dtype).tiny)
        starts = [(term.weights.sqrt() * root.to(term.weights.device)).to(term.losses) for term in drawn]
        self._add([term.losses for term in drawn], starts, 1 / root, total > 0, keep_graph)

    def _add(
        self, outputs: list[Tensor], starts: list[Tensor], factor: Tensor, counts: Tensor, keep_graph: bool
    ) -> None:
        """Add a piece: the gradient of sum(outputs * starts), times a factor."""
        scale = self.window.scale * self.window.share  # as in training
        starts = [start * scale for start in starts]
        indices = [index for index, parameter in enumerate(self.window.parameters) if parameter.requires_grad]
        parameters = [self.window.parameters[index] for index in indices]
        if not parameters:  # all frozen for the time of this backward pass (`toggle_model` of another optimizer)
            return
        gradients: Sequence[Tensor | None]
        if self.window.gathers:  # the backward pass averages over devices: this one's own factor has to be in before
            starts = [start * factor.to(start) for start in starts]
            factor = torch.ones_like(factor)
            gradients = gradients_by_backward(outputs, starts, parameters, keep_graph=keep_graph)
        elif self.by_backward:
            gradients = gradients_by_backward(outputs, starts, parameters)
        else:
            gradients = torch.autograd.grad(outputs, parameters, starts, retain_graph=keep_graph, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            return
        seen = [index for index, gradient in zip(indices, gradients, strict=True) if gradient is not None]
        pairs = zip(gradients, parameters, strict=True)
        dense = [
            local(gradient, parameter).detach().to_dense() for gradient, parameter in pairs if gradient is not None
        ]
        wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in dense]
        found: Sequence[Tensor | None] = products(wide, factor / scale)
        if self.settings.form != "batch":
            found = fisher_diagonal(found, self.share_of_batch)
        pieces: list[Tensor | None] = [None] * len(self.sums)
        for index, piece in zip(seen, found, strict=True):
            pieces[index] = piece
        self._add_to_sums(pieces)
        self.pieces.append(counts * self.share_of_batch)
        self.squared += 1

    def _add_to_sums(self, pieces: Sequence[Tensor | None]) -> None:
        for index, piece in enumerate(pieces):
            if piece is not None:
                before = self.sums[index]
                self.sums[index] = piece if before is None else before.add_(piece)


class _Seeded(AbstractContextManager[None]):
    """Seeds torch's global stream; the caller puts all streams back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        torch.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        return None


def _nothing_intercepted(window: Window) -> ConfigurationError:
    name = type(window.module).__name__
    return ConfigurationError(
        f"Expected {window.what_steps} to return a loss made with {known_losses()}, for SampledFisher to draw "
        f"targets for it, got none: give {name} a method `fisher_loss(batch, batch_idx)` that returns its loss against "
        "targets sampled from its own predictions, or set `curvature` to EmpiricalFisher()."
    )
