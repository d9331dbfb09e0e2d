import math

import pytest
from torch.utils.data import DataLoader

from lightning_ire import ConfigurationError
from lightning_ire.data._batches import BatchPlan, Share, WholeBatches, plan_batches
from lightning_ire.data.global_batch import even_size


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param((128, 1, 1, None), (1, 1, 128), id="one device"),
        pytest.param((1024, 4, 1, None), (4, 1, 256), id="no limit"),
        pytest.param((1024, 4, 1, 256), (4, 1, 256), id="fits"),
        pytest.param((1024, 1, 1, 256), (1, 4, 256), id="accumulated"),
        pytest.param((1024, 1, 1, 255), (1, 8, 128), id="equal parts"),
        pytest.param((4096, 8, 1, 200), (8, 4, 128), id="both"),
        pytest.param((1024, 2, 4, None), (2, 4, 128), id="accumulation asked for"),
        pytest.param((1024, 2, 4, 128), (2, 4, 128), id="accumulation asked for, at the limit"),
        pytest.param((12, 1, 1, 5), (1, 3, 4), id="no power of two"),
        pytest.param((7, 1, 1, 5), (1, 7, 1), id="prime"),
    ],
)
def test_plan(asked, expected):
    plan = plan_batches(*asked)
    assert plan == BatchPlan(*expected)
    assert math.prod(expected) == asked[0]


def test_plan_in_words():
    assert str(plan_batches(1024, 2, 1, 256)) == "2 device(s) x 2 micro-batch(es) of 256"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((128, 3, 1, None), r"Expected `global_batch_size` to be a multiple of 3 \(devices 3, .*\), got 128\."),
        ((128, 2, 3, None), r"multiple of 6 \(devices 2, trainer.accumulate_grad_batches 3\), got 128"),
        ((128, 1, 2, 63), r"Expected `max_batch_per_device` to be at least 64 .* got 63"),
    ],
)
def test_plan_refused(asked, message):
    with pytest.raises(ConfigurationError, match=message):
        plan_batches(*asked)


def global_batches(samples: int, batch: int, devices: int, accumulation: int, epoch: int = 0, seed: int = 0) -> list:
    """The samples of each optimizer step, over all devices and micro-batches."""
    steps: list[list[int]] = []
    for rank in range(devices):
        sampler = WholeBatches(range(samples), batch, devices, rank, seed)
        sampler.set_epoch(epoch)
        micro = list(DataLoader(range(samples), batch_size=batch // devices // accumulation, sampler=sampler))
        for step in range(len(micro) // accumulation):
            if rank == 0:
                steps.append([])
            for part in micro[step * accumulation : (step + 1) * accumulation]:
                steps[step] += part.tolist()
        assert len(micro) % accumulation == 0
    return [sorted(step) for step in steps]


def test_global_batches_are_the_same_on_any_number_of_devices():
    alone = global_batches(53, 12, 1, 1)
    assert [len(step) for step in alone] == [12] * 4  # 5 samples are left over
    assert len({index for step in alone for index in step}) == 48
    for devices, accumulation in ((2, 1), (3, 1), (1, 4), (2, 3), (4, 3), (12, 1)):
        assert global_batches(53, 12, devices, accumulation) == alone


def test_order_depends_on_seed_and_epoch():
    assert global_batches(53, 12, 1, 1) != global_batches(53, 12, 1, 1, epoch=1)
    assert global_batches(53, 12, 1, 1) != global_batches(53, 12, 1, 1, seed=5)
    assert global_batches(53, 12, 2, 1, epoch=3) == global_batches(53, 12, 1, 1, epoch=3)


def test_fewer_samples_than_a_batch():
    with pytest.raises(ConfigurationError, match="`global_batch_size` to be at most the 11 training images, got 12"):
        WholeBatches(range(11), 12, 1, 0, 0)
    assert len(WholeBatches(range(12), 12, 1, 0, 0)) == 12


@pytest.mark.parametrize(("samples", "devices"), [(10, 1), (10, 3), (9, 3), (3, 3)])
def test_every_sample_is_evaluated_once(samples, devices):
    shares = [Share(range(samples), devices, rank) for rank in range(devices)]
    assert sorted(index for share in shares for index in share) == list(range(samples))
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]


def test_fewer_samples_than_devices():
    with pytest.raises(ConfigurationError, match="at least one sample per device for evaluation, got 2 on 3 devices"):
        Share(range(2), 3, 0)


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_devices_with_parts_of_a_network_have_equally_many_batches(devices, size):
    """Every sample once; one forward pass more on one device would wait for the others for ever."""
    for samples in range(devices, 60):
        data = range(samples)
        even = even_size(data, devices, size)
        loaders = [DataLoader(data, even, sampler=Share(data, devices, rank)) for rank in range(devices)]
        assert len({len(list(loader)) for loader in loaders}) == 1
        assert sorted(index for loader in loaders for batch in loader for index in batch.tolist()) == list(data)
        if samples % devices == 0 or samples // devices % size:
            assert even == size
