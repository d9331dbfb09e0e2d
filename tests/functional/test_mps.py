"""Every function on a device that has no float64 (Apple's MPS), with the numbers of the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from like_mps import MPS, like_mps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from lightning_ire import functional
from lightning_ire.functional._shards import Shards
from lightning_ire.functional.threshold import threshold_of_vectors

MATRIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
MATRIX = MATRIX @ MATRIX.T / 12


class On:
    """Tensors and generators of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matrix = MATRIX.to(device)
        self.a, self.b = MATRIX[:3].to(device), MATRIX[3, :5].to(device)
        self.x, self.y = MATRIX[0].to(device), MATRIX[1].to(device)
        self.labels = torch.arange(12).to(device) % 12

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(3)

    def product(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([piece.sum() for piece in (left * self.product(right)).split([5, 7])])

    def labelled(self, sampled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return tuple(sampled(*args, generator=torch.Generator().manual_seed(4), **kwargs))

    def krylov(self) -> Any:
        return functional.extreme_eigenvalues(self.product, self.x, basis=4, max_products=4).krylov

    def moved(self) -> Any:
        with functional.perturbed([self.a], [self.a * 2]) as (saved,):
            return saved.clone(), self.a.clone()

    def stable(self) -> Any:
        shares = self.x.abs() / self.x.abs().max()

        def top(kappa: float) -> tuple[float, Tensor]:
            lengths = (1 + kappa * shares) * self.x.abs()
            return float(lengths.max()), (lengths == lengths.max()).to(self.x)

        return torch.tensor(functional.largest_stable_kappa(top, shares, limit=2 * float(self.x.abs().max())))

    def boosted(self) -> Any:
        weights = [self.a.clone(), self.b.clone()]
        functional.boost_(weights, [self.a / 2, self.b / 2], [self.a > 0, None], 2.0)
        return weights

    def masks(self, **kwargs: Any) -> Any:
        return functional.flat_masks([self.a, None, self.b], 0.6, **kwargs)


ENTRIES: dict[str, Callable[[On], Any]] = {
    "as_shares": lambda on: functional.as_shares((on.a * 255).to(torch.uint8), torch.float32),
    "largest_stable_kappa": lambda on: on.stable(),
    "sharp_subspace": lambda on: functional.sharp_subspace(on.a),
    "soft_masks": lambda on: functional.soft_masks([on.a, None, on.b], 0.6),
    "soft_masks_and_threshold": lambda on: functional.soft_masks_and_threshold([on.a, on.b], 0.6),
    "adaptive_mean": lambda on: functional.adaptive_mean(lambda: on.b, relative_error=0.1).weighted([1.0] * 5).value,
    "all_finite": lambda on: functional.all_finite([on.a, on.b]),
    "as_real": lambda on: functional.as_real(on.a),
    "ascent_in_ball": lambda on: functional.ascent_in_ball([on.a], [on.a], [on.a], step=0.5, radius=1.0),
    "average_sam_displacement": lambda on: functional.average_sam_displacement(
        [on.a], 0.5, generators=[on.generator()]
    ),
    "boost_": lambda on: on.boosted(),
    "copied": lambda on: functional.copied([on.a, on.b]),
    "count_true": lambda on: functional.count_true([on.a > 0], [on.a > 1]),
    "deflated_trace": lambda on: (
        functional.deflated_trace(on.bilinear, on.krylov(), [5, 7], generator=on.generator()).parts
    ),
    "effective_product": lambda on: functional.effective_product(
        on.product, on.x, on.y.abs(), ascent=0.1, ascent_scale=on.x, decay=on.y
    ),
    "extreme_eigenvalues": lambda on: functional.extreme_eigenvalues(on.product, on.x, largest=2, basis=6).largest,
    "finite_difference_product": lambda on: functional.finite_difference_product(lambda: [on.x**2], [on.x], [on.y]),
    "fisher_diagonal": lambda on: functional.fisher_diagonal([on.a, None, on.b], 8),
    "flat_masks": lambda on: (on.masks(), on.masks(scope="tensor"), on.masks(exclude_zero=True)),
    "flat_threshold": lambda on: [
        functional.flat_threshold([on.a.to(kind), on.b.to(kind)], 0.7, exclude_zero=exclude)
        for kind in (torch.float16, torch.bfloat16, torch.float32)
        for exclude in (False, True)
    ],
    "flatten": lambda on: functional.flatten([on.a, on.b]),
    "flatten_like": lambda on: functional.flatten_like([on.a, None], [on.a, on.b]),
    "global_dot": lambda on: functional.global_dot([on.a, None, on.b], [on.a, on.b, on.b]),
    "global_norm": lambda on: functional.global_norm([on.a, None, on.b]),
    "hutchinson_trace": lambda on: (
        functional.hutchinson_trace(lambda v: on.bilinear(v, v), 12, generator=on.generator(), max_vectors=9).value
    ),
    "in_double": lambda on: functional.in_double(on.a),
    "kept_buffers": lambda on: kept(on),
    "mask_below": lambda on: functional.mask_below(on.a, on.b.max(), exclude_zero=True),
    "masks_and_threshold": lambda on: functional.masks_and_threshold([on.a, on.b], 0.3, finite=True),
    "pack_mask": lambda on: functional.pack_mask(on.a > 0),
    "perturbed": lambda on: on.moved(),
    "rounding_displacement": lambda on: functional.rounding_displacement([on.a, on.b], bits=4)[0][0],
    "label_log_probabilities": lambda on: functional.label_log_probabilities(nn.functional.cross_entropy, on.a),
    "products": lambda on: functional.products([on.a, on.b], on.b.sum()),
    "quotients": lambda on: functional.quotients([on.a, on.b], [3.0, 0.3]),
    "rademacher": lambda on: functional.rademacher(9, on.generator()),
    "ratio_of_means": lambda on: functional.ratio_of_means(functional.adaptive_mean(lambda: on.b[:2], max_draws=3)),
    "sam_displacement": lambda on: functional.sam_displacement([on.a, on.b], [on.a, None], 0.5, adaptive=True),
    "sample_labels": lambda on: functional.sample_labels(on.matrix, torch.Generator().manual_seed(5)),
    "sampled_binary_cross_entropy": lambda on: on.labelled(
        functional.sampled_binary_cross_entropy, on.a.sigmoid(), on.a.sigmoid()
    ),
    "sampled_binary_cross_entropy_with_logits": lambda on: on.labelled(
        functional.sampled_binary_cross_entropy_with_logits, on.a, on.a.sigmoid(), pos_weight=on.x
    ),
    "sampled_cross_entropy": lambda on: on.labelled(
        functional.sampled_cross_entropy, on.matrix, on.labels, weight=on.x.abs(), label_smoothing=0.1
    ),
    "sampled_gaussian_nll_loss": lambda on: on.labelled(functional.sampled_gaussian_nll_loss, on.x, on.y, on.y.abs()),
    "sampled_kl_div": lambda on: on.labelled(
        functional.sampled_kl_div, on.matrix.log_softmax(1), on.matrix.softmax(1), reduction="batchmean"
    ),
    "sampled_poisson_nll_loss": lambda on: on.labelled(functional.sampled_poisson_nll_loss, on.x, on.y.abs()),
    "sampled_mse_loss": lambda on: on.labelled(functional.sampled_mse_loss, on.a, on.x, weight=on.y.abs()),
    "sampled_nll_loss": lambda on: on.labelled(
        functional.sampled_nll_loss, on.matrix.log_softmax(1), on.labels, ignore_index=2
    ),
    "spectral_density": lambda on: functional.spectral_density(
        on.product, 12, generator=on.generator(), steps=4, vectors=2
    ).smoothed()[1],
    "split_like": lambda on: functional.split_like(on.x, [on.x[:4], on.x[4:]]),
}
# what gives numbers or classes, needs a graph (this torch has no autograd for the device) or has no tensors of a device
ELSEWHERE = {
    *("SAMPLED", "BufferState", "Extremes", "Krylov", "MeanEstimate", "RandomState", "SampledLoss", "SpectralDensity"),
    *("sampled_log_prob",),  # draws by the distribution's own `sample`
    *("adam_limit", "sgd_limit", "stability_edge", "seeded", "unpack_mask", "widest_dtype"),
    *("gradients_by_backward", "hessian_product", "per_sample_squares", "twice_differentiable"),
    *("Coordinates", "coarsest"),  # inside the estimators
    *("is_sharded", "local", "part_of_whole", "whole_of_part"),  # a tensor of one device is its own part
}


def kept(on: On) -> Tensor:
    norm = nn.Module()
    norm.register_buffer("mean", on.a.clone())
    with functional.kept_buffers(norm):
        norm.mean.zero_()
    return norm.mean


def on_the_cpu(value: Any) -> Any:
    return tree_map(lambda one: one.cpu() if isinstance(one, Tensor) else one, value)


def test_every_function_is_tried() -> None:
    assert {*ENTRIES, *ELSEWHERE} == set(functional.__all__)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_device_without_float64_gives_the_numbers_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ENTRIES[name](On(torch.device("cpu")))
    with like_mps(monkeypatch):
        found = on_the_cpu(ENTRIES[name](On(MPS)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_stand_in_refuses_what_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with like_mps(monkeypatch):
        tensor = MATRIX.to(MPS)
        for make in (
            tensor.double,
            lambda: torch.zeros(3, dtype=torch.float64, device=MPS),
            lambda: torch.as_tensor(tensor, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
                make()


@pytest.mark.parametrize("exclude_zero", [False, True])
def test_the_threshold_needs_no_value_of_the_device(exclude_zero: bool) -> None:
    """With tensors that have none, where the host is not to wait; with no zeros left out, nothing is read at all."""
    with FakeTensorMode():
        values = [torch.empty(30, device=MPS), torch.empty(10, device=MPS)]
        threshold, _ = threshold_of_vectors(
            values, 0.9, Shards(values), [True, True], exclude_zero=exclude_zero, finite=True
        )
        assert (threshold.device, threshold.dtype, threshold.shape) == (MPS, torch.float32, ())
