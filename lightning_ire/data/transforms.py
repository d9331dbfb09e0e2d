"""Image transforms: what torchvision does not have, and the chains that the datamodules use.

torchvision is imported where it is needed, so that the package works without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_number, check_whole

__all__ = ["Cutout", "batch_mixing", "evaluation_chain", "training_chain"]


class Cutout(nn.Module):
    """Sets a square of each image to zero (DeVries & Taylor, arXiv 1708.04552).

    The square's centre is uniform over the pixels; the square is clipped at the border, so that up to three quarters of
    it lie outside. After normalisation zero is the mean colour. One image at a time.

    Args:
        size: Side of the square in pixels, at least 1. The paper: 16 for CIFAR-10, 8 for CIFAR-100.
        probability: Share of the images that lose a square, in [0, 1].

    Raises:
        ConfigurationError: If a value is out of range.
    """

    def __init__(self, size: int, probability: float = 1.0) -> None:
        super().__init__()
        self.size = check_whole("cutout_size", size, low=1)
        self.probability = check_number("cutout_probability", probability, high=1.0)

    def forward(self, image: Tensor) -> Tensor:
        """Return a copy with a square of zeros.

        Args:
            image: Shape [..., H, W].

        Returns:
            The same shape.
        """
        if torch.rand(()) >= self.probability:
            return image
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image = image.clone()
        image[..., max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = 0
        return image


def training_chain(
    geometry: Sequence[nn.Module],
    policy: nn.Module | None,
    mean: Sequence[float],
    std: Sequence[float],
    cutout_size: int,
    cutout_probability: float,
) -> Any:
    """Crop and flip, augmentation policy, float in [0, 1], normalisation, Cutout: in this order.

    Args:
        geometry: Crops and flips of a PIL image.
        policy: AutoAugment, RandAugment or none.
        mean: Mean of each channel in [0, 1].
        std: Standard deviation of each channel.
        cutout_size: Side of the square; 0: no Cutout.
        cutout_probability: Share of the images with Cutout.

    Returns:
        PIL image -> float32 tensor of shape [3, H, W].
    """
    v2 = torchvision_v2()
    steps = [*geometry, *([policy] if policy is not None else []), *_to_tensor(mean, std)]
    if cutout_size:
        steps.append(Cutout(cutout_size, cutout_probability))
    return v2.Compose(steps)


def evaluation_chain(geometry: Sequence[nn.Module], mean: Sequence[float], std: Sequence[float]) -> Any:
    """What is done to an image without any randomness; arguments and result as in :func:`training_chain`."""
    return torchvision_v2().Compose([*geometry, *_to_tensor(mean, std)])


def batch_mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> nn.Module | None:
    """MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, lambda ~ Beta(alpha, alpha).

    Args:
        mixup_alpha: Parameter of MixUp; 0: off.
        cutmix_alpha: Parameter of CutMix; 0: off. With both, one of them is drawn for each batch.
        num_classes: Number of classes.

    Returns:
        (images [N, C, H, W], labels [N]) -> (images, probabilities [N, num_classes]), or `None` if both are off.
    """
    v2 = torchvision_v2()
    kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
    mixing = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixing) if mixing else None


def torchvision(part: str) -> Any:
    """A module of torchvision, imported when it is needed.

    Args:
        part: Its name after `torchvision.`.

    Raises:
        ConfigurationError: If torchvision is not installed.
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ImportError as error:
        raise ConfigurationError(
            "Expected torchvision for image data, got an import error: pip install 'lightning-ire[vision]'."
        ) from error


def torchvision_v2() -> Any:
    """The module `torchvision.transforms.v2`, as :func:`torchvision` imports it."""
    return torchvision("transforms.v2")


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    v2 = torchvision_v2()
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
