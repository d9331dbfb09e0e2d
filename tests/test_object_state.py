"""What Python objects hold is remembered and put back, for modules and, more of it, for a user's data."""

import collections
import functools
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ire.engine.module_state import AttributeState, ModuleState, modules_of
from lightning_ire.engine.object_state import DictionaryState, ObjectState

CHANGES = {
    "nothing": lambda one: None,
    "an equal value": lambda one: one.update(a=[1]),
    "a new key": lambda one: one.update(c=3),
    "one less": lambda one: one.pop("a"),
    "another name": lambda one: one.update(c=one.pop("b")),
    "another order": lambda one: one.update(a=one.pop("a")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_dictionaries_are_found_and_what_they_held(change: str) -> None:
    ones: list[dict[Any, Any]] = [{"a": [1], "b": 2}, {}, {"a": [1], "b": 2}, {5: None}]
    before = dict(ones[2])
    state = DictionaryState(ones)
    CHANGES[change](ones[2])
    found = list(state.changed())
    assert found == ([] if change == "nothing" else [(2, before)])
    assert all(held["a"] is before["a"] and list(held) == ["a", "b"] for _, held in found)


def test_an_entry_that_moves_to_the_next_dictionary_is_found() -> None:
    """The entries of all dictionaries one after the other are the same then."""
    ones: list[dict[str, int]] = [{"a": 1, "b": 2}, {"c": 3}]
    state = DictionaryState(ones)
    entry = ones[0].pop("b")
    ones[1].clear()
    ones[1].update(b=entry, c=3)
    assert list(state.changed()) == [(0, {"a": 1, "b": 2}), (1, {"c": 3})]


class Data:
    """Holds data of each kind, and says what it holds."""

    made: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        self.counts = collections.Counter(a=2)
        self.groups = collections.defaultdict(list, a=[1])
        self.nested = {"deque": collections.deque([1], maxlen=1), "set": {1}, "bytes": bytearray(b"ab")}
        self.array, self.tensor = np.zeros(2), torch.zeros(2)
        self.generator = np.random.default_rng(0)

    def change(self) -> None:
        self.counts.update("ab")
        self.groups["b"].append(2)
        self.nested["deque"].append(2)
        self.nested["set"].add(2)
        self.nested["bytes"] += b"c"
        self.array += 1
        self.tensor.data.add_(1)
        self.generator.random()
        self.new = 1
        self.made[0] += 1

    def says(self) -> list[str]:
        return [repr(value) for value in vars(self).values()] + [repr(self.generator.bit_generator.state)]


@pytest.mark.parametrize("everything", [False, True])
def test_data_is_put_back_and_the_class_with_everything(everything: bool) -> None:
    data = Data()
    before, made = data.says(), Data.made[0]
    change = functools.partial(data.change)
    state = ObjectState([("root", change if everything else data)], everything)
    for _ in range(2):  # it can be put back again
        change()
        assert data.says() != before
        state.restore()
        assert data.says() == before
        assert Data.made[0] == (made if everything else made + 1)
        made = Data.made[0]


def test_modules_are_found_in_attributes_and_what_is_registered_is_put_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(2)
            self.again = self.layer
            self.hidden = {"list": [nn.Sequential(nn.Linear(2, 2))]}

    net = Net()
    (hidden,) = net.hidden["list"]
    modules = modules_of(net)
    assert modules[0] is net
    assert set(modules) == {net, net.layer, hidden, hidden[0]}
    assert len(modules) == 4
    states = ModuleState(modules), AttributeState(modules)
    layer, mean = net.layer, net.layer.running_mean
    del net.layer
    hidden.append(nn.Linear(1, 1))
    layer.running_mean = mean + 1
    layer.flag, net.hidden = True, {}
    for state in states:
        state.restore()
    assert net.layer is net.again is layer
    assert layer.running_mean is mean
    assert not mean.any()
    assert (len(hidden), net.hidden["list"][0] is hidden, hasattr(layer, "flag")) == (1, True, False)
