"""Sweeps over a grid: `python cli.py sweep --config configs/NAME.yaml --grid ire.kappa 1 2 --grid ire.gamma 0.9 0.8`.

Each trial of the grid is one process of `cli.py fit`. `Study` is the piece that decides who does which trial, for any
list of trials; its database is Optuna's.
"""

from lightning_ire.sweeps._command import main
from lightning_ire.sweeps._study import Attempt, Study

__all__ = ["Attempt", "Study", "main"]
