"""Losses against drawn targets: the draws, the weights, and the Gauss-Newton matrix that the score's square is of."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ire.functional import (
    SAMPLED,
    fisher_diagonal,
    sample_labels,
    sampled_binary_cross_entropy,
    sampled_binary_cross_entropy_with_logits,
    sampled_cross_entropy,
    sampled_gaussian_nll_loss,
    sampled_kl_div,
    sampled_log_prob,
    sampled_losses,
    sampled_mse_loss,
    sampled_nll_loss,
    sampled_poisson_nll_loss,
)

SHAPES = [(5,), (7, 5), (4, 5, 3), (2, 5, 3, 2)]
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.2, 5.0, 0.7], dtype=torch.float64)
HALF_TYPES = [torch.float16, torch.bfloat16]


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


# one loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_that_of_the_drawn_labels(shape, reduction):
    logits = drawn_logits(shape)
    labels = sample_labels(logits, seeded())
    for target in (drawn_targets(logits), drawn_logits(shape, seed=3).softmax(class_dim(logits))):
        got = sampled_cross_entropy(logits, target, reduction=reduction, generator=seeded())
        assert torch.equal(got.losses, F.cross_entropy(logits, labels, reduction="none"))
        each = 1 / labels.numel() if reduction == "mean" else 1.0
        assert torch.equal(got.weights, torch.full_like(labels, each, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [sampled_cross_entropy, sampled_nll_loss])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_ignored_positions_do_not_count(shape, loss, reduction):
    logits = drawn_logits(shape).log_softmax(1)
    target = drawn_targets(logits)
    ignored = torch.rand(target.shape, generator=seeded(2)) < 0.4
    counted = int((~ignored).sum())
    for marker in (-100, -1, 255):
        got = loss(
            logits, target.masked_fill(ignored, marker), ignore_index=marker, reduction=reduction, generator=seeded()
        )
        each = 1 / counted if reduction == "mean" else 1.0
        torch.testing.assert_close(got.weights, each * (~ignored).double(), rtol=1e-14, atol=0)
        labels = sample_labels(logits, seeded())
        expected = F.cross_entropy(logits, labels, reduction="none").masked_fill(ignored, 0.0)
        torch.testing.assert_close(got.losses, expected, rtol=1e-14, atol=0)


def test_an_ignored_class_may_be_drawn_elsewhere():
    """Where class 1 marks what does not count, the model may still predict class 1 for what does."""
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([2, 1, 0])
    assert sample_labels(logits, seeded()).tolist() == [1, 1, 0]
    for loss in (sampled_cross_entropy, sampled_nll_loss):
        got = loss(logits.log_softmax(1), target, ignore_index=1, reduction="none", generator=seeded())
        nll = F.cross_entropy(logits, torch.tensor([1, 1, 0]), reduction="none")
        assert got.weights.tolist() == [1.0, 0.0, 1.0]
        torch.testing.assert_close(got.losses, nll * torch.tensor([1.0, 0.0, 1.0]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_training_loss_where_the_draws_hit_the_targets(monkeypatch, shape, reduction, weight, soft):
    """Then sum_i w_i l_i is the training loss itself, class weights, ignored positions and reduction included."""
    logits = drawn_logits(shape)
    labels = drawn_targets(logits)
    monkeypatch.setattr(sampled_losses, "sample_labels", lambda logits, generator=None: labels)
    target = labels
    if soft:
        target = F.one_hot(labels, 5).movedim(-1, class_dim(logits)).double()
    elif labels.numel() > 1:
        target = labels.masked_fill(torch.arange(labels.numel()).reshape(labels.shape) % 3 == 1, -7)
    settings = {"weight": weight, "ignore_index": -7, "reduction": reduction}
    expected = F.cross_entropy(logits, target, **settings)
    got = sampled_cross_entropy(logits, target, **settings)
    terms = got.weights * got.losses
    assert got.weights.shape == label_shape(logits)
    torch.testing.assert_close(terms if reduction == "none" else terms.sum(), expected, rtol=1e-14, atol=0)
    if not soft:
        got = sampled_nll_loss(logits.log_softmax(class_dim(logits)), target, **settings)
        terms = got.weights * got.losses
        torch.testing.assert_close(terms if reduction == "none" else terms.sum(), expected, rtol=1e-14, atol=0)


ELEMENTWISE = {
    "bce-logits": (sampled_binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
    "bce": (sampled_binary_cross_entropy, F.binary_cross_entropy),
    "mse": (sampled_mse_loss, F.mse_loss),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, settings) for name in ELEMENTWISE for settings in ([], ["weight"])),
        *(("bce-logits", settings) for settings in (["pos_weight"], ["weight", "pos_weight"])),
    ],
)
def test_weights_of_elements_are_those_of_torch(name, settings, reduction):
    """An element's loss in torch's result over what it is alone."""
    ours, theirs = ELEMENTWISE[name]
    prediction = drawn_logits((4, 3)).sigmoid()
    target = (drawn_logits((4, 3), seed=1) > 0).double()
    given = {"weight": drawn_logits((4, 3), seed=2).exp(), "pos_weight": torch.tensor([0.3, 2.0, 9.0]).double()}
    given = {key: given[key] for key in settings}
    weighted = theirs(prediction, target, **given, reduction="none")
    expected = weighted / theirs(prediction, target, reduction="none")
    if reduction != "none":
        expected = expected * theirs(prediction, target, **given, reduction=reduction) / weighted.sum()
    got = ours(prediction, target, **given, reduction=reduction)
    torch.testing.assert_close(got.weights, expected, rtol=1e-12, atol=0)


def test_weights_that_broadcast():
    logits, target = drawn_logits((4, 3)), (drawn_logits((4, 3), seed=1) > 0).double()
    column, row = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double(), torch.tensor([0.5, 1.0, 7.0]).double()
    got = sampled_binary_cross_entropy_with_logits(logits, target, weight=column, pos_weight=row, reduction="sum")
    torch.testing.assert_close(got.weights, column * torch.where(target > 0, row, 1.0))
    got = sampled_binary_cross_entropy(logits.sigmoid(), target, weight=row)
    torch.testing.assert_close(got.weights, (row / 12).expand(4, 3))
    got = sampled_mse_loss(drawn_logits((4, 1)), drawn_logits((1, 3)))
    assert got.losses.shape == (4, 3)
    torch.testing.assert_close(got.weights, torch.full((4, 3), 1 / 12, dtype=torch.float64))


ALL = {
    sampled_cross_entropy: lambda z: z.argmin(1),
    sampled_nll_loss: lambda z: z.argmin(1),
    sampled_binary_cross_entropy_with_logits: lambda z: z.sigmoid(),
    sampled_binary_cross_entropy: lambda z: z.round(),
    sampled_mse_loss: lambda z: 1 - z,
    sampled_gaussian_nll_loss: lambda z: 1 - z,
    sampled_poisson_nll_loss: lambda z: z.exp().round(),
    sampled_kl_div: lambda z: z.flip(0).exp(),
}
VARIANCES = [sampled_gaussian_nll_loss]
CLASSES_OF = [sampled_cross_entropy, sampled_nll_loss]


def settings_for(loss, weight):
    """What a loss takes besides predictions and targets: a weight per class or element, or a variance."""
    if loss is sampled_gaussian_nll_loss:
        return {"var": weight}
    if loss in (sampled_poisson_nll_loss, sampled_kl_div):
        return {}
    return {"weight": weight}


def variance(loss):
    return {"var": 2.0} if loss in VARIANCES else {}


def predictions_for(loss, shape, dtype=torch.float64):
    z = drawn_logits(shape)
    log_p = z.log_softmax(1)
    own = {sampled_nll_loss: log_p, sampled_kl_div: log_p, sampled_binary_cross_entropy: z.sigmoid()}
    return own.get(loss, z).to(dtype)


def test_every_counterpart_is_registered_and_takes_torchs_arguments():
    assert set(SAMPLED.values()) == set(ALL)
    for theirs, ours in SAMPLED.items():
        assert ours.__name__ == f"sampled_{theirs.__name__}"


@pytest.mark.parametrize("loss", ALL)
def test_losses_have_a_graph_and_weights_have_none(loss):
    prediction = predictions_for(loss, (6, 3)).requires_grad_()
    weight = torch.ones(3).double().requires_grad_()
    settings = settings_for(loss, weight.expand(6, 3) if loss in (sampled_mse_loss, *VARIANCES) else weight)
    got = loss(prediction, ALL[loss](prediction.detach()), **settings)
    assert got.losses.requires_grad
    assert not got.weights.requires_grad
    assert got.score.requires_grad
    torch.testing.assert_close(got.score, (got.weights.sqrt() * got.losses).sum())


@pytest.mark.parametrize("loss", ALL)
def test_nothing_is_changed_in_place_and_only_the_given_generator_moves(loss):
    prediction = predictions_for(loss, (6, 3))
    target, weight, generator = ALL[loss](prediction), torch.tensor([0.5, 1.0, 2.0]).double(), seeded()
    copies = [tensor.clone() for tensor in (prediction, target, weight)]
    stream, own = torch.get_rng_state(), generator.get_state()
    settings = settings_for(loss, weight.expand(6, 3) if loss in (sampled_mse_loss, *VARIANCES) else weight)
    loss(prediction, target, **settings, generator=generator)
    for tensor, copy in zip((prediction, target, weight), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not torch.equal(generator.get_state(), own)


@pytest.mark.parametrize("loss", ALL)
def test_the_global_generator_by_default(loss):
    prediction = predictions_for(loss, (6, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = loss(prediction, ALL[loss](prediction), **variance(loss)).losses
        second = loss(prediction, ALL[loss](prediction), **variance(loss)).losses
    assert torch.equal(first, loss(prediction, ALL[loss](prediction), **variance(loss), generator=seeded(5)).losses)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sizes", [(10, 10, 10, 10), (1, 39), (17, 23)])
@pytest.mark.parametrize("loss", ALL)
def test_micro_batches_draw_what_one_batch_would_for_every_loss(loss, sizes):
    prediction, generator = predictions_for(loss, (40, 3), torch.float32), seeded()
    target = ALL[loss](prediction)
    parts = [
        loss(part, aim, **variance(loss), generator=generator).losses
        for part, aim in zip(prediction.split(sizes), target.split(sizes), strict=True)
    ]
    assert torch.equal(torch.cat(parts), loss(prediction, target, **variance(loss), generator=seeded()).losses)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("loss", ALL)
def test_weights_of_half_types_are_float32(loss, dtype):
    """The mean over 15000 predictions weighs each 7e-5, which bfloat16 knows to three digits."""
    prediction = predictions_for(loss, (5000, 3), dtype)
    got = loss(prediction, ALL[loss](prediction), **variance(loss))
    assert got.weights.dtype == torch.float32
    assert got.losses.dtype == dtype
    total = 1 / 3 if loss is sampled_kl_div else 1.0  # torch takes the mean over the classes, too
    assert got.weights.sum(dtype=torch.float64).item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("loss", [sampled_binary_cross_entropy, sampled_binary_cross_entropy_with_logits])
def test_half_predictions_draw_like_the_same_numbers_in_float32(loss, dtype):
    prediction = predictions_for(loss, (400, 3), dtype)
    ours = loss(prediction, prediction, generator=seeded()).losses
    theirs = loss(prediction.float(), prediction.float(), generator=seeded()).losses
    torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02)  # the other label is further away


def test_weights_are_at_least_float32_under_autocast_too():
    logits = drawn_logits((8, 5), dtype=torch.float32)
    target, weight = drawn_logits((8, 5), seed=1, dtype=torch.float32).softmax(1), CLASS_WEIGHTS.float()
    expected = sampled_cross_entropy(logits, target, weight=weight).weights
    with torch.autocast("cpu", torch.bfloat16):
        got = sampled_cross_entropy(logits, target, weight=weight).weights
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss", [sampled_cross_entropy, sampled_nll_loss])
def test_where_all_is_ignored_weights_are_0_and_nothing_is_nan(loss):
    prediction = drawn_logits((4, 3)).log_softmax(1).requires_grad_()
    got = loss(prediction, torch.full((4,), -100))
    assert got.weights.tolist() == [0.0] * 4
    assert got.losses.tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(got.score, prediction)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_batch_has_a_score_of_0(loss):
    prediction = predictions_for(loss, (0, 3)).requires_grad_()
    target = ALL[loss](prediction.detach()) if loss not in CLASSES_OF else torch.zeros(0).long()
    got = loss(prediction, target, **variance(loss))
    assert got.score.item() == 0.0
    assert torch.autograd.grad(got.score, prediction)[0].shape == (0, 3)


@pytest.mark.parametrize("loss", [sampled_binary_cross_entropy, sampled_binary_cross_entropy_with_logits])
def test_labels_have_the_frequency_of_the_probability(loss):
    """Within four standard errors; a label of 1 is told from 0 by the sign of the gradient."""
    p = torch.tensor([0.02, 0.3, 0.5, 0.9], dtype=torch.float64)
    prediction = (p if loss is sampled_binary_cross_entropy else p.logit()).expand(20_000, 4).clone().requires_grad_()
    got = loss(prediction, torch.zeros(20_000, 4).double(), generator=seeded(), reduction="sum")
    (gradient,) = torch.autograd.grad(got.score, prediction)
    frequencies = (gradient < 0).double().mean(0)
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all()


def constant_rand(monkeypatch, draw):
    monkeypatch.setattr(torch, "rand", lambda size, dtype, generator: torch.full(tuple(size), draw, dtype=dtype))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_labels_that_cannot_be_are_never_drawn(monkeypatch, dtype, draw):
    """torch.rand gives 0 and 1 - 2^-53 too; the label 0 at p = 1 would have a gradient of 1e12."""
    constant_rand(monkeypatch, draw)
    p = torch.tensor([0.0, 1.0], dtype=dtype)
    assert sampled_binary_cross_entropy(p, p).losses.tolist() == [0.0, 0.0]
    assert sampled_binary_cross_entropy_with_logits(2000 * p - 1000, p).losses.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_are_finite_noise(monkeypatch, dtype, draw):
    constant_rand(monkeypatch, draw)
    got = sampled_mse_loss(torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)).losses
    assert got.isfinite().all()
    assert (got < 40).all()


def test_the_noise_of_the_squared_error_is_that_of_a_gaussian_of_variance_one_half():
    """Kolmogorov-Smirnov; 1.95 / sqrt(n) is exceeded once in a thousand. Where the prediction is does not matter."""
    count = 20_000
    prediction = (100 * drawn_logits((count,))).requires_grad_()
    got = sampled_mse_loss(prediction, torch.zeros(count).double(), reduction="sum", generator=seeded(1))
    noise = (torch.autograd.grad(got.score, prediction)[0] / -2).sort().values
    torch.testing.assert_close(got.losses.sort().values, noise.square().sort().values)
    expected = torch.special.ndtr(noise / math.sqrt(0.5))
    assert (expected - (torch.arange(count) + 0.5) / count).abs().max() < 1.95 / math.sqrt(count)


def test_two_networks_that_are_to_agree():
    """Targets with a graph: the gradient of the targets is minus that of the prediction, not zero."""
    prediction, target = drawn_logits((5,)).requires_grad_(), drawn_logits((5,), seed=1).requires_grad_()
    one, other = torch.autograd.grad(
        sampled_mse_loss(prediction, target, generator=seeded()).score, [prediction, target]
    )
    assert torch.equal(one, -other)
    assert one.abs().min() > 0
    detached = sampled_mse_loss(prediction, target.detach(), generator=seeded()).score
    assert torch.equal(torch.autograd.grad(detached, prediction)[0], one)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("var", [(4, 3), (4, 1), (4,), None], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_the_gaussian_loss_of_drawn_targets_is_torchs(monkeypatch, var, reduction, full):
    """With noise of 1 everywhere the targets are the mean plus the standard deviation; some variances are below eps."""
    monkeypatch.setattr(sampled_losses, "_normal", lambda like, generator: torch.ones_like(like))
    mean, target = drawn_logits((4, 3)), drawn_logits((4, 3), seed=1)
    variance = 0.7 if var is None else drawn_logits(var, seed=2).exp()
    settings = {"full": full, "eps": 0.6, "reduction": reduction}
    spread = torch.as_tensor(variance, dtype=torch.float64).clamp(min=0.6).sqrt()
    spread = spread.unsqueeze(-1) if var == (4,) else spread
    given = torch.full((4, 3), variance).double() if var is None else variance
    expected = F.gaussian_nll_loss(mean, mean + spread, given, **settings)
    got = sampled_gaussian_nll_loss(mean, target, variance, **settings)
    terms = got.weights * got.losses
    torch.testing.assert_close(terms if reduction == "none" else terms.sum(), expected, rtol=1e-13, atol=0)


def test_a_gaussian_of_a_broadcast_mean():
    """Means of one column for targets of three, variances of the means' shape."""
    got = sampled_gaussian_nll_loss(drawn_logits((3, 1)), drawn_logits((3, 3)), torch.full((3, 1), 2.0).double())
    assert got.losses.shape == got.weights.shape == (3, 3)
    got = sampled_gaussian_nll_loss(drawn_logits((3,)), drawn_logits((3, 3)), torch.tensor([1.0, 1e4, 1.0]).double())
    assert (got.losses[:, 1] > 4).all()  # log(1e4) / 2
    assert (got.losses[:, 0] < 4).any()


def test_gaussian_targets_have_the_predicted_variance():
    """Mean and variance of the scaled noise, within four standard errors."""
    mean = (100 * drawn_logits((20_000,))).requires_grad_()
    var = drawn_logits((20_000,), seed=1).exp()
    got = sampled_gaussian_nll_loss(mean, torch.zeros(20_000).double(), var, reduction="sum", generator=seeded(3))
    noise = -torch.autograd.grad(got.score, mean)[0] * var.sqrt()
    assert abs(float(noise.mean())) < 4 / math.sqrt(20_000)
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize("log_input", [True, False])
def test_counts_have_the_predicted_rate(log_input):
    """A Poisson's mean and variance are its rate; the gradient is rate - count, or that divided by the rate."""
    rate = torch.tensor([0.1, 2.0, 50.0], dtype=torch.float64)
    prediction = (rate.log() if log_input else rate).expand(20_000, 3).clone().requires_grad_()
    got = sampled_poisson_nll_loss(
        prediction, torch.zeros(20_000, 3).double(), log_input=log_input, reduction="sum", generator=seeded(1)
    )
    gradient = torch.autograd.grad(got.score, prediction)[0] * (1 if log_input else rate)
    assert (gradient.mean(0).abs() < 4 * (rate / 20_000).sqrt()).all()
    spread = 4 * ((2 * rate.square() + rate) / 20_000).sqrt()
    assert ((gradient.var(0) - rate).abs() < spread).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 800.0])
def test_a_rate_that_is_no_number_is_no_error(bad):
    """The estimate is not finite then, or the loss flat, which is for the caller to see."""
    got = sampled_poisson_nll_loss(torch.tensor([bad, 0.0]).double().requires_grad_(), torch.zeros(2))
    assert got.losses.shape == (2,)
    assert got.losses[1].isfinite()


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 5, 3), (5,)])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
def test_kl_div_where_the_draws_hit_the_soft_labels(monkeypatch, shape, reduction, log_target):
    """Hard labels have no entropy: then sum_i w_i l_i is the training loss itself."""
    dim = shape.index(5)
    log_p = drawn_logits(shape).log_softmax(dim)
    labels = torch.randint(5, shape[:dim] + shape[dim + 1 :], generator=seeded(1))
    monkeypatch.setattr(sampled_losses, "sample_labels", lambda logits, generator=None: labels.reshape(-1))
    amounts = torch.rand(labels.shape, generator=seeded(2)).double().unsqueeze(dim)
    target = F.one_hot(labels, 5).movedim(-1, dim) * amounts
    constant = torch.xlogy(target, target)
    given = target.clamp(min=1e-300).log() if log_target else target
    expected = F.kl_div(log_p, target, reduction=reduction)
    count = {"mean": log_p.numel(), "batchmean": len(log_p)}.get(reduction, 1)
    got = sampled_kl_div(log_p, given, log_target=log_target, reduction=reduction)
    assert got.losses.shape == (*shape[:dim], 1, *shape[dim + 1 :])
    terms = got.weights * got.losses + (constant / count if reduction == "none" else 0)
    terms = terms if reduction == "none" else terms.sum() + constant.sum() / count
    expected = torch.where(target > 0, expected, 0) if reduction == "none" else expected
    terms = torch.where(target > 0, terms, 0) if reduction == "none" else terms
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=1e-15)
    if reduction == "none":
        summed = got.times(torch.full(shape, -2.0).double())
        assert summed.weights.shape == summed.losses.shape
        torch.testing.assert_close(summed.weights, 2 * amounts)


def test_the_classes_are_where_probabilities_add_up_to_1():
    uneven = drawn_logits((3, 4, 5))
    for dim in range(3):
        assert sampled_kl_div(uneven.log_softmax(dim), torch.rand(3, 4, 5)).losses.shape[dim] == 1
    uniform = torch.full((4, 4), 0.25).log()
    assert sampled_kl_div(uniform, torch.rand(4, 4)).losses.shape == (4, 1)
    for dtype in HALF_TYPES:
        half = drawn_logits((6, 1000)).log_softmax(1).to(dtype)
        assert sampled_kl_div(half, torch.ones(6, 1000)).losses.shape == (6, 1)
    with pytest.raises(ValueError, match="Expected log-probabilities that add up to 1 over one dimension, got none"):
        sampled_kl_div(uneven, torch.rand(3, 4, 5))


def test_values_of_a_distribution_are_seeded_by_the_generator_alone():
    normal = torch.distributions.Normal(drawn_logits((50,)).requires_grad_(), 2.0)
    like, before = torch.zeros(50), torch.get_rng_state()
    first = sampled_log_prob(normal, like, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first.losses, sampled_log_prob(normal, like, generator=seeded(1)).losses)
    assert not torch.equal(first.losses, sampled_log_prob(normal, like, generator=seeded(2)).losses)
    assert first.losses.requires_grad
    assert torch.equal(first.weights, torch.ones(50, dtype=torch.float64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        one, other = sampled_log_prob(normal, like), sampled_log_prob(normal, like)
    assert not torch.equal(one.losses, other.losses)


def test_each_target_of_a_smaller_batch_has_a_draw_of_its_own():
    normal = torch.distributions.Normal(torch.zeros(4, 1, requires_grad=True), 1.0)
    got = sampled_log_prob(normal, torch.zeros(2, 4, 3), generator=seeded())
    assert got.losses.shape == got.weights.shape == (2, 4, 3)
    assert len(got.losses.detach().unique()) == 24


def test_the_noise_of_a_distribution_is_its_own():
    """Kolmogorov-Smirnov, as above: minus log-probabilities of N(m, s^2) are log(s sqrt(2 pi)) + noise^2 / 2."""
    normal = torch.distributions.Normal(torch.full((20_000,), 3.0).double(), 5.0)
    got = sampled_log_prob(normal, torch.zeros(20_000), generator=seeded(1)).losses
    square = (2 * (got - math.log(5 * math.sqrt(2 * math.pi)))).sort().values.clamp(min=0)
    expected = 2 * torch.special.ndtr(square.sqrt()) - 1
    assert (expected - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.95 / math.sqrt(20_000)


# the score: its square against the dense Gauss-Newton matrix of the training loss


class TwoLayers:
    """Two inputs, two hidden units, three outputs, three samples: small enough to enumerate all draws."""

    def __init__(self):
        self.inputs = drawn_logits((3, 2), seed=4)
        self.parameters = [
            drawn_logits(shape, seed=5 + len(shape)).requires_grad_() for shape in ((2, 2), (3, 2), (3,))
        ]

    def outputs(self, count=3):
        first, second, bias = self.parameters
        return (torch.tanh(self.inputs @ first.T) @ second.T + bias)[:, :count]

    def gauss_newton(self, loss, count=3):
        """Diagonal of J' H J, J the outputs' Jacobian and H the Hessian of the training loss in the outputs."""
        outputs = self.outputs(count)
        size = outputs.numel()
        rows = []
        for index in range(size):
            gradients = torch.autograd.grad(outputs.reshape(-1)[index], self.parameters, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in gradients]))
        jacobian = torch.stack(rows)
        hessian = torch.autograd.functional.hessian(loss, outputs.detach()).reshape(size, size)
        return torch.einsum("ik,ij,jk->k", jacobian, hessian, jacobian)

    def estimate(self, sampled):
        h = fisher_diagonal(torch.autograd.grad(sampled.score, self.parameters))
        return torch.cat([value.reshape(-1) for value in h])


TARGET = torch.tensor([0, 2, 1])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]], dtype=torch.float64)
UNEVEN = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)


def enumerated_classes(monkeypatch, model, sampled):
    """Exact mean of the estimate over all draws of labels."""
    p, total = model.outputs().softmax(1).detach(), 0
    for draw in itertools.product(range(3), repeat=3):
        labels = torch.tensor(draw)
        monkeypatch.setattr(sampled_losses, "sample_labels", lambda logits, generator=None, labels=labels: labels)
        total = total + p[torch.arange(3), labels].prod() * model.estimate(sampled(model.outputs()))
    return total


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        pytest.param(TARGET, {}, id="mean"),
        pytest.param(TARGET, {"reduction": "sum"}, id="sum"),
        pytest.param(torch.tensor([0, -100, 1]), {}, id="ignored"),
        pytest.param(torch.tensor([0, -100, 1]), {"reduction": "sum"}, id="ignored, sum"),
        pytest.param(torch.tensor([-100, -100, 1]), {}, id="one left"),
        pytest.param(TARGET, {"ignore_index": 2}, id="a class ignored"),
        pytest.param(SOFT, {}, id="soft"),
        pytest.param(TARGET, {"weight": UNEVEN}, id="class weights"),
        pytest.param(TARGET, {"weight": UNEVEN, "reduction": "sum"}, id="class weights, sum"),
        pytest.param(torch.tensor([0, -100, 1]), {"weight": UNEVEN}, id="class weights, ignored"),
        pytest.param(SOFT, {"weight": UNEVEN}, id="class weights, soft"),
        pytest.param(SOFT, {"weight": UNEVEN, "reduction": "sum"}, id="class weights, soft, sum"),
        pytest.param(TARGET, {"label_smoothing": 0.3}, id="smoothed"),
        pytest.param(TARGET, {"weight": UNEVEN, "label_smoothing": 0.3}, id="class weights, smoothed"),
        pytest.param(
            torch.tensor([0, -100, 1]),
            {"weight": UNEVEN, "label_smoothing": 0.3},
            id="class weights, smoothed, ignored",
        ),
        pytest.param(SOFT, {"weight": UNEVEN, "label_smoothing": 0.3}, id="class weights, smoothed, soft"),
    ],
)
def test_cross_entropy_is_unbiased_for_the_gauss_newton_diagonal(monkeypatch, target, settings):
    """A class weight is that of the training target. Were it that of the drawn label, w_i g_i would not have mean
    zero, the cross terms of the square would stay, and the estimate would grow with the batch."""
    model = TwoLayers()
    expected = model.gauss_newton(lambda z: F.cross_entropy(z, target, **settings))
    got = enumerated_classes(monkeypatch, model, lambda z: sampled_cross_entropy(z, target, **settings))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    if not target.is_floating_point() and "label_smoothing" not in settings:
        got = enumerated_classes(monkeypatch, model, lambda z: sampled_nll_loss(z.log_softmax(1), target, **settings))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_label_smoothing_does_not_change_the_gauss_newton_matrix():
    """So that there is nothing of it to be sampled."""
    model = TwoLayers()
    expected = model.gauss_newton(lambda z: F.cross_entropy(z, TARGET))
    smoothed = model.gauss_newton(lambda z: F.cross_entropy(z, TARGET, label_smoothing=0.3))
    torch.testing.assert_close(smoothed, expected, rtol=1e-12, atol=1e-15)


ELEMENTS = (drawn_logits((3, 2), seed=8) > 0).double()
SOME = torch.tensor([[1.0, 0.0], [3.0, 0.5], [2.0, 0.1]], dtype=torch.float64)


def enumerated_elements(monkeypatch, model, sampled, low, high, probability):
    """Exact mean over all 2^6 draws: each element's uniform number is `low` or `high`, the former so likely."""
    total = 0
    for draw in itertools.product((True, False), repeat=6):
        chosen = torch.tensor(draw).reshape(3, 2)
        uniform = torch.where(chosen, low, high).double()
        monkeypatch.setattr(torch, "rand", lambda size, dtype, generator, uniform=uniform: uniform)
        chance = torch.where(chosen, probability, 1 - probability).prod()
        total = total + chance * model.estimate(sampled(model.outputs(2)))
    return total


BINARY = [
    {},
    {"reduction": "sum"},
    {"weight": SOME},
    {"weight": torch.tensor([2.0, 0.3]).double(), "reduction": "sum"},
    {"pos_weight": torch.tensor([5.0, 0.2]).double()},
    {"weight": SOME, "pos_weight": torch.tensor(7.0).double()},
]


@pytest.mark.parametrize("settings", BINARY, ids=lambda settings: "-".join(settings) or "plain")
@pytest.mark.parametrize("target", [ELEMENTS, 0.3 * ELEMENTS + 0.2], ids=["hard", "soft"])
def test_binary_cross_entropy_is_unbiased_for_the_gauss_newton_diagonal(monkeypatch, settings, target):
    model = TwoLayers()
    p = model.outputs(2).sigmoid().detach()
    expected = model.gauss_newton(lambda z: F.binary_cross_entropy_with_logits(z, target, **settings), 2)
    got = enumerated_elements(
        monkeypatch,
        model,
        lambda z: sampled_binary_cross_entropy_with_logits(z, target, **settings),
        *(0.0, 1 - 2**-53, p),
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    if "pos_weight" not in settings:
        got = enumerated_elements(
            monkeypatch,
            model,
            lambda z: sampled_binary_cross_entropy(z.sigmoid(), target, **settings),
            *(0.0, 1 - 2**-53, p),
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"weight": SOME}, {"weight": SOME, "reduction": "sum"}])
def test_squared_error_is_unbiased_for_the_gauss_newton_diagonal(monkeypatch, settings):
    """h is a quadratic form of the noise: two points of its variance, -sqrt(1/2) and sqrt(1/2), give the exact mean."""
    model = TwoLayers()
    target = drawn_logits((3, 2), seed=9)
    expected = model.gauss_newton(lambda z: F.mse_loss(z, target, **settings), 2)
    low, high = torch.special.ndtr(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    got = enumerated_elements(
        monkeypatch, model, lambda z: sampled_mse_loss(z, target, **settings), low, high, torch.tensor(0.5).double()
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


def test_a_squared_error_of_two_networks_is_unbiased_too(monkeypatch):
    model = TwoLayers()
    expected = model.gauss_newton(lambda z: F.mse_loss(z[:, 0], z[:, 1].square().detach() * 0 + z[:, 1]), 2)
    low, high = torch.special.ndtr(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    total = 0
    for draw in itertools.product((low, high), repeat=3):
        uniform = torch.stack(draw)
        monkeypatch.setattr(torch, "rand", lambda size, dtype, generator, uniform=uniform: uniform)
        outputs = model.outputs(2)
        total = total + model.estimate(sampled_mse_loss(outputs[:, 0], outputs[:, 1])) / 8
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-15)


def test_the_mean_of_many_estimates_converges_to_the_diagonal():
    """With the labels really drawn: within four standard errors, which fall like 1/sqrt(n) and end at a few percent."""
    model, generator = TwoLayers(), seeded(7)
    expected = model.gauss_newton(lambda z: F.cross_entropy(z, TARGET))
    estimates = torch.stack(
        [model.estimate(sampled_cross_entropy(model.outputs(), TARGET, generator=generator)) for _ in range(3000)]
    )
    for count in (100, 3000):
        some = estimates[:count]
        errors = some.std(0) / math.sqrt(count)
        assert ((some.mean(0) - expected).abs() <= 4 * errors).all()
    assert (errors / expected).max() < 0.1
