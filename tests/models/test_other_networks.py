"""Networks of other packages: their sizes, and that configs and flags reach them."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn

import lightning_ire.models
from lightning_ire.cli import IRECLI


class WideResNet(nn.Module):
    """Somebody else's, known to the command line as soon as it is imported; torchvision and timm have a ResNet."""


VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def transformer(image: int, patch: int, width: int, depth: int, classes: int) -> int:
    """The number of parameters of a vision transformer by hand; its MLP is four times as wide."""
    embedding = 3 * patch**2 * width + width
    positions = ((image // patch) ** 2 + 1) * width + width  # with the class token, and the token itself
    attention = 3 * (width**2 + width) + width**2 + width
    mlp = (4 * width**2 + 4 * width) + (4 * width**2 + width)
    return embedding + positions + depth * (attention + mlp + 2 * 2 * width) + 2 * width + width * classes + classes


@pytest.mark.parametrize(
    ("image", "patch", "width", "heads", "classes", "published"),
    [
        pytest.param(32, 4, 192, 3, 100, 5_380_132, id="T/4-cifar100"),
        pytest.param(32, 4, 384, 6, 100, 21_376_996, id="S/4-cifar100"),
        pytest.param(224, 16, 384, 6, 1000, 22_050_664, id="S/16-imagenet"),
    ],
)
def test_size_of_vision_transformers(image, patch, width, heads, classes, published):
    models = pytest.importorskip("timm.models")
    model = models.VisionTransformer(  # not on the meta device: timm 1.0.3 cannot
        img_size=image, patch_size=patch, embed_dim=width, depth=12, num_heads=heads, num_classes=classes
    )
    assert sum(p.numel() for p in model.parameters()) == transformer(image, patch, width, 12, classes) == published


def resnet50(classes: int) -> int:
    """The number of parameters of ResNet-50 by hand."""
    count, channels = 3 * 64 * 49 + 2 * 64, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            count += channels * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
            count += (channels * 4 * width + 2 * 4 * width) if block == 0 else 0
            channels = 4 * width
    return count + channels * classes + classes


def test_size_of_resnet50():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50()
    assert sum(p.numel() for p in model.parameters()) == resnet50(1000) == 25_557_032


@pytest.mark.parametrize(
    ("class_path", "settings", "known_as"),
    [
        ("ResNet", {"blocks": [1, 1, 1], "shortcut": "projection"}, lightning_ire.models.ResNet),
        ("WideResNet", {"depth": 10, "width": 1}, lightning_ire.models.WideResNet),
        ("torchvision.models.resnet50", {}, "torchvision.models.resnet.ResNet"),
        ("timm.models.VisionTransformer", VIT, "timm.models.vision_transformer.VisionTransformer"),
    ],
)
def test_config_and_flags_reach_the_network(class_path, settings, known_as, tmp_path, monkeypatch):
    for package in ("torchvision.models", "timm.models"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: None)
    classifier = {"num_classes": 7, "model": {"class_path": class_path, "init_args": settings}}
    config = {
        "model": {"class_path": "ImageClassifier", "init_args": classifier},
        "data": {"class_path": "Digits"},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    model = IRECLI(["fit", "--config", "config.yaml", "--model.model.num_classes", "7"]).model.model
    assert known_as in (type(model), f"{type(model).__module__}.{type(model).__name__}")
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == 7


def test_schedule_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: None)
    flags = (
        "--model ImageClassifier --model.num_classes 10 --model.model ResNet --model.optimizer SGD --data Digits "
        "--trainer.accelerator cpu --trainer.logger false "
        "--model.lr_scheduler WarmupCosineLR --model.lr_scheduler.warmup"
    )
    for warmup, known_as in (("3", int), ("0.25", float)):
        made = IRECLI(["fit", *flags.split(), warmup]).model.configure_optimizers()
        schedule = made["lr_scheduler"]["scheduler"]
        assert type(schedule) is lightning_ire.models.WarmupCosineLR
        assert schedule.warmup == float(warmup)
        assert type(schedule.warmup) is known_as
