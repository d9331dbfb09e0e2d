"""Run by test_sharpness_ddp.py: measures in two processes (gloo) through Lightning's own launcher, saves what each has.

Usage: python sharpness_ddp_script.py FOLDER
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from ddp_script import OneSided
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from modules import Classifier, Net, OnceNet
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_ire import IRE, SAM, EmpiricalFisher
from lightning_ire.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_ire.sharpness.landscape import Landscape

STEPS = 6
EVERY = 2
TRACES = ("trace_hessian", "trace_normalized", "layer_traces")
CHEAP = ("trace_fisher", *TRACES, "lambda_max", "lambda_min", "ascent_gap", "stability")


class Measured(Classifier):
    """Knows when it is being measured, for the how-manieth time, and how often it was called in this measurement."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(Net() if net is None else net)
        self.measurement = self.evaluations = 0
        self.inside = False
        self.draws = cases.Notes()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.inside:
            self.evaluations += 1
            self.draws.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


class Failing(Measured):
    """One evaluation of the second measurement raises on rank 1 (0: all of them)."""

    def __init__(self, error: BaseException, evaluation: int) -> None:
        super().__init__()
        self.error, self.evaluation = error, evaluation

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        here = self.inside and self.global_rank == 1 and self.measurement == 2
        if here and self.evaluation in (0, self.evaluations):
            raise self.error
        return loss


class NotANumber(Measured):
    """The loss is NaN on rank 1 in the second measurement."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.inside and self.global_rank == 1 and self.measurement == 2 else loss


class Coarse(Measured):
    """In measurements the loss is of float32 on rank 0, and one that no labels can be drawn for on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not self.inside:
            return loss
        return loss.float() if self.global_rank == 0 else loss.detach().requires_grad_()


class OnceOnRank1(Measured):
    """Cannot be differentiated twice on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 0:
            return super().training_step(batch, batch_idx)
        self.evaluations += self.inside
        return F.cross_entropy(OnceNet.forward(self.net, batch[0]), batch[1])


class Reentrant(Measured):
    """The second half is checkpointed in the way that refuses `autograd.grad`."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__(Net(batch_norm=batch_norm))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.evaluations += self.inside
        x, y = batch
        second = nn.Sequential(*list(self.net)[1:])
        return F.cross_entropy(checkpoint(second, self.net[0](x), use_reentrant=True), y)


class PartlyUsed(Measured):
    """Each rank leaves another layer unused, in training and in measurements; nobody uses the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleList([nn.Linear(cases.CLASSES, cases.CLASSES) for _ in range(3)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.sides[self.global_rank](self.net(x)), y)


class Flat(Measured, OneSided):
    """On rank 1 the training loss is constant in step 2 (OneSided): SAM's norm is 0 there, and not on rank 0."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.inside:
            return Measured.training_step(self, batch, batch_idx)
        return OneSided.training_step(self, batch, batch_idx)


class NoAscent(Measured):
    """On rank 1 the ascent gradient of step 2 is NaN, and no other: SAM does not move there."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.passes += 1
        loss = super().training_step(batch, batch_idx)
        broken = self.global_rank == 1 and batch_idx == 2 and self.passes == 1 and not self.inside
        return loss * float("nan") if broken else loss


class OwnFisher(Measured):
    """A `fisher_loss` of its own that keeps the random numbers it gets."""

    def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.draws.append(float(torch.rand(())))
        return F.cross_entropy(self.net(x), (y + 1) % cases.CLASSES), len(x)


class Numbered(Dataset):
    """Samples that hold their number and a random number; reading one may fail on rank 1."""

    def __init__(self, samples: int, fails: bool = False) -> None:
        self.data, self.fails = cases.data(samples, dtype=torch.float64), fails

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.fails and os.environ.get("LOCAL_RANK") == "1":
            raise ValueError("cannot be read")
        x, y = self.data[index]
        return torch.cat([torch.tensor([float(index), float(torch.rand(()))], dtype=x.dtype), x[2:]]), y


class Stream(IterableDataset):
    """Five batches, dealt out in turn: three on the first device, two on the second."""

    def __iter__(self) -> Iterator[Any]:
        yield from list(cases.data(5, dtype=torch.float64))[int(os.environ.get("LOCAL_RANK", 0)) :: 2]


class Uneven(IterableDataset):
    """Two batches, of one size on the first device and of two on the second."""

    def __iter__(self) -> Iterator[Any]:
        tensors = cases.data(2, dtype=torch.float64).tensors
        for size in (4, 3 if os.environ.get("LOCAL_RANK") == "1" else 4):
            yield [tensor.repeat_interleave(4, 0)[:size] for tensor in tensors]


def numbered(samples: int, batch_size: int = 4, **kwargs: Any) -> Any:
    return lambda batch: DataLoader(Numbered(samples, **kwargs), batch_size=batch_size)


def stream(batch: int) -> Any:
    return DataLoader(Stream(), batch_size=1)


def joined(batches: int) -> Any:
    """Exactly `batches` batches of all devices together."""
    return lambda batch: DataLoader(cases.data(16 * batches, dtype=torch.float64, seed=5), batch_size=batch)


BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 2, "curvature": "empirical"}
SAM_SYNC = {**BOOST, "perturbation": SAM(0.1, sync=True)}
SAM_LOCAL = {**BOOST, "perturbation": SAM(0.1)}
EXACT = {"relative_error": 0.05, "max_vectors": 24, "tolerance": 1e-6, "max_iterations": 40, "hvp": "exact"}
FEW = {"quantities": CHEAP, "max_vectors": 3, "max_iterations": 4, "relative_error": 0.0}
STREAMED = {**FEW, "quantities": (*CHEAP, "sgd_ratio")}
COUNTED = {"max_vectors": 9, "max_iterations": 7, "tolerance": 1e-12, "relative_error": 0.0}
JOINED: dict[str, dict[str, Any]] = {
    "joined-sam": {
        "monitor": {
            **EXACT, "quantities": [*CHEAP, "spectral_density"], "num_eigenvalues": 2, "num_batches": 2, "rho": 0.3,
        },
        "ire": SAM_SYNC, "probe": joined(2), "every": STEPS,
    },
    "joined-one-batch": {
        "monitor": {**EXACT, "quantities": [*TRACES, "lambda_max", "stability", "sgd_ratio", "ascent_gap"]},
        "ire": BOOST, "probe": joined(1), "every": 3,
    },
    "joined-accumulated": {
        "monitor": {**EXACT, "quantities": ["sgd_ratio", "stability"], "num_batches": 4}, "ire": BOOST,
        "probe": joined(4), "accumulate": 2, "every": 3,
    },
    "joined-adam": {
        "monitor": {**EXACT, "quantities": ["sgd_ratio", "stability"], "num_batches": 3, "mode": "train"},
        "probe": joined(3), "adam": True, "every": 3,
    },
    "joined-gaps": {
        "monitor": {**EXACT, "quantities": ["noise_gap", "compression_gap", *TRACES, "block_curvature"], "bits": 3},
        "probe": joined(1), "every": 3,
    },
    "joined-differences": {
        "monitor": {**EXACT, "quantities": [*TRACES, "lambda_max", "stability"], "hvp": "finite_difference"},
        "probe": joined(1), "every": 3,
    },
}  # fmt: skip
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ire-sam": {"ire": SAM_LOCAL},
    "dropout-norm": {"module": lambda: Measured(Net(batch_norm=True, dropout=0.3)), "monitor": {"mode": "train"}},
    "unused-search": {"module": PartlyUsed, "strategy": {"find_unused_parameters": True}},
    "bucket-view": {"strategy": {"gradient_as_bucket_view": True}, "ire": SAM_LOCAL},
    "static": {"strategy": {"static_graph": True}, "ire": SAM_SYNC},
    "accumulated": {"accumulate": 2, "strategy": {"gradient_as_bucket_view": True}},
    "differences": {"monitor": {"hvp": "finite_difference"}},
    "reentrant": {"module": Reentrant},
    "reentrant-norm": {"module": lambda: Reentrant(batch_norm=True), "monitor": {"mode": "train", "num_batches": 2}},
    "reentrant-bucket-view": {"module": Reentrant, "strategy": {"gradient_as_bucket_view": True}, "accumulate": 2},
    "reentrant-static": {"module": Reentrant, "strategy": {"static_graph": True}},
}
FAILURES: dict[str, dict[str, Any]] = {
    **{
        f"{name}-{hvp}-{evaluation}": {
            "module": lambda error=error, evaluation=evaluation: Failing(error, evaluation),
            "monitor": {"num_batches": 2, "hvp": hvp},
        }
        for name, error in (("raises", KeyError("no luck")), ("memory", torch.OutOfMemoryError("too much")))
        for hvp, evaluation in (("auto", 2), ("exact", 9), ("auto", 17), ("auto", 23), ("finite_difference", 12))
    },
    "always": {"module": lambda: Failing(ValueError("no luck"), 0)},
    "probe-raises": {"probe": numbered(16, fails=True)},
    "once": {"module": OnceOnRank1},
    "coarse": {"module": Coarse},
    "nan": {"module": NotANumber},
    "basis": {"basis": True},
    "nan-coherence": {"module": NotANumber, "monitor": {"quantities": ["coherence"]}},
    "uneven-gap": {
        "monitor": {"quantities": ["gap"], "num_batches": 2},
        "probe": lambda batch: DataLoader(Uneven(), batch_size=None),
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "fisher": {
        "monitor": {"quantities": ["trace_fisher"], "max_vectors": 200, "relative_error": 0.0, "num_batches": 2},
        "probe": joined(2), "every": STEPS,
    },
    "labels": {
        "monitor": {"quantities": ["trace_fisher"], "max_vectors": 24},
        "probe": lambda batch: DataLoader(cases.data(1, dtype=torch.float64)),
    },
    "same-sample": {"monitor": {"quantities": ["lambda_max"]}, "probe": numbered(1)},
    "own-fisher": {
        "monitor": {"quantities": ["trace_fisher"], "max_vectors": 3, "num_batches": 2},
        "module": OwnFisher, "probe": joined(2),
    },
    "gaps": {
        "monitor": {"quantities": ["gap", "coherence"], "num_batches": 2}, "probe": joined(2), "every": STEPS,
    },
    "all-labels": {
        "monitor": {"quantities": ["trace_gauss_newton"], "max_vectors": 200, "relative_error": 0.0, "num_batches": 2},
        "probe": joined(2), "every": STEPS,
    },
    "draws": {"monitor": {"quantities": ["ascent_gap"], "num_batches": 3}, "probe": joined(3)},
    "shards": {"monitor": {**FEW, "num_batches": 3}, "probe": numbered(33)},
    "few-samples": {"monitor": {**FEW, "num_batches": 3}, "probe": numbered(5)},
    "two-samples": {"monitor": {**FEW, "num_batches": 3}, "probe": numbered(2)},
    "training-data": {"monitor": {**FEW, "num_batches": 3}, "odd": True},
    "stream": {"monitor": {**STREAMED, "num_batches": 4}, "probe": stream},
    "stream-one": {"monitor": {**STREAMED, "num_batches": 4}, "probe": stream, "accumulate": 2},
    "sam-local": {
        "monitor": {**EXACT, "quantities": ["stability"], "tolerance": 1e-9, "max_iterations": 150},
        "ire": {"kappa": 0.0, "perturbation": SAM(0.1)}, "probe": joined(1), "every": 3,
    },
    "flat": {
        "monitor": {**FEW, "quantities": ["stability", "sgd_ratio"]}, "every": 1, "module": Flat,
        "ire": {"kappa": 0.0, "perturbation": SAM(0.1)},
    },
    "no-ascent": {
        "monitor": {**FEW, "quantities": ["stability"]}, "every": 3, "module": NoAscent,
        "ire": {"kappa": 0.0, "perturbation": SAM(0.1)},
    },
    "counted": {
        "monitor": {**COUNTED, "quantities": [*CHEAP, "spectral_density", "sgd_ratio"], "num_batches": 3},
        "probe": joined(3), "hook": True, "every": 3,
    },
    "counted-sam": {
        "monitor": {**COUNTED, "quantities": ["stability"]}, "ire": SAM_LOCAL, "probe": joined(1), "hook": True,
        "every": 3,
    },
    "adaptive": {
        "monitor": {
            "quantities": ["trace_fisher", *TRACES, "lambda_max"], "relative_error": 0.1, "tolerance": 0.01,
            "max_vectors": 64, "max_iterations": 40,
        },
    },
    "logged": {
        "monitor": {**FEW, "quantities": ["lambda_max", "spectral_density", "layer_traces"]},
        "logs": True, "ire": BOOST, "every": 3,
    },
}  # fmt: skip
RUNS = JOINED | TRAININGS | FAILURES | OTHERS


class Watched(SharpnessMonitor):
    """Keeps everything about every measurement of its own."""

    def __init__(self, hooked: list[int], basis: bool, **kwargs: Any) -> None:
        super().__init__(every_n_epochs=None, **kwargs)
        self.hooked, self.basis, self.seen = hooked, basis, []

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        assert isinstance(module, Measured)
        module.inside, module.evaluations, module.draws = True, 0, cases.Notes()
        module.measurement += 1
        hooked, grads = len(self.hooked), [p.grad for p in module.parameters()]
        bits = [None if grad is None else grad.clone() for grad in grads]
        full = self.basis and module.measurement == 2 and trainer.global_rank == 1
        try:
            with collectives() as calls, local_fishers() as fishers, no_room(full):
                result = super().measure(trainer, module)
        finally:
            module.inside = False
        untouched = all(
            now is before and (copy is None or cases.same_bits(now, copy))
            for now, before, copy in zip([p.grad for p in module.parameters()], grads, bits, strict=True)
        )
        density = result.density
        self.seen.append(
            {
                "values": dict(result.values),
                "layer_traces": dict(result.layer_traces),
                "density": None if density is None else [density.nodes, density.weights],
                "skipped": dict(result.skipped),
                "out_of_memory": result.out_of_memory,
                "calls": calls,
                "fishers": fishers,
                "reducer": len(self.hooked) - hooked,
                "gradients_untouched": untouched,
                "evaluations": module.evaluations,
                "draws": list(module.draws),
                "probe": [] if self._probe is None else list(self._probe._batches),
                "weights": torch.cat([p.detach().reshape(-1) for p in module.parameters()]),
                "exact": self._exact,
            }
        )
        return result


@contextmanager
def collectives() -> Iterator[list[Any]]:
    """Lists what Python code sends to other devices: sizes of what is reduced, names of all else."""
    found: list[Any] = []

    def listing(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(args[0].numel() if name == "all_reduce" else name)
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list")
    new = {name: listing(name, getattr(torch.distributed, name)) for name in names}
    with mock.patch.multiple(torch.distributed, **new):
        yield found


@contextmanager
def local_fishers() -> Iterator[list[float]]:
    """Lists what this device contributes to traces of the Fisher."""
    found: list[float] = []
    original = Landscape._local_fisher

    def local(self: Landscape, index: int, draw: int, all_labels: bool) -> Tensor:
        value = original(self, index, draw, all_labels)
        found.append(float(value))
        return value

    with mock.patch.object(Landscape, "_local_fisher", local):
        yield found


@contextmanager
def no_room(full: bool) -> Iterator[None]:
    """The vectors of Lanczos do not fit."""
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        if full and len(args) == 2:
            raise torch.OutOfMemoryError("no room")
        return original(*args, **kwargs)

    with mock.patch.object(torch, "empty", empty):
        yield


class Steps(pl.Callback):
    """All weights and buffers after every batch; the norm of SAM's ascent on this device."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]))
        self.buffers.append(torch.cat([torch.zeros(1), *(b.double().reshape(-1) for b in pl_module.buffers())]))
        ire = next((one for one in trainer.callbacks if isinstance(one, IRE)), None)
        self.norms.append(float((ire.ascent_norm if ire is not None else None) or 0.0))


class Hooked(pl.Callback):
    """Counts what DDP's reducer reduces."""

    def __init__(self, hooked: list[int]) -> None:
        self.hooked = hooked

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def hook(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            self.hooked.append(bucket.index())
            return allreduce_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)


def training_data(spec: dict[str, Any], devices: int, batch_size: int) -> DataLoader:
    dataset: Any = cases.data(16 * STEPS, dtype=torch.float64)
    size = batch_size // spec.get("accumulate", 1)
    if spec.get("odd"):
        dataset, size = Numbered(16 * STEPS - 3), 8
    if devices == 1:
        return DataLoader(dataset, size)
    sampler = DistributedSampler(dataset, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    return DataLoader(dataset, size, sampler=sampler)


def run(name: str, devices: int, batch_size: int, monitored: bool = True, folder: Path | None = None) -> dict[str, Any]:
    spec = RUNS[name]
    torch.manual_seed(11)
    module = spec.get("module", Measured)().double()
    if spec.get("adam"):
        module.make_optimizer = lambda owner: torch.optim.Adam(owner.parameters(), lr=0.01)
    if "probe" in spec:
        module.probe_dataloader = lambda: spec["probe"](batch_size)
    steps, hooked = Steps(), []
    monitor = Watched(
        hooked, bool(spec.get("basis")), every_n_steps=spec.get("every", EVERY), **(FEW | spec.get("monitor", {}))
    )
    ire = dict(spec.get("ire", {"kappa": 0.0}))
    if ire.get("curvature") == "empirical":
        ire["curvature"] = EmpiricalFisher()
    callbacks = [IRE(**ire), *([monitor] if monitored else []), steps, *([Hooked(hooked)] if spec.get("hook") else [])]
    strategy: Any = "auto"
    if devices > 1:
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30), **spec.get("strategy", {}))
    settings: dict[str, Any] = {"devices": devices, "strategy": strategy, "precision": "64-true", "max_epochs": 1}
    settings["log_every_n_steps"] = 1
    settings |= {"use_distributed_sampler": False, "accumulate_grad_batches": spec.get("accumulate", 1)}
    if spec.get("logs"):
        assert folder is not None
        settings["logger"] = [TensorBoardLogger(folder, "board", "0"), CSVLogger(folder, "table", "0")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = cases.fit(module, callbacks, training_data(spec, devices, batch_size), **settings)
    shown = [str(warning.message) for warning in caught]
    return {
        "weights": torch.stack(steps.weights),
        "buffers": torch.stack(steps.buffers),
        "norms": steps.norms,
        "seen": monitor.seen,
        "hooked": len(hooked),
        "warnings": [text for text in shown if "SharpnessMonitor" in text],
        "metrics": {tag: value.clone() for tag, value in trainer.callback_metrics.items()},
    }


def validated() -> dict[str, Any]:
    """`Trainer.validate` in two processes, and `measure` after it."""

    class Validated(Measured):
        def train_dataloader(self) -> Any:
            return DataLoader(cases.data(32, dtype=torch.float64), batch_size=8)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    torch.manual_seed(11)
    module = Validated().double()
    monitor = Watched([], False, every_n_steps=1, **(FEW | {"num_batches": 2, "quantities": [*CHEAP, "lambda_min"]}))
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = cases.trainer([monitor], devices=2, strategy=strategy, precision="64-true")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (table,) = trainer.validate(module, module.train_dataloader(), verbose=False)
    monitor.measure(trainer, module)
    texts = [str(warning.message) for warning in caught]
    return {
        "table": dict(table),
        "seen": monitor.seen,
        "warnings": [text for text in texts if "sharpness" in text.lower()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    chosen = sys.argv[2:] or list(RUNS)
    results: dict[str, Any] = {}
    for name in chosen:
        results[name] = run(name, devices=2, batch_size=8, folder=folder / f"logs{rank}")
    for name in TRAININGS:
        if name in chosen:
            results[f"{name}-alone"] = run(name, devices=2, batch_size=8, monitored=False)
    if not sys.argv[2:]:
        results["validated"] = validated()
    torch.save(results, folder / f"rank{rank}.pt")
    cases.leave_together()
