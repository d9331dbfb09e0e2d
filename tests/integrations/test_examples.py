"""The second command of each page runs, as it stands there; the first one installs what it needs."""

import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["fabric", "accelerate", "transformers"]


def commands(page: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    block = re.search(r"```\n(pip install .*?)```", text, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_example_runs(page: str, tmp_path: Path) -> None:
    _, run = commands(page)
    python, script, *rest = run.split()
    assert python == "python"
    rest += ["--steps", "30"] if page == "transformers" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        env=cases.script_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"kappa 2, rho \S+: \d+\.\d+ (% of the test digits|nats per byte)", done.stdout)


@pytest.mark.parametrize("page", PAGES)
def test_what_it_needs_is_an_extra(page: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install, _ = commands(page)
    asked = re.fullmatch(r"pip install '\.\[(.*)\]'", install)
    assert asked is not None
    assert set(asked[1].split(",")) <= known.keys()
