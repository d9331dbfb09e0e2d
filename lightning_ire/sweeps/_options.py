"""The command line of a sweep: its flags, its help, and one line for whatever is wrong with it."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_ire._checks import ConfigurationError, check_choice
from lightning_ire._cli_options import Parser, behind, check_key, check_name, content, pairs, value_of
from lightning_ire.sweeps._grid import Grid
from lightning_ire.sweeps._study import code

__all__ = ["Options", "read_options"]

_EXAMPLE = """\
example (18 runs and 3 of plain SGD):
  python cli.py sweep --config configs/digits_resnet_sgd_ire.yaml --baseline \\
    --grid ire.kappa 1 2 --grid ire.gamma 0.99 0.9 0.8 --grid seed_everything 0 1 2 -- --trainer.accelerator cpu

The same command, typed again, goes on where it stopped; typed in a second terminal, it shares the work.
Several machines share it with --storage postgresql+psycopg://USER:PASSWORD@HOST/DATABASE.
exit codes: 0; 1: runs failed; 2: a wrong key or value; 130: Ctrl-C"""


class Options(argparse.Namespace):
    """What the user asked for: the flags of the same names, and those behind `--`."""

    config: Path
    grid: Grid
    flags: list[str]
    baseline: bool
    metric: str
    mode: str
    also: list[str]
    name: str
    folder: Path
    storage: str
    table: bool

    @property
    def logs(self) -> Path:
        """The folder of all runs."""
        return self.folder / self.name

    @property
    def fingerprint(self) -> str:
        """What must not change during a study: the config's text and the further flags."""
        return hashlib.sha256(self.config.read_bytes() + b"\0" + json.dumps(self.flags).encode()).hexdigest()

    @property
    def replaced_logger(self) -> str | None:
        """The config's own logger as text, if it has one that is not TensorBoard's."""
        given = content(self.config)
        trainer = given.get("trainer") if isinstance(given, dict) else None
        logger = trainer.get("logger") if isinstance(trainer, dict) else None
        name = logger.get("class_path") if isinstance(logger, dict) else logger
        return None if name in (None, True) or str(name).endswith("TensorBoardLogger") else f"trainer.logger: {name}"


def read_options(args: list[str]) -> Options:
    """Read what follows `sweep`; a `ConfigurationError` says what is wrong with it."""
    own, flags = behind(args)
    options = _parser().read(own, Options(flags=flags))
    grid = _check_grid(vars(options)["grid"])
    for key, _ in pairs(options.flags):
        check_key(key)
        if key in grid:
            raise ConfigurationError(f"Expected `{key}` to be set in one place, got it in --grid and behind `--`.")
    options.grid, options.name = Grid(grid), options.name or options.config.stem
    check_name(options.name)
    if not options.table:
        _check_test_after_fit(options)
    mode = options.mode or ("max" if "accuracy" in options.metric else "min")
    options.storage = options.storage or f"sqlite:///{options.folder / options.name}.db"
    options.mode = check_choice("--mode", mode, ("max", "min"))
    return options


def _parser() -> Parser:
    parser = Parser(
        "sweep",
        "--config FILE --grid KEY VALUE ... [options] [-- further flags of cli.py fit]",
        description="Train every combination of the values of some keys, each in a process of its own.",
        epilog=_EXAMPLE,
        config="config of all runs",
    )
    add, stripped = parser.add_argument, {"type": str.strip}  # see `Parser.read`
    grid: dict[str, Any] = {"nargs": "*", "action": "append", "default": [], **stripped}
    add("--grid", **grid, metavar="KEY VALUE", help="a key and its values; repeat")
    add("--baseline", action="store_true", help="also run with ire.kappa 0, once per combination of the other keys")
    add("--metric", default="test/accuracy", metavar="TAG", help="logged value to compare (default: test/accuracy)")
    add("--mode", metavar="max|min", help="whether more is better (default: max for an accuracy, else min)")
    add("--also", nargs="+", action="extend", default=[], metavar="TAG", help="further logged values: a table each")
    add("--name", help="name of the study (default: that of the config)")
    add("--folder", type=Path, default=Path("sweeps"), help="where logs and tables go (default: sweeps)")
    add("--storage", metavar="URL", help="database of the study (default: the SQLite file FOLDER/NAME.db)")
    add("--table", action="store_true", help="print the table of what there is and run nothing")
    return parser


def _check_grid(grid: list[list[str]]) -> dict[str, tuple[str, ...]]:
    if not grid or not all(grid):
        raise ConfigurationError("Expected `--grid` to be a key and its values, as in --grid ire.kappa 1 2, got none.")
    checked: dict[str, tuple[str, ...]] = {}
    for key, *values in grid:
        if key in checked:
            raise ConfigurationError(f"Expected `--grid {key}` to be given once, got it twice: give all values to one.")
        if not values or not all(values):
            raise ConfigurationError(f"Expected `--grid {key}` to have values, got {' '.join(values) or 'none'!r}.")
        if len(set(map(code, values))) < len(values):
            raise ConfigurationError(f"Expected `--grid {key}` to have different values, got {' '.join(values)}.")
        check_key(key)
        checked[key] = tuple(values)
    return checked


def _check_test_after_fit(options: Options) -> None:
    """Refuse a sweep whose runs would train to the end and then lack the metric."""
    given = content(options.config)
    tests = [metric for metric in (options.metric, *options.also) if metric.startswith("test/")]
    if isinstance(given, str) or not tests:
        return  # of what is no YAML the first run says what is wrong with it
    key, wanted = "test_after_fit", f"Expected `test_after_fit` to be true for `{tests[0]}`"
    typed = [value for name, value in pairs(options.flags) if name == key][-1:] or options.grid.values.get(key, ())
    for value in typed:
        if value_of(value) is not True:
            raise ConfigurationError(f"{wanted}, got {value or 'nothing'}.")
    if not typed and not (isinstance(given, dict) and given.get(key) is True):
        where = f"neither in {options.config} nor behind `--`: add -- --test_after_fit true"
        raise ConfigurationError(f"{wanted}, got it {where}.")
