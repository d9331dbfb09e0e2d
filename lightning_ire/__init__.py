"""lightning_ire: IRE and SAM for any LightningModule, as one callback."""

from lightning_ire._checks import ConfigurationError
from lightning_ire.callbacks.ire import IRE
from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_ire.curvature import Curvature, EmpiricalFisher, SampledFisher
from lightning_ire.perturbation import SAM, AverageSAM, Perturbation

__version__ = "0.1.0"
__all__ = [
    "IRE",
    "SAM",
    "AverageSAM",
    "ConfigurationError",
    "Curvature",
    "EmpiricalFisher",
    "Perturbation",
    "SampledFisher",
    "SharpnessMonitor",
]
