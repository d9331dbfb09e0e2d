"""Callbacks for Lightning's Trainer."""

from lightning_ire.callbacks.ire import IRE

__all__ = ["IRE"]
