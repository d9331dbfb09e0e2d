"""The diagonal of the Hessian from products with random signs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_ire._checks import check_whole
from lightning_ire.curvature.base import Curvature, Estimate, MicroBatch, Window, finite_or_none
from lightning_ire.curvature.shared_forward import SharedForward, refused_by_checkpointing
from lightning_ire.functional import (
    finite_difference_product,
    gradients_by_backward,
    hessian_product,
    is_sharded,
    local,
    part_of_whole,
    rademacher,
    twice_differentiable,
)

__all__ = ["HutchinsonHessian"]


class HutchinsonHessian(Curvature):
    """h = mean of v * (H v) over random signs v: an unbiased estimate of the Hessian's diagonal.

    H is the Hessian of the training loss itself, all its terms included, whatever it is made of; no labels are drawn.
    Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix"; as a preconditioner in AdaHessian (Yao
    et al., arXiv 2006.00719). The variance of a coordinate for one v is the sum of the squares of the other entries of
    its row. The ranking is by |h|, so that a strongly negative curvature counts as sharp.

    Where the training forward pass can be differentiated twice it is used again; else (attention kernels, cuDNN,
    compiled modules) the step runs once more with the math kernel, without cuDNN, uncompiled; a loss with no second
    derivative is measured by differences of gradients, with a warning; so are, without one, sharded parameters.

    Args:
        num_vectors: Random sign vectors per estimate, >= 1.

    Raises:
        ConfigurationError: If `num_vectors` is out of range.

    Cost per estimate: a backward pass that keeps its graph and, for each vector, a backward pass through both; memory
    for the graph of the gradient, about as much again as the training forward pass keeps.
    """

    def __init__(self, num_vectors: int = 1) -> None:
        self.num_vectors = check_whole("num_vectors", num_vectors, low=1)

    def begin(self, window: Window) -> Estimate:
        """See the base class."""
        return _SignProducts(window, self.num_vectors)

    def __repr__(self) -> str:
        return f"HutchinsonHessian({f'num_vectors={self.num_vectors}' if self.num_vectors != 1 else ''})"


class _SignProducts(SharedForward):
    """Adds up v * (H v) over the window's micro-batches, for the same signs v on all devices."""

    def __init__(self, window: Window, num_vectors: int) -> None:
        super().__init__(window, "HutchinsonHessian")
        self.num_vectors = num_vectors
        self.sharded = any(map(is_sharded, window.parameters))
        self.sums: list[Tensor | None] = [None] * len(window.parameters)
        self.counted = torch.zeros((), dtype=torch.float64, device="cpu")

    def watch(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        return nullcontext()

    def share(self, micro_batch: MicroBatch, loss: Tensor) -> bool:
        if not self.window.unmoved or not loss.requires_grad or self.sharded:
            return False
        scale = self.window.scale * self.window.share
        vectors = self._signs()
        self._add(vectors, self._products(loss * scale, vectors), 1 / scale)
        return True

    def own_pass(self, micro_batch: MicroBatch) -> None:
        scale = self.window.scale * self.window.share
        vectors = self._signs()
        if self.sharded:
            self._add(vectors, self._differences(micro_batch, scale, vectors), 1 / scale)
            return
        try:
            with (
                twice_differentiable(self.window.module),
                self.window.rerun(micro_batch, nullcontext(), *micro_batch.args) as loss,
            ):
                products = self._products(loss * scale, vectors)
        except RuntimeError as error:
            warnings.warn(
                "HutchinsonHessian: the loss cannot be differentiated twice, so its products are differences of "
                f"gradients: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            products = self._differences(micro_batch, scale, vectors)
        self._add(vectors, products, 1 / scale)

    def _products(self, loss: Tensor, vectors: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
        """H v for each v, H the Hessian of this loss."""
        gradients = self.window.differentiable_gradients(loss)
        indices = [index for index, gradient in enumerate(gradients) if gradient is not None]
        weights = [self.window.parameters[index] for index in indices]
        products = []
        for signs in vectors:
            found = hessian_product([gradients[i] for i in indices], weights, [signs[i] for i in indices])
            product: list[Tensor | None] = [None] * len(gradients)
            for index, piece in zip(indices, found, strict=True):
                product[index] = torch.zeros_like(self.window.parameters[index]) if piece is None else piece
            products.append(product)
        return products

    def _differences(
        self, micro_batch: MicroBatch, scale: float, vectors: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor | None]]:
        """H v for each v from gradients at moved weights."""
        parameters, precision = self.window.parameters, self.window.precision
        return [
            finite_difference_product(
                lambda: self._gradients(micro_batch, scale), parameters, signs, precision=precision
            )
            for signs in vectors
        ]

    def _gradients(self, micro_batch: MicroBatch, scale: float) -> Sequence[Tensor | None]:
        with self.window.rerun(micro_batch, nullcontext(), *micro_batch.args) as loss:
            wanted = [parameter for parameter in self.window.parameters if parameter.requires_grad]
            scaled = loss * scale
            own: Sequence[Tensor | None] | None = None
            if not self.window.gathers:
                try:
                    own = torch.autograd.grad(scaled, wanted, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    if not refused_by_checkpointing(error):
                        raise
            if own is None:
                own = gradients_by_backward([scaled], [torch.ones_like(scaled)], wanted)
            found = iter(own)
            gradients = [next(found) if parameter.requires_grad else None for parameter in self.window.parameters]
            return [local(g, parameter) for g, parameter in zip(gradients, self.window.parameters, strict=True)]

    def _signs(self) -> list[list[Tensor]]:
        """The vectors of this refresh: always the same ones."""
        vectors = []
        for index in range(self.num_vectors):
            sources = {
                device: torch.Generator(device).manual_seed(self.window.shared_seed + index)
                for device in {parameter.device for parameter in self.window.parameters}
            }
            signs = (rademacher(p.numel(), sources[p.device], p.dtype).view(p.shape) for p in self.window.parameters)
            vectors.append([part_of_whole(sign, p) for sign, p in zip(signs, self.window.parameters, strict=True)])
        return vectors

    def _add(
        self, vectors: Sequence[Sequence[Tensor]], products: Sequence[Sequence[Tensor | None]], factor: float
    ) -> None:
        for signs, product in zip(vectors, products, strict=True):
            for index, (sign, piece) in enumerate(zip(signs, product, strict=True)):
                if piece is not None:
                    wide = piece.detach().to_dense().to(torch.promote_types(piece.dtype, torch.float32))
                    before = self.sums[index]
                    more = sign.to(wide) * wide * (factor / self.num_vectors)
                    self.sums[index] = more if before is None else before.add_(more)
        self.counted += 1

    def forget(self) -> None:
        """See the base class."""
        super().forget()
        self.sums = [None] * len(self.window.parameters)
        self.counted.zero_()

    def finish(self) -> list[Tensor | None] | None:
        self.run_own_passes()
        sums = self.window.average(self.sums)
        counted = float(self.window.total(self.counted)) / self.window.world_size
        if counted == 0:
            return None
        return finite_or_none([None if total is None else total / counted for total in sums], self.window.parameters)
