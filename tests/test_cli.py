"""The command line, mostly in this process; what a user sees is checked in real processes at the end."""

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ire import IRE, SAM, ConfigurationError, sweeps, tags
from lightning_ire.cli import IRECLI, main
from lightning_ire.data import Digits
from lightning_ire.models import ImageClassifier
from lightning_ire.sweeps import _runs

ROOT = Path(__file__).parents[1]
QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
BATCHES = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1"
DIGITS = (
    "--model ImageClassifier --model.num_classes 10 --model.model ResNet --model.model.in_channels 1 "
    "--model.model.blocks [1] --model.model.widths [4] --data Digits --data.augment false"
)
FIT = ["fit", *f"{DIGITS} {QUIET} {BATCHES} --trainer.max_epochs 1 --trainer.log_every_n_steps 1".split()]
DRY = [*FIT, "--trainer.fast_dev_run", "1"]
IRE_IN_LIST = {"trainer": {"callbacks": [{"class_path": "IRE", "init_args": {"kappa": 2.0, "gamma": 0.5}}]}}


class SavingModel(BoringModel):
    """Keeps its learning rate as a hyper-parameter in checkpoints, as many modules do."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr


class FolderlessLogger(DummyLogger):
    """Logs to no folder (`save_dir` is None), as a logger of a remote service may do."""


@pytest.fixture(autouse=True)
def _seed(own_folder, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def write(path: str, content: dict) -> str:
    Path(path).write_text(yaml.safe_dump(content))
    return path


def event_tags(folder: str) -> dict[str, list[float]]:
    """All scalars in a folder's event files."""
    values: dict[str, list[float]] = {}
    for path in sorted(Path(folder).glob("events.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return values


def usage_error(args: list[str], capsys) -> str:
    """Run a command line that cannot be right and return its one line."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "eed set to" not in line]
    assert len(lines) == 1
    return lines[0]


# -------------------------------------------------------------------------------- wrong keys and values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param("--ire.gama 1", "unrecognized arguments: --ire.gama 1", id="misspelt"),
        pytest.param("--ire.kap 1", "unrecognized arguments: --ire.kap 1", id="abbreviated"),
        pytest.param("--ire.beta x", "ire.beta: Expected float, got x", id="wrong-type"),
        pytest.param("--ire.start_epoch x", "ire.start_epoch: Expected int, got x", id="wrong-type-optional"),
        pytest.param("--ire.gamma 1.5", "Expected `ire.gamma` to be a number in (0, 1], got 1.5.", id="range"),
        pytest.param(
            "--ire.kappa {'a':1,'*':-2}",
            "Expected `ire.kappa` of '*' to be a number >= 0, got -2.0.",
            id="range-mapping",
        ),
        pytest.param(
            "--ire.perturbation SAM --ire.perturbation.rho -1",
            "Expected `ire.perturbation.rho` to be a number >= 0, got -1.0.",
            id="range-nested",
        ),
        pytest.param("--ire.perturbation SAMM", "ire.perturbation: Expected a known class, got SAMM", id="class"),
        pytest.param(
            "--ire.perturbation SAM --ire.perturbation.roh 1",
            "no such key: ire.perturbation.roh",
            id="misspelt-nested",
        ),
        pytest.param("--model.model.block [1]", "no such key: model.model.block", id="misspelt-twice-nested"),
        pytest.param("--model.optimizer.lrr 1", "no such key: model.optimizer.lrr", id="misspelt-callable"),
        pytest.param("--model.model ResNett", "model.model: Expected a known class, got ResNett", id="class-nested"),
        pytest.param(
            "--model.lr_interval day", "model.lr_interval: Expected Literal['epoch', 'step'], got day", id="choice"
        ),
        pytest.param(
            "--model.model.widths [4,8]",
            "Expected `model.model.widths` to be as long as `blocks` ([1]), got [4, 8].",
            id="lengths",
        ),
        pytest.param("--data.batch_size 0", "Expected `data.batch_size` to be a whole number >= 1, got 0.", id="data"),
        pytest.param("--model.model.blocks x", "model.model.blocks: Expected Sequence, got x", id="type-nested"),
        pytest.param("--optimizer SGD --optimizer.lr -1", "Invalid learning rate: -1.0", id="foreign-class"),
        pytest.param("--config nowhere.yaml", "config: File does not exist: ", id="no-config"),
        pytest.param("--trainer.accelerator abacus", "You selected an invalid accelerator name: ", id="trainer"),
        *(
            pytest.param(
                f"--trainer.fast_dev_run 0 --trainer.{key} 0", f"Expected `trainer.{key}` to be a whole", id=key
            )
            for key in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
        ),
        pytest.param(
            "--trainer.fast_dev_run 0 --trainer.default_root_dir foo://x",
            "Expected `trainer.default_root_dir` to be an address that answers, got 'foo://x': ValueError: Protocol",
            id="folder-elsewhere",
        ),
        pytest.param(
            "--ckpt_path foo://x",
            "Expected `ckpt_path` to be an address that answers, got 'foo://x': ValueError: Protocol not known: foo.",
            id="protocol",
        ),
        pytest.param(
            "--ckpt_path file:///no.ckpt", "Expected `ckpt_path` to be a checkpoint of Li", id="local-address"
        ),
        pytest.param("--ckpt_path memory://x", "Expected `ckpt_path` to be an address that answers, got", id="memory"),
        pytest.param("--model.optimizer null", "Expected `model.optimizer` to be a class of optimi", id="no-optimizer"),
        pytest.param("--data CIFAR10 --data.root null", "Expected `data.root` to be a path, got None.", id="no-root"),
        pytest.param(
            "--data Text --data.cache_dir null", "Expected `data.cache_dir` to be a path, got None.", id="no-cache"
        ),
        pytest.param(
            "--data Text --data.tokenizer null", "Expected `data.tokenizer` to be a path, got None.", id="no-tokenizer"
        ),
        pytest.param("--seed_everything -5", "Expected `seed_everything` to be a whole number in [0, ", id="seed"),
        pytest.param(
            "--seed_everything 4294967296", "Expected `seed_everything` to be a whole number", id="seed-2**32"
        ),
    ],
)
def test_wrong_flag_is_one_line(flags, message, capsys):
    assert usage_error([*DRY, *flags.split()], capsys).startswith(f"error: {message}")


def test_a_seed_from_the_environment_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    assert "`PL_GLOBAL_SEED` to be a whole number in [0, 4294967295], got 'x'" in usage_error(
        [*DRY, "--seed_everything", "true"], capsys
    )


def test_processes_of_a_launcher_would_draw_different_seeds(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    line = usage_error([*DRY, "--seed_everything", "true"], capsys)
    assert line.startswith("error: Expected `seed_everything` to be a number, or the environment variable PL_GLOBAL_")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"ire": {"gama": 1}}, "Subcommand 'fit' does not accept option 'ire.gama'", id="misspelt"),
        pytest.param({"ire": {"gamma": 1.5}}, "Expected `ire.gamma` to be a number in (0, 1], got 1.5.", id="range"),
        pytest.param(
            {"ire": {"perturbation": {"class_path": "SAM", "init_args": {"rho": -1}}}},
            "Expected `ire.perturbation.rho` to be a number >= 0, got -1.0.",
            id="range-nested",
        ),
        pytest.param(
            {"trainer": {"callbacks": [{"class_path": "IRE", "init_args": {"gamma": 1.5}}]}},
            "Expected `trainer.callbacks.0.gamma` to be a number in (0, 1], got 1.5.",
            id="listed",
        ),
        pytest.param(
            {"trainer": {"callbacks": [{"class_path": "IRE", "init_args": {"gama": 1}}]}},
            "no such key: trainer.callbacks.gama",
            id="listed-misspelt",
        ),
    ],
)
def test_wrong_config_is_one_line(config, message, capsys):
    assert usage_error([*DRY, "--config", write("wrong.yaml", config)], capsys) == f"error: {message}"


def test_errors_of_the_run_are_one_line(capsys):
    assert main([*DRY, "--model.optimizer.lr", "-1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: Expected `model.optimizer` to have values in range, got: Invalid learning rate: -1.0."
    )
    monitor = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "nothing"]
    assert main([*FIT, *monitor]) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: `ModelCheckpoint(monitor='nothing')` could not find the monitored key")


def test_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(DRY) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'lightning-ire[vision]'")


def test_debugging_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(argparse.ArgumentError, match=r"Expected `ire\.gamma` to be a number"):
        main([*DRY, "--ire.gamma", "1.5"])
    with pytest.raises(ValueError, match=r"Expected `model\.optimizer` to have values in range"):
        main([*DRY, "--model.optimizer.lr", "-1"])


# -------------------------------------------------------------------------------- the top-level keys


def test_idle_key_adds_no_callback():
    assert not [callback for callback in IRECLI(DRY).trainer.callbacks if isinstance(callback, IRE)]


def test_key_sets_up_the_callback():
    sam = "--ire.perturbation SAM --ire.perturbation.rho 0.1"
    flags = f"--ire.kappa 5 --ire.gamma 0.8 {sam} --ire.curvature EmpiricalFisher"
    (ire,) = (c for c in IRECLI([*DRY, *flags.split()]).trainer.callbacks if isinstance(c, IRE))
    assert (ire.kappa, ire.gamma, ire.interval) == (5.0, 0.8, 10)
    assert isinstance(ire.perturbation, SAM)
    assert ire.perturbation.rho == 0.1
    assert type(ire.curvature).__name__ == "EmpiricalFisher"


def test_kappa_and_gamma_by_name():
    Path("by_name.yaml").write_text('ire: {kappa: {"*linear*": 9, "*": 4}, gamma: {"*": 0.5}}')  # in this order
    config = ["--config", "by_name.yaml"]
    for flags, kappa in ([], {"*linear*": 9.0, "*": 4.0}), (["--ire.kappa", '{"*": 2}'], {"*": 2.0}):
        (ire,) = (c for c in IRECLI([*DRY, *config, *flags]).trainer.callbacks if isinstance(c, IRE))
        assert (ire.kappa, ire.gamma) == (kappa, {"*": 0.5})
        assert list(ire.kappa) == list(kappa)


def test_a_preset_replaces_the_configs_settings_and_flags_replace_its_own():
    Path("other.yaml").write_text("ire: {kappa: 7, beta: 0.5, start_step: 3}")
    flags = ["--ire.preset", "cifar100_resnet56_sam_ire"]
    for more, text in (
        (["--ire.start_epoch", "0"], "IRE(gamma=0.99, start_epoch=0, perturbation=SAM(rho=0.1))"),
        (["--ire.start_epoch=null", "--ire.kappa", "2"], "IRE(kappa=2.0, gamma=0.99, perturbation=SAM(rho=0.1))"),
    ):
        for args in ([*flags, "--config", "other.yaml", *more], ["--config=other.yaml", *more, "=".join(flags)]):
            (ire,) = (c for c in IRECLI([*DRY, *args]).trainer.callbacks if isinstance(c, IRE))
            assert repr(ire) == text


def test_the_baseline_of_a_sam_ire_config_is_sam_from_the_first_step():
    flags = ["--ire.preset", "cifar100_resnet56_sam_ire", "--ire.kappa", "0"]
    words = "`ire.start_epoch` 70 is left out: .* boost .*; `--ire.perturbation.start_epoch 70` starts the perturbation"
    with pytest.warns(UserWarning, match=words):
        cli = IRECLI([*DRY, *flags])
    (ire,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, IRE))
    assert repr(ire) == "IRE(kappa=0.0, gamma=0.99, perturbation=SAM(rho=0.1))"
    assert cli.config.fit.ire.start_epoch is None  # and so in the saved config


@pytest.mark.parametrize("name", ["blockwise", "lite"])
def test_presets_with_mappings_and_objects(name, capsys):
    with pytest.raises(SystemExit):
        IRECLI([*DRY, "--ire.preset", name, "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["ire"]
    assert settings["curvature"]["class_path"].endswith({"blockwise": "RandomMask", "lite": "SecondMoment"}[name])
    assert settings["kappa"] == IRE.preset(name).kappa
    assert settings["mask"] == IRE.preset(name).mask


def test_an_unknown_preset_is_one_line(capsys):
    for flags, words in (("--ire.preset lit", "one of 'cifar10_wrn28_10_sgd_ire', "), ("--ire.preset", "a name after")):
        line = usage_error([*DRY, *flags.split()], capsys)
        assert words in line
        assert "ire.preset`" in line


def test_perturbation_alone_is_active():
    (ire,) = (c for c in IRECLI([*DRY, "--ire.perturbation", "SAM"]).trainer.callbacks if isinstance(c, IRE))
    assert ire.kappa == 0


def test_listed_callback_works_beside_an_idle_key():
    config = ["--config", write("listed.yaml", IRE_IN_LIST)]
    (ire,) = (callback for callback in IRECLI([*DRY, *config]).trainer.callbacks if isinstance(callback, IRE))
    assert (ire.kappa, ire.gamma) == (2.0, 0.5)


def test_key_and_listed_callback_is_one_line(capsys):
    config = ["--config", write("listed.yaml", IRE_IN_LIST), "--ire.kappa", "1"]
    assert usage_error([*DRY, *config], capsys) == (
        "error: Expected IRE to be set up in one place, got both the key `ire` and an entry of `trainer.callbacks`: "
        "remove one of them."
    )


def test_single_callback_in_place_of_a_list():
    config = {"trainer": {"callbacks": {"class_path": "LearningRateMonitor"}}}
    cli = IRECLI([*DRY, "--config", write("single.yaml", config), "--ire.kappa", "3"])
    assert {"LearningRateMonitor", "IRE"} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--ire.kappa KAPPA" in text
    assert "--test_after_fit" in text


def test_optimizer_keys_of_lightning():
    flags = "--optimizer Adam --optimizer.lr 0.5 --lr_scheduler StepLR --lr_scheduler.step_size 7 --ire.kappa 1"
    trainer = IRECLI([*DRY, *flags.split()]).trainer
    assert type(trainer.optimizers[0]) is torch.optim.Adam
    assert trainer.optimizers[0].defaults["lr"] == 0.5
    assert trainer.lr_scheduler_configs[0].scheduler.step_size == 7


# -------------------------------------------------------------------------------- one run after another


def test_every_run_saves_its_config_and_it_runs_as_is(capsys):
    assert main([*FIT, "--ire.kappa", "1", "--ire.perturbation", "SAM"]) == 0
    first = Path("lightning_logs/version_0/config.yaml")
    saved = first.read_text()
    assert main(["fit", "--config", str(first)]) == 0
    assert first.read_text() == saved
    assert Path("lightning_logs/version_1/config.yaml").read_text() == saved
    assert yaml.safe_load(saved)["ire"]["perturbation"]["class_path"] == "lightning_ire.SAM"
    assert "Logs: lightning_logs/version_1" in capsys.readouterr().out.replace(f"{Path.cwd()}/", "")
    assert main(["validate", "--config", str(first), "--ckpt_path", str(checkpoint("lightning_logs/version_0"))]) == 0


def test_another_seed_in_each_run(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    runs = [IRECLI([*DRY, "--seed_everything", "true"]) for _ in range(2)]
    seeds = [run.config["fit"].seed_everything for run in runs]  # what is saved
    assert [type(seed) for seed in seeds] == [int, int]
    assert seeds[0] != seeds[1]
    assert os.environ["PL_GLOBAL_SEED"] == str(seeds[1])
    again = IRECLI([*DRY, "--seed_everything", str(seeds[0])])
    assert torch.equal(weights(again.model), weights(runs[0].model))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert IRECLI([*DRY, "--seed_everything", "true"]).config["fit"].seed_everything == 7
    assert IRECLI([*DRY, "--seed_everything", "false"]).config["fit"].seed_everything is False


def test_runs_without_a_folder_of_their_own_keep_each_others_configs():
    for epochs in "123":
        assert main([*FIT, "--trainer.logger", "false", "--trainer.max_epochs", epochs]) == 0
    names = ["config.yaml", "config_1.yaml", "config_2.yaml"]
    assert sorted(path.name for path in Path.cwd().glob("*.yaml")) == names
    assert [yaml.safe_load(Path(name).read_text())["trainer"]["max_epochs"] for name in names] == [1, 2, 3]


def test_resumed_in_the_same_folder_keeps_the_first_config():
    logger = [
        "--trainer.logger",
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        "logs",
        "--trainer.logger.version",
        "0",
    ]
    assert main([*FIT, *logger]) == 0
    folder = Path("logs/lightning_logs/version_0")
    saved = (folder / "config.yaml").read_text()
    resume = ["--ckpt_path", str(checkpoint(folder)), "--trainer.max_epochs", "2"]
    assert main([*FIT, *logger, *resume]) == 0
    assert (folder / "config.yaml").read_text() == saved
    assert yaml.safe_load((folder / "config_1.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_logger_without_a_folder_is_no_reason_to_refuse():
    assert main([*FIT, "--trainer.logger", "FolderlessLogger", "--trainer.enable_checkpointing", "false"]) == 0
    assert not list(Path.cwd().rglob("config*.yaml"))


def test_flags_win_over_hyper_parameters_in_the_checkpoint():
    fit = ["fit", "--model", "SavingModel", *QUIET.split(), *BATCHES.split(), "--trainer.max_epochs", "1"]
    assert main(fit) == 0
    path = checkpoint("lightning_logs/version_0")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["lr"] == 0.1
    resume = ["--model.lr", "0.5", "--ckpt_path", str(path), "--trainer.max_epochs", "2"]
    cli = IRECLI([*fit, *resume])
    assert (cli.model.lr, cli.trainer.current_epoch) == (0.5, 2)


@pytest.mark.parametrize("asked", ["true", "false"])
def test_test_after_fit(asked):
    assert main([*FIT, "--test_after_fit", asked]) == 0
    found = event_tags("lightning_logs/version_0")
    assert ("test/accuracy" in found) is (asked == "true")
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(found)


def test_the_test_after_fit_is_of_the_final_weights(monkeypatch):
    seen = {}
    for hook in ("on_train_end", "on_test_start"):
        monkeypatch.setattr(LightningModule, hook, lambda self, hook=hook: seen.update({hook: weights(self)}))
    first_is_best = (
        "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor epoch --trainer.callbacks.mode min"
    )
    cli = IRECLI([*FIT, *first_is_best.split(), "--test_after_fit", "true", "--trainer.max_epochs", "2"])
    assert "epoch=0" in cli.trainer.checkpoint_callback.best_model_path
    assert torch.equal(seen["on_train_end"], seen["on_test_start"])


def checkpoint(folder: str | Path) -> Path:
    (path,) = Path(folder, "checkpoints").glob("*.ckpt")
    return path


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# -------------------------------------------------------------------------------- ckpt_path, folders, signals


SUBCOMMANDS = pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])


@pytest.fixture
def saving() -> list[str]:
    """Flags of runs in logs/d/version_N that save best.ckpt and last.ckpt."""
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "d"}}
    best, last = {"filename": "best", "monitor": "val/loss"}, {"filename": "last", "enable_version_counter": False}
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": args} for args in (best, last)]
    return ["--config", write("saving.yaml", {"trainer": {"logger": logger, "callbacks": callbacks}})]


@SUBCOMMANDS
def test_wrong_checkpoint_is_one_line_before_anything_is_made(subcommand, capsys, monkeypatch):
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda self: pytest.fail("made"))
    Path("garbage").write_text("garbage")
    expected = "error: Expected `ckpt_path` to be a checkpoint of Lightning (or one of last, best, hpc), got "
    for flags in (["--ckpt_path", "garbage"], ["--config", write("c.yaml", {"ckpt_path": "garbage"})]):
        line = usage_error([subcommand, *FIT[1:], *flags], capsys)
        assert line == f"{expected}'garbage', which is damaged or something else."


@pytest.mark.parametrize("subcommand", cases.first_at_once(["test", "fit", "validate", "predict"]))
def test_last_is_the_newest_runs(subcommand, saving, capsys, monkeypatch):
    assert main([*FIT, *saving]) == 0
    shutil.copytree("logs/d/version_0", "logs/d/version_2")
    path = Path("logs/d/version_2/checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    for tensor in content["state_dict"].values():
        tensor.fill_(7)
    torch.save(content, path)
    seen = []
    hook = "on_validation_batch_start" if subcommand == "validate" else f"on_{subcommand}_start"
    monkeypatch.setattr(LightningModule, hook, lambda self, *args: seen.append(weights(self)))
    monkeypatch.setattr(ImageClassifier, "predict_step", lambda self, batch: None)
    monkeypatch.setattr(Digits, "predict_dataloader", Digits.test_dataloader)
    flags = [*FIT[1:], *saving, "--trainer.max_epochs", "2", "--trainer.limit_predict_batches", "1"]
    cli = IRECLI([subcommand, *flags, "--ckpt_path", "last"])
    assert (seen[0] == 7).all()
    assert f"ckpt_path last: {path}\n" in capsys.readouterr().out
    assert cli.config[subcommand].ckpt_path == str(path)  # so config.yaml says which
    if subcommand == "test":
        IRECLI([subcommand, *flags, "--ckpt_path", "best"])
        assert "ckpt_path best: logs/d/version_2/checkpoints/best.ckpt\n" in capsys.readouterr().out
        misfits = [*flags, "--model.model.widths", "[5]", "--ckpt_path", "last"]
        assert main([subcommand, *misfits]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: Expected `ckpt_path` to be a checkpoint of this model and optimizer, got ")
        assert "size mismatch" in line


def test_nothing_to_find_begins_a_fit_and_is_refused_by_all_others(saving, capsys):
    searched = "logs/d/*/checkpoints/last*.ckpt"
    for subcommand in ("validate", "test", "predict"):
        line = usage_error([subcommand, *FIT[1:], *saving, "--ckpt_path", "last"], capsys)
        assert line == f"error: Expected `ckpt_path` last to find {searched}, got none."
    assert "`ckpt_path` best to find" in usage_error([*FIT, *saving, "--ckpt_path", "best"], capsys)
    assert not Path("logs").exists()
    assert main([*FIT, *saving, "--ckpt_path", "last"]) == 0
    assert f"ckpt_path last: nothing at {searched} yet, so the training begins\n" in capsys.readouterr().out
    assert yaml.safe_load(Path("logs/d/version_0/config.yaml").read_text())["ckpt_path"] is None
    fixed = [*saving, "--trainer.logger.version", "7"]
    assert "logs/d/version_7/checkpoints/last" in usage_error(["test", *FIT[1:], *fixed, "--ckpt_path", "last"], capsys)


def test_weights_of_no_run_are_said(capsys):
    assert main(["test", *FIT[1:]]) == 0
    assert "test without `ckpt_path`: the weights are those that the model was made with" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["fit", "predict"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trainer.logger CSVLogger --trainer.logger.save_dir file", "trainer.logger.save_dir"),
        ("--trainer.logger TensorBoardLogger --trainer.logger.save_dir file/below", "trainer.logger.save_dir"),
        ("--trainer.default_root_dir file", "trainer.default_root_dir"),
        ("--trainer.default_root_dir file --trainer.logger false", "trainer.default_root_dir"),
    ],
    ids=["csv", "board", "default", "none"],
)
def test_a_log_folder_that_cannot_be_made_is_one_line(subcommand, flags, message, capsys):
    Path("file").touch()
    got = flags.split("file")[1].split()[:1] if flags.endswith("below") else []
    line = usage_error([subcommand, *FIT[1:], *flags.split()], capsys)
    assert (
        line
        == f"error: Expected `{message}` to be a folder to write to, got 'file{''.join(got)}': file: Not a directory."
    )


def test_a_folder_of_checkpoints_that_cannot_be_made_is_one_line(capsys):
    Path("file").touch()
    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", "file/below"]
    line = usage_error([*FIT, *flags], capsys)
    assert line.startswith("error: Expected `trainer.callbacks.0.dirpath` to be a folder to write to, got ")
    assert line.endswith("file: Not a directory.")
    assert not Path("lightning_logs").exists()


def test_two_callbacks_with_one_state_are_one_line(capsys):
    twice = {"trainer": {"callbacks": [{"class_path": "IRE"}, {"class_path": "IRE"}]}}
    line = usage_error([*FIT, "--config", write("twice.yaml", twice)], capsys)
    assert line.startswith("error: Found more than one stateful callback of type `IRE`.")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end", "on_test_end", "on_save_checkpoint"])
def test_errors_of_callbacks_are_one_line(hook, monkeypatch, capsys):
    def fail(*args):
        raise ConfigurationError("Expected `every_n_epochs` to be of one monitor,\ngot two.")

    monkeypatch.setattr(IRE, hook, fail)
    assert main([*FIT, "--ire.kappa", "1", "--test_after_fit", "true"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: Expected `")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("subcommand", ["fit", "test"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_codes(subcommand, number, code, monkeypatch):
    hook = "on_before_zero_grad" if subcommand == "fit" else "on_test_batch_end"
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LightningModule, hook, lambda *args: signal.raise_signal(number))
    try:
        assert main([subcommand, *FIT[1:], "--trainer.limit_test_batches", "2"]) == code
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores further ones


@pytest.mark.parametrize(
    ("subcommand", "hook"),
    [
        ("predict", "on_predict_batch_end"), ("predict", "on_predict_start"), ("validate", "on_validation_epoch_end"),
        ("test", "on_test_start"), ("fit", "on_test_epoch_end"),
    ],
)  # fmt: skip
def test_sigterm_where_nothing_is_trained_ends_at_once(subcommand, hook, monkeypatch):
    ended = []

    def end(*args):
        signal.raise_signal(signal.SIGTERM)
        ended.append("goes on")

    monkeypatch.setattr(LightningModule, hook, end)
    monkeypatch.setattr(ImageClassifier, "predict_step", lambda self, batch: None)
    monkeypatch.setattr(Digits, "predict_dataloader", Digits.test_dataloader)
    before = signal.getsignal(signal.SIGTERM)
    assert main([subcommand, *FIT[1:], "--test_after_fit", "true"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert ended == []


def test_ctrl_c_outside_of_a_run(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(IRECLI, "instantiate_classes", interrupt)
    assert main(FIT) == 130
    monkeypatch.setattr(sweeps, "main", interrupt)
    assert main(["sweep"]) == 130


# -------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("way", ["args", "argv"])
def test_sweep_goes_to_the_sweeps(way, monkeypatch, capsys):
    if way == "argv":
        monkeypatch.setattr(sys, "argv", ["cli.py", "sweep", "--config", "nowhere.yaml"])
    assert main(["sweep", "--config", "nowhere.yaml"] if way == "args" else None) == 2
    assert capsys.readouterr().err == "error: Expected `--config` to be a file, got 'nowhere.yaml'.\n"


@pytest.mark.parametrize("kind", cases.first_at_once(["two", "csv", "none", "other-tags"]))
def test_sweep_reads_its_runs_whatever_the_configs_logger(kind, monkeypatch, capsys):
    csv = {"class_path": "CSVLogger", "init_args": {"save_dir": "c"}}
    board = {
        "class_path": "TensorBoardLogger",
        "init_args": {"save_dir": "t", "prefix": "p", "sub_dir": "s", "version": "v"},
    }
    logger = {"csv": csv, "two": [board, csv], "none": False, "other-tags": board}[kind]
    config = write("c.yaml", {"test_after_fit": True, "trainer": {"logger": logger}})

    def in_this_process(arguments: list[str], log: Path) -> int:
        return main(arguments[arguments.index("fit") :])

    monkeypatch.setattr(_runs, "run_process", in_this_process)
    assert main(["sweep", "--config", config, "--grid", "seed_everything", "0", "--", *FIT[1:]]) == 0
    assert "1 of 1 runs" in capsys.readouterr().out
    assert not [folder for folder in "ct" if Path(folder).exists()]


def test_module_is_a_command_with_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cli.py", "sweep", "--config", "nowhere.yaml"])
    monkeypatch.delitem(sys.modules, "lightning_ire.cli")
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("lightning_ire.cli", run_name="__main__")
    assert exit_info.value.code == 2
    assert "got 'nowhere.yaml'" in capsys.readouterr().err


# -------------------------------------------------------------------------------- real processes


def run_cli(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *args],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_process_with_a_wrong_value():
    done = run_cli(*DRY, "--ire.gamma", "1.5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: Expected `ire.gamma` to be a number in (0, 1], got 1.5."
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_process_that_trains_and_logs():
    flags = (
        "--ire.kappa 1 --ire.interval 2 --ire.perturbation SAM --trainer.limit_train_batches 5 --test_after_fit true"
    )
    done = run_cli(*FIT, *flags.split())
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir " in done.stdout
    assert "Tip" not in done.stdout + done.stderr
    found = event_tags("lightning_logs/version_0")
    logged = {
        *tags.IRE_TAGS,
        *tags.SAM_TAGS,
        *(f"{s}/{v}" for s in ("train", "val", "test") for v in ("loss", "accuracy")),
    }
    assert logged <= set(found)
    assert found[tags.KAPPA] == [1.0] * 5
