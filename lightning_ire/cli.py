"""The command line: `python cli.py {fit,validate,test,predict,sweep,compare,find,barrier} --config FILE`."""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import lightning_ire.data
import lightning_ire.models  # noqa: F401  (imported so that short class names are known)
from lightning_ire import IRE, ConfigurationError, SharpnessMonitor, _cli_barrier, compare, find, sweeps
from lightning_ire._checks import check_folder, check_whole
from lightning_ire._cli_checkpoints import NAMES, check_checkpoint, find_checkpoint, misfit, on_this_machine
from lightning_ire._cli_messages import one_line, with_full_key
from lightning_ire._lightning import ConfigWins
from lightning_ire.callbacks._presets import as_flags

__all__ = ["IRECLI", "main"]

CALLBACK_KEYS: dict[str, tuple[type[Callback], dict[str, Any]]] = {
    "ire": (IRE, {"kappa": 0.0}),
    "sharpness": (SharpnessMonitor, {"every_n_epochs": None}),
}
"""Top-level keys: the callback that a key sets up, and where its defaults differ from the constructor's.

Such a callback has an attribute `idle`; with these defaults it is True, and an idle callback is not added.
"""

_DESCRIPTION = (
    "Train with IRE and SAM. Settings of IRE by name: --ire.preset NAME. Further commands: cli.py sweep --help (grids "
    "of runs), compare --help (does it help here?), find --help (range tests of the learning rate, kappa and rho), "
    "barrier --help (the loss between two checkpoints)"
)
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after SIGINT and SIGTERM: 128 and the signal's number."""


_CONFIGS = ("--config", "-c")
_SEEDS = 2**32
"""Seeds are whole numbers below: numpy's."""
_PROCESSES = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables in which launchers (torchrun, Slurm, LSF, MPI) say how many processes they start."""


class OneLineParser(LightningArgumentParser):
    """Parser that takes no abbreviations and reports a wrong key or value in one line, without the long usage."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """As always, with a preset in place of the flag that names it."""
        try:
            args = _with_preset(sys.argv[1:] if args is None else list(args))
        except ConfigurationError as error:
            self.error(str(error), error)
        return super().parse_args(args, *rest, **kwargs)

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

    _left: ClassVar[str | None] = None
    """What runs in this process have set `PL_GLOBAL_SEED` to."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.config: Any = {}
        try:
            super().__init__(
                save_config_callback=NumberedConfigCallback,
                parser_class=OneLineParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_kwargs={"description": _DESCRIPTION},
                args=args,
            )
        except (ValueError, RuntimeError) as error:
            settings = self.config.get(self.config.get("subcommand"))
            if settings is None:
                raise
            # what only shows in the run names its argument; the user typed a key
            message = str(error) if isinstance(error, ConfigurationError) else misfit(error, settings.ckpt_path)
            if message is None:
                raise
            raise ConfigurationError(with_full_key(message, settings.as_dict())) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top-level keys."""
        for key, (callback_class, defaults) in CALLBACK_KEYS.items():
            parser.add_class_arguments(callback_class, key)
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the final weights."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and replace `seed_everything: true` by the seed of this run; the saved config has it as a number.

        It is the environment variable `PL_GLOBAL_SEED` if there is one (the processes that Lightning starts get it from
        the first one; what an earlier run in this process has left does not count), or else drawn anew.

        Args:
            parser: The parser.
            args: What follows the program's name.
        """
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        _warn_of_a_monitor_that_is_off(settings, sys.argv[1:] if args is None else args)
        seed, name, given = settings.seed_everything, "seed_everything", os.environ.get("PL_GLOBAL_SEED")
        if seed is True and given not in (None, IRECLI._left):
            seed, name = given, "PL_GLOBAL_SEED"
        elif seed is True:
            if started := [f"{key}={os.environ[key]}" for key in _PROCESSES if os.environ.get(key, "1") != "1"]:
                self.parser.error(
                    "Expected `seed_everything` to be a number, or the environment variable PL_GLOBAL_SEED to be one, "
                    f"where a launcher starts several processes ({started[0]}), got true: each would draw another one."
                )
            seed = secrets.randbelow(_SEEDS)
        elif seed is False:
            return
        if not str(seed).isdecimal() or int(seed) >= _SEEDS:
            self.parser.error(f"Expected `{name}` to be a whole number in [0, {_SEEDS - 1}], got {seed!r}.")
        settings.seed_everything = int(seed)
        if str(seed) != given:
            IRECLI._left = str(seed)

    def instantiate_classes(self) -> None:
        """Make all objects; what cannot work is a usage error that names the full key.

        That is a value which a constructor refuses, a checkpoint that cannot be loaded (one given as a file: before
        anything is made), or a folder to which nothing can be written. Afterwards `ckpt_path` is a file or None.
        """
        settings = self.config[self.subcommand]
        try:
            if settings.get("ckpt_path") not in (None, *NAMES):
                self._check_checkpoint(settings)
            on_this_machine("default_root_dir", str(settings.trainer.default_root_dir))
            if self.subcommand == "fit":
                _leave_out_start_of_no_boost(settings.ire)
            super().instantiate_classes()
            self._check_intervals()
            self._check_folders(settings)
            self._find_checkpoint(settings)
        except (MisconfigurationException, ValueError) as error:  # jsonargparse wraps what constructors raise
            self.parser.error(with_full_key(str(error), settings.as_dict()), error)

    def _check_checkpoint(self, settings: Any) -> None:
        check_checkpoint(str(settings.ckpt_path), settings.weights_only, resume=self.subcommand == "fit")

    def _check_intervals(self) -> None:
        """Refuse numbers by which Lightning would divide, or that count nothing."""
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
            if isinstance(value := getattr(self.trainer, name), int):  # another is a share of the epoch, or none
                check_whole(name, value, low=1)

    def _check_folders(self, settings: Any) -> None:
        """Refuse folders to which the loggers and checkpoint callbacks could not write."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if settings.trainer.logger in (None, True, False):
            check_folder("default_root_dir", self.trainer.default_root_dir)
        for logger in self.trainer.loggers:
            if logger.save_dir is not None:
                check_folder("save_dir", logger.save_dir, getattr(logger, "root_dir", None))
        for callback in self.trainer.checkpoint_callbacks if self.subcommand == "fit" else ():
            if (folder := getattr(callback, "dirpath", None)) is not None:
                check_folder("dirpath", folder)

    def _find_checkpoint(self, settings: Any) -> None:
        """Replace `last`, `best` and `hpc` by a file and say which; say where the weights are not those of a run."""
        name, resume, say = settings.get("ckpt_path"), self.subcommand == "fit", rank_zero_only(print)
        if name in NAMES:
            version = _fixed_version(settings.trainer.logger)
            path, searched = find_checkpoint(name, self.trainer, version, settings.weights_only, resume=resume)
            settings.ckpt_path = self.config_init[self.subcommand].ckpt_path = path
            if path is not None:
                self._check_checkpoint(settings)
            say(f"ckpt_path {name}: {path or f'nothing at {searched} yet, so the training begins'}", flush=True)
        elif name is None and not resume:
            line = f"{self.subcommand} without `ckpt_path`: the weights are those that the model was made with"
            say(f"{line} (--ckpt_path last, best or FILE: those of a run)", file=sys.stderr)

    def before_validate(self) -> None:
        """Let SIGTERM end the command at once: there is nothing to save, and Lightning only looks between batches."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)

    before_test = before_predict = before_validate

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
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:  # of two callbacks of which a checkpoint can hold only one
            self.parser.error(str(error), error)

    def after_fit(self) -> None:
        """Test the final weights if asked to, and say where the logs are."""
        if any(isinstance(callback, IRE) and callback.dry_run for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        if self.config[self.subcommand].test_after_fit:
            self.before_test()
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
        0; 1 if the run met a set-up that cannot work (said in one line on stderr); 130 after Ctrl-C, 143 after
        SIGTERM; the codes of `sweep` are in its `--help`.
    """
    command = sys.argv[1:] if args is None else args
    handler = signal.getsignal(signal.SIGTERM)
    # Lightning advertises its cloud products at every start.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        in_place = {"find": find.main, "barrier": _cli_barrier.main}.get(command[0]) if command else None
        if in_place:
            return in_place(command[1:], IRECLI)
        ours = {"sweep": sweeps, "compare": compare}.get(command[0]) if command else None
        return ours.main(command[1:]) if ours else _run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SIGTERMException:  # Lightning's own, without a code
        return TERMINATED
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning has shut the run down
            return INTERRUPTED
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # None: not set from Python


def _leave_out_start_of_no_boost(ire: Any) -> None:
    """Let `--ire.kappa 0` on a SAM-IRE config be its baseline: SAM from the first step."""
    if ire.kappa != 0 or ire.perturbation is None or ire.dry_run:
        return
    for unit in ("step", "epoch", "loss"):
        if (given := ire[key := f"start_{unit}"]) is None:
            continue
        ire[key] = None
        later = "" if unit == "loss" else f"; `--ire.perturbation.{key} {given}` starts the perturbation then"
        rank_zero_warn(f"`ire.{key}` {given} is left out: it says when the boost starts, and `ire.kappa` is 0{later}.")


def _warn_of_a_monitor_that_is_off(settings: Any, args: Any) -> None:
    """Say so where a flag sets up measurements and none is asked for."""
    monitor = settings.get("sharpness")
    words = [word for word in args if str(word).startswith("--sharpness.")] if isinstance(args, list) else []
    if words and monitor is not None and monitor.every_n_steps is None and monitor.every_n_epochs is None:
        rank_zero_warn(f"`{words[0].split('=')[0]}` has no effect: add `--sharpness.every_n_epochs 1` to measure.")


def _with_preset(args: list[str]) -> list[str]:
    """Flags for all of IRE's arguments in place of `--ire.preset NAME`: after the configs, before other flags."""
    flag = "--ire.preset"
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(f"{flag}=") else [arg])]
    if flag not in words:
        return args
    place = words.index(flag)
    if words[place + 1 : place + 2] in ([], [flag]):
        raise ConfigurationError(f"Expected a name after `{flag}`, got none.")
    name = words[place + 1]
    del words[place : place + 2]
    configs = [i + (arg in _CONFIGS) for i, arg in enumerate(words) if arg.split("=")[0] in _CONFIGS]
    parameters = inspect.signature(IRE).parameters.items()
    defaults = {key: parameter.default for key, parameter in parameters if key != "dry_run"}
    after = max(configs, default=0) + 1
    return words[:after] + as_flags(name, "ire", defaults) + words[after:]


def _end(*_: Any) -> NoReturn:
    raise SIGTERMException(TERMINATED)


def _run(args: list[str] | None) -> int:
    """Run one of Lightning's subcommands."""
    try:
        IRECLI(args)
    except (ConfigurationError, MisconfigurationException) as error:
        if _debugging():
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def _fixed_version(logger: Any) -> str | None:
    """Return the name of the version folder that the first logger is set to, or None if it takes the next free one."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    version = first.init_args.get("version") if isinstance(first, Namespace) else None
    return version if version is None or isinstance(version, str) else f"version_{version}"


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def _debugging() -> bool:
    """Whether errors keep their traceback: jsonargparse's own environment variable says so."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"


if __name__ == "__main__":
    raise SystemExit(main())
