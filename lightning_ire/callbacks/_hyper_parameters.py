"""What the loggers are told of a run's settings: TensorBoard's HPARAMS tab, and the hyper-parameters of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ire import tags
from lightning_ire._patches import Patches
from lightning_ire.callbacks._tensorboard import loggers_of, tensorboards

__all__ = ["HyperParameters"]

_OURS = (*tags.SHARPNESS_TAGS, *tags.STABILITY_TAGS)
_DETAILS = (tags.STDERR, tags.RESIDUAL, tags.CONVERGED, "_step")
Plain = bool | str | float


class HyperParameters:
    """One row of TensorBoard's HPARAMS tab: settings at fit start against the metrics at the end.

    TensorBoard takes the columns from the first such record of a run and the metrics' values from the curves, so the
    record is written once, when the names of all metrics are known. Other loggers get the settings at fit start. A
    setting whose name is that of a hyper-parameter of the module or datamodule is called `ire_...`.

    Every callback that belongs in the record has one of these as its `_record`; the first that is not idle writes.
    """

    def __init__(self) -> None:
        self._patches = Patches()
        self._trainer: pl.Trainer | None = None  # of the fit that goes on, if it is for this one to write
        self._values: dict[str, Plain] = {}
        self._taken: set[str] = set()

    def __reduce__(self) -> Any:
        """Copies know nothing of a running fit."""
        return type(self), ()

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """At fit start, before Lightning logs the module's hyper-parameters: read the settings.

        Args:
            trainer: The trainer.
            module: The module.
        """
        self.ready()
        self._trainer = None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        recorded = [one for one in callbacks if isinstance(getattr(one, "_record", None), HyperParameters)]
        recorded = [one for one in recorded if not one.idle]
        if not recorded or recorded[0]._record is not self:
            return
        self._trainer, self._values = trainer, _settings(trainer, recorded)
        self._taken = {*_flat(_saved(module)), *_flat(_saved(getattr(trainer, "datamodule", None)))}
        for logger in tensorboards(trainer):
            self._patches.put(logger, "log_hyperparams", _without_placeholder(logger.log_hyperparams))
        for logger in loggers_of(trainer):
            if isinstance(logger, TensorBoardLogger):
                continue
            try:
                logger.log_hyperparams(_renamed(self._values, self._taken))
            except Exception as error:  # MLflow refuses another value in a second fit
                rank_zero_warn(f"{type(logger).__name__} did not take the settings of the run: {error}")

    def ready(self) -> None:
        """At train start: Lightning has written what it writes."""
        self._patches.remove()

    def finish(self, trainer: pl.Trainer) -> None:
        """Write the record, once.

        Args:
            trainer: The trainer at the end of fit.
        """
        if trainer is not self._trainer:
            return
        self.ready()
        self._trainer = None
        from torch.utils.tensorboard.summary import hparams

        shown = [tag for tag in trainer.callback_metrics if tag in trainer.logged_metrics or tag in _OURS]
        names = [tag for tag in shown if not tag.startswith(("ire/", "sam/")) and not tag.endswith(_DETAILS)]
        names.sort(key=_place)  # TensorBoard shows the first five
        for logger in tensorboards(trainer):
            own = {name: _plain(value) for name, value in _flat(dict(logger.hparams)).items()}
            settings = own | _renamed(self._values, self._taken | own.keys())
            for record in hparams(settings, dict.fromkeys(names, 0.0)):
                logger.experiment.file_writer.add_summary(record)
            logger.experiment.flush()


def _settings(trainer: pl.Trainer, callbacks: Iterable[Any]) -> dict[str, Plain]:
    # TensorBoard sorts the names and shows the first five: the numbers come before what is said in words
    values: dict[str, Plain] = {"kappa": 0.0, "gamma": 0.0, "rho": 0.0}
    values |= {"using/perturbation": "none", "using/curvature": "none"}
    for callback in callbacks:
        values |= getattr(callback, "hyper_parameters", dict)()
    for index, optimizer in enumerate(trainer.optimizers):
        if not optimizer.param_groups:  # Lightning's stand-in for no optimizer
            continue
        suffix = f"_{index}" if index else ""
        group = optimizer.param_groups[0]
        values[f"using/optimizer{suffix}"] = type(optimizer).__name__
        rate = group.get("initial_lr", group.get("lr"))
        if rate is not None:  # optimizers of the user's own may have none
            values[f"lr{suffix}"] = float(rate)
    return values


def _renamed(values: dict[str, Plain], taken: set[str]) -> dict[str, Plain]:
    """The same under names that are not taken."""
    renamed = {}
    for name, value in values.items():
        while name in taken:
            name = f"ire_{name}"
        renamed[name] = value
    return renamed


def _saved(owner: Any) -> dict[Any, Any]:
    return dict(getattr(owner, "hparams", None) or {})


def _without_placeholder(log_hyperparams: Any) -> Any:
    """Only a run's first record counts in the HPARAMS tab: it must not be Lightning's own with -1 as the metric."""

    def log(params: Any, metrics: Any = None, *args: Any, **kwargs: Any) -> None:
        log_hyperparams(params, {} if metrics is None else metrics, *args, **kwargs)

    return log


def _place(tag: str) -> tuple[int, int]:
    """Accuracies of validation first, then what is ours, then other metrics of validation, then those of training."""
    if tag in _OURS:
        return 1, _OURS.index(tag)
    return (3 if tag.startswith("train") else 0 if "acc" in tag else 2), 0


def _flat(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Plain:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
