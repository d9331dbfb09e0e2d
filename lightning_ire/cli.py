"""The command line: `python cli.py {fit,validate,test,predict} --config configs/NAME.yaml`."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_ire.data
import lightning_ire.models  # noqa: F401  (imported so that short class names are known)
from lightning_ire import IRE, ConfigurationError

__all__ = ["IRECLI", "main"]


_NOISE = re.compile(
    r"$|Problem with given|Does not validate|Subtypes: |Errors:|Given value|Expected a path but|Not a valid subclass|"
    r"Expected a <class 'NoneType'>|Subclass types expect|a class path|a dict with"
)

CALLBACK_KEYS: dict[str, tuple[type[Callback], dict[str, Any]]] = {"ire": (IRE, {"kappa": 0.0})}
"""Top-level keys: the callback that a key sets up, and where its defaults differ from the constructor's.

Such a callback has an attribute `idle`; with these defaults it is True, and an idle callback is not added.
"""


class OneLineParser(LightningArgumentParser):
    """Parser that takes no abbreviations and reports a wrong key or value in one line, without the long usage."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` as one line on stderr and exit with code 2; with JSONARGPARSE_DEBUG set, raise instead."""
        if (
            not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ
        ):  # a class's arguments have a parser that raises
            super().error(message, ex)
        self.exit(2, f"error: {_one_line(message)}\n")


class NumberedConfigCallback(SaveConfigCallback):
    """Saves the config beside the logs; where another run's config lies, under the next free name `config_N.yaml`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a free name, then save as usual."""
        if not self.already_saved:
            folder, name = Path(trainer.log_dir or trainer.default_root_dir), Path(self.config_filename)
            number = 0
            while (folder / self.config_filename).exists():
                number += 1
                self.config_filename = f"{name.stem}_{number}{name.suffix}"
        super().setup(trainer, pl_module, stage)


class IRECLI(LightningCLI):
    """Lightning's command line with a top-level key for each callback of this package, and `test_after_fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top-level keys."""
        for key, (callback_class, defaults) in CALLBACK_KEYS.items():
            parser.add_class_arguments(callback_class, key)
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the final weights."
        )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's version lets hyper-parameters in a checkpoint override config and flags in silence."""

    def instantiate_classes(self) -> None:
        """Make all objects; a value that a constructor refuses is a usage error that names the full key."""
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:
            # jsonargparse passes the constructor's own error on as the cause of another ValueError.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ConfigurationError):
                cause = cause.__cause__
            settings = self.config[self.subcommand].as_dict()
            self.parser.error(str(error) if cause is None else _with_full_key(str(cause), settings), error)

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
        if self.config[self.subcommand].test_after_fit:
            self.trainer.test(self.model, datamodule=self.datamodule)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                print(f"Logs: {logger.log_dir}\nTo see them: tensorboard --logdir {logger.save_dir}")


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    A wrong key or value, on the command line or in a config, exits with code 2 before anything runs.

    Args:
        args: What follows the program's name; by default taken from `sys.argv`.

    Returns:
        0, or 1 if the run met a set-up that cannot work (said in one line on stderr).
    """
    # Lightning advertises its cloud products at every start.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        IRECLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=OneLineParser,
            save_config_callback=NumberedConfigCallback,
            args=args,
        )
    except (ConfigurationError, MisconfigurationException) as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def _one_line(message: str) -> str:
    """Return jsonargparse's message in one line, without what it says of other types that the argument might have."""
    keys, depth = [], -1
    for indent, key in re.findall(r'^([ -]*)Parser key "([^"]+)":', message, re.MULTILINE):
        if len(indent) > depth:  # deeper: inside the class given for the key before; not deeper: another attempt
            keys.append(key)
            depth = len(indent)
    given = re.findall(r"Given value: ([^\n({\[]+)$", message, re.MULTILINE)
    lines = [
        re.sub(r'Parser key "[^"]+":|Type .* callable class: |. Got value: Namespace.*', "", line)
        for line in message.splitlines()
    ]
    details = dict.fromkeys(line.strip(" -") for line in lines if not _NOISE.match(line.strip(" -")))
    detail = (
        "; ".join(details).replace(". Got value: ", ", got ").replace("dot import path string: ", "known class, got ")
    )
    detail = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", detail)
    prefix = ".".join(keys)
    if given and f"got {given[0]}" not in detail:
        detail += f", got {given[0]}"
    detail = re.sub(r"Option '(\w+)' is not accepted", rf"no such key: {prefix}.\1", detail)
    return detail if prefix in detail else f"{prefix}: {detail}"


def _with_full_key(message: str, settings: dict[str, Any]) -> str:
    """Return the message of a constructor with the name of its argument spelt as the user's full key."""
    name = re.search(r"`(\w+)`", message)
    if name is None:
        return message
    found = [(key, value) for key, value in _flatten(settings) if key.rsplit(".", 1)[-1] == name[1]]
    exact = [key for key, value in found if f"got {value!r}" in message]
    keys = exact or [key for key, _ in found] or [name[1]]
    return message.replace(name[0], f"`{keys[0]}`", 1)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all nested values with their dotted keys as they are typed, that is without `init_args`."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _flatten(item, key if name == "init_args" else f"{key}.{name}".strip("."))
