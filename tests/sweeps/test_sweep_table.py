"""The table, character by character, and the paper's numbers in it."""

import re
import sys

import pytest

from lightning_ire.sweeps._grid import Grid
from lightning_ire.sweeps._heat_map import save_heat_map
from lightning_ire.sweeps._table import Results, table
from lightning_ire.sweeps.paper import PAPER

KAPPAS, GAMMAS, SEEDS = {"ire.kappa": ("2", "1")}, {"ire.gamma": ("0.99", "0.9")}, {"seed_everything": ("0", "1")}
TOP1 = "test/accuracy"


def results(values: dict, *metrics: float | None, tag: str = "test/accuracy", prefix: str = "") -> Results:
    """Results of the trials in the order of the grid; None: not there."""
    return Results(Grid(values, prefix), [None if value is None else {tag: value} for value in metrics])


def test_two_keys_with_seeds_a_baseline_and_the_paper():
    ours = results({**KAPPAS, **GAMMAS, **SEEDS}, 0.961, 0.963, 0.95, 0.95, 0.97, None, None, None)
    base = results({"ire.kappa": ("0",), **SEEDS}, 0.958, 0.959, prefix="baseline,")
    assert table("cifar10_wrn28_10_sgd_ire", "test/accuracy", "test/accuracy", "max", ours, base) == (
        "# cifar10_wrn28_10_sgd_ire: test/accuracy (%)\n"
        "\n"
        "mean ± sample standard deviation over seed_everything; 7 of 10 runs, 3 missing\n"
        "\n"
        "| ire.kappa \\ ire.gamma | 0.9                | 0.99               |\n"
        "| --------------------- | ------------------ | ------------------ |\n"
        "| 1                     | -                  | 97.00 (n=1 of 2)   |\n"
        "| 2                     | 95.00 ± 0.00 (n=2) | 96.20 ± 0.14 (n=2) |\n"
        "\n"
        "|                                         | here               | paper, Table 1 |\n"
        "| --------------------------------------- | ------------------ | -------------- |\n"
        "| baseline (ire.kappa 0)                  | 95.85 ± 0.07 (n=2) | SGD 95.84      |\n"
        "| best cell (ire.kappa 2, ire.gamma 0.99) | 96.20 ± 0.14 (n=2) | SGD-IRE 96.24  |\n"
        "\n"
        "Best cell: the best mean test/accuracy of 3 cells; the paper's number is the best of its grid as well.\n"
    )


def test_flags_that_make_the_runs_others_than_the_config():
    ours = results(KAPPAS, 0.5, 0.6)
    text = table("cifar10_resnet56_sgd_ire", TOP1, TOP1, "max", ours, None, ("--trainer.max_epochs", "1", "--x", "a b"))
    assert "\n\n2 of 2 runs; all with `--trainer.max_epochs 1 --x 'a b'`\n\n" in text


def test_one_key_without_seeds_or_paper():
    ours = results(KAPPAS, 1.23456, 0.00012346, tag="val/loss")
    assert table("digits", "val/loss", "val/loss", "min", ours, None) == (
        "# digits: val/loss\n"
        "\n"
        "2 of 2 runs\n"
        "\n"
        "| ire.kappa | val/loss  |\n"
        "| --------- | --------- |\n"
        "| 1         | 0.0001235 |\n"
        "| 2         | 1.235     |\n"
        "\n"
        "|                         | here      |\n"
        "| ----------------------- | --------- |\n"
        "| best cell (ire.kappa 1) | 0.0001235 |\n"
        "\n"
        "Best cell: the best mean val/loss of 2 cells.\n"
    )


def test_three_keys_are_one_row_each():
    grid = {**KAPPAS, **GAMMAS, "ire.perturbation": ("SAM", "AverageSAM")}
    text = table("digits", "test/accuracy", "test/accuracy", "max", results(grid, *[0.5] * 7, None), None)
    assert text.split("\n\n")[2].splitlines() == [
        "| ire.kappa | ire.gamma | ire.perturbation | test/accuracy |",
        "| --------- | --------- | ---------------- | ------------- |",
        "| 1         | 0.9       | SAM              | 50.00         |",
        "| 1         | 0.9       | AverageSAM       | -             |",
        "| 1         | 0.99      | SAM              | 50.00         |",
        "| 1         | 0.99      | AverageSAM       | 50.00         |",
        "| 2         | 0.9       | SAM              | 50.00         |",
        "| 2         | 0.9       | AverageSAM       | 50.00         |",
        "| 2         | 0.99      | SAM              | 50.00         |",
        "| 2         | 0.99      | AverageSAM       | 50.00         |",
    ]


def test_the_cells_of_table_4_are_compared_one_by_one():
    ours = results({"ire.kappa": ("2",), "ire.gamma": (".6", ".8", ".9")}, 0.79, None, 0.80)
    text = table("imagenet_vit_s16_admire", "test/accuracy", "test/accuracy", "max", ours, None)
    rows = [re.split(r" +\| *", line.strip("| ")) for line in text.split("\n\n")[3].splitlines()[2:]]
    assert rows == [
        ["baseline", "-", "AdamW 78.70"],
        ["best cell (ire.kappa 2, ire.gamma .9)", "80.00"],
        ["the paper's cell (ire.kappa 2, ire.gamma 0.6)", "79.00", "AdmIRE 79.00"],
        ["the paper's cell (ire.kappa 2, ire.gamma 0.8)", "-", "AdmIRE 79.10"],
    ]
    assert text.endswith("of 2 cells.\n")


def test_a_metric_that_is_not_in_the_paper_has_no_column_of_it():
    ours = results(KAPPAS, 3.0, 2.0, tag="sharpness/trace_fisher")
    text = table("cifar10_resnet56_sam_ire", "sharpness/trace_fisher", "test/accuracy", "max", ours, None)
    assert "paper" not in text
    assert "| best cell | -    |" in text


def test_the_numbers_of_the_paper():
    """Method and top-1 (/top-5) accuracy, copied row by row from Tables 1 to 4."""
    told = {
        name: ", ".join(
            "/".join([f"{r.method} {r.percent[TOP1]}", *(str(r.percent[t]) for t in r.percent if t != TOP1)])
            for r in (result.baseline, *result.rows)
        )
        for name, result in PAPER.items()
    }
    assert told == {
        "cifar10_wrn28_10_sgd_ire": "SGD 95.84, SGD-IRE 96.24",
        "cifar10_wrn28_10_sam_ire": "SAM 96.58, SAM-IRE 96.7",
        "cifar100_wrn28_10_sgd_ire": "SGD 80.81, SGD-IRE 81.49",
        "cifar100_wrn28_10_sam_ire": "SAM 83.05, SAM-IRE 83.5",
        "cifar10_resnet56_sgd_ire": "SGD 93.49, SGD-IRE 93.78",
        "cifar10_resnet56_sam_ire": "SAM 94.05, SAM-IRE 94.46",
        "cifar100_resnet56_sgd_ire": "SGD 72.81, SGD-IRE 73.78",
        "cifar100_resnet56_sam_ire": "SAM 75.54, SAM-IRE 75.86",
        "imagenet_resnet50_sgd_ire": "SGD 76.81/93.31, SGD-IRE 77.04/93.58",
        "imagenet_resnet50_sam_ire": "SAM 77.47/93.9, SAM-IRE 77.92/94.12",
        "cifar100_vit_t_admire": "AdamW 63.9, AdmIRE 67.05",
        "cifar100_vit_t_sam_ire": "SAM 64.25, SAM-IRE 67.33",
        "cifar100_vit_s_admire": "AdamW 65.43, AdmIRE 68.39",
        "cifar100_vit_s_sam_ire": "SAM 66.93, SAM-IRE 70.47",
        "imagenet_vit_s16_admire": "AdamW 78.7/94.0, AdmIRE 79.0/94.3, AdmIRE 79.1/94.2",
    }


def test_every_paper_result_has_its_config_in_the_house_pattern():
    assert all(re.fullmatch(r"[a-z0-9]+_[a-z0-9_]+_(sgd_ire|sam_ire|admire)", name) for name in PAPER)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        pytest.param({**KAPPAS, **GAMMAS, **SEEDS}, True, id="two"),
        pytest.param({**KAPPAS, **SEEDS}, False, id="one"),
        pytest.param({**KAPPAS, "ire.perturbation": ("SAM", "AverageSAM")}, False, id="no-numbers"),
        pytest.param({**KAPPAS, **GAMMAS, "model.lr": ("1", "2")}, False, id="three"),
    ],
)
def test_heat_map_of_two_numbers(values, drawn, tmp_path):
    ours = results(values, *(0.9 + 0.01 * i for i in range(len(Grid(values).trials))))
    assert save_heat_map(tmp_path / "new" / "a.png", "digits", "test/accuracy", ours) is drawn
    assert (tmp_path / "new" / "a.png").is_file() is drawn


def test_no_heat_map_without_matplotlib_or_runs(tmp_path, monkeypatch):
    grid = {**KAPPAS, **GAMMAS}
    assert not save_heat_map(tmp_path / "a.png", "digits", "test/accuracy", results(grid, *[None] * 4))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not save_heat_map(tmp_path / "a.png", "digits", "test/accuracy", results(grid, *[0.5] * 4))
    assert not list(tmp_path.iterdir())
