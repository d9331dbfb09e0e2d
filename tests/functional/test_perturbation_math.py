"""SAM's and average SAM's displacements in closed form, and the way there and back."""

import copy
import math
import weakref

import pytest
import torch

from lightning_ire.functional import average_sam_displacement, global_norm, perturbed, sam_displacement

HALVES = [torch.float16, torch.bfloat16]


def drawn(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def concatenated(tensors):
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors])


# global_norm


def test_norm_is_the_root_of_all_squares():
    tensors = drawn((3, 4), (), (5,))
    expected = math.sqrt(sum(number**2 for number in concatenated(tensors).tolist()))
    assert global_norm(tensors).item() == pytest.approx(expected, rel=1e-14)
    assert global_norm([None, *tensors, None]).item() == pytest.approx(expected, rel=1e-14)
    assert global_norm(tensors).dtype == torch.float64


@pytest.mark.parametrize("tensors", [[], [None, None]])
def test_norm_of_nothing_is_zero(tensors):
    assert global_norm(tensors).item() == 0.0


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 300.0), (torch.float16, 1e-4), (torch.bfloat16, 1e-2)])
def test_norm_of_half_types_is_taken_in_float32(dtype, value):
    """Squares of float16 overflow at 256 and vanish at 1e-4; a bfloat16 sum has two or three digits."""
    tensor = torch.full((1000,), value, dtype=dtype)
    exact = float(tensor[0]) * math.sqrt(1000)
    naive = tensor.square().sum().sqrt()
    assert not abs(float(naive) / exact - 1) < 1e-4, "the case shows nothing"
    got = global_norm([tensor])
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact, rel=1e-6)


def test_norm_of_mixed_dtypes_is_as_wide_as_the_widest():
    got = global_norm([torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([4.0 + 1e-9], dtype=torch.float64)])
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(math.hypot(3.0, 4.0 + 1e-9), rel=1e-15)


def test_norm_of_a_sparse_tensor_adds_repeated_entries_first():
    sparse = torch.sparse_coo_tensor([[1, 1, 4]], [1.0, 2.0, 4.0], (6,), check_invariants=True)
    assert global_norm([sparse]).item() == 5.0


# SAM


def quadratic(count, seed=1):
    root = drawn((count, count), seed=seed)[0]
    return root @ root.T + torch.eye(count, dtype=torch.float64)


def test_gradient_at_the_perturbed_point_of_a_quadratic():
    """L(w) = w' A w / 2 over two tensors: the second gradient is A (w + rho g / ||g||) with g = A w."""
    matrix, rho = quadratic(7), 0.3
    weights = [weight.requires_grad_() for weight in drawn((2, 2), (3,), seed=2)]

    def gradients():
        w = torch.cat([weight.reshape(-1) for weight in weights])
        return torch.autograd.grad(0.5 * w @ matrix @ w, weights)

    flat = concatenated([weight.detach() for weight in weights])
    g = matrix @ flat
    moves, norm = sam_displacement(weights, gradients(), rho)
    with perturbed(weights, moves):
        second = concatenated(gradients())
    torch.testing.assert_close(norm, g.norm(), rtol=1e-14, atol=0)
    torch.testing.assert_close(second, matrix @ (flat + rho * g / g.norm()), rtol=1e-13, atol=1e-13)
    assert torch.equal(concatenated([weight.detach() for weight in weights]), flat)


def test_adaptive_displacement_is_the_formula_of_asam():
    """rho * T^2 g / ||T g||, T = |theta|."""
    weights, gradients, rho = drawn((4, 3), (5,), seed=3), drawn((4, 3), (5,), seed=4), 0.7
    scaled = concatenated(weights).abs() * concatenated(gradients)
    moves, norm = sam_displacement(weights, gradients, rho, adaptive=True)
    expected = rho * concatenated(weights) ** 2 * concatenated(gradients) / scaled.norm()
    torch.testing.assert_close(concatenated(moves), expected, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(norm, scaled.norm(), rtol=1e-14, atol=0)
    assert [move.shape for move in moves] == [(4, 3), (5,)]


@pytest.mark.parametrize("adaptive", [True, [True, False]])
def test_eta_is_added_to_the_size_of_the_weights_that_adapt(adaptive):
    """rho * T^2 g / ||T g||, T = |theta| + eta, or 1 where the radius does not adapt."""
    weights, gradients, rho = drawn((4, 3), (5,), seed=3), drawn((4, 3), (5,), seed=4), 0.7
    sizes = [weights[0].abs() + 0.3, weights[1].abs() + 0.3 if adaptive is True else torch.ones(5)]
    scaled = concatenated(sizes) * concatenated(gradients)
    moves, norm = sam_displacement(weights, gradients, rho, adaptive=adaptive, eta=0.3)
    torch.testing.assert_close(
        concatenated(moves), rho * concatenated(sizes) * scaled / scaled.norm(), rtol=1e-14, atol=1e-16
    )
    torch.testing.assert_close(norm, scaled.norm(), rtol=1e-14, atol=0)


def test_eta_is_not_lost_in_the_digits_of_half_weights():
    weights, gradients = [torch.tensor([1.0, -2.0]).bfloat16()], [torch.tensor([1.0, 1.0]).bfloat16()]
    _, norm = sam_displacement(weights, gradients, 0.1, adaptive=True, eta=0.001)
    torch.testing.assert_close(norm, torch.tensor([1.001, 2.001]).norm(), rtol=1e-6, atol=0)


def test_displacement_of_float64_weights_is_float64():
    """A norm taken in float32 would be off by about 1e-8."""
    weights = gradients = drawn((50,), (7,), seed=5)
    moves, norm = sam_displacement(weights, gradients, 0.05)
    assert norm.dtype == torch.float64
    assert abs(global_norm(moves).item() / 0.05 - 1) < 1e-14


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_zero_nan_and_infinite_gradients_give_zero_displacement(bad, adaptive):
    gradients = [torch.tensor([0.0 if bad == 0 else 1.0, bad]), torch.full((2,), 0.0 if bad == 0 else 2.0)]
    moves, norm = sam_displacement([torch.ones(2), torch.ones(2)], gradients, 0.05, adaptive=adaptive)
    assert [move.tolist() for move in moves] == [[0.0, 0.0], [0.0, 0.0]]
    assert not (math.isfinite(norm) and norm > 0)


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-44])
def test_a_gradient_too_small_to_divide_by_gives_a_finite_displacement(size):
    """rho / ||g|| overflows float32 from ||g|| = rho / 3.4e38 downwards."""
    moves, _ = sam_displacement([torch.zeros(1)], [torch.tensor([size])], 0.05)
    assert moves[0].isfinite().all()
    assert global_norm(moves).item() <= 0.05 * (1 + 1e-2)


def test_radius_zero_gives_zero():
    moves, norm = sam_displacement([torch.ones(2)], [torch.tensor([3.0, 4.0])], 0.0)
    assert moves[0].tolist() == [0.0, 0.0]
    assert norm.item() == 5.0


def test_none_gradients_are_not_moved_and_do_not_count():
    moves, norm = sam_displacement(
        [torch.ones(1), torch.ones(3), torch.ones(1)], [torch.tensor([3.0]), None, torch.tensor([4.0])], 0.5
    )
    assert moves[1] is None
    assert [moves[0].item(), moves[2].item()] == pytest.approx([0.3, 0.4])
    assert norm.item() == 5.0
    assert sam_displacement([torch.ones(2)], [None], 0.5)[0] == [None]


@pytest.mark.parametrize("adaptive", [False, True])
def test_sparse_gradients_move_like_dense_ones(adaptive):
    weight, other = drawn((6, 3), (4,), seed=6)
    values = drawn((3, 3), seed=7)[0]
    sparse = torch.sparse_coo_tensor([[1, 4, 1]], values, (6, 3), check_invariants=True)
    got, norm = sam_displacement([weight, other], [sparse, other], 0.1, adaptive=adaptive)
    want, dense_norm = sam_displacement([weight, other], [sparse.to_dense(), other], 0.1, adaptive=adaptive)
    assert norm.item() == dense_norm.item()
    assert all(map(torch.equal, got, want))
    assert not got[0].is_sparse


@pytest.mark.parametrize("value", [3e-3, 300.0, 6e4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_gradients_have_a_displacement_of_length_rho(dtype, value):
    """The naive float16 norm of 300s is infinite, that of 3e-3s off; the displacement is of the weights' dtype."""
    gradient = torch.full((40,), value, dtype=dtype)
    moves, norm = sam_displacement([torch.ones(40, dtype=dtype)], [gradient], 0.05)
    assert norm.dtype == torch.float32
    assert moves[0].dtype == dtype
    assert norm.item() == pytest.approx(float(gradient[0]) * math.sqrt(40), rel=1e-6)
    assert concatenated(moves).norm().item() == pytest.approx(0.05, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize(("weight", "gradient"), [(1e-4, 1e-4), (300.0, 300.0), (1.0, 2.0)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_adaptive_half_displacement_is_computed_in_float32(dtype, weight, gradient):
    """T g of 1e-4 * 1e-4 or 300 * 300 is 0 or infinite in float16, although both factors are ordinary numbers."""
    weights, gradients = [torch.full((16,), weight, dtype=dtype)], [torch.full((16,), gradient, dtype=dtype)]
    w, g = weights[0].double(), gradients[0].double()
    moves, norm = sam_displacement(weights, gradients, 0.5, adaptive=True)
    assert norm.item() == pytest.approx((w * g).norm().item(), rel=1e-2)
    expected = 0.5 * w**2 * g / (w * g).norm()
    torch.testing.assert_close(moves[0].double(), expected, rtol=1e-2, atol=0)


def test_displacement_changes_neither_weights_nor_gradients():
    weights, gradients = drawn((3,), (2, 2), seed=8), drawn((3,), (2, 2), seed=9)
    before = copy.deepcopy([weights, gradients])
    for adaptive in (False, True):
        moves, _ = sam_displacement([weight.requires_grad_() for weight in weights], gradients, 0.1, adaptive=adaptive)
        assert not any(move.requires_grad for move in moves)
        assert all(map(torch.equal, weights + gradients, before[0] + before[1]))


def test_one_gradient_per_parameter():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        sam_displacement([torch.ones(2), torch.ones(2)], [torch.ones(2)], 0.1)


# average SAM


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_average_displacement_has_length_rho(dtype, digits):
    weights = [torch.zeros(shape, dtype=dtype) for shape in [(30, 4), (), (9,)]]
    moves = average_sam_displacement(weights, 0.2)
    assert [move.shape for move in moves] == [weight.shape for weight in weights]
    assert all(move.dtype == dtype for move in moves)
    assert concatenated(moves).norm().item() == pytest.approx(0.2, rel=digits)


def test_generators_decide_the_draw():
    weights = [torch.zeros(4), torch.zeros(2, 3)]

    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return concatenated(average_sam_displacement(weights, 0.1, generators=generators))

    before = torch.get_rng_state()
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2)[4:], draw(1, 3)[4:])
    assert torch.equal(torch.get_rng_state(), before), "given generators leave the global one alone"


def test_global_generator_by_default():
    weights = [torch.zeros(5)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = average_sam_displacement(weights, 0.1)[0]
        second = average_sam_displacement(weights, 0.1)[0]
        torch.manual_seed(3)
        again = average_sam_displacement(weights, 0.1)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_one_generator_per_parameter():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        average_sam_displacement([torch.zeros(2), torch.zeros(2)], 0.1, generators=[None])


def test_average_displacement_is_isotropic():
    """Mean 0 and second moments rho^2 / d on the diagonal, 0 beside it, within four and a half standard errors."""
    draws, rho = 3000, 2.0
    generator = torch.Generator().manual_seed(0)
    weights = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    moves = torch.stack(
        [concatenated(average_sam_displacement(weights, rho, generators=[generator] * 2)) for _ in range(draws)]
    )
    d = moves.size(1)
    # on the sphere E[x_i^4] = 3 rho^4 / d(d+2) and E[x_i^2 x_j^2] = rho^4 / d(d+2)
    diagonal = torch.eye(d, dtype=torch.float64)
    variance = rho**4 * ((1 + 2 * diagonal) / (d * (d + 2)) - diagonal / d**2)
    assert (moves.mean(0).abs() <= 4.5 * rho / math.sqrt(d * draws)).all()
    error = moves.T @ moves / draws - diagonal * rho**2 / d
    assert (error.abs() <= 4.5 * (variance / draws).sqrt()).all()


# there and back


def moved_weights(dtype=torch.float32):
    """Weights and displacements for which subtracting again does not give the weights back."""
    weights, moves = drawn((2000,), (30, 10), seed=10, dtype=dtype), drawn((2000,), (30, 10), seed=11, dtype=dtype)
    assert not torch.equal((weights[0] + moves[0]) - moves[0], weights[0]), "the case shows nothing"
    return weights, moves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_weights_come_back_to_the_bit(dtype):
    weights, moves = moved_weights(dtype)
    before, sums = [w.clone() for w in weights], [w + m for w, m in zip(weights, moves, strict=True)]
    addresses = [weight.data_ptr() for weight in weights]
    with perturbed(weights, moves) as saved:
        assert all(map(torch.equal, weights, sums))
        assert all(map(torch.equal, saved, before))
    assert all(map(torch.equal, weights, before))
    assert [weight.data_ptr() for weight in weights] == addresses


def test_weights_come_back_even_from_nan_and_with_their_signed_zeros():
    weight = torch.tensor([-0.0, math.inf, 1.0])
    with perturbed([weight], [torch.tensor([0.0, -math.inf, math.nan])]):
        assert weight.view(torch.int32)[0] == 0
        assert weight[1:].isnan().all()
    assert weight.view(torch.int32).tolist() == torch.tensor([-0.0, math.inf, 1.0]).view(torch.int32).tolist()


def test_weights_come_back_when_the_block_raises_or_changes_them():
    weights, moves = moved_weights()
    before = [weight.clone() for weight in weights]
    with pytest.raises(RuntimeError, match="second pass"), perturbed(weights, moves):  # noqa: PT012
        weights[0].zero_()
        raise RuntimeError("second pass")
    assert all(map(torch.equal, weights, before))


def test_none_moves_leave_the_weight_alone_but_save_it():
    weights = [torch.ones(2), torch.ones(2)]
    with perturbed(weights, [None, torch.ones(2)]) as saved:
        assert [weight.tolist() for weight in weights] == [[1.0, 1.0], [2.0, 2.0]]
        assert [weight.tolist() for weight in saved] == [[1.0, 1.0], [1.0, 1.0]]
        weights[0].fill_(5.0)
    assert [weight.tolist() for weight in weights] == [[5.0, 5.0], [1.0, 1.0]]


def test_parameters_are_moved_without_a_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    with perturbed([weight], [torch.ones(2)]) as saved:
        assert weight.is_leaf
        assert not saved[0].requires_grad
        (weight**2).sum().backward()
    assert weight.grad.tolist() == [4.0, 4.0]
    assert weight.tolist() == [1.0, 1.0]


def test_displacements_are_freed_inside_the_block():
    """One parameter-sized copy less for the time of the second pass."""
    weights = [torch.zeros(3), torch.zeros(2)]
    references = []

    def displacements():
        moves = [torch.ones(3), torch.ones(2)]
        references.extend(weakref.ref(move) for move in moves)
        return moves

    with perturbed(weights, displacements()):
        assert [reference() for reference in references] == [None, None]


def test_weights_come_back_if_there_are_too_few_displacements():
    weights = [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match=r"zip\(\) argument"), perturbed(weights, [torch.ones(2)]):
        pass
    assert [weight.tolist() for weight in weights] == [[1.0, 1.0], [1.0, 1.0]]
