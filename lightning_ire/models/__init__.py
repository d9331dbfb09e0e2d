"""Models of the shipped configs: LightningModules and networks that know nothing of IRE."""

from lightning_ire.models.image_classifier import ImageClassifier
from lightning_ire.models.resnet import ResNet

__all__ = ["ImageClassifier", "ResNet"]
