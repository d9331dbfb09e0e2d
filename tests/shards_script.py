"""Run by functional/test_shards.py: everything in `functional` on sharded tensors, in processes that it forks (gloo).

Usage: python shards_script.py FOLDER RANKS...
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_ire import functional
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.functional import _shards
from lightning_ire.functional._shards import Shards, local, part_of_whole, whole_of_part

SHAPES = [(7, 5), (7,), (2, 3), (1,), (4, 6), (2, 4)]
GAMMA = 0.6
LAYOUTS: dict[str, tuple[int, ...]] = {  # and in how many processes
    "rows": (2, 3, 4),
    "columns": (2, 3),
    "mixed": (2, 3),
    "fully-shard": (2, 3, 4),
    "tensor-parallel": (2,),
    "rows-of-columns": (4,),
    "replicated-rows": (4,),
    "fully-shard-tensor-parallel": (4,),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Norm(nn.LayerNorm):
    """A layer that stays as it is: its weights are plain tensors among sharded ones, or on the mesh of the data."""


def network(layout: str) -> nn.Module:
    """One with rows that are uneven over the ranks, two in one layer; for tensor parallelism they have to be even."""
    torch.manual_seed(3)
    if "tensor-parallel" not in layout:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    layers = [nn.Linear(5, 4), Norm(4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def gradients_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
    """All ranks have the same batch: the mean over them is the gradient of one process."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    model(x).square().mean().backward()
    parameters: list[Tensor] = list(model.parameters())
    return parameters, [parameter.grad for parameter in parameters]


def plain(layout: str) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and gradients in one process."""
    if layout.startswith(("fully-shard", "tensor-parallel")):
        return gradients_of(network(layout))
    source = torch.Generator().manual_seed(1)
    draws = [torch.randn(shape, dtype=torch.float64, generator=source) for shape in [*SHAPES, *SHAPES]]
    gradients: list[Tensor | None] = list(draws[len(SHAPES) :])
    gradients[3] = None
    return draws[: len(SHAPES)], gradients


def sharded(layout: str, ranks: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """The same over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh: Any = init_device_mesh("cpu", (ranks,))
    square: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")) if ranks == 4 else None
    if layout.startswith(("fully-shard", "tensor-parallel")):
        model: Any = network(layout)
        if "tensor-parallel" in layout:
            plan = {
                "2": ColwiseParallel(),
                "4": RowwiseParallel(output_layouts=Shard(0)),
                "5": SequenceParallel(sequence_dim=0, use_local_output=True),
                "6": PrepareModuleInput(
                    input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True
                ),
            }
            parallelize_module(model, mesh if square is None else square["tensor"], plan)
        if layout.startswith("fully-shard"):
            for part in (model[0], model[2], model):
                fully_shard(part, mesh=mesh if "tensor" not in layout else square["data"])
        return gradients_of(model)
    placements: dict[str, Callable[[int, Tensor], Any]] = {
        "rows": lambda index, one: (mesh, [Shard(0)]),
        "columns": lambda index, one: (mesh, [Shard(1) if one.ndim > 1 else Replicate()]),
        "mixed": lambda index, one: (mesh, [[Shard(0)], [Replicate()], [Shard(1)], None, None, [Shard(0)]][index]),
        "rows-of-columns": lambda index, one: (square, [Shard(0), Shard(1) if one.ndim > 1 else Replicate()]),
        "replicated-rows": lambda index, one: (square, [Replicate(), Shard(0)]),
    }

    def spread(index: int, one: Tensor | None) -> Any:
        if one is None:
            return None
        where, how = placements[layout](index, one)
        return one if how is None else distribute_tensor(one, where, how)

    weights, gradients = plain(layout)
    return [spread(*pair) for pair in enumerate(weights)], [spread(*pair) for pair in enumerate(gradients)]


@torch.no_grad()
def everything(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[str, Any]:
    """What `functional` makes of them, gathered."""
    f = functional
    source = torch.Generator().manual_seed(2)

    def drawn(scale: float = 1.0) -> list[Tensor]:
        wholes = [scale * torch.randn(w.shape, dtype=torch.float64, generator=source) for w in weights]
        parts = [part_of_whole(whole, weight) for whole, weight in zip(wholes, weights, strict=True)]
        assert all(part.untyped_storage().nbytes() == 8 * part.numel() for part in parts), "keeps the whole in memory"
        return parts

    def whole(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert all(part is None or (type(part) is Tensor and not part.requires_grad) for part in parts)
        pairs = zip(parts, weights, strict=True)
        return [None if part is None else whole_of_part(part, weight) for part, weight in pairs]

    def now() -> list[Tensor | None]:
        return whole([local(weight).detach().clone() for weight in weights])

    found: dict[str, Any] = {"weights": now(), "drawn": whole(drawn())}
    found["copied"] = whole(f.copied(weights))
    found["norms"] = [f.global_norm(gradients), f.global_norm(weights), f.global_norm(drawn(), like=weights)]
    found["fisher"] = whole(f.fisher_diagonal(gradients, 8.0))
    radii = [0.1 * (1 + index % 3) for index in range(len(weights))]
    adaptive = [index % 2 == 0 for index in range(len(weights))]
    for name, settings in {
        "sam": {"rho": 0.05},
        "sam-adaptive": {"rho": radii, "adaptive": adaptive, "eta": 0.01},
    }.items():
        moves, norm = f.sam_displacement(weights, gradients, **settings)  # type: ignore[arg-type]
        found[name] = [*whole(moves), norm, f.global_norm(moves, like=weights)]
        with f.perturbed(weights, moves) as saved:
            found[f"{name}-inside"], found[f"{name}-saved"] = now(), whole(saved)
        found[f"{name}-after"] = now()
    generators = [torch.Generator().manual_seed(index) for index in range(len(weights))]
    moves, steps = f.rounding_displacement(weights, 4)
    found["rounding"] = [*whole(moves), *map(torch.tensor, steps)]
    found["average-sam"] = whole(f.average_sam_displacement(weights, 0.1, generators=generators))
    for scope in ("global", "tensor"):
        moves, _ = f.ascent_in_ball(weights, gradients, None, step=0.3, radius=0.5, scope=scope)
        again, norm = f.ascent_in_ball(weights, gradients, moves, step=2.0, radius=0.5, scope=scope)
        found[f"ball-{scope}"] = [*whole(moves), *whole(again), norm]

    h = [(8 * one).round() / 8 for one in drawn()]  # ties and zeros
    for dtype in DTYPES:
        for exclude_zero in (False, True):
            values = [one.to(dtype) for one in h]
            masks, threshold = f.masks_and_threshold(values, GAMMA, exclude_zero=exclude_zero, like=weights)
            assert threshold.equal(f.flat_threshold(values, GAMMA, exclude_zero=exclude_zero, like=weights))
            found[f"masks-{dtype}-{exclude_zero}"] = [*whole(masks), threshold]
    mixed = [one.to(DTYPES[index % 2]) for index, one in enumerate(h)]
    partly = [None if index == 1 else one for index, one in enumerate(mixed)]
    found["masks-partly"] = [*whole(f.flat_masks(partly, GAMMA, like=weights))]
    found["masks-tensor"] = whole(f.flat_masks(h, GAMMA, scope="tensor", exclude_zero=True, like=weights))
    other = f.flat_masks(h, 0.2, like=weights)
    found["count"] = [f.count_true(masks, like=weights), f.count_true(masks, other, like=weights)]  # type: ignore[arg-type]

    old = f.copied(weights)
    for weight, step in zip(weights, drawn(0.1), strict=True):
        local(weight).add_(step)
    f.boost_(weights, old, [masks[0], None, *masks[2:]], radii, decay=[0.01] * len(weights))
    found["boost"] = now()
    with f.perturbed(weights, [before - local(weight) for before, weight in zip(old, weights, strict=True)]):
        product = f.finite_difference_product(lambda: [local(weight) ** 3 for weight in weights], weights, drawn())
    found["finite-difference"] = whole(product)

    found["errors"] = []
    bad = [one.clone() for one in h]
    last = torch.zeros(weights[0].shape, dtype=torch.bool)
    last.view(-1)[-1] = True
    bad[0][part_of_whole(last, weights[0])] = torch.nan  # on one rank only
    found["finite"] = [f.all_finite(h, like=weights), f.all_finite(bad, like=weights)]
    for call in (
        lambda: f.flat_threshold(bad, GAMMA, like=weights),
        lambda: f.flat_threshold([None] * len(weights), GAMMA, like=weights),
        lambda: f.flat_threshold([one.long() for one in h], GAMMA, like=weights),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            found["errors"].append(str(error))
    shards = Shards(weights)
    found["owned"] = shards.sum(torch.tensor(sum(part.numel() for part in shards.mine(shards.parts))))
    found["sizes"] = shards.sizes
    return found


def kinds(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[str]:
    """What occurs on this rank, of what is hard."""
    placements = [placement for one in [*weights, *gradients] for placement in getattr(one, "placements", ())]
    return sorted({
        *[type(placement).__name__ for placement in placements],
        *["empty" for weight in weights if not local(weight).numel()],
        *["plain" for weight in weights if not _shards.is_sharded(weight)],
        *[f"{weight.device_mesh.ndim}-D" for weight in weights if _shards.is_sharded(weight)],  # type: ignore[attr-defined]
    })  # fmt: skip


def gathered_copies() -> dict[str, Any]:
    """What FSDP2 leaves after a forward pass without gradients, and what dropping it makes of that."""
    from torch.distributed.fsdp import fully_shard

    model: Any = network("fully-shard")
    fully_shard(model)
    gathered = GatheredWeights(model)
    x = torch.ones(1, 5, dtype=torch.float64)
    names = [_shards.is_sharded(parameter) for parameter in model.parameters()]
    parameters = list(model.parameters())
    with torch.no_grad():
        before = model(x)
        stale = [_shards.is_sharded(parameter) for parameter in model.parameters()]
        moves = [torch.ones_like(local(parameter)) for parameter in parameters]
        with functional.perturbed(parameters, moves):
            unseen = model(x)
            gathered.drop()
            seen = model(x)
        gathered.drop()
        after = model(x)
        gathered.drop()
    same = [one is other for one, other in zip(parameters, model.parameters(), strict=True)]
    return {"sharded": names, "stale": stale, "same": same, "outputs": [before, unseen, seen, after]}


def main(rank: int, ranks: int, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    file = Path(folder) / f"rendezvous{ranks}"
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    results = {}
    for name in [name for name, sizes in LAYOUTS.items() if ranks in sizes]:
        weights, gradients = sharded(name, ranks)
        results[name] = everything(weights, gradients) | {"kinds": kinds(weights, gradients)}
    results["gathered-copies"] = gathered_copies()
    torch.save(results, Path(folder) / f"{ranks}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    everything(*plain("rows"))
    assert "torch.distributed.tensor" not in sys.modules, "loading it takes seconds"
    import torch._dynamo  # each rank would at its first operation
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel
    from torch import multiprocessing

    for count in map(int, sys.argv[2:]):
        multiprocessing.start_processes(main, (count, sys.argv[1]), count, start_method="fork")
