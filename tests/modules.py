"""Small networks and LightningModules that the tests share; nothing in them knows of IRE."""

import math
from collections.abc import Callable
from typing import Any

import cases
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": sgd,
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1),
}


class Scaler(torch.amp.GradScaler):
    """One whose third step, or that one, finds an overflow."""

    def __init__(self, overflow: int = 3) -> None:
        super().__init__("cpu", init_scale=64.0)
        self.calls = 0
        self.overflow = overflow

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.overflow:
            for group in optimizer.param_groups:
                group["params"][0].grad.fill_(torch.inf)
        return super().step(optimizer, *args, **kwargs)


def standing_still(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0)


# Networks


class Net(nn.Sequential):
    """Two layers, with BatchNorm and dropout on request."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
        layers += [nn.BatchNorm1d(8)] if batch_norm else []
        layers += [nn.Tanh()]
        layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(8, CLASSES))


class Checkpointed(nn.Module):
    """The layers in the middle keep no activations (`reentrant` ``None``: they do)."""

    def __init__(self, reentrant: bool | None, *middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.head, self.middle, self.tail = (
            nn.Linear(FEATURES, width),
            nn.Sequential(*middle),
            nn.Linear(width, CLASSES),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        if self.reentrant is None:
            return self.tail(self.middle(x))
        return self.tail(checkpoint(self.middle, x, use_reentrant=self.reentrant))


class Attention(nn.Module):
    """With torch's default kernel, whose backward pass has no derivative, or by plain formulas."""

    def __init__(self, kernel: bool = True) -> None:
        super().__init__()
        self.kernel = kernel
        self.inward, self.outward = nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x.view(len(x), 1, 3, 2))
        if self.kernel:
            x = F.scaled_dot_product_attention(x, x, x)
        else:
            x = (x @ x.mT / math.sqrt(x.size(-1))).softmax(-1) @ x
        return self.outward(x).mean((1, 2))


class Recurrent(nn.Module):
    """An LSTM or a GRU, by torch's kernel or by the equations of its documentation."""

    def __init__(self, kind: type[nn.RNNBase], kernel: bool = True) -> None:
        super().__init__()
        self.recurrent, self.outward = kind(2, 3, batch_first=True), nn.Linear(3, CLASSES)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 3, 2)
        return self.outward(self.recurrent(x)[0][:, -1] if self.kernel else self.by_formulas(x))

    def by_formulas(self, x: Tensor) -> Tensor:
        r = self.recurrent
        h = c = x.new_zeros(len(x), 3)
        for t in range(x.size(1)):
            inward, backward = x[:, t] @ r.weight_ih_l0.T + r.bias_ih_l0, h @ r.weight_hh_l0.T + r.bias_hh_l0
            if isinstance(r, nn.LSTM):
                i, f, g, o = (inward + backward).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r1, z1, n1), (r2, z2, n2) = inward.chunk(3, 1), backward.chunk(3, 1)
                z, n = (z1 + z2).sigmoid(), (n1 + (r1 + r2).sigmoid() * n2).tanh()
                h = (1 - z) * n + z * h
        return h


class Complex(nn.Module):
    """A layer with complex weights, or the same with pairs of real numbers."""

    def __init__(self, pairs: bool, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        weight = torch.randn(FEATURES, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if pairs else weight)
        self.head = nn.Linear(8, CLASSES, dtype=dtype.to_real())
        nn.init.constant_(self.head.weight, 0.3)
        with torch.no_grad():
            self.head.weight[0] = -0.4
            self.head.bias.zero_()
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        return self.head((x.to(weight) @ weight).abs())


class Odd(nn.Module):
    """Frozen, unused, tied, scalar and empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.half_frozen = nn.Linear(FEATURES, FEATURES)
        self.half_frozen.bias.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(FEATURES, FEATURES, bias=False)
        self.twin = nn.Linear(FEATURES, FEATURES)
        self.twin.weight = self.tied.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.sometimes = nn.Linear(FEATURES, FEATURES)
        self.empty = nn.Parameter(torch.zeros(0))
        self.tail = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.half_frozen(self.frozen(x)).tanh()
        x = self.twin(self.tied(x).tanh()) * self.scale
        return self.tail(self.sometimes(x) if float(x.detach().sum()) > 0 else x)


class OnceTanh(torch.autograd.Function):
    """tanh as a function of the user's own, with a derivative but not two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(gradient, ctx.saved_tensors[0])  # the bits of torch's own


class OnceNet(Net):
    """`Net` whose tanh has one derivative only."""

    def forward(self, x: Tensor) -> Tensor:
        return self[-1](OnceTanh.apply(self[0](x)))


# LightningModules


class Classifier(pl.LightningModule):
    """A user's module: nothing in it knows of IRE."""

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: OptimizerFactory = sgd,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class Custom(Classifier):
    """A classifier whose loss is any function of (outputs, targets, module); its weights stay where they are."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor, nn.Module], Tensor],
        net: nn.Module | None = None,
        optimizer: OptimizerFactory = standing_still,
    ) -> None:
        super().__init__(net, optimizer)
        self.loss = loss
        self.sizes = cases.Notes()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        x, y = batch
        return self.loss(self.net(x), y, self)


class Exact(Classifier):
    """In float64, so that the only differences are the estimators' own, with batches of its own for the monitor."""

    def __init__(self, net: nn.Module | None = None, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__(net, optimizer)
        self.double()

    def probe_dataloader(self) -> Any:
        return cases.loader(cases.data(24, torch.float64))


class TakesTheIterator(Classifier):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Manual(Classifier):
    """The classifier in manual optimization: with a closure or without."""

    def __init__(self, net: nn.Module | None = None, closure: bool = False, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.automatic_optimization = False
        self.with_closure = closure

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.log("loss", loss)
            return loss

        if self.with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class TwoPlayers(pl.LightningModule):
    """GAN-like: two optimizers, one of them stepping twice a batch, each toggled."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Net(), Net(batch_norm=True)
        self.toggle = toggle

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.first.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(self.second.parameters(), lr=0.01),
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        one, two = self.optimizers()
        for optimizer in (one, two, two):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self.first(x) + self.second(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)
