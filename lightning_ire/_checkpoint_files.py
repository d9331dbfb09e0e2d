"""Files of checkpoints: reading them without running code in them, and saying in one line what is wrong with one."""

from __future__ import annotations

import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_ire._checks import ConfigurationError

__all__ = ["misfit_reason", "read_checkpoint"]


def read_checkpoint(path: str, expected: str, weights_only: bool | None = True, trust: str = "") -> dict[str, Any]:
    """Return what a file holds; tensors stay on the disk until somebody looks at them.

    Args:
        path: The file.
        expected: How messages begin, up to what came.
        weights_only: As for `torch.load`.
        trust: What the user may write to have classes in the file loaded; empty: nothing.

    Returns:
        What is in the file; empty if that is no dictionary.

    Raises:
        ConfigurationError: If there is no such file, or nothing of torch's in it.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{expected} {path!r}, which is {'a folder' if Path(path).is_dir() else 'no file'}.")
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are none
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except OSError as error:
        raise ConfigurationError(f"{expected} {path!r}, which cannot be read: {error.strerror}.") from error
    except Exception as error:  # of pickle, of zip files, or whatever the bytes of something else lead to
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if refused is None:
            raise ConfigurationError(f"{expected} {path!r}, which is damaged or something else.") from error
        raise ConfigurationError(
            f"{expected} {path!r} with a {refused[1]} in it, which may run code{trust and ': '}{trust}."
        ) from error
    return content if isinstance(content, dict) else {}


def misfit_reason(error: Exception) -> str | None:
    """Say briefly why a state dict does not fit, or None if the error is about something else.

    Args:
        error: What `load_state_dict` of a module or an optimizer has raised.
    """
    message = str(error)
    if not re.match(r"Error\(s\) in loading state_dict for|loaded state dict ", message):
        return None
    return textwrap.shorten(re.sub(r"^Error\(s\) in loading state_dict for \w+:", "", message), 200)
