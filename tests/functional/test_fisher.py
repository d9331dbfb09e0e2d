"""Sampled labels, the loss against them, and the estimate of the Fisher's diagonal (eq. 6)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ire.functional import fisher, fisher_diagonal, sample_labels, sampled_cross_entropy

SHAPES = [(5,), (7, 5), (4, 5, 3), (2, 5, 3, 2)]
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.2, 5.0, 0.7], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn_logits(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def class_dim(logits):
    return 1 if logits.dim() > 1 else 0


def label_shape(logits):
    dims = list(logits.shape)
    del dims[class_dim(logits)]
    return tuple(dims)


def drawn_targets(logits, seed=1):
    return torch.randint(logits.size(class_dim(logits)), label_shape(logits), generator=seeded(seed))


# labels


@pytest.mark.parametrize("count", [1_000, 10_000, 100_000])
def test_frequencies_converge_to_the_softmax(count):
    """Every frequency within four standard errors sqrt(p (1 - p) / n), at each n: the error falls like 1/sqrt(n)."""
    logits = torch.tensor([0.0, 2.0, -3.0, 1.0, 0.5], dtype=torch.float64)
    p = logits.softmax(0)
    labels = sample_labels(logits.expand(count, 5), seeded(count))
    frequencies = torch.bincount(labels, minlength=5) / count
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


def test_each_prediction_is_drawn_from_its_own_softmax():
    logits = torch.tensor([[0.0, 60.0, 0.0], [60.0, 0.0, 0.0], [0.0, 0.0, 60.0]])
    assert sample_labels(logits).tolist() == [1, 0, 2]
    over_positions = torch.stack([logits, logits.flip(0)])  # [2, 3 positions, C] -> [2, C, 3 positions]
    assert sample_labels(over_positions.movedim(2, 1)).tolist() == [[1, 0, 2], [2, 0, 1]]


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (3, 5, 0)])
def test_shape_and_dtype_of_the_labels(shape):
    logits = drawn_logits(shape).requires_grad_()
    labels = sample_labels(logits)
    assert labels.shape == label_shape(logits)
    assert labels.dtype == torch.int64
    assert not labels.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_classes_of_probability_zero_are_never_drawn(dtype):
    logits = torch.zeros(20_000, 6, dtype=dtype)
    logits[:, [0, 3, 5]] = -math.inf
    labels = sample_labels(logits, seeded())
    assert set(labels.tolist()) == {1, 2, 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("draw", "expected"), [(0.0, 10), (1 - 2**-53, 49_989)])
def test_the_ends_of_the_unit_interval_fall_on_possible_classes(monkeypatch, dtype, draw, expected):
    """torch.rand gives 0 and 1 - 2^-53 too; 1 - 2^-53 is 1 in float32."""
    logits = torch.zeros(2, 50_000, dtype=dtype)
    logits[:, :10] = logits[:, -10:] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, generator: torch.full(*size, draw, dtype=dtype))
    labels = sample_labels(logits)
    assert ((labels >= 10) & (labels < 49_990)).all()
    # rounding of the cumulative sum may shift the upper end by some classes of 2e-5 each, never beyond the last
    assert (labels - expected).abs().max() <= (0 if draw == 0 or dtype == torch.float64 else 100)


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3)])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 11), (5, 7)])
def test_micro_batches_draw_what_one_batch_would(shape, sizes):
    logits = drawn_logits(shape, dtype=torch.float32)
    generator = seeded()
    parts = [sample_labels(part, generator) for part in logits.split(sizes)]
    assert torch.equal(torch.cat(parts), sample_labels(logits, seeded()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits_draw_like_the_same_numbers_in_float32(dtype):
    """A softmax over 1000 classes summed up in bfloat16 would stop growing at 256 / 1000."""
    logits = drawn_logits((500, 1000), dtype=dtype)
    assert torch.equal(sample_labels(logits, seeded()), sample_labels(logits.float(), seeded()))


def test_a_given_generator_is_the_only_one_that_moves():
    logits, generator = drawn_logits((6, 5)), seeded()
    before, own = torch.get_rng_state(), generator.get_state()
    sample_labels(logits, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), own)


def test_global_generator_by_default():
    logits = drawn_logits((50, 5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = sample_labels(logits), sample_labels(logits)
    assert torch.equal(first, sample_labels(logits, seeded(5)))
    assert not torch.equal(first, second)


# the loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_cross_entropy_against_the_drawn_labels(shape, reduction):
    logits = drawn_logits(shape)
    labels = sample_labels(logits, seeded())
    for target in (drawn_targets(logits), drawn_logits(shape, seed=3).softmax(class_dim(logits))):
        got = sampled_cross_entropy(logits, target, reduction=reduction, generator=seeded())
        torch.testing.assert_close(got.loss, F.cross_entropy(logits, labels, reduction=reduction), rtol=1e-14, atol=0)
        each = 1 / labels.numel() if reduction == "mean" else 1.0
        assert torch.equal(got.weights, torch.full_like(labels, each, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_ignored_positions_do_not_count(shape, reduction):
    logits = drawn_logits(shape)
    target = drawn_targets(logits)
    ignored = torch.rand(target.shape, generator=seeded(2)) < 0.4
    labels = sample_labels(logits, seeded()).masked_fill(ignored, -100)
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    for marker in (-100, -1, 255):
        got = sampled_cross_entropy(
            logits, target.masked_fill(ignored, marker), ignore_index=marker, reduction=reduction, generator=seeded()
        )
        torch.testing.assert_close(got.loss, expected, rtol=1e-14, atol=0)
        assert torch.equal(got.weights == 0, ignored)
        assert got.weights.sum().item() == pytest.approx(1.0 if reduction == "mean" else int((~ignored).sum()))


def test_an_ignored_class_may_be_drawn_elsewhere():
    """Where class 1 marks what does not count, the model may still predict class 1 for what does."""
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([2, 1, 0])
    assert sample_labels(logits, seeded()).tolist() == [1, 1, 0]
    got = sampled_cross_entropy(logits, target, ignore_index=1, reduction="none", generator=seeded())
    nll = F.cross_entropy(logits, torch.tensor([1, 1, 0]), reduction="none")
    assert got.weights.tolist() == [1.0, 0.0, 1.0]
    torch.testing.assert_close(got.loss, nll * torch.tensor([1.0, 0.0, 1.0]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_training_loss_where_the_draws_hit_the_targets(monkeypatch, shape, reduction, soft):
    """Then the loss is the training loss itself, class weights, ignored positions and reduction included."""
    logits = drawn_logits(shape)
    labels = drawn_targets(logits)
    monkeypatch.setattr(fisher, "sample_labels", lambda logits, generator=None: labels)
    target = labels
    if soft:
        target = F.one_hot(labels, 5).movedim(-1, class_dim(logits)).double()
    elif labels.numel() > 1:
        target = labels.masked_fill(torch.arange(labels.numel()).reshape(labels.shape) % 3 == 1, -7)
    settings = {"weight": CLASS_WEIGHTS, "ignore_index": -7, "reduction": reduction}
    got = sampled_cross_entropy(logits, target, **settings)
    torch.testing.assert_close(got.loss, F.cross_entropy(logits, target, **settings), rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_those_of_the_predictions_in_the_loss(shape, reduction, weight, soft):
    """The loss is sum_i w_i * nll_i; one value of it per prediction for "none"."""
    logits = drawn_logits(shape)
    target = drawn_logits(shape, seed=3).softmax(class_dim(logits)) if soft else drawn_targets(logits)
    if not soft and target.numel() > 1:
        target.view(-1)[0] = -100
    got = sampled_cross_entropy(logits, target, weight=weight, reduction=reduction, generator=seeded())
    terms = got.weights * F.cross_entropy(logits, sample_labels(logits, seeded()), reduction="none")
    assert got.weights.shape == label_shape(logits)
    torch.testing.assert_close(got.loss, terms if reduction == "none" else terms.sum(), rtol=1e-13, atol=0)
    if reduction == "mean" and not soft:
        assert got.weights.sum().item() == pytest.approx(1.0, rel=1e-14)


def test_the_loss_has_a_graph_and_the_weights_have_none():
    logits = drawn_logits((4, 5)).requires_grad_()
    got = sampled_cross_entropy(logits, drawn_targets(logits), weight=CLASS_WEIGHTS)
    assert got.loss.requires_grad
    assert not got.weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_logits_are_float32(dtype):
    """The mean over 5000 predictions weighs each 0.0002, which bfloat16 knows to three digits."""
    logits = drawn_logits((5000, 3), dtype=dtype)
    got = sampled_cross_entropy(logits, drawn_targets(logits))
    assert got.weights.dtype == torch.float32
    assert 1 / got.weights.square().sum().item() == pytest.approx(5000, rel=1e-5)


# the estimate


class Softmax3:
    """Three classes, two inputs, three predictions: small enough to enumerate all 27 draws of the labels."""

    def __init__(self, alike=False):
        self.inputs = drawn_logits((3, 2), seed=4)
        if alike:
            self.inputs = self.inputs[:1].expand(3, 2)
        self.weight = drawn_logits((3, 2), seed=5).requires_grad_()
        self.bias = drawn_logits((3,), seed=6).requires_grad_()

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def logits(self):
        return self.inputs @ self.weight.T + self.bias

    def estimate(self, target, **settings):
        sampled = sampled_cross_entropy(self.logits(), target, **settings)
        gradients = torch.autograd.grad(sampled.loss, self.parameters)
        h = fisher_diagonal(gradients, 1 / sampled.weights.square().sum())
        return torch.cat([value.reshape(-1) for value in h])

    def exact(self):
        """Diagonal of E_y[g g'], y ~ softmax, of each prediction: shape [3, 9]."""
        logits = self.logits()
        p = logits.softmax(1).detach()
        rows = []
        for i in range(3):
            squares = 0
            for c in range(3):
                gradients = torch.autograd.grad(-logits[i].log_softmax(0)[c], self.parameters, retain_graph=True)
                squares = squares + p[i, c] * torch.cat([g.reshape(-1) for g in gradients]) ** 2
            rows.append(squares)
        return torch.stack(rows)

    def expectation(self, monkeypatch, target, **settings):
        """Exact mean of the estimate over all draws of labels."""
        p, total = self.logits().softmax(1).detach(), 0
        for draw in itertools.product(range(3), repeat=3):
            labels = torch.tensor(draw)
            monkeypatch.setattr(fisher, "sample_labels", lambda logits, generator=None, labels=labels: labels)
            total = total + p[torch.arange(3), labels].prod() * self.estimate(target, **settings)
        return total


SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("target", "class_weights", "reduction", "expected_weights"),
    [
        pytest.param([0, 2, 1], None, "mean", [1, 1, 1], id="mean"),
        pytest.param([0, 2, 1], None, "sum", [1, 1, 1], id="sum"),
        pytest.param([0, -100, 1], None, "mean", [1, 0, 1], id="ignored"),
        pytest.param([-100, -100, 1], None, "mean", [0, 0, 1], id="one left"),
        pytest.param(SOFT, None, "mean", [1, 1, 1], id="soft"),
        pytest.param([0, 2, 1], [1.0, 4.0, 0.5], "mean", [1.0, 0.5, 4.0], id="class weights"),
        pytest.param([0, 2, 1], [1.0, 4.0, 0.5], "sum", [1.0, 0.5, 4.0], id="class weights, sum"),
        pytest.param([0, -100, 1], [1.0, 4.0, 0.5], "mean", [1.0, 0, 4.0], id="class weights, ignored"),
        pytest.param(SOFT, [1.0, 4.0, 0.5], "mean", [1.9, 0.9, 4.0], id="class weights, soft"),
    ],
)
def test_the_estimate_is_unbiased(monkeypatch, target, class_weights, reduction, expected_weights):
    """E[B G G] = sum_i w_i^2 F_i / sum_i w_i^2, where w_i is the weight that prediction i has in the training loss.

    With class weights that is the weight of its target. Were it the weight of its drawn label, w_i * g_i would not
    have mean zero, the cross terms of G G would stay, and the estimate would grow with the batch.
    """
    model = Softmax3()
    target = target if isinstance(target, torch.Tensor) else torch.tensor(target)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    squares = torch.tensor(expected_weights, dtype=torch.float64) ** 2
    expected = (squares[:, None] * model.exact()).sum(0) / squares.sum()
    got = model.expectation(monkeypatch, target, weight=weight, reduction=reduction)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("class_weights", [None, [1.0, 4.0, 0.5]])
def test_a_batch_of_equal_examples_has_the_fisher_of_one(monkeypatch, class_weights):
    """Whatever a class weight means: three copies of one labelled example are that example."""
    model = Softmax3(alike=True)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    got = model.expectation(monkeypatch, torch.tensor([1, 1, 1]), weight=weight)
    torch.testing.assert_close(got, model.exact()[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("target", "counted"),
    [pytest.param([0, 2, 1], [0, 1, 2], id="mean"), pytest.param([0, -100, 1], [0, 2], id="ignored")],
)
def test_the_mean_of_many_estimates_converges_to_the_exact_diagonal(target, counted):
    """With the labels really drawn: within four standard errors, which fall like 1/sqrt(n) and end at a few percent."""
    model, generator = Softmax3(), seeded(7)
    exact = model.exact()[counted].mean(0)
    estimates = torch.stack([model.estimate(torch.tensor(target), generator=generator) for _ in range(3000)])
    for count in (100, 3000):
        some = estimates[:count]
        errors = some.std(0) / math.sqrt(count)
        assert ((some.mean(0) - exact).abs() <= 4 * errors).all()
    assert (errors / exact).max() < 0.1


def test_fisher_diagonal_scales_squares():
    got = fisher_diagonal([torch.tensor([[0.5], [-2.0]]), None, torch.tensor(3.0)], batch=8)
    assert got[0].tolist() == [[2.0], [32.0]]
    assert got[1] is None
    assert got[2].item() == 72.0
    assert fisher_diagonal([torch.tensor([2.0])], torch.tensor(0.5, dtype=torch.float64))[0].tolist() == [2.0]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_fisher_diagonal_is_at_least_float32(dtype, wide):
    """The square of 1e-4 is 0 in float16, that of 300 infinite."""
    gradient = torch.tensor([1e-4, 300.0], dtype=dtype)
    (h,) = fisher_diagonal([gradient], 2)
    assert h.dtype == wide
    torch.testing.assert_close(h.double(), 2 * gradient.double() ** 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fisher_diagonal_leaves_the_gradients_alone(dtype):
    gradient = torch.tensor([0.5, -2.0], dtype=dtype, requires_grad=True)
    (h,) = fisher_diagonal([gradient], 8)
    assert gradient.tolist() == [0.5, -2.0]
    assert not h.requires_grad
