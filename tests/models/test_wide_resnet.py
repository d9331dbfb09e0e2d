import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ire import ConfigurationError
from lightning_ire.models.wide_resnet import PreActivationBlock, WideResNet


def counted(depth: int, k: int, classes: int) -> int:
    """The number of parameters by hand: weights of convolutions, two per channel for each norm, the linear layer."""
    blocks = (depth - 4) // 6
    count = 3 * 16 * 9
    for before, after in ((16, 16 * k), (16 * k, 32 * k), (32 * k, 64 * k)):
        count += 2 * before + 9 * before * after + 2 * after + 9 * after**2 + before * after  # with the projection
        count += (blocks - 1) * (2 * 2 * after + 2 * 9 * after**2)
    return count + 2 * 64 * k + 64 * k * classes + classes


@pytest.mark.parametrize(
    ("depth", "width", "classes", "published"),
    [(28, 10, 10, 36_479_194), (28, 10, 100, 36_536_884), (16, 8, 10, 10_961_370)],
)
def test_has_the_published_size(depth, width, classes, published):
    with torch.device("meta"):
        model = WideResNet(depth, width, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == counted(depth, width, classes) == published
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth


@pytest.mark.parametrize("size", [8, 9])
def test_resolution_is_halved_from_stage_to_stage(size):
    model = WideResNet(16, 2, in_channels=1, num_classes=7)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    half, quarter = -(-size // 2), -(-size // 4)
    assert sizes == [(32, size, size), (64, half, half), (128, quarter, quarter)]


def test_the_end_is_norm_relu_mean_and_linear():
    model = WideResNet(10, 1).eval()
    model.bn.running_mean.fill_(0.1)
    seen = []
    model.stages.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(torch.randn(2, 3, 8, 8))
    features = F.relu((seen[0] - 0.1) / (1 + 1e-5) ** 0.5).flatten(2).sum(dim=2) / 4
    torch.testing.assert_close(logits, features @ model.linear.weight.T + model.linear.bias)


def branch(block: PreActivationBlock, x: torch.Tensor, stride: int) -> torch.Tensor:
    """What the block adds to its shortcut in evaluation, by hand; its norms' statistics are set here."""
    block.bn1.running_mean.fill_(0.2)
    block.bn2.running_var.fill_(4.0)
    first = F.conv2d(F.relu((x - 0.2) / (1 + 1e-5) ** 0.5), block.conv1.weight, padding=1, stride=stride)
    return F.conv2d(F.relu(first / (4 + 1e-5) ** 0.5), block.conv2.weight, padding=1)


def test_block_that_keeps_the_channels_adds_its_raw_input():
    block = PreActivationBlock(2, 2).eval()
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(branch(block, x, 1) + x, block(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_block_that_changes_the_channels_projects_its_activated_input(stride):
    block = PreActivationBlock(2, 3, stride).eval()
    x = torch.randn(1, 2, 5, 5)
    added = branch(block, x, stride)
    activated = F.relu((x - 0.2) / (1 + 1e-5) ** 0.5)[:, :, ::stride, ::stride]
    projected = torch.einsum("oi,nihw->nohw", block.projection.weight[:, :, 0, 0], activated)
    torch.testing.assert_close(block(x), added + projected)


def test_dropout_is_between_the_convolutions():
    block = PreActivationBlock(2, 2, dropout=0.5).train()
    x, inputs = torch.randn(2, 2, 4, 4), []
    for layer in (block.bn2, block.conv2):
        layer.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
    block(x)
    (_, normed), (dropped, _) = inputs
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * F.relu(normed)[kept])
    assert 0 < kept.sum() < F.relu(normed).count_nonzero()


def test_dropout_reaches_all_blocks():
    model = WideResNet(16, 1, dropout=0.3)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 6


def test_he_initialisation():
    torch.manual_seed(0)
    for module in WideResNet(10, 4).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 4}, "Expected `depth` to be a whole number >= 10, got 4."),
        ({"depth": 27}, "Expected `depth` to be 6 n + 4 for a whole number n, got 27."),
        ({"width": 0}, "Expected `width` to be a whole number >= 1, got 0."),
        ({"in_channels": 0}, "Expected `in_channels` to be a whole number >= 1, got 0."),
        ({"num_classes": 0}, "Expected `num_classes` to be a whole number >= 1, got 0."),
        ({"dropout": 1.0}, "Expected `dropout` to be a number in [0, 1), got 1.0."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        WideResNet(**{"depth": 10, "width": 1, **settings})
