"""Range tests with SAM and IRE at work: which learning rate, which kappa, which rho?

On the command line: `python cli.py find lr|kappa|rho --config configs/NAME.yaml`. In code:

    from lightning_ire import find
    found = find.learning_rates(trainer, module, datamodule)
    found.suggestion, found.reason
    found.figure().savefig("lr.png")
"""

from lightning_ire.find._command import main
from lightning_ire.find._range_test import kappas, learning_rates, radii
from lightning_ire.find._result import RangeTest

__all__ = ["RangeTest", "kappas", "learning_rates", "main", "radii"]
