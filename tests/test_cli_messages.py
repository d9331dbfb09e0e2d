"""What the command line recognizes in the wording of others: every pattern, in a message that the real parser gives."""

import functools
import re
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml

from lightning_ire import ConfigurationError, _cli_messages, cli
from lightning_ire._cli_messages import one_line, with_full_key

FIT = ["fit", "--model", "ImageClassifier", "--model.num_classes", "10", "--model.model", "ResNet", "--data", "Digits"]
LISTED = {"trainer": {"callbacks": [{"class_path": "IRE", "init_args": {"gama": 1}}]}}
WRONG_TYPE, WRONG_VALUE, WRONG_CLASS = "--ire.start_epoch x", "--ire.beta x", "--model.model ResNett"
WRONG_KEY, WRONG_LISTED_KEY, WRONG_CALLABLE_KEY = (
    "--model.model.block [1]",
    "--config listed.yaml",
    "--model.optimizer.l 1",
)

PROVOKED = {
    _cli_messages._KEY.pattern: WRONG_VALUE,
    _cli_messages._GIVEN.pattern: WRONG_TYPE,
    _cli_messages._NO_SUCH_KEY.pattern: WRONG_KEY,
    _cli_messages._OTHER_CLASS.pattern: WRONG_KEY,
    "Problem with given": WRONG_KEY,
    "Does not validate": WRONG_TYPE,
    "Subtypes: ": WRONG_TYPE,
    "Errors:": WRONG_TYPE,
    "Given value": WRONG_TYPE,
    "Expected a <class 'NoneType'>": WRONG_TYPE,
    "Expected a path but": WRONG_CLASS,
    "Not a valid subclass": WRONG_LISTED_KEY,
    "Subclass types expect": WRONG_LISTED_KEY,
    "a class path": WRONG_LISTED_KEY,
    "a dict with": WRONG_LISTED_KEY,
    r'Parser key "[^"]+":': WRONG_VALUE,
    r"Type .* callable class: ": WRONG_CALLABLE_KEY,
    r"\. Got value: Namespace.*": WRONG_CALLABLE_KEY,
    r"\. Got value: ": WRONG_VALUE,
    r"Expected a dot import path string: ": WRONG_CLASS,
    r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(.*))": WRONG_VALUE,
}
"""Each pattern and a command line whose message it is for."""


@functools.cache
def message(flags: str) -> str:
    """What jsonargparse has to say about a command line that cannot be right, before we shorten it."""
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["cli.py"])
        patch.setattr(cli, "one_line", lambda text: heard.append(text) or "")
        Path("listed.yaml").write_text(yaml.safe_dump(LISTED))
        with pytest.raises(SystemExit):
            cli.main([*FIT, *flags.split()])
    return heard[0]


def test_every_pattern_is_provoked():
    beginnings, plainer = _cli_messages._BESIDE_THE_POINT, [pattern for pattern, _ in _cli_messages._PLAINER]
    others = [pattern.pattern for pattern in vars(_cli_messages).values() if isinstance(pattern, re.Pattern)]
    assert sorted({*others, *beginnings, *plainer} - {_cli_messages._WORKER.pattern}) == sorted(PROVOKED)


@pytest.mark.parametrize("pattern", PROVOKED)
def test_jsonargparse_still_says_what_is_recognized(pattern):
    text = message(PROVOKED[pattern])
    if pattern in _cli_messages._BESIDE_THE_POINT:
        found = any(line.strip(" -").startswith(pattern) for line in text.splitlines())
    else:
        found = re.search(pattern, text, re.MULTILINE)
    assert found, (
        f"jsonargparse {version('jsonargparse')} has another wording than lightning_ire/_cli_messages.py recognizes by "
        f"{pattern!r}: to `{PROVOKED[pattern]}` it now says\n{text}"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (WRONG_VALUE, "ire.beta: Expected float, got x"),
        ("--ire.kappa x", "ire.kappa: Expected float; Expected Mapping; Expected Literal['auto'], got x"),
        ("--ire.kappa {'*':x}", "ire.kappa: Expected float, got x; Expected Literal['auto']"),
        (WRONG_TYPE, "ire.start_epoch: Expected int, got x"),
        (WRONG_CLASS, "model.model: Expected a known class, got ResNett"),
        (WRONG_KEY, "no such key: model.model.block"),
        (WRONG_LISTED_KEY, "no such key: trainer.callbacks.gama"),
        (WRONG_CALLABLE_KEY, "no such key: model.optimizer.l"),
        ("--trainer.logger Foo", "trainer.logger: Expected a known class, got Foo; Expected Iterable; Expected bool"),
    ],
)
def test_nothing_is_left_of_the_wording(flags, line):
    assert one_line(message(flags)) == line


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ConfigurationError("Expected an image, got a.JPEG (OSError: half\n of it): copy it.")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_processes_that_load_data_are_one_line(workers):
    with pytest.raises(ConfigurationError) as caught:
        list(torch.utils.data.DataLoader(Broken(), num_workers=workers))
    assert workers == 0 or _cli_messages._WORKER.match(str(caught.value)), f"torch now says {caught.value}"
    assert one_line(str(caught.value)) == "Expected an image, got a.JPEG (OSError: half; of it): copy it."


def test_messages_that_are_not_understood_are_kept():
    assert one_line("first\n  second\n") == "first; second"
    other = "Import path a.B does not correspond to a subclass of C"  # of an argument that takes several classes
    assert one_line(f"first\n  - {other}\n") == "first"
    assert one_line(other) == other
    assert with_full_key("no name here", {"ire": {"gamma": 1.5}}) == "no name here"
    assert (
        with_full_key("Expected `delta` to be 1, got 2.", {"ire": {"gamma": 1.5}}) == "Expected `delta` to be 1, got 2."
    )


def test_full_key_is_the_one_with_the_value():
    settings = {"data": {"seed": 1}, "list": [{"init_args": {"seed": -1}}]}
    assert (
        with_full_key("Expected `seed` to be >= 0, got -1.", settings) == "Expected `list.0.seed` to be >= 0, got -1."
    )
    assert with_full_key("Expected `seed` to be odd.", settings) == "Expected `data.seed` to be odd."
