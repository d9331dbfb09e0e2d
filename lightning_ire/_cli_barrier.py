"""The command `barrier`: the loss and the module's metrics between two checkpoints, in place of `cli.py validate`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.migration import pl_legacy_patch
from tqdm.auto import tqdm

from lightning_ire._checkpoint_files import read_checkpoint
from lightning_ire._checks import ConfigurationError, check_folder, check_whole
from lightning_ire._cli_checkpoints import TRUST
from lightning_ire._cli_command import code_of, run, write
from lightning_ire._cli_options import Parser, behind
from lightning_ire.connectivity import Barrier
from lightning_ire.connectivity._line import End, check_points, on_the_line, weights_in

__all__ = ["main"]

_PARTS = {"val": "validate", "train": "fit", "test": "test"}
"""Parts of the data, and the stage for which Lightning sets each up."""
_LOSSES = ("val/loss", "val_loss", "loss")
_EXAMPLE = """\
example, of two runs with different seeds:
  python cli.py barrier logs/digits_resnet_sgd_ire/version_{0,1}/checkpoints/last.ckpt \\
    --config configs/digits_resnet_sgd_ire.yaml

At each point `validation_step` runs over the data (train: as training augments it), and what it logs is on the line,
under its name without val/.
BatchNorm's statistics are estimated anew at every point, the ends too, by `validation_step` in training mode over
training batches. One process, one device. Nothing is trained or changed.
Each call writes a picture and the numbers, DATA-CONFIG.png and .json, and nothing over.
exit codes: 0; 2: a wrong key or value, or a set-up that cannot work; 130: Ctrl-C"""


def main(args: list[str], cli: type[Any]) -> int:
    """Run `cli.py barrier`.

    Args:
        args: What follows `barrier`.
        cli: The class of `cli.py validate`'s command line, a LightningCLI.

    Returns:
        0; 2: a wrong key or value, or a set-up that cannot work.
    """

    def command() -> None:
        options, flags = _read(args)
        run(_in_place_of_validate(cli, options), "validate", options.config, flags)

    return code_of(command)


def _in_place_of_validate(cli: type[Any], options: argparse.Namespace) -> type[Any]:
    class Line(cli):
        """Its `validate` walks along the line."""

        def instantiate_classes(self) -> None:
            """Read the checkpoints before anything is made."""
            settings = self.config[self.subcommand]
            if settings.ckpt_path is not None:
                raise ConfigurationError(
                    f"Expected no `ckpt_path` for barrier, got {str(settings.ckpt_path)!r}: leave it out."
                )
            self.contents = [
                (name, str(path), _content(name, path, settings.weights_only))
                for name, path in (("FIRST", options.first), ("SECOND", options.second))
            ]
            super().instantiate_classes()

        def _find_checkpoint(self, settings: Any) -> None:
            """There are two."""

        def validate(self, model: LightningModule, datamodule: Any = None, **others: Any) -> None:
            found = _Walk(self.trainer, model, datamodule, options).go(self.contents)
            _report(found, options)

    return Line


class _Walk:
    """Evaluation and BatchNorm's statistics by the trainer, on one part of the data after the other.

    Args:
        trainer: As the config has it; used up.
        model: The module; used up.
        data: The datamodule, if any; used up.
        options: What the user typed.
    """

    def __init__(
        self, trainer: Trainer, model: LightningModule, data: LightningDataModule | None, options: argparse.Namespace
    ) -> None:
        if trainer.world_size != 1:
            raise ConfigurationError(
                f"Expected one device for barrier, got {trainer.world_size}: add -- --trainer.devices 1 "
                "--trainer.num_nodes 1."
            )
        self.trainer, self.model, self.data, self.options = trainer, model, data, options
        given: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.callbacks = [one for one in given if not isinstance(one, (ProgressBar, SaveConfigCallback))]
        trainer.loggers = []
        self.part = options.data
        self.bar: Any = None
        self._take_over(model if data is None else data)

    def go(self, contents: list[tuple[str, str, dict[str, Any]]]) -> Barrier:
        """Evaluate all points."""
        options = self.options
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sampler has shuffling enabled")
            self._validate([], options.data, 0)  # `configure_model` may make the layers
            first, second = (self._end(*each) for each in contents)
            recalibrate = self.recalibrate if options.recalibrate else None
            with tqdm(total=options.points, desc="barrier") as self.bar:
                return on_the_line(self.model, (first, second), self.evaluate, options.points, recalibrate)

    def evaluate(self, model: Any) -> dict[str, float]:
        """What the module logs in validation, with its loss under "loss"."""
        self._validate(self.callbacks, self.options.data, self.trainer.limit_val_batches)
        self.bar.update()
        return _named({name: float(value) for name, value in self.trainer.callback_metrics.items()}, self.options.loss)

    def recalibrate(self, model: Any) -> None:
        """Show BatchNorm training data, as validation takes it."""
        self._validate([_TrainingMode()], "train", self.options.recalibrate)

    def _end(self, name: str, path: str, content: dict[str, Any]) -> End:
        if "pytorch-lightning_version" in content:
            self.model.on_load_checkpoint(content)
        return End(name, repr(path), weights_in(content, name, repr(path)))

    def _validate(self, callbacks: list[Callback], part: str, batches: int | float | None) -> None:
        self.part, before = part, self.trainer.limit_val_batches
        self.trainer.callbacks = callbacks  # type: ignore[attr-defined]
        self.trainer.limit_val_batches = batches  # type: ignore[assignment]
        try:
            self.trainer.validate(self.model, datamodule=self.data, verbose=False)
        finally:
            self.trainer.limit_val_batches = before

    def _take_over(self, owner: Any) -> None:
        """Let validation see the part that is asked for, set up once."""
        prepare, setup, done = owner.prepare_data, owner.setup, set()

        def once(key: str, action: Callable[[], Any]) -> None:
            if key not in done:
                action()
                done.add(key)

        # plain functions: Lightning looks through wrappers, and would miss a `val_dataloader` that nobody wrote
        owner.prepare_data = lambda: once("prepare_data", prepare)
        owner.setup = lambda stage=None: once(self.part, lambda: setup(stage=_PARTS[self.part]))
        loaders = {part: getattr(owner, f"{part}_dataloader") for part in _PARTS}
        owner.val_dataloader = lambda: loaders[self.part]()


class _TrainingMode(Callback):
    """Lets a validation run in training mode."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has switched to eval mode before."""
        pl_module.train()


def _content(name: str, path: Path, weights_only: bool | None) -> dict[str, Any]:
    with pl_legacy_patch():
        return read_checkpoint(str(path), f"Expected `{name}` to be a checkpoint, got", weights_only, TRUST)


def _named(logged: Mapping[str, float], loss: str | None) -> dict[str, float]:
    """What was logged without `val/` before it, and the loss under "loss"."""
    if loss is None:
        last = [name for name in logged if name.endswith("loss")]
        known = [name for name in _LOSSES if name in logged] or (last if len(last) == 1 else [])
        loss = known[0] if known else "none"
    if loss not in logged:
        raise ConfigurationError(
            f"Expected `--loss` to be a value that validation logs ({', '.join(logged) or 'it logs none'}), got "
            f"{loss!r}."
        )
    others = {name.removeprefix("val/").removeprefix("val_"): value for name, value in logged.items() if name != loss}
    others.pop("loss", None)
    return {"loss": logged[loss], **others}


def _report(found: Barrier, options: argparse.Namespace) -> None:
    """Print the sentence, and write the numbers and the picture beside what is there."""
    content = {
        "first": str(options.first),
        "second": str(options.second),
        "config": str(options.config),
        "data": options.data,
        "recalibration_batches": options.recalibrate if found.recalibrated else 0,
        **asdict(found),
        "height": found.height,
        "at": found.at,
        "average": found.average,
    }
    for note in found.notes:
        print(note)
    written = write(options.folder, f"{options.data}-{options.config.stem}", content, found.figure)
    print(f"barrier ({options.data}): {found.line}\nWritten: {', '.join(written)}", flush=True)


def _read(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read what follows `barrier`, and the further flags of `validate`; a `ConfigurationError` says what is wrong."""
    parser = Parser(
        "barrier",
        "FIRST SECOND --config FILE [options] [-- further flags of cli.py validate]",
        description="The loss and the metrics on the straight line between two checkpoints, and of averaged weights.",
        epilog=_EXAMPLE,
        config="config of the network, the data and the trainer",
    )
    parser.add_argument("first", type=Path, metavar="FIRST", help="checkpoint at alpha = 0")
    parser.add_argument("second", type=Path, metavar="SECOND", help="checkpoint at alpha = 1")
    parser.add_argument("--points", type=int, default=11, metavar="N", help="how many alphas, odd (default: 11)")
    parser.add_argument("--data", choices=list(_PARTS), default="val", help="which part of the data (default: val)")
    parser.add_argument(
        "--loss", metavar="NAME", help="logged value that is the loss (default: val/loss, val_loss, ...)"
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        default=100,
        metavar="N",
        help="training batches for BatchNorm's statistics at each point; 0: they are interpolated (default: 100)",
    )
    parser.add_argument("--folder", type=Path, default=Path("barrier"), help="where the files go (default: barrier)")
    own, flags = behind(args)
    options = parser.read(own, argparse.Namespace())
    check_points("--points", options.points)
    check_whole("--recalibrate", options.recalibrate, low=0)
    check_folder("--folder", options.folder)
    return options, flags
