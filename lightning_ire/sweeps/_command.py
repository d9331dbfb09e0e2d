"""The command `sweep`: open the studies, do the work, say how it ended, print and save the tables."""

from __future__ import annotations

import os
import sys

from lightning_ire._checks import ConfigurationError, check_folder
from lightning_ire.sweeps._database import GRACE_SECONDS, open_storage, optuna
from lightning_ire.sweeps._heat_map import save_heat_map
from lightning_ire.sweeps._ledger import Ledger
from lightning_ire.sweeps._options import Options, read_options
from lightning_ire.sweeps._record import check
from lightning_ire.sweeps._table import Results, table
from lightning_ire.sweeps._worker import Refused, Worker

__all__ = ["main"]

_INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(args: list[str]) -> int:
    """Run `cli.py sweep`.

    Args:
        args: What follows `sweep`.

    Returns:
        0; 1: runs failed, or the database did not answer; 2: a wrong key or value; 130: Ctrl-C.
    """
    try:
        options = read_options(args)
        ledgers = _open(options)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.table:
        _report(options, ledgers)
        return 0
    exit_code = _work(options, ledgers)
    if exit_code in (0, 1):
        _report(options, ledgers)
    return exit_code


def _open(options: Options) -> list[Ledger]:
    check_folder("--folder", options.folder, options.logs)
    storage = open_storage(options.storage, must_exist=options.table)
    ledgers = [Ledger(storage, options.name, options.grid, options.mode)]
    if options.baseline:
        ledgers.append(Ledger(storage, f"{options.name}-baseline", options.grid.baseline(), options.mode))
    for ledger in ledgers:
        ledger.open(None if options.table else options.fingerprint, options.flags)
    cells = [] if options.table else [cell for ledger in ledgers for cell in ledger.to_do()]
    for cell in cells:
        check(options, cell)
    if cells and (logger := options.replaced_logger):
        print(f"all runs log to TensorBoard in {options.logs}, in place of the config's {logger}")
    return ledgers


def _work(options: Options, ledgers: list[Ledger]) -> int:
    worker = Worker(options, ledgers)
    try:
        worker.work()
    except Refused as refused:
        print(str(refused), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f" in {worker.cell.name}" if worker.cell else ""
        print(f"stopped{where}; the same command goes on from there", file=sys.stderr)
        return _INTERRUPTED
    except optuna().exceptions.StorageInternalError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        print(f"error: the database did not answer: {reason}; the same command goes on from there", file=sys.stderr)
        return 1
    for ledger in ledgers:
        for cell in sorted(ledger.running(), key=lambda cell: cell.name):
            print(
                f"{cell.name} is running elsewhere; if its process is gone, give this command again in "
                f"{GRACE_SECONDS} seconds"
            )
    return 1 if any(ledger.failed() for ledger in ledgers) else 0


def _report(options: Options, ledgers: list[Ledger]) -> None:
    """Print the tables, and write them and the pictures to the sweep's folder."""
    results = [_results(ledger) for ledger in ledgers]
    grid, baseline = results[0], results[1] if options.baseline else None
    metrics = list(dict.fromkeys([options.metric, *options.also]))
    config = options.config.stem
    logged = sorted({tag for values in grid.metrics.values() for tag in values})
    for metric in metrics:
        if logged and metric not in logged:
            print(f"no run has logged `{metric}`; there are {', '.join(logged)}", file=sys.stderr)
    flags = ledgers[0].flags  # those of the runs; to print a table none are needed
    text = "\n".join(table(config, metric, options.metric, options.mode, grid, baseline, flags) for metric in metrics)
    print(text, flush=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    path = options.logs / "table.md"
    unfinished = path.with_name(f"table.md.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
    files = [path]
    for metric in metrics:
        picture = options.logs / f"{metric.replace('/', '_')}.png"
        files += [picture] if save_heat_map(picture, config, metric, grid) else []
    print(f"Written: {', '.join(map(str, files))}")


def _results(ledger: Ledger) -> Results:
    complete = ledger.complete()
    return Results(ledger.grid, {cell.name: attributes["metrics"] for cell, attributes in complete.items()})
