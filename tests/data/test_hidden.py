import logging
from collections import Counter

import pytest

from lightning_ire.data._hidden import is_hidden, is_of_the_system, say_left_out


@pytest.mark.parametrize(
    ("name", "hidden", "of_the_system"),
    [
        ("._x.png", True, False),
        (".ipynb_checkpoints", True, False),
        ("__MACOSX", True, True),
        ("Thumbs.db", True, True),
        ("THUMBS.DB", True, True),
        ("x.png", False, False),
        ("_x", False, False),
        ("thumbs.db.png", False, False),
    ],
)
def test_hidden(name, hidden, of_the_system):
    assert (is_hidden(name), is_of_the_system(name)) == (hidden, of_the_system)


def test_what_is_left_out_is_one_line(caplog):
    with caplog.at_level(logging.INFO):
        say_left_out("here", Counter())
        say_left_out("there", Counter({"hidden": 2, ".gif": 1}))
    assert caplog.messages == ["Left out of there: 1 .gif, 2 hidden."]
