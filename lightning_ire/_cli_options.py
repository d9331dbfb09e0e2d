"""Flags of the commands beside Lightning's own: a parser that raises, and what configs and flags say."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from lightning_ire._checks import ConfigurationError

__all__ = ["Parser", "behind", "check_key", "check_name", "content", "pairs", "value_of"]

Found = TypeVar("Found", bound=argparse.Namespace)


class Parser(argparse.ArgumentParser):
    """The parser of a command on a config: what is wrong is raised as a `ConfigurationError`.

    Args:
        command: Its name.
        usage: What may follow it.
        description: What it does.
        epilog: What its help ends with, line by line.
        config: What the config is for.
    """

    def __init__(self, command: str, usage: str, description: str, epilog: str, config: str) -> None:
        prog = f"cli.py {command}"
        super().__init__(
            prog=prog,
            usage=f"python {prog} {usage}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", type=Path, metavar="FILE", help=config)

    def read(self, words: Sequence[str], into: Found) -> Found:
        """Parse what the user typed; the config is a file then.

        Args:
            words: All but what is behind `--`.
            into: Gets the values as attributes.

        Returns:
            The same.
        """
        # numbers are no flags: argparse knows -1 and -0.1, and not -1e-3
        spelt_out = [f" {word}" if re.match(r"-(\d|\.|inf|nan)", word) else word for word in words]
        config = self.parse_args(spelt_out, into).config
        if config is None or not config.is_file():
            raise ConfigurationError(f"Expected `--config` to be a file, got {str(config or 'none')!r}.")
        return into

    def error(self, message: str) -> NoReturn:
        """Raise.

        Args:
            message: What is wrong.
        """
        raise ConfigurationError(f"{message} (python {self.prog} --help)")


def behind(args: list[str]) -> tuple[list[str], list[str]]:
    """Split what the user typed at the first `--`.

    Args:
        args: All words.

    Returns:
        Those of the command, and those for Lightning's own.
    """
    split = args.index("--") if "--" in args else len(args)
    return args[:split], args[split + 1 :]


def check_name(name: str, key: str = "--name") -> None:
    """Refuse what is no name of a file."""
    if not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
        raise ConfigurationError(f"Expected `{key}` to be of letters, digits and ._+-, got {name!r}.")


def check_key(key: str, by: str = "sweep", where: str = "in --grid or behind `--`") -> None:
    """Refuse a key that the runs are given anyway."""
    if key in ("c", "config", "ckpt_path", "trainer.logger") or key.startswith("trainer.logger."):
        raise ConfigurationError(f"Expected `{key}` to be left to the {by}, got it {where}.")


def pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of a command line, in its order, of `--key value`, `--key=value` and `--key+=value`.

    Example:
        >>> list(pairs(["--model.lr=0.1", "--seed", "-1", "--quiet", "--trainer.callbacks+=A"]))
        [('model.lr', '0.1'), ('seed', '-1'), ('quiet', ''), ('trainer.callbacks', 'A')]
    """
    words = list(flags)
    while words:
        key, _, value = words.pop(0).lstrip("-").partition("=")
        while words and (not words[0].startswith("-") or re.match(r"-[\d.]", words[0])):
            value = f"{value} {words.pop(0)}".strip()
        yield key.removesuffix("+"), value


def content(config: Path) -> Any:
    """Return the dictionaries, lists and values that a config holds; of what is no YAML the text."""
    return value_of(config.read_text(errors="replace"))


def value_of(text: str) -> Any:
    """Return what a text in YAML means; of what is no YAML the text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
