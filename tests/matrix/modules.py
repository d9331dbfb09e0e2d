"""The module whose runs are recorded, and its variants: one overridden hook or one kind of network each."""

import random
from collections.abc import Callable
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from modules import Checkpointed, Net, sgd
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from matrix.recorder import Recorder, noting

EPOCHS, BATCH = 2, 8
SAMPLES = 44  # six batches, the last one short


def loader(samples: int = SAMPLES, seed: int = 1, batch_size: int = BATCH, shuffle: bool = True) -> DataLoader:
    return DataLoader(cases.data(samples, seed=seed), batch_size=batch_size, shuffle=shuffle)


@noting(pl.LightningModule)
class Subject(pl.LightningModule):
    """A user's module that does a lot: BatchNorm, dropout, own buffers and draws, metrics, several logged values."""

    recorder: Recorder | None = None

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        scheduler: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if net is None:
            net = Net(batch_norm=True, dropout=0.3)
            net[1].momentum = None  # a cumulative average: counts the batches itself
        self.net = net
        self.register_buffer("memory", torch.zeros(FEATURES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.training_steps = self.backward_passes = 0

    @torch.compiler.disable
    def note(self, name: str, *args: Any) -> None:
        self.training_steps += name == "training_step"
        self.backward_passes += name == "backward"
        if self.recorder is not None and self._trainer is not None:
            self.recorder.events.append((f"module.{name}", self._trainer.global_step))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("training_step")
        return self.step(batch, batch_idx)

    def step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.memory = 0.9 * self.memory + 0.1 * x.mean(0)  # a buffer that is replaced, not changed in place
        noise = torch.randn_like(x) + float(np.random.normal()) + random.gauss(0, 1)
        logits = self.logits(x + 0.01 * noise)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "double": 2 * loss}, on_step=False, on_epoch=True)
        self.log("sum", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.logits(batch[0]), batch[1]))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.note("backward")
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


def scheduled(**settings: Any) -> Callable[[], Subject]:
    make = settings.pop("make")
    return lambda: Subject(scheduler=lambda optimizer: {"scheduler": make(optimizer), **settings})


def adamw(**settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, **settings)


def optimized(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[], Subject]:
    return lambda: Subject(optimizer=optimizer)


def with_net(make: Callable[[], nn.Module], **settings: Any) -> Callable[[], Subject]:
    return lambda: Subject(make(), **settings)


class OwnClipping(Subject):
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.note("configure_gradient_clipping")
        for parameter in self.parameters():
            nn.utils.clip_grad_norm_(parameter, 0.05 if self.trainer.global_step % 2 else 0.1)
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="value")


class OwnSchedulerStep(Subject):
    def __init__(self) -> None:
        super().__init__(scheduler=lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.note("lr_scheduler_step")
        if self.trainer.global_step % 3 == 0:
            scheduler.step()


class Halving:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self, epoch: int | None = None) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class OwnScheduler(Subject):
    def __init__(self) -> None:
        super().__init__(scheduler=lambda optimizer: {"scheduler": Halving(optimizer), "interval": "step"})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


class DictOutput(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        return {"loss": loss, "extra": loss.detach() * 2, "names": ["a", "b"]}


class SomeNone(Subject):
    skipped = (1, 4)

    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss


class LastNone(SomeNone):
    skipped = (3, 5)  # the last of each window of four


class OneArgument(Subject):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        self.note("training_step")
        return self.step(batch, 0)


class DictBatches(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        return super().step((batch["nested"]["x"], batch["y"][0]), batch_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.trainer.training:
            return batch
        return {"nested": {"x": batch[0] + 0.01 * torch.randn_like(batch[0])}, "y": [batch[1]]}


class TwoLoaders(Subject):
    def step(self, batch: Any, batch_idx: int) -> Any:
        first, second = batch
        return super().step((torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), batch_idx)


class WarmUpByHand(Subject):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.note("optimizer_step")
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class EverySecond(Subject):
    """As in Lightning's documentation: the closure runs at every batch, the step at every second."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class AccumulatesByHand(EverySecond):
    """The gradients of two batches are added up, without the Trainer knowing."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class ClosureFirst(Subject):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.grad *= 0.5
        optimizer.step()


class OwnBackward(Subject):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.note("backward")
        (0.5 * loss + 1e-3 * sum(p.square().sum() for p in self.parameters())).backward()


class OwnZeroGrad(Subject):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.note("optimizer_zero_grad")
        optimizer.zero_grad(set_to_none=False)


class EditsBeforeStep(Subject):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note("on_before_optimizer_step")
        for parameter in self.parameters():
            parameter.grad.add_(0.01 * torch.randn_like(parameter.grad)).clamp_(-0.1, 0.1)


class LooksBeforeZeroGrad(Subject):
    """Sees the gradients of the step before."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note("on_before_zero_grad")
        gradient = self.net[0].weight.grad
        self.log("seen", (0.0 if gradient is None else gradient.norm()) + torch.rand(()))


class LooksAroundBackward(Subject):
    def on_before_backward(self, loss: Tensor) -> None:
        self.note("on_before_backward")
        self.log("seen_before", float(loss.detach()) + random.random())

    def on_after_backward(self) -> None:
        self.note("on_after_backward")
        norms = torch.stack([parameter.grad.norm() for parameter in self.parameters()])
        self.log("seen_after", norms.max() + np.random.random())


class EditsAfterBackward(Subject):
    def on_after_backward(self) -> None:
        self.note("on_after_backward")
        for parameter in self.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


class GradientHooks(Subject):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.1)
        self.net[0].register_full_backward_hook(lambda module, inward, outward: None)


class StopsTheEpoch(Subject):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # type: ignore[override]
        self.note("on_train_batch_start")
        return -1 if batch_idx == 3 else None


class Tuned(Subject):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9))
        self.lr, self.batch_size = 0.05, 4

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)


class Child(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.seen = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.layer(batch[0])
        self.seen(logits, batch[1])
        loss = F.cross_entropy(logits, batch[1])
        self.log("child/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"child/seen": self.seen})
        self.log("child/sum", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss


class Parent(Subject):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.child.log = self.log  # Lightning refuses a child's own, which no hook of the Trainer manages

    def step(self, batch: Any, batch_idx: int) -> Any:
        return super().step(batch, batch_idx) + self.child.training_step(batch, batch_idx)


class Words(nn.Module):
    """An embedding with sparse gradients, one row used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(20, 8, sparse=True, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x.abs() * 5).long().clamp(max=19))[:, :CLASSES]


def parametrized() -> nn.Module:
    normed = parametrizations.weight_norm(nn.Linear(FEATURES, 8))
    orthogonal = parametrizations.orthogonal(nn.Linear(8, 8))
    return nn.Sequential(normed, orthogonal, nn.Tanh(), nn.Linear(8, CLASSES))


def checkpointed(reentrant: bool, batch_norm: bool) -> nn.Module:
    """With random layers and BatchNorm among those that are computed again."""
    norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
    return Checkpointed(reentrant, norm, nn.Tanh(), nn.Dropout(0.2))


def spectral() -> nn.Module:
    """Its buffers change at every forward pass, and what it computes depends on them."""
    return nn.Sequential(nn.Linear(FEATURES, 8), parametrizations.spectral_norm(nn.Linear(8, CLASSES)))


class LogsFromOutside(Subject):
    """The bound method `self.log` was handed to something that is no LightningModule."""

    class Reporter:
        def __init__(self, log: Callable[..., None]) -> None:
            self.log = log

        def report(self, loss: Tensor) -> None:
            self.log("reported", loss.detach() + 1, on_step=False, on_epoch=True, reduce_fx="sum")

    def __init__(self) -> None:
        super().__init__()
        self.reporter = self.Reporter(self.log)

    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        self.reporter.report(loss)
        return loss


class GradientPenalty(Subject):
    """Differentiates twice inside the step."""

    def step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.logits(x).sum(), x, create_graph=True)
        return super().step(batch, batch_idx) + 0.1 * slope.square().mean()


class RecurrentAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 8, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.tail = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.attention(self.lstm(x.view(len(x), 3, 2))[0])[:, -1])


class Groups(Subject):
    """Only some parameters are optimized, with different settings."""

    def __init__(self) -> None:
        super().__init__(
            optimizer=lambda module: torch.optim.AdamW(
                [
                    {"params": [module.net[0].weight], "lr": 0.01, "weight_decay": 0.1},
                    {"params": [module.net[0].bias], "lr": 0.0},
                    {"params": module.net[1].parameters(), "amsgrad": True},
                ]
            )
        )


class Backbone(Subject):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
        self.backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES))

    def logits(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))


class ToCompile(Subject):
    """What torch.compile can take whole: no draws outside of torch, no metric object."""

    def step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.logits(batch[0]), batch[1], label_smoothing=0.1)


class ToCompileLogging(ToCompile):
    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def compiled(backend: str, what: str) -> Callable[[], Any]:
    def make() -> Any:
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        if what == "part":
            return Subject(torch.compile(net, backend=backend))  # type: ignore[arg-type]
        return torch.compile(ToCompile(net) if what == "module" else ToCompileLogging(net), backend=backend)

    return make


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.count = base, 0
        super().__init__([p for group in base.param_groups for p in group["params"]], {"lr": 0.1})
        self.param_groups = base.param_groups
        self.slow = [parameter.detach().clone() for parameter in base.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)
        return loss
