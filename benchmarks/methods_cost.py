"""What a step of each relative of SAM costs, beside SAM and plain steps, in one run.

    python benchmarks/methods_cost.py            # 10 to 20 minutes on one CPU core
    python benchmarks/report.py                  # the table and the picture

The runs take turns as in step_cost.py. Where only some steps have a second pass, a ratio is that of a whole period of
steps: the mean of 5 or 10 of them. SAM in the last tenth of a run is measured as SAM at every tenth step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from step_cost import PLAIN, SETTINGS, times
from workloads import WORKLOADS, machine

from lightning_ire import (
    GSAM,
    IRE,
    LESAM,
    SAM,
    AverageSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    Perturbation,
    StableSAM,
    WeightedSAM,
)

OUTPUT = Path(__file__).parent / "results" / "methods_cost.json"
PERIOD = 10
METHODS: dict[str, Perturbation] = {
    "AverageSAM(rho=0.05)": AverageSAM(0.05),
    "MomentumSAM(rho=0.05)": MomentumSAM(0.05),
    "SAM(rho=0.05, start_step=0.9)": SAM(0.05, interval=PERIOD),
    "LookSAM(rho=0.05, k=5)": LookSAM(0.05, k=5),
    "SAM(rho=0.05, fraction=0.25)": SAM(0.05, fraction=0.25),
    "SAM(rho=0.05)": SAM(0.05),
    "LESAM(rho_max=0.05)": LESAM(0.05),
    "FriendlySAM(rho=0.05)": FriendlySAM(0.05),
    "GSAM(rho=0.05)": GSAM(0.05),
    "StableSAM(rho=0.05)": StableSAM(0.05),
    "WeightedSAM(rho=0.05)": WeightedSAM(0.05),
    "FunctionalSAM(rho=0.05)": FunctionalSAM(0.05),
}


def alone(perturbation: Perturbation) -> Callable[[], list[Callback]]:
    return lambda: [IRE(kappa=0, perturbation=perturbation)]


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each period of steps, to the plain steps of the same rounds."""
    base = seconds[PLAIN]
    starts = range(0, len(base), PERIOD)
    return {
        name: [mean(own[i : i + PERIOD]) / mean(base[i : i + PERIOD]) for i in starts] for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--periods", type=int, default=4, help=f"of {PERIOD} steps each, at least 2")
    parser.add_argument("--only", default="Transformer", help="workloads whose names begin so")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.periods < 2:
        parser.error(f"expected --periods to be at least 2, got {options.periods}")
    if not SETTINGS.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], SETTINGS | dict(os.environ))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    content: dict[str, Any] = {"machine": machine(options.device), "device": options.device, "workloads": {}}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if {**before, "workloads": {}} == content:
            content = before
    step = argparse.Namespace(device=options.device, variants=[], against=None, precision="32-true", compile=False)
    for name in WORKLOADS:
        if not name.startswith(options.only):
            continue
        variants = {PLAIN: list, **{method: alone(made) for method, made in METHODS.items()}}
        seconds, _ = times(name, options.periods * PERIOD, step, variants)
        rows = {}
        for method, each in ratios(seconds).items():
            if method != PLAIN:
                low, middle, high = quantiles(each, n=4)
                rows[method] = {"ratio": middle, "low": low, "high": high}
                print(f"  {method:40} {middle:6.3f}  ({low:.3f} to {high:.3f})")
        parameters = sum(parameter.numel() for parameter in WORKLOADS[name].net().parameters())
        rounds, step_time = options.periods * PERIOD, median(seconds[PLAIN])
        content["workloads"][name] = {"rounds": rounds, "parameters": parameters, "seconds": step_time, "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
