"""What all our networks for language refuse."""

import re
from functools import partial

import pytest
import torch

from lightning_ire import ConfigurationError
from lightning_ire.models import Llama, Transformer

SMALL = {"vocab_size": 11, "width": 8, "num_layers": 1, "num_heads": 2, "feed_forward": 12, "context_length": 9}
NETWORKS = pytest.mark.parametrize(
    "make", [partial(Transformer, **SMALL), partial(Llama, **SMALL)], ids=["ours", "llama"]
)


@NETWORKS
def test_sequence_that_is_too_long(make):
    assert make()(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9, 11)
    message = "Expected `context_length` to be at least 10, the length of the sequences (`data.sequence_length`), got 9"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        make()(torch.zeros(3, 10, dtype=torch.int64))


@NETWORKS
@pytest.mark.parametrize("name", SMALL)
def test_sizes_are_whole_numbers(make, name):
    with pytest.raises(ConfigurationError, match=f"^Expected `{name}` to be a whole number >= 1, got 0.$"):
        make(**{name: 0})
