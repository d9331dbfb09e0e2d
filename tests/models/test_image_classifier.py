import math
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ReduceLROnPlateau
from small import CLASSES, classifier, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from lightning_ire import ConfigurationError
from lightning_ire.models import ImageClassifier


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.75])
def test_training_step_minimises_the_authors_smoothed_target(smoothing, monkeypatch):
    model = classifier(label_smoothing=smoothing)
    logged = {}
    monkeypatch.setattr(model, "log", lambda name, value, **kwargs: logged.update({name: value}))
    images, labels = next(iter(loader()))
    loss = model.training_step((images, labels), 0)
    target = torch.full((len(labels), CLASSES), smoothing / (CLASSES - 1))
    target[range(len(labels)), labels] = 1 - smoothing
    log_probabilities = model(images).log_softmax(dim=1)
    torch.testing.assert_close(loss, -(target * log_probabilities).sum(dim=1).mean())
    torch.testing.assert_close(
        logged["train/loss"], F.kl_div(log_probabilities, target, reduction="batchmean").detach()
    )
    assert not logged["train/loss"].requires_grad


def test_training_step_returns_the_tensor_of_its_only_cross_entropy(monkeypatch):
    original, returned = F.cross_entropy, []

    def recording(*args, **kwargs):
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(F, "cross_entropy", recording)
    model = classifier(label_smoothing=0.1)
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    loss = model.training_step(next(iter(loader())), 0)
    assert len(returned) == 1
    assert loss is returned[0]


def test_fitted_loss_is_zero():
    eps = 0.1
    model = classifier(label_smoothing=eps)
    logits = torch.tensor([[math.log(1 - eps)] + [math.log(eps / (CLASSES - 1))] * (CLASSES - 1)])
    smoothed = F.cross_entropy(logits, torch.tensor([0]), label_smoothing=eps * CLASSES / (CLASSES - 1))
    assert smoothed.item() - model.target_entropy == pytest.approx(0, abs=1e-6)
    assert classifier().target_entropy == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.75])
def test_soft_targets_are_mixtures_of_the_smoothed_targets(smoothing, monkeypatch):
    original, returned, logged = F.cross_entropy, [], {}

    def recording(*args, **kwargs):
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(F, "cross_entropy", recording)
    model = classifier(label_smoothing=smoothing)
    monkeypatch.setattr(model, "log", lambda name, value, **kwargs: logged.update({name: value}))
    images, labels = next(iter(loader()))
    weights = torch.rand(len(labels), 1)
    others = labels.roll(1)
    mixed = weights * F.one_hot(labels, CLASSES) + (1 - weights) * F.one_hot(others, CLASSES)
    loss = model.training_step((images, mixed), 0)
    assert len(returned) == 1
    assert loss is returned[0]

    def smoothed(classes):
        target = torch.full((len(classes), CLASSES), smoothing / (CLASSES - 1))
        target[range(len(classes)), classes] = 1 - smoothing
        return target

    target = weights * smoothed(labels) + (1 - weights) * smoothed(others)
    log_probabilities = model(images).log_softmax(dim=1)
    torch.testing.assert_close(loss, -(target * log_probabilities).sum(dim=1).mean())
    torch.testing.assert_close(
        logged["train/loss"], F.kl_div(log_probabilities, target, reduction="batchmean").detach()
    )
    torch.testing.assert_close(model._entropy(F.one_hot(labels, CLASSES).float()), torch.tensor(model.target_entropy))


def test_training_accuracy_is_for_the_largest_weight(monkeypatch):
    model = classifier()
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    images, _ = next(iter(loader()))
    predicted = model(images).argmax(dim=1)
    wrong = (predicted + 1) % CLASSES
    weights = torch.tensor([0.6] * 6 + [0.4] * 2)[:, None]
    model.training_step(
        (images, weights * F.one_hot(predicted, CLASSES) + (1 - weights) * F.one_hot(wrong, CLASSES)), 0
    )
    assert model.train_accuracy.compute().item() == pytest.approx(6 / 8)


def test_evaluation_is_over_all_images_and_without_smoothing(tmp_path):
    model, data = classifier(label_smoothing=0.1), loader()  # 22 images in batches of 8: the last one is smaller
    images, labels = data.dataset.tensors
    with torch.no_grad():
        logits = model(images)
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    assert len(set(labels.bincount().tolist())) > 1  # or the mean over the classes would be the same
    (validated,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert validated == {"val/loss": pytest.approx(loss), "val/accuracy": pytest.approx(accuracy)}
    (tested,) = trainer(tmp_path).test(model, data, verbose=False)
    assert tested == {"test/loss": pytest.approx(loss), "test/accuracy": pytest.approx(accuracy)}


def test_top5_with_more_than_five_classes(tmp_path):
    model, data = classifier(num_classes=6), loader(num_classes=6)
    images, labels = data.dataset.tensors
    top5 = model(images).topk(5).indices.eq(labels[:, None]).any(dim=1).float().mean().item()
    (tested,) = trainer(tmp_path).test(model, data, verbose=False)
    assert tested["test/accuracy_top5"] == pytest.approx(top5)
    assert tested["test/accuracy"] < tested["test/accuracy_top5"] < 1
    (tested,) = trainer(tmp_path).test(classifier(num_classes=5), loader(num_classes=5), verbose=False)
    assert "test/accuracy_top5" not in tested


def test_fit_logs_and_shows(tmp_path):
    model, run = classifier(label_smoothing=0.1), trainer(tmp_path)
    run.fit(model, loader(), loader())
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(run.logged_metrics)
    assert set(run.progress_bar_metrics) == {"train/loss", "val/accuracy"}


def test_training_accuracy_is_of_its_epoch(tmp_path):
    model, run = classifier(optimizer=partial(torch.optim.SGD, lr=0.0)), trainer(tmp_path, max_epochs=2)
    data = loader()
    run.fit(model, data)
    images, labels = data.dataset.tensors
    accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
    assert run.logged_metrics["train/accuracy"].item() == pytest.approx(accuracy)


def test_predicts_probabilities(tmp_path):
    model, data = classifier(), loader()
    predicted = torch.cat(trainer(tmp_path).predict(model, data))
    torch.testing.assert_close(predicted, model(data.dataset.tensors[0]).softmax(dim=1))


def test_checkpoints_hold_no_hyper_parameters(tmp_path):
    model, run = classifier(), trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert "hyper_parameters" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", model=network, num_classes=CLASSES)
    assert torch.equal(loaded.model[1].weight, model.model[1].weight)


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 1.0), ("step", 0.25)])
def test_schedule_moves_on_per_epoch_or_step(interval, expected, tmp_path):
    settings = {
        "optimizer": partial(torch.optim.SGD, lr=2.0),
        "lr_scheduler": partial(StepLR, step_size=1, gamma=0.5),
        "lr_interval": interval,
    }
    run = trainer(tmp_path)
    run.fit(classifier(**settings), loader())  # three steps in one epoch
    assert run.optimizers[0].param_groups[0]["lr"] == expected


def test_plateau_schedule_watches_its_metric(tmp_path):
    schedule = partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(classifier(optimizer=partial(torch.optim.SGD, lr=0.0), lr_scheduler=schedule), loader(), loader())
    assert run.lr_scheduler_configs[0].monitor == "val/loss"
    assert run.lr_scheduler_configs[0].scheduler.num_bad_epochs == 0
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


class Numbers(LightningDataModule):
    """Says how many classes it has, once it is set up."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = None
        self.counted = num_classes

    def setup(self, stage):
        self.num_classes = self.counted

    def train_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader()


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_number_of_classes_is_the_datas(stage, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^Expected `num_classes` to be 5, as Numbers has, got 4\.$"):
        getattr(trainer(tmp_path), stage)(classifier(), datamodule=Numbers(5))
    for fitting in (None, CLASSES):
        getattr(trainer(tmp_path), stage)(classifier(), datamodule=Numbers(fitting))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_number_of_logits_is_that_of_the_classes(stage, tmp_path):
    message = (
        r"^Expected the network \(`model.num_classes`\) to return `num_classes` = 4 logits per image, got a tensor of "
        r"shape \(8, 7\) for 8 images\.$"
    )
    model = classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 7)))
    with pytest.raises(ConfigurationError, match=message):
        getattr(trainer(tmp_path), stage)(model, loader())


def test_weight_decay_groups():
    model = classifier(optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), decay_norm_and_bias=False)
    decayed, free = model.configure_optimizers().param_groups
    assert decayed["weight_decay"] == 0.5
    assert free["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decayed["params"]] == [(CLASSES, 4)]
    assert [tuple(p.shape) for p in free["params"]] == [(CLASSES,)]
    (everything,) = (
        classifier(optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)).configure_optimizers().param_groups
    )
    assert len(everything["params"]) == 2


def test_optimizer_that_refuses_its_values():
    model = classifier(optimizer=partial(torch.optim.SGD, lr=-1.0))
    with pytest.raises(
        ConfigurationError, match=re.escape("Expected `optimizer` to have values in range, got: Invalid")
    ):
        model.configure_optimizers()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "Expected `num_classes` to be a whole number >= 2, got 1."),
        ({"label_smoothing": -0.1}, "Expected `label_smoothing` to be a number in [0, 0.75], got -0.1."),
        ({"label_smoothing": 0.8}, "Expected `label_smoothing` to be a number in [0, 0.75], got 0.8."),
        ({"lr_interval": "day"}, "Expected `lr_interval` to be one of 'epoch', 'step', got 'day'."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ImageClassifier(nn.Identity(), **{"num_classes": CLASSES, **settings})
