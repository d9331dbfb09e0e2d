"""What the ranks of a distributed run do together, or one for all."""

from __future__ import annotations

import warnings

from torch import distributed

__all__ = ["warn_on_rank_zero"]


def warn_on_rank_zero(message: str) -> None:
    """Warn, once in a distributed run.

    Args:
        message: One sentence that says what to change.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        warnings.warn(message, stacklevel=3)
