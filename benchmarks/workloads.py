"""What the step costs are measured on, and on which machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_ire
from lightning_ire.models import ResNet, Transformer, WideResNet

__all__ = ["WORKLOADS", "Task", "Workload", "clock", "finish", "machine", "seconds_of", "turns"]


@dataclass(frozen=True)
class Workload:
    """A network and the shapes of its batches.

    Attributes:
        net: Makes the network.
        batch: Samples in a batch.
        sample: Shape of an image, or of a sequence of tokens.
        classes: Number of logits (and of tokens).
    """

    net: Callable[[], nn.Module]
    batch: int
    sample: tuple[int, ...]
    classes: int

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random inputs and targets, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        count = batch or self.batch
        if len(self.sample) > 1:
            x = torch.randn(count, *self.sample, generator=generator)
            return x, torch.randint(self.classes, (count,), generator=generator)
        tokens = torch.randint(self.classes, (count, self.sample[0] + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


IMAGE, VOCABULARY, LENGTH = (3, 32, 32), 2048, 128


def _transformer(layers: int) -> Callable[[], nn.Module]:
    return lambda: Transformer(
        VOCABULARY, width=256, num_layers=layers, feed_forward=1024, context_length=LENGTH, position_dropout=0.0
    )


WORKLOADS = {
    "ResNet-18": Workload(
        lambda: ResNet(blocks=(2, 2, 2, 2), widths=(64, 128, 256, 512), shortcut="projection"), 128, IMAGE, 10
    ),
    "WRN-16-4": Workload(lambda: WideResNet(16, 4), 128, IMAGE, 10),
    "Transformer, 2 layers": Workload(_transformer(2), 16, (LENGTH,), VOCABULARY),
    "Transformer, 6 layers": Workload(_transformer(6), 16, (LENGTH,), VOCABULARY),
}


class Task(pl.LightningModule):
    """A module that somebody trains, and that knows nothing of IRE."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def finish(device: str) -> None:
    """Wait for what a GPU has been told to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: on a CPU those of this process, which other processes of a shared machine disturb less."""
    finish(device)
    return time.perf_counter() if device == "cuda" else time.process_time()


def seconds_of(function: Callable[[], Any], device: str) -> float:
    start = clock(device)
    function()
    return clock(device) - start


def turns(functions: Mapping[str, Callable[[], Any]], tries: int, device: str) -> dict[str, list[float]]:
    """Seconds of each try; the functions take turns, so that a slow moment of the machine hits all of them."""
    times = [{name: seconds_of(call, device) for name, call in functions.items()} for _ in range(tries + 1)]
    return {name: [one[name] for one in times[1:]] for name in functions}  # the first warms up


def machine(device: str) -> dict[str, str | int]:
    """Hardware and versions that belong to a number."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        known = Path("/proc/cpuinfo")
        lines = known.read_text().splitlines() if known.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return {
        "hardware": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "lightning_ire": lightning_ire.__version__,
    }
