"""Diagonal curvature estimates: what decides which coordinates IRE calls flat."""

from lightning_ire.curvature.base import Curvature, Estimate, MicroBatch, Window
from lightning_ire.curvature.empirical import EmpiricalFisher
from lightning_ire.curvature.hutchinson import HutchinsonHessian
from lightning_ire.curvature.random_mask import RandomMask
from lightning_ire.curvature.sampled import SampledFisher
from lightning_ire.curvature.second_moment import SecondMoment

__all__ = [
    "Curvature",
    "EmpiricalFisher",
    "Estimate",
    "HutchinsonHessian",
    "MicroBatch",
    "RandomMask",
    "SampledFisher",
    "SecondMoment",
    "Window",
]
