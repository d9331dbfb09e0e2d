"""What the command line says about a wrong key or value: one line with the full key, made from longer messages.

The patterns are jsonargparse's wording and one is torch's; `tests/test_cli_messages.py` provokes each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["one_line", "with_full_key"]

_KEY = re.compile(r'^([ -]*)Parser key "([^"]+)":', re.MULTILINE)
_GIVEN = re.compile(r"Given value: ([^\n({\[]+)$", re.MULTILINE)
_NO_SUCH_KEY = re.compile(r"Option '(\w+)' is not accepted")
_BESIDE_THE_POINT = (
    *("Problem with given", "Does not validate", "Subtypes: ", "Errors:", "Given value", "Expected a path but"),
    *("Not a valid subclass", "Expected a <class 'NoneType'>", "Subclass types expect", "a class path", "a dict with"),
)
"""What lines begin with that are left out."""
_OTHER_CLASS = re.compile(r"Import path \S+ does not correspond to a subclass of")
"""What the other classes say where an argument takes several: only worth telling if it is all there is."""
_WORKER = re.compile(r"^Caught \w+ in DataLoader worker.*\n(?:\w+\.)*\w+: ", re.DOTALL)
"""What torch puts before the message of an error in a process that loads data: the whole traceback."""
_PLAINER = (
    (r'Parser key "[^"]+":', ""),
    (r"Type .* callable class: ", ""),
    (r"\. Got value: Namespace.*", ""),
    (r"\. Got value: ", ", got "),
    (r"Expected a dot import path string: ", "Expected a known class, got "),
    (r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(.*))", r"Expected \1\2"),
)


def one_line(message: str) -> str:
    r"""Shorten a message of jsonargparse to the key and what is wrong with it; put any other message in one line.

    For an argument of several types or of a class, jsonargparse tells what each type had against the value, level by
    level, with the value and the types in between. A wording that is not known here is passed on as it is.

    Args:
        message: The message, of any number of lines.

    Returns:
        One line.

    Example:
        >>> one_line("Parser key \"ire.gamma\":\n  Expected a <class 'float'>. Got value: x")
        'ire.gamma: Expected float, got x'
    """
    message = _WORKER.sub("", message)
    keys, depth = [], -1
    for indent, key in _KEY.findall(message):
        if len(indent) > depth:  # deeper: inside the class that was given for the key before; else: another attempt
            keys.append(key)
            depth = len(indent)
    lines = [line.strip(" -") for line in message.splitlines()]
    lines = [_plainer(line) for line in lines if not line.startswith(_BESIDE_THE_POINT)]
    lines = [line for line in lines if not _OTHER_CLASS.match(line)] or lines
    lines = [line for line in lines if f"{line}, got" not in " ".join(lines)]  # what a number in a mapping adds to
    text, key = "; ".join(dict.fromkeys(filter(None, lines))), ".".join(keys)
    given = _GIVEN.search(message)
    if given and "got " not in text:
        text += f", got {given[1]}"
    text = _NO_SUCH_KEY.sub(rf"no such key: {key}.\1", text)
    return text if key in text else f"{key}: {text}"


def with_full_key(message: str, settings: dict[str, Any]) -> str:
    """Spell the argument that a constructor complains about as the user's full key.

    Args:
        message: What holds the constructor's message, "Expected `gamma` to be ..., got 1.5.", with the argument in
            backquotes.
        settings: The parsed command line as nested dictionaries.

    Returns:
        The message with the key: of those that end in the argument's name one with the value in the message, if any.

    Example:
        >>> with_full_key("Expected `gamma` to be in (0, 1], got 1.5.", {"ire": {"gamma": 1.5}})
        'Expected `ire.gamma` to be in (0, 1], got 1.5.'
    """
    name = re.search(r"`(\w+)`", message)
    if name is None:
        return message
    found = [(key, value) for key, value in _flatten(settings) if key.rsplit(".", 1)[-1] == name[1]]
    found = [(key, value) for key, value in found if f"got {value!r}" in message] or found
    return message.replace(name[0], f"`{found[0][0]}`") if found else message


def _plainer(line: str) -> str:
    for pattern, plain in _PLAINER:
        line = re.sub(pattern, plain, line)
    return line.strip()


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all nested values with their dotted keys as they are typed, that is without `init_args`."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _flatten(item, key if name == "init_args" else f"{key}.{name}".strip("."))
