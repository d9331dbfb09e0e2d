"""The loop: one cell after another until none is left to do, with a line or a bar for whoever watches."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lightning_ire._checks import ConfigurationError
from lightning_ire.sweeps import _record, _runs
from lightning_ire.sweeps._database import optuna
from lightning_ire.sweeps._grid import Cell
from lightning_ire.sweeps._ledger import Ledger
from lightning_ire.sweeps._options import Options
from lightning_ire.sweeps._table import shown

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Refused", "Worker"]


class Refused(Exception):
    """The command line refused a key or a value, so all runs would end like this."""


class _RunFailed(Exception):
    """One run failed; the others go on."""


class Worker:
    """Does the cells of some studies, one at a time, beside other processes that may do the same.

    Args:
        options: Those of the sweep.
        ledgers: Open studies, in the order in which to do them.
    """

    def __init__(self, options: Options, ledgers: list[Ledger]) -> None:
        self.options, self.ledgers = options, ledgers
        self.cell: Cell | None = None
        self._cells = sum(len(ledger.grid.cells) for ledger in ledgers)
        self._bar: tqdm[Any] = tqdm(
            total=self._cells, disable=not sys.stderr.isatty(), unit="run", file=sys.stderr, dynamic_ncols=True
        )

    def work(self) -> None:
        """Run all cells that are to do.

        Raises:
            Refused: If the command line refuses a key or a value.
            KeyboardInterrupt: After Ctrl-C; `cell` is the one that was stopped.
        """
        with self._bar:
            self._show()
            for ledger in self.ledgers:
                while to_do := ledger.to_do():
                    ledger.enqueue(to_do)
                    ledger.optimize(partial(self._objective, ledger), catch=_RunFailed)
                    self.cell = None
                    self._show()

    def _objective(self, ledger: Ledger, trial: Trial) -> float:
        cell = ledger.claim(trial)
        if cell is None:
            raise optuna().TrialPruned("done, running elsewhere, or of another grid")
        self.cell = cell
        trial.set_user_attr("values", cell.values)
        try:
            _record.check(self.options, cell)  # again: another sweep may have been at work since the start
        except ConfigurationError as error:
            raise Refused(f"error: {error}") from error
        checkpoint = _runs.checkpoint_of(self.options, cell)
        resumed = f" on from {checkpoint}, which has the same settings" if checkpoint else ""
        self._say(f"running {cell.name}{resumed}: output in {_runs.log_of(self.options, cell)}")
        _record.write(self.options, cell)
        self._bar.set_description(cell.name)
        start = time.monotonic()
        exit_code = _runs.run_process(_runs.command(self.options, cell), _runs.log_of(self.options, cell))
        seconds = time.monotonic() - start
        metrics = self._metrics(cell, exit_code, trial)
        trial.set_user_attr("metrics", metrics)
        trial.set_user_attr("seconds", round(seconds, 1))
        value = metrics[self.options.metric]
        self._finished(cell, value, seconds)
        worst = -math.inf if self.options.mode == "max" else math.inf
        return worst if math.isnan(value) else value  # Optuna refuses a NaN

    def _metrics(self, cell: Cell, exit_code: int, trial: Trial) -> dict[str, float]:
        """Return what a run has logged; where it failed, mark the trial, say why and raise."""
        log = _runs.log_of(self.options, cell)
        if exit_code == 2:
            trial.set_user_attr("refused", True)
            raise Refused(_runs.last_line(log))
        values = _runs.last_values(self.options.logs / cell.name) if exit_code == 0 else {}
        missing = [tag for tag in (self.options.metric, *self.options.also) if tag not in values]
        if exit_code != 0:
            reason = f"exit code {exit_code}: {_runs.last_line(log)}"
        elif missing:
            reason = f"no `{missing[0]}` in its logs, which have {', '.join(sorted(values)) or 'nothing'}"
        else:
            return values
        trial.set_user_attr("error", reason)
        self._say(f"failed: {cell.name}: {reason} (output: {log})", error=True)
        raise _RunFailed

    def _finished(self, cell: Cell, value: float, seconds: float) -> None:
        if self._bar.disable:
            result = f"{self.options.metric} {shown(self.options.metric, value)} ({seconds:.0f} s)"
            print(f"[{self._done() + 1}/{self._cells}] {cell.name} {result}", flush=True)

    def _show(self) -> None:
        """Bring the bar up to date; the best is that of all single runs so far."""
        if self._bar.disable:
            return
        metric = self.options.metric
        runs = [attributes for ledger in self.ledgers for attributes in ledger.complete().values()]
        values = [run["metrics"].get(metric, math.nan) for run in runs]
        best = {"max": max, "min": min}[self.options.mode]((v for v in values if not math.isnan(v)), default=None)
        self._bar.n = len(runs)
        self._bar.set_postfix_str("" if best is None else f"best {metric} {shown(metric, best)}")

    def _done(self) -> int:
        return sum(len(ledger.complete()) for ledger in self.ledgers)

    def _say(self, line: str, *, error: bool = False) -> None:
        stream = sys.stderr if error else sys.stdout
        tqdm.write(line, file=stream)
        stream.flush()
