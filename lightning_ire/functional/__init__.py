"""The mathematics of IRE and SAM on lists of tensors. Torch only: usable in any training loop, without Lightning.

SGD-IRE in a plain PyTorch loop (the mask from one sampled-label gradient, every 10 steps):

    >>> import torch
    >>> from lightning_ire.functional import boost_, fisher_diagonal, flat_masks, sampled_cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 3)
    >>> weights = list(model.parameters())
    >>> optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
    >>> first = torch.nn.functional.cross_entropy(model(x), y).item()
    >>> for step in range(50):
    ...     if step % 10 == 0:
    ...         sampled = sampled_cross_entropy(model(x), y)
    ...         gradients = torch.autograd.grad(sampled.score, weights)
    ...         masks = flat_masks(fisher_diagonal(gradients), gamma=0.8)
    ...     loss = torch.nn.functional.cross_entropy(model(x), y)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     old = [weight.detach().clone() for weight in weights]
    ...     optimizer.step()
    ...     boost_(weights, old, masks, kappa=2.0)
    >>> loss.item() < first
    True

For SAM put `with perturbed(weights, sam_displacement(weights, gradients, rho=0.05)[0]):` around a second backward.
"""

from lightning_ire.functional._foreach import all_finite, copied, products, quotients
from lightning_ire.functional._shards import is_sharded, local, part_of_whole, whole_of_part
from lightning_ire.functional.averages import (
    MeanEstimate,
    adaptive_mean,
    hutchinson_trace,
    ratio_of_means,
)
from lightning_ire.functional.boost import boost_
from lightning_ire.functional.deflation import deflated_trace
from lightning_ire.functional.fisher import fisher_diagonal, per_sample_squares
from lightning_ire.functional.flat_mask import (
    count_true,
    flat_masks,
    mask_below,
    masks_and_threshold,
    pack_mask,
    unpack_mask,
)
from lightning_ire.functional.hessian import (
    finite_difference_product,
    gradients_by_backward,
    hessian_product,
    twice_differentiable,
)
from lightning_ire.functional.perturbation import (
    ascent_in_ball,
    average_sam_displacement,
    global_dot,
    global_norm,
    perturbed,
    rounding_displacement,
    sam_displacement,
)
from lightning_ire.functional.sampled_losses import (
    SAMPLED,
    SampledLoss,
    label_log_probabilities,
    sample_labels,
    sampled_binary_cross_entropy,
    sampled_binary_cross_entropy_with_logits,
    sampled_cross_entropy,
    sampled_gaussian_nll_loss,
    sampled_kl_div,
    sampled_log_prob,
    sampled_mse_loss,
    sampled_nll_loss,
    sampled_poisson_nll_loss,
)
from lightning_ire.functional.soft_mask import as_shares, soft_masks, soft_masks_and_threshold
from lightning_ire.functional.spectrum import Extremes, Krylov, SpectralDensity, extreme_eigenvalues, spectral_density
from lightning_ire.functional.stability import (
    adam_limit,
    effective_product,
    largest_stable_kappa,
    sgd_limit,
    stability_edge,
)
from lightning_ire.functional.state import BufferState, RandomState, kept_buffers, seeded
from lightning_ire.functional.subspace import sharp_subspace
from lightning_ire.functional.threshold import flat_threshold
from lightning_ire.functional.vectors import (
    Coordinates,
    as_real,
    coarsest,
    flatten,
    flatten_like,
    in_double,
    rademacher,
    split_like,
    widest_dtype,
)

__all__ = [
    "SAMPLED",
    "BufferState",
    "Coordinates",
    "Extremes",
    "Krylov",
    "MeanEstimate",
    "RandomState",
    "SampledLoss",
    "SpectralDensity",
    "adam_limit",
    "adaptive_mean",
    "all_finite",
    "as_real",
    "as_shares",
    "ascent_in_ball",
    "average_sam_displacement",
    "boost_",
    "coarsest",
    "copied",
    "count_true",
    "deflated_trace",
    "effective_product",
    "extreme_eigenvalues",
    "finite_difference_product",
    "fisher_diagonal",
    "flat_masks",
    "flat_threshold",
    "flatten",
    "flatten_like",
    "global_dot",
    "global_norm",
    "gradients_by_backward",
    "hessian_product",
    "hutchinson_trace",
    "in_double",
    "is_sharded",
    "kept_buffers",
    "label_log_probabilities",
    "largest_stable_kappa",
    "local",
    "mask_below",
    "masks_and_threshold",
    "pack_mask",
    "part_of_whole",
    "per_sample_squares",
    "perturbed",
    "products",
    "quotients",
    "rademacher",
    "ratio_of_means",
    "rounding_displacement",
    "sam_displacement",
    "sample_labels",
    "sampled_binary_cross_entropy",
    "sampled_binary_cross_entropy_with_logits",
    "sampled_cross_entropy",
    "sampled_gaussian_nll_loss",
    "sampled_kl_div",
    "sampled_log_prob",
    "sampled_mse_loss",
    "sampled_nll_loss",
    "sampled_poisson_nll_loss",
    "seeded",
    "sgd_limit",
    "sharp_subspace",
    "soft_masks",
    "soft_masks_and_threshold",
    "spectral_density",
    "split_like",
    "stability_edge",
    "twice_differentiable",
    "unpack_mask",
    "whole_of_part",
    "widest_dtype",
]
