"""Run by test_throughput.py: two processes (gloo), of which the second takes four times as long for a batch.

Usage: python throughput_ddp_script.py FOLDER
"""

import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from small import classifier, loader, trainer


class Clock(Callback):
    """A batch takes 1 second on rank 0 and 4 on rank 1."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.now += 1 + 3 * trainer.global_rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, clock = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0)), Clock()
    model = classifier()
    run = trainer(folder, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), callbacks=[clock])
    time.perf_counter = lambda: clock.now  # type: ignore[assignment]
    run.fit(model, loader(32))  # two batches of 8 on each device
    result = {"logged": run.logged_metrics["train/images_per_second"].item(), "own": model.throughput.rate()}
    torch.save(result, folder / f"rank{rank}.pt")
