"""The diagonal of the Fisher information from gradients: the square of a batch's, or the squares of its samples'."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ire.functional import fisher_diagonal, per_sample_squares


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


@pytest.mark.parametrize("factor", [8, torch.tensor(8.0), torch.tensor(8, dtype=torch.float64)], ids=str)
def test_fisher_diagonal_keeps_its_dtype_whatever_the_factor_is(factor):
    (h,) = fisher_diagonal([torch.tensor([0.5])], factor)
    assert h.dtype == torch.float32
    assert h.tolist() == [2.0]


# sample by sample


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loop_of(net, score, *samples):
    """The definition: one sample's gradient after the other."""
    parameters = dict(net.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    for sample in zip(*samples, strict=True):
        gradients = torch.autograd.grad(score(parameters, *sample)[0], list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
    return total


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_squares_of_samples_are_those_of_a_loop_whatever_the_chunk(chunk):
    net = classifier()
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))

    def score(weights, x, y):
        logits = torch.func.functional_call(net, weights, (x[None],))
        return F.cross_entropy(logits, y[None]), torch.ones((), dtype=torch.float64)

    squares, count = per_sample_squares(score, dict(net.named_parameters()), [x, y], chunk)
    assert count.item() == 7
    for name, expected in loop_of(net, score, x, y).items():
        torch.testing.assert_close(squares[name], expected, rtol=1e-12, atol=1e-15)
        assert not squares[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_squares_of_samples_are_at_least_float32(dtype):
    """The square of 1e-4 is 0 in float16."""
    weights, samples = {"w": torch.ones(1, dtype=dtype)}, [torch.full((3, 1), 1e-4, dtype=dtype)]
    squares, _ = per_sample_squares(lambda weights, x: ((weights["w"] * x).sum(), torch.ones(())), weights, samples, 2)
    assert squares["w"].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(squares["w"].double(), 3 * samples[0][0].double() ** 2, rtol=1e-6, atol=0)


def test_samples_draw_numbers_of_their_own():
    """Were the noise one for all, the sum of squares would be 1000 times a square: 0.0 or 1000.0."""
    weights, samples = {"w": torch.ones(1)}, [torch.ones(1000, 1)]

    def score(weights, x):
        return (weights["w"] * x * torch.randint(2, (1,))).sum(), torch.ones(())

    squares, _ = per_sample_squares(score, weights, samples, 100)
    assert 400 < squares["w"].item() < 600


def test_weights_are_not_changed_and_get_no_gradient():
    net = classifier()
    before = [weight.detach().clone() for weight in net.parameters()]

    def score(weights, x):
        return torch.func.functional_call(net, weights, (x[None],)).sum(), torch.ones(())

    per_sample_squares(score, dict(net.named_parameters()), [torch.randn(3, 4).double()], 2)
    for weight, copy in zip(net.parameters(), before, strict=True):
        assert torch.equal(weight, copy)
        assert weight.grad is None
