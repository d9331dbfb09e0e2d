"""Trials, their names, and every line that the command says about a wrong command line."""

import hashlib

import pytest
from sweep_stub import CONFIG, sweep

from lightning_ire._checks import ConfigurationError
from lightning_ire.sweeps import Study, _study, main
from lightning_ire.sweeps._grid import Grid, Trial
from lightning_ire.sweeps._options import read_options
from lightning_ire.sweeps._study import code


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_trials_are_all_combinations_with_values_as_typed():
    grid = Grid({"model.lr": ("5e-4", "0.10"), "seed_everything": ("0", "1")})
    assert [trial.command for trial in grid.trials] == [
        ["--model.lr", lr, "--seed_everything", seed] for lr in ("5e-4", "0.10") for seed in ("0", "1")
    ]
    assert grid.trials[0].name == "model.lr=5e-4,seed_everything=0"
    assert grid.keys == ["model.lr"]
    assert Grid({"a": ("-1e-3", "x")}).trials[0].command == ["--a=-1e-3"]  # as two words the value would be a flag


def test_negative_numbers_are_values(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    values = ["-1e-3", "-1", "-.5", "-inf", "2"]
    given = read_options(["--config", "c.yaml", "--grid", "a", *values, "--grid", "b", "-2E5", "--baseline"])
    assert given.grid.values == {"a": tuple(values), "b": ("-2E5",)}
    assert given.baseline


def test_the_study_knows_numbers_by_size_and_texts_by_themselves(tmp_path):
    assert code("0.90") == code("9e-1") == 0.9
    assert code("SAM") == int(hashlib.sha256(b"SAM").hexdigest()[:12], 16) != code("sam")
    with Study(tmp_path, [{"a": "0.9"}]).claim() as attempt:
        attempt.complete(1.0)
    assert Study(tmp_path, [{"a": 0.90}]).to_do() == []
    assert Study(tmp_path, [{"a": "0.9", "b": 1.0}]).to_do() == [{"a": "0.9", "b": 1.0}]


def test_names_fit_every_file_system_and_differ():
    names = [Trial({"data.path": value}).name for value in ("/a b", "/a/b", "x" * 300, "x" * 301, "[1, 2]")]
    assert len(set(names)) == 5
    assert all(len(name) < 140 and not set(name) & set(' /\\:*?"<>|[]') for name in names)


def test_baseline_keeps_the_keys_that_are_not_of_ire():
    grid = Grid({"ire.kappa": ("1", "2"), "ire.gamma": ("0.9",), "seed_everything": ("0", "1")}).baseline()
    assert [trial.name for trial in grid.trials] == [f"baseline,ire.kappa=0,seed_everything={seed}" for seed in "01"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            "", "Expected `--grid` to be a key and its values, as in --grid ire.kappa 1 2, got none.", id="none"
        ),
        pytest.param(
            "--grid", "Expected `--grid` to be a key and its values, as in --grid ire.kappa 1 2, got none.", id="empty"
        ),
        pytest.param("--grid ire.kappa", "Expected `--grid ire.kappa` to have values, got 'none'.", id="no-values"),
        pytest.param(
            "--grid a 1 --grid a 2",
            "Expected `--grid a` to be given once, got it twice: give all values to one.",
            id="repeated-key",
        ),
        pytest.param(
            "--grid a 1 2 1.0", "Expected `--grid a` to have different values, got 1 2 1.0.", id="repeated-value"
        ),
        pytest.param(
            "--grid trainer.logger.version 1",
            "Expected `trainer.logger.version` to be left to the sweep, got it in --grid or behind `--`.",
            id="logger-in-grid",
        ),
        pytest.param(
            "--grid a 1 -- --trainer.logger=false",
            "Expected `trainer.logger` to be left to the sweep, got it in --grid or behind `--`.",
            id="logger-behind",
        ),
        pytest.param(
            "--grid a 1 -- --config x.yaml",
            "Expected `config` to be left to the sweep, got it in --grid or behind `--`.",
            id="config-behind",
        ),
        pytest.param(
            "--grid a 1 -- --b -1 --ckpt_path x",
            "Expected `ckpt_path` to be left to the sweep, got it in --grid or behind `--`.",
            id="checkpoint-behind",
        ),
        pytest.param(
            "--grid a 1 -- --a 2", "Expected `a` to be set in one place, got it in --grid and behind `--`.", id="twice"
        ),
        pytest.param("--grid a 1 --mode up", "Expected `--mode` to be one of 'max', 'min', got 'up'.", id="mode"),
        pytest.param(
            "--grid a 1 --name a/b", "Expected `--name` to be of letters, digits and ._+-, got 'a/b'.", id="name"
        ),
        pytest.param(
            "--grid a 1 --name ..", "Expected `--name` to be of letters, digits and ._+-, got '..'.", id="folder-above"
        ),
        pytest.param(
            "--grid a 1 -- --test_after_fit false",
            "Expected `test_after_fit` to be true for `test/accuracy`, got false.",
            id="no-test",
        ),
        pytest.param(
            "--grid test_after_fit true no",
            "Expected `test_after_fit` to be true for `test/accuracy`, got no.",
            id="no-test-in-a-cell",
        ),
        pytest.param(
            "--grid a 1 --gird b 2",
            "unrecognized arguments: --gird b 2 (python cli.py sweep --help)",
            id="misspelt",
        ),
        pytest.param(
            "--grid a 1 --table",
            "Expected the database sweeps/c.db to be there, got nothing: no run of this sweep yet.",
            id="no-database",
        ),
        pytest.param(
            "--grid a 1 --storage nonsense",
            "Expected `--storage` to be a database that answers, got: Could not parse SQLAlchemy URL from given URL "
            "string",
            id="storage",
        ),
    ],
)
def test_wrong_command_line_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(_study.time, "sleep", lambda seconds: None)
    assert sweep(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(("arguments", "got"), [([], "'none'"), (["--config", "nowhere.yaml"], "'nowhere.yaml'")])
def test_no_config_is_one_line(arguments, got, capsys):
    assert main([*arguments, "--grid", "a", "1"]) == 2
    assert capsys.readouterr().err == f"error: Expected `--config` to be a file, got {got}.\n"


def test_a_metric_of_the_test_needs_a_test(capsys):
    assert sweep("--grid a 1", config="test_after_fit: false\n") == 2
    assert capsys.readouterr().err == (
        "error: Expected `test_after_fit` to be true for `test/accuracy`, got it neither in c.yaml nor behind `--`: "
        "add -- --test_after_fit true.\n"
    )


def test_missing_optuna_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert sweep("--grid a 1", config=CONFIG) == 2
    assert capsys.readouterr().err == "error: A sweep needs optuna: pip install 'lightning-ire[sweep]'\n"
    with pytest.raises(ConfigurationError, match=r"lightning-ire\[sweep\]"):
        _study.optuna()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--grid ire.kappa 1 2 --grid ire.gamma 0.99 0.9 0.8 --grid seed_everything 0 1 2" in text
    assert "130: Ctrl-C" in text
