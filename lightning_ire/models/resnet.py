"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ire._checks import ConfigurationError, check_choice, check_whole
from lightning_ire.models._initialization import he_initialize_

__all__ = ["BasicBlock", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut around them: `relu(x' + bn(conv(relu(bn(conv(x))))))`.

    Where the block keeps the number of channels, x' is x, thinned out by `stride` in both directions. Where it changes
    them, x' is that filled up with zero channels ("option A" of the paper, no parameters), or with a projection
    `bn(conv1x1(x))` with the stride ("option B").

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least `in_channels`.
        stride: Stride of the first convolution and of the shortcut.
        shortcut: `zeros` or `projection`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        shortcut: Literal["zeros", "projection"] = "zeros",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.projection: nn.Module | None = None
        if shortcut == "projection" and self.new_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: Shape [N, in_channels, H, W].

        Returns:
            Shape [N, out_channels, ceil(H / stride), ceil(W / stride)].
        """
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.projection is not None:
            return self.projection(x)
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else thinned


class ResNet(nn.Module):
    """Residual network for small images, as He et al. use it on CIFAR-10.

    A 3 x 3 convolution, stages of `BasicBlock`, the mean over all positions and a linear layer. The first block of
    every stage but the first halves the resolution. Depth = 2 * sum(blocks) + 2: `blocks=[9, 9, 9]` with the default
    widths is ResNet-56 (for 3 channels and 10 classes 853,018 parameters, with `shortcut="projection"` 855,770),
    `[3, 3, 3]` is ResNet-20.

    Convolutions start with He initialisation (normal, fan out), as BatchNorm scales with 1 and shifts with 0.

    References:
        He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2.

    Example:
        >>> import torch
        >>> ResNet(in_channels=1, blocks=[1, 1, 1])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        blocks: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        shortcut: Literal["zeros", "projection"] = "zeros",
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the images.
            num_classes: Number of logits.
            blocks: Blocks in each stage.
            widths: Channels in each stage, not decreasing.
            shortcut: What a block adds where it changes the number of channels: its input filled up with `zeros`
                (option A of the paper, what it uses on CIFAR-10), or a `projection`, a 1 x 1 convolution and BatchNorm
                (option B).

        Raises:
            ConfigurationError: If a value is out of range, or `blocks` and `widths` do not match.
        """
        super().__init__()
        check_whole("in_channels", in_channels, low=1)
        check_whole("num_classes", num_classes, low=1)
        _check_stages(blocks, widths)
        check_choice("shortcut", shortcut, ("zeros", "projection"))
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        width = widths[0]
        for stage, (num_blocks, new_width) in enumerate(zip(blocks, widths, strict=True)):
            first = BasicBlock(width, new_width, stride=1 if stage == 0 else 2, shortcut=shortcut)
            self.stages.append(nn.Sequential(first, *(BasicBlock(new_width, new_width) for _ in range(num_blocks - 1))))
            width = new_width
        self.linear = nn.Linear(width, num_classes)
        he_initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: Images of shape [N, in_channels, H, W].

        Returns:
            Shape [N, num_classes].
        """
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.linear(x.mean(dim=(2, 3)))


def _check_stages(blocks: Sequence[int], widths: Sequence[int]) -> None:
    for count in blocks:
        check_whole("blocks", count, low=1)
    for width in widths:
        check_whole("widths", width, low=1)
    if not blocks or len(blocks) != len(widths):
        raise ConfigurationError(
            f"Expected `widths` to be as long as `blocks` ({list(blocks)!r}), got {list(widths)!r}."
        )
    if any(later < earlier for earlier, later in pairwise(widths)):
        raise ConfigurationError(f"Expected `widths` to be non-decreasing, got {list(widths)!r}.")
