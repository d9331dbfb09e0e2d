"""Which file `last`, `best` and `hpc` are, and what is said about files that are no checkpoint."""

import os
import zipfile
from pathlib import Path

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_ire import ConfigurationError
from lightning_ire._cli_checkpoints import check_checkpoint, find_checkpoint, misfit

GOOD = {"state_dict": {}, "pytorch-lightning_version": pl.__version__, "optimizer_states": []}


pytestmark = pytest.mark.usefixtures("own_folder")


def trainer(*callbacks, logger=None, **settings) -> Trainer:
    logger = TensorBoardLogger("logs", "a[b]") if logger is None else logger
    return Trainer(accelerator="cpu", callbacks=list(callbacks), logger=logger, **settings)


def find(name: str, its_trainer: Trainer, version: str | None = None, *, resume: bool = False) -> str | None:
    return find_checkpoint(name, its_trainer, version, None, resume=resume)[0]


def touch(path: str, seconds: int = 0) -> str:
    """Make a file that was written at a given time."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()
    os.utime(path, (seconds, seconds))
    return path


def save(path: str, content: object, seconds: int = 0) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return touch(path, seconds)


# -------------------------------------------------------------------------------- which file


def test_last_is_of_the_highest_version_that_has_one():
    touch("logs/a[b]/version_9/checkpoints/last.ckpt", 5)
    touch("logs/a[b]/version_10/checkpoints/last-v1.ckpt", 2)
    newest = touch("logs/a[b]/version_10/checkpoints/last.ckpt", 3)
    touch("logs/a[b]/version_11/checkpoints/best.ckpt", 9)
    touch("logs/other/version_12/checkpoints/last.ckpt", 9)
    assert find("last", trainer()) == newest
    assert find("last", trainer(), "version_9") == "logs/a[b]/version_9/checkpoints/last.ckpt"


def test_versions_without_a_number_are_told_apart_by_time():
    touch("logs/a[b]/x/checkpoints/last.ckpt", 1)
    newest = touch("logs/a[b]/w/checkpoints/last.ckpt", 2)
    assert find("last", trainer(ModelCheckpoint())) == newest


def test_last_without_a_logger_is_in_the_root_and_with_several_in_the_first_ones_folder():
    in_root = touch("root/checkpoints/last.ckpt")
    assert find("last", trainer(logger=False, default_root_dir="root")) == in_root
    touch("logs/a[b]/version_0/checkpoints/last.ckpt", 5)
    in_csv = touch("c/lightning_logs/version_0/checkpoints/last.ckpt")
    loggers = [CSVLogger("c"), TensorBoardLogger("logs", "a[b]")]
    assert find("last", trainer(logger=loggers)) == in_csv


def test_last_of_several_callbacks_is_the_newest():
    touch("one/last.ckpt", 2)
    two = touch("two/last.ckpt", 3)
    callbacks = [ModelCheckpoint("one"), ModelCheckpoint("two", monitor="a"), OnExceptionCheckpoint("three")]
    assert find("last", trainer(*callbacks)) == str(Path(two).absolute())
    saved = touch("three/on_exception.ckpt", 4)
    assert find("last", trainer(*callbacks)) == saved


def test_best_is_what_the_newest_run_knew():
    callbacks = [ModelCheckpoint(filename="last"), ModelCheckpoint(monitor="a"), ModelCheckpoint(monitor="b")]
    state = {callback.state_key: {"best_model_path": f"/moved/{callback.monitor}.ckpt"} for callback in callbacks}
    for version in (0, 1):
        for name in "ab":
            save(f"logs/a[b]/version_{version}/checkpoints/{name}.ckpt", GOOD)
        save(f"logs/a[b]/version_{version}/checkpoints/last.ckpt", {**GOOD, "callbacks": state}, 5 - version)
    save("logs/a[b]/version_2/checkpoints/last.ckpt", GOOD)
    assert find("best", trainer(*callbacks)) == "logs/a[b]/version_1/checkpoints/a.ckpt"
    Path("logs/a[b]/version_1/checkpoints/a.ckpt").unlink()
    assert find("best", trainer(*callbacks)) == "logs/a[b]/version_0/checkpoints/a.ckpt"


def test_hpc_is_the_highest_number():
    for number in (2, 10, 9):
        touch(f"root/hpc_ckpt_{number}.ckpt")
    assert find("hpc", trainer(default_root_dir="root")) == "root/hpc_ckpt_10.ckpt"


@pytest.mark.parametrize("name", ["last", "best", "hpc"])
def test_nothing_is_one_line_with_what_was_searched(name):
    expected = {
        "last": r"logs/a\[\[\]b\]/\*/checkpoints/last\*.ckpt",
        "best": "one/\\*.ckpt",
        "hpc": r"hpc_ckpt_\*.ckpt",
    }
    callbacks = [ModelCheckpoint(), ModelCheckpoint("one", monitor="a")]
    with pytest.raises(
        ConfigurationError, match=rf"^Expected `ckpt_path` {name} to find .*{expected[name]}.*, got none\.$"
    ):
        find(name, trainer(*callbacks))


def test_a_fit_from_last_begins_where_there_is_no_checkpoint_of_any_name():
    assert find_checkpoint("last", trainer(), None, None, resume=True) == (
        None,
        "logs/a[[]b]/*/checkpoints/last*.ckpt",
    )
    touch("logs/a[b]/version_0/checkpoints/epoch=3.ckpt")
    with pytest.raises(ConfigurationError, match="`ckpt_path` last to find"):
        find("last", trainer(), resume=True)


def test_best_needs_a_monitor_and_names_need_a_run():
    with pytest.raises(ConfigurationError, match="Expected a ModelCheckpoint with `monitor`"):
        find("best", trainer())
    with pytest.raises(ConfigurationError, match=r"a file with `trainer\.fast_dev_run`, got 'last'"):
        find("last", trainer(fast_dev_run=True))


# -------------------------------------------------------------------------------- what is a checkpoint


def test_a_checkpoint_is_accepted_and_what_only_lightning_can_find():
    check_checkpoint(save("good", GOOD), None, resume=True)
    check_checkpoint(Path("good").absolute().as_uri(), None, resume=True)
    fsspec.filesystem("memory").pipe("/a.ckpt", b"whatever")
    check_checkpoint("memory://a.ckpt", None, resume=True)
    touch("sharded/meta.pt")
    check_checkpoint("sharded", None, resume=True)


def test_a_file_system_that_fails(monkeypatch):
    def fail(self, *args, **kwargs):
        raise PermissionError("not\nyours")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    message = "^Expected `ckpt_path` to be an address that answers, got 'memory://b': PermissionError: not yours.$"
    with pytest.raises(ConfigurationError, match=message):
        check_checkpoint("memory://b", None, resume=True)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "which is no file."),
        ("folder", "which is a folder."),
        ("registry:a", "which needs a package: pip install litmodels"),
        *((name, "which is damaged or something else.") for name in ("garbage", "empty", "truncated", "zip")),
        ("tensor", "which holds something else: there is no `state_dict` in it."),
        ("weights", "which holds something else: there is no `state_dict` in it."),
        ("fabric", "which holds something else: there is no `pytorch-lightning_version` in it."),
    ],
)
def test_anything_else_is_one_line(path, reason):
    Path("folder").mkdir()
    Path("garbage").write_text("garbage\n")
    Path("empty").touch()
    content = Path(save("good", {**GOOD, "state_dict": {"a": torch.ones(1000)}})).read_bytes()
    Path("truncated").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile("zip", "w") as archive:
        archive.writestr("a.txt", "text")
    save("tensor", torch.ones(2))
    save("weights", torch.nn.Linear(1, 1).state_dict())
    save("fabric", {"state_dict": {}})
    with pytest.raises(ConfigurationError) as caught:
        check_checkpoint(path, None, resume=False)
    assert str(caught.value) == (
        f"Expected `ckpt_path` to be a checkpoint of Lightning (or one of last, best, hpc), got {path!r}, {reason}"
    )


def test_a_class_in_a_checkpoint_needs_trust():
    path = save("module", {**GOOD, "hyper_parameters": {"net": torch.nn.Linear(1, 1)}})
    with pytest.raises(ConfigurationError, match=r"'module' with a torch\S*\.Linear in it, .* --weights_only false\."):
        check_checkpoint(path, None, resume=True)
    check_checkpoint(path, False, resume=True)


def test_only_a_training_needs_more_than_weights():
    path = save("weights", {key: GOOD[key] for key in ("state_dict", "pytorch-lightning_version")})
    check_checkpoint(path, None, resume=False)
    with pytest.raises(
        ConfigurationError, match=r"to go on from, got 'weights', which was saved with `save_weights_only`"
    ):
        check_checkpoint(path, None, resume=True)


def test_misfits_are_told_from_other_errors():
    for wrong in ({"bias": torch.ones(1)}, {"weight": torch.ones(9, 9), "bias": torch.ones(1)}):
        with pytest.raises(RuntimeError, match="Linear") as caught:
            torch.nn.Linear(1, 1).load_state_dict(wrong)
        line = misfit(caught.value, "a.ckpt")
        assert line.startswith("Expected `ckpt_path` to be a checkpoint of this model and optimizer, got 'a.ckpt': ")
        assert "\n" not in line
        assert "weight" in line
    sgd, other = (torch.optim.SGD(torch.nn.Linear(1, 1, bias=bias).parameters()) for bias in (True, False))
    with pytest.raises(ValueError, match="loaded state dict") as caught:
        sgd.load_state_dict(other.state_dict())
    assert "parameter group" in misfit(caught.value, "a.ckpt")
    assert misfit(ValueError("a state_dict of something else"), "a.ckpt") is None
