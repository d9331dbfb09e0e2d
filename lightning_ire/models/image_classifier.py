"""An image classifier for any network that returns logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_ire._checks import ConfigurationError, check_choice, check_number, check_whole
from lightning_ire.models.resnet import ResNet

__all__ = ["ImageClassifier"]


class ImageClassifier(LightningModule):
    """Trains a network with cross entropy and logs loss and accuracy.

    A batch is a pair of images [N, C, H, W] and class indices [N]. With label smoothing eps the target q has 1 - eps on
    the true class and eps / (K - 1) on each of the K - 1 others (torch's own parameter counts the true class in: there
    eps * K / (K - 1) gives the same target). The loss that is minimised is the cross entropy `-sum_k q_k log p_k`, mean
    over the batch.

    Logged, as fractions and in nats: `train/loss` (every step; the Kullback-Leibler form, that is the cross entropy
    minus the constant entropy of q: 0 when fitted, whatever eps is), `train/accuracy` (over the epoch, in training
    mode), and without smoothing `val/loss`, `val/accuracy`, `test/loss`, `test/accuracy`. With more than 10 classes
    also `val/accuracy_top5` and `test/accuracy_top5`.

    No hyper-parameters are saved in checkpoints, so that a resumed run takes every value from its config and flags.
    Outside the command line: `ImageClassifier.load_from_checkpoint(path, model=ResNet(...), num_classes=10)`.
    """

    def __init__(
        self,
        model: ResNet | nn.Module,  # `ResNet |`: the short name in a config means ours, not torchvision's
        num_classes: int,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        decay_norm_and_bias: bool = True,
    ) -> None:
        """Keep the parts.

        Args:
            model: Network that maps images [N, C, H, W] to logits [N, num_classes].
            num_classes: Number of classes, at least 2.
            label_smoothing: Probability eps taken from the true class and spread evenly over the others, from 0 to
                1 - 1 / num_classes (all classes alike).
            optimizer: Makes the optimizer from the parameters.
            lr_scheduler: Makes the learning-rate schedule from the optimizer; none keeps the rate.
            lr_interval: When the schedule moves on: `epoch` or `step`.
            decay_norm_and_bias: Whether weight decay acts on biases and normalisation weights (all parameters with
                fewer than two dimensions), too.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__()
        self.model = model
        self.num_classes = check_whole("num_classes", num_classes, low=2)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, high=1 - 1 / num_classes)
        self.lr_interval = check_choice("lr_interval", lr_interval, ("epoch", "step"))
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.decay_norm_and_bias = decay_norm_and_bias
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = _metrics(num_classes, prefix="val/")
        self.test_metrics = _metrics(num_classes, prefix="test/")

    @property
    def target_entropy(self) -> float:
        """Entropy of the smoothed target in nats: `-(1-eps) log(1-eps) - eps log(eps / (K-1))`."""
        eps = self.label_smoothing
        if eps == 0:
            return 0.0
        return -(1 - eps) * math.log(1 - eps) - eps * math.log(eps / (self.num_classes - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, C, H, W]."""
        return self.model(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the smoothed cross entropy, as `cross_entropy` gave it: curvature estimates look for that tensor."""
        images, labels = batch
        logits = self(images)
        smoothing = self.label_smoothing * self.num_classes / (self.num_classes - 1)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss.detach() - self.target_entropy, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over the validation part."""
        self._evaluate(batch, self.val_metrics, "val/loss", prog_bar=True)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over the test part."""
        self._evaluate(batch, self.test_metrics, "test/loss", prog_bar=False)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities [N, num_classes] of a batch's images."""
        return self(batch[0]).softmax(dim=-1)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if there is one, its schedule in Lightning's form.

        Raises:
            ConfigurationError: If the optimizer refuses its arguments.
        """
        try:
            optimizer = self.optimizer(self._parameter_groups())
        except ValueError as error:  # what torch raises for a value out of range
            raise ConfigurationError(f"Expected `optimizer` to have values in range, got: {error}.") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if hasattr(scheduler, "monitor"):  # Lightning's ReduceLROnPlateau
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _evaluate(self, batch: Sequence[Tensor], metrics: MetricCollection, loss_name: str, prog_bar: bool) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        self.log(loss_name, F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=prog_bar, on_step=False, on_epoch=True)

    def _parameter_groups(self) -> Any:
        if self.decay_norm_and_bias:
            return self.parameters()
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _metrics(num_classes: int, prefix: str) -> MetricCollection:
    metrics: dict[str, Metric | MetricCollection] = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 10:
        metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
