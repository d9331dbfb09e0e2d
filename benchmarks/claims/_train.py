"""One training run on the digits or on text: a plain LightningModule, and the `IRE` callback beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from claims._report import ROOT
from lightning_ire import IRE, SharpnessMonitor
from lightning_ire.data import Text
from lightning_ire.models import ResNet, Transformer, WarmupCosineLR

__all__ = ["Classifier", "Digits", "make_trainer", "text_data", "text_module", "train_digits", "train_text"]


SPLITS = {  # training images, share of them whose label is drawn anew from all ten, batch size
    "digits": (500, 0.0, 50),
    "few labels": (100, 0.0, 25),
    "noisy labels": (500, 0.3, 50),
}
DIVERGED = 99.0  # in place of a loss that is not finite
VALIDATION = 300  # images that settings are chosen by; like those of the test (the rest) with their true labels


class _Batches(IterableDataset):
    """Full batches in a new random order each epoch, cut from tensors in memory."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.images[chosen], self.labels[chosen]


class Digits(LightningDataModule):
    """scikit-learn's digits, split, noised and ordered by `seed`: the same for all methods."""

    def __init__(self, split: str, seed: int, batch_size: int | None = None, label_noise: float | None = None) -> None:
        super().__init__()
        count, noise, usual = SPLITS[split]
        self.batch_size = batch_size or usual
        noise = noise if label_noise is None else label_noise
        source = load_digits()
        images = torch.from_numpy(source.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(source.target).long()
        train, rest = train_test_split(range(len(labels)), train_size=count, stratify=labels.numpy(), random_state=seed)
        val, test = train_test_split(rest, train_size=VALIDATION, stratify=labels[rest].numpy(), random_state=seed)
        self.mean, self.std = images[train].mean(), images[train].std()
        images = (images - self.mean) / self.std
        generator = torch.Generator().manual_seed(seed)
        noisy = labels[train].clone()
        changed = torch.randperm(len(train), generator=generator)[: round(noise * len(train))]
        noisy[changed] = torch.randint(10, (len(changed),), generator=generator)
        self.parts = {
            "train": (images[train], noisy),
            "val": (images[val], labels[val]),
            "test": (images[test], labels[test]),
        }
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Batches(*self.parts["train"], self.batch_size, self.seed), batch_size=None)

    def probe_dataloader(self) -> DataLoader:
        """For SharpnessMonitor: up to 250 training images in one batch."""
        return DataLoader(TensorDataset(*self.parts["train"]), batch_size=250)


class Classifier(LightningModule):
    """Any network that makes logits [..., C]; the loss is the mean cross entropy."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], Any],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing
        self._make = optimizer, schedule

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.network(inputs).flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self._make
        made = optimizer(self.parameters())
        return [made], [{"scheduler": schedule(made), "interval": "step"}]

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Tensor, batch_size: int = 256) -> tuple[float, float]:
        """Cross entropy (without label smoothing) and accuracy, in eval mode."""
        training = self.network.training
        self.network.eval()
        logits = torch.cat([self.network(part).flatten(0, -2) for part in inputs.split(batch_size)])
        self.network.train(training)
        right = logits.argmax(-1) == labels.flatten()
        return F.cross_entropy(logits, labels.flatten()).item(), right.double().mean().item()


def make_trainer(
    steps: int, *callbacks: Callback | None, clip: float | None = None, log_every_n_steps: int = 50
) -> Trainer:
    """A Trainer that does nothing but train."""
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=log_every_n_steps,
        gradient_clip_val=clip,
        callbacks=[each for each in callbacks if each is not None],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


Factory = Callable[..., torch.optim.Optimizer]


def _optimizer(name: str | Factory, lr: float, weight_decay: float, momentum: float) -> Factory:
    if callable(name):
        return partial(name, lr=lr, weight_decay=weight_decay)
    if name == "SGD":
        return partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return partial(torch.optim.AdamW, lr=lr, betas=(momentum, 0.95), weight_decay=weight_decay)


def _schedule(name: str, steps: int, optimizer: torch.optim.Optimizer) -> Any:
    """`constant`; `divided`: by 5 after 20, 50 and 80 % of the run (Figure 2); `cosine` to 0."""
    if name == "cosine":
        return WarmupCosineLR(optimizer, warmup=0, total=steps, final_lr_ratio=0.0)
    milestones = [steps * share // 100 for share in (20, 50, 80)] if name == "divided" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)


def train_digits(
    split: str,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float,
    optimizer: str | Factory = "SGD",
    momentum: float = 0.9,
    schedule: str = "cosine",
    ire: IRE | None = None,
    label_noise: float | None = None,
    dropout: float = 0.0,
    evaluate: Callable[[nn.Module, Digits], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train a ResNet of 19,074 parameters; `seed` is that of the split, the weights and the batches.

    `optimizer` may be made by a function of parameters, `lr` and `weight_decay`; `momentum` is its own matter then.
    `label_noise` is a share of the training images in place of the split's. `dropout` is before the linear layer.
    `evaluate` adds numbers about the trained network, which it gets in eval mode.
    """
    data = Digits(split, seed, label_noise=label_noise)
    torch.manual_seed(seed)
    network = ResNet(in_channels=1, num_classes=10, blocks=[1, 1, 1], widths=[8, 16, 32])
    if dropout:
        network.linear = nn.Sequential(nn.Dropout(dropout), network.linear)
    module = Classifier(
        network,
        _optimizer(optimizer, lr, weight_decay, momentum),
        partial(_schedule, schedule, steps),
        label_smoothing=0.1,
    )
    trainer = make_trainer(steps, ire)
    trainer.fit(module, data)
    result = {}
    for part in ("train", "val", "test"):
        loss, result[f"{part}_accuracy"] = module.evaluate(*data.parts[part])
        result[f"{part}_loss"] = loss if math.isfinite(loss) else DIVERGED
    monitor = SharpnessMonitor(quantities=["trace_fisher"], max_vectors=16, relative_error=0)
    result["trace_fisher"] = monitor.measure(trainer, module).values.get("sharpness/trace_fisher", math.nan)
    if evaluate is not None:
        result |= evaluate(network.eval(), data)
    return {name: float(f"{value:.5g}") for name, value in result.items()}


class _Curve(Callback):
    """Validation loss, and at times Tr F on training text, along the run."""

    def __init__(self, every: int, every_trace: int, batch: tuple[Tensor, Tensor]) -> None:
        self.every, self.every_trace, self.batch = every, every_trace, batch
        self.losses: list[tuple[int, float]] = []
        self.traces: list[tuple[int, float]] = []
        self.monitor = SharpnessMonitor(
            quantities=["trace_fisher"], max_vectors=8, relative_error=0, batch_size=TEXT["batch"]
        )

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every == 0:
            loss, _accuracy = module.evaluate(*self.batch)
            self.losses.append((step, loss))
            if not math.isfinite(loss):
                trainer.should_stop = True
        if self.every_trace and step % self.every_trace == 0:
            value = self.monitor.measure(trainer, module).values.get("sharpness/trace_fisher", math.nan)
            self.traces.append((step, value))


TEXT = {"batch": 16, "length": 64, "width": 64, "every": 25, "val_sequences": 256}


def text_data(vocabulary: int = 257, **source: Any) -> Text:
    """Sequences of the standard library's source, or of other text; 257 tokens are bytes, more are learnt."""
    data = Text(
        tokenizer="bytes" if vocabulary == 257 else "bpe",
        vocabulary_size=None if vocabulary == 257 else vocabulary,
        sequence_length=TEXT["length"],
        global_batch_size=TEXT["batch"],
        eval_batch_size=TEXT["val_sequences"],
        cache_dir=ROOT / "data" / "text",
        **{"val_size": 0.01, "test_size": 0.01, **source},
    )
    data.prepare_data()
    data.setup()
    return data


def text_module(
    vocabulary: int,
    steps: int,
    lr: float,
    weight_decay: float = 0.1,
    dropout: float = 0.0,
    final_lr_ratio: float = 0.05,
) -> Classifier:
    """A 2-layer Transformer and AdamW with 10 % warm-up, then cosine."""
    network = Transformer(
        vocab_size=vocabulary,
        width=TEXT["width"],
        num_layers=2,
        num_heads=4,
        feed_forward=4 * TEXT["width"],
        context_length=TEXT["length"],
        dropout=dropout,
        position_dropout=dropout,
    )
    schedule = partial(WarmupCosineLR, warmup=0.1, total=steps, final_lr_ratio=final_lr_ratio)
    return Classifier(network, _optimizer("AdamW", lr, weight_decay, 0.9), schedule)


def train_text(
    tokenizer: str,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float = 0.1,
    dropout: float = 0.0,
    clip: float | None = 1.0,
    final_lr_ratio: float = 0.05,
    every_trace: int = 0,
    ire: IRE | None = None,
) -> dict[str, Any]:
    """Train on the standard library's source; nats per token."""
    seed_everything(seed, verbose=False)
    vocabulary = {"bytes": 257, "bpe": 512}[tokenizer]
    data = text_data(vocabulary)
    module = text_module(vocabulary, steps, lr, weight_decay, dropout, final_lr_ratio)  # a loader draws random numbers
    val, test = (next(iter(loader)) for loader in (data.val_dataloader(), data.test_dataloader()))
    curve = _Curve(TEXT["every"], every_trace, val)
    make_trainer(steps, ire, curve, clip=clip).fit(module, data)
    numbers = {
        "val_loss": [curve.losses[-1][1]],
        "test_loss": [module.evaluate(*test)[0]],
        "curve": [loss for _, loss in curve.losses],
        "traces": [trace for _, trace in curve.traces],
    }
    shown = {
        name: [float(f"{value:.5g}") if math.isfinite(value) else DIVERGED for value in values]
        for name, values in numbers.items()
    }
    return {name: values[0] if name.endswith("_loss") else values for name, values in shown.items() if values}
