"""Runs of a comparison that take no time: what a run logs is a function of its command line."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightning_ire.compare import main
from lightning_ire.compare._work import Outcome

CONFIG: dict[str, Any] = {"ire": {"kappa": 1.0, "gamma": 0.9}, "trainer": {"max_epochs": 4}}
METHODS = "--method SGD --ire.kappa 0 --method SAM --ire.kappa 0 --ire.perturbation SAM --method IRE --ire.kappa 2"
TUNE = "--tune model.lr 0.01 1 log --tune ire.perturbation.rho 0.02 0.5"
SMALL = "--trials 4 --seeds 3 --tuning-seeds 1 --metric val/accuracy --report test/accuracy"


class StubProcess:
    """Stands in for `_Process`; remembers the command lines.

    Attributes:
        outcomes: What a run does instead of succeeding, by the name of its folder: an exit code, an exception, or
            values that it logs; used up by a run.
    """

    commands: ClassVar[list[dict[str, str]]] = []
    names: ClassVar[list[str]] = []
    outcomes: ClassVar[dict[str, Any]] = {}
    most_at_once = at_once = 0

    def __init__(self, run: Any, threads: int | None) -> None:
        self.run, self.polled = run, 0
        run.write_settings()
        run.log.write_text("first line\nerror: the last line\n")
        words = run.command[run.command.index("fit") :]
        flags = {key[2:]: value for key, value in itertools.pairwise(words) if key.startswith("--")}
        flags |= dict(word[2:].split("=", 1) for word in words if "=" in word)
        self.flags, self.name = flags, re.sub(r",pid=\d+$", "", run.trial.name)
        type(self).commands.append(flags)
        type(self).names.append(self.name)
        type(self).at_once += 1
        type(self).most_at_once = max(self.most_at_once, self.at_once)

    def poll(self) -> Outcome | None:
        self.polled += 1
        if self.polled < 2:
            return None
        type(self).at_once -= 1
        outcome = self.outcomes.pop(self.name, None)
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, int):
            return Outcome({}, [], "error: the last line", refused=outcome == 2)
        return Outcome({**logged(self.flags), **(outcome or {})}, [(1, 2.0), (2, 1.0)])

    def end(self, *, patient: bool) -> None:
        """It has ended."""


def logged(flags: dict[str, str]) -> dict[str, float]:
    """SAM is better by 2 points with twice the passes; the best rate is 0.1; a seed moves all methods alike."""
    sam, seed = "ire.perturbation" in flags, int(flags["seed_everything"])
    rate = float(flags.get("model.lr", 0.1))
    value = 0.9 + 0.02 * sam - 0.1 * abs(rate - 0.1) + 0.001 * (seed % 7) + 0.0003 * sam * (seed % 3)
    return {
        "val/accuracy": value,
        "test/accuracy": value - 0.01,
        "compare/passes": 200.0 if sam else 100.0,
        "compare/steps": 100.0,
        "compare/seconds": 1.5 if sam else 1.0,
        "compare/epochs": 4.0,
    }


def compare(arguments: str, config: Any = None) -> int:
    """Run the command with a config in the working directory."""
    Path("c.yaml").write_text(yaml.safe_dump(config or CONFIG))
    return main(["--config", "c.yaml", *arguments.split()])
