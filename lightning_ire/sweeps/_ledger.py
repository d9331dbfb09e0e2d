"""The study in Optuna's database: which cells are done, which run elsewhere, which are to do, and who does which."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_ire._checks import ConfigurationError
from lightning_ire.sweeps._database import calm, optuna
from lightning_ire.sweeps._grid import Cell, Grid

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["Ledger"]

_LIMIT = 1e300  # all parameters have the same range, for Optuna allows no other one later on
_CLAIM_SECONDS = 10.0  # how long a process may take from the start of a trial to its values; it takes milliseconds


class Ledger:
    """One study and the cells that this command wants of it.

    Two processes may choose the same cell, or one that is done; `claim` lets one of them run it. Of the trials with the
    same cell the one with the lowest number wins, so a process waits until all lower trials have said their cell.

    Args:
        storage: The database.
        name: Name of the study.
        grid: The cells.
        mode: "max" or "min".
    """

    def __init__(self, storage: RDBStorage, name: str, grid: Grid, mode: str = "max") -> None:
        self.name, self.grid = name, grid
        self._storage = storage
        self._direction = f"{mode}imize"
        self.study: Study | None = None
        self._first_number = 0

    @property
    def flags(self) -> list[str]:
        """The further flags that all runs of the study had."""
        assert self.study is not None
        return self.study.user_attrs.get("flags", [])

    def open(self, fingerprint: str | None, flags: Sequence[str] = ()) -> None:
        """Load the study, or make it.

        Args:
            fingerprint: What must be the same in all runs of the study; None to make and check nothing.
            flags: The further flags, to be remembered.

        Raises:
            ConfigurationError: If there is no study to load, or one with another fingerprint.
        """
        self._sampler = sampler = optuna().samplers.GridSampler(self.grid.space)
        try:
            self.study = optuna().load_study(study_name=self.name, storage=self._storage, sampler=sampler)
        except KeyError:
            if fingerprint is None:
                raise ConfigurationError(f"Expected the study {self.name!r} to be in the database, got none.") from None
            self.study = optuna().create_study(
                study_name=self.name,
                storage=self._storage,
                sampler=sampler,
                direction=self._direction,
                load_if_exists=True,
            )
        trials = self._trials()
        self._first_number = len(trials)
        if fingerprint is not None:
            self._check_fingerprint(fingerprint, trials)
            self.study.set_user_attr("flags", list(flags))

    def complete(self) -> dict[Cell, dict[str, Any]]:
        """Return the user attributes (`metrics` and others) of each complete cell."""
        return {cell: trial.user_attrs for trial, cell in self._known() if trial.state.name == "COMPLETE"}

    def running(self) -> set[Cell]:
        """Return the cells that some process has begun and not ended; those without a sign of life are to do again."""
        with calm():
            optuna().storages.fail_stale_trials(self.study)
        return self._in_state("RUNNING", known := self._known()) - self._in_state("COMPLETE", known)

    def to_do(self) -> list[Cell]:
        """Return the cells that are neither complete nor running nor failed since `open`, in the grid's order."""
        with calm():
            optuna().storages.fail_stale_trials(self.study)
        known = self._known()
        taken = self._in_state("COMPLETE", known) | self._in_state("RUNNING", known) | self._failed(known)
        return [cell for cell in self.grid.cells if cell not in taken]

    def failed(self) -> set[Cell]:
        """Return the cells whose run has failed by itself, in any process, since `open`."""
        return self._failed(self._known())

    def enqueue(self, to_do: Collection[Cell]) -> None:
        """Queue a cell that `GridSampler` would not choose: it chooses those that never ran, and only once.

        Args:
            to_do: The cells to choose from; at least one.
        """
        assert self.study is not None
        known = self._known()
        tried = {cell for _, cell in known}
        waiting = any(trial.state.name == "WAITING" for trial, _ in known)
        if waiting or (set(to_do) - tried and not self._sampler.is_exhausted(self.study)):
            return
        params = next(iter(to_do)).params
        ranges = {key: optuna().distributions.FloatDistribution(-_LIMIT, _LIMIT) for key in params}
        waiting_state = optuna().trial.TrialState.WAITING
        self.study.add_trial(optuna().trial.create_trial(state=waiting_state, params=params, distributions=ranges))

    def optimize(self, objective: Callable[[Trial], float], catch: type[Exception]) -> None:
        """Let Optuna choose a trial and run it.

        Args:
            objective: What to do with the trial; begins with `claim`.
            catch: What the objective raises when the run has failed and others can go on.
        """
        assert self.study is not None
        with calm():
            try:
                self.study.optimize(objective, n_trials=1, catch=(catch,))
            except ValueError as error:
                # this process slept for so long that another one took the trial for dead: it is to do again
                if "Cannot tell a FAIL trial" not in str(error):
                    raise

    def claim(self, trial: Trial) -> Cell | None:
        """Find out the trial's cell and whether this process is to run it.

        Args:
            trial: A new trial.

        Returns:
            The cell, or None if it is done, runs elsewhere or is not of this grid.
        """
        if trial.params and self.grid.find(trial.params) is None:
            return None  # queued by a process with another grid
        try:
            params = {key: trial.suggest_float(key, -_LIMIT, _LIMIT) for key in self.grid.values}
        except optuna().exceptions.UpdateFinishedTrialError:
            return None  # another process took this one for dead
        cell = self.grid.find(params)
        self._wait_for_lower(trial.number)
        for other, its_cell in self._known():
            active = other.state.name in ("RUNNING", "WAITING") and other.number < trial.number
            if its_cell == cell and (active or other.state.name == "COMPLETE"):
                return None
        return cell

    def _wait_for_lower(self, number: int) -> None:
        """Wait until the lower trials have said their cell; one that does not in time belongs to a dead process."""
        deadline = time.monotonic() + _CLAIM_SECONDS
        while silent := [t for t in self._trials() if t.number < number and t.state.name == "RUNNING" and not t.params]:
            if time.monotonic() > deadline:
                study_id = self._storage.get_study_id_from_name(self.name)
                for trial in silent:
                    trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
                    with suppress(optuna().exceptions.UpdateFinishedTrialError):
                        self._storage.set_trial_state_values(trial_id, optuna().trial.TrialState.FAIL)
            time.sleep(0.05)

    def _trials(self) -> list[FrozenTrial]:
        assert self.study is not None
        return self.study.get_trials(deepcopy=False)

    def _known(self) -> list[tuple[FrozenTrial, Cell]]:
        """Return the trials whose cell is in the grid."""
        found = ((trial, self.grid.find(trial.params)) for trial in self._trials())
        return [(trial, cell) for trial, cell in found if cell is not None]

    def _in_state(self, state: str, known: list[tuple[FrozenTrial, Cell]]) -> set[Cell]:
        return {cell for trial, cell in known if trial.state.name == state}

    def _failed(self, known: list[tuple[FrozenTrial, Cell]]) -> set[Cell]:
        new = [(trial, cell) for trial, cell in known if trial.number >= self._first_number]
        complete = self._in_state("COMPLETE", known)
        return {cell for trial, cell in new if trial.state.name == "FAIL" and trial.user_attrs.get("error")} - complete

    def _check_fingerprint(self, fingerprint: str, trials: list[FrozenTrial]) -> None:
        assert self.study is not None
        known: Mapping[str, Any] = self.study.user_attrs
        if known.get("fingerprint") == fingerprint:
            return
        # a study in which every run was refused for a wrong key or value may be put right
        if "fingerprint" in known and not all(trial.user_attrs.get("refused") for trial in trials):
            raise ConfigurationError(
                f"Expected the config and the further flags to be those that the study {self.name!r} was begun with, "
                "got others: give this sweep a name of its own with `--name`."
            )
        self.study.set_user_attr("fingerprint", fingerprint)
