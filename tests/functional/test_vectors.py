"""Parameters as one vector and back."""

import pytest
import torch

from lightning_ire.functional import flatten, flatten_like, split_like, widest_dtype

HALVES = [torch.float16, torch.bfloat16]


def drawn(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([torch.float32, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.bfloat16, torch.float64, torch.float16], torch.float64),
        (HALVES, torch.float32),
        ([torch.float16], torch.float32),
    ],
)
def test_widest_dtype_is_at_least_float32(dtypes, widest):
    tensors = [torch.zeros(1, dtype=dtype) for dtype in dtypes]
    assert widest_dtype(tensors) == widest
    assert flatten(tensors).dtype == widest
    assert flatten_like([None] * len(tensors), tensors).dtype == widest


def test_flat_vector_holds_all_elements_in_order():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.empty(0, 3), torch.tensor([6.0])]
    assert flatten(tensors).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert flatten([tensors[0].t()]).tolist() == [1.0, 3.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_there_and_back_to_the_bit(dtype):
    tensors = drawn((3, 2), (), (0,), (4, 1, 2), dtype=dtype)
    back = split_like(flatten(tensors), tensors)
    assert [piece.shape for piece in back] == [tensor.shape for tensor in tensors]
    assert all(piece.dtype == dtype for piece in back)
    assert all(map(torch.equal, back, tensors))


def test_mixed_dtypes_come_back_as_they_were():
    tensors = [drawn((2,), dtype=torch.float64)[0], *drawn((3,), (1,), dtype=torch.bfloat16)]
    back = split_like(flatten(tensors), tensors)
    assert [piece.dtype for piece in back] == [torch.float64, torch.bfloat16, torch.bfloat16]
    assert all(map(torch.equal, back, tensors))


def test_none_is_zeros():
    like = [torch.ones(2, 2), torch.ones(1, dtype=torch.float64), torch.ones(3)]
    flat = flatten_like([None, torch.tensor([7.0], dtype=torch.float64), None], like)
    assert flat.tolist() == [0.0] * 4 + [7.0] + [0.0] * 3
    assert flatten_like([None, None, None], like).tolist() == [0.0] * 8


def test_dtype_is_that_of_like_not_of_the_tensors():
    flat = flatten_like([torch.tensor([1.0 + 2**-40], dtype=torch.float64)], [torch.zeros(1)])
    assert flat.dtype == torch.float32
    assert flat.tolist() == [1.0]


def test_half_gradients_become_float32():
    flat = flatten_like(drawn((3,), dtype=torch.float16), [torch.zeros(3, dtype=torch.float16)])
    assert flat.dtype == torch.float32
    assert torch.equal(flat.half(), drawn((3,), dtype=torch.float16)[0])


def test_repeated_entries_of_sparse_tensors_are_added():
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], [1.0, 2.0, 4.0], (5,), check_invariants=True)
    assert flatten_like([sparse], [torch.zeros(5)]).tolist() == [0.0, 3.0, 0.0, 4.0, 0.0]
    assert flatten([sparse, torch.ones(1)]).tolist() == [0.0, 3.0, 0.0, 4.0, 0.0, 1.0]


def test_flat_vector_is_a_detached_copy():
    parameter = torch.nn.Parameter(torch.ones(2))
    flat = flatten([parameter])
    assert not flat.requires_grad
    flat.fill_(5.0)
    assert parameter.tolist() == [1.0, 1.0]


def test_pieces_of_the_same_dtype_are_views():
    """No second copy of a vector as large as the model."""
    vector = torch.arange(5.0)
    pieces = split_like(vector, [torch.zeros(2, 2), torch.zeros(1, dtype=torch.float64)])
    assert pieces[0].data_ptr() == vector.data_ptr()
    assert [piece.tolist() for piece in pieces] == [[[0.0, 1.0], [2.0, 3.0]], [4.0]]


def test_strided_vectors_are_split_too():
    vector = torch.arange(12.0)[::2]
    pieces = split_like(vector, [torch.zeros(2, 2), torch.zeros(2)])
    assert [piece.tolist() for piece in pieces] == [[[0.0, 2.0], [4.0, 6.0]], [8.0, 10.0]]


def test_one_entry_per_tensor():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        flatten_like([None], [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(RuntimeError, match="split_sizes"):
        split_like(torch.zeros(3), [torch.zeros(1), torch.zeros(1)])
