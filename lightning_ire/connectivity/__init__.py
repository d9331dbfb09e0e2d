"""Linear mode connectivity: the loss on the straight line between two networks. Torch only.

On the command line: `python cli.py barrier FIRST.ckpt SECOND.ckpt --config configs/NAME.yaml`. In code:

    from lightning_ire import barrier
    found = barrier(model, "a.ckpt", "b.ckpt", evaluate, recalibrate=batches)
    found.height, found.average, found.line
    found.figure().savefig("barrier.png")
"""

from lightning_ire.connectivity._line import barrier
from lightning_ire.connectivity._result import Barrier

__all__ = ["Barrier", "barrier"]
