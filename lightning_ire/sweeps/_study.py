"""Who does which trial: several processes or machines share a list of trials, and each trial is done once."""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_ire._checks import ConfigurationError, check_folder

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["GRACE_SECONDS", "Attempt", "Study", "code", "number", "optuna"]

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 120  # an attempt whose process has not written a sign of life for so long is over
_LIMIT = 1e300  # all parameters have the same range, for Optuna allows no other one later on

TrialT = TypeVar("TrialT", bound=Mapping[str, Any])


class Attempt(Generic[TrialT]):
    """One process at work on `trial`, which is as it was given to the study."""

    def __init__(self, trial: TrialT, storage: RDBStorage, key: int, worst: float) -> None:
        self.trial, self._storage, self._key, self._worst = trial, storage, key, worst

    def note(self, **attributes: Any) -> None:
        """Keep something in the database; with an `error` the trial has failed and is not done again for now."""
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(self._key, name, value)

    def complete(self, value: float, **attributes: Any) -> None:
        """Keep the result; the trial is done. Optuna refuses a NaN: to it that is the worst value."""
        self.note(**attributes)
        self._end("COMPLETE", [self._worst if math.isnan(value) else value])

    def _end(self, state: str, values: list[float] | None = None) -> None:
        with suppress(optuna().exceptions.UpdateFinishedTrialError):  # completed, or taken for dead
            self._storage.set_trial_state_values(self._key, optuna().trial.TrialState[state], values)

    def _live(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(optuna().exceptions.StorageInternalError):  # the next one may get through
                self._storage.record_heartbeat(self._key)


class Study(Generic[TrialT]):
    """A list of trials that several processes or machines share: each trial is done by one of them, once.

    Who begins a trial writes an attempt into Optuna's database, and a sign of life every 15 seconds; without one for
    two minutes the trial is to do again. Optuna numbers attempts in the order in which they are written, so whoever has
    written one sees all lower ones: of two that begin the same trial the one with the higher number gives way.

    Args:
        folder: Where the database is, the SQLite file `name.db`.
        trials: What is to do, all different; a number is the same however it is spelt (0.9, "0.90").
        name: Of the study; what is done counts for longer lists of the same name as well.
        storage: Address of another database, in SQLAlchemy's form.
        mode: Whether the best result is the "max" or the "min".
        fingerprint: What must be the same for all that share the study; None: only look at a study that is there.
        flags: To be remembered.

    Raises:
        ConfigurationError: If two trials are the same, Optuna is not installed, the database does not answer, or there
            is no study to look at, or one with another fingerprint.

    Example:
        >>> study = Study(getfixture("tmp_path"), [{"lr": 0.1}, {"lr": 0.5}])
        >>> while study.to_do():
        ...     with study.claim() as attempt:
        ...         if attempt is not None:
        ...             attempt.complete(attempt.trial["lr"], seconds=3)
        >>> study.results() == [{"values": trial, "seconds": 3} for trial in study.trials]
        True
    """

    def __init__(
        self,
        folder: str | Path,
        trials: Sequence[TrialT],
        name: str = "study",
        *,
        storage: str | None = None,
        mode: str = "max",
        fingerprint: str | None = "",
        flags: Sequence[str] = (),
    ) -> None:
        self.trials: list[TrialT] = []
        self._places: dict[frozenset[tuple[str, float]], int] = {}
        self.extend(trials)
        self._worst = -math.inf if mode == "max" else math.inf
        self._storage = _open(storage or f"sqlite:///{Path(folder) / name}.db", must_exist=fingerprint is None)
        where = {"study_name": name, "storage": self._storage}
        try:
            self._study = optuna().load_study(**where)
        except KeyError:
            if fingerprint is None:
                raise ConfigurationError(f"Expected the study {name!r} to be in the database, got none.") from None
            self._study = optuna().create_study(**where, direction=f"{mode}imize", load_if_exists=True)
        self._id = self._storage.get_study_id_from_name(name)
        earlier = self._study.get_trials(deepcopy=False)
        self._first = len(earlier)
        if fingerprint is None:
            return
        # a study in which every run was refused for a wrong key or value may be put right
        refused = all(one.user_attrs.get("refused") for one in earlier)
        if not refused and self._study.user_attrs.get("fingerprint", fingerprint) != fingerprint:
            raise ConfigurationError(
                f"Expected the config and the further flags to be those that the study {name!r} was begun with, got "
                "others: give this one a name of its own with `--name`."
            )
        self._study.set_user_attr("fingerprint", fingerprint)
        self._study.set_user_attr("flags", list(flags))

    def extend(self, trials: Sequence[TrialT]) -> None:
        """Add trials; `ConfigurationError` if one of them is there already."""
        self._places |= {_key(_params(trial)): place for place, trial in enumerate(trials, len(self.trials))}
        self.trials += trials
        if len(self._places) < len(self.trials):
            raise ConfigurationError("Expected the trials of a study to be different, got one of them twice.")

    @property
    def flags(self) -> list[str]:
        """What was remembered with the study."""
        return self._study.user_attrs.get("flags", [])

    def results(self) -> list[dict[str, Any] | None]:
        """Return what was kept of each trial that is done, None for the others; in the order of the trials."""
        done = ([one.user_attrs for one in attempts if one.state.name == "COMPLETE"] for attempts in self._attempts())
        return [kept[-1] if kept else None for kept in done]

    def to_do(self) -> list[TrialT]:
        """Return the trials that are not done or begun and have not failed since this study was opened."""
        return [trial for trial, states in self._states() if not states & {"COMPLETE", "RUNNING", "ERROR"}]

    def running(self) -> list[TrialT]:
        """Return the trials that some process has begun and not ended."""
        return [trial for trial, states in self._states() if "RUNNING" in states and "COMPLETE" not in states]

    def failed(self) -> list[TrialT]:
        """Return the trials that have failed in any process since this study was opened, and are not done."""
        return [trial for trial, states in self._states() if "ERROR" in states and "COMPLETE" not in states]

    @contextmanager
    def claim(self) -> Iterator[Attempt[TrialT] | None]:
        """Hand out the first trial that is to do, None if there is none; not completed inside, it is to do again."""
        attempt = None
        while attempt is None and (to_do := self.to_do()):
            attempt = self._begin(to_do[0])
        if attempt is None:
            yield None
            return
        ended = threading.Event()
        alive = threading.Thread(target=attempt._live, args=(ended,), daemon=True)
        alive.start()
        try:
            yield attempt
        except optuna().exceptions.UpdateFinishedTrialError:
            pass  # this process slept for so long that another one took it for dead: the trial is to do again
        finally:
            ended.set()
            alive.join()
            attempt._end("FAIL")

    def _begin(self, trial: TrialT) -> Attempt[TrialT] | None:
        """Write an attempt, give way to a lower one, and return it if it is to go on."""
        attempt = self._write(trial)
        ours = self._storage.get_trial(attempt._key)
        for one in self._attempts()[self._places[_key(ours.params)]]:
            if one.state.name == "COMPLETE" or (one.state.name == "RUNNING" and one.number < ours.number):
                attempt._end("PRUNED")
                return None
        return attempt

    def _write(self, trial: TrialT) -> Attempt[TrialT]:
        """Write an attempt with its parameters and its state at once, then the first sign of life."""
        params, running = _params(trial), optuna().trial.TrialState.RUNNING
        ranges = dict.fromkeys(params, optuna().distributions.FloatDistribution(-_LIMIT, _LIMIT))
        template = optuna().trial.create_trial(state=running, params=params, distributions=ranges)
        return self._live(trial, self._storage.create_new_trial(self._id, template))

    def _live(self, trial: TrialT, key: int) -> Attempt[TrialT]:
        self._storage.record_heartbeat(key)
        attempt = Attempt(trial, self._storage, key, self._worst)
        attempt.note(values=dict(trial))
        return attempt

    def _states(self) -> Iterator[tuple[TrialT, set[str]]]:
        """Yield the trials with the states of their attempts; ERROR: failed by itself since this study was opened."""
        for trial, attempts in zip(self.trials, self._attempts(), strict=True):
            for one in attempts:
                if one.state.name == "RUNNING" and not one.user_attrs:  # perhaps killed before its first sign of life
                    with suppress(optuna().exceptions.UpdateFinishedTrialError):
                        self._live(trial, self._storage.get_trial_id_from_study_id_trial_number(self._id, one.number))
        optuna().storages.fail_stale_trials(self._study)
        for trial, attempts in zip(self.trials, self._attempts(), strict=True):
            new = {"ERROR" for one in attempts if one.number >= self._first and "error" in one.user_attrs}
            yield trial, {one.state.name for one in attempts} | new

    def _attempts(self) -> list[list[FrozenTrial]]:
        """Return the attempts at each trial."""
        found: list[list[FrozenTrial]] = [[] for _ in self.trials]
        for one in self._study.get_trials(deepcopy=False):
            if (place := self._places.get(_key(one.params))) is not None:
                found[place].append(one)
        return found


def optuna() -> Any:
    """Return the module `optuna`, silenced; without it there is a `ConfigurationError`."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("A sweep needs optuna: pip install 'lightning-ire[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # that is what it calls its signs of life
    return optuna


def number(value: str) -> float | None:
    """Return the finite number that `value` spells, or None.

    Example:
        >>> number("5e-4"), number("SAM"), number("nan")
        (0.0005, None, None)
    """
    try:
        spelt = float(value)
    except ValueError:
        return None
    return spelt if math.isfinite(spelt) else None


def code(value: Any) -> float:
    """Return the number that stands for `value` in the database: itself, or 48 bits of the SHA-256 of its text.

    Optuna's categorical parameters cannot be given further values later on, its numbers can.
    """
    spelt = number(text := str(value))
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)) if spelt is None else spelt


def _params(trial: Mapping[str, Any]) -> dict[str, float]:
    return {key: code(value) for key, value in trial.items()}


def _key(params: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset(params.items())


def _open(url: str, *, must_exist: bool) -> RDBStorage:
    """Connect to the database; make its tables if it has none."""
    connection, path = {}, Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///"):
        if must_exist and not path.is_file():
            raise ConfigurationError(
                f"Expected the database {path} to be there, got nothing: no run of this sweep yet."
            )
        check_folder("--storage", path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = {"connect_args": {"timeout": 60}}
    storage, alive = optuna().storages.RDBStorage, {"heartbeat_interval": HEARTBEAT_SECONDS}
    for attempt in range(5):
        try:
            return storage(url, {"pool_pre_ping": True, **connection}, **alive, grace_period=GRACE_SECONDS)
        except Exception as error:  # also of the driver, and of two processes that make the tables at the same time
            if attempt == 4:
                why = str(error).strip().splitlines()[0]
                raise ConfigurationError(f"Expected `--storage` to be a database that answers, got: {why}") from error
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")
