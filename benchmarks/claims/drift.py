"""Section 5: the drift of Tr(H) along the minima under SAM, with and without IRE.

Theory, for SGD without momentum and the exact projection on the flat directions: E[z_{t+1}] = z_t - eta_eff grad_M
Tr(H)/2 with eta_eff = (1 + kappa) eta rho^2 / p for average SAM and (1 + kappa) eta rho^2 for SAM on single samples,
stable for kappa up to order 1 / rho.

Three problems L = mean_i r_i(theta)^2 / 2 that interpolate, in float64, with closed-form residuals and Jacobians:

- `toy`: r = sqrt(1 + u^2) v, the loss of Figure 1; Tr H = 1 + u^2 on the minima v = 0.
- `factorization`: r_ij = u_i v_j - M_ij, 3 x 3 of rank 1; flat is the exchange of size between u and v.
- `diagonal network`: r_i = x_i (a * a - b * b) - y_i, three samples in 10 dimensions.

A step: theta += (1 + kappa P) (-eta g), P = I - J^+ J the projection on the null space of the Jacobian J at the
current weights, g the gradient of one random sample at theta + rho g_i / |g_i| (SAM) or of all at theta + rho xi /
|xi| (average SAM). This is a batch of 64 replicas in closed form: it tests the theory, not the callback, whose P is
diagonal.

Measured is the fall of Tr H at the minimum next to the weights (Gauss-Newton), after 200 steps without IRE that find
the stationary distance from the minima. eta is 0.05 / max |J_i|^2; there are corrections of that order.

- `ratio`: falls per step with and without IRE, in runs of equal drift time (1 + kappa) x steps with the same noise;
  and the fall over that of the flow dz/dt = -eta_eff grad_M Tr(H)/2.
- `limit`: the largest kappa, on a grid of factors sqrt(2), up to which all runs of 300 steps are stable: max_i |r_i|
  at most 5 times that without IRE, and Tr H not above its start.
- `scaling` (Table 7): measured eta_eff with kappa = 1 / rho for rho = 0.4 sqrt(eta / eta_max) (average SAM) or for a
  fixed eta (SAM). The factor is 1 + kappa, so powers of 1 + 1 / rho are a little larger than those of 1 / rho.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from lightning_ire.compare.statistics import Difference, interval

QUESTION = "Section 5: is the drift to flat minima 1 + kappa times as fast with IRE, for kappa up to order 1 / rho?"
METHODS = ("SAM", "average SAM")
KAPPAS = (0.0, 1.0, 3.0, 10.0, 30.0)
RHO = 0.05
RHOS = (0.2, 0.1, 0.05, 0.025, 0.0125)
ETAS = (1.0, 0.5, 0.25, 0.125)  # shares of eta_max
REPLICAS, BLOCKS = 64, 8
STEPS = {"default": 3000, "full": 3000, "tiny": 60}


class Problem(NamedTuple):
    """Residuals [R, n] and Jacobians [R, n, p] of weights [R, p], and the first weights [p]."""

    residuals: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Tensor]
    start: Tensor

    def trace(self, theta: Tensor) -> Tensor:
        """Tr H = mean_i |J_i|^2 at minima, [R]."""
        return self.jacobian(theta).square().sum(2).mean(1)


def _toy() -> Problem:
    def jacobian(theta: Tensor) -> Tensor:
        u, v = theta.unbind(1)
        size = (1 + u * u).sqrt()
        return torch.stack([u * v / size, size], 1).unsqueeze(1)

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Problem(lambda theta: (1 + theta[:, :1] ** 2).sqrt() * theta[:, 1:], jacobian, start)


def _factorization() -> Problem:
    u = torch.tensor([1.5, -1.0, 2.0], dtype=torch.float64)
    v = torch.tensor([0.4, 0.5, -0.3], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)

    def residuals(theta: Tensor) -> Tensor:
        return (theta[:, :3, None] * theta[:, None, 3:] - u[:, None] * v).flatten(1)

    def jacobian(theta: Tensor) -> Tensor:
        by_u = torch.einsum("ik,rj->rijk", eye, theta[:, 3:])
        by_v = torch.einsum("jk,ri->rijk", eye, theta[:, :3])
        return torch.cat([by_u, by_v], 3).flatten(1, 2)

    return Problem(residuals, jacobian, torch.cat([u, v]))


def _diagonal_network() -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    start = 0.5 + torch.rand(20, generator=generator, dtype=torch.float64)
    target = x @ (start[:10] ** 2 - start[10:] ** 2)

    def residuals(theta: Tensor) -> Tensor:
        return (theta[:, :10] ** 2 - theta[:, 10:] ** 2) @ x.T - target

    def jacobian(theta: Tensor) -> Tensor:
        return 2 * torch.cat([theta[:, None, :10] * x, -theta[:, None, 10:] * x], 2)

    return Problem(residuals, jacobian, start)


PROBLEMS = {"toy": _toy(), "factorization": _factorization(), "diagonal network": _diagonal_network()}


def pseudo_inverse(jacobian: Tensor) -> Tensor:
    """J^+ [R, p, n]; the factorization's Jacobian has dependent rows."""
    return torch.linalg.pinv(jacobian, rtol=1e-6)


def to_minimum(problem: Problem, theta: Tensor) -> Tensor:
    """The minimum next to the weights, by Gauss-Newton."""
    for _ in range(4):
        theta = theta - (pseudo_inverse(problem.jacobian(theta)) @ problem.residuals(theta).unsqueeze(2)).squeeze(2)
    return theta


def step(
    problem: Problem, method: str, theta: Tensor, eta: float, rho: float, kappa: float, generator: torch.Generator
) -> Tensor:
    """The weights after one step of all replicas."""
    jacobian, residuals = problem.jacobian(theta), problem.residuals(theta)
    count = residuals.shape[1]
    if method == "SAM":
        chosen = torch.randint(count, (len(theta), 1), generator=generator)
        rows = chosen.unsqueeze(2).expand(-1, -1, theta.shape[1])
        ascent = jacobian.gather(1, rows).squeeze(1) * residuals.gather(1, chosen)
    else:
        ascent = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
    moved = theta + rho * ascent / ascent.norm(dim=1, keepdim=True).clamp_min(1e-300)
    there, errors = problem.jacobian(moved), problem.residuals(moved)
    if method == "SAM":
        gradient = there.gather(1, rows).squeeze(1) * errors.gather(1, chosen)
    else:
        gradient = (there * errors.unsqueeze(2)).mean(1)
    if kappa:
        sharp = pseudo_inverse(jacobian) @ (jacobian @ gradient.unsqueeze(2))
        gradient = gradient + kappa * (gradient - sharp.squeeze(2))
    return theta - eta * gradient


def flow(problem: Problem, theta: Tensor, time: float) -> Tensor:
    """Tr H after dz/dt = -grad_M Tr(H)/2 for so long, by 200 Euler steps."""
    for _ in range(200):
        at = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.trace(at).sum() / 2, at)
        jacobian = problem.jacobian(theta)
        flat = gradient - (pseudo_inverse(jacobian) @ (jacobian @ gradient.unsqueeze(2))).squeeze(2)
        theta = to_minimum(problem, theta - time / 200 * flat)
    return problem.trace(theta)


def eta_max(problem: Problem) -> float:
    return 0.05 / float(problem.jacobian(problem.start[None]).square().sum(2).max())


def measure(settings: Settings) -> Result:
    problem = PROBLEMS[settings["problem"]]
    rho, kappa = settings["rho"], settings["kappa"]
    eta = eta_max(problem) * settings.get("eta_share", 1.0)
    generator = torch.Generator().manual_seed(0)
    theta = problem.start.repeat(REPLICAS, 1)
    # the smallest noise breaks the symmetry of starting at a minimum, where SAM has no direction to climb
    theta = theta + 1e-6 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
    usual = 0.0
    for _ in range(200):
        theta = step(problem, settings["method"], theta, eta, rho, 0.0, generator)
        usual = max(usual, float(problem.residuals(theta).abs().max()))
    start = to_minimum(problem, theta)
    before = problem.trace(start)
    if settings["part"] == "limit":
        return {"stable": _stable(problem, settings, theta, eta, usual, float(before.mean()), generator)}
    curve = []
    for number in range(settings["steps"]):
        if number % max(1, settings["steps"] // 20) == 0:
            curve.append(float(problem.trace(to_minimum(problem, theta)).mean()))
        theta = step(problem, settings["method"], theta, eta, rho, kappa, generator)
    after = problem.trace(to_minimum(problem, theta))
    share = 1.0 if settings["method"] == "SAM" else 1 / theta.shape[1]
    time = (1 + kappa) * eta * rho**2 * share * settings["steps"]
    falls = (before - after).reshape(BLOCKS, -1).mean(1)
    return {
        "eta": float(f"{eta:.5g}"),
        "falls": [float(f"{fall:.5g}") for fall in falls],
        "predicted": float(f"{float((before - flow(problem, start, time)).mean()):.5g}"),
        "predicted_eta_eff": float(f"{time / settings['steps']:.5g}"),
        "curve": [float(f"{value:.5g}") for value in curve],
    }


def _stable(
    problem: Problem,
    settings: Settings,
    theta: Tensor,
    eta: float,
    usual: float,
    before: float,
    generator: torch.Generator,
) -> bool:
    for _ in range(settings["steps"]):
        theta = step(problem, settings["method"], theta, eta, settings["rho"], settings["kappa"], generator)
        if not float(problem.residuals(theta).abs().max()) <= 5 * usual:
            return False
    return float(problem.trace(to_minimum(problem, theta)).mean()) <= before


def _grid(number: int) -> float:
    return float(f"{2 ** (number / 2):.4g}")


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    planned: list[dict[str, Any]] = []
    for problem in PROBLEMS:
        for method in METHODS:
            here = {"problem": problem, "method": method}
            for kappa in KAPPAS:
                steps = max(20, round(STEPS[size] / (1 + kappa)))
                planned.append({**here, "part": "ratio", "rho": RHO, "kappa": kappa, "steps": steps})
            for share in ETAS:
                rho = 0.4 * math.sqrt(share)
                scaled = {"eta_share": share, "rho": rho} if method == "average SAM" else {"rho": rho / 4}
                planned += [
                    {**here, "part": "scaling", **scaled, "kappa": kappa, "steps": round(STEPS[size] / 10)}
                    for kappa in (0.0, 1 / scaled["rho"])
                ]
            for rho in RHOS[: 1 if size == "tiny" else None]:
                limit = {**here, "part": "limit", "rho": rho, "steps": 20 if size == "tiny" else 300}
                tried, number = True, 0
                while tried and number < 60:  # one kappa after the other, until one is not stable
                    options = [{**limit, "kappa": _grid(each)} for each in range(number, number + 6)]
                    planned += options
                    tried = all(one in runs and runs[one]["stable"] for one in options)
                    number += 6
    return planned


def kappa_max(runs: Runs, problem: str, method: str, rho: float) -> float:
    """The largest kappa of the grid before the first that is not stable; 0: none."""
    found = runs.where(problem=problem, method=method, part="limit", rho=rho)
    stable, best = {settings["kappa"]: result["stable"] for settings, result in found}, 0.0
    for kappa in sorted(stable):
        if not stable[kappa]:
            break
        best = kappa
    return best


def slope(points: list[tuple[float, float]]) -> float:
    """Of log y against log x."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True)) / sum((a - mean(x)) ** 2 for a in x)


def limits(runs: Runs, problem: str, method: str) -> list[tuple[float, float]]:
    return [(rho, max(kappa_max(runs, problem, method, rho), 1e-9)) for rho in RHOS]


def ratio(runs: Runs, problem: str, method: str, kappa: float) -> Difference:
    """Fall of Tr H per step with IRE over that without; by blocks of replicas; in theory 1 + kappa."""
    found = {s["kappa"]: (s, r) for s, r in runs.where(problem=problem, method=method, part="ratio")}
    (with_ire, treated), (without, base) = found[kappa], found[0.0]
    factor = without["steps"] / with_ire["steps"]
    usual = mean(base["falls"])
    return interval([factor * fall / usual for fall in treated["falls"]])


def _scaled(runs: Runs, problem: str, method: str, boosted: bool) -> list[tuple[float, float]]:
    """(eta or rho, measured eta_eff): the predicted one times measured over predicted fall."""
    variable = "eta_share" if method == "average SAM" else "rho"
    return sorted(
        (s[variable], r["predicted_eta_eff"] * mean(r["falls"]) / r["predicted"])
        for s, r in runs.where(problem=problem, method=method, part="scaling")
        if (s["kappa"] > 0) == boosted
    )


def verdict(runs: Runs) -> Verdict:
    found = {
        (problem, method, kappa): ratio(runs, problem, method, kappa).mean / (1 + kappa)
        for problem in PROBLEMS
        for method in METHODS
        for kappa in KAPPAS[1:]
    }
    slopes = [slope(limits(runs, problem, method)) for problem in PROBLEMS for method in METHODS]
    inverse = all(
        kappa * rho >= 1 for problem in PROBLEMS for method in METHODS for rho, kappa in limits(runs, problem, method)
    )
    close = sum(0.9 <= one <= 1.1 for one in found.values())
    good = close == len(found)
    return Verdict(
        "reproduced" if good and inverse else "partly reproduced" if close > len(found) // 2 else "not reproduced",
        f"With exact projections the drift with IRE over that without is {min(found.values()):.2f} to "
        f"{max(found.values()):.2f} times 1 + kappa (kappa 1 to 30, {len(found)} cases); kappa = 1 / rho is "
        f"{'always' if inverse else 'not always'} stable.",
        f"Drift with IRE over drift without is {min(found.values()):.2f} to {max(found.values()):.2f} times 1 + kappa "
        f"(kappa 1 to 30, rho {RHO}; within 10 % in {close} of {len(found)} cases). kappa = 1 / rho is "
        f"{'stable in all cases' if inverse else 'not always stable'}; the largest stable kappa grows like rho to the "
        f"power {min(slopes):.1f} to {max(slopes):.1f}.",
    )


def tables(runs: Runs) -> str:
    rows = []
    for problem in PROBLEMS:
        for method in METHODS:
            base = next(r for s, r in runs.where(problem=problem, method=method, part="ratio", kappa=0.0))
            own = interval([fall / base["predicted"] for fall in base["falls"]])
            cells = [ratio(runs, problem, method, kappa) for kappa in KAPPAS[1:]]
            rows.append(
                [
                    f"{problem}, {method}",
                    f"{own.mean:.2f} ± {own.half:.2f}",
                    *(f"{one.mean:.2f} ± {one.half:.2f}" for one in cells),
                ]
            )
    head = ["drift at rho 0.05", "kappa 0: measured / predicted"]
    drifts = table([*head, *(f"kappa {kappa:g}: ratio, theory {1 + kappa:g}" for kappa in KAPPAS[1:])], rows)
    rows = []
    for problem in PROBLEMS:
        for method in METHODS:
            points = limits(runs, problem, method)
            rows.append([f"{problem}, {method}", *(f"{kappa:.3g}" for _, kappa in points), f"{slope(points):.2f}"])
    largest = table(["largest stable kappa", *(f"rho {rho:g} (1 / rho = {1 / rho:g})" for rho in RHOS), "slope"], rows)
    rows = []
    for method, power, boosted, unit in (("average SAM", "2", "1.5", "eta"), ("SAM", "2", "1", "rho")):
        for problem in PROBLEMS:
            ours = [f"{slope(_scaled(runs, problem, method, one)):.2f}" for one in (False, True)]
            paper = ("eta^2 / p", "eta^1.5 / p") if method == "average SAM" else ("eta rho^2", "eta rho")
            rows.append(
                [f"{method}, {problem}", *paper, f"{unit}^{ours[0]} ({power})", f"{unit}^{ours[1]} ({boosted})"]
            )
    head = ["Table 7: effective learning rate", "paper, without IRE", "paper, kappa = 1 / rho"]
    return "\n\n".join([drifts, largest, table([*head, "ours, without (theory)", "ours, with IRE (theory)"], rows)])


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for number, problem in enumerate(PROBLEMS):
        for method, style in zip(METHODS, ("o-", "s--"), strict=True):
            label = f"{problem}, {method}"
            ratios = [(kappa, ratio(runs, problem, method, kappa)) for kappa in KAPPAS[1:]]
            shift = 1 + 0.03 * (number - 1) + (0.015 if style == "o-" else -0.015)
            axes[0].errorbar(
                [shift * (1 + kappa) for kappa, _ in ratios],
                [one.mean / (1 + kappa) for kappa, one in ratios],
                yerr=[one.half / (1 + kappa) for kappa, one in ratios],
                fmt=style[0],
                color=f"C{number}",
                label=label,
                capsize=3,
            )
            axes[1].plot(*zip(*limits(runs, problem, method), strict=True), style, color=f"C{number}", label=label)
    axes[0].axhline(1, color="black", linewidth=0.8, label="theory")
    axes[0].set(xscale="log", xlabel="1 + kappa", ylabel="drift with IRE / without / (1 + kappa)", ylim=(0.8, 1.1))
    axes[0].set_xticks([1 + kappa for kappa in KAPPAS[1:]], [f"{1 + kappa:g}" for kappa in KAPPAS[1:]])
    axes[0].minorticks_off()
    axes[1].plot(RHOS, [1 / rho for rho in RHOS], color="black", linewidth=0.8, label="1 / rho")
    axes[1].set(xscale="log", yscale="log", xlabel="rho", ylabel="largest stable kappa", ylim=(1, 1e6))
    axes[1].set_xticks(RHOS, [f"{rho:g}" for rho in RHOS])
    axes[1].minorticks_off()
    for kappa in (0.0, 1.0, 10.0):
        settings, result = runs.where(problem="diagonal network", method="SAM", part="ratio", kappa=kappa)[0]
        every = max(1, settings["steps"] // 20)
        axes[2].plot([every * i for i in range(len(result["curve"]))], result["curve"], label=f"SAM, kappa {kappa:g}")
    axes[2].set(xlabel="step", ylabel="Tr H at the next minimum", title="diagonal network")
    axes[0].legend(fontsize=8, ncols=2, loc="lower left")
    axes[1].legend(handles=[axes[1].get_lines()[-1]], fontsize=8)  # the colours are those of the first picture
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(FIGURES / "drift.png", dpi=100)
    plt.close(figure)
