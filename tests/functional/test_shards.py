"""Sharded tensors (DTensor): what comes out, gathered, is what one process makes of the whole tensors."""

import functools
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

from lightning_ire.functional import all_finite, count_true, flat_mask, flat_masks, global_norm, masks_and_threshold
from lightning_ire.functional._shards import Shards, local, part_of_whole, reshard, whole_of_part

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
        assert list(found[layout]) == list(alone)
        for name, expected in alone.items():
            exact = name.startswith(EXACT) or name.endswith(("-saved", "-after"))
            assert_same(found[layout][name], expected, 0 if exact else 1e-14, name)
        for name, other in ranks(count)[0][layout].items():
            assert_same(found[layout][name], other, 0, name)
