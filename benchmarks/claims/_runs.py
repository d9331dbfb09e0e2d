"""Runs in two processes, and the JSON file that remembers them."""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workloads
from tqdm import tqdm

__all__ = ["RESULTS", "Result", "Runs", "Settings", "collect", "known"]

RESULTS = Path(__file__).parent / "results"

Settings = Mapping[str, Any]
Result = dict[str, Any]
Machine = dict[str, Any]


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


class _Run(NamedTuple):
    settings: Settings
    result: Result
    machine: Machine


class Runs:
    """Results by the settings that made them.

    Args:
        file: Where they are kept; None: nowhere.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._runs: dict[str, _Run] = {}
        self._found: dict[str, list[tuple[Settings, Result]]] = {}  # by what was asked for; tables ask again and again
        if file is not None and file.exists():
            content = json.loads(file.read_text())
            for run in content["runs"]:
                one = _Run(run["settings"], run["result"], content["machines"][run["machine"]])
                self._runs[_key(one.settings)] = one

    def __contains__(self, settings: Settings) -> bool:
        return _key(settings) in self._runs

    def __getitem__(self, settings: Settings) -> Result:
        return self._runs[_key(settings)].result

    def __iter__(self) -> Iterator[tuple[Settings, Result]]:
        """Settings and result of each run, not to be changed."""
        return ((run.settings, run.result) for run in self._runs.values())

    def __len__(self) -> int:
        return len(self._runs)

    def where(self, **wanted: Any) -> list[tuple[Settings, Result]]:
        """The runs with these values among their settings."""
        key = _key(wanted)
        if key not in self._found:
            self._found[key] = [each for each in self if wanted.items() <= each[0].items()]
        return self._found[key]

    def machines(self) -> list[tuple[Machine, int]]:
        """Processors and versions, and how many runs each made: most first."""
        counts = Counter(tuple(run.machine.items()) for run in self._runs.values())
        return [(dict(machine), count) for machine, count in counts.most_common()]

    def add(self, settings: Settings, result: Result) -> None:
        """Remember one run, on disk too. The file is whole at any moment."""
        self._runs[_key(settings)] = _Run(settings, result, {**workloads.machine("cpu"), "threads": 1})
        self._found.clear()
        if self.file is None:
            return
        machines = [machine for machine, _ in self.machines()]
        lines = sorted(
            json.dumps({"settings": json.loads(key), "result": one.result, "machine": machines.index(one.machine)})
            for key, one in self._runs.items()
        )
        text = f'{{"machines": {json.dumps(machines)}, "runs": [\n' + ",\n".join(lines) + "\n]}\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.file)


def known(name: str) -> Runs:
    """What is committed of a claim."""
    return Runs(RESULTS / f"{name}.json")


def _quiet() -> None:
    """One thread per process, and no more words from Lightning than errors."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    importlib.import_module("lightning.pytorch")  # sets the level of its logger, so ours has to come after
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def collect(
    runs: Runs,
    plan: Callable[[Runs], list[dict[str, Any]]],
    measure: Callable[[Settings], Result],
    name: str,
    processes: int = 2,
) -> None:
    """Make every run that the plan names and `runs` does not have, until the plan names no more."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def missing() -> list[dict[str, Any]]:
        return list({_key(each): each for each in plan(runs) if each not in runs}.values())

    if not missing():
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        while todo := missing():
            futures = {pool.submit(measure, settings): settings for settings in todo}
            try:
                for future in tqdm(as_completed(futures), name, len(futures), unit="run", dynamic_ncols=True):
                    runs.add(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
