"""Sweeps over a grid: `python cli.py sweep --config configs/NAME.yaml --grid ire.kappa 1 2 --grid ire.gamma 0.9 0.8`.

Optuna's `GridSampler` chooses the cells and its database keeps the results; each cell is one process of `cli.py fit`.
"""

from lightning_ire.sweeps._command import main

__all__ = ["main"]
