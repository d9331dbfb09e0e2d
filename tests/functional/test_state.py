"""Buffers and random streams after an extra pass are what they were before it."""

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ire.functional import RandomState, kept_buffers


class Remembering(nn.Module):
    """Buffers changed in each of the ways that modules have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.register_buffer("emptied", torch.ones(2))
        self.child = nn.Sequential(nn.BatchNorm1d(3))

    def forward(self, x):
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.emptied = None
        return self.child(x)


def contents(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_buffers(module, objects, before):
    now = dict(module.named_buffers())
    assert now.keys() == before.keys()
    for name, buffer in now.items():
        assert buffer is objects[name], name
        assert torch.equal(buffer, before[name]), name


def test_buffers_are_the_same_objects_with_the_same_contents():
    module = Remembering()
    objects, before, keys = dict(module.named_buffers()), contents(module), list(module.state_dict())
    with kept_buffers(module):
        module(torch.randn(8, 3))
        assert module.in_place.tolist() == [1.0, 1.0]
        assert module.emptied is None
        assert not torch.equal(module.child[0].running_mean, before["child.0.running_mean"])
    assert_same_buffers(module, objects, before)
    assert list(module.state_dict()) == keys, "what is saved in checkpoints is the same too"


def test_buffers_come_back_when_the_block_raises():
    module = Remembering()
    objects, before = dict(module.named_buffers()), contents(module)
    with pytest.raises(RuntimeError, match="second pass"), kept_buffers(module):  # noqa: PT012
        module(torch.randn(8, 3))
        raise RuntimeError("second pass")
    assert_same_buffers(module, objects, before)


def test_cumulative_batch_norm_does_not_notice():
    """With momentum=None the statistics are means over all batches so far: the counter is a buffer as well."""
    batches = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    watched, control = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, momentum=None)
    for batch in batches:
        with kept_buffers(watched):
            watched(batch * 10 + 5)
        watched(batch)
        control(batch)
    assert watched.num_batches_tracked.item() == 3
    assert torch.equal(watched.running_mean, control.running_mean)
    assert torch.equal(watched.running_var, control.running_var)


def test_a_deleted_buffer_comes_back_as_a_buffer():
    module = Remembering()
    objects, before = dict(module.named_buffers()), contents(module)
    with kept_buffers(module):
        del module.in_place
    assert_same_buffers(module, objects, before)


def test_an_expanded_buffer_is_no_hindrance():
    """Its elements share memory, so nothing can be copied into it; nothing could have been written to it either."""
    module = nn.Module()
    module.register_buffer("expanded", torch.ones(1).expand(4))
    with kept_buffers(module):
        pass
    assert module.expanded.tolist() == [1.0] * 4


def test_a_registered_buffer_stays():
    module = nn.Module()
    with kept_buffers(module):
        module.register_buffer("cache", torch.ones(2))
    assert module.cache.tolist() == [1.0, 1.0]


def test_parameters_are_not_touched():
    module = nn.Linear(2, 2)
    with kept_buffers(module), torch.no_grad():
        module.weight.fill_(7.0)
    assert module.weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def draws():
    """One number of each stream; an odd count of normal draws leaves half a pair cached in numpy and Python."""
    return (
        torch.rand(()).item(),
        torch.randn(()).item(),
        np.random.rand(),
        np.random.normal(),
        random.random(),
        random.gauss(0, 1),
    )


@pytest.fixture
def streams():
    """The process's streams, seeded; afterwards they go on as if the test had not been."""
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(saved[0])
    np.random.set_state(saved[1])
    random.setstate(saved[2])


@pytest.mark.usefixtures("streams")
def test_all_streams_are_put_back():
    draws()
    state = RandomState.capture()
    first, second = draws(), draws()
    assert all(a != b for a, b in zip(first, second, strict=True))
    state.restore()
    assert draws() == first
    state.restore()  # a state can be used again
    assert draws() == first


@pytest.mark.usefixtures("streams")
def test_capturing_moves_no_stream():
    RandomState.capture()
    with_capture = draws()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert draws() == with_capture


@pytest.mark.usefixtures("streams")
def test_cpu_and_meta_devices_have_no_stream_of_their_own():
    state = RandomState.capture([torch.device("cpu"), torch.device("meta")])
    assert state.devices == ()
    first = draws()
    state.restore()
    assert draws() == first


@pytest.mark.usefixtures("streams")
def test_works_without_numpy(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    state = RandomState.capture()
    assert state.numpy is None
    first = torch.rand(()).item(), random.random()
    state.restore()
    assert (torch.rand(()).item(), random.random()) == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_streams_are_put_back():
    device = torch.device("cuda", torch.cuda.current_device())
    state = RandomState.capture([device])
    first = torch.rand(3, device=device)
    state.restore()
    assert torch.equal(torch.rand(3, device=device), first)
