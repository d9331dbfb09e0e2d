"""The names of all logged values, in one place (they are part of the public contract)."""

from __future__ import annotations

from typing import Final

KAPPA: Final = "ire/kappa"
"""Strength in force at this step (the largest, where parameters have different ones)."""
FLAT_FRACTION: Final = "ire/flat_fraction"
"""Share of the coordinates taking part that are called flat (>= gamma * p where there are ties). Soft masks:
the mean of n."""
THRESHOLD: Final = "ire/threshold"
"""Largest curvature estimate still called flat (per-tensor scope: the largest of the tensors' thresholds). With `beta`:
of the moving average, whose bias towards its start at zero is taken out of this value. With a mapping as `gamma` each
pattern has one, `ire/threshold/PATTERN`, in place of this. Soft masks: the curvature at which n is 1/2."""
MASK_IOU: Final = "ire/mask_iou"
"""Intersection over union of the sharp sets of the last two masks. Soft masks: the sum of the smaller of the two sharp
shares 1 - n over that of the larger ones."""
MASK_IOU_CHANCE: Final = "ire/mask_iou_chance"
"""What `ire/mask_iou` is expected to be for two independent random masks of these sizes; not logged for soft masks."""
LAYER_FLAT_FRACTIONS: Final = "ire/layer_flat_fractions"
"""TensorBoard histogram: the share of flat coordinates in each parameter tensor, at the rows after a new mask."""
STEP_NORM_FLAT: Final = "ire/step_norm_flat"
"""L2 norm of the whole step (boost included) over the flat coordinates, in weight units; soft masks: of n times it."""
STEP_NORM_SHARP: Final = "ire/step_norm_sharp"
"""L2 norm of the whole step over all other coordinates, in weight units; soft masks: of 1 - n times it."""

PERTURBED_LOSS: Final = "sam/perturbed_loss"
"""Training loss at the perturbed weights, averaged over the accumulation window, on this device."""
GRAD_NORM: Final = "sam/grad_norm"
"""L2 norm of the gradient that the ascent used, over the perturbed parameters, on this device."""

IRE_TAGS: Final = (KAPPA, FLAT_FRACTION, THRESHOLD, MASK_IOU, MASK_IOU_CHANCE, STEP_NORM_FLAT, STEP_NORM_SHARP)
SAM_TAGS: Final = (PERTURBED_LOSS, GRAD_NORM)

TRACE_FISHER: Final = "sharpness/trace_fisher"
"""Tr(F) by eq. 6, the sharpness of the paper's experiments. This and what follows: see SharpnessMonitor."""
TRACE_HESSIAN: Final = "sharpness/trace_hessian"
"""Tr(H), H the Hessian of the loss on the probe."""
TRACE_NORMALIZED: Final = "sharpness/trace_normalized"
"""Sum over the parameter tensors of ||w||^2 Tr(H_ww): does not change where rescaling weights changes no output."""
LAMBDA_MAX: Final = "sharpness/lambda_max"
"""Largest eigenvalue of H (signed)."""
LAMBDA_RANK: Final = "sharpness/lambda_{}"
"""The second, third, ... largest eigenvalue, with its rank."""
LAMBDA_MIN: Final = "sharpness/lambda_min"
"""Smallest eigenvalue of H: the most negative one, if any is."""
ASCENT_GAP: Final = "sharpness/ascent_gap"
"""Loss at theta + rho g / ||g|| minus loss at theta."""
EDGE: Final = "stability/edge"
"""Eigenvalue from which on steps of the current learning rate blow up."""
RATIO: Final = "stability/ratio"
"""Effective sharpness divided by its limit: above 1 steps blow up near a quadratic."""
KAPPA_HEADROOM: Final = "stability/kappa_headroom"
"""Largest kappa with which `stability/ratio` is at most 1, for the mask in force; to be compared with `ire/kappa`."""
SGD_RATIO: Final = "stability/sgd_ratio"
"""Necessary condition for stability in the mean square, with the noise of batches: above 1 unstable."""

STDERR: Final = "_stderr"
"""Added to the tag of an estimate: its standard error."""
RESIDUAL: Final = "_residual"
"""Added to the tag of an eigenvalue: an eigenvalue lies within this distance."""
CONVERGED: Final = "_converged"
"""Added to the tag of an eigenvalue: 1 if the residual is within the tolerance, else 0."""

DENSITY: Final = "sharpness/spectral_density"
"""Figure: the distribution of the eigenvalues of H."""
DENSITY_QUANTILE: Final = "sharpness/spectral_density/quantile_{}"
"""The same as numbers: so many per cent of the eigenvalues are at most this; 0 and 100 are the outermost ones found."""
LAYERS: Final = "sharpness/layer_traces"
"""Figure: Tr(H_ww) of each parameter tensor."""
LAYER_TRACE: Final = "sharpness/layer_traces/{}"
"""The same as numbers, with the parameter's name."""
HISTOGRAM: Final = "_histogram"
"""Added to the tag of a figure: the same as a histogram (TensorBoard shows only one kind of thing under a tag)."""

SHARPNESS_TAGS: Final = (TRACE_FISHER, TRACE_HESSIAN, TRACE_NORMALIZED, LAMBDA_MAX, LAMBDA_MIN, ASCENT_GAP)
STABILITY_TAGS: Final = (EDGE, RATIO, KAPPA_HEADROOM, SGD_RATIO)
