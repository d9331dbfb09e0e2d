"""Where a learning rate stops being stable: one effective sharpness for SGD, momentum, Adam, SAM, ASAM and IRE.

Near a quadratic without negative curvature, of Hessian H, every coordinate's step is a learning rate times the
gradient, through a momentum filter, divided by P (Adam's sqrt(v) + eps; 1 for SGD) and lengthened by
D = 1 + kappa * n (IRE). With S = eta D / P, and SAM's gradient (H + rho_e H T^2 H) (theta - theta*), steps blow up if
and only if

    lambda_max(K) > c,   K = S^(1/2) (H + rho_e H T^2 H) S^(1/2)

where c depends on the momentum alone. Derived for this package, as an extension of Cohen et al. 2021 (arXiv
2103.00065: 2 / eta, and momentum), Cohen et al. 2022 (arXiv 2207.14484: Adam) and Long and Bartlett 2023 (arXiv
2309.12488: SAM), and checked with torch's optimizers on quadratics just inside and just outside the edge
(tests/functional/test_stability.py). P, D, T and the norm in rho_e are taken as fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lightning_ire.functional.vectors import Coordinates

__all__ = ["adam_limit", "effective_product", "largest_stable_kappa", "sgd_limit", "stability_edge"]


def sgd_limit(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """The constant c of SGD as torch defines it: the largest stable eta * lambda.

    2 without momentum, 2 (1 + beta) / (1 - dampening) for heavy ball, 2 (1 + beta) / (1 + 2 beta) for Nesterov.

    Args:
        momentum: beta in [0, 1).
        dampening: In [0, 1); counts with momentum only.
        nesterov: Whether steps look ahead.

    Example:
        >>> sgd_limit(), sgd_limit(momentum=0.9)
        (2.0, 3.8)
    """
    if momentum == 0:
        return 2.0
    if nesterov:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum) / (1 - dampening)


def adam_limit(beta1: float) -> float:
    """The constant c of Adam and AdamW, whose momentum is an average: 2 (1 + beta1) / (1 - beta1).

    Decoupled weight decay (that IRE does not lengthen) makes it less by the factor 1 - lr * weight_decay / 2, which is
    next to 1 for usual values and not counted here.

    Args:
        beta1: In [0, 1).

    Example:
        >>> round(adam_limit(0.9), 9)
        38.0
    """
    return 2 * (1 + beta1) / (1 - beta1)


def stability_edge(lr: float, limit: float, ascent: float = 0.0) -> float:
    r"""The eigenvalue lambda* of H from which on steps of one learning rate for all coordinates blow up.

    The positive root of eta (lambda + rho_e lambda^2) = c, (sqrt(1 + 4 c rho_e / eta) - 1) / (2 rho_e); c / eta for
    rho_e = 0.

    Args:
        lr: eta >= 0.
        limit: c, from :func:`sgd_limit` or :func:`adam_limit`.
        ascent: rho_e >= 0: rho / \\|\\|g\\|\\| for SAM, rho for un-normalized SAM.

    Returns:
        lambda*; infinite for lr = 0.

    Example:
        >>> stability_edge(0.5, 2.0), stability_edge(0.5, 2.0, ascent=0.5)
        (4.0, 2.0)
    """
    if lr == 0:
        return math.inf
    # the root in a form that does not cancel for a small rho_e
    return 2 * limit / (lr * (1 + math.sqrt(1 + 4 * limit * ascent / lr)))


def effective_product(
    product: Callable[[Tensor], Tensor],
    vector: Tensor,
    step_sizes: Tensor,
    *,
    ascent: float = 0.0,
    ascent_scale: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    r"""K v for K = S^(1/2) (H + rho_e H T^2 H + W) S^(1/2).

    Args:
        product: H v for a vector v.
        vector: v.
        step_sizes: Diagonal of S >= 0: learning rate * (1 + kappa * n) / P for every coordinate.
        ascent: rho_e >= 0; for ASAM rho / \\|\\|T g\\|\\|.
        ascent_scale: Diagonal of T: \\|theta\\| for ASAM, 0 where SAM does not move a weight. ``None``: 1.
        decay: Diagonal of W: weight decay that is added to the gradient, which the optimizer sees at unmoved weights.

    Returns:
        K v.

    Cost: one Hessian product, two with SAM.
    """
    root = step_sizes.sqrt()
    turned = root * vector
    image = product(turned)
    if ascent:
        climbed = image if ascent_scale is None else ascent_scale.square() * image
        image = image + ascent * product(climbed)
    if decay is not None:
        image = image + decay * turned
    return root * image


def largest_stable_kappa(
    top: Callable[[float], tuple[float, Tensor]],
    shares: Tensor,
    limit: float,
    *,
    highest: float = 1000.0,
    tolerance: float = 1e-3,
    max_rounds: int = 6,
    coordinates: Coordinates | None = None,
) -> tuple[float, bool]:
    """The largest kappa of IRE with which lambda_max(K) <= c, for D = 1 + kappa * n with a fixed n.

    lambda_max(K) grows with kappa where it is positive. With v the unit eigenvector at one kappa, x = S^(1/2) v and
    M = H + ..., every stable kappa' has x^T M x <= c x^T S(kappa')^-1 x, that is

        lambda_max(K) / c <= sum over coordinates of v^2 (1 + kappa n) / (1 + kappa' n),

    which no kappa' above the root of this equation fulfils. So the roots, each of the eigenvector at the one before,
    fall from `highest` to the answer, faster than linearly (Dinkelbach 1967, for ratios); each is found by bisection,
    which needs no product. Bisection on lambda_max(K) itself would need an eigenvalue for each bit.

    Args:
        top: The largest eigenvalue of K at a kappa, and a unit eigenvector.
        shares: n in [0, 1], one number for each coordinate (where strengths differ: times strength / largest strength).
        limit: c.
        highest: No larger kappa is looked for.
        tolerance: Where lambda_max(K) / c - 1 is this small it is done.
        max_rounds: Most eigenvalues.
        coordinates: Those of a model that may be sharded; default: vectors are whole.

    Returns:
        Kappa, in [0, `highest`], approached from above; 0 where no kappa is stable. And whether `tolerance` was
        reached.

    Cost: `max_rounds` eigenvalues at most, 2 to 4 as a rule; 50 sums over all coordinates for each.

    Example:
        >>> import torch
        >>> curvatures, lr, n = torch.tensor([10.0, 1.0]), 0.1, torch.tensor([0.0, 1.0])
        >>> def top(kappa):
        ...     value, place = (lr * (1 + kappa * n) * curvatures).max(0)
        ...     return float(value), torch.eye(2)[place]
        >>> kappa, found = largest_stable_kappa(top, n, limit=2.0)
        >>> round(kappa, 3), found  # lr * (1 + kappa) * 1 = 2
        (19.0, True)
    """
    space = coordinates or Coordinates([shares])
    kappa = highest
    for _ in range(max_rounds):
        value, vector = top(kappa)
        ratio = value / limit
        if ratio <= 1 + tolerance:
            return kappa, True
        weights = vector.square() * (1 + kappa * shares)

        def surplus(smaller: float, weights: Tensor = weights, ratio: float = ratio) -> float:
            return float(space.dot(weights, 1 / (1 + smaller * shares))) - ratio

        if not surplus(0.0) > 0:  # NaN too
            return 0.0, not math.isnan(ratio)
        low, high = 0.0, kappa
        for _ in range(50):
            middle = math.sqrt((1 + low) * (1 + high)) - 1
            low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
        kappa = low
    return kappa, False
