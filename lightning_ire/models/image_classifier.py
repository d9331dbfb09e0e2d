"""An image classifier for any network that returns logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_ire._checks import ConfigurationError, check_number, check_whole
from lightning_ire.models._task import Task
from lightning_ire.models.resnet import ResNet
from lightning_ire.models.wide_resnet import WideResNet

__all__ = ["ImageClassifier"]


class ImageClassifier(Task):
    """Trains a network with cross entropy and logs loss and accuracy.

    A batch is a pair of images [N, C, H, W] and class indices [N]. With label smoothing eps the target q has 1 - eps on
    the true class and eps / (K - 1) on each of the K - 1 others (torch's own parameter counts the true class in: there
    eps * K / (K - 1) gives the same target). The loss that is minimised is the cross entropy `-sum_k q_k log p_k`, mean
    over the batch.

    Training labels may also be class probabilities [N, K], as MixUp and CutMix make them in a data module's
    `on_after_batch_transfer`. The target q is then the mixture of the classes' smoothed targets with these weights.

    Logged, as fractions and in nats: `train/loss` (every step; the Kullback-Leibler form, that is the cross entropy
    minus the entropy of q, which is a constant for class indices: 0 when fitted, whatever eps and the mixture are),
    `train/accuracy` (over the epoch, in training mode, on the images as they were mixed and for the class with the
    largest weight), and without smoothing `val/loss`, `val/accuracy`, `test/loss`, `test/accuracy`. With more than 5
    classes also `val/accuracy_top5` and `test/accuracy_top5`. Once per training epoch `train/images_per_second`: images
    over wall-clock time from the epoch's start to the end of its last batch, summed over devices; an image counts once
    however many passes an optimizer step makes, and the time of validation inside the epoch is left out.

    No hyper-parameters are saved in checkpoints, so that a resumed run takes every value from its config and flags.
    Outside the command line: `ImageClassifier.load_from_checkpoint(path, model=ResNet(...), num_classes=10)`.
    """

    def __init__(
        self,
        model: ResNet | WideResNet | nn.Module,  # `ResNet |`: the short name in a config means ours, not torchvision's
        num_classes: int,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        decay_norm_and_bias: bool = True,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        """Keep the parts.

        Args:
            model: Network that maps images [N, C, H, W] to logits [N, num_classes].
            num_classes: Number of classes, at least 2; the data module's, if it has an attribute of that name.
            label_smoothing: Probability eps taken from the true class and spread evenly over the others, from 0 to
                1 - 1 / num_classes (all classes alike).
            optimizer: Makes the optimizer from the parameters.
            lr_scheduler: Makes the learning-rate schedule from the optimizer; none keeps the rate. A
                `WarmupCosineLR` without `total` gets the length of the run.
            lr_interval: When the schedule moves on: `epoch` or `step`.
            decay_norm_and_bias: Whether weight decay acts on biases and normalisation weights (all parameters with
                fewer than two dimensions), too.
            channels_last: Whether the network's weights and the images lie in memory channel by channel at each
                position (`torch.channels_last`): the same results up to rounding, faster on GPUs with tensor cores.
                Checkpoints fit both.
            compile: Whether the network is compiled (`torch.compile`), at its first batch: the same results up to
                rounding. Checkpoints fit both.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(model, optimizer, lr_scheduler, lr_interval, decay_norm_and_bias, compile)
        self.num_classes = check_whole("num_classes", num_classes, low=2)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, high=1 - 1 / num_classes)
        self.channels_last = channels_last
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_metrics = _metrics(num_classes, prefix="val/")
        self.test_metrics = _metrics(num_classes, prefix="test/")

    @property
    def target_entropy(self) -> float:
        """Entropy of a class's smoothed target in nats: `-(1-eps) log(1-eps) - eps log(eps / (K-1))`."""
        eps = self.label_smoothing
        if eps == 0:
            return 0.0
        return -(1 - eps) * math.log(1 - eps) - eps * math.log(eps / (self.num_classes - 1))

    def setup(self, stage: str) -> None:
        """Compare the number of classes with the data module's.

        Args:
            stage: Lightning's stage; not used.

        Raises:
            ConfigurationError: If they differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        expected = getattr(data, "num_classes", None)
        if isinstance(expected, int) and expected != self.num_classes:
            raise ConfigurationError(
                f"Expected `num_classes` to be {expected}, as {type(data).__name__} has, got {self.num_classes}."
            )

    def configure_model(self) -> None:
        """Bring the weights into their memory format, spread and compile the network; again changes nothing.

        Raises:
            ConfigurationError: If the network cannot be spread so.
        """
        if self.channels_last and self.device_mesh is not None:
            raise ConfigurationError(
                "Expected `channels_last` to be false with ModelParallelStrategy, whose `fully_shard` takes no weights "
                "in this memory format, got true."
            )
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        super().configure_model()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, C, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the smoothed cross entropy, as `cross_entropy` gave it: curvature estimates look for that tensor."""
        images, labels = batch
        logits = self._logits(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self._torch_smoothing)
        self.train_accuracy(logits, labels.argmax(dim=1) if labels.is_floating_point() else labels)
        self.log("train/loss", loss.detach() - self._entropy(labels), prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over the validation part."""
        self._evaluate(batch, "val/loss", self.val_loss, self.val_metrics, prog_bar=True)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over the test part."""
        self._evaluate(batch, "test/loss", self.test_loss, self.test_metrics, prog_bar=False)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities [N, num_classes] of a batch's images."""
        return self._logits(batch[0]).softmax(dim=-1)

    def on_train_start(self) -> None:
        """Start the clock: a run that is resumed inside an epoch has no start of one."""
        self.throughput.start(self.device)

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.throughput.start(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count the images, once for all passes of a step; after the epoch's last batch stop the clock."""
        self.throughput.samples += len(batch[0])
        if self.trainer.is_last_batch:
            self.throughput.stop(self.device)

    def on_train_epoch_end(self) -> None:
        """Log the rate of this epoch."""
        self.throughput.stop(self.device)
        rate = self.throughput.rate()
        if rate is not None:
            self.log("train/images_per_second", rate, reduce_fx="sum", sync_dist=True)

    def _evaluate(
        self, batch: Sequence[Tensor], loss_name: str, mean: MeanMetric, metrics: MetricCollection, prog_bar: bool
    ) -> None:
        images, labels = batch
        logits = self._logits(images)
        metrics.update(logits, labels)
        # Not a logged number: Lightning averages those wrongly where devices have unequally many images.
        mean.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.log(loss_name, mean, on_step=False, on_epoch=True)
        self.log_dict(metrics, prog_bar=prog_bar, on_step=False, on_epoch=True)

    def _logits(self, images: Tensor) -> Tensor:
        logits = self(images)
        if logits.shape != (len(images), self.num_classes):
            raise ConfigurationError(
                f"Expected the network (`model.num_classes`) to return `num_classes` = {self.num_classes} logits per "
                f"image, got a tensor of shape {tuple(logits.shape)} for {len(images)} images."
            )
        return logits

    @property
    def _torch_smoothing(self) -> float:
        return self.label_smoothing * self.num_classes / (self.num_classes - 1)

    def _entropy(self, labels: Tensor) -> Tensor | float:
        """Mean entropy of the batch's smoothed targets."""
        if not labels.is_floating_point():
            return self.target_entropy
        smoothing = self._torch_smoothing
        target = labels * (1 - smoothing) + smoothing / self.num_classes
        return -torch.special.xlogy(target, target).sum(dim=1).mean()


def _metrics(num_classes: int, prefix: str) -> MetricCollection:
    metrics: dict[str, Metric | MetricCollection] = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
