"""Run by test_kappa_auto.py: an automatic kappa in two processes (gloo), whose data differ."""

import os
import sys
from pathlib import Path

import cases
import torch
from lightning.pytorch.strategies import DDPStrategy
from modules import Classifier, Net

from lightning_ire import IRE, SharpnessMonitor

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(11)
    module, logger = Classifier(Net()), cases.Rows()

    class Kappas(SharpnessMonitor):
        found: list[float]

        def on_train_batch_end(self, trainer, *args):  # type: ignore[no-untyped-def]
            super().on_train_batch_end(trainer, *args)
            self.found.append(trainer.callbacks[0]._progress.auto_kappa)

    monitor = Kappas(2, None, ["stability"])
    monitor.found = []
    strategy = DDPStrategy(process_group_backend="gloo")
    cases.fit(module, [IRE("auto", interval=2), monitor], max_epochs=1, max_steps=5, devices=2, strategy=strategy)
    weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    torch.save({"kappas": monitor.found, "weights": weights}, folder / f"rank{rank}.pt")
    cases.leave_together()
