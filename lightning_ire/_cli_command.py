"""What commands beside Lightning's own share: a run in place of one of Lightning's, and what they write."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ire._checks import ConfigurationError
from lightning_ire._cli_messages import one_line

__all__ = ["code_of", "run", "write"]


def code_of(command: Callable[[], None]) -> int:
    """Run a command; what is wrong with it is one line.

    Args:
        command: All of it.

    Returns:
        Its exit code: 0; 2: a wrong key or value, or a set-up that cannot work.
    """
    try:
        command()
    except (ConfigurationError, MisconfigurationException) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def run(cli: type[Any], subcommand: str, config: Path, flags: list[str]) -> None:
    """Run a command line with a config and flags, whatever this process was started with.

    Args:
        cli: A LightningCLI.
        subcommand: One of Lightning's.
        config: The config.
        flags: What follows.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within")
        cli([subcommand, "--config", str(config), *flags])


def write(folder: Path, name: str, content: dict[str, Any], figure: Callable[[], Any]) -> list[str]:
    """Write numbers and a picture, NAME.json and .png, under the next name that is free; all at once, at the end.

    Args:
        folder: Where; made if it is not there.
        name: The files' name.
        content: The numbers; what is not finite becomes null.
        figure: Makes the picture; without matplotlib there is none, and a line says so.

    Returns:
        The paths.
    """
    text, picture = json.dumps(_finite(content), indent=1, allow_nan=False), io.BytesIO()
    try:
        figure().savefig(picture, format="png", dpi=150)
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'lightning-ire[figures]')", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        numbers, image = (folder / f"{name}{f'-{number}' if number else ''}.{end}" for end in ("json", "png"))
        number += 1
        if image.exists():
            continue
        try:
            with numbers.open("x") as file:  # another process may write beside this one
                file.write(text)
        except FileExistsError:
            continue
        break
    if not picture.getvalue():
        return [str(numbers)]
    image.write_bytes(picture.getvalue())
    return [str(numbers), str(image)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
