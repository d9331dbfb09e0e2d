"""The command `find`: read its flags, make trainer and module as `cli.py fit` does, test, and write what was found."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_ire._checks import ConfigurationError, check_folder, check_number, check_whole
from lightning_ire._cli_command import code_of, run, write
from lightning_ire._cli_options import Parser, behind
from lightning_ire.callbacks import IRE
from lightning_ire.find._range_test import kappas, learning_rates, radii
from lightning_ire.find._result import RangeTest
from lightning_ire.perturbation import Perturbation

__all__ = ["main"]

_TESTS: dict[str, Callable[..., RangeTest]] = {"lr": learning_rates, "kappa": kappas, "rho": radii}
_EXAMPLE = """\
lr     the learning rate rises from step to step, with SAM and IRE at work, until the loss diverges
kappa  the largest kappa whose steps are stable, and the loss while kappa rises at the config's learning rate
rho    how much the loss rises along SAM's ascent, over the radius

example:
  python cli.py find lr --config configs/digits_resnet_sgd_ire.yaml -- --trainer.accelerator cpu

Nothing is trained for good. Each call writes a picture and the numbers, KEY-NAME.png and .json, and nothing over.
exit codes: 0; 2: a wrong key or value, or a set-up that cannot work; 130: Ctrl-C"""


def main(args: list[str], cli: type[Any]) -> int:
    """Run `cli.py find`.

    Args:
        args: What follows `find`.
        cli: The class of `cli.py fit`'s command line, a LightningCLI.

    Returns:
        0; 2: a wrong key or value, or a set-up that cannot work.
    """

    def command() -> None:
        options, flags = _read(args)
        run(_in_place_of_fit(cli, options), "fit", options.config, flags)

    return code_of(command)


def _in_place_of_fit(cli: type[Any], options: argparse.Namespace) -> type[Any]:
    class Find(cli):
        """Its `fit` tests in place of training."""

        def fit(self, model: LightningModule, datamodule: Any = None, **others: Any) -> None:
            if others.get("ckpt_path") is not None:
                raise ConfigurationError(
                    f"Expected no `ckpt_path` for find, got {str(others['ckpt_path'])!r}: leave it out."
                )
            trainer: Trainer = self.trainer
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(one, (IRE, Perturbation)) for one in callbacks):  # its other settings count
                callbacks.append(self.config_init[self.subcommand].ire)
            given = {"low": options.low, "high": options.high, "steps": options.steps}
            found = _TESTS[options.key](
                trainer, model, datamodule, **{name: value for name, value in given.items() if value is not None}
            )
            if trainer.is_global_zero:
                _report(found, options)

        def after_fit(self) -> None:
            """There is nothing to be tested."""

    return Find


def _report(found: RangeTest, options: argparse.Namespace) -> None:
    """Print the suggestion, and write the numbers and the picture beside what is there."""
    for note in found.notes:
        print(note)
    content = {"config": str(options.config), **asdict(found)}
    written = write(options.folder, f"{found.key}-{options.config.stem}", content, found.figure)
    print(f"find {found.line}\nWritten: {', '.join(written)}", flush=True)


def _read(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read what follows `find`, and the further flags of `fit`; a `ConfigurationError` says what is wrong with it."""
    parser = Parser(
        "find",
        "lr|kappa|rho --config FILE [options] [-- further flags of cli.py fit]",
        description="Range tests: which learning rate, which kappa, which rho?",
        epilog=_EXAMPLE,
        config="config of the run",
    )
    parser.add_argument("key", choices=list(_TESTS), metavar="lr|kappa|rho", help="what to look for")
    parser.add_argument("--low", type=float, metavar="X", help="first value (default: lr 1e-6, kappa 0.1, rho 0.001)")
    parser.add_argument("--high", type=float, metavar="Y", help="last value (default: lr 10, kappa 100, rho 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="how many values (default: 100, rho 30)")
    parser.add_argument("--folder", type=Path, default=Path("find"), help="where the files go (default: find)")
    own, flags = behind(args)
    options = parser.read(own, argparse.Namespace())
    defaults = inspect.signature(_TESTS[options.key]).parameters
    low = check_number("--low", defaults["low"].default if options.low is None else options.low, low_open=True)
    high = defaults["high"].default if options.high is None else options.high
    check_number("--high", high, low=low, low_open=True)
    if options.steps is not None:
        check_whole("--steps", options.steps, low=2 if options.key == "rho" else 10)
    check_folder("--folder", options.folder)
    return options, flags
