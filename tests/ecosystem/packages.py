"""Networks of other packages, with random weights and without a download."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from cases import CLASSES
from torch import Tensor, nn

from ecosystem.modules import HIDDEN, Exercise, Seeded, sum_of_losses
from ecosystem.optimizers import of_torch


class LabelledInside(Seeded):
    """A network that computes its loss itself from a dict of inputs and labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> pl.LightningModule:
    from transformers import BertConfig, BertForSequenceClassification

    return LabelledInside(BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=CLASSES, **SMALL)))


def gpt2() -> pl.LightningModule:
    from transformers import GPT2Config, GPT2LMHeadModel

    return LabelledInside(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)))


def adapters() -> pl.LightningModule:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
    return LabelledInside(peft.get_peft_model(bert().net, config))


def llama() -> pl.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LabelledInside(LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **SMALL)))


def vision_transformer() -> pl.LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=8, num_labels=CLASSES, **SMALL)
    return LabelledInside(ViTForImageClassification(config))


def of_timm(name: str, **settings: Any) -> Callable[[], pl.LightningModule]:
    def make() -> pl.LightningModule:
        import timm

        return Exercise(timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings))

    return make


def timms_optimizer() -> pl.LightningModule:
    from timm.optim import create_optimizer_v2

    return Exercise(optimizer=lambda module: create_optimizer_v2(module, opt="lamb", lr=0.01, weight_decay=0.05))


def soft_targets() -> pl.LightningModule:
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mix, criterion = Mixup(mixup_alpha=0.8, num_classes=CLASSES), SoftTargetCrossEntropy()

    def loss(self: Exercise, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        mixed, soft = mix(x.clone(), y)  # in place
        return criterion(self.net(mixed.flatten(1)), soft)

    return Exercise(nn.Sequential(nn.Linear(3 * 16 * 16, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)), loss)


def shufflenet() -> pl.LightningModule:
    from torchvision.models import shufflenet_v2_x0_5

    return Exercise(shufflenet_v2_x0_5(weights=None, num_classes=CLASSES))


def faster_rcnn() -> pl.LightningModule:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    backbone.out_channels = 8
    net = FasterRCNN(
        backbone, min_size=32, max_size=40, box_head=TwoMLPHead(8 * 3 * 3, 16), box_predictor=FastRCNNPredictor(16, 3),
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20,
    )  # fmt: skip
    return Exercise(net, sum_of_losses, of_torch("SGD", lr=0.02, momentum=0.9))
