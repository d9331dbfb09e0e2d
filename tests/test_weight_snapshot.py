"""What is kept of the weights for the boost: copies of exactly what is needed, a very large one in blocks."""

import pytest
import torch
from torch import nn

from lightning_ire import tags
from lightning_ire.engine import boost as boosting
from lightning_ire.engine.boost import WeightSnapshot, boost

NAMES = ["boosted", "unmasked", "shared"]


def run(everything, transposed=False):
    """One boosted SGD step; returns the weights after it, and what was logged."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in NAMES]
    if transposed:
        parameters[0] = nn.Parameter(parameters[0].detach().t().contiguous().t())
    for parameter in parameters:
        parameter.grad = torch.randn(4, 6, generator=generator)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    names = dict(zip(map(id, parameters), NAMES, strict=True))
    masks = {name: torch.rand(4, 6, generator=generator) < 0.5 for name in NAMES if name != "unmasked"}
    copies = {id(parameters[2]): parameters[2].detach().clone()}
    weights = WeightSnapshot.take(optimizer, names, masks, copies, everything)
    optimizer.step()
    logs = boost(optimizer, weights, dict.fromkeys(map(id, parameters), 2.0), True, everything)
    return weights, [parameter.detach() for parameter in parameters], logs


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_change_nothing(monkeypatch, everything, transposed):
    whole, expected, logs = run(everything, transposed)
    monkeypatch.setattr(boosting, "_BLOCK", 5)
    blocks, got, logs_of_blocks = run(everything, transposed)
    assert len(whole.old) == 2 + everything
    assert len(blocks.old) == (1 if transposed else 5) + 5 + 5 * everything
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for tag in (tags.STEP_NORM_FLAT, tags.STEP_NORM_SHARP) if everything else ():
        torch.testing.assert_close(logs_of_blocks[tag], logs[tag])


def test_a_copy_that_is_there_is_shared():
    parameter = nn.Parameter(torch.ones(3))
    copy = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    masks = {"weight": torch.ones(3, dtype=torch.bool)}
    weights = WeightSnapshot.take(optimizer, {id(parameter): "weight"}, masks, {id(parameter): copy}, False)
    assert weights.old[0] is copy
