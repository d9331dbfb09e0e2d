"""Models of the shipped configs: LightningModules and networks that know nothing of IRE."""

from lightning_ire.models.image_classifier import ImageClassifier
from lightning_ire.models.language_model import LanguageModel
from lightning_ire.models.llama import Llama
from lightning_ire.models.resnet import ResNet
from lightning_ire.models.transformer import Transformer
from lightning_ire.models.warmup_cosine import WarmupCosineLR
from lightning_ire.models.wide_resnet import WideResNet

__all__ = ["ImageClassifier", "LanguageModel", "Llama", "ResNet", "Transformer", "WarmupCosineLR", "WideResNet"]
