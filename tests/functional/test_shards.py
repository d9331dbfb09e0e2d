"""Sharded tensors (DTensor): what comes out, gathered, is what one process makes of the whole tensors."""

import functools
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import pytest
import shards_script
import torch
from torch import Tensor

from lightning_ire.functional import count_true, flat_mask, masks_and_threshold
from lightning_ire.functional._shards import Shards, local, part_of_whole, whole_of_part

DTYPES = shards_script.DTYPES
CELLS = [
    pytest.param(name, ranks, marks=[pytest.mark.slow] if ranks == 4 else [])
    for name, sizes in shards_script.LAYOUTS.items()
    for ranks in sizes
]
SIZES = [pytest.param(ranks, marks=[pytest.mark.slow] if ranks == 4 else []) for ranks in (2, 3, 4)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each of so many ranks has saved; the fast numbers are run together, imports take most of the time."""

    @functools.cache
    def run(*counts: int) -> dict[int, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("shards")
        done = subprocess.run(
            [sys.executable, shards_script.__file__, str(folder), *map(str, counts)],
            env=cases.script_environment(), capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return {
            count: [torch.load(Path(folder) / f"{count}-{rank}.pt", weights_only=True) for rank in range(count)]
            for count in counts
        }

    return lambda count: run(4)[4] if count == 4 else run(2, 3)[count]


def assert_same(got: Any, expected: Any, tolerance: float, name: str) -> None:
    """Equal to the bit, or floating-point numbers to a tolerance relative to the tensor's largest."""
    if isinstance(expected, list):
        assert len(got) == len(expected), name
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, tolerance, name)
    elif isinstance(expected, Tensor) and expected.is_floating_point() and tolerance:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
    elif isinstance(expected, Tensor):
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
    else:
        assert got == expected, name


EXACT = ("weights", "drawn", "copied", "masks", "count", "boost", "average-sam", "finite", "errors", "owned", "sizes")


@pytest.mark.parametrize(("layout", "count"), CELLS)
def test_gathered_results_are_those_of_one_process(
    ranks: Callable[[int], list[dict[str, Any]]], layout: str, count: int
) -> None:
    alone = shards_script.everything(*shards_script.plain(layout))
    assert len(alone["errors"]) == 3
    for found in ranks(count):
        assert list(found[layout]) == [*alone, "kinds"]
        for name, expected in alone.items():
            exact = name.startswith(EXACT) or name.endswith(("-saved", "-after"))
            assert_same(found[layout][name], expected, 0 if exact else 1e-14, name)
        for name in alone:  # the same bits on all ranks
            assert_same(found[layout][name], ranks(count)[0][layout][name], 0, name)


@pytest.mark.parametrize(
    ("layout", "count", "expected"),
    [
        ("rows", 3, {"Shard", "empty"}),
        ("fully-shard", 3, {"Shard", "empty"}),
        ("mixed", 3, {"Shard", "Replicate", "plain", "empty"}),
        ("tensor-parallel", 2, {"Shard", "Replicate", "Partial", "plain"}),
        pytest.param("fully-shard-tensor-parallel", 4, {"_StridedShard", "1-D", "2-D"}, marks=pytest.mark.slow),
    ],
)
def test_the_layouts_hold_what_is_hard(
    ranks: Callable[[int], list[dict[str, Any]]], layout: str, count: int, expected: set[str]
) -> None:
    assert expected <= set(ranks(count)[-1][layout]["kinds"])


@pytest.mark.parametrize("count", SIZES)
def test_each_element_has_one_owner(ranks: Callable[[int], list[dict[str, Any]]], count: int) -> None:
    for layout, sizes in shards_script.LAYOUTS.items():
        if count in sizes:
            assert int(ranks(count)[0][layout]["owned"]) == sum(w.numel() for w in shards_script.plain(layout)[0])


@pytest.mark.parametrize("count", SIZES)
def test_gathered_copies_do_not_see_that_shards_move_until_they_are_dropped(
    ranks: Callable[[int], list[dict[str, Any]]], count: int
) -> None:
    """A contract with FSDP2: were the second line no longer true, nothing would have to be dropped."""
    for rank in ranks(count):
        found = rank["gathered-copies"]
        assert (all(found["sharded"]), any(found["stale"]), all(found["same"])) == (True, False, True)
        before, unseen, seen, after = found["outputs"]
        assert torch.equal(before, unseen)
        assert not torch.equal(before, seen)
        assert torch.equal(before, after)


class Rank(Shards):
    """Parts of whole tensors on one of several threads that stand for ranks; sums wait for all of them."""

    def __init__(self, parts: list[Tensor], owned: list[bool], sizes: list[int], group: "Group", place: int) -> None:
        self.sharded, self.parts, self.owned = True, parts, owned
        self._sizes, self.group, self.place = sizes, group, place

    @property
    def sizes(self) -> list[int]:
        return self._sizes

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        return self.group.reduced(value, operation, self.place)


class Group:
    """What all-reduces do, in threads. A rank that does not take part breaks the barrier, so that all fail."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=20)
        self.values: list[Any] = [None] * count
        self.reductions = 0

    def reduced(self, value: Tensor, operation: str, place: int) -> Tensor:
        self.values[place] = value
        self.reductions += place == 0
        self.barrier.wait()
        assert len({(one.dtype, one.shape) for one in self.values}) == 1
        stacked = torch.stack(self.values)
        self.barrier.wait()
        return stacked.sum(0) if operation == "SUM" else stacked.amax(0)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.values)) as pool:
            return list(pool.map(function, range(len(self.values))))


def split(wholes: Sequence[Tensor], count: int, group: Group) -> list[Rank]:
    """Each whole is cut at random places (some parts are empty), or on all ranks and owned by one."""
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    owned: list[list[bool]] = [[] for _ in range(count)]
    for index, whole in enumerate(wholes):
        cuts = [0, *sorted(torch.randint(whole.numel() + 1, (count - 1,)).tolist()), whole.numel()]
        for place in range(count):
            copied = index % 3 == 2
            parts[place].append(whole if copied else whole.reshape(-1)[cuts[place] : cuts[place + 1]])
            owned[place].append(not copied or place == index % count)
    sizes = [whole.numel() for whole in wholes]
    return [Rank(parts[place], owned[place], sizes, group, place) for place in range(count)]


def drawn(dtype: torch.dtype) -> list[Tensor]:
    """Ties, zeros of both signs, subnormal numbers, empty tensors, one large tensor."""
    wholes = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 4), (0, 2), (7,), (1,), (5, 2), (140_000,), ()]]
    wholes[0] = wholes[0].round()
    wholes[2] *= torch.finfo(dtype).tiny
    wholes[4] *= -0.0
    return [whole.to(dtype) for whole in wholes]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("exclude_zero", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_parts_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, exclude_zero: bool, count: int
) -> None:
    wholes = drawn(dtype)
    for gamma, some in itertools.product((1e-9, 0.3, 0.8, 1.0), (wholes, wholes[:5])):
        expected, threshold = masks_and_threshold(some, gamma, exclude_zero=exclude_zero)
        group = Group(count)
        there = split(some, count, group)
        with monkeypatch.context() as patch:
            patch.setattr(flat_mask, "Shards", lambda values, like: like)
            found = group.run(masks_of(there, gamma, exclude_zero=exclude_zero))
            assert group.reductions == torch.finfo(dtype).bits // 16 + exclude_zero
            counted = group.run(lambda place: count_true(found[place][0], like=there[place]))  # type: ignore[arg-type]  # noqa: B023
        for _, one in found:
            assert one.dtype == threshold.dtype
            assert torch.equal(one, threshold)
        for index, mask in enumerate(expected):
            parts = [masks[index] for masks, _ in found]
            copied = parts[0].shape == mask.shape and len({part.shape for part in parts}) == 1
            assert torch.equal(parts[0] if copied else torch.cat(parts), mask if copied else mask.reshape(-1))
        assert counted == [count_true(expected)] * count


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_all_ranks_refuse_a_number_that_is_not_finite_on_one(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    wholes = drawn(torch.float32)[:4]
    wholes[0][1, 1] = wholes[2][3] = number  # the second is on all ranks, and one's
    group = Group(3)
    there = split(wholes, 3, group)
    monkeypatch.setattr(flat_mask, "Shards", lambda values, like: like)

    def message(place: int) -> str:
        with pytest.raises(ValueError, match="finite") as caught:
            masks_of(there, 0.5)(place)
        return str(caught.value)

    assert group.run(message) == ["Expected finite values to rank, got 2 that are NaN or infinite."] * 3


def masks_of(there: Sequence[Rank], gamma: float, **settings: Any) -> Callable[[int], tuple[list[Tensor], Tensor]]:
    return lambda place: masks_and_threshold(there[place].parts, gamma, like=there[place], **settings)  # type: ignore[arg-type]


def test_plain_tensors_are_their_own_parts() -> None:
    tensors = [torch.randn(3), torch.randn(2, 2), None]
    shards = Shards(tensors)
    assert (shards.sharded, shards.owned, shards.sizes) == (False, [True] * 3, [3, 4, 0])
    for one, part in zip(tensors, shards.parts, strict=True):
        assert one is part
        assert local(one) is one
    value, flag = torch.ones(2), torch.tensor(True)
    assert shards.sum(value) is value
    assert shards.largest(value) is value
    assert shards.every(flag) is flag
    assert tensors[0] is not None
    assert whole_of_part(tensors[0], tensors[0]) is part_of_whole(tensors[0], tensors[0]) is tensors[0]
