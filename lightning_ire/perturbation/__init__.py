"""Where a step's gradient is taken: SAM and its relatives. A new one is one subclass of `Perturbation`."""

from lightning_ire.perturbation.base import GROUP_RADIUS, Ascent, Perturbation
from lightning_ire.perturbation.functional_sam import FunctionalSAM
from lightning_ire.perturbation.relatives import (
    GSAM,
    LESAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    StableSAM,
    WeightedSAM,
)
from lightning_ire.perturbation.rounding import Rounding
from lightning_ire.perturbation.sam import SAM, AdversarialModelPerturbation, AverageSAM

__all__ = [
    "GROUP_RADIUS",
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
]
