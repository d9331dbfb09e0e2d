"""Real optimizers on quadratics, just inside and just outside the edge that the formulas give.

Every case draws a random positive definite H, forms K densely from `effective_product`, sets the learning rate so that
lambda_max(K) is 0.98 or 1.02 of c, and lets torch's own optimizer run, with SAM's gradient and IRE's boost as the
callback would apply them.
"""

import math

import pytest
import torch

from lightning_ire.functional import (
    adam_limit,
    boost_,
    effective_product,
    perturbed,
    sgd_limit,
    stability_edge,
)

KAPPA = 2.0


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(size, low, high, seed):
    return low + (high - low) * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(size, seed):
    """Eigenvalues from 0.3 to 3 in a random basis."""
    basis = torch.linalg.qr(drawn(size, size, seed=seed)).Q
    matrix = basis @ torch.linspace(0.3, 3.0, size, dtype=torch.float64).diag() @ basis.T
    return (matrix + matrix.T) / 2


def random_mask(size, seed):
    """Zeros and ones, both of them present."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: (size + 1) // 2]] = True
    return mask


def dense(matrix, step_sizes, **options):
    """K, column by column."""
    columns = [
        effective_product(lambda v: matrix @ v, unit, step_sizes, **options)
        for unit in torch.eye(len(matrix), dtype=torch.float64)
    ]
    return torch.stack(columns, dim=1)


class Problem:
    """A quadratic with its minimum somewhere, an ascent of fixed T and rho_e, and a boost on a fixed mask."""

    def __init__(self, variant, seed):
        self.size = 5 + seed % 4
        self.matrix = hessian(self.size, seed)
        self.minimum = drawn(self.size, seed=seed + 1)
        self.mask = random_mask(self.size, seed + 2) if "ire" in variant else None
        self.ascent = 0.7 if "sam" in variant else 0.0
        scales = {"asam": uniform(self.size, 0.2, 1.5, seed + 3), "part-sam": random_mask(self.size, seed + 3).double()}
        self.scale = next((scale for name, scale in scales.items() if variant.startswith(name)), None)
        self.lengthened = torch.ones(self.size, dtype=torch.float64)
        if self.mask is not None:
            self.lengthened += KAPPA * self.mask

    def options(self):
        return {"ascent": self.ascent, "ascent_scale": self.scale}

    def gradient(self, x):
        raw = self.matrix @ (x.detach() - self.minimum)
        squares = 1.0 if self.scale is None else self.scale**2
        with perturbed([x], [self.ascent * squares * raw]):
            return self.matrix @ (x.detach() - self.minimum)

    def fixed_point(self, decay=0.0):
        """Where SAM's gradient and a weight decay that is added to it cancel."""
        squares = torch.ones(self.size, dtype=torch.float64) if self.scale is None else self.scale**2
        lifted = self.matrix + self.ascent * self.matrix @ squares.diag() @ self.matrix
        return torch.linalg.solve(lifted + decay * torch.eye(self.size, dtype=torch.float64), lifted @ self.minimum)


VARIANTS = ["plain", "sam", "ire", "sam+ire", "asam+ire", "part-sam", "part-sam+ire"]


def growth(problem, x, optimizer, centre, decoupled=0.0, steps=4000):
    """|theta - theta*| relative to the start, once it has clearly grown or fallen."""
    first = float((x.detach() - centre).norm())
    for _ in range(steps):
        x.grad = problem.gradient(x)
        old = x.detach().clone()
        optimizer.step()
        boost_([x.data], [old], [problem.mask], KAPPA, decay=[decoupled])
        ratio = float((x.detach() - centre).norm()) / first
        if not 1e-4 < ratio < 1e4:
            break
    return ratio


def assert_edge(ratio, relative):
    """Decay by 1e-4 inside the edge, growth by 1e4 outside."""
    assert ratio <= 1e-4 if relative < 1 else ratio >= 1e4, f"{ratio} at {relative} of the edge"


SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weak nesterov": {"momentum": 0.3, "nesterov": True},
    "decay": {"weight_decay": 0.4},
    "decay and momentum": {"weight_decay": 0.4, "momentum": 0.8, "dampening": 0.1},
}


@pytest.mark.parametrize("relative", [0.98, 1.02])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", SGD)
def test_sgd_is_stable_up_to_the_edge(kind, variant, relative):
    settings = SGD[kind]
    limits = {key: value for key, value in settings.items() if key != "weight_decay"}
    weight_decay = settings.get("weight_decay", 0.0)
    problem = Problem(variant, seed=10 * list(SGD).index(kind) + VARIANTS.index(variant))
    decay = torch.full((problem.size,), weight_decay, dtype=torch.float64) if weight_decay else None
    k = dense(problem.matrix, problem.lengthened, decay=decay, **problem.options())
    lr = relative * sgd_limit(**limits) / float(torch.linalg.eigvalsh(k)[-1])
    x = torch.nn.Parameter(drawn(problem.size, seed=99))
    optimizer = torch.optim.SGD([x], lr=lr, **settings)
    assert_edge(growth(problem, x, optimizer, problem.fixed_point(weight_decay)), relative)


def frozen_adam(kind, x, lr, second_moment, **settings):
    """Adam with bias corrections of 1 and squared gradients that do not count: P stays what it is."""
    optimizer = kind([x], lr=lr, eps=0.1, **{"betas": (0.9, 1 - 1e-15), **settings})
    optimizer.state[x] = {
        "step": torch.tensor(1e17),
        "exp_avg": torch.zeros_like(x),
        "exp_avg_sq": second_moment.clone(),
    }
    return optimizer


@pytest.mark.parametrize("relative", [0.98, 1.02])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adam with decay", "Adam without momentum"])
def test_adam_is_stable_up_to_the_edge(kind, variant, relative):
    beta1 = 0.0 if "without" in kind else 0.9
    weight_decay = 0.4 if "decay" in kind else 0.0
    problem = Problem(variant, seed=100 + VARIANTS.index(variant))
    second_moment = uniform(problem.size, 0.05, 4.0, seed=5)
    p = second_moment.sqrt() + 0.1
    decay = torch.full_like(p, weight_decay) if weight_decay else None
    k = dense(problem.matrix, problem.lengthened / p, decay=decay, **problem.options())
    lr = relative * adam_limit(beta1) / float(torch.linalg.eigvalsh(k)[-1])
    x = torch.nn.Parameter(drawn(problem.size, seed=98))
    optimizer = frozen_adam(
        torch.optim.AdamW if kind == "AdamW" else torch.optim.Adam,
        x,
        lr,
        second_moment,
        betas=(beta1, 1 - 1e-15),
        weight_decay=weight_decay,
    )
    assert_edge(growth(problem, x, optimizer, problem.fixed_point(weight_decay)), relative)
    torch.testing.assert_close(optimizer.state[x]["exp_avg_sq"], second_moment, rtol=1e-3, atol=0)


@pytest.mark.parametrize("relative", [0.98, 1.02])
@pytest.mark.parametrize("variant", ["plain", "sam+ire"])
def test_decoupled_decay_lowers_the_limit_by_half_its_part_of_a_step(variant, relative):
    """A decay of 0.2 per step, a thousand times the usual, so that the factor 0.9 shows; IRE does not lengthen it."""
    problem = Problem(variant, seed=200)
    problem.minimum.zero_()
    second_moment = uniform(problem.size, 0.05, 4.0, seed=6)
    k = dense(problem.matrix, problem.lengthened / (second_moment.sqrt() + 0.1), **problem.options())
    lr = relative * (1 - 0.2 / 2) * adam_limit(0.9) / float(torch.linalg.eigvalsh(k)[-1])
    x = torch.nn.Parameter(drawn(problem.size, seed=97))
    optimizer = frozen_adam(torch.optim.AdamW, x, lr, second_moment, weight_decay=0.2 / lr)
    assert_edge(growth(problem, x, optimizer, problem.minimum, decoupled=0.2), relative)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 2.0),
        ({"dampening": 0.5}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.5, "dampening": 0.5}, 6.0),
        ({"momentum": 0.5, "nesterov": True}, 1.5),
    ],
)
def test_limits_of_sgd(settings, limit):
    assert sgd_limit(**settings) == pytest.approx(limit, rel=1e-15)


@pytest.mark.parametrize(("beta1", "limit"), [(0.0, 2.0), (0.5, 6.0), (0.9, 38.0)])
def test_limits_of_adam(beta1, limit):
    assert adam_limit(beta1) == pytest.approx(limit, rel=1e-14)


# the operator


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ascent", [0.0, 0.3])
def test_effective_product_is_the_dense_operator(ascent, scaled, decay):
    """S^(1/2) (H + rho_e H T^2 H + W) S^(1/2) with an indefinite H, zeros in S and in T."""
    root = drawn(6, 6, seed=1)
    matrix, steps = root + root.T, uniform(6, 0.1, 2.0, seed=2)
    steps[3] = 0.0
    scale = drawn(6, seed=3) * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    weights = uniform(6, 0.0, 1.0, seed=4)
    squares = scale.square() if scaled else torch.ones(6, dtype=torch.float64)
    inside = matrix + ascent * matrix @ squares.diag() @ matrix + (weights.diag() if decay else 0)
    expected = steps.sqrt().diag() @ inside @ steps.sqrt().diag()
    got = dense(matrix, steps, ascent=ascent, ascent_scale=scale if scaled else None, decay=weights if decay else None)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("ascent", "products"), [(0.0, 1), (0.5, 2)])
def test_effective_product_takes_one_product_or_two_with_sam(ascent, products):
    matrix, calls = hessian(5, 0), []

    def product(vector):
        calls.append(vector)
        return matrix @ vector

    vector, steps = drawn(5, seed=1), uniform(5, 0.1, 1.0, seed=2)
    before = [vector.clone(), steps.clone(), matrix.clone()]
    effective_product(product, vector, steps, ascent=ascent, decay=torch.ones(5, dtype=torch.float64))
    assert len(calls) == products
    assert all(map(torch.equal, [vector, steps, matrix], before))


# the edge


@pytest.mark.parametrize("ascent", [0.0, 1e-12, 1e-6, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("lr", [1e-5, 0.1, 3.0])
@pytest.mark.parametrize("limit", [2.0, 38.0])
def test_edge_is_where_the_ratio_is_one(limit, lr, ascent):
    """K of a 1 x 1 H = [lambda*] is c."""
    edge = stability_edge(lr, limit, ascent)
    k = dense(torch.tensor([[edge]], dtype=torch.float64), torch.tensor([lr], dtype=torch.float64), ascent=ascent)
    assert float(k) == pytest.approx(limit, rel=1e-13)


def test_edge_tends_to_that_without_sam():
    """c / eta (1 - c rho_e / eta) to first order; the textbook form of the root would be off by 1e-3 at 1e-12."""
    lr, limit = 0.5, 2.0
    for ascent in (1e-15, 1e-12, 1e-9, 1e-6):
        first_order = limit / lr * (1 - limit * ascent / lr)
        assert stability_edge(lr, limit, ascent) == pytest.approx(first_order, rel=1e-15 + 100 * ascent**2)
    assert abs((math.sqrt(1 + 4 * limit * 1e-12 / lr) - 1) / 2e-12 / 4 - 1) > 1e-6, "the case shows nothing"
    assert stability_edge(lr, limit) == limit / lr


def test_edge_falls_with_the_ascent_and_the_learning_rate():
    assert stability_edge(0.5, 2.0, ascent=0.5) == 2.0
    edges = [stability_edge(0.1, 2.0, rho) for rho in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert edges == sorted(edges, reverse=True)
    assert stability_edge(0.0, 2.0) == stability_edge(0.0, 2.0, 0.5) == math.inf
    assert stability_edge(0.1, 2.0, math.inf) == 0.0
