"""The published numbers are those of the committed JSON, and what was asked for was measured."""

import gc
import sys
from pathlib import Path
from typing import Any

import methods_cost
import pytest
import report
import step_cost

BLOCKS = [(path, name, text) for path, contents in report.blocks().items() for name, text in contents.items()]
WORKLOADS = {"ResNet-18", "WRN-16-4", "Transformer, 2 layers", "Transformer, 6 layers"}


@pytest.mark.parametrize(("path", "name", "text"), BLOCKS, ids=lambda each: each.name if isinstance(each, Path) else "")
def test_tables_are_those_of_the_json(path: Path, name: str, text: str) -> None:
    assert report.between(path.read_text(), name) == text, "call python benchmarks/report.py"


def test_every_row_of_every_network_was_measured() -> None:
    content = report.load(report.STEPS)
    assert content["workloads"].keys() == WORKLOADS
    for one in content["workloads"].values():
        assert one["rows"].keys() == report.ROWS.keys()
        assert one["memory"].keys() >= set(filter(None, report.ROWS.values()))
        assert one["rounds"] >= 10
    sizes = report.load(report.SIZES)
    assert {name for name in sizes["measurements"] if "step + boost" in name} == {
        f"step + boost: {optimizer}, {kind}" for optimizer in ("AdamW", "SGD") for kind in ("fused", "foreach", "plain")
    }
    for each in sizes["measurements"].values():
        assert [one["parameters"] for one in each.values()][-3:] == pytest.approx([250e6, 1e6, 200e6], rel=0.01)
    assert content["machine"] == sizes["machine"]


def test_every_relative_of_sam_was_measured() -> None:
    for one in report.load(report.METHODS)["workloads"].values():
        assert one["rows"].keys() == methods_cost.METHODS.keys()
        assert one["rounds"] >= 2 * methods_cost.PERIOD
    for name, made in methods_cost.METHODS.items():
        assert repr(made).split("(")[0] == name.split("(")[0]


def test_a_table_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    begin, end = report.marks("cost")
    file = tmp_path / "README.md"
    file.write_text(f"before\n{begin}old{end}\nafter")
    report.rewrite(file, {"cost": "new"})
    assert file.read_text() == f"before\n{begin}new{end}\nafter"


def test_a_row_says_ratio_quartiles_and_floor() -> None:
    row = {"ratio": 1.08, "low": 1.05, "high": 1.163, "floor": 1.0713}
    one: dict[str, Any] = {"parameters": 2_600_000, "seconds": 0.5, "rounds": 12, "rows": {"SAM": row}}
    assert report.step_table({"workloads": {"Net": one}}).splitlines() == [
        "|  | Net: 2.6 M, 0.5 s, 12 rounds |",
        "| --- | --- |",
        "| SAM | **1.080** (1.05 to 1.16), 1.071 |",
    ]


def test_another_checkout_is_run_beside_this_one() -> None:
    ours = {name: module for name, module in sys.modules.items() if name.startswith("lightning_ire")}
    others = step_cost.variants_of_checkout(Path(report.__file__).parents[1])
    assert others.keys() == step_cost.VARIANTS.keys()
    (here,), (there,) = step_cost.VARIANTS["SAM"](), others["SAM"]()
    assert type(here).__module__ == type(there).__module__
    assert type(here) is not type(there)
    assert ours == {name: module for name, module in sys.modules.items() if name.startswith("lightning_ire")}
    del others, there
    gc.collect()  # else a command line would find two classes of each name
