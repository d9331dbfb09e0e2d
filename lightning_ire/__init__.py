"""lightning_ire: IRE and SAM for any LightningModule, as one callback."""

from lightning_ire._checks import ConfigurationError
from lightning_ire._torch import in_extra_pass
from lightning_ire.callbacks.ire import IRE
from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_ire.curvature import (
    Curvature,
    EmpiricalFisher,
    HutchinsonHessian,
    RandomMask,
    SampledFisher,
    SecondMoment,
)
from lightning_ire.perturbation import SAM, AdversarialModelPerturbation, Ascent, AverageSAM, Perturbation

__version__ = "0.1.0"
__all__ = [
    "IRE",
    "SAM",
    "AdversarialModelPerturbation",
    "Ascent",
    "AverageSAM",
    "ConfigurationError",
    "Curvature",
    "EmpiricalFisher",
    "HutchinsonHessian",
    "Perturbation",
    "RandomMask",
    "SampledFisher",
    "SecondMoment",
    "SharpnessMonitor",
    "in_extra_pass",
]
