import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_data
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_ire import ConfigurationError
from lightning_ire.data import ImageNet
from lightning_ire.data.imagenet import read_image


def ready(root: Path, stage: str = "fit", **settings) -> ImageNet:
    settings = {"global_batch_size": 4, "num_workers": 0, "image_size": 32, **settings}
    data = ImageNet(root, **settings)
    data.setup(stage)
    return data


@pytest.fixture
def root(tmp_path) -> Path:
    return vision_data.write_imagenet(tmp_path / "imagenet")


def test_reads_the_layout(root):
    data = ready(root)
    assert data.num_classes == 3
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(4, 3, 32, 32)] * 6
    labels = torch.cat([labels for _, labels in batches])
    assert labels.bincount().tolist() == [8, 8, 8]
    test = torch.cat([labels for _, labels in data.test_dataloader()])
    assert test.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # all images, in their order


def test_number_of_classes_is_not_known_before():
    assert ImageNet().num_classes is None


def test_evaluation_is_the_centre_of_the_scaled_image(tmp_path):
    root = vision_data.write_imagenet(tmp_path / "imagenet", classes=1, train=4, val=1)
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (16, 0, 48, 32))  # the square in the middle is white
    wide.save(root / "val" / "n00000000" / "val_0.JPEG", quality=100)
    data = ready(root, image_size=28)  # 32 / 0.875 ... the shorter side becomes 32, the centre 28 of it is taken
    ((images, _),) = data.test_dataloader()
    assert images.shape == (1, 3, 28, 28)
    white = (1 - torch.tensor(ImageNet.mean)) / torch.tensor(ImageNet.std)
    torch.testing.assert_close(images[0, :, 14, 14], white, atol=0.05, rtol=0)
    (scale, *_) = data.geometry(training=False)
    assert scale.size == [32]


def test_training_takes_random_parts(root):
    data = ready(root, global_batch_size=24)
    train = data.train_dataloader().dataset
    assert not torch.equal(train[0][0], train[0][0])
    crop, _ = data.geometry(training=True)
    assert (crop.size, crop.scale) == ((32, 32), (0.08, 1.0))


def test_autoaugment_is_the_imagenet_policy(root):
    chain = ready(root, augmentation="autoaugment")._training_transform().transforms
    (policy,) = (step for step in chain if type(step).__name__ == "AutoAugment")
    assert policy.policy.value == "imagenet"


def test_mixing_knows_the_number_of_classes(root):
    data = ready(root, mixup_alpha=0.5)
    _, targets = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert targets.shape == (4, 3)


def test_split_holds_out_of_train(root):
    data = ready(root, val_size=0.25)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 6
    assert len(data.train_dataloader()) == 4  # 18 images


def test_grey_and_other_modes_become_colours(root):
    for mode in ("L", "CMYK"):
        Image.new(mode, (40, 40)).save(root / "val" / "n00000000" / f"{mode}.JPEG")
    images = torch.cat([images for images, _ in ready(root).test_dataloader()])
    assert images.shape == (11, 3, 32, 32)


# Pixels: Pillow cuts what is not of 8 bits off at 255.


def png(path: Path, colour: int, bits: int, pixels: np.ndarray) -> Path:
    """A PNG file of any kind; pixels [H, W, channels]. Pillow writes no colours of 16 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(f">u{bits // 8}"))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def error_of(path: Path, expected: np.ndarray) -> float:
    """Largest difference of the pixels [H, W] or [H, W, 3] to numbers in [0, 1], in units of the last bit."""
    image = read_image(str(path))
    assert image.mode == "RGB"
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    return float(np.abs(np.asarray(image, dtype=float) - 255 * expected).max())


@pytest.mark.parametrize("colour", [0, 2, 4, 6])  # grey, RGB, and these with alpha
def test_png_of_16_bits(tmp_path, colour):
    planes = [RAMP, RAMP.T, 1 - RAMP] if colour in (2, 6) else [RAMP]
    alpha = [np.ones_like(RAMP)] if colour in (4, 6) else []
    pixels = np.rint(65535 * np.stack(planes + alpha, axis=-1))
    error = error_of(png(tmp_path / "a.png", colour, 16, pixels), np.stack(planes * (3 // len(planes)), axis=-1))
    assert error <= (0.51 if colour == 0 else 1)  # Pillow itself takes the upper half of colours


@pytest.mark.parametrize(
    ("name", "kind"), [("a.tif", "<u2"), ("a.tif", ">u2"), ("a.pgm", "<u2"), ("a.png", "<u2"), ("a.tif", "f4")]
)
def test_grey_of_16_bits_and_floats(tmp_path, name, kind):
    values = RAMP if kind == "f4" else np.rint(65535 * RAMP)
    Image.fromarray(values.astype(kind)).save(tmp_path / name)
    assert error_of(tmp_path / name, RAMP) <= 0.51


def test_white_that_is_zero(tmp_path):
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert (image.mode, image.tag_v2[262]) == ("I;16", 0)
    assert error_of(tmp_path / "a.tif", 1 - RAMP) <= 0.51


def test_half_transparent_palettes_and_other_modes(tmp_path, recwarn):
    half = np.where(RAMP < 0.5, 0, 255).astype(np.uint8)
    grey = Image.fromarray(half)
    grey.convert("P").save(tmp_path / "p.png", transparency=bytes([0, *[128] * 255]))
    grey.convert("1").save(tmp_path / "1.png")
    grey.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.merge("LA", [grey, grey.point(lambda value: 255 - value // 2)]).save(tmp_path / "la.png")
    grey.save(tmp_path / "l.png", transparency=255)
    for name in ("p.png", "1.png", "cmyk.tif", "la.png", "l.png"):
        assert error_of(tmp_path / name, half / 255) == 0, name
    assert not recwarn.list


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            RAMP * 255,
            "Expected floats in [0, 1], got values from 0 to 255 in {path}: save it with 8 bits per channel, or",
        ),
        (RAMP - 0.5, "Expected floats in [0, 1], got values from -0.5 to 0.5 in {path}: "),
        (RAMP * np.nan, "Expected floats in [0, 1], got values from nan to nan in {path}: "),
        (
            (RAMP * 65535).astype(np.int32),
            "Expected a grey image of 8 or 16 bits, got one of 32 bits in {path}: save it",
        ),
    ],
)
def test_pixels_of_another_range(root, values, message):
    path = root / "val" / "n00000001" / "val_1.tif"
    Image.fromarray(values if values.dtype == np.int32 else values.astype(np.float32)).save(path)
    with pytest.raises(ConfigurationError, match="^" + re.escape(message.format(path=path))) as caught:
        list(ready(root).test_dataloader())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_that_are_cut_short(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:4000])
    with pytest.raises(ConfigurationError, match=rf"^Expected an image that can be read, got {tmp_path / name} \("):
        read_image(str(tmp_path / name))


# Hidden files.


def test_hidden_files_and_folders_are_left_out(root, caplog):
    expected = {stage: ready(root, stage)._sources for stage in ("fit", "test")}
    image = (root / "val" / "n00000001" / "val_1.JPEG").read_bytes()
    for name in (
        "train/.ipynb_checkpoints/a.png", "val/.ipynb_checkpoints/a.png", "train/__MACOSX/n00000000/a.png",
        "train/n00000001/.cache/b.png", "train/n00000001/@eaDir/b.png", "train/n00000001/._a.png",
        "train/n00000002/.DS_Store", "train/n00000002/Thumbs.db", "train/n00000002/a.gif", "train/n00000002/b.GIF",
        "train/README", "train/list.txt",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    with caplog.at_level("INFO"):
        data = ready(root)
        data.setup("test")
        list(data.train_dataloader())
    assert (data.num_classes, data._sources["train"].classes) == (3, ["n00000000", "n00000001", "n00000002"])
    assert data._sources["train"].samples == expected["fit"]["train"].samples
    assert data._sources["test"].samples == expected["test"]["test"].samples
    assert [line for line in caplog.messages if "Left out" in line] == [
        f"Left out of {root}/train: 2 .gif, 1 .txt, 7 hidden, 1 without a suffix.",
        f"Left out of {root}/val: 1 hidden.",
    ]


def test_images_are_those_of_torchvision_in_its_order(root):
    for name in ("sub/b.PNG", "sub/a.webp", "s.tiff", "sub.d/c.bmp"):
        path = root / "train" / "n00000001" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "linked.jpg").write_bytes(b"")
    (root / "train" / "n00000002" / "link").symlink_to(root / "elsewhere")
    reference = ImageFolder(str(root / "train"))
    images = ready(root)._sources["train"]
    assert (images.samples, images.classes) == (reference.samples, reference.classes)
    assert len(images) == 24 + 5
    pickle.dumps(images)  # outside of Linux this is how processes get them


def test_links_in_circles(root, caplog):
    train = root / "train"
    before = ready(root)._sources["train"].samples
    (train / "n00000000" / "up").symlink_to("..")
    (train / "n00000000" / "itself").symlink_to(".", target_is_directory=True)
    (train / "all").symlink_to(root)  # no class
    (root / "pool" / "inner").mkdir(parents=True)
    shutil.copy(before[0][0], root / "pool" / "a.jpg")
    (root / "pool" / "inner" / "back").symlink_to(root / "pool")
    (root / "pool" / "inner" / "other").symlink_to(train / "n00000001")
    (train / "n00000001" / "more").symlink_to(root / "pool")
    with caplog.at_level("INFO"):
        images = ready(root)._sources["train"]
    assert sorted(images.samples) == sorted([*before, (str(train / "n00000001" / "more" / "a.jpg"), 1)])
    assert "Left out of " in caplog.text
    assert "4 link to a folder above" in caplog.text


def test_hidden_folders_alone(root):
    for folder in list((root / "train").iterdir()):
        folder.rename(folder.with_name("." + folder.name))
    assert re.fullmatch(LAYOUT + f"{root}/train with 3 .* and no class folders: sort .*", fault(root))


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda train: (train / "n00000000/train_0.JPEG").rename(train / "n00000000/zzz.JPEG"),
        lambda train: (train / "n00000000/train_0.JPEG").rename(train / "n00000001/zzz.JPEG"),
        lambda train: swap(train / "n00000000", train / "n00000001"),
        lambda train: swap(train / "n00000000/train_0.JPEG", train / "n00000001/train_3.JPEG"),
        lambda train: Image.new("RGB", (48, 40)).save(train / "n00000002/train_7.JPEG"),
    ],
    ids=["renamed", "another class", "classes swapped", "images swapped", "replaced"],
)
def test_what_an_epoch_is_finished_with(root, tmp_path, change):
    before = ready(root).order_depends_on()
    moved = root.rename(tmp_path / "moved")
    assert ready(moved).order_depends_on() == before
    change(moved / "train")
    after = ready(moved).order_depends_on()
    assert {key for key in before if before[key] != after[key]} == {"contents"}


def test_testing_needs_no_training_images(root):
    shutil.rmtree(root / "train")
    assert len(ready(root, "test").test_dataloader()) == 3


# Faults.


def fault(root: Path, stage: str = "fit") -> str:
    with pytest.raises(ConfigurationError) as caught:
        ready(root, stage)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYOUT = re.escape("Expected `root` to hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, got ")


def test_no_folder(tmp_path):
    assert re.fullmatch(LAYOUT + f"no folder {tmp_path}/nowhere/train.", fault(tmp_path / "nowhere"))


def test_no_validation_folder(root):
    shutil.rmtree(root / "val")
    assert re.fullmatch(LAYOUT + f"no folder {root}/val.", fault(root))


def test_validation_images_not_sorted_into_classes(root):
    for path in list((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for folder in list((root / "val").iterdir()):
        if folder.is_dir():
            folder.rmdir()
    assert re.fullmatch(LAYOUT + f"{root}/val with 9 .* and no class folders: sort .*", fault(root))


def test_a_class_without_images(root):
    for path in (root / "train" / "n00000001").iterdir():
        path.unlink()
    assert ", got: Found no valid file for the classes n00000001" in fault(root)


@pytest.mark.parametrize("part", ["train", "val"])
def test_classes_differ(root, part):
    (root / part / "n00000002").rename(root / part / "other")
    message = fault(root, "fit" if part == "train" else "test")
    assert "the same class folders in train/ and val/, got 2 in only one of them: n00000002, other." in message


def test_many_classes_differ(root):
    for folder in list((root / "val").iterdir()):
        folder.rename(folder.with_name("x" + folder.name))
    assert "got 6 in only one of them: n00000000, n00000001, n00000002, xn00000000, xn00000001, ..." in fault(root)


@pytest.mark.parametrize("content", ["half", "empty", "text"])
def test_broken_image(root, content):
    path = root / "val" / "n00000001" / "val_1.JPEG"
    path.write_bytes({"half": path.read_bytes()[:700], "empty": b"", "text": b"<html>not found</html>"}[content])
    with pytest.raises(
        ConfigurationError, match=rf"Expected an image that can be read, got {path} \(.*\): copy it anew"
    ):
        list(ready(root).test_dataloader())
