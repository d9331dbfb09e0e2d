"""Measure what is missing, then write the figures, benchmarks/CLAIMS.md and the README's table of verdicts.

PYTHONPATH=benchmarks python -m claims [CLAIM ...] [--report]
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import report

from claims._report import FIGURES, ROOT
from claims._runs import Runs, collect

CLAIMS = ["trajectories", "drift", "sharpness_grid", "accuracy", "language", "ablations"]
RESULTS = Path(__file__).parent / "results"
SIZES = ("default", "full", "tiny")


def claim(name: str) -> ModuleType:
    return importlib.import_module(f"claims.{name}")


def known(name: str) -> Runs:
    """What is committed of a claim."""
    return Runs(RESULTS / f"{name}.json")


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
        verdict = claim(name).verdict(known(name))
        claim(name).draw(known(name))
        print(f"{name}: {verdict.short}. {verdict.sentence} ({time.monotonic() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
