"""The names of all logged values, in one place (they are part of the public contract)."""

from __future__ import annotations

from typing import Final

KAPPA: Final = "ire/kappa"
"""Strength in force at this step (largest over the parameter groups)."""
FLAT_FRACTION: Final = "ire/flat_fraction"
"""Share of the coordinates taking part that are called flat (>= gamma * p where there are ties)."""
THRESHOLD: Final = "ire/threshold"
"""Largest curvature estimate still called flat (per-tensor scope: the largest of the tensors' thresholds)."""
MASK_IOU: Final = "ire/mask_iou"
"""Intersection over union of the sharp sets of the last two masks."""
MASK_IOU_CHANCE: Final = "ire/mask_iou_chance"
"""What `ire/mask_iou` is expected to be for two independent random masks of these sizes."""
STEP_NORM_FLAT: Final = "ire/step_norm_flat"
"""L2 norm of the whole step (boost included) over the flat coordinates, in weight units."""
STEP_NORM_SHARP: Final = "ire/step_norm_sharp"
"""L2 norm of the whole step over all other coordinates, in weight units."""

PERTURBED_LOSS: Final = "sam/perturbed_loss"
"""Training loss at the perturbed weights, averaged over the accumulation window, on this device."""
GRAD_NORM: Final = "sam/grad_norm"
"""L2 norm of the gradient that the ascent used, over the perturbed parameters, on this device."""

IRE_TAGS: Final = (KAPPA, FLAT_FRACTION, THRESHOLD, MASK_IOU, MASK_IOU_CHANCE, STEP_NORM_FLAT, STEP_NORM_SHARP)
SAM_TAGS: Final = (PERTURBED_LOSS, GRAD_NORM)
