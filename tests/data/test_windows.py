import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import LENGTH, order, row
from torch.utils.data import DataLoader

from lightning_ire import ConfigurationError
from lightning_ire.data._batches import Share
from lightning_ire.data._windows import CropOrder, Crops, Windows

# Crops and windows.


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_crops(dtype):
    tokens = row(70000, dtype)
    crops = Crops(tokens, 4)
    inputs, targets = crops[65530]
    assert inputs.tolist() == tokens[65530:65534].tolist()
    assert targets.tolist() == tokens[65531:65535].tolist()
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert len(crops) == 69996
    assert crops[69995][1].tolist() == tokens[-4:].tolist()
    for outside in (-1, 69996):
        with pytest.raises(IndexError):
            crops[outside]
    inputs.fill_(0)  # what a batch does to its tensors does not reach the row
    assert tokens[65530] == dtype(65530)
    assert len(Crops(row(3), 5)) == 0


def test_other_processes_map_the_file(tmp_path):
    row(100_000).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    for crops in (Crops(tokens, 4), Windows(tokens, 4)):
        content = pickle.dumps(crops)
        assert len(content) < 1000
        again = pickle.loads(content)
        assert len(again) == len(crops)
        assert all(torch.equal(*pair) for pair in zip(again[77], crops[77], strict=True))
    assert isinstance(pickle.loads(pickle.dumps(Crops(tokens, 4))).tokens, np.memmap)
    assert len(pickle.loads(pickle.dumps(Crops(row(9), 4)))) == 5


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(2, 60), length=st.integers(1, 70))
def test_every_token_is_a_target_once(tokens, length):
    windows = Windows(row(tokens), length)
    seen = []
    for inputs, targets in windows:
        assert inputs.shape == targets.shape == (min(length, tokens - 1),)
        counted = targets != -100
        assert counted.any()
        assert (inputs + 1)[counted].tolist() == targets[counted].tolist()
        seen += targets[counted].tolist()
    assert seen == list(range(1, tokens))
    assert len(list(windows)) == len(windows)


def test_windows_on_several_devices():
    windows, seen = Windows(row(48), LENGTH), []
    for rank in range(3):
        loader = DataLoader(windows, 2, sampler=Share(windows, 3, rank))
        seen += [target for _, targets in loader for target in targets.flatten().tolist() if target != -100]
    assert sorted(seen) == list(range(1, 48))


# The order.


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(10, 300), length=st.integers(1, 9), batch=st.integers(1, 4), epoch=st.integers(0, 50),
    shuffled=st.booleans(),
)  # fmt: skip
def test_no_token_twice_and_no_batch_less(tokens, length, batch, epoch, shuffled):
    crops = Crops(row(tokens), length)
    # of tokens - 1 targets the random start may leave out length - 1
    least = (tokens - 1 - (length - 1 if shuffled else 0)) // length // batch
    if least == 0:
        with pytest.raises(ConfigurationError, match="`global_batch_size`"):
            CropOrder(crops, batch, 1, 0, 0, shuffled)
        return
    sampler = CropOrder(crops, batch, 1, 0, 0, shuffled)
    sampler.set_epoch(epoch)
    starts = list(sampler)
    assert len(starts) == len(sampler) == least * batch
    targets = [target for start in starts for target in crops[start][1].tolist()]
    assert len(targets) == len(set(targets)) == len(starts) * length
    assert len({start % length for start in starts}) == 1


def test_all_places_are_a_start():
    firsts = {next(iter(order(100, 4, epoch=epoch))) % LENGTH for epoch in range(40)}
    assert firsts == set(range(LENGTH))
    seen = {start for epoch in range(200) for start in order(30, 2, epoch=epoch)}
    assert seen == set(range(25))  # with enough epochs every crop


def global_batches(devices: int, accumulation: int, shuffled: bool, **settings) -> list[list[int]]:
    """First tokens of each optimizer step's sequences, over all devices and micro-batches."""
    steps: list[list[int]] = []
    for rank in range(devices):
        sampler = order(700, 8, devices, rank, shuffled, **settings)
        micro = list(DataLoader(sampler.dataset, batch_size=8 // devices // accumulation, sampler=sampler))
        assert len(micro) % accumulation == 0
        for step, parts in enumerate(zip(*[iter(micro)] * accumulation, strict=True)):
            if rank == 0:
                steps.append([])
            steps[step] += [start for inputs, _ in parts for start in inputs[:, 0].tolist()]
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("shuffled", [True, False])
def test_global_batches_are_the_same_on_any_number_of_devices(shuffled):
    alone = global_batches(1, 1, shuffled, epoch=3)
    assert [len(set(step)) for step in alone] == [8] * ((700 - 1 - 4 * shuffled) // LENGTH // 8)
    for devices, accumulation in ((2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 2), (2, 4), (4, 2)):
        assert global_batches(devices, accumulation, shuffled, epoch=3) == alone


def test_the_order_depends_on_seed_and_epoch():
    first = global_batches(1, 1, True)
    assert global_batches(1, 1, True) == first
    assert global_batches(1, 1, True, epoch=1) != first
    assert global_batches(1, 1, True, seed=1) != first
    assert global_batches(1, 1, True, seed=1, epoch=0) != global_batches(1, 1, True, seed=0, epoch=1)
    assert global_batches(1, 1, False, seed=1, epoch=1) == global_batches(1, 1, False)


def test_the_order_leaves_random_numbers_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(order(100, 4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_rows_go_on_where_they_ended(devices, accumulation):
    # 8 rows of 17 crops: 699 // 5 // 8
    micro = 8 // devices // accumulation
    for rank in range(devices):
        sampler = order(700, 8, devices, rank, shuffled=False)
        batches = list(DataLoader(sampler.dataset, batch_size=micro, sampler=sampler))
        assert len(batches) == 17 * accumulation
        for (_, targets), (inputs, _) in zip(batches[:-accumulation], batches[accumulation:], strict=True):
            assert torch.equal(targets[:, -1], inputs[:, 0])
        begins = torch.cat([inputs[:, 0] for inputs, _ in batches[:accumulation]])
        assert begins.tolist() == [17 * LENGTH * number for number in range(rank, 8, devices)]


@pytest.mark.parametrize(
    ("tokens", "shuffled", "message"),
    [
        (
            44,
            True,
            r"^Expected `global_batch_size` \(times `sequence_length` 5\) to be at most what the 44 tokens of the",
        ),
        (40, False, r"at most what the 40 tokens of the training part make, got 8\.$"),
        (1, True, r"at most what the 1 tokens of the training part make, got 8\.$"),
    ],
)
def test_too_few_tokens_for_a_batch(tokens, shuffled, message):
    with pytest.raises(ConfigurationError, match=message):
        order(tokens, 8, shuffled=shuffled)
    assert len(order(45 if shuffled else 41, 8, shuffled=shuffled)) == 8
