"""Measure what is missing, then write the figures, benchmarks/CLAIMS.md and the README's table of verdicts.

PYTHONPATH=benchmarks python -m claims [CLAIM ...] [--report]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import sys
import time
from functools import partial
from types import ModuleType

import report

from claims._report import FIGURES, ROOT
from claims._runs import collect, known

CLAIMS = [
    "trajectories",
    "drift",
    "sharpness_grid",
    "accuracy",
    "language",
    "step_cost",
    "ablations",
    "relatives",
    "edge",
    "downstream",
    "pretraining",
    "optimizers",
    "robustness",
    "regularization",
]
SIZES = ("default", "full", "tiny")
README, PAGE = ROOT / "README.md", ROOT / "benchmarks" / "CLAIMS.md"
BEGIN = "<!-- claims: made by benchmarks/claims, checked by tests/test_claims.py -->\n"
END = "<!-- end of claims -->"
TITLE = """# The paper's claims, tested

What Wang et al. 2024 ([arXiv 2405.20763](https://arxiv.org/abs/2405.20763)) say, and what users ask beyond it, at a
size for two CPU cores. These are small problems: what does not show here may show at the paper's sizes, which nobody
has run with this package yet, and the other way round. `make claims` makes the runs that benchmarks/claims/results
lacks and writes this page. To measure anew, delete the results: then `make claims` makes fewer trials, seeds and tasks
(no claim takes more than 45 minutes on two cores), `CLAIMS_SIZE=full make claims` all runs of this page (about five
hours). Other processors round differently, so what the trained networks give differs in detail; the text, the standard
library's source, also depends on the version of Python.

Results of a comparison are as good as its tuning. Every method gets the same number of trials, on seeds that are not
reported; intervals are 95 % (Student's t over seeds, paired where two methods are compared).

"""


def claim(name: str) -> ModuleType:
    return importlib.import_module(f"claims.{name}")


def summary() -> str:
    """The table of verdicts."""
    verdicts = {name: claim(name).verdict(known(name)) for name in CLAIMS}
    rows = [[claim(name).QUESTION, f"**{one.short}**", one.brief] for name, one in verdicts.items()]
    return report.table(["claim", "verdict here", "measured"], rows) + "\n"


def page() -> str:
    """The text of CLAIMS.md."""
    parts = [TITLE]
    for name in CLAIMS:
        module, runs = claim(name), known(name)
        verdict = module.verdict(runs)
        short = verdict.short[0].upper() + verdict.short[1:]
        parts.append(f"## {module.QUESTION}\n\n**{short}.** {verdict.sentence}\n\n")
        if (FIGURES / f"{name}.png").exists():
            parts.append(f"![{module.QUESTION}](../docs/claims/{name}.png)\n\n")
        parts.append(f"{module.tables(runs)}\n\n{inspect.cleandoc(module.__doc__ or '')}\n\n")
        for machine, count in runs.machines():
            made = ", ".join(value if key == "hardware" else f"{key} {value}" for key, value in machine.items())
            parts.append(f"*{count} runs: {made}*\n\n")
    return "".join(parts).rstrip() + "\n"


def write() -> None:
    """CLAIMS.md and the README's table."""
    PAGE.write_text(page())
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + summary() + END + rest.split(END, 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CLAIM", help=f"one of {', '.join(CLAIMS)}; none: all")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended, too
    size = os.environ.get("CLAIMS_SIZE", "default")
    if size not in SIZES[:2]:
        parser.error(f"Expected CLAIMS_SIZE to be default or full, got {size!r}.")
    if unknown := set(arguments.names) - set(CLAIMS):
        parser.error(f"Expected names among {', '.join(CLAIMS)}, got {', '.join(sorted(unknown))}.")
    for name in arguments.names or CLAIMS:
        begun = time.monotonic()
        if not arguments.report:
            collect(known(name), partial(claim(name).plan, size), claim(name).measure, name)
        FIGURES.mkdir(exist_ok=True)
        claim(name).draw(known(name))
        verdict = claim(name).verdict(known(name))
        print(f"{name}: {verdict.short}. {verdict.sentence} ({time.monotonic() - begun:.0f} s)", flush=True)
    write()


if __name__ == "__main__":
    main()
