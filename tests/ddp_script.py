"""Run by test_ddp.py: trains in two processes (gloo) through Lightning's own launcher, saves what each rank has.

Usage: python ddp_script.py FOLDER RUNS...
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from modules import Classifier, Manual, Net
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ire import (
    GSAM,
    IRE,
    SAM,
    AdversarialModelPerturbation,
    AverageSAM,
    EmpiricalFisher,
    FriendlySAM,
    FunctionalSAM,
    HutchinsonHessian,
    LookSAM,
    MomentumSAM,
    RandomMask,
    SampledFisher,
    SecondMoment,
    WeightedSAM,
    tags,
)

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


class NotANumber(Classifier):
    """On rank 1 the loss is NaN in step 2: in all passes of it, or in the first one only."""

    def __init__(self, always: bool) -> None:
        super().__init__(Net())
        self.always, self.passes = always, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.passes += 1
        loss = super().training_step(batch, batch_idx)
        broken = self.global_rank == 1 and batch_idx == 2 and (self.always or self.passes == 1)
        return loss * float("nan") if broken else loss


class FisherNotANumber(OwnFisher):
    """The second estimate (step 2) is not finite on rank 1, where the draws of both are counted."""

    def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
        loss, count = super().fisher_loss(batch, batch_idx)
        return (loss * float("nan") if self.global_rank == 1 and len(self.draws) == 2 else loss), count


class Summed(torch.autograd.Function):
    """Sum over the devices; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return Summed.forward(ctx, gradient)


class JoinedNorm(torch.nn.Module):
    """Normalizes by the statistics of all devices together, as SyncBatchNorm does, which torch has for GPUs only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def joined(value: torch.Tensor) -> torch.Tensor:
            if not torch.distributed.is_initialized():
                return value
            return Summed.apply(value) / torch.distributed.get_world_size()

        mean = joined(x.mean(0))
        self.running_mean += 0.1 * (mean.detach() - self.running_mean)
        return (x - mean) / (joined((x - mean).square().mean(0)) + 1e-5).sqrt()


def joined_norm() -> Classifier:
    net = Net()
    net.insert(1, JoinedNorm())
    return OwnFisher(net)


def with_adam() -> Classifier:
    return Classifier(Net(), lambda module: torch.optim.Adam(module.parameters(), lr=0.01))


def with_radii() -> Classifier:
    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        first, *rest = module.parameters()
        return torch.optim.SGD([{"params": [first], "sam_rho": 0.3}, {"params": rest}], lr=0.1)

    return Classifier(Net(), sgd)


class Monitored(Classifier):
    """Stops early by a metric that differs between the ranks unless it is averaged."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 2}
STATIC = {"static_graph": True}
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
    "nan": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": lambda: NotANumber(True)},
    "nan-plain": {"ire": {"kappa": 0.0}, "module": lambda: NotANumber(True)},
    "nan-ascent": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": lambda: NotANumber(False)},
    "nan-ascent-empirical": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1)},
        "module": lambda: NotANumber(False),
    },
    "nan-fisher": {"ire": BOOST, "module": lambda: FisherNotANumber(Net())},
    "unused-search": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "strategy": {"find_unused_parameters": True}},
    "by-hand": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": lambda: Manual(closure=True)},
    "bucket-view": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "strategy": {"gradient_as_bucket_view": True}},
    "bucket-view-accumulated": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1, sync=True)},
        "strategy": {"gradient_as_bucket_view": True},
        "accumulate": 2,
    },
    "no-view": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1, sync=True)},
        "strategy": {"gradient_as_bucket_view": False},
        "accumulate": 2,
    },
    "static-ire": {"ire": BOOST, "strategy": STATIC},
    "static-own-fisher": {"ire": BOOST, "strategy": STATIC, "module": lambda: OwnFisher(Net())},
    "static-empirical-sam-sync": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1, sync=True)},
        "strategy": STATIC,
    },
    "static-average-sam": {"ire": {"kappa": 0.0, "perturbation": AverageSAM(0.1)}, "strategy": STATIC},
    "partial-window": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "accumulate": 2, "limit": 2 * STEPS - 1},
    "partial-window-sync": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": SAM(0.1, sync=True)},
        "accumulate": 2,
        "limit": 2 * STEPS - 1,
    },
    "start-step": {"ire": {**BOOST, "start_step": 3, "perturbation": SAM(0.1)}, "epochs": 2},
    "early-stopping": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": Monitored, "epochs": 6, "stop": True},
    "joined-norm": {"ire": {**BOOST, "perturbation": SAM(0.1, sync=True)}, "module": joined_norm},
    "joined-norm-local": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "module": joined_norm},
    "hessian": {"ire": {**BOOST, "curvature": HutchinsonHessian(2)}},
    "hessian-accumulated": {
        "ire": {**BOOST, "curvature": HutchinsonHessian(), "perturbation": SAM(0.1, sync=True)},
        "accumulate": 2,
    },
    "random": {"ire": {**BOOST, "curvature": RandomMask()}},
    "second-moment": {"ire": {**BOOST, "curvature": SecondMoment()}, "module": with_adam},
    "micro-batch": {"ire": {**BOOST, "curvature": SampledFisher(form="micro_batch"), "perturbation": SAM(0.1)}},
    "sample": {"ire": {**BOOST, "curvature": SampledFisher(form="sample"), "perturbation": SAM(0.1)}},
    "own-fisher-sample": {
        "ire": {**BOOST, "curvature": SampledFisher(form="sample")},
        "module": lambda: OwnFisher(Net()),
    },
    "ball-sync": {
        "ire": {
            **BOOST,
            "curvature": "empirical",
            "perturbation": AdversarialModelPerturbation(0.2, 0.5, 3, sync=True),
        },
        "accumulate": 2,
    },
    "ball-local": {"ire": {"kappa": 0.0, "perturbation": AdversarialModelPerturbation(0.2, 0.5, 2, "global")}},
    "ball-by-hand": {
        "ire": {"kappa": 0.0, "perturbation": AdversarialModelPerturbation(0.2, 0.5, 2, "global")},
        "module": lambda: Manual(closure=True),
    },
    "friendly": {"ire": {**BOOST, "curvature": "empirical", "perturbation": FriendlySAM(0.1)}, "accumulate": 2},
    "gsam": {
        "ire": {**BOOST, "curvature": "empirical", "perturbation": GSAM(0.1)},
        "strategy": {"gradient_as_bucket_view": True},
    },
    "weighted": {"ire": {"kappa": 0.0, "perturbation": WeightedSAM(0.1, gamma=0.6)}},
    "look": {"ire": {"kappa": 0.0, "perturbation": LookSAM(0.1, k=3)}, "epochs": 2},
    "momentum": {"ire": {"kappa": 0.0, "perturbation": MomentumSAM(0.1)}},
    "functional": {"ire": {"kappa": 0.0, "perturbation": FunctionalSAM(0.1, sync=True)}},
    "radii": {"ire": {"kappa": 0.0, "perturbation": SAM(0.1, sync=True)}, "module": with_radii},
    "straight": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "epochs": 3},
    "resumed": {"ire": {**BOOST, "perturbation": SAM(0.1)}, "epochs": 3, "resume": True},
}


FAST = ("plain", "rho-0", "sam-sync", "sam-local", "own-fisher")  # of `make test`


class Steps(pl.Callback):
    """All weights after every batch, and the masks."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]))


def run(name: str, devices: int, batch_size: int, folder: Path | None = None) -> dict[str, Any]:
    spec = RUNS[name]
    settings = dict(spec["ire"])
    if settings.get("curvature") == "empirical":
        settings["curvature"] = EmpiricalFisher()
    torch.manual_seed(11)
    module = spec.get("module", lambda: Classifier(Net()))().double()
    module.draws = cases.Notes()
    ire, steps = IRE(**settings), Steps()
    accumulate = spec.get("accumulate", 1)
    dataset = cases.data(16 * STEPS, dtype=torch.float64)
    train = cases.loader(dataset, batch_size // accumulate)
    strategy: Any = "auto"
    if devices > 1:  # Lightning's own sampler would shuffle: deal the samples out in turn instead
        sampler = DistributedSampler(dataset, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        train = DataLoader(dataset, batch_size // accumulate, sampler=sampler)
        options = {"find_unused_parameters": spec.get("unused", False), **spec.get("strategy", {})}
        strategy = DDPStrategy(process_group_backend="gloo", **options)
    settings = {
        "train": train,
        "use_distributed_sampler": False,
        "devices": devices,
        "strategy": strategy,
        "precision": "64-true",
        "max_epochs": spec.get("epochs", 1),
        "accumulate_grad_batches": accumulate,
        "log_every_n_steps": 1,
    } | ({"limit_train_batches": spec["limit"]} if "limit" in spec else {})
    callbacks = [ire, steps]
    if spec.get("stop"):
        callbacks.append(EarlyStopping("loss", patience=10, stopping_threshold=1.3))
    if spec.get("resume"):  # the first epoch in another trainer, with another callback
        assert folder is not None
        first, weights = DDPStrategy(process_group_backend="gloo"), copy.deepcopy(module.state_dict())
        save = ModelCheckpoint(folder, filename="first", every_n_epochs=1)
        before = {**settings, "strategy": first, "max_epochs": 1, "enable_checkpointing": True}
        cases.fit(module, [IRE(**spec["ire"]), steps, save], **before)
        module.load_state_dict(weights)
        settings["ckpt_path"] = str(folder / "first.ckpt")
    cases.fit(module, callbacks, **settings)
    masks = {key: mask.clone() for key, mask in ire._progress.masks.masks.items()}
    return {
        "weights": torch.stack(steps.weights),
        "masks": masks,
        "threshold": float(ire._progress.masks.logs.get(tags.THRESHOLD, 0.0)),
        "calls": module.calls,
        "draws": list(module.draws),
        "started_at": ire.started_at,
    }


def refusals() -> dict[str, str]:
    """Messages of what does not run."""
    found = {}
    for name, ire, options in (
        ("static-graph", [IRE(kappa=0.0, perturbation=SAM(0.1))], {"strategy": STATIC}),
        ("static-graph-accumulated", [], {"strategy": STATIC, "accumulate_grad_batches": 2}),
        ("sync-batch-norm", [], {"sync_batchnorm": True}),
    ):
        strategy = DDPStrategy(process_group_backend="gloo", **options.pop("strategy", {}))
        try:
            cases.fit(Classifier(Net(batch_norm=True)), ire, devices=2, strategy=strategy, **options)
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: run(name, devices=2, batch_size=8, folder=Path(sys.argv[1])) for name in sys.argv[2:]}
    if set(sys.argv[2:]) != set(FAST):
        results["refusals"] = refusals()
    rank = torch.distributed.get_rank()
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
    cases.leave_together()
