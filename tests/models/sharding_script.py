"""Run by test_sharding.py: trains the shipped language models in several processes (gloo), spread over them.

Usage: python sharding_script.py FOLDER PROCESSES CELLS..., see sharded_script.py
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import sharded_script
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_script import BATCH, BOOST, STEPS, SYNC, TOKENS, Steps, likeliest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ire import IRE
from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import data_parallel
from lightning_ire.functional import sampled_losses
from lightning_ire.models import ImageClassifier, LanguageModel, Llama, ResNet, Transformer

VOCABULARY = TOKENS + 1  # even


def llama(**settings: Any) -> nn.Module:
    sizes = {"width": 12, "num_layers": 2, "num_heads": 2, "feed_forward": 18, "context_length": 8}
    return Llama(VOCABULARY, **(sizes | settings))


def transformer() -> nn.Module:
    """Without biases in the attention: the keys' has an exact gradient of 0, of whose rounding AdamW makes steps."""
    network = Transformer(VOCABULARY, 12, num_heads=2, feed_forward=18, context_length=8, position_dropout=0.0)
    for layer in network.layers:
        layer.self_attn.in_proj_bias = None
    return network


class Model(LanguageModel):
    """The shipped module on tokens of its own, with a clock that says one token per second on each device."""

    def __init__(self, network: nn.Module, **settings: Any) -> None:
        super().__init__(network, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), **settings)
        self.throughput.rate = lambda: 1.0  # type: ignore[method-assign]
        self.seeds: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.seeds.append(torch.initial_seed())

    def _loader(self, count: int) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (count, 8), generator=generator)
        data, (replicas, rank) = TensorDataset(tokens[:, :-1], tokens[:, 1:]), data_parallel(self.trainer)
        size = BATCH // self.trainer.accumulate_grad_batches // replicas
        return DataLoader(data, size, sampler=DistributedSampler(data, replicas, rank, shuffle=False))

    def train_dataloader(self) -> DataLoader:
        return self._loader(STEPS * BATCH)

    def val_dataloader(self) -> DataLoader:
        return self._loader(BATCH)


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


CELLS: dict[str, dict[str, Any]] = {
    "llama": {"clip": 0.05, "accumulate": 2},
    "tied": {"net": partial(llama, tie_embeddings=True)},
    "checkpointed": {"net": partial(llama, checkpointing=True)},
    "compiled": {"compile": True, "net": partial(llama, checkpointing=True)},
    "transformer": {"net": transformer, "clip": 0.05},
    "transformer-compiled": {"net": transformer, "compile": True},
}


def run(cell: str, processes: int, mesh: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    """Train one cell; with one process unsharded, on the joined batch."""
    settings = CELLS[cell] | more
    pl.seed_everything(11, verbose=False)
    model = Model(settings.get("net", llama)(), compile=settings.get("compile", False), **settings.get("model", {}))
    if "precision" not in settings:
        model.to(torch.float64)
    ire, steps = IRE(**(BOOST | SYNC)), Steps()
    options: dict[str, Any] = {"limit_val_batches": 0}
    if settings.get("validate"):
        options = {"val_check_interval": 5, "num_sanity_val_steps": 1}
    if processes > 1:
        strategy = ModelParallelStrategy(*(mesh or (processes, 1)), process_group_backend="gloo")
        options |= {"strategy": strategy, "devices": processes}
    trainer = cases.trainer(
        [ire, steps, *settings.get("callbacks", [])],
        max_epochs=settings.get("epochs", 1),
        accumulate_grad_batches=settings.get("accumulate", 1),
        gradient_clip_val=settings.get("clip"),
        use_distributed_sampler=False,
        precision=settings.get("precision", "32-true"),
        **{"enable_checkpointing": "callbacks" in settings} | options,
    )
    compile, draw = torch.compile, sampled_losses.sample_labels
    torch.compile = lambda function, **kwargs: compile(function, backend="aot_eager")  # type: ignore[assignment]
    sampled_losses.sample_labels = likeliest
    torch.compiler.reset()
    try:
        trainer.fit(model, ckpt_path=settings.get("ckpt_path"))
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        evaluated = trainer.validate(model, verbose=False)[0] if settings.get("validate") else {}
    finally:
        torch.compile, sampled_losses.sample_labels = compile, draw
    groups = [name for name, module in model.model.named_modules() if isinstance(module, FSDPModule)]
    whole = sum(p.numel() for p in model.parameters())
    return {
        "weights": torch.stack(steps.weights),
        "masks": dict(ire.state_dict()["optimizers"][0]["flat"]["masks"]),
        "logged": logged,
        "evaluated": evaluated,
        "seeds": model.seeds,
        "groups": groups,
        "share": sum(local(p).numel() for p in model.parameters()) / whole,
    }


def saved(cell: str, processes: int, folder: Path, **more: Any) -> dict[str, Any]:
    """One epoch, whose end is saved in a folder of parts."""
    return run(cell, processes, callbacks=[ModelCheckpoint(folder, filename=f"{cell}{len(more)}")], **more)


def resumed(cell: str, processes: int, folder: Path, **more: Any) -> dict[str, Any]:
    return run(cell, processes, epochs=2, ckpt_path=folder / f"{cell}{len(more)}.ckpt", **more)


def refusals(processes: int) -> dict[str, str]:
    """Messages of what does not run."""
    images = ImageClassifier(ResNet(blocks=(1,), widths=(4,)), 10, channels_last=True)
    found = {}
    for name, model, sizes in (
        ("network", Model(transformer()), (1, processes)),
        ("heads", Model(llama(num_heads=3, head_dim=4)), (1, processes)),
        ("compile", Model(llama(), compile=True), (1, processes)),
        ("gather", Model(llama(), gather_bf16=True), (processes, 1)),
        ("images", images, (processes, 1)),
    ):
        strategy = ModelParallelStrategy(*sizes, process_group_backend="gloo")
        data = DataLoader(TensorDataset(torch.zeros(4, 2, dtype=torch.int64)))
        try:
            cases.trainer(strategy=strategy, devices=processes).fit(model, data)
        except ConfigurationError as error:
            found[name] = str(error)
    return found


sharded_script.VARIANTS |= {
    "run": lambda cell, processes, folder: run(cell, processes),
    "tp": lambda cell, processes, folder: run(cell, processes, mesh=(1, processes)),
    "2d": lambda cell, processes, folder: run(cell, processes, mesh=(2, processes // 2)),
    "validated": lambda cell, processes, folder: run(cell, processes, validate=True),
    "bf16": lambda cell, processes, folder: run(cell, processes, precision="bf16-mixed"),
    "gather": lambda cell, processes, folder: run(cell, processes, precision="bf16-mixed", model={"gather_bf16": True}),
    "saved": saved,
    "resumed": resumed,
    "tp-saved": lambda cell, processes, folder: saved(cell, processes, folder, mesh=(1, processes)),
    "tp-resumed": lambda cell, processes, folder: resumed(cell, processes, folder, mesh=(1, processes)),
    "refusals": lambda cell, processes, folder: refusals(processes),
}

if __name__ == "__main__":
    sys.exit(sharded_script.main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
