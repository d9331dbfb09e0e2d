"""The command with runs that take no time: completeness, resuming, faults, the baseline, exit codes."""

from pathlib import Path

import pytest
from sweep_stub import CONFIG, StubRuns, flags_of, leave_checkpoint, sweep

from lightning_ire.sweeps import Study, _runs

ONE = "--grid ire.kappa 1"
CELLS = [f"ire.kappa={kappa},ire.gamma={gamma}" for kappa in (1, 2) for gamma in (0.8, 0.9)]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(monkeypatch):
    stub = StubRuns()
    monkeypatch.setattr(_runs, "run_process", stub)
    return stub


def test_every_cell_runs_once_and_the_same_command_runs_none_again(runs, capsys):
    assert sweep() == 0
    assert runs.cells == CELLS
    out = capsys.readouterr().out
    assert "[4/4] ire.kappa=" in out
    assert "[1/4] " in out
    assert f"running {CELLS[0]}: output in sweeps/c/{CELLS[0]}/output.log" in out
    assert sweep() == 0
    assert runs.cells == CELLS
    again = capsys.readouterr().out
    assert again == out[out.index("# c: ") :]


def test_the_result_is_the_last_value_of_the_tag(runs, capsys):
    assert sweep("--grid ire.kappa 2") == 0
    assert "[1/1] ire.kappa=2 test/accuracy 92.00 (0 s)" in capsys.readouterr().out


def test_values_and_further_flags_arrive_as_typed(runs):
    assert sweep("--grid ire.kappa 1e-3 --grid model.lr 5e-4 -- --data.seed 01 --model.wd=5e-4") == 0
    (arguments,) = runs.commands
    cell = "ire.kappa=1e-3,model.lr=5e-4"
    assert (
        arguments[1:]
        == (
            "-m lightning_ire.cli fit --config c.yaml --data.seed 01 --model.wd=5e-4 --ire.kappa 1e-3 --model.lr 5e-4 "
            "--trainer.logger false --trainer.logger lightning.pytorch.loggers.TensorBoardLogger "
            f"--trainer.logger.default_hp_metric false --trainer.logger.save_dir sweeps/c --trainer.logger.name {cell}"
        ).split()
    )


def test_failed_runs_do_not_stop_the_others_and_are_done_again(runs, capsys):
    runs.outcomes = {CELLS[0]: 1, CELLS[2]: -9}
    assert sweep() == 1
    assert runs.cells == CELLS
    captured = capsys.readouterr()
    for cell, exit_code in ((CELLS[0], 1), (CELLS[2], -9)):
        assert (
            f"failed: {cell}: exit code {exit_code}: error: the last line (output: sweeps/c/{cell}/output.log)\n"
            in captured.err
        )
    assert "2 of 4 runs, 2 missing" in captured.out
    runs.commands.clear()
    assert sweep() == 0
    assert runs.cells == [CELLS[0], CELLS[2]]
    for arguments in runs.commands:
        cell = flags_of(arguments)["trainer.logger.name"]
        assert flags_of(arguments)["ckpt_path"] == f"sweeps/c/{cell}/version_0/checkpoints/last.ckpt"


def test_a_run_continues_from_the_newest_checkpoint(runs, capsys):
    runs.outcomes = {"ire.kappa=1": 1}
    assert sweep(ONE) == 1
    for version in (2, 10, 9):
        leave_checkpoint(Path("sweeps/c/ire.kappa=1"), version)
    Path("sweeps/c/ire.kappa=1/version_11").mkdir()
    assert sweep(ONE) == 0
    newest = "sweeps/c/ire.kappa=1/version_10/checkpoints/last.ckpt"
    assert flags_of(runs.commands[1])["ckpt_path"] == newest
    assert f"running ire.kappa=1 on from {newest}, which has the same settings: output in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "config", "version", "difference"),
    [
        ("--a 1 --b=2", CONFIG, "1", "`--b` '1' there and '2' here"),
        ("--a 1 --b=1 --d", CONFIG, "1", "`--d` nothing there and '' here"),
        ("--a 1", CONFIG, "1", "`--b` '1' there and nothing here"),
        ("--a 1 --b 1", f"{CONFIG}x: [{{y: 1}}]\n", "1", "`x.0.y` nothing there and '1' here"),
        ("--a 1 --b 1", CONFIG, "2", "`lightning_ire` '1' there and '2' here"),
        ("--a 1 --b 1", CONFIG, None, "no made_with.json that says it"),
    ],
)
def test_a_new_study_adopts_no_run_with_other_settings(flags, config, version, difference, runs, capsys, monkeypatch):
    monkeypatch.setattr(_runs, "__version__", "1")
    assert sweep(f"{ONE} -- --a 1 --b 1") == 0
    made_with = Path("sweeps/c/ire.kappa=1/made_with.json")
    if version is None:
        made_with.unlink()
    else:
        monkeypatch.setattr(_runs, "__version__", version)
    before = {path: path.read_bytes() for path in Path("sweeps").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert sweep(f"--grid ire.kappa 2 1 --storage sqlite:///new/new.db -- {flags}", config=config) == 2
    assert capsys.readouterr().err == (
        "error: Expected the runs in sweeps/c/ire.kappa=1 to be made with the settings of this study, got "
        f"{difference}: give another `--name` or `--folder`, or remove that folder.\n"
    )
    assert len(runs.commands) == 1  # the cell that has nothing in its folder did not run either
    assert {path: path.read_bytes() for path in Path("sweeps").rglob("*") if path.is_file()} == before


def test_a_new_study_adopts_runs_with_the_same_settings(runs, capsys):
    assert sweep(f"{ONE} -- --a 1") == 0
    leave_checkpoint(Path("sweeps/c/ire.kappa=1"))
    capsys.readouterr()
    Path("sweeps/c.db").unlink()
    assert sweep(f"{ONE} -- --a=1", config=f"# the same\n{CONFIG}") == 0
    assert "on from sweeps/c/ire.kappa=1/version_0/checkpoints/last.ckpt, which has the same settings" in (
        capsys.readouterr().out
    )


def test_runs_that_another_sweep_makes_meanwhile_are_not_adopted(runs, capsys, monkeypatch):
    def other_sweep_too(arguments, log):
        for cell in {"ire.kappa=1", "ire.kappa=2"} - {log.parent.name}:
            leave_checkpoint(log.parent.with_name(cell))
        return runs(arguments, log)

    monkeypatch.setattr(_runs, "run_process", other_sweep_too)
    assert sweep("--grid ire.kappa 1 2") == 2
    assert len(runs.commands) == 1
    assert capsys.readouterr().err.startswith("error: Expected the runs in sweeps/c/ire.kappa=")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sweeps", "`--folder` to be a folder to write to, got 'sweeps': sweeps: Not a directory."),
        ("sweeps/c", "`--folder` to be a folder to write to, got 'sweeps': sweeps/c: Not a directory."),
        ("sweeps/c/ire.kappa=1", "`--folder` to be a folder to write to, got 'sweeps': sweeps/c/ire.kappa=1: Not a"),
        ("db", "`--storage` to be a folder to write to, got 'db/below': db: Not a directory."),
    ],
)
def test_a_file_in_the_way_is_one_line(file, message, runs, capsys):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("")
    assert sweep("--grid ire.kappa 2 1 --storage sqlite:///db/below/c.db") == 2
    assert capsys.readouterr().err.startswith(f"error: Expected {message}")
    assert not runs.commands


@pytest.mark.parametrize(
    ("logger", "replaced"),
    [
        ("{class_path: CSVLogger}", "CSVLogger"),
        ("false", "False"),
        ("[{class_path: CSVLogger}]", "[{'class_path': 'CSVLogger'}]"),
        ("null", None),
        ("{class_path: lightning.pytorch.loggers.TensorBoardLogger}", None),
    ],
)
def test_a_logger_that_is_replaced_is_said_once(logger, replaced, runs, capsys):
    config = f"{CONFIG}trainer: {{logger: {logger}}}\n"
    assert sweep(ONE, config=config) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("all runs log to TensorBoard in sweeps/c, in place of") is (replaced is not None)
    assert replaced is None or said.endswith(f" the config's trainer.logger: {replaced}")
    assert sweep(ONE, config=config) == 0
    assert "log to TensorBoard" not in capsys.readouterr().out


def test_ctrl_c_says_where_and_the_same_command_goes_on(runs, capsys):
    runs.outcomes = {CELLS[1]: KeyboardInterrupt()}
    assert sweep() == 130
    assert capsys.readouterr().err == f"stopped in {CELLS[1]}; the same command goes on from there\n"
    assert sweep() == 0
    assert sorted({*runs.cells}) == CELLS
    assert len(runs.commands) == 5


def test_a_refused_key_stops_everything(runs, capsys):
    runs.outcomes = dict.fromkeys(CELLS, 2)
    assert sweep() == 2
    assert len(runs.commands) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: the last line\n"
    assert "# c:" not in captured.out
    runs.outcomes = {}
    assert sweep(f"{ONE} -- --corrected 1") == 0  # nothing has run: the flags may still be put right
    assert len(runs.commands) == 2


@pytest.mark.parametrize(
    ("arguments", "config"),
    [(ONE, f"{CONFIG}a: 1\n"), (f"{ONE} -- --a 1", CONFIG), (f"{ONE} --baseline", f"#\n{CONFIG}")],
)
def test_another_config_or_other_flags_need_another_name(arguments, config, runs, capsys):
    assert sweep(ONE) == 0
    capsys.readouterr()
    before = Path("sweeps/c.db").read_bytes()
    assert sweep(arguments, config=config) == 2
    assert capsys.readouterr().err == (
        "error: Expected the config and the further flags to be those that the study 'c' was begun with, got others: "
        "give this one a name of its own with `--name`.\n"
    )
    assert Path("sweeps/c.db").read_bytes() == before
    assert len(runs.commands) == 1


def test_an_enlarged_grid_runs_the_new_cells_only(runs, capsys):
    assert sweep() == 0
    runs.commands.clear()
    assert sweep("--grid ire.kappa 4 1 2.0 --grid ire.gamma 0.9 0.80") == 0
    assert runs.cells == ["ire.kappa=4,ire.gamma=0.80", "ire.kappa=4,ire.gamma=0.9"]
    assert "6 of 6 runs\n" in capsys.readouterr().out
    assert sweep("--grid ire.kappa 2 --grid ire.gamma 0.9") == 0  # a smaller one runs nothing and shows its own cells
    assert len(runs.commands) == 2
    assert "1 of 1 runs\n" in capsys.readouterr().out


def test_classes_in_the_grid(runs):
    assert sweep("--grid ire.kappa 1 --grid ire.perturbation SAM") == 0
    runs.commands.clear()
    assert sweep("--grid ire.kappa 1 --grid ire.perturbation AverageSAM SAM") == 0
    assert runs.cells == ["ire.kappa=1,ire.perturbation=AverageSAM"]


def test_baseline_once_per_seed(runs, capsys):
    grid = "--grid ire.kappa 1 2 --grid ire.gamma 0.9 --grid seed_everything 0 2 --baseline"
    assert sweep(grid) == 0
    baseline = [cell for cell in runs.cells if "baseline" in cell]
    assert baseline == [f"baseline,ire.kappa=0,seed_everything={seed}" for seed in (0, 2)]
    assert len(runs.commands) == 6
    assert "ire.gamma" not in flags_of(next(a for a in runs.commands if "baseline" in a[-1]))
    out = capsys.readouterr().out
    assert "| baseline (ire.kappa 0)                 | 90.10 ± 0.14 (n=2) |" in out
    assert "| best cell (ire.kappa 2, ire.gamma 0.9) | 92.10 ± 0.14 (n=2) |" in out
    assert sweep(grid) == 0
    assert len(runs.commands) == 6


def test_a_missing_tag_is_a_failed_run(runs, capsys):
    runs.tag = "test/acc"
    assert sweep("--grid ire.kappa 1") == 1
    assert capsys.readouterr().err == (
        "failed: ire.kappa=1: no `test/accuracy` in its logs, which have test/acc, test/loss "
        "(output: sweeps/c/ire.kappa=1/output.log)\n"
    )


def test_table_runs_nothing(runs, capsys):
    grid = "--grid ire.kappa 1 2"
    runs.outcomes = {"ire.kappa=1": 1}
    assert sweep(f"{grid} -- --its flags") == 1
    capsys.readouterr()
    assert sweep(f"{grid} --table --also test/loss val/loss -- --other flags") == 0
    assert len(runs.commands) == 2
    captured = capsys.readouterr()
    assert captured.err == "no run has logged `val/loss`; there are test/accuracy, test/loss\n"
    text = captured.out[: captured.out.index("\nWritten: ")]
    assert Path("sweeps/c/table.md").read_text() == text
    assert "# c: test/accuracy (%)\n\n1 of 2 runs, 1 missing; all with `--its flags`\n" in text
    assert "# c: test/loss\n\n1 of 2 runs, 1 missing; all with `--its flags`\n" in text
    assert not list(Path("sweeps/c").glob("table.md.*"))


def test_table_of_a_study_that_is_not_there(runs, capsys):
    assert sweep(ONE) == 0
    capsys.readouterr()
    assert sweep(f"{ONE} --table --baseline") == 2
    assert capsys.readouterr().err == "error: Expected the study 'c-baseline' to be in the database, got none.\n"


def test_less_is_better(runs, capsys):
    assert sweep("--grid ire.kappa 1 2 --metric test/loss") == 0
    assert "| best cell (ire.kappa 2) | 1.08 |" in capsys.readouterr().out


def test_a_diverged_run_is_complete_and_not_the_best(runs, capsys, monkeypatch):
    values = {"ire.kappa=1": float("nan"), "ire.kappa=2": 3.0}
    monkeypatch.setattr(_runs, "last_values", lambda folder: {"val/loss": values[folder.name]})
    assert sweep("--grid ire.kappa 1 2 --metric val/loss") == 0
    out = capsys.readouterr().out
    assert "| 1         | nan      |" in out
    assert "best cell (ire.kappa 2)" in out
    assert sweep("--grid ire.kappa 1 2 --metric val/loss") == 0
    assert len(runs.commands) == 2


def test_ctrl_c_between_two_runs(runs, capsys, monkeypatch):
    to_do = Study.to_do

    def interrupted(study):
        if runs.commands:
            raise KeyboardInterrupt
        return to_do(study)

    monkeypatch.setattr(Study, "to_do", interrupted)
    assert sweep("--grid ire.kappa 1 2") == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from there\n"
