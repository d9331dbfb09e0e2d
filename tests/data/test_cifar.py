import errno
import functools
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vision_data
from torchvision import datasets

from lightning_ire import ConfigurationError
from lightning_ire.data import CIFAR10, CIFAR100
from lightning_ire.data.cifar import _Arrays


def ready(root: Path, **settings) -> CIFAR10:
    settings = {"global_batch_size": 4, "num_workers": 0, "augmentation": "none", "verify": False, **settings}
    data = CIFAR10(vision_data.write_cifar10(root) if not root.exists() else root, **settings)
    data.setup("fit")
    data.setup("test")
    return data


def numbers(batches) -> list[int]:
    """Which images these are: their red value, as written."""
    red = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    return ((red * CIFAR10.std[0] + CIFAR10.mean[0]) * 255).round().int().tolist()


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def test_reads_the_real_format(root):
    data = ready(root)
    (images, labels), *_ = data.test_dataloader()
    assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 32, 32), torch.float32, torch.int64)
    assert labels.tolist() == [40 % 10, 41 % 10, 42 % 10, 43 % 10]
    colour = torch.tensor([40, 255 - 40, 128]) / 255  # red, green, blue: in this order on disk
    expected = (colour - torch.tensor(CIFAR10.mean)) / torch.tensor(CIFAR10.std)
    torch.testing.assert_close(images[0], expected[:, None, None].expand(3, 32, 32))
    assert numbers(data.test_dataloader()) == list(range(40, 48))
    assert sorted(numbers(data.train_dataloader())) == list(range(40))


def test_cifar100_has_fine_labels(tmp_path):
    data = CIFAR100(vision_data.write_cifar100(tmp_path), global_batch_size=4, num_workers=0, verify=False)
    data.setup("test")
    assert [label for _, labels in data.test_dataloader() for label in labels.tolist()] == list(range(40, 48))
    assert data.num_classes == 100


def test_statistics_are_those_of_the_published_data():
    # mean and standard deviation of all training pixels, to four digits, as published with many recipes
    assert (CIFAR10.mean, CIFAR10.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert (CIFAR100.mean, CIFAR100.std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def test_random_crop_pads_with_black_and_flips(root):
    data = ready(root, augmentation="basic", global_batch_size=40)
    black = (torch.zeros(3) - torch.tensor(CIFAR10.mean)) / torch.tensor(CIFAR10.std)
    ((images, _),) = data.train_dataloader()
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    padded = torch.isclose(corners, black[:, None], atol=1e-5).all(dim=1)
    assert padded.any(dim=0).all()  # each corner lies outside of some crop...
    assert not padded[:, 0].all()  # ...and inside of others
    middle = images[:, :, 4:-4, 4:-4]
    assert torch.equal(middle, middle[:, :, :1, :1].expand_as(middle))  # at most four pixels of padding


@pytest.mark.parametrize("augmentation", ["autoaugment", "randaugment"])
def test_policies_change_colours(root, augmentation):
    ((images, _),) = ready(root, augmentation=augmentation, global_batch_size=40).train_dataloader()
    assert images.shape == (40, 3, 32, 32)
    assert sorted(numbers([(images[:, :, 16:, 16:], None)])) != list(range(40))


def test_autoaugment_is_the_cifar_policy(root):
    chain = ready(root, augmentation="autoaugment")._training_transform().transforms
    (policy,) = (step for step in chain if type(step).__name__ == "AutoAugment")
    assert policy.policy.value == "cifar10"


def test_randaugment_has_the_values_asked_for(root):
    data = ready(root, augmentation="randaugment", randaugment_ops=3, randaugment_magnitude=7)
    (policy,) = (step for step in data._training_transform().transforms if type(step).__name__ == "RandAugment")
    assert (policy.num_ops, policy.magnitude) == (3, 7)


def test_cutout_in_training_only(root):
    data = ready(root, cutout_size=8, global_batch_size=40)
    ((images, _),) = data.train_dataloader()
    assert ((images == 0).all(dim=1).flatten(1).sum(dim=1) >= 16).all()  # a quarter of 8 x 8 is always inside
    for loader in (data.probe_dataloader(), data.test_dataloader(), data.val_dataloader()):
        assert not any((images == 0).all(dim=1).any() for images, _ in loader)


def test_probe_is_the_training_part_without_augmentation(root):
    data = ready(root, augmentation="basic", val_size=10)
    probe = numbers(data.probe_dataloader())
    assert len(probe) == 30
    assert probe == sorted(set(range(40)) - set(numbers(data.val_dataloader())))
    for images, _ in data.probe_dataloader():
        assert torch.equal(images, images[:, :, :1, :1].expand_as(images))  # not cropped


@pytest.mark.parametrize(("val_size", "count"), [(10, 10), (0.25, 10), (1, 1)])
def test_split(root, val_size, count):
    data = ready(root, val_size=val_size, global_batch_size=1)
    val, train = numbers(data.val_dataloader()), numbers(data.train_dataloader())
    assert len(val) == count
    assert sorted(val + train) == list(range(40))
    again = ready(root, val_size=val_size)
    assert numbers(again.val_dataloader()) == val
    other = ready(root, val_size=val_size, split_seed=3)
    assert numbers(other.val_dataloader()) != val


def test_without_a_split_validation_shows_the_test_images(root):
    data = ready(root)
    assert numbers(data.val_dataloader()) == numbers(data.test_dataloader()) == list(range(40, 48))


def test_batches_of_evaluation(root):
    sizes = {
        size: [len(labels) for _, labels in ready(root, eval_batch_size=size).val_dataloader()] for size in (None, 5)
    }
    assert sizes == {None: [4, 4], 5: [5, 3]}


def test_validation_alone_opens_what_it_needs(root):
    data = CIFAR10(vision_data.write_cifar10(root), global_batch_size=4, num_workers=0, verify=False, val_size=4)
    data.setup("validate")
    assert len(numbers(data.val_dataloader())) == 4
    assert "test" not in data._sources
    data = CIFAR10(root, global_batch_size=4, num_workers=0, verify=False)
    data.setup("validate")
    assert "train" not in data._sources


def test_order_follows_seed_everything(root, monkeypatch):
    data = ready(root)
    first = numbers(data.train_dataloader())
    torch.manual_seed(1)
    assert numbers(data.train_dataloader()) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    seeded = numbers(data.train_dataloader())
    torch.manual_seed(2)
    assert numbers(data.train_dataloader()) == seeded
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert numbers(data.train_dataloader()) != seeded


def test_worker_processes(root):
    loader = ready(root, num_workers=1, cutmix_alpha=1.0).train_dataloader()
    images, labels, seed = next(iter(loader))
    assert (images.shape, labels.shape, type(seed)) == ((4, 3, 32, 32), (4,), int)
    assert loader.persistent_workers
    pickle.dumps((loader.dataset, loader.collate_fn))  # outside of Linux this is how processes get them


def test_what_is_drawn_depends_on_seed_epoch_and_image(root, monkeypatch):
    settings = {"augmentation": "randaugment", "cutout_size": 8, "mixup_alpha": 1.0, "global_batch_size": 40}

    def seen(workers: int = 0, seed: int = 5, epoch: int = 0) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = ready(root, num_workers=workers, **settings)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.rand(3)  # other random numbers do not count
        ((images, _),) = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        return images

    assert torch.equal(seen(), seen(workers=2))
    assert not torch.equal(seen(), seen(seed=6))
    assert not torch.equal(seen(), seen(epoch=1))


def on_device(data: CIFAR10, rank: int = 0) -> None:
    data.trainer = SimpleNamespace(world_size=rank + 1, global_rank=rank, strategy=None)


def test_mixing_after_the_transfer(root):
    data = ready(root, mixup_alpha=1.0)
    batch = next(iter(data.train_dataloader()))
    images, targets = data.on_after_batch_transfer(batch, 0)
    assert targets.shape == (4, 10)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert not torch.equal(images, batch[0])
    again = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(images, again[0])  # the draw belongs to the batch
    on_device(data, rank=1)
    assert not torch.equal(images, data.on_after_batch_transfer(batch, 0)[0])


def test_mixing_leaves_the_random_numbers_alone(root):
    data = ready(root, mixup_alpha=1.0, cutmix_alpha=1.0)
    batch = next(iter(data.train_dataloader()))
    before = torch.get_rng_state()
    data.on_after_batch_transfer(batch, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_not_mixed(root):
    data = ready(root, mixup_alpha=1.0)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.probe_dataloader()):
        batch = next(iter(loader))
        assert data.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 0}, "`global_batch_size` to be a whole number >= 1, got 0"),
        ({"max_batch_per_device": 0}, "`max_batch_per_device` to be a whole number >= 1, got 0"),
        ({"eval_batch_size": -1}, "`eval_batch_size` to be a whole number >= 1, got -1"),
        ({"val_size": 1.5}, r"`val_size` to be a count >= 0 or a fraction in \[0, 1\), got 1.5"),
        ({"val_size": -1}, "`val_size` to be a count >= 0 or a fraction"),
        ({"val_size": True}, "`val_size` to be a count >= 0 or a fraction"),
        ({"augmentation": "heavy"}, "`augmentation` to be one of 'none', 'basic', 'autoaugment', 'randaugment'"),
        ({"randaugment_magnitude": 31}, r"`randaugment_magnitude` to be a whole number in \[0, 30\], got 31"),
        ({"randaugment_ops": 0}, "`randaugment_ops` to be a whole number >= 1, got 0"),
        ({"cutout_size": -1}, "`cutout_size` to be a whole number >= 0, got -1"),
        ({"cutout_probability": 2.0}, r"`cutout_probability` to be a number in \[0, 1\], got 2.0"),
        ({"mixup_alpha": -1.0}, "`mixup_alpha` to be a number >= 0, got -1.0"),
        ({"cutmix_alpha": -1.0}, "`cutmix_alpha` to be a number >= 0, got -1.0"),
        ({"num_workers": -1}, "`num_workers` to be a whole number >= 0, got -1"),
        ({"split_seed": -1}, "`split_seed` to be a whole number >= 0, got -1"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        CIFAR10(**settings)


@pytest.mark.parametrize("val_size", [40, 50, 0.999, 0.001])
def test_split_that_leaves_nothing(root, val_size):
    with pytest.raises(ConfigurationError, match="`val_size` to hold out at least one of 40 training images"):
        ready(root, val_size=val_size)


# Faults of the data on disk.


def fault(root: Path, **settings) -> str:
    with pytest.raises(ConfigurationError) as caught:
        ready(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder(root):
    root.mkdir()
    message = fault(root)
    assert message.startswith("Expected `root` to be a folder that holds cifar-10-batches-py/ with data_batch_1, ")
    assert message.endswith(f"got {root}: change `root`, or set `download` to true.")


@pytest.mark.parametrize("part", ["datasets", "transforms.v2"])
def test_without_torchvision(root, monkeypatch, part):
    monkeypatch.setitem(sys.modules, f"torchvision.{part}", None)
    with pytest.raises(
        ConfigurationError, match=r"^Expected torchvision for image data, .* 'lightning-ire\[vision\]'\.$"
    ):
        ready(root).train_dataloader()


def test_missing_file(root):
    vision_data.write_cifar10(root)
    (root / "cifar-10-batches-py" / "data_batch_3").unlink()
    (root / "cifar-10-batches-py" / "batches.meta").unlink()
    assert fault(root).endswith("got a folder without data_batch_3, batches.meta.")


def test_wrong_checksum(root):
    vision_data.write_cifar10(root)
    message = fault(root, verify=True)
    assert "data_batch_1 to have the MD5 checksum c99cafc152244af753f735de768cd75f, got another one" in message


def test_truncated_file(root):
    vision_data.write_cifar10(root)
    path = root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:1000])
    assert "in Python format, got a file in" in fault(root)


def test_a_file_of_something_else(root):
    vision_data.write_cifar10(root)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"not a pickle")
    assert "that cannot be read (UnpicklingError" in fault(root)


# Pickles.


class Harmful:
    """What is executed when a file is unpickled: a file of this name appears."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_batch(root: Path, entry: object, name: str = "data_batch_2", protocol: int = 2) -> Path:
    vision_data.write_cifar10(root)
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(entry if isinstance(entry, bytes) else pickle.dumps(entry, protocol))
    return path


def pixels(count: int = 8, kind: str = "u1") -> np.ndarray:
    return np.arange(count * 3072).reshape(count, 3072).astype(kind)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_all_protocols(root, protocol, order):
    labels = [np.int64(3), 1, *[True] * 6]
    entry = {"data": np.asarray(pixels(), order=order), "labels": labels, "more": (b"\xff", b"", 1.5, None, ["é"])}
    with_batch(root, entry, protocol=protocol)
    train = ready(root)._sources["train"]
    assert np.array_equal(train.images[8:16].transpose(0, 3, 1, 2).reshape(8, 3072), pixels())
    assert train.labels[8:16] == [3, 1, 1, 1, 1, 1, 1, 1]
    assert {type(label) for label in train.labels} == {int}


def test_pickles_of_python_2(root):
    """The bytes of the original files: strings of Python 2, classes by their names in numpy 1."""
    data = pixels(2).tobytes()
    text = b"U\x0bbatch_label" + b"U\x15training batch 1 of 5"
    array = (
        b"U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86" + b"cnumpy\ndtype\n" + b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\x00tb\x89" + b"T" + struct.pack("<I", len(data)) + data + b"tb"
    )
    labels = b"U\x06labels](K\x06K\x09e"
    with_batch(root, b"\x80\x02}(" + text + array + labels + b"u.")
    train = ready(root)._sources["train"]
    assert np.array_equal(train.images[8:10].transpose(0, 3, 1, 2).reshape(2, 3072), pixels(2))
    assert train.labels[8:10] == [6, 9]


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("place", ["all", "data", "labels", "aside"])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.mkdir, ["{root}/harm"]),
        (eval, ["__import__('os').mkdir('{root}/harm')"]),
        (getattr, [list, "append"]),
        (set, [[1]]),
    ],
)
def test_a_harmful_pickle(root, function, arguments, place, protocol):
    harm = Harmful(function, *(a.format(root=root) if isinstance(a, str) else a for a in arguments))
    entry = {"data": pixels(), "labels": [0] * 8}
    path = with_batch(root, harm if place == "all" else {**entry, place: harm}, protocol=protocol)
    message = fault(root)
    assert not (root / "harm").exists()
    assert re.search(
        r"got a file in .* that cannot be read \(UnpicklingError: it is to hold arrays, .* asks for ", message
    )
    assert message.endswith(f"{function.__name__}): {path.name}.")


@pytest.mark.parametrize(
    "call",
    [
        b"cnumpy\nndarray\n(K\x01\x85U\x01OU\x08AAAAAAAAtR",  # an object at any address
        b"cnumpy\ndtype\n(U\x01OtR",
        b"cnumpy\ndtype\n(U\x04O,i4tR",
        b"cnumpy\ndtype\n(U\x02S4tR",
        b"cnumpy.core.numeric\n_frombuffer\n(U\x08AAAAAAAAU\x01OK\x01\x85U\x01CtR",
        b"c_codecs\nencode\n(U\x01aU\x04zlibU\x01xtR",
        b"\x82\x01",  # a registered extension
        b"U\x01aQ",  # a persistent object
    ],
)
def test_a_crafted_pickle(root, call):
    with_batch(root, b"\x80\x02}(U\x04data" + call + b"u.")
    assert re.search(r"that cannot be read \(\w+: .*\): data_batch_2\.$", fault(root))


@pytest.mark.parametrize(
    "state",
    [
        b"NNNJ\xff\xff\xff\xff",
        b"(cnumpy\ndtype\nU\x02u1\x85R(M\xff\xfftt" + b"NNJ\xff\xff\xff\xff",  # each number is an array of 65,535
        b"N(U\x01at}U\x01a(cnumpy\ndtype\nU\x02u1\x85RM\xff\x00ts" + b"J\xff\xff\xff\xff",  # 255 bytes further on
    ],
)
def test_a_type_with_a_crafted_state_reads_no_other_memory(state):
    array = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
        + (b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|" + state + b"J\xff\xff\xff\xffK\x00tb")
        + b"\x89U\x02abtb."
    )
    made = _Arrays(io.BytesIO(array), encoding="latin1").load()
    assert (made.dtype.subdtype, made.dtype.names, made.tolist()) == (None, None, [97, 98])


def test_the_order_of_bytes_is_kept():
    for kind in (">i2", "<i2", "<f8", ">f4", "?"):
        values = np.array([[1, 0], [3, 258]]).astype(kind)
        for protocol in (2, 5):
            made = _Arrays(io.BytesIO(pickle.dumps([values, values[1, 1]], protocol)), encoding="latin1").load()
            assert np.array_equal(made[0], values)
            assert made[1] == values[1, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"labels": [0] * 8}, "(KeyError: 'data')"),
        ({"data": pixels()}, "(KeyError: 'fine_labels')"),
        ([1], "(TypeError: "),
        ({"data": pixels(kind="f4"), "labels": [0] * 8}, "(ValueError: `data` is no array of uint8 but float32)"),
        ({"data": b"", "labels": [0] * 8}, "(ValueError: `data` is no array of uint8 but bytes)"),
        ({"data": pixels()[:, :100], "labels": [0] * 8}, "`data` has the shape [8, 100] in place of [N, 3072]"),
        ({"data": pixels().reshape(16, 1536), "labels": [0] * 8}, "`data` has the shape [16, 1536] in place of [N, "),
        ({"data": pixels().reshape(8, 32, 32, 3), "labels": [0] * 8}, "has the shape [8, 32, 32, 3] in place of [N, "),
        ({"data": pixels().ravel(), "labels": [0] * 8}, "(ValueError: `data` has the shape [24576] in place of [N, "),
        ({"data": pixels(), "labels": [0] * 7}, "(ValueError: not each of 8 images has a label in [0, 10))"),
        ({"data": pixels(), "labels": [0] * 7 + [10]}, "(ValueError: not each of 8 images has a label in [0, 10))"),
        ({"data": pixels(), "labels": [0.5] * 8}, "(TypeError: 'float' object cannot be interpreted as an integer)"),
    ],
)
def test_other_contents(root, entry, message):
    with_batch(root, entry)
    assert message in fault(root)


# The download, from a server in this process.


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def archive(tmp_path, monkeypatch, server) -> Path:
    """An archive in the real layout, with the address and the checksums of torchvision's class changed to its own."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = vision_data.write_cifar10(tmp_path / "source")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source / "cifar-10-batches-py", "cifar-10-batches-py")

    def checksum(file: Path) -> str:
        return hashlib.md5(file.read_bytes()).hexdigest()

    folder = source / "cifar-10-batches-py"
    for name in ("train_list", "test_list"):
        files = [[file, checksum(folder / file)] for file, _ in getattr(datasets.CIFAR10, name)]
        monkeypatch.setattr(datasets.CIFAR10, name, files)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": checksum(folder / "batches.meta")})
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum(path))
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/{path.name}")
    return path


def downloaded(root: Path) -> CIFAR10:
    data = CIFAR10(root, global_batch_size=4, num_workers=0, download=True)
    data.prepare_data()
    return data


def test_download(root, archive):
    data = downloaded(root)
    data.setup("fit")
    assert sorted(numbers(data.probe_dataloader())) == list(range(40))
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]  # the archive is not kept
    archive.unlink()
    downloaded(root)  # what is there is not downloaded again


def test_no_download_unless_asked(root, archive):
    CIFAR10(root).prepare_data()
    assert not root.exists()


def test_interrupted_download_leaves_nothing(root, archive, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("torchvision.datasets.cifar.download_and_extract_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            downloaded(root)
    assert list(root.iterdir()) == []
    downloaded(root).setup("fit")


def test_killed_download_is_not_seen_as_data(root, archive):
    place = root / ".download-abc" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    (place / "data_batch_1").write_bytes(b"half")
    downloaded(root).setup("fit")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Expected space on the disk for `root`, got none left in"),
        (OSError("connection reset"), "Expected to download http:.*, got OSError: connection reset. Nothing of it was"),
    ],
)
def test_failed_download(root, archive, monkeypatch, error, message):
    def fail(_url, place, **_):
        (Path(place) / "cifar-10-batches-py").mkdir()
        (Path(place) / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
        raise error

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(ConfigurationError, match=message):
        downloaded(root)
    assert list(root.iterdir()) == []


def test_download_with_a_wrong_checksum(root, archive):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match="got RuntimeError: File not found or corrupted"):
        downloaded(root)
    assert list(root.iterdir()) == []


def test_download_without_a_server(root, archive, monkeypatch):
    archive.unlink()
    with pytest.raises(ConfigurationError, match=r"Expected to download http:.*, got HTTPError: HTTP Error 404"):
        downloaded(root)
    assert list(root.iterdir()) == []


def test_a_damaged_folder_is_not_overwritten(root, archive):
    vision_data.write_cifar10(root)
    path = root / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match=r"the MD5 checksum .* Move .*cifar-10-batches-py away to download"):
        downloaded(root)
    assert path.read_bytes() == b"mine"


def test_another_process_was_faster(root, archive, monkeypatch):
    replace = os.replace

    def late(source, target):
        vision_data.write_cifar10(root)
        replace(source, target)

    monkeypatch.setattr("lightning_ire.data.cifar.os.replace", late)
    downloaded(root).setup("fit")
