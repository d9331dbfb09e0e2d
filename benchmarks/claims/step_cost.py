"""Table 5: the cost of a step with IRE over that of the base, from `make bench` (benchmarks/RESULTS.md)."""

from __future__ import annotations

from typing import Any

import report

from claims._report import Verdict, table
from claims._runs import Runs

QUESTION = "Table 5: how much longer is a step of IRE than one of its base?"
PAPER = 1.12  # AdmIRE against AdamW on one A800
ROW = "IRE, K=10"


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    return []


def measure(settings: Any) -> Any:
    raise NotImplementedError("`make bench` measures")


def _ratios() -> dict[str, float]:
    return {name: one["rows"][ROW]["ratio"] for name, one in report.load(report.STEPS)["workloads"].items()}


def verdict(runs: Runs) -> Verdict:
    ratios = _ratios()
    sentence = (
        f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} on four networks (K = 10, one CPU thread); the "
        f"paper measured {PAPER} on an A800. On a GPU nothing is measured yet."
    )
    return Verdict("reproduced" if max(ratios.values()) <= PAPER else "not reproduced", sentence, sentence)


def tables(runs: Runs) -> str:
    ratios = _ratios()
    rows = [[f"`{report.CODE[ROW].strip('`').split('`')[0]}`", *(f"{one:.3f}" for one in ratios.values()), f"{PAPER}"]]
    return table(["step, against the base's", *ratios, "paper, AdmIRE on an A800"], rows)


def draw(runs: Runs) -> None:
    """Nothing: benchmarks/report.py draws docs/step_cost.png."""
