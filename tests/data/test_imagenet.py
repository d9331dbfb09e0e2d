import re
import shutil
from pathlib import Path

import pytest
import torch
import vision_data
from PIL import Image

from lightning_ire import ConfigurationError
from lightning_ire.data import ImageNet


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
