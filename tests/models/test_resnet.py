import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ire import ConfigurationError
from lightning_ire.models.resnet import BasicBlock, ResNet


def test_resnet56_has_the_published_size():
    model = ResNet(in_channels=3, num_classes=10, blocks=[9, 9, 9], widths=[16, 32, 64])
    assert sum(p.numel() for p in model.parameters()) == 853_018
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 56


@pytest.mark.parametrize("size", [8, 9, 32])
def test_resolution_is_halved_from_stage_to_stage(size):
    model = ResNet(in_channels=1, num_classes=7, blocks=[1, 2, 1], widths=[4, 8, 8])
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    half, quarter = -(-size // 2), -(-size // 4)
    assert sizes == [(4, size, size), (8, half, half), (8, quarter, quarter)]


def test_block_adds_the_thinned_out_input():
    block = BasicBlock(2, 3, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.randn(1, 2, 5, 5)
    expected = torch.cat([F.relu(x[:, :, ::2, ::2]), torch.zeros(1, 1, 3, 3)], dim=1)
    assert torch.equal(block(x), expected)


def test_block_is_two_convolutions_and_a_shortcut():
    block = BasicBlock(2, 2).eval()
    block.bn1.running_mean.fill_(0.5)
    block.bn2.running_var.fill_(4.0)
    x = torch.randn(1, 2, 4, 4)
    first = F.relu((F.conv2d(x, block.conv1.weight, padding=1) - 0.5) / (1 + 1e-5) ** 0.5)
    second = F.conv2d(first, block.conv2.weight, padding=1) / (4 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), F.relu(x + second))


def test_he_initialisation():
    torch.manual_seed(0)
    model = ResNet(blocks=[1, 1], widths=[64, 128])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 0}, "Expected `in_channels` to be a whole number >= 1, got 0."),
        ({"num_classes": 0}, "Expected `num_classes` to be a whole number >= 1, got 0."),
        ({"blocks": [1, 0, 1]}, "Expected `blocks` to be a whole number >= 1, got 0."),
        ({"widths": [8, 16, -1]}, "Expected `widths` to be a whole number >= 1, got -1."),
        ({"widths": [8, 16]}, "Expected `widths` to be as long as `blocks` ([3, 3, 3]), got [8, 16]."),
        ({"blocks": [], "widths": []}, "Expected `widths` to be as long as `blocks` ([]), got []."),
        ({"widths": [8, 16, 8]}, "Expected `widths` to be non-decreasing, got [8, 16, 8]."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ResNet(**settings)
