"""Optuna, imported when needed, and its database with signs of life of running processes."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ire._checks import ConfigurationError, check_folder

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

__all__ = ["GRACE_SECONDS", "calm", "open_storage", "optuna"]

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 120
"""A run whose process has not written a sign of life for so long is done again."""


def optuna() -> Any:
    """Return the module `optuna` with its messages switched off.

    Returns:
        The module.

    Raises:
        ConfigurationError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("A sweep needs optuna: pip install 'lightning-ire[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def open_storage(url: str, *, must_exist: bool = False) -> RDBStorage:
    """Connect to the database and make its tables if it has none.

    Args:
        url: Address in SQLAlchemy's form.
        must_exist: Whether an SQLite file is not to be made.

    Returns:
        The storage.

    Raises:
        ConfigurationError: If the database does not answer.
    """
    sqlite = url.startswith("sqlite:///")
    path = Path(url.removeprefix("sqlite:///"))
    if sqlite and must_exist and not path.is_file():
        raise ConfigurationError(f"Expected the database {path} to be there, got nothing: no run of this sweep yet.")
    if sqlite:
        check_folder("--storage", path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = {"pool_pre_ping": True, **({"connect_args": {"timeout": 60}} if sqlite else {})}
    for attempt in range(5):
        try:
            with calm():
                return optuna().storages.RDBStorage(
                    url, engine, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
                )
        except ConfigurationError:
            raise
        except Exception as error:  # also of the driver, and of two processes that make the tables at the same time
            if attempt == 4:
                reason = str(error).strip().splitlines()[0]
                raise ConfigurationError(
                    f"Expected `--storage` to be a database that answers, got: {reason}"
                ) from error
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


@contextmanager
def calm() -> Iterator[None]:
    """Do not warn that Optuna calls its signs of life experimental.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna().exceptions.ExperimentalWarning)
        yield
