"""Run by test_loop.py: a plain loop over `DistributedDataParallel` in the processes that torchrun starts (gloo).

Usage: torchrun --nproc-per-node 2 loop_ddp_script.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import cases
import torch
import torch.nn.functional as F
from modules import Classifier, Net, sgd
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_ire import SAM, AverageSAM, EmpiricalFisher, HutchinsonHessian, IREStep, measure_sharpness

STEPS = 6
BOOST = {"kappa": 1.0, "gamma": 0.7, "interval": 2}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "empirical": ({**BOOST, "curvature": EmpiricalFisher()}, 1),
    "empirical-accumulated": ({**BOOST, "curvature": EmpiricalFisher()}, 2),
    "hessian": ({**BOOST, "curvature": HutchinsonHessian()}, 1),
    "sam-sync": ({"kappa": 0.0, "perturbation": SAM(0.2, sync=True)}, 1),
    "sam-sync-accumulated": ({"kappa": 0.0, "perturbation": SAM(0.2, sync=True)}, 2),
    "average-sam": ({"kappa": 0.0, "perturbation": AverageSAM(0.2)}, 1),
    "sam-ire": ({**BOOST, "perturbation": SAM(0.2)}, 1),  # each rank's own draws and ascent: not those of one process
}
JOINED = [name for name in RUNS if name != "sam-ire"]


def run(name: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Each step takes 16 samples, dealt out in turn to the ranks and their micro-batches."""
    settings, accumulate = RUNS[name]
    torch.manual_seed(11)
    module = Classifier(Net()).double()
    model: Any = DistributedDataParallel(module.net) if ranks > 1 else module.net
    optimizer = sgd(module)
    step = IREStep(model, optimizer, **settings)
    x, y = cases.data(16 * STEPS, dtype=torch.float64).tensors
    weights, losses = [], []
    for index in range(STEPS):
        mine = range(16 * index + rank, 16 * (index + 1), ranks)
        parts = torch.tensor(mine).chunk(accumulate)
        losses.append(step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), *((x[p], y[p]) for p in parts)))
        weights.append(torch.cat([weight.detach().reshape(-1) for weight in module.parameters()]))
    measured = measure_sharpness(
        model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), [(x[mine], y[mine])], ["lambda_max"]
    )
    step.release()
    return {
        "weights": torch.stack(weights),
        "losses": torch.stack(losses),
        "masks": dict(step.progress.masks.masks),
        "measured": measured.values,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {name: run(name, rank, distributed.get_world_size()) for name in RUNS}
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
