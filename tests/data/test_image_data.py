"""What only shows in a fit: accumulation to the global batch, one draw for all passes of a step, the plain probe."""

import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
import vision_data
from cases import Notes
from torch.nn import functional as F

from lightning_ire import IRE, SAM, ConfigurationError, SharpnessMonitor
from lightning_ire.data import CIFAR10


class Linear(pl.LightningModule):
    """Keeps a copy of what each `training_step` gets."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.automatic_optimization = not manual
        self.seen = Notes()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.training, images.clone(), labels.clone()))
        return F.cross_entropy(self.layer(images.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def root(tmp_path):
    return vision_data.write_cifar10(tmp_path / "data")


def fit(root, module=None, callbacks=(), epochs=1, accumulate=1, ckpt_path=None, **settings) -> tuple:
    module = module or Linear()
    settings = {"global_batch_size": 12, "num_workers": 0, "verify": False, "augmentation": "none", **settings}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=CIFAR10(root, **settings), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize(
    ("settings", "accumulate", "batch"),
    [
        ({}, 1, 12),
        ({"max_batch_per_device": 12}, 1, 12),
        ({"max_batch_per_device": 5}, 3, 4),
        ({"max_batch_per_device": 6, "accumulate": 4}, 4, 3),
        ({"accumulate": 2}, 2, 6),
    ],
)
def test_a_step_sees_the_global_batch(root, monkeypatch, settings, accumulate, batch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    _, whole = fit(root)
    trainer, module = fit(root, **settings)
    assert trainer.accumulate_grad_batches == accumulate
    assert trainer.global_step == 3  # 40 images, 12 each
    assert [len(images) for _, images, _ in module.seen] == [batch] * (3 * accumulate)
    together = [torch.cat([labels for *_, labels in module.seen]), torch.cat([labels for *_, labels in whole.seen])]
    assert torch.equal(*together)  # the same images in the same order...
    torch.testing.assert_close(module.layer.weight, whole.layer.weight)  # ...so the same steps
    assert whole.layer.weight.abs().max() > 0


def test_says_how_the_batch_is_cut(root, caplog):
    with caplog.at_level("INFO"):
        fit(root, max_batch_per_device=5)
    assert "Global batch of 12: 1 device(s) x 3 micro-batch(es) of 4." in caplog.text


def test_a_second_fit_keeps_the_batch(root):
    data = CIFAR10(root, 12, max_batch_per_device=6, num_workers=0, verify=False)
    trainer, module = fit(root, max_batch_per_device=6)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)
    assert trainer.accumulate_grad_batches == 2
    assert {len(images) for _, images, _ in module.seen} == {6}


def test_manual_optimization_accumulates_by_itself(root):
    with pytest.raises(ConfigurationError, match=r"`max_batch_per_device` to be null for a module in manual .*, got 6"):
        fit(root, Linear(manual=True), max_batch_per_device=6)


def test_manual_optimization_gets_the_global_batch(root):
    _, module = fit(root, Linear(manual=True))
    assert [len(images) for _, images, _ in module.seen] == [12] * 3


def test_a_batch_that_cannot_be_cut(root):
    message = (
        "Expected `global_batch_size` to be a multiple of 5 (devices 1, trainer.accumulate_grad_batches 5), got 12."
    )
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        fit(root, accumulate=5)


def test_each_epoch_has_another_order_and_a_resumed_one_the_same(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    trainer, module = fit(root, epochs=2)
    labels = [labels.tolist() for *_, labels in module.seen]
    assert labels[:3] != labels[3:]
    trainer, first = fit(root, epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    torch.manual_seed(99)
    _, second = fit(root, epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert [labels.tolist() for *_, labels in first.seen + second.seen] == labels
    assert torch.equal(second.layer.weight, module.layer.weight)


class Save(pl.Callback):
    """Writes a checkpoint after so many batches."""

    def __init__(self, path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.path)


RANDOM = {"augmentation": "randaugment", "cutout_size": 8, "mixup_alpha": 1.0}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batches", [7, 8])
def test_resumed_inside_an_epoch_with_all_that_is_drawn(root, tmp_path, monkeypatch, batches, workers):
    """The second epoch's first step has two batches; what is left of a half-filled window comes again."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    settings = {"epochs": 2, "max_batch_per_device": 6, **RANDOM}
    _, whole = fit(root, callbacks=[Save(tmp_path / "saved.ckpt", batches)], **settings)
    torch.manual_seed(99)
    _, resumed = fit(root, ckpt_path=tmp_path / "saved.ckpt", num_workers=workers, **settings)
    assert len(resumed.seen) == 12 - batches // 2 * 2
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_resumed_inside_an_epoch_in_other_batches(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    settings = {"augmentation": "basic"}
    _, whole = fit(root, callbacks=[Save(tmp_path / "saved.ckpt", 1)], **settings)
    trainer, resumed = fit(
        root, ckpt_path=tmp_path / "saved.ckpt", global_batch_size=8, max_batch_per_device=4, **settings
    )
    images = [torch.cat([images for _, images, _ in module.seen]) for module in (whole, resumed)]
    assert torch.equal(images[0][12:], images[1][:24])  # 28 of 40 were left
    assert (len(images[1]), trainer.global_step) == (24, 4)


@pytest.mark.parametrize("settings", [{"val_size": 1}, {"val_size": 0, "per_file": 7}])
def test_other_images_inside_an_epoch(root, tmp_path, settings):
    fit(root, callbacks=[Save(tmp_path / "saved.ckpt", 1)])
    if settings.pop("per_file", 0):
        root = vision_data.write_cifar10(tmp_path / "other", 7)
    with pytest.raises(ConfigurationError, match=r"^Expected the training images .* '40 images, checksum \w+' for the"):
        fit(root, ckpt_path=tmp_path / "saved.ckpt", **settings)


@pytest.mark.parametrize("key", ["data", "labels"])
def test_other_pixels_or_labels_inside_an_epoch(root, tmp_path, key):
    fit(root, callbacks=[Save(tmp_path / "saved.ckpt", 1)])
    path = root / "cifar-10-batches-py" / "data_batch_3"
    entry = pickle.loads(path.read_bytes())
    entry[key] = entry[key][::-1]  # the last image is the first
    path.write_bytes(pickle.dumps(entry))
    with pytest.raises(ConfigurationError, match=r"^Expected the training images .* '.*checksum \w+.*' for the rest"):
        fit(root, ckpt_path=tmp_path / "saved.ckpt")


def test_both_passes_of_sam_share_the_draw(root):
    _, module = fit(root, callbacks=[IRE(kappa=1.0, interval=1, perturbation=SAM(rho=0.05))], mixup_alpha=1.0)
    assert len(module.seen) == 6  # two passes in each of three steps; the estimate shares the first
    for (_, images, targets), (_, again, targets_again) in zip(module.seen[::2], module.seen[1::2], strict=True):
        assert targets.shape == (12, 10)
        assert torch.equal(images, again)
        assert torch.equal(targets, targets_again)
    shares = {float(targets[targets < 1].max()) for _, _, targets in module.seen}
    assert len(shares) == 3  # another draw in each step


def test_the_probe_of_the_monitor_is_plain(root):
    monitor = SharpnessMonitor(every_n_epochs=1, quantities=("trace_fisher",), batch_size=5)
    settings = {"mixup_alpha": 1.0, "cutout_size": 8, "augmentation": "basic"}
    _, module = fit(root, callbacks=[monitor], **settings)
    measured = [(images, labels) for training, images, labels in module.seen if not training]
    assert measured
    for images, labels in measured:
        assert labels.shape == (5,)
        assert torch.equal(images, images[:, :, :1, :1].expand_as(images))  # one colour each: not cropped, cut or mixed


def test_monitor_changes_nothing(root, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    settings = {"mixup_alpha": 1.0, "cutout_size": 8, "augmentation": "basic", "epochs": 2}
    torch.manual_seed(3)
    _, plain = fit(root, **settings)
    torch.manual_seed(3)
    _, watched = fit(root, callbacks=[SharpnessMonitor(quantities=("trace_fisher",))], **settings)
    assert torch.equal(plain.layer.weight, watched.layer.weight)
