"""Every shipped config parses with the real command line, trains, and keeps its promises.

The configs of the vision experiments run on tiny data in the real on-disk formats, given by flags only.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_data
import yaml
from config_files import (
    CONFIGS,
    EMBEDDED,
    FROM_THE_FIRST_STEP,
    QUIET,
    TEXT,
    VISION,
    by_name,
    in_two_processes,
    scalars,
    value,
)

from lightning_ire import IRE, SAM
from lightning_ire.cli import IRECLI

# What the paper's experiments are, typed from ../shared/ALGORITHM.md section 4 apart from the configs.
CIFAR = {
    "model.label_smoothing": 0.1,
    "model.optimizer.class_path": "torch.optim.SGD",
    "model.optimizer.lr": 0.1,
    "model.optimizer.weight_decay": 5e-4,
    "data.global_batch_size": 128,
    "data.augmentation": "basic",
}
CIFAR10 = {**CIFAR, "data.class_path": "CIFAR10", "model.num_classes": 10, "model.model.num_classes": 10}
CIFAR100 = {**CIFAR, "data.class_path": "CIFAR100", "model.num_classes": 100, "model.model.num_classes": 100}
COSINE = {
    "model.lr_scheduler.class_path": "WarmupCosineLR",
    "model.lr_scheduler.total": None,
    "model.lr_scheduler.warmup": 0,
    "model.lr_scheduler.final_lr_ratio": 0.0,
}
TABLE_1 = {**COSINE, "model.optimizer.momentum": 0.9, "ire.kappa": 1.0, "ire.gamma": 0.99}
CIFAR10_RUN = {**CIFAR10, **TABLE_1, "trainer.max_epochs": 100, "ire.start_epoch": 60}
CIFAR100_RUN = {**CIFAR100, **TABLE_1, "trainer.max_epochs": 200, "ire.start_epoch": 70}
WRN = {"model.model.class_path": "WideResNet", "model.model.depth": 28, "model.model.width": 10}
RESNET56 = {"model.model.class_path": "ResNet", "model.model.blocks": [9, 9, 9], "model.model.widths": [16, 32, 64]}
ADAMW = {"model.optimizer.class_path": "torch.optim.AdamW", "model.optimizer.betas": [0.9, 0.999]}
VIT = {"model.model.class_path": "timm.models.VisionTransformer", "model.model.depth": 12}
VIT_T = {**VIT, "model.model.embed_dim": 192, "model.model.num_heads": 3}
VIT_S = {**VIT, "model.model.embed_dim": 384, "model.model.num_heads": 6}
TABLE_3 = {
    **CIFAR100,
    **COSINE,
    **ADAMW,
    "model.label_smoothing": 0.0,
    "model.optimizer.lr": 1e-4,
    "model.model.img_size": 32,
    "data.global_batch_size": 64,
    "data.augmentation": "autoaugment",
    "trainer.max_epochs": 200,
    "ire.kappa": 20.0,
    "ire.gamma": 0.99,
    "ire.start_loss": 0.5,
}
IMAGENET = {"data.class_path": "ImageNet", "model.num_classes": 1000, "model.model.num_classes": 1000}
TABLE_2 = {
    **IMAGENET,
    **COSINE,
    "model.model.class_path": "torchvision.models.resnet50",
    "model.label_smoothing": 0.1,
    "model.optimizer.class_path": "torch.optim.SGD",
    "model.optimizer.lr": 0.2,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 1e-4,
    "data.global_batch_size": 1024,
    "data.augmentation": "basic",
    "trainer.max_epochs": 200,
    "ire.kappa": 2.0,
    "ire.gamma": 0.8,
    "ire.start_loss": 2.516,
}
TABLE_4 = {
    **IMAGENET,
    **COSINE,
    **ADAMW,
    **VIT_S,
    "model.lr_scheduler.warmup": 30 / 300,
    "model.lr_interval": "step",
    "model.label_smoothing": 0.0,
    "model.model.img_size": 224,
    "model.model.patch_size": 16,
    "model.optimizer.lr": 3e-3,
    "model.optimizer.weight_decay": 1.0,
    "data.global_batch_size": 4096,
    "data.augmentation": "randaugment",
    "data.randaugment_ops": 2,
    "data.randaugment_magnitude": 15,
    "data.mixup_alpha": 0.5,
    "trainer.max_epochs": 300,
    "trainer.gradient_clip_val": 1.0,
    "ire.kappa": 2.0,
    "ire.gamma": 0.8,
    "ire.start_epoch": 100,
}
FIGURE_2 = {
    **CIFAR10,
    "model.model.class_path": "WideResNet",
    "model.model.depth": 16,
    "model.model.width": 8,
    "model.optimizer.momentum": 0.0,
    "trainer.max_epochs": 100,
    "ire.start_epoch": 30,
    "ire.perturbation.rho": 0.05,
    "sharpness.quantities": ["trace_fisher"],
}
RHO = {rho: {"ire.perturbation.class_path": "SAM", "ire.perturbation.rho": rho} for rho in (0.05, 0.1)}
NO_SAM = {"ire.perturbation": None}
PAPER: dict[str, dict[str, Any]] = {
    "cifar10_wrn28_10_sgd_ire": {**CIFAR10_RUN, **WRN, **NO_SAM},
    "cifar10_wrn28_10_sam_ire": {**CIFAR10_RUN, **WRN, **RHO[0.05]},
    "cifar10_resnet56_sgd_ire": {**CIFAR10_RUN, **RESNET56, **NO_SAM},
    "cifar10_resnet56_sam_ire": {**CIFAR10_RUN, **RESNET56, **RHO[0.05]},
    "cifar100_wrn28_10_sgd_ire": {**CIFAR100_RUN, **WRN, **NO_SAM},
    "cifar100_wrn28_10_sam_ire": {**CIFAR100_RUN, **WRN, **RHO[0.1]},
    "cifar100_resnet56_sgd_ire": {**CIFAR100_RUN, **RESNET56, **NO_SAM},
    "cifar100_resnet56_sam_ire": {**CIFAR100_RUN, **RESNET56, **RHO[0.1]},
    "cifar100_vit_t_admire": {**TABLE_3, **VIT_T, **NO_SAM},
    "cifar100_vit_t_sam_ire": {**TABLE_3, **VIT_T, **RHO[0.1]},
    "cifar100_vit_s_admire": {**TABLE_3, **VIT_S, **NO_SAM},
    "cifar100_vit_s_sam_ire": {**TABLE_3, **VIT_S, **RHO[0.1]},
    "imagenet_resnet50_sgd_ire": {**TABLE_2, **NO_SAM},
    "imagenet_resnet50_sam_ire": {**TABLE_2, **RHO[0.05]},
    "imagenet_vit_s16_admire": {**TABLE_4, **NO_SAM},
    "cifar10_wrn16_8_sam_ire": {**FIGURE_2, "model.lr_scheduler": None},
    "cifar10_wrn16_8_sam_ire_decayed": {
        **FIGURE_2,
        "model.lr_scheduler.milestones": [20, 50, 80],
        "model.lr_scheduler.gamma": 1 / 5,
    },
}


pytestmark = pytest.mark.usefixtures("own_folder")


def test_there_are_configs():
    assert "digits_resnet_sgd_ire" in {path.stem for path in CONFIGS}
    assert {path.stem for path in VISION} == set(PAPER)
    assert len(CONFIGS) == 1 + len(VISION) + len(TEXT)


@pytest.mark.parametrize("path", by_name(CONFIGS))
def test_name_and_comments(path):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+_(sgd_ire|sam_ire|admire)(_decayed)?", path.stem)
    settings = [line for line in path.read_text().splitlines() if re.match(r"\s*(- )?\w+: \S", line)]
    uncommented = [line for line in settings if "#" not in line and "class_path:" not in line]
    assert settings
    assert not uncommented


@pytest.mark.parametrize("path", by_name(CONFIGS))
def test_logs_under_the_name_of_the_config(path):
    config = yaml.safe_load(path.read_text())
    logger = config["trainer"]["logger"]
    assert logger["class_path"].rsplit(".", 1)[-1] == "TensorBoardLogger"
    assert (logger["init_args"]["save_dir"], logger["init_args"]["name"]) == ("logs", path.stem)
    assert "version" not in logger["init_args"]


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_trains(path):
    flags = f"--trainer.fast_dev_run 2 {QUIET} {FROM_THE_FIRST_STEP}"
    cli = IRECLI(["fit", "--config", str(path), *flags.split()])
    assert cli.trainer.global_step == 2
    assert [callback for callback in cli.trainer.callbacks if isinstance(callback, IRE)]


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_ire_is_on_for_at_least_half_of_the_steps(path):
    config = yaml.safe_load(path.read_text())
    assert config["ire"].get("start_epoch", 0) <= config["trainer"]["max_epochs"] / 2
    assert 0 <= config["ire"].get("start_step", 0) <= 0.5


@pytest.mark.parametrize("path", by_name(EMBEDDED))
def test_needs_no_worker_processes(path):
    assert yaml.safe_load(path.read_text())["data"]["init_args"].get("num_workers", 0) == 0


def test_digits_schedule_ends_with_the_run():
    (path,) = (path for path in CONFIGS if path.stem == "digits_resnet_sgd_ire")
    config = yaml.safe_load(path.read_text())
    assert {key: value(config, key) for key in COSINE} == COSINE  # `total` null: the length of the run
    flags = f"{QUIET} {FROM_THE_FIRST_STEP} --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    cli = IRECLI(["fit", "--config", str(path), *flags.split()])
    (schedule,) = (config.scheduler for config in cli.trainer.lr_scheduler_configs)
    assert schedule.total == 1
    assert schedule.get_last_lr() == [0.0]


def test_digits_keeps_the_best_and_the_last_weights():
    (path,) = (path for path in CONFIGS if path.stem == "digits_resnet_sgd_ire")
    flags = f"{QUIET} --trainer.limit_train_batches 2 {FROM_THE_FIRST_STEP} --model.optimizer.lr 0"
    fit = ["fit", "--config", str(path), *flags.split()]
    IRECLI([*fit, "--trainer.max_epochs", "3"])
    folder = Path("logs/digits_resnet_sgd_ire/version_0/checkpoints")
    assert sorted(checkpoint.name for checkpoint in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2
    IRECLI([*fit, "--trainer.max_epochs", "4", "--ckpt_path", str(folder / "last.ckpt")])
    resumed = Path("logs/digits_resnet_sgd_ire/version_1/checkpoints/last.ckpt")
    assert torch.load(resumed, weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("path", by_name(VISION))
def test_settings_of_the_paper(path):
    config = yaml.safe_load(path.read_text())
    assert {key: value(config, key) for key in PAPER[path.stem]} == PAPER[path.stem]
    assert config["ire"]["interval"] == 10
    assert len([key for key in config["ire"] if key.startswith("start_")]) == 1
    assert value(config, "data.val_size") == 0
    assert value(config, "data.cutout_size") == 0
    assert config["test_after_fit"] is True


@pytest.mark.parametrize("path", by_name(CONFIGS))
def test_header_says_how_to_run_it(path):
    text = path.read_text()
    assert f"python cli.py fit --config configs/{path.name}" in text
    if path in VISION:
        assert f"python cli.py sweep --config configs/{path.name}" in text
        assert re.search(r"^# Paper: |^# Paper, top-1|^# The figure's", text, re.MULTILINE)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    root = vision_data.write_cifar10(tmp_path_factory.mktemp("images"))
    vision_data.write_cifar100(root, test=7)  # an odd number: two processes have unequally many
    vision_data.write_imagenet(root / "imagenet")
    return root


def tiny(path: Path, images: Path) -> list[str]:
    """The command that runs a vision config on the tiny data: by flags only."""
    flags = "--data.global_batch_size 4 --data.max_batch_per_device 2 --data.eval_batch_size 2 --data.num_workers 0"
    if path.stem.startswith("imagenet"):
        flags += f" --data.root {images}/imagenet --model.num_classes 3 --model.model.num_classes 3"
        flags += " --data.image_size 64" + (" --model.model.img_size 64" if "vit" in path.stem else "")
    else:
        flags += f" --data.root {images} --data.verify false"
    return ["fit", "--config", str(path), *f"{QUIET} {FROM_THE_FIRST_STEP} {flags}".split()]


SMALL = ("cifar100_resnet56_sgd_ire", "cifar100_resnet56_sam_ire", "cifar100_vit_t_admire")  # the others make two steps


@pytest.mark.parametrize("path", by_name([path for path in VISION if path.stem in SMALL]))
def test_vision_makes_one_step(path, images):
    cli = IRECLI([*tiny(path, images), "--trainer.fast_dev_run", "1", "--data.global_batch_size", "2"])
    (ire,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, IRE))
    assert cli.trainer.global_step == 1
    assert ire.started_at == 0
    assert (ire.ascent_norm is not None) == isinstance(ire.perturbation, SAM) == ("sam_ire" in path.stem)
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())
    assert 0 <= cli.trainer.callback_metrics["test/accuracy"] <= 1


FLAGS = {
    "accumulated": "",
    "baseline": "--ire.kappa 0",
    "sam bf16": "--ire.perturbation SAM --ire.perturbation.rho 0.1 --trainer.precision bf16-mixed",
    "mixed": "--data.mixup_alpha 1 --data.cutmix_alpha 1 --data.cutout_size 8 --data.val_size 8",
}


ALL_FLAGS = ("digits_resnet_sgd_ire", "cifar10_resnet56_sam_ire", "cifar100_vit_t_sam_ire", "imagenet_vit_s16_admire")


def two_steps() -> list:
    """Every config as it is, and one of each architecture with all flags; the others with them in `test-weekly`."""
    return [
        pytest.param(
            path,
            flags,
            id=f"{path.stem}-{name}",
            marks=[pytest.mark.weekly] if flags and path.stem not in ALL_FLAGS else [],
        )
        for path in VISION
        for name, flags in FLAGS.items()
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)  # the widest network in bf16 on a busy machine
@pytest.mark.parametrize(("path", "flags"), two_steps())
def test_vision_makes_two_steps(path, flags, images):
    cli = IRECLI([*tiny(path, images), *f"--trainer.fast_dev_run 4 {flags}".split()])
    assert cli.trainer.accumulate_grad_batches == 2  # global batch 4, at most 2 at once
    assert cli.trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", by_name(VISION))
def test_vision_on_a_gpu(path, images):
    fast = "--trainer.precision bf16-mixed --model.channels_last true --model.compile true"
    flags = f"--trainer.fast_dev_run 2 --trainer.accelerator gpu --trainer.devices 1 --data.num_workers 1 {fast}"
    cli = IRECLI([*tiny(path, images), *flags.split()])
    assert cli.trainer.global_step == 1
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


def one_step(path: Path, images: Path) -> list[str]:
    return [*tiny(path, images), "--trainer.fast_dev_run", "1", "--data.max_batch_per_device", "null"]


IN_MAKE_TEST = ("cifar10_resnet56_sgd_ire", "imagenet_resnet50_sam_ire")


@pytest.mark.slow
def test_three_configs_in_two_processes(images, tmp_path):
    """One of them with plain AdamW and no BatchNorm: what it logs is the same, up to rounding, in 1 and 2 processes."""
    (vit,) = (path for path in VISION if path.stem == "cifar100_vit_t_admire")
    flags = "--ire.kappa 0 --data.augmentation none --model.model.depth 2 --trainer.max_epochs 1"
    flags += " --trainer.limit_train_batches 4 --trainer.log_every_n_steps 1 --data.max_batch_per_device null"
    command = [*tiny(vit, images), *flags.split()]
    (tmp_path / "two").mkdir()
    others = [one_step(path, images) for path in VISION if path.stem in IN_MAKE_TEST]
    in_two_processes([command, *others], tmp_path / "two")
    IRECLI([*command, "--trainer.default_root_dir", "one", "--trainer.logger.save_dir", "one"])
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in ("train/accuracy", "val/loss", "val/accuracy", "test/loss", "test/accuracy", "test/accuracy_top5"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-4), tag  # of 7 test images: unequally many each


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_all_other_configs_in_two_processes(part, images, tmp_path):
    paths = [path for path in VISION if path.stem not in IN_MAKE_TEST][part::3]
    in_two_processes([one_step(path, images) for path in paths], tmp_path)
