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
TRACE_GAUSS_NEWTON: Final = "sharpness/trace_gauss_newton"
"""Tr(F) with all labels in place of drawn ones: does not miss the rare labels of a sure network."""
BLOCK_CURVATURE: Final = "sharpness/block_curvature/{}"
"""Tr(H_bb) / p_b, the mean curvature of the coordinates of a kind of block (embedding, query_key, ...)."""
BLOCKS: Final = "sharpness/block_curvature"
"""Figure: the same as bars, over the measurements of the run."""
ASCENT_GAP: Final = "sharpness/ascent_gap"
"""Loss at theta + rho g / ||g|| minus loss at theta."""
NOISE_GAP: Final = "sharpness/noise_gap"
"""Mean loss at theta + rho xi / ||xi|| over random xi, minus loss at theta."""
ROUNDING_GAP: Final = "compression/rounding_gap"
"""Loss with weights rounded to b bits, minus loss."""
ROUNDING_SLOPE: Final = "compression/rounding_slope"
"""Its first order, gradient times rounding error: of either sign, with mean zero over weights, none at a minimum."""
ROUNDING_PREDICTED: Final = "compression/rounding_predicted"
"""The mean of its second order, sum over tensors of s^2 Tr(H_ww) / 24 for steps s; where a trace is measured."""
DELETION_GAP: Final = "compression/deletion_gap"
"""Mean loss with a random share of the coordinates put back to the start of training, minus loss."""
TRACE_COVARIANCE: Final = "gap/trace_cov"
"""Tr(C), C the covariance of the gradients of single samples."""
NOISE_SCALE: Final = "gap/noise_scale"
"""Tr(C) / ||g||^2 in samples: batches much larger than this have gradients with little noise. Infinite where the noise
hides the gradient."""
GAP_RATE: Final = "gap/predicted_rate"
"""Predicted growth of the generalization gap per optimizer step."""
GAP_PREDICTED: Final = "gap/predicted_cumulative"
"""The same summed over the steps since the start of training."""
GAP_MEASURED: Final = "gap/measured"
"""Loss on held-out data minus loss on the probe, both without label smoothing."""
COHERENCE: Final = "coherence/sigma_per_sample"
"""lambda_1(S) / (m max_i lambda_1(H_i)) of m samples, S_ij^2 = Tr(H_i H_j): 1 / m where nothing overlaps, 1 for equal
Hessians of rank one."""
COHERENCE_RATIO: Final = "coherence/ratio"
"""Largest eigenvalue of a single sample's Hessian over its limit: above 1 SGD diverges."""
DROPOUT_VARIANCE: Final = "dropout/variance"
"""Variance of the gradient over dropout masks along the top eigenvector of H."""
DROPOUT_SLOPE: Final = "dropout/slope"
"""Slope of the logarithm of that variance over the logarithm of the eigenvalue, for the top eigenvectors."""
DROPOUT_CORRELATION: Final = "dropout/correlation"
"""Correlation of the two logarithms."""
EDGE: Final = "stability/edge"
"""Eigenvalue from which on steps of the current learning rate blow up."""
RATIO: Final = "stability/ratio"
"""Effective sharpness divided by its limit: above 1 steps blow up near a quadratic."""
KAPPA_HEADROOM: Final = "stability/kappa_headroom"
"""Largest kappa with which `stability/ratio` is at most 1, for the mask in force; to be compared with `ire/kappa`."""
SQUARED_NORM: Final = "effective_lr/squared_norm/{}"
"""||w||^2 of a tensor whose length changes nothing, with its name."""
EFFECTIVE_LR: Final = "effective_lr/{}"
"""Mean step size of the tensor's coordinates, lr for plain SGD, divided by ||w||^2."""
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

SHARPNESS_TAGS: Final = (
    *(TRACE_FISHER, TRACE_GAUSS_NEWTON, TRACE_HESSIAN, TRACE_NORMALIZED),
    *(LAMBDA_MAX, LAMBDA_MIN, ASCENT_GAP, NOISE_GAP),
)
STABILITY_TAGS: Final = (EDGE, RATIO, KAPPA_HEADROOM, SGD_RATIO)
MONITOR_PREFIXES: Final = (
    "sharpness/",
    "stability/",
    "compression/",
    "gap/",
    "coherence/",
    "dropout/",
    "effective_lr/",
)
"""What the names of all of SharpnessMonitor's values begin with."""
