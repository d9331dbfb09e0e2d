"""Diagonal curvature estimates: what decides which coordinates IRE calls flat."""

from lightning_ire.curvature.base import Curvature, Estimate, MicroBatch, Window
from lightning_ire.curvature.empirical import EmpiricalFisher
from lightning_ire.curvature.sampled import SampledFisher

__all__ = ["Curvature", "EmpiricalFisher", "Estimate", "MicroBatch", "SampledFisher", "Window"]
