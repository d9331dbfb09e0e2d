"""Run by test_sharded.py: trains sharded models in several processes (gloo) and saves what each rank has.

Usage: python sharded_script.py FOLDER PROCESSES CELLS...

The processes are forked, so that everything is imported once, and one process group serves all cells: with these
variables set Lightning launches nothing itself.
"""

import contextlib
import io
import itertools
import os
import signal
import socket
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import sharded  # of benchmarks/
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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
    IREStep,
    LocalHost,
    LookSAM,
    MomentumSAM,
    RandomMask,
    Rounding,
    SampledFisher,
    SecondMoment,
    StableSAM,
    WeightedSAM,
    tags,
)
from lightning_ire._checks import ConfigurationError
from lightning_ire.engine._torch import change_marks
from lightning_ire.functional import sampled_losses
from lightning_ire.models import Llama

STEPS, BATCH, TOKENS = 10, 24, 11


def likeliest(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """In place of labels that are drawn: with it estimates of several processes and of one are the same number."""
    return logits.detach().flip(-1).argmax(-1)


class Sharded(pl.LightningModule):
    """A module of a user's, who shards it in `configure_model`."""

    def __init__(self, net: nn.Module, optimizer: Any, how: str = "layers", batch: int = BATCH) -> None:
        super().__init__()
        self.net = net.to(torch.float64)
        self.make_optimizer, self.how, self.batch = optimizer, how, batch

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or isinstance(self.net, FSDPModule):
            return
        if self.how == "hybrid":  # replicas of sharded models: a mesh of the user's own
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
            return
        if mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1 or mesh.size() == 1:
            if self.how != "root":
                for layer in self.net.children():
                    if any(True for _ in layer.parameters()):
                        fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])
            if self.how == "kept":
                self.net.set_reshard_after_backward(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", F.cross_entropy(self.net(x).flatten(0, -2), y.flatten()), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)

    def train_dataloader(self) -> DataLoader:
        strategy = self.trainer.strategy
        dealt = {"num_replicas": 1, "rank": 0}
        if isinstance(strategy, ModelParallelStrategy):
            dealt = strategy.distributed_sampler_kwargs
        data, size = data_of(self.net), self.batch // self.trainer.accumulate_grad_batches // dealt["num_replicas"]
        return DataLoader(data, size, sampler=DistributedSampler(data, shuffle=False, **dealt))

    val_dataloader = train_dataloader


class ByHand(Sharded):
    """The same steps in manual optimization."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def data_of(net: nn.Module) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    if isinstance(net, nn.Sequential):
        x = torch.randn(STEPS * BATCH, 5, generator=generator, dtype=torch.float64)
        return TensorDataset(x, torch.randint(3, (STEPS * BATCH,), generator=generator))
    tokens = torch.randint(TOKENS, (STEPS * BATCH, 7), generator=generator)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def even() -> nn.Module:
    return mlp(5, 7, 7, 3)


def with_empty() -> nn.Module:
    """On the third of three ranks one layer has no row, and another one."""
    return mlp(5, 2, 7, 3)


def for_tensor_parallel() -> nn.Module:
    return mlp(5, 8, 6, 3)


def llama() -> nn.Module:
    return Llama(TOKENS, width=12, num_layers=2, num_heads=2, feed_forward=18, context_length=8)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def groups(module: nn.Module) -> torch.optim.Optimizer:
    first, *rest = module.parameters()
    return torch.optim.SGD([{"params": [first], "sam_rho": 0.3, "lr": 0.05}, {"params": rest}], lr=0.1, momentum=0.9)


def partly_frozen(module: nn.Module) -> torch.optim.Optimizer:
    first, *rest = module.parameters()
    first.requires_grad_(False)
    return torch.optim.AdamW(rest, lr=1e-2)


BOOST: dict[str, Any] = {"kappa": 2.0, "gamma": 0.8, "interval": 2}
SYNC = {"perturbation": SAM(0.1, sync=True)}
CELLS: dict[str, dict[str, Any]] = {
    "plain": {"ire": {"kappa": 0.0}},
    "sampled": {"ire": BOOST},
    "sam-sampled": {"ire": BOOST | SYNC},
    "empirical": {"ire": BOOST | {"curvature": EmpiricalFisher()}},
    "second-moment": {"ire": BOOST | {"curvature": SecondMoment()}},
    "random": {"ire": BOOST | {"curvature": RandomMask()}},
    "hessian": {"ire": BOOST | {"curvature": HutchinsonHessian(2)}, "tolerance": 1e-6},
    "fraction": {"ire": BOOST | {"curvature": SampledFisher(fraction=0.5)}},
    "sam": {"ire": {"kappa": 0.0} | SYNC},
    "asam": {"ire": {"kappa": 0.0, "perturbation": SAM(0.5, adaptive=True, sync=True, eta=0.01)}},
    "sam-on": {"ire": BOOST | {"perturbation": SAM(0.5, parameters="norm", sync=True)}, "net": llama},
    "average-sam": {"ire": {"kappa": 0.0, "perturbation": AverageSAM(0.1)}},
    "rounding": {"ire": {"kappa": 0.0, "perturbation": Rounding(4)}},
    "average-sam-sampled": {"ire": BOOST | {"perturbation": AverageSAM(0.1)}},
    "ball": {"ire": BOOST | {"perturbation": AdversarialModelPerturbation(0.2, 0.5, 2, sync=True)}},
    "sam-sampled-accumulated": {"ire": BOOST | SYNC, "accumulate": 2},
    "sam-second-moment-accumulated-clipped": {
        "ire": BOOST | SYNC | {"curvature": SecondMoment()},
        "accumulate": 2,
        "clip": 0.05,
    },
    "friendly": {"ire": BOOST | {"perturbation": FriendlySAM(0.1)}, "accumulate": 2},
    "gsam": {"ire": BOOST | {"perturbation": GSAM(0.1)}},
    "look": {"ire": BOOST | {"perturbation": LookSAM(0.1, k=3, scope="global")}},
    "weighted": {"ire": BOOST | {"perturbation": WeightedSAM(0.1, gamma=0.6)}},
    "momentum": {"ire": BOOST | {"perturbation": MomentumSAM(0.1), "curvature": SecondMoment()}},
    "stable": {"ire": {"kappa": 0.0, "perturbation": StableSAM(0.1)}},
    "functional": {"ire": {"kappa": 0.0, "perturbation": FunctionalSAM(0.1, sync=True)}},
    "sharp": {"ire": BOOST | {"perturbation": SAM(0.1, sync=True, coordinates="sharp")}},
    "tensor-scope": {"ire": BOOST | {"scope": "tensor", "curvature": EmpiricalFisher()}},
    "by-name": {
        "ire": BOOST
        | {"kappa": {"*.bias": 0, "*0*": 3, "*": 1}, "gamma": {"*2*": 0.3, "*": 0.8}, "curvature": EmpiricalFisher()}
    },
    "soft": {"ire": BOOST | {"mask": "soft", "curvature": EmpiricalFisher(), "exclude_zero_curvature": True}},
    "soft-tensor": {"ire": BOOST | {"mask": "soft", "scope": "tensor", "curvature": EmpiricalFisher()}},
    "excluded": {"ire": BOOST | {"exclude": "*.bias", "exclude_zero_curvature": True}},
    "scheduled": {
        "ire": BOOST
        | {"kappa_schedule": "lr", "beta": 0.5, "scale_weight_decay": False}
        | {"perturbation": LookSAM(0.1, k=3, rho_schedule="lr")},
    },
    "groups": {"ire": BOOST | SYNC, "optimizer": groups},
    "frozen": {"ire": BOOST | SYNC, "optimizer": partly_frozen},
    "validated-average-sam": {
        "ire": BOOST | {"perturbation": AverageSAM(0.1), "curvature": EmpiricalFisher()},
        "how": "root",
        "validate": 2,
    },
    "validated-sam": {"ire": BOOST | SYNC, "how": "root", "validate": 2},
    "kept-after-backward": {"ire": BOOST | SYNC, "how": "kept"},
    "llama": {"ire": BOOST | SYNC, "net": llama},
    "by-hand": {"ire": BOOST | SYNC, "module": ByHand},
    "start-loss": {"ire": BOOST | {"start_loss": 100.0}, "epochs": 2},
}
FAST = ("plain", "sam-sampled", "empirical", "average-sam-sampled", "validated-sam", "sam-sampled-accumulated")


class Steps(pl.Callback):
    """All weights after every batch, put together."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.weights.append(torch.cat([whole(p).reshape(-1) for p in pl_module.parameters()]))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(
    name: str,
    processes: int,
    mesh: tuple[int, int] | None = None,
    net: Any = None,
    accelerator: str = "cpu",
    **more: Any,
) -> dict[str, Any]:
    """Train one cell; with one process and without a mesh unsharded, on the joined batch."""
    cell = CELLS[name] | more
    torch.manual_seed(11)
    module = cell.get("module", Sharded)(
        (net or cell.get("net", even))(), cell.get("optimizer", adamw), cell.get("how", "layers")
    )
    ire, steps = IRE(**cell["ire"]), Steps()
    options: dict[str, Any] = {"accelerator": accelerator, "precision": cell.get("precision")}
    if processes > 1 or mesh is not None:
        sizes, one_file = mesh or (processes, 1), cell.get("one_file", False)
        backend = "gloo" if accelerator == "cpu" else "nccl"
        strategy = ModelParallelStrategy(
            *sizes, save_distributed_checkpoint=not one_file, process_group_backend=backend
        )
        options |= {"strategy": strategy, "devices": processes}
    if "validate" in cell:
        options |= {"val_check_interval": cell["validate"], "num_sanity_val_steps": 1}
    else:
        options |= {"limit_val_batches": 0}
    trainer = cases.trainer(
        [ire, steps, *cell.get("callbacks", [])],
        max_epochs=cell.get("epochs", 1),
        accumulate_grad_batches=cell.get("accumulate", 1),
        gradient_clip_val=cell.get("clip"),
        use_distributed_sampler=False,
        **{"enable_checkpointing": "callbacks" in cell} | options,
    )
    draw = sampled_losses.sample_labels
    sampled_losses.sample_labels = likeliest
    try:
        trainer.fit(module, ckpt_path=cell.get("ckpt_path"))
    finally:
        sampled_losses.sample_labels = draw
    state = ire.state_dict()
    flat = state["optimizers"][0]["flat"] if state else {}
    logs = ire._progress.last_logged
    return {
        "weights": torch.stack(steps.weights).cpu(),
        "masks": dict(flat.get("masks", {})),
        "of_rank": flat.get("of_rank", 0),
        "logs": {tag: float(value) for tag, value in logs.items() if tag != tags.PERTURBED_LOSS},  # a device's own
        "started_at": ire.started_at,
        "table": ire.flat_table(module),
    }


def dry_run(processes: int) -> str:
    """The table of the first mask."""
    torch.manual_seed(11)
    module = Sharded(even(), adamw)
    strategy = ModelParallelStrategy(processes, 1, process_group_backend="gloo")
    before = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    options = {"strategy": strategy, "devices": processes} if processes > 1 else {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cases.trainer(
            [IRE(**BOOST, curvature=EmpiricalFisher(), dry_run=True)], use_distributed_sampler=False, **options
        ).fit(module)
    assert torch.equal(before, torch.cat([whole(p).reshape(-1) for p in module.parameters()]))
    return said.getvalue()


def plain_loop(processes: int, tensor_parallel: bool = False) -> dict[str, Any]:
    """`IREStep` with `fully_shard`, or in tensor parallelism, without Lightning."""
    torch.manual_seed(11)
    model = (for_tensor_parallel if tensor_parallel else even)().to(torch.float64)
    host, dealt = LocalHost(), processes
    if processes > 1 and tensor_parallel:
        mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        host, dealt = LocalHost(data_parallel=mesh["data"]), 1
    elif processes > 1:
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    step = IREStep(model, optimizer, host=host, **BOOST, **SYNC)
    x, y = data_of(model).tensors

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(x[rows]), y[rows])

    draw, sampled_losses.sample_labels = sampled_losses.sample_labels, likeliest
    weights = []
    try:
        for index in range(STEPS):
            rows = torch.arange(BATCH * index, BATCH * (index + 1))[host.rank :: dealt]
            step(loss_of, *rows.split(len(rows) // 2))
            weights.append(torch.cat([whole(p).reshape(-1) for p in model.parameters()]))
    finally:
        sampled_losses.sample_labels = draw
    flat = step.state_dict()["optimizers"][0]["flat"]
    return {"weights": torch.stack(weights), "masks": flat["masks"]}


class Asked(pl.Callback):
    """Counts how often its state is asked for."""

    def __init__(self) -> None:
        self.times = 0

    def state_dict(self) -> dict[str, Any]:
        self.times += 1
        return {}


def contract(folder: Path) -> dict[str, bool]:
    """What the engine counts on of torch's FSDP2 and of Lightning's ModelParallelStrategy."""
    torch.manual_seed(11)
    model = even().to(torch.float64)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    shards = list(model.parameters())
    x, y = (part[:BATCH] for part in data_of(model).tensors)

    def loss_of() -> Tensor:
        return F.cross_entropy(model(x), y)

    found = {}
    found["autograd.grad finds nothing"] = all(
        g is None for g in torch.autograd.grad(loss_of(), shards, allow_unused=True)
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    loss = loss_of()
    gradients = []
    for keep in (True, False):
        torch.autograd.backward(loss, retain_graph=keep)
        gradients.append([p.grad.full_tensor() for p in shards])
        model.zero_grad()
    found["two backward passes on one graph are equal"] = all(
        torch.allclose(one, other, rtol=0, atol=1e-15) for one, other in zip(*gradients, strict=True)
    )
    loss_of().backward(create_graph=True)
    found["a backward pass with create_graph has no graph"] = not any(p.grad.requires_grad for p in shards)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        part = shards[0].to_local()
        part += 1
        found["a local part shares memory"] = bool((shards[0].to_local() == part).all())
        marks = change_marks(shards[:1])
        part -= 1
        found["changes of a local part are counted"] = change_marks(shards[:1]) != marks
        marks = change_marks(shards[:1])
        shards[0].add_(0)
        found["changes of a DTensor are counted"] = change_marks(shards[:1]) != marks
        loss_of()
    last = [p for p in model.parameters() if not isinstance(p, DTensor)]
    found["a pass without gradients leaves the root gathered"] = len(last) == 2
    with torch.no_grad():
        stale = loss_of()
        shards[-1].to_local().add_(torch.arange(len(shards[-1].to_local())) + 1.0)
        found["gathered copies do not see that shards move"] = bool(loss_of() == stale)
        model.reshard()
        found["they do when resharded"] = bool(loss_of() != stale)
    model.reshard()
    found["resharding brings the shards back"] = all(
        now is before for now, before in zip(model.parameters(), shards, strict=True)
    )
    asked = Asked()
    keep = ModelCheckpoint(folder, filename="asked", every_n_epochs=1)
    run("plain", torch.distributed.get_world_size(), callbacks=[asked, keep])
    found["every rank's callbacks are asked for their state"] = asked.times == 1
    return found


def refusals(processes: int) -> dict[str, str]:
    """Messages of what does not run."""
    found = {}
    for name, callback in (
        ("m-sharpness", IRE(kappa=0.0, perturbation=SAM(0.1))),
        ("form", IRE(curvature=SampledFisher(form="micro_batch"))),
    ):
        strategy = ModelParallelStrategy(processes, 1, process_group_backend="gloo")
        try:
            cases.trainer([callback], strategy=strategy, devices=processes, max_epochs=1).fit(Sharded(even(), adamw))
        except ConfigurationError as error:
            found[name] = str(error)
    return found


def train(rank: int, processes: int, port: int, folder: Path, names: list[str]) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes), "RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name in names:
        cell, _, variant = name.partition("@")
        results[name] = VARIANTS[variant](cell, processes, folder)
    torch.save(results, folder / f"rank{rank}.pt")
    cases.leave_together()


def saved(cell: str, processes: int, folder: Path, one_file: bool) -> dict[str, Any]:
    """One epoch, whose end is saved."""
    keep = ModelCheckpoint(folder, filename="one" if one_file else "parts", every_n_epochs=1)
    return run(cell, processes, callbacks=[keep], one_file=one_file)


def resumed(cell: str, processes: int, folder: Path, one_file: bool) -> dict[str, Any]:
    """A second epoch after it, perhaps in more or fewer processes."""
    path = folder / ("one.ckpt" if one_file else "parts.ckpt")
    return run(cell, processes, epochs=2, ckpt_path=path, one_file=one_file)


VARIANTS: dict[str, Any] = {
    "": lambda cell, processes, folder: run(cell, processes),
    "empty": lambda cell, processes, folder: run(cell, processes, net=with_empty),
    "tp": lambda cell, processes, folder: run(cell, processes, mesh=(1, processes), net=for_tensor_parallel),
    "2d": lambda cell, processes, folder: run(cell, processes, mesh=(2, processes // 2), net=for_tensor_parallel),
    "bf16-mixed": lambda cell, processes, folder: run(cell, processes, precision="bf16-mixed"),
    "bf16-true": lambda cell, processes, folder: run(cell, processes, precision="bf16-true"),
    "gpu": lambda cell, processes, folder: run(cell, processes, mesh=(processes, 1), accelerator="gpu"),
    "gpu-bf16": lambda cell, processes, folder: run(
        cell, processes, mesh=(processes, 1), accelerator="gpu", precision="bf16-true"
    ),
    "hybrid": lambda cell, processes, folder: run(cell, processes, how="hybrid"),
    "dry-run": lambda cell, processes, folder: dry_run(processes),
    "plain-loop": lambda cell, processes, folder: plain_loop(processes),
    "plain-loop-tp": lambda cell, processes, folder: plain_loop(processes, tensor_parallel=True),
    "traffic": lambda cell, processes, folder: sharded.traffic(),
    "contract": lambda cell, processes, folder: contract(folder),
    "refusals": lambda cell, processes, folder: refusals(processes),
    "saved-parts": partial(saved, one_file=False),
    "saved-file": partial(saved, one_file=True),
    "resumed-parts": partial(resumed, one_file=False),
    "resumed-file": partial(resumed, one_file=True),
}


def main(folder: Path, processes: int, names: list[str]) -> int:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                train(rank, processes, port, folder, names)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    worst = 0
    for _ in children:
        _, status = os.wait()
        if status and not worst:
            worst = 1
            for child in children:  # the others wait for the one that is gone
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
    return worst


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
