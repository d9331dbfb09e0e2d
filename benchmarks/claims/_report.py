"""What the claims' tables and figures share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from report import table

__all__ = ["FIGURES", "ROOT", "Verdict", "table"]

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "claims"


class Verdict(NamedTuple):
    """A few words (reproduced, not reproduced, ...), a sentence for the README, and all numbers for CLAIMS.md."""

    short: str
    brief: str
    sentence: str
