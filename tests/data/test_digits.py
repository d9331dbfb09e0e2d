import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import two_processes
from resume_ddp_script import fit

from lightning_ire import ConfigurationError
from lightning_ire.data import Digits


def ready(**settings) -> Digits:
    data = Digits(**{"augment": False, **settings})
    data.setup()
    return data


def read(part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in part]), torch.stack([label for _, label in part])


def grey_values(data: Digits) -> dict[str, set[bytes]]:
    """The images of each part as whole grey values, so that they can be compared whatever the normalisation."""
    images = {name: read(part)[0] for name, part in data._parts.items()}
    darkest = min(part.min() for part in images.values())
    brightest = max(part.max() for part in images.values())
    return {
        name: {((image - darkest) / (brightest - darkest) * 16).round().byte().numpy().tobytes() for image in part}
        for name, part in images.items()
    }


def test_sizes_shapes_and_shares():
    data = ready()
    assert {name: len(part) for name, part in data._parts.items()} == {"train": 1258, "val": 180, "test": 359}
    for part in data._parts.values():
        images, labels = read(part)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape[1:] == (1, 8, 8)
        share = torch.bincount(labels, minlength=data.num_classes) / len(labels)
        assert (share - 0.1).abs().max() < 0.006  # the share of each class is the same in every part


def test_every_image_is_in_one_part():
    found = grey_values(ready())
    assert len(set.union(*found.values())) == sum(map(len, found.values())) == 1797


def test_normalised_with_the_training_part_alone():
    data = ready()
    images, _ = read(data._parts["train"])
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    for name in ("val", "test"):  # one grey value is one number in every part
        assert torch.isin(read(data._parts[name])[0], images).all()


def test_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    first = grey_values(ready(seed=3))
    torch.manual_seed(2)
    assert grey_values(ready(seed=3)) == first
    assert grey_values(ready(seed=4))["test"] != first["test"]


def test_counts_and_fractions():
    data = ready(val_size=100, test_size=0.5)
    assert [len(part) for part in data._parts.values()] == [1797 - 100 - 898, 100, 898]


def test_no_held_out_parts():
    data = ready(val_size=0, test_size=0.0)
    assert len(data._parts["train"]) == 1797
    assert (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()) == ([], [], [])


def test_training_batches_are_full_and_shuffled():
    loader = ready(batch_size=100).train_dataloader()
    batches = [labels for _, labels in loader]
    assert [len(labels) for labels in batches] == [100] * 12
    assert not torch.equal(torch.cat(batches), torch.cat([labels for _, labels in loader]))


@pytest.mark.parametrize(
    ("processes", "batch_size", "sizes"), [(1, 2000, [1258]), (2, 1000, [629]), (3, 1000, [419]), (2, 300, [300] * 2)]
)
def test_each_process_has_full_batches_or_its_share(processes, batch_size, sizes):
    seen = []
    for rank in range(processes):
        data = ready(batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=None)
        loader = data.train_dataloader()
        assert [len(labels) for _, labels in loader] == sizes
        seen += list(loader.sampler)
    assert len(set(seen)) == len(seen) == processes * sum(sizes)
    assert len(ready(batch_size=2000).train_dataloader()) == 1


def test_evaluation_reads_every_image_in_order():
    data = ready(batch_size=100, augment=True)
    for loader, size in ((data.val_dataloader(), 180), (data.test_dataloader(), 359), (data.predict_dataloader(), 359)):
        first, second = (torch.cat([images for images, _ in loader]) for _ in range(2))
        assert len(first) == size
        assert torch.equal(first, second)


def test_augmentation_moves_training_images_a_little():
    plain, augmented = ready()._parts["train"], ready(augment=True)._parts["train"]
    background = plain[0][0].min()
    first, second = augmented[0][0], augmented[0][0]
    assert not torch.equal(first, second)
    ink = [(read(part)[0] - background).sum() for part in (plain, augmented)]
    assert ink[1] / ink[0] == pytest.approx(1, abs=0.1)  # at most the border is lost


def test_augmentation_moves_background_in():
    part = ready(augment=True)._parts["train"]
    part.images = torch.zeros_like(part.images)  # nothing but background
    assert read(part)[0].unique().numel() == 1


def test_set_up_once():
    data = ready()
    parts = dict(data._parts)
    data.setup("test")
    assert all(data._parts[name] is part for name, part in parts.items())


@pytest.mark.parametrize("module", ["sklearn.datasets", "torchvision.transforms"])
def test_missing_packages_are_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'lightning-ire[vision]'")):
        Digits().setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be a whole number >= 1, got 0."),
        ({"seed": -1}, "Expected `seed` to be a whole number >= 0, got -1."),
        ({"num_workers": -1}, "Expected `num_workers` to be a whole number >= 0, got -1."),
        (
            {"val_size": -5},
            "Expected `val_size` to be 0, a count >= 10 or a fraction in (0, 1) of 1797 images, got -5.",
        ),
        ({"val_size": 5}, "Expected `val_size` to be 0, a count >= 10 or a fraction in (0, 1) of 1797 images, got 5."),
        ({"test_size": 1.0}, "Expected `test_size` to be 0, a count >= 10 or a fraction in (0, 1)"),
        ({"test_size": 0.001}, "Expected `test_size` to be 0, a count >= 10 or a fraction in (0, 1)"),
        ({"test_size": False}, "Expected `test_size` to be 0, a count >= 10 or a fraction in (0, 1)"),
        (
            {"val_size": 1000, "test_size": 790},
            "Expected `val_size` and `test_size` to leave at least 10 of 1797 images for training, got 1000 and 790.",
        ),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Digits(**settings)


def test_the_probe_is_the_training_part_without_augmentation():
    data, plain = Digits(augment=True), Digits(augment=False)
    data.setup()
    plain.setup()
    probe, train = data.probe_dataloader().dataset, plain.train_dataloader().dataset
    assert len(probe) == len(train) == 1258
    assert torch.equal(probe[7][0], train[7][0])
    assert torch.equal(probe[7][0], probe[7][0])
    assert not torch.equal(probe[7][0], data.train_dataloader().dataset[7][0])


# In training: two epochs of seven steps with 168 images.


def together(batches: list[list[float]], count: int = 1) -> list[list[float]]:
    """Batches of so many batches, the images in order of their sums."""
    return [sorted(itertools.chain(*batches[first : first + count])) for first in range(0, len(batches), count)]


@pytest.mark.parametrize(
    ("settings", "each"),
    [({}, 1), ({"batch_size": 84}, 2), ({"num_workers": 2}, 1)],
    ids=["same", "half", "workers"],
)
def test_resumed_inside_an_epoch(tmp_path, settings, each):
    whole = fit(tmp_path / "saved.ckpt", 168)
    assert len(whole.seen) == 14
    assert together(whole.seen[:7]) != together(whole.seen[7:])
    resumed = fit(None, ckpt_path=tmp_path / "saved.ckpt", **{"batch_size": 168, **settings})
    assert together(resumed.seen, each) == together(whole.seen[10:])
    assert each > 1 or torch.equal(resumed.net.weight, whole.net.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, r"^Expected the training images .* to be '1238 images, checksum \w+' for .*, got '1238 images, "),
        ({"test_size": 100}, "'1238 images, .*, got '1497 images, "),
        (
            {"batch_size": 1000},
            "^Expected `batch_size` .* to leave a batch in the epoch .*, got 1000 .* with 734 samples",
        ),
    ],
)
def test_an_epoch_that_cannot_be_finished(tmp_path, settings, message):
    fit(tmp_path / "saved.ckpt", 168)
    with pytest.raises(ConfigurationError, match=message):
        fit(None, ckpt_path=tmp_path / "saved.ckpt", **{"batch_size": 168, **settings})


@pytest.mark.slow
def test_resumed_on_other_devices(tmp_path):
    whole = fit(tmp_path / "alone.ckpt", 168)
    ranks = two_processes("data/resume_ddp_script.py", tmp_path)

    def joined(name: str) -> list[list[float]]:
        return [[*first, *second] for first, second in zip(ranks[0][name], ranks[1][name], strict=True)]

    assert together(joined("whole")) == together(whole.seen)
    assert together(joined("resumed"), 2) == together(whole.seen[10:])
    assert together(fit(None, 168, ckpt_path=tmp_path / "together.ckpt").seen) == together(whole.seen[10:])
