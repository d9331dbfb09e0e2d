"""Many small tensors and one huge one: operations that do not multiply, memory that does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ire.engine.boost import WeightSnapshot, boost
from lightning_ire.functional import masks_and_threshold, perturbed, sam_displacement

PIECE = 1 << 18  # elements that are looked at together on a CPU


class Operations(TorchDispatchMode):
    """Counts what computes (views and new empty tensors do not), and notes the bytes of each result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or any(part in str(func) for part in ("empty", "view", "split", "detach", "promote_types")):
            if isinstance(result, Tensor) and "empty" in str(func):
                self.made.append(result.nbytes)
            return result
        self.count += 1
        if not func._schema.is_mutable:
            self.made += [one.nbytes for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor)]
        return result


def kept_step(tensors: list[Tensor]) -> Operations:
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    names = {id(parameter): str(index) for index, parameter in enumerate(parameters)}
    masks = {str(index): torch.ones_like(tensor, dtype=torch.bool) for index, tensor in enumerate(tensors)}
    with Operations() as seen:
        weights = WeightSnapshot.take(optimizer, names, masks, {}, False)
        boost(optimizer, weights, dict.fromkeys(map(id, parameters), 1.0), True, False)
    return seen
    return seen


def new_mask(tensors: list[Tensor]) -> Operations:
    with Operations() as seen:
        masks_and_threshold(tensors, 0.8)
    return seen


def ascent(tensors: list[Tensor]) -> Operations:
    gradients = [torch.ones_like(tensor) for tensor in tensors]
    with Operations() as seen:
        moves, _ = sam_displacement(tensors, gradients, 0.05)
        with perturbed(tensors, moves):
            pass
    return seen


Work = Callable[[list[Tensor]], Operations]


@pytest.mark.parametrize("work", [kept_step, new_mask, ascent])
def test_as_many_operations_for_twice_as_many_small_tensors(work: Work) -> None:
    torch.manual_seed(0)
    few, many = (work([torch.randn(20) for _ in range(count)]).count for count in (1000, 2000))
    assert few == many < 100


@pytest.mark.parametrize(("work", "bytes_each"), [(kept_step, 4), (new_mask, 1), (ascent, 8)])
def test_one_huge_tensor_needs_no_more_memory_than_what_is_kept_of_it(work: Work, bytes_each: int) -> None:
    """A copy of the weights; a mask; a displacement and a copy. All else is done in pieces."""
    torch.manual_seed(0)
    count = 12 * PIECE + 5
    made = work([torch.randn(count)]).made
    large = [size for size in made if size > 8 * PIECE]
    assert sum(large) == bytes_each * count
