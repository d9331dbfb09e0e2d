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


def test_resnet56_with_projections_has_the_size_of_the_authors_code():
    with torch.device("meta"):
        model = ResNet(blocks=[9, 9, 9], shortcut="projection")
    assert sum(p.numel() for p in model.parameters()) == 855_770
    projections = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size[0] == 1]
    assert [(p.in_channels, p.out_channels, p.stride[0]) for p in projections] == [(16, 32, 2), (32, 64, 2)]


def test_zeros_are_the_default_and_add_nothing_to_checkpoints():
    torch.manual_seed(0)
    default = ResNet(blocks=[1, 2], widths=[2, 3]).state_dict()
    torch.manual_seed(0)
    zeros = ResNet(blocks=[1, 2], widths=[2, 3], shortcut="zeros").state_dict()
    assert all(torch.equal(default[name], zeros[name]) for name in zeros)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    blocks = [
        f"stages.{block}.{layer}" for block in ("0.0", "1.0", "1.1") for layer in ("conv1.weight", "conv2.weight")
    ]
    norms = [f"stages.{block}.bn{i}.{name}" for block in ("0.0", "1.0", "1.1") for i in (1, 2) for name in norm]
    rest = ["conv.weight", *(f"bn.{name}" for name in norm), "linear.weight", "linear.bias"]
    assert set(default) == {*blocks, *norms, *rest}


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


def test_block_adds_the_projected_input():
    block = BasicBlock(2, 3, stride=2, shortcut="projection").eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    convolution, norm = block.projection
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(4.0)
    x = torch.randn(1, 2, 5, 5)
    projected = torch.einsum("oi,nihw->nohw", convolution.weight[:, :, 0, 0], x[:, :, ::2, ::2])
    torch.testing.assert_close(block(x), F.relu((projected - 0.5) / (4 + 1e-5) ** 0.5))


def test_block_that_keeps_the_channels_projects_nothing():
    block = BasicBlock(3, 3, stride=2, shortcut="projection").eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(block(x), F.relu(x[:, :, ::2, ::2]))


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
        ({"shortcut": "none"}, "Expected `shortcut` to be one of 'zeros', 'projection', got 'none'."),
        ({"widths": [8, 16, 8]}, "Expected `widths` to be non-decreasing, got [8, 16, 8]."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ResNet(**settings)
