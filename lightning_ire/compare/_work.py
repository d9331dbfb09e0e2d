"""The runs of a comparison: who does which, several at a time, until the design names no more."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from lightning_ire._checks import ConfigurationError
from lightning_ire.compare.design import PRICE_SEED, TUNING_SEED, Cell, Design, Results
from lightning_ire.sweeps._study import GRACE_SECONDS, Attempt, Study
from lightning_ire.sweeps._table import shown

__all__ = ["Executor", "Job", "Outcome", "Refused", "Work"]

_POLL_SECONDS = 0.2
_POINTS = 200  # of a curve that are kept at most
_ELSEWHERE_SECONDS = 5.0


class Refused(Exception):
    """The command line refused a key or a value, so all runs would end like this."""


class Outcome(NamedTuple):
    """How a run has ended: what it has logged and its curve of (passes, value), or one line that says what failed."""

    values: Mapping[str, float]
    curve: list[Any]
    error: str = ""
    refused: bool = False


class Job(Protocol):
    """A run at work."""

    def poll(self) -> Outcome | None:
        """Return how it has ended; None: it has not."""

    def end(self, *, patient: bool) -> None:
        """End it; `patient`: Ctrl-C has reached it too, so it ends by itself."""


class Executor(Protocol):
    """What makes runs."""

    def start(self, cell: Cell, settings: Mapping[str, Any], length: Mapping[str, int]) -> Job:
        """Start a run with the tuned settings, and the Trainer's arguments for its length if it is not as given."""


class Work:
    """The study of a design, and the runs that this process is at.

    Args:
        design: Which runs.
        study: Where they are kept; of no trials yet.
        executor: What makes them.
        jobs: How many are at work at the same time.
    """

    def __init__(self, design: Design, study: Study[Mapping[str, Any]], executor: Executor, jobs: int = 1) -> None:
        self.design, self.study, self.executor, self.jobs = design, study, executor, jobs
        self.active: list[tuple[Cell, Attempt[Mapping[str, Any]], Job, ExitStack]] = []
        self.errors: dict[str, str] = {}
        self._begun, self._done_before = time.monotonic(), 0
        self.refresh()

    def refresh(self) -> dict[Cell, Mapping[str, float] | None]:
        """Return the results that there are, having added the runs that they make necessary."""
        while True:
            results = self.results()
            known = {Cell(**trial) for trial in self.study.trials}
            if not (new := [cell._asdict() for cell in self.design.plan(results) if cell not in known]):
                return results
            self.study.extend(new)

    def results(self) -> dict[Cell, Mapping[str, float] | None]:
        """Return what is logged by run, None for the failed ones."""
        kept = zip(self.study.trials, self.study.results(), strict=True)
        found: dict[Cell, Mapping[str, float] | None] = {Cell(**trial): one["logged"] for trial, one in kept if one}
        return {**found, **{Cell(**trial): None for trial in self.study.failed()}}

    def curves(self) -> dict[Cell, list[Any]]:
        """Return the curve of each run."""
        kept = zip(self.study.trials, self.study.results(), strict=True)
        return {Cell(**trial): one["curve"] for trial, one in kept if one}

    def work(self) -> int:
        """Make all runs, with a bar of progress; return 1 if one has failed, else 0."""
        hidden = not sys.stderr.isatty()
        self.bar: tqdm[Any] = tqdm(
            total=self.design.count, disable=hidden, unit="run", file=sys.stderr, dynamic_ncols=True
        )
        self._done_before, self._begun = self._ended(self.refresh()), time.monotonic()
        with self.bar:
            patient = False
            try:
                self._loop()
            except KeyboardInterrupt:
                patient = True
                raise
            finally:
                for *_, job, stack in self.active:
                    job.end(patient=patient)
                    stack.close()
                self.active = []
        return int(any(values is None for values in self.results().values()))

    def _loop(self) -> None:
        waiting = False
        while True:
            results = self.refresh()
            self.bar.n = self._ended(results)
            self.bar.refresh()
            pricing = self.design.budget == "seconds" and any(
                Cell(**trial).seed >= PRICE_SEED for trial in self.study.to_do() + self.study.running()
            )
            while len(self.active) < (1 if pricing else self.jobs) and self._start(results):
                pass
            if not self.active:
                elsewhere = [Cell(**trial).name for trial in self.study.running()]
                if not elsewhere and not self.study.to_do():
                    return
                if elsewhere and not waiting:
                    self.say(
                        f"waiting for {'; '.join(elsewhere)}, at work elsewhere; what is dead is done again after "
                        f"{GRACE_SECONDS} seconds"
                    )
                waiting = True
                time.sleep(_ELSEWHERE_SECONDS)
                continue
            waiting = False
            while not (ended := [(one, outcome) for one in self.active if (outcome := one[2].poll())]):
                time.sleep(_POLL_SECONDS)
            for one, outcome in ended:
                self.active.remove(one)
                cell, attempt, _, stack = one
                with stack:
                    self._keep(cell, attempt, outcome)

    def _start(self, results: Results) -> bool:
        """Begin one more run, if there is one that nobody is at."""
        stack = ExitStack()
        attempt = stack.enter_context(self.study.claim())
        if attempt is None:
            stack.close()
            return False
        with stack:
            cell = Cell(**attempt.trial)
            method = self.design.by_name[cell.method]
            settings = self.design.settings(method, cell.trial, results)
            self.bar.set_description(cell.name)
            job = self.executor.start(cell, settings, self.design.length(cell, results))
            self.active.append((cell, attempt, job, stack.pop_all()))
        return True

    def _keep(self, cell: Cell, attempt: Attempt[Mapping[str, Any]], outcome: Outcome) -> None:
        if outcome.refused:
            attempt.note(refused=True)
            raise Refused(outcome.error)
        tag = self.design.metric if cell.seed >= TUNING_SEED else self.design.report
        wanted = dict.fromkeys((self.design.metric, self.design.report))
        missing = next((one for one in wanted if not outcome.error and one not in outcome.values), None)
        if outcome.error or missing:
            logged = ", ".join(sorted(outcome.values)) or "nothing"
            error = outcome.error or f"it has not logged `{missing}`, but {logged}"
            attempt.note(error=error)
            self.errors[cell.name] = error
            self.say(f"failed: {cell.name}: {error}", sys.stderr)
            return
        value = outcome.values[tag]
        attempt.complete(value, logged=dict(outcome.values), curve=outcome.curve[:: len(outcome.curve) // _POINTS + 1])
        if self.bar.disable:
            ended = self._ended(self.results())
            place = f"[{ended}/{self.design.count}]"
            self.say(f"{place} {cell.name}: {tag} {shown(tag, value)}{self._left(ended)}")

    def _ended(self, results: Results) -> int:
        return sum(values is not None for values in results.values())

    def _left(self, ended: int) -> str:
        """How long it will take at the pace so far."""
        if (done := ended - self._done_before) < 1:
            return ""
        seconds = (time.monotonic() - self._begun) / done * max(self.design.count - ended, 0)
        return f", about {math.ceil(seconds / 60)} min left" if seconds > 60 else f", about {math.ceil(seconds)} s left"

    def say(self, line: str, stream: Any = None) -> None:
        """Print a line beside the bar."""
        tqdm.write(line, file=stream or sys.stdout)
        (stream or sys.stdout).flush()


def check_logged(method: str, tags: list[str], values: Mapping[str, float]) -> None:
    """Refuse a metric that nobody logs."""
    for flag, tag in zip(("--metric", "--report"), tags, strict=True):
        if tag not in values:
            logged = ", ".join(sorted(tag for tag in values if not tag.startswith("compare/"))) or "nothing"
            raise ConfigurationError(f"Expected `{flag}` to be logged, got {tag!r}: a run of {method} logs {logged}.")
