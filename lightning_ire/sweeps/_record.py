"""What the runs of a cell were made with, in a file beside them: what they left is of use to no other settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from lightning_ire import __version__
from lightning_ire._checks import ConfigurationError, check_folder
from lightning_ire.sweeps._grid import Cell
from lightning_ire.sweeps._options import Options, content, pairs
from lightning_ire.sweeps._runs import versions

__all__ = ["check", "write"]

_NAME = "made_with.json"


def check(options: Options, cell: Cell) -> None:
    """Refuse a cell in whose folder there are runs with other settings than these, or a folder that cannot be made.

    Args:
        options: Those of the sweep.
        cell: Whose runs.

    Raises:
        ConfigurationError: With the first key that differs.
    """
    folder = options.logs / cell.name
    check_folder("--folder", options.folder, folder)
    if not versions(folder):
        return
    path, ours = folder / _NAME, _settings(options, cell)
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError):
        difference = f"no {_NAME} that says it"
    else:
        key = next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), None)
        if key is None:
            return
        there, here = (repr(made[key]) if key in made else "nothing" for made in (theirs, ours))
        difference = f"`{key}` {there} there and {here} here"
    raise ConfigurationError(
        f"Expected the runs in {folder} to be made with the settings of this sweep, got {difference}: give another "
        "`--name` or `--folder`, or remove that folder."
    )


def write(options: Options, cell: Cell) -> None:
    """Write down what a run is made with, before it begins.

    Args:
        options: Those of the sweep.
        cell: Whose run.
    """
    path = options.logs / cell.name / _NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{_NAME}.{os.getpid()}")
    unfinished.write_text(json.dumps(_settings(options, cell), indent=1))
    unfinished.replace(path)


def _settings(options: Options, cell: Cell) -> dict[str, str]:
    """Return version, config, further flags and the cell's values by key; several values of one flag in their order."""
    flags: dict[str, str] = {}
    for key, value in [*pairs(options.flags), *cell.pairs]:
        flags[f"--{key}"] = " ".join(filter(None, (flags.get(f"--{key}"), value)))
    return {"lightning_ire": __version__, **dict(_flat(content(options.config))), **flags}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all nested values of the config with their dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _flat(item, f"{key}.{name}".strip("."))
    if not items:
        yield key, str(value)
