"""Run by test_ddp.py: trains in two processes (gloo) through Lightning's own launcher, saves what each rank has.

Usage: python ddp_script.py FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from cases import Classifier, Net
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ire import IRE, SAM, AverageSAM, EmpiricalFisher, tags

STEPS = 6


class OneSided(Classifier):
    """On rank 1 the loss is constant in step 2: a zero gradient there, and no displacement."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and batch_idx == 2:
            return loss * 0.0
        return loss


class OwnFisher(Classifier):
    """A sampled-label loss without chance: with it the estimates of two processes and of one are the same number."""

    def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.draws.append(float(torch.rand(())))
        return F.cross_entropy(self.net(x), (y + 1) % cases.CLASSES), len(x)


class PartlyUsed(Classifier):
    """Each rank leaves another layer unused."""

    def __init__(self) -> None:
        super().__init__(Net())
        self.sides = torch.nn.ModuleList([torch.nn.Linear(cases.CLASSES, cases.CLASSES) for _ in range(2)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.sides[self.global_rank](self.net(x)), y)


BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 2}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"ire": {"kappa": 0.0}},
    "empirical": {"ire": {**BOOST, "curvature": "empirical"}},
    "empirical-sam-sync": {"ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1, sync=True)}},
    "empirical-sam-local": {"ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1)}},
    "sam-sync": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1, sync=True)}},
    "sam-local": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1)}},
    "sam-local-accumulated": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1)}, "accumulate": 2},
    "average-sam": {"ire": {"kappa": 0.0, "perturbation": AverageSAM(0.1)}},
    "plain-accumulated": {"ire": {"kappa": 0.0}, "accumulate": 2},
    "rho-0-accumulated": {"ire": {"kappa": 0.0, "perturbation": SAM(0.0)}, "accumulate": 2},
    "sampled": {"ire": BOOST},
    "own-fisher-accumulated": {"ire": BOOST, "module": lambda: OwnFisher(Net()), "accumulate": 2},
    "sampled-sam-local-accumulated": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "accumulate": 2},
    "own-fisher": {"ire": BOOST, "module": lambda: OwnFisher(Net())},
    "rho-0": {"ire": {"kappa": 0.0, "perturbation": SAM(0.0)}},
    "one-sided": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": OneSided},
    "partly-used": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": PartlyUsed, "unused": True},
    "start-loss": {"ire": {**BOOST, "start_loss": 100.0}, "epochs": 2},
}


class Steps(pl.Callback):
    """All weights after every batch, and the masks."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]))


def run(name: str, devices: int, batch_size: int) -> dict[str, Any]:
    spec = RUNS[name]
    settings = dict(spec["ire"])
    if settings.get("curvature") == "empirical":
        settings["curvature"] = EmpiricalFisher()
    torch.manual_seed(11)
    module = spec.get("module", lambda: Classifier(Net()))().double()
    module.draws = []
    ire, steps = IRE(**settings), Steps()
    accumulate = spec.get("accumulate", 1)
    dataset = cases.data(16 * STEPS, dtype=torch.float64)
    train = cases.loader(dataset, batch_size // accumulate)
    strategy: Any = "auto"
    if devices > 1:  # Lightning's own sampler would shuffle: deal the samples out in turn instead
        sampler = DistributedSampler(dataset, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        train = DataLoader(dataset, batch_size // accumulate, sampler=sampler)
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=spec.get("unused", False))
    cases.fit(
        module,
        [ire, steps],
        train,
        use_distributed_sampler=False,
        devices=devices,
        strategy=strategy,
        precision="64-true",
        max_epochs=spec.get("epochs", 1),
        accumulate_grad_batches=accumulate,
    )
    masks = {key: mask.clone() for key, mask in ire._progress.masks.masks.items()}
    return {
        "weights": torch.stack(steps.weights),
        "masks": masks,
        "threshold": float(ire._progress.masks.logs.get(tags.THRESHOLD, 0.0)),
        "calls": module.calls,
        "draws": module.draws,
        "started_at": ire.started_at,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: run(name, devices=2, batch_size=8) for name in RUNS}
    rank = torch.distributed.get_rank()
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
