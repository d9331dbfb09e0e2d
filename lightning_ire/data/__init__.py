"""Data modules of the shipped configs: one dataset per file."""

from lightning_ire.data.cifar import CIFAR10, CIFAR100
from lightning_ire.data.digits import Digits
from lightning_ire.data.image_data import ImageData
from lightning_ire.data.imagenet import ImageNet
from lightning_ire.data.text import Text

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageData", "ImageNet", "Text"]
