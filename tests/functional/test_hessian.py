"""Hessian products against the dense Hessian of small nets."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ire.functional import (
    extreme_eigenvalues,
    finite_difference_product,
    flatten,
    flatten_like,
    gradients_by_backward,
    hessian_product,
    rademacher,
    split_like,
    twice_differentiable,
)

CUBE_ROOT = torch.finfo(torch.float32).eps ** (1 / 3)


def mlp(sizes, activation=nn.Tanh, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def classified(net, batch=32):
    """A function of the parameters' values at the time of the call: cross entropy on random data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net[0].in_features, generator=generator)
    y = torch.randint(net[-1].out_features, (batch,), generator=generator)
    return lambda: F.cross_entropy(net(x.to(net[0].weight.dtype)), y)


def dense_hessian(loss_of, parameters):
    """`torch.autograd.functional.hessian` of loss_of(list of tensors), as one matrix."""
    blocks = torch.autograd.functional.hessian(lambda *values: loss_of(values), tuple(p.detach() for p in parameters))
    rows = [
        torch.cat([block.reshape(p.numel(), q.numel()) for block, q in zip(row, parameters, strict=True)], dim=1)
        for row, p in zip(blocks, parameters, strict=True)
    ]
    return torch.cat(rows)


def classification(activation):
    net = mlp([4, 6, 5, 3], activation)
    names = [name for name, _ in net.named_parameters()]
    x, y = torch.randn(32, 4).double(), torch.randint(3, (32,))

    def loss_of(values):
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,)), y)

    return list(net.parameters()), loss_of


def regression():
    net = mlp([3, 7, 2], nn.Softplus)
    names = [name for name, _ in net.named_parameters()]
    x, y = torch.randn(16, 3).double(), torch.randn(16, 2).double()

    def loss_of(values):
        return F.mse_loss(torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,)), y)

    return list(net.parameters()), loss_of


def tied():
    """An autoencoder whose decoder is the encoder's transpose, and a bias."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    x = torch.randn(10, 6).double()
    return [weight, bias], lambda values: F.mse_loss(torch.tanh(x @ values[0].T) @ values[0] + values[1], x)


def unused_and_linear():
    """Parameters with zero rows in the Hessian: one that is not used and one that is only multiplied by a constant."""
    w, unused, linear = (torch.randn(n).double().requires_grad_() for n in (4, 3, 2))
    return [w, unused, linear], lambda values: values[0].cos().prod() + (3 * values[2]).sum()


def linear_times():
    """Bilinear: the diagonal blocks are zero, the rest is not."""
    a, b = torch.randn(3).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    return [a, b], lambda values: (values[0] * values[1]).sum()


CASES = {
    "tanh": lambda: classification(nn.Tanh),
    "softplus": lambda: classification(nn.Softplus),
    "mse": regression,
    "tied": tied,
    "unused and linear": unused_and_linear,
    "bilinear": linear_times,
}


@pytest.mark.parametrize("case", CASES)
def test_product_is_that_of_the_dense_hessian(case):
    """Ten products from one gradient."""
    parameters, loss_of = CASES[case]()
    matrix = dense_hessian(loss_of, parameters)
    assert len(matrix) < 300
    assert matrix.abs().max() > 0.01
    gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True, allow_unused=True)
    for seed in range(10):
        vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        product = hessian_product(gradients, parameters, split_like(vector, parameters))
        assert not any(piece.requires_grad for piece in product if piece is not None)
        torch.testing.assert_close(flatten_like(product, parameters), matrix @ vector, rtol=1e-11, atol=1e-13)


def test_every_column_of_the_hessian():
    parameters, loss_of = regression()
    matrix = dense_hessian(loss_of, parameters)
    gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)
    columns = [
        flatten_like(hessian_product(gradients, parameters, split_like(unit, parameters)), parameters)
        for unit in torch.eye(len(matrix), dtype=torch.float64)
    ]
    torch.testing.assert_close(torch.stack(columns), matrix, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("factor", [3.0, None])
def test_a_loss_linear_in_everything_has_product_none(factor):
    """With a constant factor the gradient has no graph; with one that requires a gradient it has one without them."""
    factor = torch.tensor(2.0, requires_grad=True) if factor is None else factor
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    loss = factor * sum(parameter.sum() for parameter in parameters)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    assert hessian_product(gradients, parameters, [torch.ones(3), torch.ones(2, 2)]) == [None, None]


def test_vectors_of_another_dtype_are_taken():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (product,) = hessian_product(gradients, [x], [torch.ones(2)])
    assert product.dtype == torch.float64
    assert product.tolist() == [6.0, 12.0]


def test_product_leaves_grad_and_requires_grad_alone():
    parameters, loss_of = regression()
    kept = [torch.full_like(parameter, 7.0) for parameter in parameters]
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    frozen = torch.ones(2)
    gradients = torch.autograd.grad(loss_of(parameters) + frozen.sum(), parameters, create_graph=True)
    hessian_product(gradients, parameters, [torch.ones_like(parameter) for parameter in parameters])
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, kept, strict=True))
    assert all(bool((gradient == 7.0).all()) for gradient in kept)
    assert all(parameter.requires_grad for parameter in parameters)
    assert not frozen.requires_grad


def test_one_vector_per_gradient():
    x = torch.ones(2, requires_grad=True)
    gradients = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        hessian_product(gradients, [x], [torch.ones(2), torch.ones(2)])


# differences of gradients


def test_error_falls_with_the_square_of_the_step():
    """Halving the step divides the error by 4."""
    parameters, loss_of = regression()
    matrix = dense_hessian(loss_of, parameters)
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def error(step):
        product = finite_difference_product(
            lambda: torch.autograd.grad(loss_of(parameters), parameters),
            parameters,
            split_like(vector, parameters),
            step=step,
        )
        return float((flatten_like(product, parameters) - matrix @ vector).norm())

    errors = [error(step) for step in (0.2, 0.1, 0.05, 0.025)]
    assert [before / after for before, after in itertools.pairwise(errors)] == pytest.approx([4] * 3, rel=0.1)
    assert errors[-1] < 1e-3 * float((matrix @ vector).norm())
    assert error(None) < 1e-8 * float((matrix @ vector).norm()), "the default step of float64"


@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_step_is_a_length_in_weight_units_whatever_the_length_of_the_vector(length):
    """The fourth derivative of x^4 makes the difference 12 x^2 v + 4 (step / length)^2 v^3."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    (product,) = finite_difference_product(lambda: [4 * x**3], [x], [length * direction], step=0.1)
    expected = length * (12 * x**2 * direction + 4 * 0.1**2 * direction**3)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=0)


def seen_moves(weights, vector):
    """How far the weights are from where they were at each call of the gradient."""
    before, moves = [weight.clone() for weight in weights], []

    def gradient():
        moves.append(flatten([w.double() - b.double() for w, b in zip(weights, before, strict=True)]))
        return [torch.zeros_like(weight) for weight in weights]

    finite_difference_product(gradient, weights, vector)
    assert len(moves) == 2
    torch.testing.assert_close(moves[0], -moves[1], rtol=1e-2, atol=0)
    return moves[0]


def test_default_step_for_concentrated_and_for_spread_vectors():
    """The largest move is 0.04 of the cube root of eps; all together at most 0.6 of it, relative to the weights."""
    weights = [torch.zeros(1000), torch.zeros(600, dtype=torch.float32)]
    weights[0][0] = 10.0
    unit = [torch.zeros(1000), torch.zeros(600)]
    unit[1][3] = -5.0
    move = seen_moves(weights, unit)
    assert move.abs().max().item() == pytest.approx(0.04 * CUBE_ROOT, rel=1e-3)
    assert move.norm().item() == pytest.approx(0.04 * CUBE_ROOT, rel=1e-3)
    spread = [torch.ones(1000), -torch.ones(600)]
    assert seen_moves(weights, spread)[1:].abs().max().item() == pytest.approx(0.04 * CUBE_ROOT, rel=1e-3)
    weights[0][0] = 0.5
    assert seen_moves(weights, spread).norm().item() == pytest.approx(0.6 * CUBE_ROOT * 0.5, rel=1e-3)
    weights[0][0] = 0.0
    assert seen_moves(weights, spread).abs().max().item() == pytest.approx(0.04 * CUBE_ROOT, rel=1e-3)
    assert seen_moves([torch.zeros(0), torch.zeros(2)], [torch.zeros(0), torch.ones(2)]).abs().max() > 0


def test_default_step_is_that_of_the_coarsest_dtype():
    for dtypes in [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)]:
        coarse = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
        weights = [torch.zeros(2, dtype=dtype) for dtype in dtypes]
        assert seen_moves(weights, [torch.ones(2), torch.ones(2)]).max().item() == pytest.approx(
            0.04 * coarse, rel=1e-2
        )


def scaled(net, norm):
    with torch.no_grad():
        factor = norm / float(flatten(list(net.parameters())).norm())
        for parameter in net.parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("norm", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sizes", [[8, 14, 8, 5], [64, 128, 80, 10]], ids=["300 weights", "20k weights"])
def test_default_step_in_float32(sizes, activation, norm):
    net = mlp(sizes, activation, torch.float32)
    scaled(net, norm)
    parameters, loss = list(net.parameters()), classified(net, 64)
    exact_net = mlp(sizes, activation, torch.float64)
    exact_net.load_state_dict(net.state_dict())
    exact_parameters = list(exact_net.parameters())
    gradients = torch.autograd.grad(classified(exact_net, 64)(), exact_parameters, create_graph=True)

    def exact(vector):
        return flatten(hessian_product(gradients, exact_parameters, split_like(vector, exact_parameters)))

    signs = rademacher(sum(p.numel() for p in parameters), torch.Generator().manual_seed(0), torch.float64)
    leading = exact(signs)
    for _ in range(15):
        leading = exact(leading / leading.norm())
    for vector, bound in [(signs, 2e-3), (leading, 1e-3)]:
        got = finite_difference_product(
            lambda: torch.autograd.grad(loss(), parameters), parameters, split_like(vector, parameters)
        )
        wanted = exact(vector.float().double())
        assert float((flatten(got).double() - wanted).norm() / wanted.norm()) < bound


def float32_net():
    net = mlp([5, 8, 3], nn.Tanh, torch.float32)
    parameters = list(net.parameters())
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    return parameters, classified(net), vector


def bits(parameters):
    return [parameter.detach().view(torch.int32).clone() for parameter in parameters]


def test_weights_are_back_to_the_bit():
    parameters, loss, vector = float32_net()
    with torch.no_grad():
        parameters[1][0] = -0.0
    before = bits(parameters)
    kept = [parameter.grad for parameter in parameters]
    product = finite_difference_product(lambda: torch.autograd.grad(loss(), parameters), parameters, vector, step=0.3)
    assert all(map(torch.equal, bits(parameters), before))
    assert [parameter.grad for parameter in parameters] == kept
    assert not any(piece.requires_grad for piece in product)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_weights_are_back_to_the_bit_when_the_gradient_raises(error, call):
    parameters, loss, vector = float32_net()
    before, calls = bits(parameters), []

    def gradient():
        calls.append(bits(parameters))
        if len(calls) == call:
            raise error("midway")
        return torch.autograd.grad(loss(), parameters)

    with pytest.raises(error, match="midway"):
        finite_difference_product(gradient, parameters, vector, step=0.3)
    assert not torch.equal(calls[-1][0], before[0]), "it was raised at moved weights"
    assert all(map(torch.equal, bits(parameters), before))


def test_float32_vectors_move_float64_weights_without_a_rounding_error():
    x = torch.tensor([1.0], dtype=torch.float64)
    (product,) = finite_difference_product(lambda: [6 * x], [x], [torch.tensor([1 / 3])], step=0.1)
    assert product.item() == pytest.approx(6 * float(torch.tensor(1 / 3)), rel=1e-13)


def test_gradients_that_are_written_over_by_the_next_call_are_kept():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    buffer = torch.zeros(2, dtype=torch.float64)
    (product,) = finite_difference_product(lambda: [buffer.copy_(3 * x**2)], [x], [torch.ones(2)])
    torch.testing.assert_close(product, 6 * x, rtol=1e-6, atol=0)


def test_differences_have_no_graph():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (product,) = finite_difference_product(
        lambda: torch.autograd.grad((x**3).sum(), x, create_graph=True), [x], [torch.ones(2)]
    )
    assert not product.requires_grad


def test_none_gradients_and_zero_vectors_give_none():
    x, y = torch.ones(2), torch.ones(3)
    assert finite_difference_product(lambda: [None, 2 * y], [x, y], [torch.ones(2), torch.zeros(3)])[0] is None

    def never():
        raise AssertionError("no gradient is needed")

    assert finite_difference_product(never, [x, y], [torch.zeros(2), torch.zeros(3)]) == [None, None]


def test_sparse_gradients_give_sparse_products():
    weight, index = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 1, 4])

    def gradient(sparse=True):
        return torch.autograd.grad(F.embedding(index, weight, sparse=sparse).sin().sum(), weight)

    vector = [torch.randn(6, 2, dtype=torch.float64)]
    (product,) = finite_difference_product(gradient, [weight], vector)
    (dense,) = finite_difference_product(lambda: gradient(False), [weight], vector)
    torch.testing.assert_close(product.to_dense(), dense, rtol=1e-12, atol=0)


# gradients by backward


def heads():
    """Two outputs of a net with a parameter that neither uses."""
    net = mlp([3, 4, 2])
    parameters = [*net.parameters(), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    return parameters, lambda: (net(x), net[0](x).sum())


def test_backward_gives_what_autograd_gives():
    parameters, outputs = heads()
    starts = [torch.randn(5, 2).double(), torch.tensor(0.5).double()]
    expected = torch.autograd.grad(outputs(), parameters, starts, allow_unused=True)
    got = gradients_by_backward(outputs(), starts, parameters)
    assert got[-1] is None
    assert expected[-1] is None
    assert all(map(torch.equal, got[:-1], expected[:-1]))


def test_backward_frees_the_graph_unless_told_otherwise():
    parameters, outputs = heads()
    starts = [torch.ones(5, 2).double(), torch.tensor(0.5).double()]
    kept = outputs()
    first = gradients_by_backward(kept, starts, parameters, keep_graph=True)
    again = gradients_by_backward(kept, starts, parameters)
    assert all(map(torch.equal, first[:-1], again[:-1]))
    with pytest.raises(RuntimeError, match="a second time"):
        gradients_by_backward(kept, starts, parameters)


def with_grads(parameters):
    kept = [torch.full_like(parameter, 3.0) for parameter in parameters[:-2]] + [None, None]
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    return kept


def test_backward_keeps_what_is_in_grad():
    parameters, outputs = heads()
    kept = with_grads(parameters)
    gradients_by_backward(outputs(), [torch.ones(5, 2).double(), torch.tensor(1.0).double()], parameters)
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, kept, strict=True))
    assert all(bool((gradient == 3.0).all()) for gradient in kept if gradient is not None)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_backward_keeps_what_is_in_grad_on_errors(error):
    parameters, outputs = heads()
    kept = with_grads(parameters)

    def fail(_):
        raise error("midway")

    first, second = outputs()
    first.register_hook(fail)
    with pytest.raises(error, match="midway"):
        gradients_by_backward([first, second], [torch.ones(5, 2).double(), torch.tensor(1.0).double()], parameters)
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, kept, strict=True))
    assert all(bool((gradient == 3.0).all()) for gradient in kept if gradient is not None)


def test_reentrant_checkpoints_which_refuse_autograd_grad():
    net = mlp([3, 6, 6, 2])
    parameters = list(net.parameters())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()

    def loss(through):
        hidden = net[0](x)
        return (checkpoint(net[1:4], hidden, use_reentrant=True) if through else net[1:4](hidden)).sin().sum()

    with pytest.raises(RuntimeError, match="checkpoint"):
        torch.autograd.grad(loss(True), parameters, allow_unused=True)
    got = gradients_by_backward([loss(True)], [torch.tensor(1.0).double()], parameters)
    expected = torch.autograd.grad(loss(False), parameters, allow_unused=True)
    assert [gradient is None for gradient in got] == [False, False, False, False, True, True]
    for one, other in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_products_through_reentrant_checkpoints():
    """Differences of such gradients: the way a Hessian is reached that autograd refuses."""
    net = mlp([3, 6, 6, 2])
    parameters = list(net.parameters())[:4]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()

    def gradient():
        loss = checkpoint(net[1:4], net[0](x), use_reentrant=True).sin().sum()
        return gradients_by_backward([loss], [torch.ones_like(loss)], parameters)

    exact = torch.autograd.grad(net[1:4](net[0](x)).sin().sum(), parameters, create_graph=True)
    vector = [torch.randn_like(parameter) for parameter in parameters]
    wanted = flatten_like(hessian_product(exact, parameters, vector), parameters)
    got = flatten_like(finite_difference_product(gradient, parameters, vector), parameters)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-7


def test_largest_eigenvalue_of_a_net_both_ways():
    """The estimators on top of the products: Lanczos on exact ones and on differences against eigvalsh."""
    parameters, loss_of = classification(nn.Tanh)
    values = torch.linalg.eigvalsh(dense_hessian(loss_of, parameters))
    gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)

    def exact(vector):
        return flatten_like(hessian_product(gradients, parameters, split_like(vector, parameters)), parameters)

    def difference(vector):
        product = finite_difference_product(
            lambda: torch.autograd.grad(loss_of(parameters), parameters), parameters, split_like(vector, parameters)
        )
        return flatten_like(product, parameters)

    start = torch.randn(len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for product, digits in ((exact, 1e-9), (difference, 1e-6)):
        found = extreme_eigenvalues(product, start, smallest=1, tolerance=1e-6, max_products=len(values))
        assert found.converged
        assert math.isclose(found.largest[0], float(values[-1]), rel_tol=digits)
        assert math.isclose(found.smallest[0], float(values[0]), rel_tol=digits)


# forward passes that can be differentiated twice


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        heads = self.inner(x).view(2, 3, 2, 4)
        return self.outer(F.scaled_dot_product_attention(heads, heads, heads).view(6, 8))


def test_attention_can_be_differentiated_twice_inside_and_not_outside():
    """Against the same attention written out."""
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(6, 4)
    parameters = list(net.parameters())
    vector = [torch.randn_like(parameter) for parameter in parameters]

    def product(outputs):
        gradients = torch.autograd.grad(outputs.square().mean(), parameters, create_graph=True)
        return flatten_like(hessian_product(gradients, parameters, vector), parameters)

    heads = net.inner(x).view(2, 3, 2, 4)
    written_out = net.outer(((heads @ heads.mT) / 2).softmax(-1).matmul(heads).view(6, 8))
    expected = product(written_out)
    with pytest.raises(RuntimeError, match="not implemented"):
        product(net(x))
    with twice_differentiable(net):
        outputs = net(x)
    torch.testing.assert_close(product(outputs), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="not implemented"):
        product(net(x))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_do_without_cudnn_inside_the_block_only(layer):
    def flags():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32

    before = flags()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=False):
        with twice_differentiable(nn.Sequential(nn.Linear(2, 2), layer(2, 3))):
            assert flags() == (False, True, True, False)
        assert flags() == (True, True, True, False)
        with pytest.raises(KeyError, match="midway"), twice_differentiable(layer(2, 3)):
            raise KeyError("midway")
        assert flags() == (True, True, True, False)
        with twice_differentiable(nn.Linear(2, 2)):
            assert flags() == (True, True, True, False)
    assert flags() == before


def test_compiled_parts_run_uncompiled_inside_the_block_only():
    """AOTAutograd refuses a second derivative."""
    torch.compiler.reset()
    net = mlp([3, 4, 2], dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    parameters, x = list(net.parameters()), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    vector = [torch.ones_like(parameter) for parameter in parameters]

    def product(outputs):
        gradients = torch.autograd.grad(outputs.square().mean(), parameters, create_graph=True)
        return flatten_like(hessian_product(gradients, parameters, vector), parameters)

    with pytest.raises(RuntimeError, match="double backward"):
        product(compiled(x))
    with twice_differentiable(compiled):
        torch.testing.assert_close(product(compiled(x)), product(net(x)))
    with pytest.raises(RuntimeError, match="double backward"):
        product(compiled(x))
    torch.compiler.reset()
