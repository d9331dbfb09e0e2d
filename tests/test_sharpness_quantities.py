"""Gaps, coherence, dropout's noise, effective rates, blocks, the Fisher diagonal: each against a known value."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from modules import Exact, Net
from torch import Tensor, nn

from lightning_ire import (
    SAM,
    ConfigurationError,
    IREStep,
    Rounding,
    SharpnessMonitor,
    fisher_information,
    measure_sharpness,
    tags,
)
from lightning_ire.functional import (
    SAMPLED,
    flatten,
    rounding_displacement,
    sampled_binary_cross_entropy,
    sampled_binary_cross_entropy_with_logits,
    sampled_cross_entropy,
    sampled_kl_div,
    sampled_nll_loss,
)
from lightning_ire.sharpness.blocks import kinds_of_blocks
from lightning_ire.sharpness.gaps import CumulativeGap


class Quadratic(nn.Module):
    """sum_k a_k (w_k - c_k)^2 / 2 over a matrix w, the centre c being what a batch is."""

    def __init__(self, curvatures: Tensor, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("curvatures", curvatures)
        self.w = nn.Parameter(start.clone())

    def forward(self, centre: Tensor | float) -> Tensor:
        return (self.curvatures * (self.w - centre).square()).sum() / 2


def measured(model: nn.Module, batches: list[Any], *quantities: Any, **settings: Any) -> dict[str, float]:
    loss_of = settings.pop("loss_of", model)
    return measure_sharpness(model, loss_of, batches, quantities, **settings).values


def test_the_noise_gap_of_a_quadratic() -> None:
    """It is rho^2 Tr(H) / 2p, whatever the slope; without a spread of the curvatures to rounding."""
    torch.manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64)
    model = Quadratic(torch.full((4, 5), 3.0, dtype=torch.float64), start)
    values = measured(model, [0.0], "noise_gap", rho=0.2, max_vectors=8)
    assert values[tags.NOISE_GAP] == pytest.approx(0.2**2 * 3.0 / 2, rel=1e-9)
    model = Quadratic(torch.rand(4, 5, dtype=torch.float64) ** 3, start)
    values = measured(model, [0.0, 1.0], "noise_gap", rho=0.2, max_vectors=400, relative_error=0)
    error = values[tags.NOISE_GAP + tags.STDERR]
    truth = 0.2**2 * float(model.curvatures.mean()) / 2
    assert 0 < error < 0.05 * truth
    assert abs(values[tags.NOISE_GAP] - truth) < 3 * error


def test_rounding_raises_a_quadratic_as_predicted() -> None:
    torch.manual_seed(0)
    minimum = torch.randn(60, 50, dtype=torch.float64)
    model = Quadratic(torch.rand(60, 50, dtype=torch.float64), minimum)
    values = measured(model, [minimum], "compression_gap", "trace_hessian", bits=6)
    step = float(minimum.abs().max()) / 31
    error = (minimum / step).round() * step - minimum
    assert values[tags.ROUNDING_GAP] == pytest.approx(float((model.curvatures * error.square()).sum()) / 2, rel=1e-9)
    # Hutchinson's signs are exact for a diagonal Hessian
    assert values[tags.ROUNDING_PREDICTED] == pytest.approx(step**2 * float(model.curvatures.sum()) / 24, rel=1e-9)
    assert values[tags.ROUNDING_GAP] == pytest.approx(values[tags.ROUNDING_PREDICTED], rel=0.05)
    assert values[tags.ROUNDING_SLOPE] == pytest.approx(0.0, abs=1e-12)
    elsewhere = minimum + 0.1
    values = measured(model, [elsewhere], "compression_gap", bits=6)
    slope = float((model.curvatures * (minimum - elsewhere) * error).sum())
    assert values[tags.ROUNDING_SLOPE] == pytest.approx(slope, rel=1e-9)
    assert values.keys() == {tags.ROUNDING_GAP, tags.ROUNDING_SLOPE}


def test_deletion_takes_back_a_share_of_the_way() -> None:
    torch.manual_seed(0)
    minimum, begin = torch.randn(2, 30, 20, dtype=torch.float64)
    model = Quadratic(torch.rand(30, 20, dtype=torch.float64), minimum)
    start = {"w": begin, "other": torch.ones(1)}
    values = measured(
        model, [minimum], "compression_gap", start=start, deleted=0.3, max_vectors=400, relative_error=0.0
    )
    truth = 0.3 * float((model.curvatures * (minimum - begin).square()).sum()) / 2
    error = values[tags.DELETION_GAP + tags.STDERR]
    assert 0 < error < 0.02 * truth
    assert abs(values[tags.DELETION_GAP] - truth) < 3 * error
    values = measured(model, [minimum], "compression_gap", start=start, deleted=1.0, max_vectors=2)
    assert values[tags.DELETION_GAP] == pytest.approx(truth / 0.3, rel=1e-9)
    with pytest.raises(ConfigurationError, match=r"the parameter 'w' of shape \(30, 20\), got \(20, 30\)"):
        measured(model, [minimum], "compression_gap", start={"w": begin.T})


def regression(samples: int, size: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(size, 1, bias=False).double()
    x, noise = torch.randn(samples, size, dtype=torch.float64), torch.randn(samples, 1, dtype=torch.float64)
    return model, x, x.sum(1, keepdim=True) + noise


def single_gradients(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return 2 * (model(x) - y).detach() * x


def parts(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_the_covariance_of_single_gradients() -> None:
    model, x, y = regression(24, 5)
    gradients = single_gradients(model, x, y)
    covariance = torch.cov(gradients.T)
    mean = gradients.mean(0)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    known = {"loss_of": loss_of, "optimizer": optimizer, "train_size": 24}
    values = measured(model, parts(x, y, 1), "gap", **known)
    trace = float(covariance.trace())
    assert values[tags.TRACE_COVARIANCE] == pytest.approx(trace, rel=1e-9)
    assert values[tags.NOISE_SCALE] == pytest.approx(trace / (float(mean.square().sum()) - trace / 24), rel=1e-9)
    assert values[tags.GAP_RATE] == pytest.approx(0.1 / (1 - 0.5) * trace / 24, rel=1e-9)
    balanced = torch.cat([x, x]), torch.cat([y, 2 * model(x).detach() - y])  # gradients that cancel
    assert measured(model, parts(*balanced, 24), "gap", **known)[tags.NOISE_SCALE] == math.inf
    # batches of four: unbiased over the ways to cut the samples into batches
    found = []
    for _ in range(60):
        order = torch.randperm(24)
        found.append(measured(model, parts(x[order], y[order], 4), "gap", **known)[tags.TRACE_COVARIANCE])
    draws = torch.tensor(found)
    assert abs(float(draws.mean()) - trace) < 3.5 * float(draws.std()) / math.sqrt(len(draws))


def test_the_boost_weighs_the_covariance() -> None:
    """Tr(M C), M the step sizes: three times as long in the flat coordinates with kappa = 2."""
    model, x, y = regression(24, 5)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.01), kappa=2.0, gamma=0.6, interval=100)
    step(loss_of, (x, y))
    (flat,) = step.boost_factors(model, step.optimizer).values()
    assert sorted(flat.flatten().tolist()) == [1.0, 1.0, 3.0, 3.0, 3.0]
    values = measured(model, parts(x, y, 1), "gap", loss_of=loss_of, step=step, train_size=24)
    variances = single_gradients(model, x, y).var(0)
    assert values[tags.GAP_RATE] == pytest.approx(0.01 * float((flat * variances).sum()) / 24, rel=1e-9)


def test_the_gap_of_a_small_step_grows_by_the_predicted_amount() -> None:
    """Fresh training sets at weights that do not depend on them; the test loss is that of the distribution."""
    torch.manual_seed(0)
    size, samples, lr = 4, 10, 1e-3
    weights, truth = torch.randn(2, size, dtype=torch.float64)
    x = torch.randn(40_000, samples, size, dtype=torch.float64)
    y = x @ truth + torch.randn(40_000, samples, dtype=torch.float64)

    def gap(w: Tensor) -> Tensor:
        train = ((x * w[:, None, :]).sum(-1) - y).square().mean(-1)
        return (w - truth).square().sum(-1) + 1 - train

    before = weights.expand(40_000, size)
    gradients = 2 * ((x @ weights) - y)[..., None] * x
    after = before - lr * gradients.mean(1)
    growth = gap(after) - gap(before)
    deviations = gradients - gradients.mean(1, keepdim=True)
    traces = deviations.square().sum((1, 2)) / (samples - 1)
    predicted = CumulativeGap().add(1, lr * float(traces.mean()) / samples)
    assert float(growth.mean()) == pytest.approx(predicted, abs=3.5 * float(growth.std()) / 200)
    assert predicted > 5 * float(growth.std()) / 200


def test_the_predicted_gap_is_summed_by_trapezoids() -> None:
    gap = CumulativeGap()
    assert gap.add(10, 0.5) == 5.0
    assert gap.add(14, 1.5) == 9.0
    assert gap.add(14, 1.5) == 9.0


def test_the_measured_gap_is_without_label_smoothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batches = [(torch.randn(5, 4).double(), torch.randint(3, (5,))) for _ in range(4)]

    def loss_of(batch: tuple[Tensor, Tensor], smoothing: float = 0.3) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    values = measured(model, batches[:2], "gap", loss_of=loss_of, held_out=batches[2:])
    losses = torch.stack([loss_of(batch, 0.0).detach() for batch in batches]).view(2, 2)
    assert values[tags.GAP_MEASURED] == pytest.approx(float(losses[1].mean() - losses[0].mean()), rel=1e-9)
    error = math.sqrt(float((losses.var(1) / 2).sum()))
    assert values[tags.GAP_MEASURED + tags.STDERR] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batches": [4]}, "two batches or more: raise `num_batches`"),
        ({"batches": [3, 5]}, "batches of equally many samples"),
        ({"perturbation": SAM(0.1)}, "without SAM only"),
        ({"perturbation": Rounding(4)}, "is not a number times the gradient"),
        ({"train_size": None}, "the size of the training set is not known"),
        ({"held_out": [()]}, "skips gap: tuple index out of range"),
    ],
)
def test_what_the_gap_cannot_say(settings: dict[str, Any], words: str) -> None:
    """The rest of it is known all the same."""
    model, x, y = regression(8, 3)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    perturbation = settings.pop("perturbation", None)
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.01), kappa=0.0, perturbation=perturbation)
    sizes = settings.pop("batches", [4, 4])
    batches = list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))
    known = {"train_size": 8, "held_out": [(x, y)], **settings}
    with pytest.warns(UserWarning, match=words):
        values = measured(model, batches, "gap", loss_of=loss_of, step=step, **known)
    assert (tags.GAP_RATE in values) == (known["held_out"] == [()])
    assert (tags.GAP_MEASURED in values) == (known["held_out"] != [()])
    assert (tags.TRACE_COVARIANCE in values) == (sizes == [4, 4])


def test_the_error_of_the_covariance() -> None:
    """Of two batches none is known; of normal gradients it is that of a variance, on average."""
    torch.manual_seed(0)
    model = Quadratic(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    errors, traces = [], []
    for _ in range(300):
        centres = list(torch.randn(5, 1, 1, dtype=torch.float64))
        values = measured(model, centres, "gap")
        traces.append(values[tags.TRACE_COVARIANCE])
        errors.append(values[tags.TRACE_COVARIANCE + tags.STDERR] ** 2)
    assert sum(traces) / 300 == pytest.approx(1.0, abs=0.15)
    assert sum(errors) / 300 == pytest.approx(2 / 4, rel=0.3)
    assert tags.TRACE_COVARIANCE + tags.STDERR not in measured(model, centres[:2], "gap")


def test_a_fresh_adam_has_no_known_step() -> None:
    model, x, y = regression(8, 3)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="AdamW has not made a step yet"):
        assert not measured(model, [(x, y)], "stability", loss_of=loss_of, optimizer=optimizer)


def test_complex_weights_at_odd_places_have_exact_products() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.pair = nn.Parameter(torch.ones(2, dtype=torch.complex128))

        def forward(self, scale: float) -> Tensor:
            return scale * (self.real.square().sum() + 3 * self.pair.abs().square().sum())

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # products would be differences
        values = measured(Odd(), [1.0], "trace_hessian")
    assert values[tags.TRACE_HESSIAN] == pytest.approx(3 * 2 + 4 * 6)


# Labels that are hardly ever drawn


class Softmax(nn.Module):
    """A linear classifier of four classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def score_matrices(model: nn.Module, logits_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """sqrt(p_c) grad log p_c, shape [samples, labels, weights]."""
    weights = list(model.parameters())
    rows = []
    for sample in x:
        log_p = logits_of(sample[None])[0].log_softmax(-1)
        rows.append(
            torch.stack(
                [
                    (one.detach() / 2).exp() * flatten(torch.autograd.grad(one, weights, retain_graph=True))
                    for one in log_p
                ]
            )
        )
    return torch.stack(rows)


def test_all_labels_miss_no_rare_one() -> None:
    """Every prediction has log-odds of 9, so Tr F sits in labels of probability 1e-4, of which 3,600 draws see few."""
    model = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(9 * torch.eye(4) + 0.1 * torch.randn(4, 4))
    y = torch.arange(12) % 4
    x = torch.eye(4, dtype=torch.float64)[y]

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    truth = float(score_matrices(model, model, x).square().sum()) / 12
    found = measured(
        model, [(x, y)], "trace_gauss_newton", "trace_fisher", loss_of=loss_of, max_vectors=300, relative_error=0
    )
    error = found[tags.TRACE_GAUSS_NEWTON + tags.STDERR]
    assert 0 < error < 0.1 * truth
    assert abs(found[tags.TRACE_GAUSS_NEWTON] - truth) < 3.5 * error
    drawn = found[tags.TRACE_FISHER], found[tags.TRACE_FISHER + tags.STDERR]
    assert drawn[1] > 5 * error or drawn[0] < 0.1 * truth


def losses_of_labels() -> dict[str, tuple[Callable[..., Any], Tensor, dict[str, Any]]]:
    torch.manual_seed(0)
    logits, soft = torch.randn(2, 5, 3, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, -100, 1])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    given = {"target": target, "weight": weight}
    ones = torch.ones(5, 3, dtype=torch.float64)
    return {
        "cross entropy": (sampled_cross_entropy, logits, given),
        "along images": (sampled_cross_entropy, logits.T[None], {"target": target[None]}),
        "nll": (lambda z, **more: sampled_nll_loss(z.log_softmax(-1), **more), logits, given),
        "binary": (sampled_binary_cross_entropy_with_logits, logits, {"target": ones, "pos_weight": weight}),
        "probabilities": (
            lambda z, **more: sampled_binary_cross_entropy(z.sigmoid(), **more),
            logits,
            {"target": ones},
        ),
        "kl": (
            lambda z, **more: sampled_kl_div(z.log_softmax(-1), **more),
            logits,
            {"target": soft.softmax(-1), "reduction": "batchmean"},
        ),
        "kl along images": (
            lambda z, **more: sampled_kl_div(z.log_softmax(1), **more).times(torch.ones((), dtype=torch.float64)),
            logits.T[None],
            {"target": soft.softmax(-1).T[None], "reduction": "none", "dim": 1},
        ),
    }


@pytest.mark.parametrize("name", losses_of_labels())
def test_signs_and_draws_have_the_same_mean(name: str) -> None:
    """The mean square of each logit's score, over many signs and over many draws."""
    sampled, logits, settings = losses_of_labels()[name]
    logits.requires_grad_(True)
    means, errors = [], []
    for labels in ("all", "drawn"):
        generator = torch.Generator().manual_seed(1)
        squares = torch.stack(
            [
                torch.autograd.grad(sampled(logits, **settings, labels=labels, generator=generator).score, logits)[0]
                for _ in range(500)
            ]
        ).square()
        means.append(squares.mean(0))
        errors.append(squares.std(0) / math.sqrt(500))
    assert bool(((means[0] - means[1]).abs() <= 4.5 * (errors[0] ** 2 + errors[1] ** 2).sqrt() + 1e-15).all())
    assert float(means[0].sum()) > 0


def test_every_loss_of_labels_takes_all_of_them() -> None:
    tested = {"sampled_cross_entropy", "sampled_nll_loss", "sampled_kl_div"}
    tested |= {"sampled_binary_cross_entropy", "sampled_binary_cross_entropy_with_logits"}
    takes = {one.__name__ for one in SAMPLED.values() if "labels" in one.__kwdefaults__}
    assert takes == tested


@pytest.mark.parametrize("labels", ["all", "drawn"])
def test_the_fisher_diagonal_of_a_fitted_module(labels: Any) -> None:
    model = Softmax()
    x = torch.randn(1, 12, 3, dtype=torch.float64)  # of one batch there is one forward pass

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))

    before = cases.clone(model)
    found = fisher_information(model, loss_of, list(x), draws=1500, labels=labels)
    cases.assert_same_bits(model, before)
    truth = score_matrices(model, model, x.flatten(0, 1)).square().sum(1).mean(0)
    assert found.keys() == {"linear.weight", "linear.bias"}
    assert found["linear.weight"].shape == (4, 3)
    # a mean of 1,500 squares of nearly normal numbers
    torch.testing.assert_close(torch.cat([one.flatten() for one in found.values()]), truth, rtol=0.17, atol=0.0)


def test_the_fisher_diagonal_refuses_what_it_would_ignore() -> None:
    model = Softmax()
    with pytest.raises(ConfigurationError, match="`labels` 'drawn' with a `fisher_loss`"):
        fisher_information(model, model, [torch.ones(1, 3)], fisher_loss=model)
    with pytest.raises(ConfigurationError, match="`draws`"):
        fisher_information(model, model, [torch.ones(1, 3)], draws=0)
    with pytest.raises(ConfigurationError, match="`batches` to be a list of batches, got generator"):
        fisher_information(model, model, (x for x in [torch.ones(1, 3)]))
    with pytest.raises(ConfigurationError, match=r"copy of the `model.state_dict\(\)` of the start, got Softmax"):
        measured(model, [torch.ones(1, 3)], "compression_gap", start=model)


# Samples


def overlaps(scores: Tensor) -> tuple[float, float]:
    """sigma / m and max_i lambda_1(H_i), from dense matrices."""
    dense = scores.transpose(1, 2) @ scores
    count = len(dense)
    matrix = torch.stack([torch.stack([(a @ b).trace().clamp(min=0).sqrt() for b in dense]) for a in dense])
    largest = float(torch.linalg.eigvalsh(dense)[:, -1].max())
    return float(torch.linalg.eigvalsh(matrix)[-1]) / (count * largest), largest


def test_coherence_is_that_of_the_dense_matrices() -> None:
    model = Softmax()
    x = torch.randn(6, 3, dtype=torch.float64)

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    values = measured(
        model, [x], "coherence", loss_of=loss_of, optimizer=optimizer, num_samples=6, train_size=60, train_batch=20
    )
    sigma, largest = overlaps(score_matrices(model, model, x))
    assert values[tags.COHERENCE] == pytest.approx(sigma, rel=1e-9)
    assert values[tags.COHERENCE_RATIO] == pytest.approx(0.5 * largest * math.sqrt(60 / 20 - 1) / 60, rel=1e-9)


def test_coherence_of_equal_and_of_orthogonal_samples() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def loss_of(batch: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch), torch.ones(len(batch), 1).double())

    equal, orthogonal = torch.ones(4, 4).double(), torch.eye(4).double()
    for x, sigma in ((equal, 1.0), (orthogonal, 0.25)):
        assert measured(model, [x], "coherence", loss_of=loss_of)[tags.COHERENCE] == pytest.approx(sigma, rel=1e-9)
    with pytest.warns(UserWarning, match="skips coherence: the loss is not one cross entropy"):
        measured(model, [equal], "coherence", loss_of=lambda x: F.mse_loss(model(x), torch.ones(4, 1).double()))


def test_the_variance_of_dropout_along_the_top_eigenvectors() -> None:
    """Squared error of a linear model: H = 2 x^T x / n, and dropout's gradients are known for every mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(9, 1, bias=False)).double()
    x = torch.randn(40, 9, dtype=torch.float64) * torch.linspace(0.3, 2.0, 9)
    y = torch.randn(40, 1, dtype=torch.float64)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    settings = {"max_vectors": 600, "tolerance": 1e-10, "max_iterations": 60}
    values = measured(model, [(x, y)], "dropout_variance", loss_of=loss_of, **settings)
    eigenvalues, vectors = torch.linalg.eigh(2 * x.T @ x / 40)
    weight, projections = model[1].weight.detach(), []
    for _ in range(600):
        masked = F.dropout(x, 0.3)
        gradient = 2 * (masked @ weight.T - y).T @ masked / 40
        projections.append((gradient @ vectors)[0])
    variances = torch.stack(projections).var(0)
    top = torch.stack([eigenvalues[-8:].log(), variances[-8:].log()])
    assert values[tags.DROPOUT_VARIANCE] == pytest.approx(float(variances[-1]), rel=0.25)
    assert values[tags.DROPOUT_SLOPE] == pytest.approx(float(torch.cov(top)[0, 1] / top[0].var()), abs=0.15)
    assert values[tags.DROPOUT_CORRELATION] == pytest.approx(float(torch.corrcoef(top)[0, 1]), abs=0.1)
    assert not math.isnan(values[tags.DROPOUT_SLOPE])
    with pytest.warns(UserWarning, match="there is no dropout in the module"):
        measured(model[1], [(x, y)], "dropout_variance", loss_of=lambda b: F.mse_loss(model[1](b[0]), b[1]))


# Layers


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-12), nn.Linear(8, 3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def test_effective_rates_are_those_of_weights_before_a_normalization() -> None:
    model = Normalized().double()
    x, y = torch.randn(16, 6).double(), torch.randint(3, (16,))

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    known = {"loss_of": loss_of, "optimizer": torch.optim.SGD(model.parameters(), lr=0.2)}
    values = measured(model, [(x, y)], "effective_lr", **known)
    square = float(model.first.weight.square().sum())
    norm, rate = tags.SQUARED_NORM.format("first.weight"), tags.EFFECTIVE_LR.format("first.weight")
    assert values.keys() == {norm, rate}  # a bias before the norm changes nothing at all, which is no invariance
    assert (values[norm], values[rate]) == (pytest.approx(square), pytest.approx(0.2 / square))
    with torch.no_grad():
        model.first.weight *= 2
    assert measured(model, [(x, y)], "effective_lr", **known)[rate] == pytest.approx(0.05 / square)
    with pytest.warns(UserWarning, match="no weight whose length changes nothing"):
        measured(model.last, [torch.randn(4, 8).double()], "effective_lr", loss_of=lambda b: model.last(b).exp().mean())


def test_kinds_of_blocks_of_the_usual_transformers() -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llama = kinds_of_blocks(LlamaForCausalLM(LlamaConfig(vocab_size=11, **small)))
    prefix = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": "embedding",
        **{f"{prefix}self_attn.{one}_proj.weight": "query_key" for one in "qk"},
        **{f"{prefix}self_attn.{one}_proj.weight": "value_output" for one in "vo"},
        **{f"{prefix}mlp.{one}_proj.weight": "feed_forward" for one in ("gate", "up", "down")},
        **{f"{prefix}{one}_layernorm.weight": "norm" for one in ("input", "post_attention")},
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    }
    assert llama == expected
    bert = kinds_of_blocks(BertForSequenceClassification(BertConfig(vocab_size=11, **small)))
    layer = "bert.encoder.layer.0."
    assert bert[f"{layer}attention.self.query.weight"] == bert[f"{layer}attention.self.key.bias"] == "query_key"
    assert bert[f"{layer}attention.self.value.weight"] == "value_output"
    assert bert[f"{layer}attention.output.dense.weight"] == "value_output"
    assert bert[f"{layer}intermediate.dense.weight"] == bert[f"{layer}output.dense.weight"] == "feed_forward"
    assert bert[f"{layer}output.LayerNorm.weight"] == "norm"
    assert bert["classifier.weight"] == "head"
    gpt = kinds_of_blocks(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=4)))
    assert gpt["transformer.h.0.attn.c_attn.weight"] == "query_key_value"
    assert gpt["transformer.h.0.attn.c_proj.weight"] == "value_output"
    assert gpt["transformer.h.0.mlp.c_proj.weight"] == "feed_forward"
    assert gpt["transformer.wte.weight"] == gpt["transformer.wpe.weight"] == "embedding"


def test_the_curvature_of_blocks_is_the_mean_of_their_coordinates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    tokens, y = torch.randint(5, (12,)), torch.randint(3, (12,))
    found = measure_sharpness(
        model, lambda batch: F.cross_entropy(model(batch), y), [tokens], ["block_curvature", "layer_traces"]
    )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    traces = found.layer_traces
    assert found.blocks == {
        "embedding": pytest.approx(traces["0.weight"] / sizes["0.weight"]),
        "norm": pytest.approx((traces["1.weight"] + traces["1.bias"]) / 8),
        "other": pytest.approx((traces["2.weight"] + traces["2.bias"]) / 15),
    }
    assert found.values[tags.BLOCK_CURVATURE.format("norm")] == found.blocks["norm"]


# Rounding as a perturbation


def test_a_step_at_rounded_weights() -> None:
    """The gradient of Q(theta), applied to theta."""
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
    reference.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randint(2, (6,))
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.3), kappa=0.0, perturbation=Rounding(3))
    step(lambda batch: F.cross_entropy(model(batch), y), x)
    weight = reference.weight.detach()
    scale = float(weight.abs().max()) / 3
    rounded = ((weight / scale).round() * scale).requires_grad_(True)
    loss = F.cross_entropy(F.linear(x, rounded, reference.bias), y)
    gradients = torch.autograd.grad(loss, [rounded, reference.bias])
    torch.testing.assert_close(model.weight.detach(), weight - 0.3 * gradients[0])
    torch.testing.assert_close(model.bias.detach(), reference.bias.detach() - 0.3 * gradients[1])
    assert repr(Rounding(3)) == "Rounding(bits=3)"


def test_rounding_of_what_cannot_be_rounded() -> None:
    weights = [torch.zeros(2, 2), torch.tensor([[1.0, math.inf]]), torch.ones(3), torch.empty(0, 2)]
    moves, steps = rounding_displacement(weights, 8)
    assert moves == [None] * 4
    assert steps == [0.0] * 4
    (move,), _ = rounding_displacement([torch.tensor([[1.0 + 0.3j]])], 2)
    torch.testing.assert_close(move, torch.tensor([[0.0 - 0.3j]]))
    for settings, words in (({"bits": 1}, "`bits`"), ({"rho_schedule": "lr"}, "no `rho_schedule` for Rounding")):
        with pytest.raises(ConfigurationError, match=words):
            Rounding(**settings)


# The monitor


class WithHeldOut(Exact):
    def val_dataloader(self) -> Any:
        return cases.loader(cases.data(16, torch.float64, seed=5), 8)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_the_monitor_adds_up_the_gap_and_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    train = cases.loader(cases.data(24, torch.float64), 8)
    seen: list[tuple[int, float, float]] = []

    class Kept(SharpnessMonitor):
        def _measure_and_log(self, trainer: Any, *args: Any) -> None:
            super()._measure_and_log(trainer, *args)
            values = self.last.values
            seen.append((trainer.global_step, values[tags.GAP_RATE], values[tags.GAP_PREDICTED]))
            assert tags.GAP_MEASURED in values

    def run(epochs: int, ckpt_path: str | None = None) -> Any:
        monitor = Kept(quantities=["gap"], num_batches=3)
        return cases.fit(WithHeldOut(Net()), [monitor], train, max_epochs=epochs, ckpt_path=ckpt_path)

    run(2).save_checkpoint(tmp_path / "half.ckpt")
    assert [step for step, *_ in seen] == [3, 6]
    (_, first, _), (_, second, total) = seen
    assert total == pytest.approx(3 * first + 3 * (first + second) / 2)
    run(3, str(tmp_path / "half.ckpt"))
    step, third, after = seen[-1]
    assert step == 9
    assert after == pytest.approx(total + 3 * (second + third) / 2)


def test_the_monitor_keeps_the_weights_of_the_start() -> None:
    train = cases.loader(cases.data(24, torch.float64), 8)
    monitor = SharpnessMonitor(quantities=["compression_gap"], deleted=1.0, max_vectors=2)
    module = Exact(Net())
    begin = cases.clone(module)
    cases.fit(module, [monitor], train, max_epochs=1)
    (batch,) = monitor._probe._batches
    loss = {
        name: float(F.cross_entropy(one.net(batch[0]), batch[1])) for name, one in (("then", begin), ("now", module))
    }
    assert monitor.last.values[tags.DELETION_GAP] == pytest.approx(loss["then"] - loss["now"], rel=1e-9)


def test_wrong_settings_are_one_line() -> None:
    for settings, words in (
        ({"bits": 1}, "`bits`"),
        ({"bits": 33}, "`bits` to be a whole number from 2 to 32, got 33"),
        ({"deleted": 0.0}, "`deleted`"),
        ({"deleted": 1.5}, "`deleted`"),
        ({"num_samples": 1}, "`num_samples`"),
    ):
        with warnings.catch_warnings(), pytest.raises(ConfigurationError, match=words):
            SharpnessMonitor(**settings)
