"""The command `compare`: check each method with one batch, make the runs, write the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch

from lightning_ire._checks import ConfigurationError, check_folder
from lightning_ire.compare._options import Options, read_options
from lightning_ire.compare._record import FILE
from lightning_ire.compare._report import Report, write_report
from lightning_ire.compare._work import Job, Outcome, Refused, Work, check_logged
from lightning_ire.compare.design import Cell
from lightning_ire.sweeps import _runs
from lightning_ire.sweeps._grid import SEED, Trial
from lightning_ire.sweeps._study import Study, optuna

__all__ = ["main"]

_CLI = "lightning_ire.cli"
_PRELOAD = ["lightning.pytorch.cli", "lightning_ire.callbacks", "lightning_ire.data", "lightning_ire.models"]
_INTERRUPTED, _TERMINATED = 130, 143  # what a shell reports after Ctrl-C and SIGTERM
_PATIENCE_SECONDS = 30  # how long a process may take to end after Ctrl-C
_ONE_BATCH = {
    "trainer.max_epochs": "1",
    "trainer.max_steps": "2",
    "trainer.limit_train_batches": "2",
    "trainer.limit_val_batches": "1",
    "trainer.limit_test_batches": "1",
    "trainer.val_check_interval": "1.0",
    "trainer.check_val_every_n_epoch": "1",
}


def main(args: list[str]) -> int:
    """Run `cli.py compare`.

    Args:
        args: What follows `compare`.

    Returns:
        0; 1: runs failed, or the database did not answer; 2: a wrong key or value; 130: Ctrl-C; 143: SIGTERM.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        options = read_options(args)
        check_folder("--folder", options.folder, options.logs)
        study: Study[Mapping[str, Any]] = Study(
            options.folder, [], options.name, storage=options.storage, mode=options.design.mode,
            fingerprint=None if options.report_only else options.fingerprint,
        )  # fmt: skip
        runs = _Runs(options)
        work = Work(options.design, study, runs, options.jobs)
        exit_code = 0
        if not options.report_only:
            if not any(values is not None for values in work.results().values()):
                runs.check()
            exit_code = work.work()
        report = Report(options.design, work.refresh(), work.errors, options.heading, options.effect)
        print(write_report(report, work.curves(), options.logs, options.curve))
        return exit_code
    except (ConfigurationError, Refused) as error:
        print(str(error) if isinstance(error, Refused) else f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as end:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return _INTERRUPTED if isinstance(end, KeyboardInterrupt) else _TERMINATED
    except optuna().exceptions.StorageInternalError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        print(f"error: the database did not answer: {why}; the same command goes on from there", file=sys.stderr)
        return 1
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Terminated(Exception):
    """SIGTERM."""


def _terminate(*_: Any) -> NoReturn:
    raise _Terminated


class _RunTrial(Trial):
    """A run of a comparison: all its flags by key, those of its method as typed."""

    def __init__(self, title: str, words: list[str], values: Mapping[str, Any]) -> None:
        super().__init__({key: str(value) for key, value in values.items()})
        self.words, self._title = words, title

    @property
    def title(self) -> str:
        """Method, number of the trial, and seed."""
        return self._title

    @property
    def command(self) -> list[str]:
        """The method's flags, then the values."""
        record = ["--trainer.callbacks+=lightning_ire.compare.RunRecord"]
        own = [key for key in self if key.startswith("record.")]
        rest = Trial({key: value for key, value in self.items() if key not in own})
        record += [f"--trainer.callbacks.{key.removeprefix('record.')}={self[key]}" for key in own]
        return [*self.words, *rest.command, *record]


class _Runs:
    """Runs as processes of `cli.py fit`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        wanted = options.jobs > 1 and "OMP_NUM_THREADS" not in os.environ
        self.threads = max((os.cpu_count() or 1) // options.jobs, 1) if wanted else None

    def start(self, cell: Cell, settings: Mapping[str, Any], length: Mapping[str, int]) -> Job:
        """Start a run; one with other settings in its folder is refused."""
        stop = "" if cell.stop == 1 else f",stop={cell.stop:g}"
        values = {
            **settings,
            SEED: cell.seed,
            "record.stop_after": f"{cell.stop:g}",
            "record.curve": self.options.curve,
        }
        values |= {f"trainer.{key}": value for key, value in length.items()}
        return self._process(f"{cell.method},trial={cell.trial},seed={cell.seed}{stop}", cell.method, values)

    def check(self) -> None:
        """Run two batches of each method, before anything trains: what is refused then is refused at once."""
        design, left = self.options.design, list(self.options.design.methods)
        print(f"checking {len(left)} methods with two batches each", flush=True)
        active: list[tuple[str, _Process]] = []
        try:
            while left or active:
                while left and len(active) < self.options.jobs:
                    method = left.pop(0)
                    values = {
                        **design.settings(method, 0, {}),
                        SEED: 0,
                        "record.curve": self.options.curve,
                        **_ONE_BATCH,
                    }
                    title = f"check,{method.name},pid={os.getpid()}"  # another process may check at the same time
                    shutil.rmtree(self.options.logs / Trial({}, title).name, ignore_errors=True)
                    active.append((method.name, self._process(title, method.name, values)))
                for one in list(active):
                    name, job = one
                    if (outcome := job.poll()) is None:
                        continue
                    active.remove(one)
                    if outcome.error:
                        raise ConfigurationError(f"{name} cannot be run: {outcome.error.removeprefix('error: ')}")
                    shutil.rmtree(job.run.folder)
                    check_logged(name, [design.metric, design.report], outcome.values)
                time.sleep(0.1)
        finally:
            for _, job in active:
                job.end(patient=False)

    def _process(self, title: str, method: str, values: Mapping[str, Any]) -> _Process:
        report = self.options.design.report.startswith("test/")
        tests = {"test_after_fit": "true" if report else "false"}
        words = self.options.words[method]
        run = _runs.Run(self.options, _RunTrial(title, words, {**tests, **values}))  # type: ignore[arg-type]
        run.check()
        return _Process(run, self.threads)


class _Process:
    """A run at work, in a process that is forked from one in which everything is imported already."""

    def __init__(self, run: _runs.Run, threads: int | None) -> None:
        self.run = run
        run.write_settings()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        words = run.command[run.command.index("fit") :]
        self._process = context.Process(target=_fit, args=(words, str(run.log.resolve()), threads))
        self._process.start()

    def poll(self) -> Outcome | None:
        """Return how it has ended; None: it has not."""
        if (code := self._process.exitcode) is None:
            return None
        if code:
            line = _runs.last_line(self.run.log)
            error = line if code == 2 else f"exit code {code}: {line} (output: {self.run.log})"
            return Outcome({}, [], error, refused=code == 2)
        values: dict[str, float] = {}
        curve: list[Any] = []
        for version in _runs.versions(self.run.folder):
            if (file := version / FILE).is_file():
                kept = json.loads(file.read_text())
                values |= kept["values"]
                curve = kept["curve"] or curve
        return Outcome(values, curve)

    def end(self, *, patient: bool) -> None:
        """Let it end, as long as the user is patient; then end it."""
        for insist in (self._process.terminate, self._process.kill):
            with suppress(KeyboardInterrupt):
                self._process.join(_PATIENCE_SECONDS if patient or insist == self._process.kill else 0)
            if self._process.exitcode is None:
                insist()
        self._process.join()


def _end_with_parent() -> None:
    """Get SIGTERM when the comparison is gone: this process would train beside its own repetition."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _fit(words: list[str], log: str, threads: int | None) -> None:
    """Be `python -m lightning_ire.cli fit`, which is also what Lightning starts for more devices."""
    with open(os.devnull) as nothing, open(log, "ab") as output:
        for stream, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(stream.fileno(), target)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    sys.argv = ["", *words]
    sys.modules.pop(_CLI, None)  # of the script that called us
    runpy.run_module(_CLI, run_name="__main__", alter_sys=True)
