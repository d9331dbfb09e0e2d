"""Data modules of the shipped configs: one dataset per file."""

from lightning_ire.data.digits import Digits

__all__ = ["Digits"]
