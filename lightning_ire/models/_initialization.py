"""How the convolutions of our networks start."""

from __future__ import annotations

from torch import nn

__all__ = ["he_initialize_"]


def he_initialize_(network: nn.Module) -> None:
    """Draw the weights of all convolutions from a normal distribution with variance 2 / fan out, in place.

    He et al., Delving Deep into Rectifiers, arXiv 1502.01852: fan out is the number of output channels times the
    positions of the kernel.

    Args:
        network: Any module; layers of other types keep what they have.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
