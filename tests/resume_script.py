"""Run by test_resume.py: training runs that are killed (SIGKILL) and go on, every run in a process of its own.

Usage: python resume_script.py FOLDER JOB...

This process imports torch and trains nothing; it forks one child per run. Below FOLDER/JOB every run has a folder with
`rows.jsonl` (what a logger got, written at once, so that it survives the kill) and, unless it was killed, `final.ckpt`.
"""

import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from cases import Notes
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from modules import Classifier, Net
from torch.utils.data import DataLoader, TensorDataset

from lightning_ire import IRE, SAM, AverageSAM, EmpiricalFisher, FriendlySAM, LookSAM

BATCHES = 8  # per epoch, the last one short
EPOCHS = 3


class PositionLoader:
    """Batches in an order that depends on the epoch; saves where it is, as a stateful loader should.

    Lightning gives a saved position back only in the middle of an epoch; it tells the epoch by `sampler.set_epoch`.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int) -> None:
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, self
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch or self.position == len(self):
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch))
        for rows in order.split(self.batch_size)[self.position :]:
            self.position += 1
            yield self.dataset[rows]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Victim(Classifier):
    """Kills its own process when `kill` = (epoch, batch, event) comes about."""

    def __init__(self, dropout: float = 0.0, scheduler: Any = None) -> None:
        super().__init__(Net(batch_norm=True, dropout=dropout), scheduler=scheduler)
        self.kill: tuple[int, int, str] | None = None
        self.places, self.forwards, self.backwards = Notes([(0, 0)]), 0, 0

    @property
    def at(self) -> tuple[int, int]:
        """The epoch and batch that Lightning is in, also while an earlier micro-batch is replayed."""
        return self.places[0]

    @at.setter
    def at(self, place: tuple[int, int]) -> None:
        self.places[0] = place

    def event(self, name: str) -> None:
        if self.kill == (*self.at, name):
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.forwards += 1
        self.event(f"forward-{self.forwards}")
        x, y = batch
        hidden = self.net[0](x)
        hidden.register_hook(self.backward_seen)
        logits = hidden
        for index in range(1, len(self.net)):
            logits = self.net[index](logits)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        return loss

    def backward_seen(self, gradient: torch.Tensor) -> None:
        self.backwards += 1
        self.event(f"backward-{self.backwards}")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.event("validation")
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.event("step")

    def on_train_batch_end(self, *args: Any) -> None:
        self.event("batch-end")

    def on_train_epoch_end(self) -> None:
        self.event("epoch-end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.event("saving")


class Clock(pl.Callback):
    """Tells the victim where it is. Comes before IRE: its "stepped" lies between the base step and the boost."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *args: pl_module.event("stepped"))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.at = (trainer.current_epoch, batch_idx)
        pl_module.forwards = pl_module.backwards = 0
        pl_module.event("batch-start")


class Streams(pl.Callback):
    """Puts torch's random numbers back on resume, as Lightning does not."""

    def __init__(self) -> None:
        self.loaded: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"stream": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["stream"]

    def on_train_batch_start(self, *args: Any) -> None:
        if self.loaded is not None:
            torch.set_rng_state(self.loaded)
            self.loaded = None


class SaveAt(Checkpoint):
    """Saves after one micro-batch, in the middle of an accumulation window."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.path, self.batch = folder / "last.ckpt", batch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1 and args[-1] == self.batch:
            trainer.save_checkpoint(self.path)


class Rows(DummyLogger):
    """Writes each row at once; `repr` of a float keeps all its bits."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = (folder / "rows.jsonl").open("a")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    """Warms up over 6 steps, so that the highest lr so far goes on rising after an early checkpoint."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step + 1, 6) / 6 * (1 + math.cos(step / BATCHES)) / 2
    )


BOOST: dict[str, Any] = {"kappa": 2.0, "gamma": 0.7, "interval": 3}
SAM_IRE: dict[str, Any] = {**BOOST, "perturbation": SAM(0.1)}
FORCED: dict[str, Any] = {"kappa": 0.0, "perturbation": SAM(0.0)}
# mask due at steps 0, 3, ..., 12 = (1, 4), 15 = (1, 7): there the passes of SAM-IRE are forward-1, backward-1 (Fisher),
# backward-2, forward-2, backward-3
MOMENTS: list[tuple[int, int, str]] = [
    (1, 4, "forward-1"),
    (1, 4, "backward-1"),
    (1, 4, "backward-2"),
    (1, 4, "forward-2"),
    (1, 4, "backward-3"),
    (1, 4, "step"),
    (1, 4, "stepped"),
    (1, 4, "batch-end"),
    (1, 6, "saving"),
    (1, 7, "validation"),
    (1, 7, "epoch-end"),
    (2, 0, "batch-start"),
]
TWO: list[tuple[int, int, str]] = [(0, 6, "stepped"), (2, 3, "forward-1")]

# ire: the callback's arguments; kills: the moments of death; every: steps between checkpoints (5: never at an epoch's
# end); the rest: see `run`
RUNS: dict[str, dict[str, Any]] = {
    "sam-ire": {"ire": SAM_IRE, "kills": MOMENTS},
    "ire": {"ire": BOOST, "kills": TWO},
    "sam": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1)}, "kills": TWO},
    "sam-interval": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1, interval=3)}, "kills": TWO},
    "average-sam": {"ire": {**BOOST, "perturbation": AverageSAM(0.1)}, "kills": [(0, 6, "forward-1")]},
    "empirical": {"ire": {**SAM_IRE, "curvature": EmpiricalFisher()}, "kills": [(2, 3, "forward-2")]},
    "beta": {"ire": {**BOOST, "beta": 0.5}, "kills": TWO},
    "start-ahead": {"ire": {**SAM_IRE, "start_step": 13}, "kills": [(1, 3, "step"), (2, 3, "backward-2")]},
    "start-behind": {"ire": {**SAM_IRE, "start_step": 3}, "kills": TWO},
    "start-fraction": {"ire": {**BOOST, "start_step": 0.25}, "kills": TWO},
    "start-epoch": {"ire": {**BOOST, "start_epoch": 1}, "kills": TWO},
    # epoch means 1.4508, 1.4074; of the part after the checkpoint alone 1.51 (after step 5) and 1.43 (after step 10)
    "start-loss": {"ire": {**BOOST, "start_loss": 1.47}, "kills": [(0, 6, "stepped"), (1, 4, "batch-end")]},
    "start-loss-later": {"ire": {**BOOST, "start_loss": 1.41}, "kills": [(1, 4, "stepped"), (2, 3, "forward-1")]},
    "kappa-lr": {"ire": {**BOOST, "kappa_schedule": "lr"}, "kills": TWO, "scheduler": cosine},
    "accumulated": {
        "ire": SAM_IRE,
        "kills": [(1, 4, "batch-end"), (1, 5, "forward-2"), (2, 7, "backward-3")],
        "trainer": {"accumulate_grad_batches": 3},
        "every": 2,
    },
    # epoch mean 1.4433, of the part after the checkpoint alone 1.4501
    "accumulated-start-loss": {
        "ire": {**BOOST, "start_loss": 1.447},
        "kills": [(0, 7, "stepped"), (1, 4, "batch-end")],
        "trainer": {"accumulate_grad_batches": 3},
        "every": 2,
    },
    "friendly": {
        "ire": {**BOOST, "mask": "soft", "perturbation": FriendlySAM(0.1, start_step=3)},
        "kills": [(1, 4, "forward-2"), (2, 3, "stepped")],
        "dropout": 0.4,
        "streams": True,
    },
    "look": {
        "ire": {"kappa": 0.0, "perturbation": LookSAM(0.1, k=4, rho_schedule="lr", stop_step=0.9)},
        "kills": [(0, 6, "stepped"), (1, 4, "forward-1")],
        "scheduler": cosine,
    },
    "dropout": {"ire": SAM_IRE, "kills": TWO, "dropout": 0.4, "streams": True},
    "float64": {"ire": SAM_IRE, "kills": TWO, "trainer": {"precision": "64-true"}},
    "bf16": {"ire": SAM_IRE, "kills": TWO, "trainer": {"precision": "bf16-mixed"}},
    "sparse-rows": {"ire": SAM_IRE, "kills": TWO, "trainer": {"log_every_n_steps": 4}},
    # at an epoch boundary every loader will do
    "epoch-boundary-fixed": {
        "ire": SAM_IRE,
        "kills": [(1, 3, "forward-2"), (2, 3, "stepped")],
        "every": 8,
        "loader": "fixed",
    },
    "epoch-boundary": {"ire": SAM_IRE, "kills": [(1, 3, "forward-2")], "every": 8},
    # saved by validation, in the middle and at the end of an epoch
    "validation": {
        "ire": SAM_IRE,
        "kills": [(1, 1, "step"), (1, 6, "step")],
        "trainer": {"val_check_interval": 0.5},
        "every": None,
    },
    "validation-start-loss": {
        "ire": {**BOOST, "start_loss": 1.47},
        "kills": [(0, 6, "step"), (1, 1, "step"), (1, 6, "step")],
        "trainer": {"val_check_interval": 0.5},
        "every": None,
    },
}
# Against a plain run stopped and resumed at the same place, with a loader and random layers that resume badly.
FORCED_RUNS: dict[str, dict[str, Any]] = {
    "forced": {"kills": [(1, 4, "stepped"), (2, 7, "validation")]},
    "forced-accumulated": {"kills": [(1, 4, "batch-end")], "trainer": {"accumulate_grad_batches": 3}, "every": 2},
    "forced-inside-window": {"kills": [(1, 6, "batch-end")], "trainer": {"accumulate_grad_batches": 3}, "save_at": 4},
    "forced-validation": {"kills": [(1, 6, "step")], "trainer": {"val_check_interval": 0.5}, "every": None},
}


def run(
    spec: dict[str, Any], folder: Path, ire: dict[str, Any] | None, kill: Any = None, ckpt: Path | None = None
) -> None:
    """One run from a fixed random state, until it ends or kills itself.

    Keys of `spec`: trainer (arguments), every (steps between checkpoints; `None`: after each validation), loader
    ("position", "fixed", "shuffled"), dropout, scheduler, streams, save_at.
    """
    torch.manual_seed(5)
    module = Victim(spec.get("dropout", 0.0), spec.get("scheduler"))
    module.kill = kill
    if "64" in str(spec.get("trainer")):  # Lightning would do so after it has loaded a checkpoint into float32
        module.double()
    dataset = cases.data(60, dtype=torch.float64 if "64" in str(spec.get("trainer")) else torch.float32)
    kind = spec.get("loader", "position")
    train: Any = PositionLoader(dataset, 8) if kind == "position" else cases.loader(dataset, 8, kind == "shuffled")
    every = spec.get("every", 5)
    save: pl.Callback = ModelCheckpoint(folder, every_n_train_steps=every, save_last=True)
    if "save_at" in spec:
        save = SaveAt(folder, spec["save_at"])
    callbacks = [Clock(), *([Streams()] if spec.get("streams") else []), *([IRE(**ire)] if ire else []), save]
    trainer = cases.trainer(
        callbacks,
        **{"max_epochs": EPOCHS, "logger": Rows(folder), "enable_checkpointing": True, "num_sanity_val_steps": 0}
        | spec.get("trainer", {}),
    )
    torch.manual_seed(3)
    validation = DataLoader(cases.data(8, dtype=dataset.tensors[0].dtype, seed=9), batch_size=8)
    trainer.fit(module, train, validation, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    trainer.save_checkpoint(folder / "final.ckpt")


def fork(folder: Path, *args: Any, **kwargs: Any) -> int:
    """Run in a child; returns its exit code, negative for a signal."""
    folder.mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(args[0], folder, *args[1:], **kwargs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(
    spec: dict[str, Any], folder: Path, before: dict[str, Any] | None, after: dict[str, Any] | None, kill: Any
) -> None:
    """`before` until the kill, then `after` from its last.ckpt; the checkpoint is kept as resumed/from.ckpt."""
    code = fork(folder / "killed", spec, before, kill=kill)
    if code != -signal.SIGKILL:
        raise RuntimeError(f"{folder}: the run was to be killed at {kill}, but ended with {code}")
    kept = folder / "from.ckpt"
    shutil.copy(folder / "killed" / "last.ckpt", kept)
    if code := fork(folder / "resumed", spec, after, ckpt=kept):
        raise RuntimeError(f"{folder}: the resumed run ended with {code}")


def straight(spec: dict[str, Any], folder: Path, ire: dict[str, Any] | None) -> None:
    if code := fork(folder, spec, ire):
        raise RuntimeError(f"{folder}: the uninterrupted run ended with {code}")


def moment(kill: tuple[int, int, str]) -> str:
    return "{}-{}-{}".format(*kill)


def job(name: str, folder: Path) -> None:
    if name in RUNS:
        spec = RUNS[name]
        straight(spec, folder / "straight", spec["ire"])
        for kill in spec["kills"]:
            killed_and_resumed(spec, folder / moment(kill), spec["ire"], spec["ire"], kill)
    elif name in FORCED_RUNS:
        spec = {"loader": "shuffled", "dropout": 0.4, **FORCED_RUNS[name]}
        for kill in spec["kills"]:
            killed_and_resumed(spec, folder / "plain" / moment(kill), None, None, kill)
            killed_and_resumed(spec, folder / "forced" / moment(kill), FORCED, FORCED, kill)
    else:  # "exchange": the callback is added to, or taken from, a run that was killed after step 10
        late, kill = {**SAM_IRE, "perturbation": None, "start_step": 13}, (1, 3, "batch-end")
        straight({}, folder / "plain", None)
        straight({}, folder / "late", late)
        killed_and_resumed({}, folder / "added", None, late, kill)
        killed_and_resumed({}, folder / "taken", late, None, kill)
        killed_and_resumed({}, folder / "taken-boosted", SAM_IRE, None, kill)
        stripped = torch.load(folder / "taken-boosted" / "from.ckpt", weights_only=True)
        del stripped["callbacks"]["IRE"]
        torch.save(stripped, folder / "stripped.ckpt")
        if code := fork(folder / "stripped", {}, None, ckpt=folder / "stripped.ckpt"):
            raise RuntimeError(f"the run from the stripped checkpoint ended with {code}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        try:
            job(name, folder)
        except RuntimeError as error:  # for the tests of this job; the others go on
            (folder / "error.txt").write_text(str(error))
