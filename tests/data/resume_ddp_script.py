"""Run by test_digits.py: trains on the digits in two processes (gloo), the second time from another run's checkpoint.

Usage: python resume_ddp_script.py FOLDER, which holds alone.ckpt
"""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ire.data import Digits


class Model(pl.LightningModule):
    """Keeps the sums of the images of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        self.seen.append(images.sum((1, 2, 3)).tolist())
        return torch.nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(pl.Callback):
    """Writes a checkpoint after ten steps, in the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.path)


def fit(path: Path | None, batch_size: int, devices: int = 1, ckpt_path: Path | None = None, **settings: Any) -> Model:
    """Two epochs of seven steps with 168 images, augmented."""
    pl.seed_everything(3, verbose=False)
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, max_epochs=2, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Save(path)] if path is not None else [],
        strategy="ddp" if devices > 1 else "auto",
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(batch_size=batch_size, val_size=200, **settings), ckpt_path=ckpt_path)
    return model


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole = fit(folder / "together.ckpt", 84, devices=2)
    resumed = fit(None, 42, devices=2, ckpt_path=folder / "alone.ckpt")
    state = {"whole": whole.seen, "resumed": resumed.seen}
    torch.save(state, folder / f"rank{whole.global_rank}.pt")
