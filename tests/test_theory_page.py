"""docs/theory.md: its example runs and prints what stands there, and what it quotes is measured."""

import contextlib
import io
import re

from claims import __main__ as main
from claims import drift, edge

PAGE = (main.ROOT / "docs" / "theory.md").read_text()


def test_the_example_prints_what_stands_there() -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(found[1], {})
    assert printed.getvalue() == found[2]


def test_the_drift_it_quotes_is_measured() -> None:
    quoted = " ".join(line.removeprefix("> ") for line in PAGE.splitlines() if line.startswith("> "))
    assert quoted == drift.verdict(main.known("drift")).sentence


def test_the_ratio_it_quotes_is_measured() -> None:
    for batch in edge.BATCHES:
        boosted = edge._inflation(main.known("edge"), batch).mean
        assert f"kappa = {edge.KAPPA:g} makes `stability/ratio` {boosted:.1f} times" in PAGE
