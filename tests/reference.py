"""A slow reference of IRE and SAM: one plain loop that reads like the paper, sharing no arithmetic with the package.

Only the seeds of the random draws are the package's, so that both see the same labels and the same noise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ire.functional.seeds import mixed_seed


@dataclass
class Recipe:
    """What the reference does; the names are the callback's."""

    kappa: Any = 0.0
    gamma: Any = 0.9
    interval: int = 10
    start: int = 0
    rho: float | None = None
    adaptive: bool | str = False
    eta: float = 0.0
    average: bool = False
    sam_interval: int = 1
    norm_only: bool = False
    only: str = "*"
    ball: tuple[float, float, int, str] | None = None  # zeta, epsilon, ascents, scope
    scope: str = "global"
    exclude: Sequence[str] = ()
    scale_weight_decay: bool | str = True
    kappa_schedule: str = "constant"
    ramp: int = 1
    beta: float = 0.0
    curvature: str = "sampled"
    exclude_zero: bool = False
    clip: float | None = None
    masks: list[Tensor] = field(default_factory=list)
    average_h: list[Tensor] = field(default_factory=list)


def train(
    module: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    windows: Iterable[Sequence[tuple[Tensor, Tensor]]],
    recipe: Recipe,
    make_scheduler: Callable[..., Any] | None = None,
    net: Callable[[Tensor], Tensor] | None = None,
) -> list[list[Tensor]]:
    """Train on windows of micro-batches; returns the masks in force at every step."""
    optimizer = make_optimizer(module)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    weights = list(module.parameters())
    peaks: dict[int, float] = {}
    history = []
    for step, window in enumerate(windows):
        seed = mixed_seed(0, step)
        on = recipe.kappa != 0 and step >= recipe.start
        buffers = [buffer.clone() for buffer in module.buffers()]
        base = [weight.detach().clone() for weight in weights]
        perturbs = (recipe.rho is not None or recipe.ball is not None) and step % recipe.sam_interval == 0

        if perturbs and recipe.average:
            gradient = _gradient_at(module, weights, base, _random_step(weights, recipe.rho, seed), window)
            after_forward = [buffer.clone() for buffer in module.buffers()]
        else:
            gradient = _gradient(module, weights, window)
            after_forward = [buffer.clone() for buffer in module.buffers()]
        if on and (step - recipe.start) % recipe.interval == 0:
            _copy(module.buffers(), buffers)
            plain = gradient
            _remake_masks(recipe, module, _curvature(recipe, module, optimizer, plain, window, seed))
        if perturbs and recipe.ball is not None:
            ascent = [torch.zeros_like(weight) for weight in weights]
            for _ in range(recipe.ball[2]):
                _copy(module.buffers(), buffers)
                ascent = _climb_in_ball(recipe.ball, ascent, _of_minimized(weights, optimizer, gradient))
                gradient = _gradient_at(module, weights, base, ascent, window)
        elif perturbs and not recipe.average:
            _copy(module.buffers(), buffers)
            ascent = _ascent(recipe, module, optimizer, _of_minimized(weights, optimizer, gradient))
            gradient = _gradient_at(module, weights, base, ascent, window)
        _copy(module.buffers(), after_forward)

        for weight, g in zip(weights, gradient, strict=True):
            weight.grad = g.clone()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        optimizer.step()
        if on:
            grown = min(1.0, (step - recipe.start + 1) / recipe.ramp)
            _boost(recipe, module, optimizer, weights, base, peaks, grown)
        elif recipe.kappa_schedule == "lr":
            _peak(optimizer, peaks)
        if scheduler is not None:
            scheduler.step()
        history.append([mask.clone() for mask in recipe.masks])
    return history


def _gradient(module: nn.Module, weights: list[Tensor], window: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    total = [torch.zeros_like(weight) for weight in weights]
    for x, y in window:
        loss = F.cross_entropy(module(x), y) / len(window)
        for into, g in zip(total, torch.autograd.grad(loss, weights), strict=True):
            into += g
    return total


def _gradient_at(
    module: nn.Module, weights: list[Tensor], base: list[Tensor], move: list[Tensor], window: Any
) -> list[Tensor]:
    _copy(weights, [b + m for b, m in zip(base, move, strict=True)])
    gradient = _gradient(module, weights, window)
    _copy(weights, base)
    return gradient


def _of_minimized(weights: list[Tensor], optimizer: torch.optim.Optimizer, gradient: list[Tensor]) -> list[Tensor]:
    signs = {id(p): -1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups for p in group["params"]}
    return [signs[id(w)] * g for w, g in zip(weights, gradient, strict=True)]


def _climb_in_ball(ball: tuple[float, float, int, str], ascent: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
    zeta, epsilon, _, scope = ball
    longer = [move + zeta * g for move, g in zip(ascent, gradient, strict=True)]
    lengths = [float(move.square().sum()) ** 0.5 for move in longer]
    if scope == "global":
        lengths = [sum(length**2 for length in lengths) ** 0.5] * len(longer)
    return [move * epsilon / length if length > epsilon else move for move, length in zip(longer, lengths, strict=True)]


def _ascent(
    recipe: Recipe, module: nn.Module, optimizer: torch.optim.Optimizer, gradient: list[Tensor]
) -> list[Tensor]:
    weights = list(module.parameters())
    rho = {id(p): group.get("sam_rho", recipe.rho) for group in optimizer.param_groups for p in group["params"]}
    norms = {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm))
        for name, _ in layer.named_parameters(recurse=False)
    }
    names = [name for name, _ in module.named_parameters()]
    chosen = [(not recipe.norm_only or name in norms) and fnmatchcase(name, recipe.only) for name in names]
    adapts = ["weight" in name if recipe.adaptive == "weights" else recipe.adaptive for name in names]
    size = [w.detach().abs() + recipe.eta if a else torch.ones_like(w) for w, a in zip(weights, adapts, strict=True)]
    norm = sum(float((t * g).square().sum()) for t, g, c in zip(size, gradient, chosen, strict=True) if c) ** 0.5
    return [
        rho[id(w)] * t * t * g / norm if c else torch.zeros_like(g)
        for w, t, g, c in zip(weights, size, gradient, chosen, strict=True)
    ]


def _random_step(weights: list[Tensor], rho: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(mixed_seed(seed, "noise"))
    noise = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    norm = sum(float(xi.square().sum()) for xi in noise) ** 0.5
    return [rho * xi / norm for xi in noise]


def _curvature(
    recipe: Recipe,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: list[Tensor],
    window: Sequence[tuple[Tensor, Tensor]],
    seed: int,
) -> list[Tensor]:
    weights = list(module.parameters())
    shared = torch.Generator().manual_seed(mixed_seed(seed, "shared"))
    if recipe.curvature == "empirical":
        return [g * g for g in gradient]
    if recipe.curvature == "second-moment":
        decay = optimizer.param_groups[0]["betas"][1]
        states = [optimizer.state[weight] for weight in weights]
        return [state["exp_avg_sq"] / (1 - decay ** float(state["step"])) for state in states]
    if recipe.curvature == "random":
        return [torch.rand(weight.shape, generator=shared) for weight in weights]
    if recipe.curvature == "hessian":
        return _signed_rows(module, weights, window, shared)
    return _sampled_fisher(module, weights, window, seed)


def _signed_rows(
    module: nn.Module, weights: list[Tensor], window: Sequence[tuple[Tensor, Tensor]], source: torch.Generator
) -> list[Tensor]:
    """v * (H v) with the Hessian written out row by row."""
    loss = sum(F.cross_entropy(module(x), y) / len(window) for x, y in window)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = []
    for one in gradient:
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(one, weights, retain_graph=True)]))
    bits = [torch.empty(w.numel(), dtype=torch.int8).random_(0, 2, generator=source) for w in weights]
    signs = torch.cat(bits).to(gradient) * 2 - 1
    product = signs * (torch.stack(rows) @ signs)
    return [part.view(w.shape) for part, w in zip(product.split([w.numel() for w in weights]), weights, strict=True)]


def _sampled_fisher(module: nn.Module, weights: list[Tensor], window: Any, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(mixed_seed(seed, "labels", 0))
    total = [torch.zeros_like(weight) for weight in weights]
    squares = 0.0
    for x, _ in window:
        logits = module(x)
        cumulative = logits.detach().softmax(-1).cumsum(-1)
        draw = torch.rand(len(x), generator=generator, dtype=torch.float64).to(cumulative) * cumulative[:, -1]
        labels = (cumulative <= draw[:, None]).sum(-1)
        log_likelihood = logits.log_softmax(-1)[torch.arange(len(x)), labels]
        loss = -log_likelihood.mean() / len(window)
        squares += len(x) * (1 / (len(x) * len(window))) ** 2
        for into, g in zip(total, torch.autograd.grad(loss, weights), strict=True):
            into += g
    return [g * g / squares for g in total]


def _remake_masks(recipe: Recipe, module: nn.Module, h: list[Tensor]) -> None:
    if recipe.beta:
        before = recipe.average_h or [torch.zeros_like(new) for new in h]
        h = [recipe.beta * old + (1 - recipe.beta) * new for old, new in zip(before, h, strict=True)]
    recipe.average_h = h
    h = [v.abs() for v in h]
    names = [name for name, _ in module.named_parameters()]
    takes_part = [not any(fnmatchcase(name, pattern) for pattern in recipe.exclude) for name in names]
    gammas = recipe.gamma if isinstance(recipe.gamma, dict) else {"*": recipe.gamma}
    fits = [next(pattern for pattern in gammas if fnmatchcase(name, pattern)) for name in names]
    thresholds = []
    for index, pattern in enumerate(fits):
        together = [t and f == pattern for t, f in zip(takes_part, fits, strict=True)]
        pool = [v for v, t in zip(h, together, strict=True) if t] if recipe.scope == "global" else [h[index]]
        if not pool:
            thresholds.append(torch.tensor(-1.0))
            continue
        ranked = torch.cat([v.reshape(-1) for v in pool]).sort().values
        ranked = ranked[ranked > 0] if recipe.exclude_zero else ranked
        thresholds.append(ranked[max(1, int(len(ranked) * gammas[pattern])) - 1])
    recipe.masks = [
        ((v <= threshold) & t & ((v > 0) | (not recipe.exclude_zero)))
        for v, threshold, t in zip(h, thresholds, takes_part, strict=True)
    ]


def _peak(optimizer: torch.optim.Optimizer, peaks: dict[int, float]) -> None:
    for index, group in enumerate(optimizer.param_groups):
        peaks[index] = max(peaks.get(index, 0.0), group["lr"])


@torch.no_grad()
def _boost(
    recipe: Recipe,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: list[Tensor],
    base: list[Tensor],
    peaks: dict[int, float],
    grown: float,
) -> None:
    _peak(optimizer, peaks)
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    names = [name for name, _ in module.named_parameters()]
    for name, weight, old, mask in zip(names, weights, base, recipe.masks, strict=True):
        index = group_of[id(weight)]
        group = optimizer.param_groups[index]
        own = recipe.kappa if isinstance(recipe.kappa, dict) else {"*": recipe.kappa}
        by_name = next(kappa for pattern, kappa in own.items() if fnmatchcase(name, pattern))
        strength = group.get("ire_kappa", by_name)
        kappa = grown * strength * (group["lr"] / peaks[index] if recipe.kappa_schedule == "lr" else 1.0)
        decayed = old * (1 - group["lr"] * group["weight_decay"])
        if recipe.scale_weight_decay == "only":
            weight.copy_(weight - kappa * mask.to(weight) * (old - decayed))
            continue
        start = old if recipe.scale_weight_decay else decayed
        weight.copy_(start + (1 + kappa * mask.to(weight)) * (weight - start))


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
