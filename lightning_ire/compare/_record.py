"""What a run of a comparison is asked for: its last values, its passes, steps and seconds, and a curve."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

__all__ = ["FILE", "RunRecord"]

FILE = "compare.json"


class RunRecord(pl.Callback):
    """Counts the passes of a run, keeps its last values, and stops it where hopeless trials are stopped.

    Passes are counted as backward passes, those of IRE, SAM and a monitor included, over a part of a batch too: the
    gradients of the parameter which got most. Where parameters are sharded these are not seen, and calls of
    `training_step` are counted. Where the Trainer has a folder for logs, all is also written to `compare.json` there,
    at the end of the fit and after a test.

    Args:
        curve: Logged value that is kept after each validation.
        stop_after: Share of the run at which it ends; schedules know nothing of it.
    """

    def __init__(self, curve: str = "val/loss", stop_after: float = 1.0) -> None:
        self.curve_of, self.stop_after = curve, stop_after
        self.values: dict[str, float] = {}
        self.curve: list[tuple[float, float]] = []
        self._forward, self._before, self._begun = 0, 0.0, math.nan
        self._backward: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._own: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the calls of `training_step` from here on."""
        if stage != "fit":
            return
        step, self._own = pl_module.training_step, vars(pl_module).get("training_step")

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._forward += 1
            return step(*args, **kwargs)

        vars(pl_module)["training_step"] = counted

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count no more."""
        if stage == "fit":
            vars(pl_module).pop("training_step", None)
            if self._own is not None:
                vars(pl_module)["training_step"] = self._own

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs, validation included; gradients are counted."""
        self._begun = time.monotonic()
        for number, parameter in enumerate(pl_module.parameters()):
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(functools.partial(self._count, number)))

    def _count(self, number: int, _: Any) -> None:
        self._backward[number] = self._backward.get(number, 0) + 1

    @property
    def passes(self) -> float:
        """How many there were."""
        return float(max(self._backward.values(), default=self._forward))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop at the end of the share; also at a last step inside an epoch, so that it is validated."""
        share = self.stop_after * trainer.estimated_stepping_batches if self.stop_after < 1 else math.inf
        if trainer.global_step >= min(share, trainer.max_steps if trainer.max_steps > 0 else math.inf):
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a point of the curve: passes, and the value."""
        value = trainer.callback_metrics.get(self.curve_of)
        if value is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self.curve.append((self.passes, float(value)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the fit has logged."""
        self._keep(trainer)
        self._stop_counting()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook on the parameters."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the test has logged."""
        self._keep(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on counts from."""
        return {
            "forward": self._forward,
            "backward": dict(self._backward),
            "seconds": self._seconds,
            "curve": self.curve,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from an earlier attempt."""
        self._forward, self._backward = state_dict["forward"], dict(state_dict["backward"])
        self._before, self.curve = state_dict["seconds"], list(state_dict["curve"])

    @property
    def _seconds(self) -> float:
        return self._before + (0.0 if math.isnan(self._begun) else time.monotonic() - self._begun)

    def _keep(self, trainer: pl.Trainer) -> None:
        logged = {tag: float(value) for tag, value in trainer.callback_metrics.items() if value.numel() == 1}
        if trainer.state.fn == "fit":
            logged |= {
                "compare/passes": self.passes,
                "compare/steps": float(trainer.global_step),
                "compare/seconds": round(self._seconds, 3),
            }
            if trainer.max_steps == -1:
                logged["compare/epochs"] = float(trainer.max_epochs or -1)
            self._begun = math.nan
        self.values |= logged
        folder = trainer.log_dir  # asks all ranks
        if folder is not None and trainer.is_global_zero and trainer.loggers:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / FILE).write_text(json.dumps({"values": self.values, "curve": self.curve}))
