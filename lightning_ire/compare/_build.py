"""A comparison for those without our command line: a function builds each run, which is made in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_ire._checks import ConfigurationError, check_folder, check_number
from lightning_ire._cli_options import check_name
from lightning_ire.compare._record import RunRecord
from lightning_ire.compare._report import Report, write_report
from lightning_ire.compare._work import Outcome, Work, check_logged
from lightning_ire.compare.design import Cell, Choice, Comparison, Design, Method, Range
from lightning_ire.sweeps._study import Study

__all__ = ["Findings", "compare"]

Build = Callable[[dict[str, Any]], tuple[pl.LightningModule, Any, dict[str, Any]]]


class Findings(NamedTuple):
    """What a comparison has found: one sentence, the comparisons, and the page that says all."""

    sentence: str
    comparisons: list[Comparison]
    report: Path


def compare(
    build: Build,
    methods: Sequence[Method],
    tune: Mapping[str, Range | Choice] | None = None,
    *,
    trials: int = 16,
    seeds: int = 5,
    metric: str,
    mode: str,
    report: str = "",
    folder: str | Path = "compare",
    name: str = "study",
    storage: str | None = None,
    curve: str = "val/loss",
    effect: float | None = None,
    **more: Any,
) -> Findings:
    """Compare methods at equal effort, on any LightningModule.

    Each run calls `pl.seed_everything(seed)`, then `build`, then `Trainer(**arguments).fit(module, data)`, and
    `Trainer.test` if `report` is a tag of the test (`test/...`). It is made in this process; the same script started
    again goes on where it stopped, and started twice shares the work. A run that raises is one line and counts as
    failed.

    Args:
        build: Gets the settings of a run: those of the method, the tuned values by key, and `seed`; returns the module,
            what `Trainer.fit` takes as data, and the arguments of `Trainer`. It is called once for each run.
        methods: What is compared; the first is the base.
        tune: What is tuned of all methods, by key.
        trials: Settings that are tried of each method; 1: nothing is tuned.
        seeds: Seeds with which the best settings are run.
        metric: Logged value by which settings are chosen.
        mode: Whether more of it is better, "max", or less, "min".
        report: Logged value that is compared; by default the metric.
        folder: Where the database and the report go.
        name: Of the study; the report is in `folder/name`.
        storage: Address of another database, in SQLAlchemy's form.
        curve: Logged value that is drawn against passes.
        effect: A difference for which the report says how many seeds would show it (points, if it is an accuracy).
        more: Further arguments of `Design`: `tuning_seeds`, `budget`, `on_top`, `halving`, `versus`, `report_mode`.

    Returns:
        The sentence, the comparisons, and the path of `report.html`.

    Raises:
        ConfigurationError: If there are fewer than two methods, a value is out of range, the first run does not log the
            metric, `build` returns something else, or the study was begun with another design.
    """
    design = Design(methods, tune or {}, trials, seeds, metric=metric, mode=mode, report=report, **more)
    for keys in (design.tune, *(part for method in methods for part in (method.tune, method.settings))):
        if "seed" in keys:
            raise ConfigurationError("Expected `seed` to be left to the comparison, got it among the settings.")
    if effect is not None:
        check_number("effect", effect, low_open=True)
    check_name(name, "name")
    where = Path(folder) / name
    check_folder("folder", Path(folder), where)
    study: Study[Mapping[str, Any]] = Study(
        folder, [], name, storage=storage, mode=mode, fingerprint=design.fingerprint
    )
    runs = _Runs(build, design, curve)
    work = Work(design, study, runs)
    work.work()
    results = work.refresh()
    found = Report(design, results, work.errors, name, effect)
    print(write_report(found, work.curves(), where, curve))
    return Findings(found.sentence, found.compared, where / "report.html")


class _NoRun(ConfigurationError):
    """What `build` returned is no run."""


class _Runs:
    """Runs in this process, one after the other."""

    def __init__(self, build: Build, design: Design, curve: str) -> None:
        self.build, self.design, self.curve = build, design, curve
        self.logged = False

    def start(self, cell: Cell, settings: Mapping[str, Any], length: Mapping[str, int]) -> _Run:
        return _Run(self, cell, settings, length)


class _Run:
    """One run, made when it is asked how it has ended."""

    def __init__(self, runs: _Runs, cell: Cell, settings: Mapping[str, Any], length: Mapping[str, int]) -> None:
        self.runs, self.cell, self.settings, self.length = runs, cell, settings, length

    def poll(self) -> Outcome:
        cell, design = self.cell, self.runs.design
        record = RunRecord(self.runs.curve, cell.stop)
        try:
            pl.seed_everything(cell.seed, verbose=False)
            method = design.by_name[cell.method]
            made = self.runs.build({**method.settings, **self.settings, "seed": cell.seed})
            if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[2], Mapping):
                raise _NoRun(f"Expected `build` to return (module, data, arguments of Trainer), got {made!r:.200}.")
            module, data, arguments = made
            trainer = pl.Trainer(
                **{**arguments, **self.length, "callbacks": [*(arguments.get("callbacks") or []), record]}
            )
            trainer.fit(module, data)
            if design.report.startswith("test/") and cell.stop == 1:
                trainer.test(module, data, verbose=False)
        except _NoRun:
            raise
        except Exception as error:  # of the user's code, or what a method refuses: one line, and the others go on
            return Outcome({}, [], f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
        finally:
            gc.collect()
        if not self.runs.logged:  # what no run logs, the first one does not
            check_logged(cell.method, [design.metric, *([design.report] if cell.stop == 1 else [])], record.values)
            self.runs.logged = True
        return Outcome(record.values, record.curve)

    def end(self, *, patient: bool) -> None:
        """It has ended."""
