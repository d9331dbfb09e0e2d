"""The command `sweep`: open the studies, do their trials one by one, say how it ended, print and save the tables."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

from lightning_ire._checks import ConfigurationError, check_folder
from lightning_ire.sweeps import _runs
from lightning_ire.sweeps._grid import Trial
from lightning_ire.sweeps._heat_map import save_heat_map
from lightning_ire.sweeps._options import Options, read_options
from lightning_ire.sweeps._study import GRACE_SECONDS, Attempt, Study, optuna
from lightning_ire.sweeps._table import Results, shown, table

__all__ = ["main"]

_INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(args: list[str]) -> int:
    """Run `cli.py sweep`.

    Args:
        args: What follows `sweep`.

    Returns:
        0; 1: runs failed, or the database did not answer; 2: a wrong key or value; 130: Ctrl-C.
    """
    sweep = None
    try:
        sweep = _Sweep(read_options(args))
        exit_code = 0 if sweep.options.table else sweep.work()
        sweep.report()
        return exit_code
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _Refused as refused:
        print(str(refused), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f" in {sweep.trial.name}" if sweep and sweep.trial else ""
        print(f"stopped{where}; the same command goes on from there", file=sys.stderr)
        return _INTERRUPTED
    except optuna().exceptions.StorageInternalError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        print(f"error: the database did not answer: {why}; the same command goes on from there", file=sys.stderr)
        return 1


class _Refused(Exception):
    """The command line refused a key or a value, so all runs would end like this."""


class _Sweep:
    """The study of the grid and the baseline's, and the trial that this process is at."""

    def __init__(self, options: Options) -> None:
        check_folder("--folder", options.folder, options.logs)
        self.options = options
        self.trial: Trial | None = None
        self.grids = [options.grid, *([options.grid.baseline()] if options.baseline else [])]
        self.studies: list[Study[Trial]] = [
            Study(
                options.folder,
                grid.trials,
                name,
                storage=options.storage,
                mode=options.mode,
                fingerprint=None if options.table else options.fingerprint,
                flags=options.flags,
            )
            for name, grid in zip((options.name, f"{options.name}-baseline"), self.grids, strict=False)
        ]
        to_do = [] if options.table else [trial for study in self.studies for trial in study.to_do()]
        for trial in to_do:
            _runs.Run(options, trial).check()
        if to_do and (logger := options.replaced_logger):
            print(f"all runs log to TensorBoard in {options.logs}, in place of the config's {logger}")

    def work(self) -> int:
        """Do all trials that are to do, say what runs elsewhere, and return the exit code."""
        self.count = sum(len(grid.trials) for grid in self.grids)
        hidden = not sys.stderr.isatty()
        self.bar: tqdm[Any] = tqdm(total=self.count, disable=hidden, unit="run", file=sys.stderr, dynamic_ncols=True)
        with self.bar:
            self._show()
            for study in self.studies:
                while self._one_of(study):
                    self._show()
        for study in self.studies:
            for name in sorted(trial.name for trial in study.running()):
                again = f"if its process is gone, give this command again in {GRACE_SECONDS} seconds"
                print(f"{name} is running elsewhere; {again}")
        return 1 if any(study.failed() for study in self.studies) else 0

    def _one_of(self, study: Study[Trial]) -> bool:
        with study.claim() as attempt:
            if attempt is not None:
                self.trial = attempt.trial
                self._run(attempt)
        self.trial = None
        return attempt is not None

    def _run(self, attempt: Attempt[Trial]) -> None:
        options, run = self.options, _runs.Run(self.options, attempt.trial)
        name, start = attempt.trial.name, time.monotonic()
        run.check()  # again: another sweep may have been at work since the start
        resumed = f" on from {run.checkpoint}, which has the same settings" if run.checkpoint else ""
        self._say(f"running {name}{resumed}: output in {run.log}")
        self.bar.set_description(name)
        exit_code = run.execute()
        seconds = time.monotonic() - start
        if exit_code == 2:
            attempt.note(refused=True)
            raise _Refused(_runs.last_line(run.log))
        values = _runs.last_values(run.folder) if exit_code == 0 else {}
        missing = [tag for tag in (options.metric, *options.also) if tag not in values]
        if missing:
            reason = f"no `{missing[0]}` in its logs, which have {', '.join(sorted(values)) or 'nothing'}"
            reason = f"exit code {exit_code}: {_runs.last_line(run.log)}" if exit_code else reason
            attempt.note(error=reason)
            self._say(f"failed: {name}: {reason} (output: {run.log})", sys.stderr)
            return
        value = values[options.metric]
        attempt.complete(value, metrics=values, seconds=round(seconds, 1))
        if self.bar.disable:
            result = f"{options.metric} {shown(options.metric, value)} ({seconds:.0f} s)"
            print(f"[{len(self._done())}/{self.count}] {name} {result}", flush=True)

    def report(self) -> None:
        """Print the tables, and write them and the pictures to the sweep's folder."""
        options = self.options
        results = [
            Results(grid, [None if kept is None else kept["metrics"] for kept in study.results()])
            for grid, study in zip(self.grids, self.studies, strict=True)
        ]
        grid, baseline = results[0], results[1] if options.baseline else None
        metrics = list(dict.fromkeys([options.metric, *options.also]))
        config = options.config.stem
        logged = sorted({tag for values in grid.metrics for tag in values or ()})
        for metric in metrics:
            if logged and metric not in logged:
                print(f"no run has logged `{metric}`; there are {', '.join(logged)}", file=sys.stderr)
        flags = self.studies[0].flags  # those of the runs; to print a table none are needed
        tables = (table(config, metric, options.metric, options.mode, grid, baseline, flags) for metric in metrics)
        print(text := "\n".join(tables), flush=True)
        _runs.replace_text(path := options.logs / "table.md", text)
        pictures = {metric: options.logs / f"{metric.replace('/', '_')}.png" for metric in metrics}
        drawn = [picture for metric, picture in pictures.items() if save_heat_map(picture, config, metric, grid)]
        print(f"Written: {', '.join(map(str, [path, *drawn]))}")

    def _done(self) -> list[dict[str, Any]]:
        return [kept for study in self.studies for kept in study.results() if kept is not None]

    def _show(self) -> None:
        """Bring the bar up to date; the best is that of all single runs so far."""
        if self.bar.disable:
            return
        done, metric = self._done(), self.options.metric
        values = [value for kept in done if not math.isnan(value := kept["metrics"].get(metric, math.nan))]
        self.bar.n = len(done)
        best = (max if self.options.mode == "max" else min)(values, default=None)
        self.bar.set_postfix_str("" if best is None else f"best {metric} {shown(metric, best)}")

    def _say(self, line: str, stream: Any = None) -> None:
        tqdm.write(line, file=stream or sys.stdout)
        (stream or sys.stdout).flush()
