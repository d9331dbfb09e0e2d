"""What the boost adds to an optimizer's step, and what a new mask costs, from 1 M to 250 M parameters.

    python benchmarks/optimizer_step.py       # about 5 minutes on one CPU core, 8 GB of memory

- step: the optimizer's step with the copy of the old weights before it and the boost after it, next to the step alone;
  for the fastest optimizer also the copy and the boost by themselves, next to its step.
- mask: `flat_masks` of given estimates, next to concatenating them, `torch.kthvalue`, and comparing.
- ascent: SAM's displacement there and back, next to a copy of the weights.

The two sides of a ratio take turns; median (quartiles). Nanoseconds per parameter that stay the same from size to size
are linear growth. Beside the sizes: 10,000 tensors of 100 numbers, and one tensor of 200 M.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from workloads import finish, machine, turns

from lightning_ire.engine.boost import WeightSnapshot, boost
from lightning_ire.functional import flat_masks, perturbed, sam_displacement

MILLION = 1_000_000
SIZES = {"1 M": 1, "5 M": 5, "25 M": 25, "100 M": 100, "250 M": 250}
GAMMA, KAPPA = 0.8, 1.0
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def layers(millions: float, device: str) -> list[Tensor]:
    """The tensors of a Transformer: an eighth of the numbers in an embedding, the rest in layers of about 3 M."""
    total = int(millions * MILLION)
    depth = max(1, round(millions * 0.875 / 3))
    width = int((total * 0.875 / depth / 12) ** 0.5)
    shapes: list[tuple[int, ...]] = [(total // 8 // width, width)]
    for _ in range(depth):
        shapes += [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    return [torch.randn(shape, device=device) for shape in shapes]


def models(sizes: Sequence[str], device: str) -> dict[str, Callable[[], list[Tensor]]]:
    made: dict[str, Callable[[], list[Tensor]]] = {
        name: lambda n=SIZES[name]: layers(n, device) for name in sizes if name in SIZES
    }
    if "many" in sizes:
        made["10,000 x 100"] = lambda: [torch.randn(100, device=device) for _ in range(10_000)]
    if "one" in sizes:
        made["1 x 200 M"] = lambda: [torch.randn(200 * MILLION, device=device)]
    return made


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-6, foreach=True),
    "AdamW, plain": lambda p: torch.optim.AdamW(p, lr=1e-6, foreach=False),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, fused=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, foreach=True),
    "SGD, plain": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, foreach=False),
}


def step_pair(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], tensors: list[Tensor], part: str = "all"
) -> Pair:
    """The step with all that the boost adds, or what it adds by itself, and the step alone."""
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    names = {id(parameter): str(index) for index, parameter in enumerate(parameters)}
    kappas = dict.fromkeys(map(id, parameters), KAPPA)
    masks = {str(index): torch.rand_like(parameter) < GAMMA for index, parameter in enumerate(parameters)}

    def save() -> WeightSnapshot:
        return WeightSnapshot.take(optimizer, names, masks, {}, False)

    def boosted() -> None:
        weights = save()
        optimizer.step()
        boost(optimizer, weights, kappas, True, False)

    weights = save()
    mine = {"all": boosted, "copy": save, "boost": lambda: boost(optimizer, weights, kappas, True, False)}
    return mine[part], optimizer.step


def mask_pair(tensors: list[Tensor]) -> Pair:
    values = [tensor.square() for tensor in tensors]

    def usual() -> list[Tensor]:
        joined = torch.cat([value.flatten() for value in values])
        threshold = joined.kthvalue(int(joined.numel() * GAMMA)).values
        return [value <= threshold for value in values]

    return lambda: flat_masks(values, GAMMA), usual


def ascent_pair(tensors: list[Tensor]) -> Pair:
    gradients = [torch.randn_like(tensor) for tensor in tensors]

    def climb() -> None:
        moves, _ = sam_displacement(tensors, gradients, 0.05)
        with perturbed(tensors, moves):
            pass

    return climb, lambda: [tensor.clone() for tensor in tensors]


def compare(pair: Pair, tries: int, device: str) -> dict[str, float]:
    """Ratio of the first to the second, and nanoseconds per call of both."""
    times = turns(dict(zip(("ours", "theirs"), pair, strict=True)), tries, device)
    ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"ratio": median(ratios), "low": low, "high": high} | {name: median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="*", default=[*SIZES, "many", "one"])
    parser.add_argument("--only", default="", help="measurements whose names begin so")
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write; nothing is written without")
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(1)
    measurements: dict[str, Callable[[list[Tensor]], Pair]] = {
        f"step + boost: {name}": lambda tensors, make=make: step_pair(make, tensors)
        for name, make in OPTIMIZERS.items()
    }
    for part in ("copy", "boost"):
        measurements[f"{part}: AdamW, fused"] = lambda tensors, part=part: step_pair(
            OPTIMIZERS["AdamW, fused"], tensors, part
        )
    measurements |= {"mask": mask_pair, "ascent": ascent_pair}
    found: dict[str, dict[str, Any]] = {}
    for size, make in models(options.sizes, device).items():
        count = sum(tensor.numel() for tensor in make())
        for name, pair_of in measurements.items():
            if not name.startswith(options.only):
                continue
            torch.manual_seed(0)
            result = compare(pair_of(make()), options.tries, device)
            finish(device)
            found.setdefault(name, {})[size] = {"parameters": count, **result}
            print(
                f"{size:>12}  {name:28} {result['ratio']:6.2f}  ({result['low']:.2f} to {result['high']:.2f})"
                f"   {result['ours'] / count * 1e9:7.2f} ns a parameter, else {result['theirs'] / count * 1e9:.2f}",
                flush=True,
            )
    if options.output:
        content = {"machine": machine(device), "device": device, "tries": options.tries, "measurements": found}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
