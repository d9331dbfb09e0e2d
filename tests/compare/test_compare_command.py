"""The command with runs that take no time: methods and flags, resuming, faults, what is printed and written."""

import json
import re
from pathlib import Path

import pytest
from compare_stub import CONFIG, METHODS, SMALL, TUNE, StubProcess, compare

from lightning_ire import ConfigurationError
from lightning_ire.compare import Choice, Range, _command
from lightning_ire.compare._options import read_options

ALL = f"{METHODS} {TUNE} {SMALL}"


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_command, "_Process", StubProcess)
    monkeypatch.setattr("lightning_ire.compare._work._POLL_SECONDS", 0.0)
    for name, value in {"commands": [], "names": [], "outcomes": {}, "most_at_once": 0, "at_once": 0}.items():
        monkeypatch.setattr(StubProcess, name, value)
    return StubProcess


def read(arguments: str):
    Path("c.yaml").write_text(json.dumps(CONFIG))
    return read_options(["--config", "c.yaml", *arguments.split()])


# Methods and flags


def test_each_method_has_its_own_flags_and_tunes_what_it_uses() -> None:
    options = read(f"{ALL} --tune ire.gamma 0.8,0.9,0.99 --tune model.width 8 64 IRE -- --data.seed 1")
    one = options.design
    assert {name: " ".join(words) for name, words in options.words.items()} == {
        "SGD": "--ire.kappa 0",
        "SAM": "--ire.kappa 0 --ire.perturbation SAM",
        "IRE": "--ire.kappa 2",
    }
    assert options.flags == ["--data.seed", "1"]
    tuned = {method.name: set(one.tuned(method)) for method in one.methods}
    assert tuned == {
        "SGD": {"model.lr"},
        "SAM": {"model.lr", "ire.perturbation.rho"},
        "IRE": {"model.lr", "ire.gamma", "model.width"},
    }
    assert one.tuned(one.by_name["IRE"])["ire.gamma"] == Choice(("0.8", "0.9", "0.99"))
    assert one.tune["model.lr"] == Range(0.01, 1.0, log=True)
    assert (one.trials, one.seeds, one.tuning_seeds) == (4, 3, 1)
    assert (one.metric, one.report) == ("val/accuracy", "test/accuracy")


def test_controls_of_what_boosts() -> None:
    one = read(f"{ALL} --controls --tune ire.gamma 0.8,0.9").design
    controls = [method for method in one.methods if method.control_of]
    assert [(method.name, method.control_of) for method in controls] == [
        ("IRE, gamma = 1", "IRE"),
        ("IRE, random mask", "IRE"),
    ]
    assert controls[0].settings["ire.gamma"] == "1"
    assert "ire.gamma" not in one.tuned(controls[0])
    assert controls[1].settings["ire.curvature"] == "RandomMask"
    assert "ire.gamma" in one.tuned(controls[1])
    assert one.pairs[-2:] == [("IRE", "IRE, gamma = 1"), ("IRE", "IRE, random mask")]


def test_the_configs_own_kappa_and_a_tuned_one_boost() -> None:
    tuned = {name: set(read(f"--method A {flags} --method B --ire.kappa 0 --tune ire.gamma 0.8,0.9").design.tuned(
        read(f"--method A {flags} --method B --ire.kappa 0 --tune ire.gamma 0.8,0.9").design.by_name["A"]
    )) for name, flags in {"own": "", "preset": "--ire.preset lite"}.items()}  # fmt: skip
    assert tuned == {"own": {"ire.gamma"}, "preset": {"ire.gamma"}}


def test_less_is_better_unless_it_is_an_accuracy() -> None:
    for metric, report, modes in (
        ("val/loss", "", ("min", "min")),
        ("val/loss", "test/accuracy", ("min", "max")),
        ("val/accuracy", "", ("max", "max")),
    ):
        one = read(f"{METHODS} {TUNE} --metric {metric}" + (f" --report {report}" if report else "")).design
        assert (one.mode, one.report_mode) == modes
    assert read(f"{METHODS} {TUNE} --metric val/f1 --mode max").design.report_mode == "max"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Expected at least two methods to compare, got none"),
        ("--method", "Expected a name after `--method`, got 'nothing'"),
        ("--method A --method A", "Expected methods to have different names, got 'A' twice"),
        ("--method A word", "Expected flags behind `--method A`, got 'word'"),
        (f"{METHODS} --tune", "Expected a key and its range behind `--tune`, got 'nothing'"),
        (f"{METHODS} --tune model.lr low high", "Expected `--tune model.lr` to have two numbers"),
        (f"{METHODS} --tune model.lr 1 0.1", "lower one first, got 1 and 0.1 behind `--tune model.lr`"),
        (f"{METHODS} --tune model.lr 0.1 1 lgo", r"names of methods \(SGD, SAM, IRE\) behind .*, got 'lgo'"),
        (f"{METHODS} --tune model.lr 0.1 1 --tune model.lr 0.1 1", "`--tune model.lr` to be given once, got it twice"),
        ("--method A --ire.kappa 0 --method B --ire.kappa 0 --tune ire.gamma 0.1 1", "a use for `--tune ire.gamma`"),
        (f"{METHODS} {TUNE} --metric test/accuracy", "validation metric, got test/accuracy: .* Write --re"),
        (f"{METHODS} {TUNE} --jobs 0", "Expected `--jobs` to be a whole number >= 1, got 0"),
        (f"{METHODS} {TUNE} --effect -1", "Expected `--effect` to be a number above 0, got -1"),
        (f"{METHODS} {TUNE} -- --seed_everything 1", "`seed_everything` to be left to the comparison"),
        (f"{METHODS} {TUNE} -- --model.lr 1", "`model.lr` to be set in one place, got it behind --tune and `--`"),
        ("--method A --ckpt_path x --method B", "`ckpt_path` to be left to the comparison, got it behind `--method`"),
        ("--method A --trainer.max_steps 9 --method B", "`trainer.max_steps` to be the same for all methods"),
        ("--method A --method B --controls --tune model.lr 0 1 -- --ire.kappa 0", "`--controls`, got none"),
        (
            "--method A --method B --ire.start_epoch 2 --tune model.lr 0 1 --budget passes",
            "Expected `ire.start_step`, a fraction of the run, with --budget passes, got `ire.start_epoch` for B",
        ),
        (f"{METHODS} {TUNE} --tune seed_everything 0,1", "`seed_everything` to be left to the comparison"),
        (f"{METHODS} {TUNE} --budget hours", "Expected `--budget` to be one of 'steps', 'passes', 'seconds'"),
        (f"{METHODS} {TUNE} --trails 8", "unrecognized arguments: --trails 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line_before_anything_runs(arguments: str, message: str, runs, capsys) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(arguments)
    assert compare(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert runs.names == []


# Runs


def test_all_runs_are_made_once_and_the_same_command_makes_none_again(runs, capsys) -> None:
    assert compare(ALL) == 0
    out = capsys.readouterr().out
    assert [name for name in runs.names if name.startswith("check")] == ["check,SGD", "check,SAM", "check,IRE"]
    made = [name for name in runs.names if not name.startswith("check")]
    assert len(made) == len(set(made)) == 3 * (4 + 3)
    assert f"[{len(made)}/{len(made)}] " in out
    assert " left\n" in out
    assert "SAM is better than SGD by 2.0" in out
    assert "at 2.00 times the passes over these seeds, which may be luck of the search: there were fewer than 8" in out
    assert "IRE is not told apart from SGD" in out
    assert compare(ALL) == 0
    assert len(runs.names) == len(made) + 3
    assert capsys.readouterr().out.split("\n\n", 1)[1] in out


@pytest.mark.slow
def test_flags_arrive_in_their_order_and_values_as_numbers(runs) -> None:
    assert compare(f"{ALL} -- --data.seed 01") == 0
    place = runs.names.index("SAM,trial=0,seed=1000")
    flags = list(runs.commands[place])
    wanted = ["config", "data.seed", "ire.kappa", "ire.perturbation", "test_after_fit", "model.lr"]
    assert [flag for flag in flags if flag in wanted] == wanted
    assert runs.commands[place]["test_after_fit"] == "true"
    assert runs.commands[place]["trainer.callbacks+"] == "lightning_ire.compare.RunRecord"
    assert 0.01 <= float(runs.commands[place]["model.lr"]) <= 1


@pytest.mark.slow
def test_more_seeds_and_trials_go_on_from_what_there_is(runs) -> None:
    assert compare(ALL) == 0
    before = len(runs.names)
    assert compare(ALL.replace("--seeds 3", "--seeds 5")) == 0
    assert sorted(re.sub(".*,seed=", "", name) for name in runs.names[before:]) == ["3", "3", "3", "4", "4", "4"]


@pytest.mark.slow
def test_another_range_is_another_study(runs, capsys) -> None:
    assert compare(ALL) == 0
    before = len(runs.names)
    assert compare(ALL.replace("0.01 1 log", "0.01 2 log")) == 2
    assert "give this one a name of its own with `--name`" in capsys.readouterr().err
    assert len(runs.names) == before


@pytest.mark.slow
def test_jobs_are_at_work_at_the_same_time(runs) -> None:
    assert compare(f"{ALL} --jobs 3") == 0
    assert runs.most_at_once == 3


def test_a_failing_run_is_one_line_and_the_others_go_on(runs, capsys) -> None:
    runs.outcomes = {"SAM,trial=3,seed=1000": 1, "IRE,trial=1,seed=1000": {"val/accuracy": float("nan")}}
    assert compare(ALL) == 1
    captured = capsys.readouterr()
    assert captured.err == "failed: SAM, trial 3, seed 1000: error: the last line\n"
    assert "SAM is better than SGD" in captured.out
    assert "SAM, trial 3, seed 1000" in Path("compare/c/report.md").read_text()
    before = len(runs.names)
    assert compare(ALL) == 0  # it is made again
    assert runs.names[before:] == ["SAM,trial=3,seed=1000"]


def test_a_refused_key_ends_it_before_anything_trains(runs, capsys) -> None:
    runs.outcomes = {"check,SAM": 2}
    assert compare(ALL) == 2
    assert capsys.readouterr().err == "error: SAM cannot be run: the last line\n"
    assert runs.names == ["check,SGD", "check,SAM"]


def test_a_metric_that_nobody_logs_is_one_line_before_anything_trains(runs, capsys) -> None:
    assert compare(ALL.replace("val/accuracy", "val/acc")) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: Expected `--metric` to be logged, got 'val/acc': a run of SGD logs test/accuracy, val/accuracy.\n"
    )
    assert runs.names == ["check,SGD"]
    assert not list(Path("compare/c").glob("check*"))


@pytest.mark.slow
def test_ctrl_c_loses_nothing(runs, capsys) -> None:
    runs.outcomes = {"SAM,trial=0,seed=1000": KeyboardInterrupt()}
    assert compare(ALL) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from there\n"
    before = set(runs.names)
    assert compare(ALL) == 0
    again = runs.names[len(before) :]
    assert again[0] == "SAM,trial=0,seed=1000"
    assert not before & set(again[1:])


@pytest.mark.slow
def test_the_budget_of_passes_gives_sam_half_the_steps(runs) -> None:
    assert compare(f"{ALL} --budget passes") == 0
    lengths = {}
    for name, flags in zip(runs.names, runs.commands, strict=True):
        if not name.startswith("check"):
            lengths.setdefault((name.split(",")[0], "seed=2000" in name), set()).add(
                (flags.get("trainer.max_steps"), flags.get("trainer.max_epochs"))
            )
    assert lengths == {
        **{(name, True): {(None, None)} for name in ("SGD", "SAM", "IRE")},
        ("SGD", False): {("100", "4")},
        ("IRE", False): {("100", "4")},
        ("SAM", False): {("50", "2")},
    }


@pytest.mark.slow
def test_halving_stops_runs_at_a_quarter(runs) -> None:
    assert compare(f"{ALL} --halving") == 0
    stopped = [name for name, flags in zip(runs.names, runs.commands, strict=True)
               if flags.get("trainer.callbacks.stop_after") == "0.25"]  # fmt: skip
    assert len(stopped) == 3 * 4
    assert all(name.endswith(",stop=0.25") for name in stopped)
    assert (
        "Hopeless trials were stopped, so the luck of the search is not known"
        in Path("compare/c/report.md").read_text()
    )


# What is written


def test_the_report_opens_offline_and_says_the_same_in_all_forms(runs) -> None:
    assert compare(f"{ALL} --controls --effect 0.1") == 0
    folder = Path("compare/c")
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["sentence"] in text
    assert numbers["sentence"] in page
    assert not re.search(r"(src|href)=.?(https?:|/|\w+\.png)", page)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["against_passes.png", "against_settings.png", "differences.png"]
    assert page.count("data:image/png;base64,") == 3
    assert all(f"({name})" in text for name in pictures)
    assert "0.10 points: " in text
    assert len(numbers["runs"]) == 5 * (4 + 3)
    assert {one["treated"] for one in numbers["comparisons"]} == {"SAM", "IRE"}


@pytest.mark.slow
def test_names_of_methods_are_text_in_the_page(runs) -> None:
    assert compare(ALL.replace("--method IRE", "--method <b>IRE")) == 0
    page = Path("compare/c/report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;IRE" in page


@pytest.mark.slow
def test_sharpness_is_drawn_where_the_monitor_is_on(runs, monkeypatch) -> None:
    import compare_stub

    plain = compare_stub.logged
    monkeypatch.setattr(compare_stub, "logged", lambda flags: {**plain(flags), "sharpness/trace_fisher": 3.0})
    assert compare(ALL) == 0
    assert Path("compare/c/sharpness.png").is_file()


@pytest.mark.slow
def test_a_report_alone_runs_nothing(runs, capsys) -> None:
    assert compare(f"{ALL} --report-only") == 2
    assert "Expected the database compare/c.db to be there" in capsys.readouterr().err
    assert compare(ALL) == 0
    before = len(runs.names)
    assert compare(f"{ALL} --report-only") == 0
    assert len(runs.names) == before
