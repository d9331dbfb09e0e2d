"""How much two consecutive masks agree, by estimate: `ire/mask_iou` beside what random masks would have.

    OMP_NUM_THREADS=1 python benchmarks/mask_agreement.py

Trains `configs/digits_resnet_sgd_ire.yaml` for 15 epochs with each estimate (one seed, about 20 s each on a CPU core)
and writes the means over the last 20 masks to benchmarks/results/mask_agreement.json. Runs that are in the JSON already
are not made again.
"""

from __future__ import annotations

from statistics import mean

from runs import ROOT, remembered, scalars

CONFIG = ROOT / "configs" / "digits_resnet_sgd_ire.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "mask_agreement.json"
ALWAYS = "--ire.start_epoch null --test_after_fit false --trainer.max_epochs 15 --ire.curvature "
RUNS = {
    "SampledFisher()": "SampledFisher",
    "SampledFisher(form='micro_batch', micro_batch_size=16)": (
        "SampledFisher --ire.curvature.form micro_batch --ire.curvature.micro_batch_size 16"
    ),
    "SampledFisher(form='sample')": "SampledFisher --ire.curvature.form sample",
    "EmpiricalFisher()": "EmpiricalFisher",
    "HutchinsonHessian()": "HutchinsonHessian",
    "RandomMask()": "RandomMask",
}


def agreement(flags: str) -> dict[str, float]:
    """Mean intersection over union of the sharp sets, and its chance level."""
    curves = scalars(CONFIG, ALWAYS + flags, "ire/mask_iou", "ire/mask_iou_chance")
    values, chances = ([value for _, value in curve[-20:]] for curve in curves)
    return {"mask_iou": mean(values), "mask_iou_chance": mean(chances)}


def main() -> None:
    for name, result in remembered(RESULTS, RUNS, agreement).items():
        print(f"{result['mask_iou']:.3f} (chance {result['mask_iou_chance']:.3f})  {name}", flush=True)


if __name__ == "__main__":
    main()
