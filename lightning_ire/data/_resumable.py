"""Where training data goes on in a run that is resumed inside an epoch, also in other batches or on other devices."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import after_the_last_step, loaded_fit_loop, set_batches_done
from lightning_ire.data._batches import EpochOrder

__all__ = ["ResumableData", "ResumableLoader"]

_NAMES = {
    "text": "the training text (`source`, `files`, `tokenizer` and what is held out)",
    "images": "the training images (`root` and what is held out)",
}
_NAMES |= {"contents": _NAMES["images"], "tokens": _NAMES["text"]}


class ResumableLoader(DataLoader):
    """A DataLoader over an `EpochOrder` that saves how many batches of the epoch it has given.

    Lightning begins to iterate before it tells the sampler the epoch, so the epoch is looked at, and processes are
    started, with the first batch. With `Trainer(overfit_batches=...)` it puts another sampler here, which has no
    epochs: then every pass begins with the first batch.

    Attributes:
        fit_loop: The trainer's, if it is known; it counts batches too.
    """

    fit_loop: Any = None
    epoch = 0
    given = 0
    loaded: dict[str, Any] | None = None
    _first = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give the batches of the epoch, or those that are left of it if a state was loaded for this epoch."""
        order, state, self.loaded = self.sampler, self.loaded, None
        self.epoch, self.given = getattr(order, "epoch", 0), 0
        if isinstance(order, EpochOrder):
            order.span = (0, order.total_size)
            if state is not None and state["epoch"] == self.epoch:
                self.given, behind = state["batches"], state.get("samples")
                order.span = (self.given * self.together, order.total_size)
                if behind is not None:
                    order.span = (behind, behind + order.left(behind))
            elif self.fit_loop is not None and self.fit_loop.epoch_loop.batch_progress.current.ready:
                rank_zero_warn(
                    "No position in the data is in the checkpoint: its epoch goes on with the first batches."
                )
        self._first = self.given
        for batch in super().__iter__():
            self.given += 1
            yield batch

    @property
    def together(self) -> int:
        """Samples of a batch on all devices."""
        order = self.sampler
        assert isinstance(order, EpochOrder)
        return (self.batch_size or 1) * order.num_replicas

    def samples(self, without: int) -> int:
        """Samples of the epoch that all devices have read.

        Args:
            without: Batches that do not count, the latest ones.
        """
        if self.loaded is not None:
            return self.loaded.get("samples", self.loaded["batches"] * self.together)
        order = self.sampler
        assert isinstance(order, EpochOrder)
        return order.span[0] + (self.given - without - self._first) * self.together

    def state_dict(self) -> dict[str, Any]:
        """Where it is; part of Lightning's checkpoints."""
        return dict(self.loaded) if self.loaded is not None else {"epoch": self.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there.

        Args:
            state: What `state_dict` returned; with a key `samples` for a position that is no number of batches.
        """
        self.loaded = dict(state)


class ResumableData(LightningDataModule):
    """Training data that goes on where it was when the last optimizer step of a checkpoint was made.

    A checkpoint inside an epoch holds the number of samples that went into optimizer steps, and all that their order
    depends on. The order being fixed, the epoch can be finished with another number of devices and other batches; the
    counts of batches that Lightning keeps are changed to what they would be had the epoch begun so. Gradients of a
    half-filled accumulation window are in no checkpoint: its batches are read again.
    """

    batch_key: ClassVar[str]
    _training: ResumableLoader | None = None
    _resumed: dict[str, Any] | None = None

    @abstractmethod
    def training_order(self) -> EpochOrder:
        """The order of the training samples; its batch is a whole optimizer step, or an equal part of one."""

    @abstractmethod
    def batch_per_device(self, order: EpochOrder) -> int:
        """Samples of a batch on a device.

        Args:
            order: The order of the training samples.
        """

    @abstractmethod
    def order_depends_on(self) -> dict[str, Any]:
        """Beside the epoch: values by key, which have to be the same in order to finish an epoch.

        A key that a checkpoint of an older release does not have is not compared with it.
        """

    def order_seed(self) -> int:
        """Seed of the training order: `seed_everything`, or else any (several devices: 0, as in Lightning)."""
        alone = self.trainer is None or self.trainer.world_size == 1
        return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32 if alone else 0))

    def resumable(self, loader: DataLoader) -> ResumableLoader:
        """Return the training loader, after it was told where to begin.

        Args:
            loader: The loader.
        """
        assert isinstance(loader, ResumableLoader)
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
        loader.fit_loop = getattr(self.trainer, "fit_loop", None)
        self._resumed, self._training = None, loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training data is; part of Lightning's checkpoints."""
        trainer, loader = self.trainer, self._training
        begun = loader is not None and (loader.given or loader.loaded is not None)
        if trainer is None or loader is None or not begun or trainer.overfit_batches:  # type: ignore[attr-defined]
            return {}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        ended = progress.is_last_batch and progress.current.ready == progress.current.processed
        window = 0 if ended else progress.current.processed % trainer.accumulate_grad_batches
        lost = progress.current.ready - progress.current.processed + window  # batches that are in no optimizer step
        return {
            **loader.state_dict(),
            "samples": loader.samples(without=lost),
            "ended": ended,
            "together": loader.together,
            "accumulation": trainer.accumulate_grad_batches,
            "order": self.order_depends_on(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there, if this is a fit.

        The loader has a state of its own, but Lightning 2.6 does not give it back if the loader was made early, for
        the length of the run (`estimated_stepping_batches`, which schedules ask for).

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ConfigurationError: If the epoch that the checkpoint is inside of cannot be finished with these settings.
        """
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.overfit_batches:  # type: ignore[attr-defined]
            return
        self._resumed = state_dict
        if "samples" not in state_dict:
            rank_zero_info("The checkpoint is of an older release: its seed, batch and data cannot be compared.")
        elif saved := loaded_fit_loop(trainer):
            self._resumed = self._go_on(trainer, saved, state_dict)
            saved["state_dict"]["combined_loader"] = [self._resumed]

    def _go_on(self, trainer: Any, saved: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Change Lightning's counts to the batches of this run, and return where the loader goes on."""
        order, batches = self.training_order(), saved["epoch_loop.batch_progress"]
        current, total = batches["current"], batches["total"]
        together = order.num_replicas * self.batch_per_device(order)
        all_of_it, limit = order.total_size // together, trainer.limit_train_batches
        length = min(all_of_it, limit) if isinstance(limit, int) else int(all_of_it * limit)
        before = (total["processed"] - current["processed"]) * state["together"] // together  # in the other epochs
        if state["ended"]:
            if current["processed"] != length:
                set_batches_done(saved, length, before, current["processed"] - current["completed"])
            return state
        behind = state["samples"]
        again = "set it back, or resume from a checkpoint at the end of an epoch"
        inside = "the epoch that the checkpoint is inside of"
        for key, value in self.order_depends_on().items():
            if behind and value != (old := state["order"].get(key, value)):
                raise ConfigurationError(
                    f"Expected {_NAMES.get(key, f'`{key}`')} to be {old!r} for the rest of {inside}, "
                    f"got {value!r}: {again}."
                )
        done = all_of_it - order.left(behind) // together
        if done >= length:
            raise ConfigurationError(
                f"Expected `{self.batch_key}` (or `trainer.limit_train_batches`) to leave a batch in {inside}, "
                f"got {order.batch} (or {limit}) with {order.available - behind} samples left: {again}."
            )
        if done % trainer.accumulate_grad_batches:
            raise ConfigurationError(
                f"Expected `trainer.accumulate_grad_batches` to divide the {done} batches that {inside} "
                f"has behind it, got {trainer.accumulate_grad_batches}: {again}."
            )
        unfinished = current["ready"] != current["processed"]
        stopped = saved["epoch_progress"]["current"]["processed"] != state["epoch"]  # counted as a whole epoch
        if done != current["processed"] or unfinished or stopped:
            later = bool(unfinished or stopped or current["processed"] % state["accumulation"])
            set_batches_done(saved, done, before, 1)
            after_the_last_step(saved, later)
        return {"epoch": state["epoch"], "batches": done, "samples": behind}
