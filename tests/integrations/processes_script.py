"""Run by test_processes.py: models of transformers in the loops of others, in the processes that a launcher starts.

Usage: torchrun --nproc-per-node 2 processes_script.py fabric|shards|transformers FOLDER
       accelerate launch --multi_gpu --num_processes 2 processes_script.py accelerate FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from integrations.loops import InOrder, fresh_accelerate
from lightning_ire import (
    IRE,
    SAM,
    AccelerateHost,
    AverageSAM,
    EmpiricalFisher,
    FabricHost,
    IREStep,
    SharpnessMonitor,
    measure_sharpness,
)
from lightning_ire.integrations.transformers import attach

STEPS, BATCH = 4, 8
BOOST = {"kappa": 1.0, "gamma": 0.7, "interval": 2}
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "ire": ({**BOOST, "curvature": EmpiricalFisher()}, 1),
    "sam-ire-synchronized": ({**BOOST, "curvature": EmpiricalFisher(), "perturbation": SAM(0.1, sync=True)}, 2),
    "average-sam": ({"kappa": 0.0, "perturbation": AverageSAM(0.1)}, 1),
    "sam-ire": ({**BOOST, "perturbation": SAM(0.1)}, 2),  # each rank's own draws and ascent: not those of one process
}
JOINED = [name for name in METHODS if name != "sam-ire"]
HOSTS = ("fabric", "accelerate", "transformers")


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


MODELS = {"language model": llama, "classifier": bert}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(11)
    return MODELS[kind]().double()


def samples(kind: str, count: int = STEPS * BATCH) -> list[dict[str, Tensor]]:
    """Of the language model's tokens some are ignored, in each text as many, so that means of means are means."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(24, (count, 10), generator=generator)
    if kind == "classifier":
        return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]
    labels = tokens.clone()
    labels[:, :3] = -100
    return [{"input_ids": row, "labels": target} for row, target in zip(tokens, labels, strict=True)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches_of(step: int, kind: str, rank: int, ranks: int, accumulate: int) -> list[dict[str, Tensor]]:
    """What a rank has of a step's samples: of each micro-batch its part, as Accelerate deals them."""
    rows = samples(kind)[step * BATCH : (step + 1) * BATCH]
    size = BATCH // accumulate // ranks
    parts = [rows[start : start + size] for start in range(rank * size, BATCH, ranks * size)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def by_hand(
    kind: str, method: str, host: Any, model: Any, optimizer: Any, accumulate_context: Callable[[], Any] | None
) -> dict[str, Any]:
    settings, accumulate = METHODS[method]
    step = IREStep(model, optimizer, host=host, **settings)

    def loss_of(batch: Any) -> Any:
        return model(**batch)  # a mapping with "loss"

    for index in range(STEPS):
        batches = batches_of(index, kind, host.rank, host.world_size, accumulate)
        if accumulate_context is None:
            step(loss_of, *batches)
            continue
        for batch in batches:
            with accumulate_context():
                step(loss_of, batch)
    measured = measure_sharpness(model, loss_of, batches, ["lambda_max"], host=host).values
    masks = step.state_dict()["optimizers"][0]["flat"]["masks"]
    step.release()
    return {"weights": weights_of(step.module), "masks": masks, "measured": measured, "ascent": step.ascent_norm}


def weights_of(module: nn.Module) -> Tensor:
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in module.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def by_fabric(kind: str, method: str, shards: bool = False) -> dict[str, Any]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    strategy: Any = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    if shards and ranks > 1:
        strategy = ModelParallelStrategy(sharded, ranks, 1, process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    model = model_of(kind)
    if shards:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(sgd(model))
    else:
        model, optimizer = fabric.setup(model, sgd(model))
    return by_hand(kind, method, FabricHost(fabric), model, optimizer, None)


def sharded(model: Any, mesh: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def by_accelerate(kind: str, method: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=METHODS[method][1])
    model = model_of(kind)
    model, optimizer = accelerator.prepare(model, sgd(model))
    return by_hand(kind, method, AccelerateHost(accelerator), model, optimizer, lambda: accelerator.accumulate(model))


def by_transformers(kind: str, method: str) -> dict[str, Any]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings, accumulate = METHODS[method]
    model = model_of(kind)
    arguments = TrainingArguments(
        output_dir=str(Path(sys.argv[-1]) / "out") if ranks > 1 else "out", use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        report_to=[], disable_tqdm=True, save_strategy="no", seed=0, num_train_epochs=1, logging_steps=1,
        per_device_train_batch_size=BATCH // accumulate // ranks, gradient_accumulation_steps=accumulate,
        lr_scheduler_type="constant", max_grad_norm=0.0,
        average_tokens_across_devices=kind == "language model",  # else Bert's mean is taken for a part of a sum
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=samples(kind), optimizers=(sgd(model), None))
    last = batches_of(STEPS - 1, kind, arguments.process_index, ranks, accumulate)
    monitor = SharpnessMonitor(every_n_steps=STEPS, every_n_epochs=None, quantities=["lambda_max"], mode="eval")
    attached = attach(trainer, IRE(**settings), monitor, probe=last)
    trainer.train()
    assert attached.last is not None
    masks = attached.state_dict()["optimizers"][0]["flat"]["masks"]
    logged = next(row for row in trainer.state.log_history if "sharpness/lambda_max" in row)
    assert logged["sharpness/lambda_max"] == attached.last.values["sharpness/lambda_max"]
    assert attached.step is not None
    return {
        "weights": weights_of(model),
        "masks": masks,
        "measured": attached.last.values,
        "ascent": attached.step.ascent_norm,
    }


RUN: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "fabric": by_fabric,
    "accelerate": by_accelerate,
    "transformers": by_transformers,
}


def alone(host: str, kind: str, method: str) -> dict[str, Any]:
    """The same in one process, on the joined batches."""
    with fresh_accelerate():
        return RUN[host](kind, method)


if __name__ == "__main__":
    torch.set_num_threads(1)
    host, folder = sys.argv[1:]
    if host == "shards":
        results = {("language model", name): by_fabric("language model", name, shards=True) for name in JOINED}
    else:
        results = {}
        for kind in MODELS:
            for method in METHODS:
                results[kind, method] = RUN[host](kind, method)
    rank = int(os.environ["RANK"])
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
