"""Figure 1: gradient descent crawls along the valley, twice the learning rate diverges, IRE goes to its flattest point.

L(u, v) = (1 + u^2) v^2 / 2 from (1, 0.01), float64, `torch.optim.SGD` and `lightning_ire.functional.boost_` with the
mask of `flat_masks`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib import pyplot as plt

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from lightning_ire.functional import boost_, flat_masks

QUESTION = "Figure 1: does IRE reach the flattest minimum where gradient descent crawls or diverges?"
START = (1.0, 0.01)
STEPS = 1000
CASES = [(1.0, 0.0), (2.0, 0.0), (1.0, 90.0), (1.0, 900.0), (1.0, 9000.0)]  # eta, kappa
POINTS = [*range(11), *range(20, 101, 10), *range(200, STEPS + 1, 100)]


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    return [{"eta": eta, "kappa": kappa} for eta, kappa in CASES]


def measure(settings: Settings) -> Result:
    """Follow one trajectory; also the largest distance from the paper's recursion worked out in Python's floats."""
    weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in START]
    masks = flat_masks([torch.tensor(START[1] ** 2), torch.tensor(1 + START[0] ** 2)], gamma=0.5)
    optimizer = torch.optim.SGD(weights, lr=settings["eta"])
    u, v = START
    path, error = [START], 0.0
    for _ in range(STEPS):
        optimizer.zero_grad()
        a, b = weights
        ((1 + a**2) * b**2 / 2).backward()
        old = [weight.detach().clone() for weight in weights]
        optimizer.step()
        boost_(weights, old, masks, settings["kappa"])
        u, v = u - (1 + settings["kappa"]) * settings["eta"] * u * v * v, v - settings["eta"] * (1 + u * u) * v
        path.append((a.item(), b.item()))
        if not all(map(math.isfinite, path[-1])) or abs(path[-1][1]) > 1e6:
            break
        error = max(error, (abs(path[-1][0] - u) + abs(path[-1][1] - v)) / max(1.0, abs(u), abs(v)))
    diverged = len(path) <= STEPS
    return {
        "path": [(step, *path[step]) for step in POINTS if step < len(path)],
        "steps": len(path) - 1,
        "diverged": diverged,
        "error": error,
    }


def verdict(runs: Runs) -> Verdict:
    ends = {kappa: abs(runs[{"eta": 1.0, "kappa": kappa}]["path"][-1][1]) for eta, kappa in CASES if eta == 1.0}
    diverged = runs[{"eta": 2.0, "kappa": 0.0}]["diverged"]
    error = max(result["error"] for _, result in runs)
    two_steps = runs[{"eta": 1.0, "kappa": 9000.0}]["path"][2][1]
    sizes = [ends[kappa] for kappa in sorted(ends)]
    holds = diverged and ends[0.0] > 0.99 and sizes == sorted(sizes, reverse=True) and error < 1e-12
    return Verdict(
        "reproduced" if holds else "not reproduced",
        f"After {STEPS} steps u, the distance from the flattest minimum, is {ends[9000.0]:.3f} with kappa = 9000 and "
        f"{ends[0.0]:.3f} without IRE; twice the learning rate {'diverges' if diverged else 'does not diverge'}.",
        f"After {STEPS} steps with eta = 1 GD is at u = {ends[0.0]:.3f}; with kappa = 90, 900, 9000 IRE ends "
        f"at {ends[90.0]:.3f}, {ends[900.0]:.3f}, {ends[9000.0]:.3f} (kappa = 9000 is at {two_steps:.4f} after two "
        f"steps); eta = 2 {'diverges' if diverged else 'does not diverge'}. Largest distance from the recursion: "
        f"{error:.0e}.",
    )


def tables(runs: Runs) -> str:
    rows = []
    for eta, kappa in CASES:
        result = runs[{"eta": eta, "kappa": kappa}]
        step, u, v = result["path"][-1]
        rows.append([f"{eta:g}", f"{kappa:g}", f"{result['path'][2][1]:.4f}", f"{u:.5f}", f"{v:.2g}", f"{step}"])
    return table(["eta", "kappa", "u after 2 steps", "u at the end", "v at the end", "step"], rows)


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    u, v = torch.meshgrid(torch.linspace(-0.05, 1.1, 200), torch.linspace(-0.012, 0.022, 200), indexing="xy")
    axes[0].contourf(u, v, (1 + u**2) * v**2 / 2, 30, cmap="Greys")
    for eta, kappa in CASES:
        points = runs[{"eta": eta, "kappa": kappa}]["path"]
        label = f"eta = {eta:g}" + (f", kappa = {kappa:g}" if kappa else "")
        shown = points[:3] if eta == 2 else points
        axes[0].plot([p[1] for p in shown], [p[2] for p in shown], "o-", markersize=3, label=label)
        if eta == 1:
            colour = axes[0].lines[-1].get_color()
            axes[1].plot(
                [p[0] for p in points], [abs(p[1]) for p in points], "o-", markersize=3, color=colour, label=label
            )
    axes[0].axhline(0, color="black", linewidth=0.6, linestyle=":")
    axes[0].set(xlabel="u (flat)", ylabel="v (sharp)", title="trajectories over the loss", ylim=(-0.012, 0.022))
    axes[0].legend(fontsize=8, loc="upper center", ncols=2)
    axes[1].set(xlabel="step", ylabel="|u|: 0 is the flattest minimum", title="how flat it gets", xscale="symlog")
    axes[1].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.savefig(FIGURES / "trajectories.png", dpi=100)
    plt.close(figure)
