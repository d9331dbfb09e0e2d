"""What IRE and SAM add to a step of a sharded model: collectives, bytes on the wire and in memory; and at scale.

Usage: python benchmarks/sharded.py [--traffic] [--threshold ELEMENTS ...]

`--traffic` trains a small Llama of four blocks under FSDP2 in two processes (gloo) and counts every collective of
torch, with the bytes that a rank puts in. Counts do not depend on the machine. `--threshold` times, in one process,
the ranking of so many float32 values as a rank of a sharded run does it (histograms, no sampling), which grows with
the rank's part of the model alone. Writes `benchmarks/results/sharded.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import machine

from lightning_ire import (
    SAM,
    AverageSAM,
    EmpiricalFisher,
    HutchinsonHessian,
    IREStep,
    LocalHost,
    SampledFisher,
    SecondMoment,
)

RESULTS = Path(__file__).parent / "results" / "sharded.json"
VOCABULARY, LENGTH, BLOCKS = 64, 16, 4
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"kappa": 0.0},
    "SampledFisher": {"kappa": 2.0, "curvature": SampledFisher()},
    "EmpiricalFisher": {"kappa": 2.0, "curvature": EmpiricalFisher()},
    "SecondMoment": {"kappa": 2.0, "curvature": SecondMoment()},
    "HutchinsonHessian": {"kappa": 2.0, "curvature": HutchinsonHessian()},
    "SAM(sync=True)": {"kappa": 0.0, "perturbation": SAM(0.05, sync=True)},
    "AverageSAM": {"kappa": 0.0, "perturbation": AverageSAM(0.05)},
}

KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
}


class Collectives(TorchDispatchMode):
    """Counts torch's collectives inside the block, and the bytes that this rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and not name.startswith(("wait", "barrier")):
            kind = next((kind for part, kind in KINDS.items() if part in name), name)
            self.calls[kind] += 1
            outputs_first = space == "c10d" and kind != "all_reduce"
            self.bytes[kind] += sum(one.numel() * one.element_size() for one in _tensors(args[int(outputs_first)]))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def network() -> nn.Module:
    from lightning_ire.models import Llama

    return Llama(VOCABULARY, width=32, num_layers=BLOCKS, num_heads=2, feed_forward=64, context_length=LENGTH)


class _Unlogged(LocalHost):
    """A loop in which nobody looks at the values of a step: their norms are two numbers more."""

    @property
    def will_log(self) -> bool:
        return False


def traffic(steps: int = 4) -> dict[str, list[dict[str, Any]]]:
    """The collectives of each step of each run, on this rank; the mask is made at steps 0 and 2."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, settings in RUNS.items():
        torch.manual_seed(0)
        model = network()
        for block in model.network.model.layers:  # type: ignore[union-attr, operator]
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = IREStep(model, optimizer, host=_Unlogged(), gamma=0.8, interval=2, **settings)
        tokens = torch.randint(VOCABULARY, (steps, 4, LENGTH + 1))

        def loss_of(batch: Tensor, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        rows = []
        for batch in tokens:
            with Collectives() as counted:
                step(loss_of, batch)
            rows.append({"calls": dict(counted.calls), "bytes": dict(counted.bytes)})
        masks = step.progress.masks.masks
        own = sum(p.to_local().numel() for p in model.parameters())
        rows[-1]["mask bytes per own parameter"] = sum(m.numel() * m.element_size() for m in masks.values()) / own
        found[name] = rows
        step.release()
    return found


def ranked(count: int) -> dict[str, float]:
    """Seconds to rank a rank's part of so many values, with the histograms of a sharded run, and to add them up."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    from lightning_ire.functional import masks_and_threshold

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    values = DTensor.from_local(torch.rand(count), mesh, [Shard(0)], run_check=False)
    start = time.perf_counter()
    with Collectives() as counted:
        masks_and_threshold([values], 0.8, finite=True)
    return {"elements": count, "seconds": time.perf_counter() - start, "bytes summed": sum(counted.bytes.values())}


@contextmanager
def _group(rank: int, processes: int, port: int) -> Iterator[None]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_two_processes() -> dict[str, list[dict[str, Any]]]:
    """What :func:`traffic` finds on rank 0."""
    import transformers  # noqa: F401

    port = _port()
    child = os.fork()
    if child == 0:
        with _group(1, 2, port):
            traffic()
        os._exit(0)
    with _group(0, 2, port):
        found = traffic()
    os.waitpid(child, 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="store_true", help="count collectives")
    parser.add_argument("--threshold", type=int, nargs="*", default=[], metavar="ELEMENTS", help="time the ranking")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": machine("cpu"), "device": "cpu"}
    if options.traffic:
        results["traffic"] = in_two_processes()
    if options.threshold:
        with _group(0, 1, _port()):
            results["threshold"] = [ranked(count) for count in options.threshold for _ in range(3)]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
