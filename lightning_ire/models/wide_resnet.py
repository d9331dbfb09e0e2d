"""Wide residual networks for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ire._checks import ConfigurationError, check_number, check_whole
from lightning_ire.models._initialization import he_initialize_

__all__ = ["PreActivationBlock", "WideResNet"]


class PreActivationBlock(nn.Module):
    """`x' + conv(dropout(relu(bn(conv(a)))))` with the pre-activated input `a = relu(bn(x))`.

    The shortcut x' is x itself where the block keeps the number of channels, and `conv1x1(a)` with the stride, without
    a norm, where it changes them. That the projection takes a and not x is what the paper's code does: BatchNorm has
    then brought its input to a fixed scale (the sum of all blocks before has none), and nothing has to follow it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the projection; 1 where the block keeps the channels.
        dropout: Probability with which a value between the convolutions is set to 0 in training.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: Shape [N, in_channels, H, W].

        Returns:
            Shape [N, out_channels, ceil(H / stride), ceil(W / stride)].
        """
        activated = F.relu(self.bn1(x))
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        return out + (x if self.projection is None else self.projection(activated))


class WideResNet(nn.Module):
    """Wide residual network, WRN-depth-width.

    A 3 x 3 convolution to 16 channels, three stages of (depth - 4) / 6 `PreActivationBlock` each with 16 k, 32 k and
    64 k channels for width k, BatchNorm, ReLU, the mean over all positions and a linear layer. The second and the third
    stage halve the resolution. WRN-28-10 has 36,479,194 parameters for 3 channels and 10 classes (36,536,884 for 100),
    WRN-16-8 has 10,961,370.

    Convolutions start with He initialisation (normal, fan out), as BatchNorm scales with 1 and shifts with 0.

    References:
        Zagoruyko and Komodakis, Wide Residual Networks, arXiv 1605.07146; code: github.com/szagoruyko/
        wide-residual-networks.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, width=1, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        """Build the network.

        Args:
            depth: Number of convolutions, counted as in the paper: 6 n + 4 for n blocks in each stage.
            width: Factor k by which all stages are wider than those of a thin network.
            in_channels: Channels of the images.
            num_classes: Number of logits.
            dropout: Probability, in [0, 1), with which a value between the convolutions of a block is set to 0 in
                training (the paper's CIFAR runs with dropout: 0.3).

        Raises:
            ConfigurationError: If a value is out of range, or `depth` is not 6 n + 4.
        """
        super().__init__()
        blocks, rest = divmod(check_whole("depth", depth, low=10) - 4, 6)
        if rest:
            raise ConfigurationError(f"Expected `depth` to be 6 n + 4 for a whole number n, got {depth!r}.")
        check_whole("width", width, low=1)
        check_whole("in_channels", in_channels, low=1)
        check_whole("num_classes", num_classes, low=1)
        check_number("dropout", dropout, high=1.0, high_open=True)
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        channels = 16
        for new_channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            first = PreActivationBlock(channels, new_channels, stride, dropout)
            others = (PreActivationBlock(new_channels, new_channels, dropout=dropout) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *others))
            channels = new_channels
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        he_initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: Images of shape [N, in_channels, H, W].

        Returns:
            Shape [N, num_classes].
        """
        x = F.relu(self.bn(self.stages(self.conv(x))))
        return self.linear(x.mean(dim=(2, 3)))
