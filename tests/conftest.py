"""Settings for all tests: one thread, fixed seeds, no test changes another's random numbers or working directory.

torch and what needs it are imported inside the fixtures: the process that starts the workers reads this file first,
and importing Lightning takes it 13 seconds before a worker is there.
"""

import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from matrix.runs import Record, Row


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share an expensive fixture go to one worker of `pytest -n --dist loadgroup`, which makes it once."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "ranks" in names or "jobs" in names:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
        elif "plain_runs" in names:
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["row"].id))  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _one_thread_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and the arguments of a command line without any: Lightning warns of others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])


@pytest.fixture(scope="session")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain run of each row of the parity matrix, made once."""
    from matrix.runs import run

    known: dict[str, Record] = {}

    def get(row: "Row") -> "Record":
        if row.id not in known:
            known[row.id] = run(row, None, tmp_path_factory.mktemp("plain"))
        return known[row.id]

    return get
