"""Does it help here? Methods at equal effort: `python cli.py compare`, and the same as functions.

Every method gets the same trials, the best settings are run with seeds that no tuning saw, differences are paired by
seed, and the report says what the luck of the seeds and of the search leaves of them.

For those without our command line `compare` takes a function that builds a run. `Study` of `lightning_ire.sweeps`
decides who makes which, so the same script, started twice, shares the work.

Example:
    >>> from lightning_ire.compare import Method, Range, compare
    >>> methods = [Method("SGD"), Method("SAM", {"perturbation": "SAM"}, tune={"rho": Range(0.02, 0.5, log=True)})]
    >>> methods[1].tune["rho"].value(0.5)
    0.1
"""

from lightning_ire.compare._build import Findings, compare
from lightning_ire.compare._command import main
from lightning_ire.compare._record import RunRecord
from lightning_ire.compare.design import Choice, Comparison, Design, Method, Range

__all__ = ["Choice", "Comparison", "Design", "Findings", "Method", "Range", "RunRecord", "compare", "main"]
