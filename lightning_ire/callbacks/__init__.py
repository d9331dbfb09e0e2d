"""Callbacks for Lightning's Trainer."""

from lightning_ire.callbacks.ire import IRE
from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = ["IRE", "SharpnessMonitor"]
