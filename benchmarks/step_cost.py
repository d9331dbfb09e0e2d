"""What a training step costs with the callback, next to the same module without it.

    python benchmarks/step_cost.py            # everything: 20 to 60 minutes on one CPU core
    python benchmarks/step_cost.py --only Transformer --rounds 6
    python benchmarks/step_cost.py --against ../other    # and with the lightning_ire of another checkout, in one run

Every variant is a run of Lightning's Trainer of its own. The runs take turns, one step each in a new order every
round, so that a slow moment of the machine hits all of them; a step is what lies between two batches that Lightning
asks for. Ratios are to the plain run's step of the same round: median (quartiles).

In a run with IRE the mask is made at every other step, which gives the cost of both kinds of step; K = 10 is nine of
one and one of the other. Floors: see `floors`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import WORKLOADS, Task, Workload, clock, machine, seconds_of

import lightning_ire

# one thread of torch in each run, and one heap for all: the pages of a thread's own heap are mapped anew each time
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
WARM_UP = 2
INTERVAL = 10
PLAIN = "without the callback"
OTHER = " of the other checkout"


def variants(package: Any) -> dict[str, Callable[[], list[Callback]]]:
    """The callbacks of each run, made of the classes of one checkout of `lightning_ire`."""
    IRE, SAM, AverageSAM = package.IRE, package.SAM, package.AverageSAM
    SampledFisher, SecondMoment = package.SampledFisher, package.SecondMoment

    class EveryOther(IRE):
        """Makes the mask at every other step."""

        def should_refresh(self, step: int, started_at: int) -> bool:
            return step % 2 == 0

    return {
        PLAIN: lambda: [],
        "off": lambda: [IRE(kappa=0)],
        "IRE": lambda: [EveryOther(gamma=0.8)],
        "IRE, fraction=0.25": lambda: [EveryOther(gamma=0.8, curvature=SampledFisher(fraction=0.25))],
        "IRE, SecondMoment": lambda: [EveryOther(gamma=0.8, curvature=SecondMoment())],
        "SAM": lambda: [IRE(kappa=0, perturbation=SAM(0.05))],
        "SAM-IRE": lambda: [EveryOther(gamma=0.8, perturbation=SAM(0.05))],
        "AverageSAM-IRE": lambda: [EveryOther(gamma=0.8, perturbation=AverageSAM(0.05))],
    }


def variants_of_checkout(folder: Path) -> dict[str, Callable[[], list[Callback]]]:
    """The same with the `lightning_ire` in a folder, beside the one that is imported already."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lightning_ire"}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        package = importlib.import_module("lightning_ire")
        if folder.resolve() not in Path(str(package.__file__)).parents:
            raise SystemExit(f"expected --against to be a checkout with a folder lightning_ire, got {folder}")
        return variants(package)
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "lightning_ire"]:
            del sys.modules[name]
        sys.modules.update(before)


VARIANTS = variants(lightning_ire)


class Passes(Callback):
    """Seconds from the begin of a backward pass to its end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.start = 0.0

    def on_before_backward(self, *args: Any) -> None:
        self.start = clock(self.device)

    def on_after_backward(self, *args: Any) -> None:
        self.seconds.append(clock(self.device) - self.start)


class Run(threading.Thread):
    """One Trainer that does a step when it is told to: the loader waits before it hands out a batch."""

    def __init__(self, workload: Workload, callbacks: list[Callback], steps: int, device: str, options: Any) -> None:
        super().__init__(daemon=True)
        self.batch = workload.data()
        self.steps = steps
        self.device = device
        self.seconds: list[float] = []
        self.go, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        torch.manual_seed(0)
        self.module: pl.LightningModule = Task(workload.net())
        if options.compile:
            self.module.net = torch.compile(self.module.net)
        if options.device == "cuda":
            self.batch = (self.batch[0].cuda(), self.batch[1].cuda())
        self.trainer = quiet_trainer(callbacks, device, options.precision)

    def __len__(self) -> int:
        return self.steps + 1  # so that Lightning comes back after the last step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            self.waits.release()
            self.go.acquire()
            start = clock(self.device)
            yield self.batch
            self.seconds.append(clock(self.device) - start)

    def run(self) -> None:
        try:
            self.trainer.fit(self.module, self)
        except BaseException as error:  # told to the main thread
            self.error = error
        self.waits.release()

    def step(self) -> None:
        """Let it do one step, and wait for its end."""
        self.go.release()
        self.wait()

    def wait(self) -> None:
        self.waits.acquire()
        if self.error is not None:
            raise self.error


def quiet_trainer(callbacks: list[Callback], device: str, precision: str) -> pl.Trainer:
    return pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        precision=precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def times(
    name: str, rounds: int, options: Any, variants: Mapping[str, Callable[[], list[Callback]]]
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step of each variant, and the backward pass's share of a plain step."""
    steps = WARM_UP + rounds
    passes = Passes(options.device)
    chosen = {
        variant: make
        for variant, make in variants.items()
        if variant == PLAIN or not options.variants or variant in options.variants
    }
    if options.against:
        others = variants_of_checkout(options.against)
        chosen |= {variant + OTHER: others[variant] for variant in chosen if variant != PLAIN}
    runs = {
        variant: Run(WORKLOADS[name], make() + ([passes] if variant == PLAIN else []), steps, options.device, options)
        for variant, make in chosen.items()
    }
    for run in runs.values():
        run.start()
        run.wait()
    order = random.Random(0)
    for index in range(steps):
        for variant in order.sample(sorted(runs), len(runs)):
            runs[variant].step()
        print(f"\r{name}: round {index + 1} of {steps}", end="", flush=True)
    print()
    for run in runs.values():
        run.join()
    base = runs[PLAIN].seconds
    share = median(b / s for b, s in list(zip(passes.seconds, base, strict=True))[WARM_UP:])
    return {variant: run.seconds[WARM_UP:] for variant, run in runs.items()}, share


def rows(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Ratios of every pair of rounds (one with a new mask, one without), for each row of the table."""
    base = seconds[PLAIN]
    ratios = {variant: [t / b for t, b in zip(own, base, strict=True)] for variant, own in seconds.items()}
    table: dict[str, list[float]] = {}
    for variant, each in ratios.items():
        if "IRE" not in variant:
            table[variant] = each
            continue
        fresh, kept = each[::2], each[1::2]  # WARM_UP is even
        table[f"{variant}, K=10"] = [(f + (INTERVAL - 1) * k) / INTERVAL for f, k in zip(fresh, kept, strict=True)]
        if variant == "IRE":
            table["IRE, K=1"] = fresh
    if {"SAM", "SAM-IRE"} <= ratios.keys():
        sam = ratios["SAM"]
        pairs = zip(table["SAM-IRE, K=10"], sam[::2], sam[1::2], strict=True)
        table["SAM-IRE, K=10, against SAM"] = [own / ((a + b) / 2) for own, a, b in pairs]
    del table[PLAIN]
    return table


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy that fits in no cache."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / seconds


def floors(backward: float, traffic: float) -> dict[str, float]:
    """The least that each row can cost, in plain steps: passes that must be made, bytes that must be moved.

    Args:
        backward: Share of a plain step that its backward pass takes, measured.
        traffic: Seconds for one byte per parameter, in plain steps, from the measured bandwidth.
    """
    boost = (8 + 13) * traffic  # copy the old weights: read and write; boost: read old, mask and weight, write weight
    squares = 4 + 8 + 5  # write h; the threshold reads it twice; the mask reads it and is written
    mask = squares * traffic
    second = 1.0
    move = (4 + 8 + 8 + 8) * traffic  # norm: read the gradient; save; add the move; put back
    return {
        "off": 1.0,
        "IRE, K=10": 1 + boost + (backward + mask) / INTERVAL,
        "IRE, K=1": 1 + boost + backward + mask,
        "IRE, fraction=0.25, K=10": 1 + boost + (0.25 + mask) / INTERVAL,
        "IRE, SecondMoment, K=10": 1 + boost + mask / INTERVAL,
        "SAM": 1 + second + move,
        "SAM-IRE, K=10": 1 + second + move + 13 * traffic + (backward + mask) / INTERVAL,
        "AverageSAM-IRE, K=10": 1 + boost + move + (1 + mask) / INTERVAL,
        "SAM-IRE, K=10, against SAM": 1 + (13 * traffic + (backward + mask) / INTERVAL) / (1 + second + move),
    }


def memory(name: str, options: Any) -> dict[str, dict[str, float]]:
    """Bytes per parameter beyond those of the plain run, with a batch so small that the weights are what counts.

    "peak" inside a step, "kept" between two steps.
    """
    workload = WORKLOADS[name]
    peaks, kept = {}, {}
    for variant, make in VARIANTS.items():
        torch.manual_seed(0)
        module = Task(workload.net())
        count = sum(parameter.numel() for parameter in module.parameters())
        trainer = quiet_trainer(make(), options.device, "32-true")
        batches = DataLoader([workload.data(2)] * 4, batch_size=None)
        peaks[variant], kept[variant] = allocations(lambda t=trainer, m=module, b=batches: t.fit(m, b), options.device)
        peaks[variant], kept[variant] = peaks[variant] / count, kept[variant] / count
    return {
        variant: {"peak": peaks[variant] - peaks[PLAIN], "kept": kept[variant] - kept[PLAIN]} for variant in VARIANTS
    }


def allocations(fit: Callable[[], None], device: str) -> tuple[float, float]:
    """Most bytes that were allocated at once, and those still allocated at the end, as the allocator reports them."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fit()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fit()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    total, peak = 0, 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak, total


def measure(name: str, options: Any) -> dict[str, Any]:
    seconds, backward = times(name, options.rounds, options, VARIANTS)
    parameters = sum(parameter.numel() for parameter in WORKLOADS[name].net().parameters())
    step = median(seconds[PLAIN])
    least = floors(backward, parameters / bandwidth(options.device) / step)
    other = {variant.removesuffix(OTHER): each for variant, each in seconds.items() if variant.endswith(OTHER)}
    seconds = {variant: each for variant, each in seconds.items() if not variant.endswith(OTHER)}
    for row, ratios in rows({PLAIN: seconds[PLAIN], **other}).items():
        low, middle, high = quantiles(ratios, n=4)
        print(f"  {row + OTHER:50} {middle:6.3f}  ({low:.3f} to {high:.3f})")
    table = {}
    for row, ratios in rows(seconds).items():
        low, _, high = quantiles(ratios, n=4)
        table[row] = {"ratio": median(ratios), "low": low, "high": high, "floor": least[row]}
        print(f"  {row:50} {median(ratios):6.3f}  ({low:.3f} to {high:.3f})   floor {least[row]:.3f}")
    result = {"parameters": parameters, "seconds": step, "backward": backward, "rows": table}
    if not options.no_memory:
        result["memory"] = memory(name, options)
        for variant, one in result["memory"].items():
            print(f"  {variant:28} bytes per parameter: peak {one['peak']:+.1f}, kept {one['kept']:+.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=12, help="steps of each variant, even, at least 4")
    parser.add_argument("--only", default="", help="workloads whose names begin so")
    parser.add_argument("--variants", nargs="*", default=[], help="these only: " + ", ".join(VARIANTS))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32, on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--against", type=Path, help="a checkout to run beside this one; printed only")
    parser.add_argument("--output", type=Path, help="JSON file to write or to add to; without, none is")
    options = parser.parse_args()
    if options.rounds < 4 or options.rounds % 2:
        parser.error(f"expected --rounds to be even and at least 4, got {options.rounds}")
    if not SETTINGS.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], SETTINGS | dict(os.environ))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    precision = options.precision + (", TF32" if options.tf32 else "")
    settings = {"device": options.device, "precision": precision, "compile": options.compile}
    content: dict[str, Any] = {"machine": machine(options.device), **settings, "workloads": {}}
    if options.output and options.output.exists():  # runs of single workloads add up, on the same machine
        before = json.loads(options.output.read_text())
        if {**before, "workloads": {}} == content:
            content = before
    for name in WORKLOADS:
        if not name.startswith(options.only):
            continue
        content["workloads"][name] = {"rounds": options.rounds, **measure(name, options)}
        if options.output:
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
