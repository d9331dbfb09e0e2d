"""The command line: `python cli.py {fit,validate,test,predict,sweep} --config configs/NAME.yaml`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_ire.data
import lightning_ire.models  # noqa: F401  (imported so that short class names are known)
from lightning_ire import IRE, ConfigurationError, SharpnessMonitor, sweeps
from lightning_ire._cli_messages import one_line, with_full_key
from lightning_ire._lightning import ConfigWins

__all__ = ["IRECLI", "main"]

CALLBACK_KEYS: dict[str, tuple[type[Callback], dict[str, Any]]] = {
    "ire": (IRE, {"kappa": 0.0}),
    "sharpness": (SharpnessMonitor, {"every_n_epochs": None}),
}
"""Top-level keys: the callback that a key sets up, and where its defaults differ from the constructor's.

Such a callback has an attribute `idle`; with these defaults it is True, and an idle callback is not added.
"""


class OneLineParser(LightningArgumentParser):
    """Parser that takes no abbreviations and reports a wrong key or value in one line, without the long usage."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` as one line on stderr and exit with code 2."""
        if not self.exit_on_error or _debugging():  # the arguments of a class have a parser that raises
            super().error(message, ex)
        self.exit(2, f"error: {one_line(message)}\n")


class NumberedConfigCallback(SaveConfigCallback):
    """Saves the config beside the logs; where another run's config lies, under the next free name `config_N.yaml`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a free name, then save as usual; a logger without a folder saves nothing."""
        log_dir = trainer.log_dir
        if log_dir is None:
            return
        if not self.already_saved:
            folder, name, number = Path(log_dir), Path(self.config_filename), 0
            while (folder / self.config_filename).exists():
                number += 1
                self.config_filename = f"{name.stem}_{number}{name.suffix}"
        super().setup(trainer, pl_module, stage)


class IRECLI(ConfigWins, LightningCLI):
    """Lightning's command line with a top-level key for each callback of this package, and `test_after_fit`.

    Args:
        args: What follows the program's name; by default taken from `sys.argv`.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        self.config: Any = {}
        try:
            super().__init__(
                save_config_callback=NumberedConfigCallback,
                parser_class=OneLineParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_kwargs={"description": "Train with IRE and SAM. Grids of runs: cli.py sweep --help"},
                args=args,
            )
        except ConfigurationError as error:  # what only shows in the run names its argument; the user typed a key
            settings = self.config.get(self.config.get("subcommand"))
            if settings is None:
                raise
            raise ConfigurationError(with_full_key(str(error), settings.as_dict())) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top-level keys."""
        for key, (callback_class, defaults) in CALLBACK_KEYS.items():
            parser.add_class_arguments(callback_class, key)
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the final weights."
        )

    def instantiate_classes(self) -> None:
        """Make all objects; a value that a constructor refuses is a usage error that names the full key."""
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:  # jsonargparse wraps what constructors raise
            settings = self.config[self.subcommand].as_dict()
            self.parser.error(with_full_key(str(error), settings), error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the callbacks of all active keys.

        Args:
            kwargs: Further arguments of the trainer.

        Returns:
            The trainer.
        """
        settings = self.config_init[self.subcommand]
        listed = settings.trainer.callbacks or []
        callbacks = list(listed) if isinstance(listed, list) else [listed]
        for key, (callback_class, _) in CALLBACK_KEYS.items():
            if settings[key].idle:
                continue
            if any(isinstance(callback, callback_class) for callback in callbacks):
                self.parser.error(
                    f"Expected {callback_class.__name__} to be set up in one place, got both the key `{key}` and an "
                    "entry of `trainer.callbacks`: remove one of them."
                )
            callbacks.append(settings[key])
        settings.trainer.callbacks = callbacks
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Test the final weights if asked to, and say where the logs are."""
        if any(isinstance(callback, IRE) and callback.dry_run for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        if self.config[self.subcommand].test_after_fit:
            self.trainer.test(self.model, datamodule=self.datamodule)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                print(f"Logs: {logger.log_dir}\nTo see them: tensorboard --logdir {logger.save_dir}")


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    A wrong key or value, on the command line or in a config, exits with code 2 before anything runs. For the traceback
    of an error set the environment variable JSONARGPARSE_DEBUG=true.

    Args:
        args: What follows the program's name; by default taken from `sys.argv`.

    Returns:
        0, or 1 if the run met a set-up that cannot work (said in one line on stderr); the codes of `sweep` are in its
        `--help`.
    """
    command = sys.argv[1:] if args is None else args
    if command[:1] == ["sweep"]:
        return sweeps.main(command[1:])
    # Lightning advertises its cloud products at every start.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        IRECLI(args)
    except (ConfigurationError, MisconfigurationException) as error:
        if _debugging():
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def _debugging() -> bool:
    """Whether errors keep their traceback: jsonargparse's own environment variable says so."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"


if __name__ == "__main__":
    raise SystemExit(main())
