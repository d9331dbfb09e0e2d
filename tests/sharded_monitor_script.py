"""Run by test_sharded_monitor.py: measures sharded models in several processes (gloo) and saves what each rank has.

Usage: python sharded_monitor_script.py FOLDER PROCESSES CELLS...
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import lightning.pytorch as pl
import sharded_script as base
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_script import BATCH, BOOST, SYNC, Sharded, Steps, adamw, even, for_tensor_parallel, groups
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ire import IRE, SAM, LocalHost, SharpnessMonitor, measure_sharpness
from lightning_ire._checks import ConfigurationError
from lightning_ire.functional import local, part_of_whole, sampled_losses, whole_of_part
from lightning_ire.sharpness import curvatures

EVERY = 5
PLAIN = [name for name in cases.BARE if name not in ("sgd_ratio", "trace_gauss_newton")]  # with SAM; of one process
ALL = [*PLAIN, "kappa_headroom"]
FINE = {"max_vectors": 9, "tolerance": 1e-5, "max_iterations": 50, "relative_error": 0.0}


def short_density() -> Any:
    """Inside of this a density takes 20 products in place of 120."""
    return mock.patch.multiple(curvatures, _DENSITY_VECTORS=2, _DENSITY_STEPS=10)


class OwnFisher(Sharded):
    """With a `fisher_loss` whose targets do not depend on the rank."""

    def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), (y + 1) % 3), len(x)


class Failing(Sharded):
    """The n-th evaluation of the second measurement raises on rank 1; before the model or after it."""

    inside = False
    measurement = evaluations = 0
    error: BaseException = KeyError("no luck")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.evaluations += self.inside
        if self.inside and self.global_rank == 1 and self.measurement == 2 and self.evaluations in FAILING:
            raise self.error
        return loss


class OutOfMemory(Failing):
    error = torch.OutOfMemoryError("too much")


FAILING: list[int] = []
EVALUATIONS = {"raises": (1, 20, 60), "memory": (78,)}
CELLS: dict[str, dict[str, Any]] = {
    "all": {"ire": BOOST | SYNC, "monitor": {"quantities": ALL, "num_batches": 2, "num_eigenvalues": 2, "rho": 0.3}},
    "one-batch": {
        "ire": BOOST,
        "monitor": {"quantities": ["trace_fisher", "trace_hessian", "layer_traces", "stability", "sgd_ratio"]},
    },
    "accumulated": {
        "ire": {"kappa": 0.0},
        "optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01),
        "monitor": {"quantities": ["sgd_ratio", "stability"], "num_batches": 4},
        "accumulate": 2,
    },
    "groups": {"ire": BOOST, "monitor": {"quantities": ["sgd_ratio", "stability"]}, "optimizer": groups},
    "adaptive": {
        "ire": {"kappa": 0.0, "perturbation": SAM(0.5, adaptive=True, sync=True, eta=0.01)},
        "monitor": {"quantities": ["stability", "ascent_gap"]},
    },
    "root-validated": {
        "ire": BOOST | SYNC,
        "monitor": {"quantities": ["ascent_gap", "lambda_max", "trace_fisher", "stability"], "mode": "train"},
        "how": "root",
        "validate": 2,
        "every": 3,
    },
    "frozen": {
        "ire": {"kappa": 0.0},
        "monitor": {"quantities": ["trace_fisher", "trace_normalized", "lambda_max", "stability"]},
        "optimizer": base.partly_frozen,
    },
    "fisher-loss": {"ire": {"kappa": 0.0}, "monitor": {"quantities": ["trace_fisher"]}, "module": OwnFisher},
    "raises": {"ire": {"kappa": 0.0}, "monitor": {"quantities": PLAIN, **FINE, "max_iterations": 4}, "module": Failing},
    "memory": {
        "ire": {"kappa": 0.0},
        "monitor": {"quantities": PLAIN, **FINE, "max_iterations": 4},
        "module": OutOfMemory,
    },
}


class Watched(SharpnessMonitor):
    """Keeps every measurement, with what it sent to other ranks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(every_n_epochs=None, **kwargs)
        self.seen: list[dict[str, Any]] = []

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        before = gathered(module)
        gradients = [None if p.grad is None else whole(p.grad) for p in module.parameters()]
        module.inside, module.evaluations = True, 0  # type: ignore[assignment]
        module.measurement = getattr(module, "measurement", 0) + 1  # type: ignore[assignment, operator]
        try:
            with collectives() as calls:
                result = super().measure(trainer, module)
        finally:
            module.inside = False  # type: ignore[assignment]
        resharded = not any(gathered_of_fsdp(module))
        after = gathered(module)
        self.seen.append(
            {
                "values": dict(result.values),
                "layer_traces": dict(result.layer_traces),
                "density": None if result.density is None else [result.density.nodes, result.density.weights],
                "skipped": dict(result.skipped),
                "out_of_memory": result.out_of_memory,
                "weights": after,
                "untouched": cases.same_bits(before, after)
                and all(
                    (p.grad is None) if kept is None else cases.same_bits(kept, whole(p.grad))
                    for kept, p in zip(gradients, module.parameters(), strict=True)
                ),
                "resharded": resharded,
                "calls": calls,
                "evaluations": module.evaluations,
            }
        )
        return result


def gathered_of_fsdp(module: nn.Module) -> Iterator[bool]:
    """For each parameter that FSDP2 has sharded: whether the module holds the gathered copy."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            yield from (not isinstance(parameter, DTensor) for parameter in one.parameters())


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return base.whole(tensor)


def gathered(module: nn.Module) -> Tensor:
    """All weights put together."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()
    return torch.cat([whole(p).reshape(-1) for p in module.parameters()])


@contextmanager
def collectives() -> Iterator[list[int]]:
    """Lists the sizes of what Python code of ours sums over the ranks."""
    found: list[int] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(torch.distributed, "all_reduce", all_reduce):
        yield found


def run(
    name: str, processes: int, mesh: tuple[int, int] | None = None, monitored: bool = True, **more: Any
) -> dict[str, Any]:
    """Train one cell; with one process unsharded, on the joined batches."""
    cell = CELLS[name] | more
    torch.manual_seed(11)
    module = cell.get("module", Sharded)(
        cell.get("net", even)(), cell.get("optimizer", adamw), cell.get("how", "layers")
    )
    sizes = mesh or (processes, 1)
    options: dict[str, Any] = {}
    if processes > 1:
        options = {"strategy": ModelParallelStrategy(*sizes, process_group_backend="gloo"), "devices": processes}
    if "validate" in cell:
        options |= {"val_check_interval": cell["validate"], "num_sanity_val_steps": 1}
    else:
        options |= {"limit_val_batches": 0}
    size = BATCH // (sizes[0] if processes > 1 else 1)
    monitor = Watched(every_n_steps=cell.get("every", EVERY), batch_size=size, **(FINE | cell["monitor"]))
    steps = Steps()
    trainer = cases.trainer(
        [IRE(**cell["ire"]), *([monitor] if monitored else []), steps],
        max_epochs=1,
        accumulate_grad_batches=cell.get("accumulate", 1),
        use_distributed_sampler=False,
        **options,
    )
    with the_likeliest_labels(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    shown = [str(one.message) for one in caught]
    return {
        "weights": torch.stack(steps.weights),
        "seen": monitor.seen,
        "warnings": [text for text in shown if "SharpnessMonitor" in text],
    }


@contextmanager
def the_likeliest_labels() -> Iterator[None]:
    """In place of drawn ones, so that estimates of several processes and of one are the same number."""
    with mock.patch.object(sampled_losses, "sample_labels", base.likeliest):
        yield


def without_trace(name: str, processes: int, **more: Any) -> dict[str, Any]:
    """With the monitor, and the weights of the same run without it."""
    return run(name, processes, **more) | {"alone": run(name, processes, monitored=False, **more)["weights"]}


def failing(name: str, processes: int) -> dict[str, Any]:
    """The same at several evaluations."""
    found = {}
    for evaluation in EVALUATIONS[name]:
        FAILING[:] = [evaluation]
        found[str(evaluation)] = run(name, processes)
    FAILING.clear()
    return found | {"alone": run(name, processes, monitored=False)["weights"]}


def validated(processes: int) -> dict[str, Any]:
    """`Trainer.validate` with all weights in the root, and then training."""
    torch.manual_seed(11)
    module = Sharded(even(), adamw, "root")
    monitor = Watched(every_n_steps=1, batch_size=BATCH // processes, quantities=["lambda_max", "ascent_gap"], **FINE)
    options: dict[str, Any] = {}
    if processes > 1:
        options = {"strategy": ModelParallelStrategy(processes, 1, process_group_backend="gloo"), "devices": processes}
    trainer = cases.trainer([monitor], use_distributed_sampler=False, limit_val_batches=1, **options)
    (table,) = trainer.validate(module, verbose=False)
    again = monitor.measure(trainer, module).values
    return {"table": dict(table), "again": dict(again), "seen": monitor.seen}


def plain_loop(processes: int, tensor_parallel: bool = False) -> dict[str, Any]:
    """`measure_sharpness` of a sharded model, without Lightning."""
    torch.manual_seed(11)
    model = (for_tensor_parallel if tensor_parallel else even)().to(torch.float64)
    rank, host = torch.distributed.get_rank() if processes > 1 else 0, None
    if processes > 1 and tensor_parallel:
        in_tensor_parallel(model)
        host = LocalHost(
            data_parallel=init_device_mesh("cpu", (1, processes), mesh_dim_names=("data", "tensor"))["data"]
        )
        rank, processes = 0, 1
    elif processes > 1:
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = base.data_of(model).tensors
    batches = [(x[rows], y[rows]) for rows in torch.arange(2 * BATCH)[rank::processes].split(BATCH // processes)]

    def loss_of(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    before = gathered(model)
    with the_likeliest_labels():
        measured = measure_sharpness(
            model, loss_of, batches, [*PLAIN, "sgd_ratio"], optimizer=optimizer, host=host, **FINE
        )
    assert cases.same_bits(before, gathered(model))
    assert not any(gathered_of_fsdp(model))
    assert not measured.skipped
    return {"values": dict(measured.values), "layer_traces": dict(measured.layer_traces)}


def refusals(processes: int) -> dict[str, str]:
    """Messages of what does not run."""
    found = {}
    for name, mesh in (("exact", (processes, 1)), ("exact-tensor-parallel", (1, processes))):
        strategy = ModelParallelStrategy(*mesh, process_group_backend="gloo")
        trainer = cases.trainer([SharpnessMonitor(hvp="exact")], strategy=strategy, devices=processes)
        try:
            trainer.fit(Sharded(for_tensor_parallel(), adamw))
        except ConfigurationError as error:
            found[name] = str(error)
    model = in_tensor_parallel(for_tensor_parallel())
    try:
        measure_sharpness(model, lambda batch: model(batch).sum(), [torch.ones(2, 5)], ["trace_hessian"])
    except ConfigurationError as error:
        found["plain-tensor-parallel"] = str(error)
    return found


def in_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def second_derivatives(processes: int) -> dict[str, Any]:
    """What torch's own second derivatives through tensor-parallel layers are, and what they should be."""
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        # a loss that is not linear in the output
        model = mlp_after_another()
        x = torch.randn(6, 5, dtype=torch.float64)
        if sharded:
            mesh = init_device_mesh("cpu", (processes,))
            parallelize_module(model, mesh, {"2": ColwiseParallel(), "4": RowwiseParallel()})
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        starts = [torch.ones(p.shape, dtype=p.dtype) for p in parameters]
        if sharded:
            starts = [
                DTensor.from_local(part_of_whole(v, p), p.device_mesh, p.placements, run_check=False)
                if isinstance(p, DTensor)
                else v
                for v, p in zip(starts, parameters, strict=True)
            ]
        products = torch.autograd.grad(gradients, parameters, starts)
        pairs = zip(products, parameters, strict=True)
        found.append(torch.cat([whole_of_part(local(h, p).detach(), p).reshape(-1) for h, p in pairs]))
    return {"right": found[0], "found": found[1]}


def mlp_after_another() -> nn.Module:
    return base.mlp(5, 6, 8, 3).to(torch.float64)


def in_half(processes: int) -> dict[str, float]:
    """Layers compute in bfloat16, the weights are float32; with one process all is float32."""
    torch.manual_seed(11)
    model = base.mlp(20, 32, 32, 10)
    if processes > 1:
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    x, y = torch.randn(128, 20), torch.randint(10, (128,))
    settings = FINE | {"tolerance": 0.01}
    measured = measure_sharpness(
        model,
        lambda batch: F.cross_entropy(model(batch[0]).float(), batch[1]),
        [(x, y)],
        ["lambda_max", "trace_hessian"],
        **settings,
    )
    return dict(measured.values)


LONG: dict[str, Any] = {"net": for_tensor_parallel, "every": 10}
VARIANTS: dict[str, Any] = {
    "": run,
    "alone": without_trace,
    "empty": lambda cell, processes: without_trace(cell, processes, net=base.with_empty),
    "tp": lambda cell, processes: without_trace(cell, processes, mesh=(1, processes), net=for_tensor_parallel),
    "2d": lambda cell, processes: without_trace(cell, processes, mesh=(2, processes // 2), **LONG),
    "hybrid": lambda cell, processes: without_trace(cell, processes, how="hybrid", every=10),
    "failing": failing,
    "validated": lambda cell, processes: validated(processes),
    "plain-loop": lambda cell, processes: plain_loop(processes),
    "plain-tensor-parallel": lambda cell, processes: plain_loop(processes, tensor_parallel=True),
    "refusals": lambda cell, processes: refusals(processes),
    "in-half": lambda cell, processes: in_half(processes),
    "second-derivatives": lambda cell, processes: second_derivatives(processes),
}


def measure(rank: int, processes: int, port: int, folder: Path, names: list[str]) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes), "RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name in names:
        cell, _, variant = name.partition("@")
        with short_density():
            results[name] = VARIANTS[variant](cell, processes)
    torch.save(results, folder / f"rank{rank}.pt")
    cases.leave_together()


if __name__ == "__main__":
    base.train = measure  # type: ignore[assignment]
    sys.exit(base.main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
