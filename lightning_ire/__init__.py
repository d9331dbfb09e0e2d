"""lightning_ire: IRE and SAM for any LightningModule, as one callback.

Public names are loaded on first use: importing `lightning_ire.functional` loads neither Lightning nor torchmetrics.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ire._checks import ConfigurationError
    from lightning_ire.callbacks.ire import IRE
    from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor
    from lightning_ire.connectivity import Barrier, barrier
    from lightning_ire.curvature import (
        Curvature,
        EmpiricalFisher,
        HutchinsonHessian,
        RandomMask,
        SampledFisher,
        SecondMoment,
    )
    from lightning_ire.engine._torch import in_extra_pass
    from lightning_ire.engine.host import LocalHost
    from lightning_ire.integrations.accelerate import AccelerateHost
    from lightning_ire.integrations.fabric import FabricHost
    from lightning_ire.loop import IREStep
    from lightning_ire.perturbation import (
        GSAM,
        LESAM,
        SAM,
        AdversarialModelPerturbation,
        Ascent,
        AverageSAM,
        FriendlySAM,
        FunctionalSAM,
        LookSAM,
        MomentumSAM,
        Perturbation,
        Rounding,
        StableSAM,
        WeightedSAM,
    )
    from lightning_ire.sharpness import fisher_information, measure_sharpness

__version__ = "0.1.0"
__all__ = [
    "GSAM",
    "IRE",
    "LESAM",
    "SAM",
    "AccelerateHost",
    "AdversarialModelPerturbation",
    "Ascent",
    "AverageSAM",
    "Barrier",
    "ConfigurationError",
    "Curvature",
    "EmpiricalFisher",
    "FabricHost",
    "FriendlySAM",
    "FunctionalSAM",
    "HutchinsonHessian",
    "IREStep",
    "LocalHost",
    "LookSAM",
    "MomentumSAM",
    "Perturbation",
    "RandomMask",
    "Rounding",
    "SampledFisher",
    "SecondMoment",
    "SharpnessMonitor",
    "StableSAM",
    "WeightedSAM",
    "barrier",
    "fisher_information",
    "in_extra_pass",
    "measure_sharpness",
]

_MODULES = {
    "_checks": ("ConfigurationError",),
    "engine._torch": ("in_extra_pass",),
    "callbacks": ("IRE", "SharpnessMonitor"),
    "connectivity": ("Barrier", "barrier"),
    "curvature": ("Curvature", "EmpiricalFisher", "HutchinsonHessian", "RandomMask", "SampledFisher", "SecondMoment"),
    "engine.host": ("LocalHost",),
    "integrations.accelerate": ("AccelerateHost",),
    "integrations.fabric": ("FabricHost",),
    "loop": ("IREStep",),
    "sharpness": ("fisher_information", "measure_sharpness"),
    "perturbation": (
        "GSAM",
        "LESAM",
        "SAM",
        "AdversarialModelPerturbation",
        "Ascent",
        "AverageSAM",
        "FriendlySAM",
        "FunctionalSAM",
        "LookSAM",
        "MomentumSAM",
        "Perturbation",
        "Rounding",
        "StableSAM",
        "WeightedSAM",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PUBLIC_MODULES = (
    "callbacks",
    "connectivity",
    "curvature",
    "data",
    "engine",
    "find",
    "functional",
    "integrations",
    "loop",
    "models",
    "perturbation",
    "schedule",
    "sharpness",
    "tags",
)


def __getattr__(name: str) -> Any:
    """Load a public module, or the one that holds a public name."""
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PUBLIC_MODULES})
