"""The estimates and perturbations there are, as users are told: the README's table, whose costs are counted."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from lightning_ire import (
    GSAM,
    LESAM,
    SAM,
    AdversarialModelPerturbation,
    AverageSAM,
    Curvature,
    EmpiricalFisher,
    FriendlySAM,
    FunctionalSAM,
    HutchinsonHessian,
    LookSAM,
    MomentumSAM,
    Perturbation,
    RandomMask,
    Rounding,
    SampledFisher,
    SecondMoment,
    StableSAM,
    WeightedSAM,
)


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        make: Makes the estimate or perturbation; `repr` of it is what to write.
        formula: What it is.
        forwards: Samples that go forward more than in plain training, per sample of the batch: for each estimate, or
            each perturbed step.
        backwards: The same for backward passes.
        source: Where it is from.
        use: When to use it.
        vectorized: Whether torch.func takes all samples at once, so that the step is called for a batch of one.
    """

    make: Callable[[], Curvature | Perturbation]
    formula: str
    forwards: Fraction
    backwards: Fraction
    source: str
    use: str
    vectorized: bool = False


def passes(forwards: str, backwards: str) -> tuple[Fraction, Fraction]:
    return Fraction(forwards), Fraction(backwards)


METHODS: list[Method] = [
    Method(
        lambda: SampledFisher(),
        "(∂/∂θ Σᵢ √wᵢ ℓ(fᵢ, ŷᵢ))², ŷᵢ drawn from the model; B·G∘G for a mean over B",
        *passes("0", "1"),
        "eq. 6; Liu et al., [2305.14342](https://arxiv.org/abs/2305.14342)",
        "the default: the paper's",
    ),
    Method(
        lambda: SampledFisher(fraction=0.25),
        "the same on the first quarter of the batch",
        *passes("1/4", "1/4"),
        "-",
        "large batches",
    ),
    Method(
        lambda: SampledFisher(form="micro_batch", micro_batch_size=2),
        "mean over micro-batches of their squares, relative deviation √(2/k) instead of √2",
        *passes("1", "1"),
        "derived here",
        "noisy masks (`ire/mask_iou` near its chance level); without `micro_batch_size` under gradient accumulation: "
        "no forward pass",
    ),
    Method(
        lambda: SampledFisher(form="sample"),
        "mean over samples of their squares, relative deviation √(2/n)",
        *passes("1", "1"),
        "derived here; `torch.func`",
        "the least noise for one pass; memory for many gradients",
        vectorized=True,
    ),
    Method(
        lambda: EmpiricalFisher(),
        "g∘g, g the training gradient",
        *passes("0", "0"),
        "Kunstner et al., [1905.12558](https://arxiv.org/abs/1905.12558), on its limits",
        "any loss at all; no pass to spare",
    ),
    Method(
        lambda: HutchinsonHessian(),
        "v∘Hv, v random signs",
        *passes("0", "3"),
        "Bekas et al. 2007; Yao et al., [2006.00719](https://arxiv.org/abs/2006.00719)",
        "losses without a likelihood; the Hessian itself, negative curvature counts as sharp",
    ),
    Method(
        lambda: SecondMoment(),
        "v̂ of Adam, AdamW, RMSprop, Adagrad, ...",
        *passes("0", "0"),
        "Kingma & Ba, [1412.6980](https://arxiv.org/abs/1412.6980)",
        "no pass to spare and smoother than `EmpiricalFisher`; not the paper's curvature",
    ),
    Method(
        lambda: RandomMask(),
        "U(0, 1)",
        *passes("0", "0"),
        "a control",
        "to see whether flatness is the reason for a gain",
    ),
    Method(
        lambda: SAM(rho=0.05),
        "∇L(θ + ρ g/‖g‖)",
        *passes("1", "1"),
        "eq. 7; Foret et al., [2010.01412](https://arxiv.org/abs/2010.01412)",
        "the usual one; `interval=k` at every k-th step only, `parameters=[...]` some weights only, `sam_rho` in an "
        "optimizer's parameter group for a radius of its own",
    ),
    Method(
        lambda: SAM(rho=0.5, adaptive=True),
        "∇L(θ + ρ T²g/‖Tg‖), T = \\|θ\\|",
        *passes("1", "1"),
        "ASAM: Kwon et al., [2102.11600](https://arxiv.org/abs/2102.11600)",
        "weights of very different sizes; the authors' script is `adaptive='weights', eta=0.01`: T = \\|θ\\| + η for "
        "names with weight, 1 for the rest",
    ),
    Method(
        lambda: SAM(rho=0.05, parameters="norm"),
        "SAM on the weights of normalization layers",
        *passes("1", "1"),
        "SAM-ON: Mueller et al., [2306.04226](https://arxiv.org/abs/2306.04226)",
        "networks with normalization layers",
    ),
    Method(
        lambda: AverageSAM(rho=0.05),
        "∇L(θ + ρ ξ/‖ξ‖), ξ ~ N(0, I)",
        *passes("0", "0"),
        "eq. 8",
        "no second pass to spare",
    ),
    Method(
        lambda: Rounding(bits=8),
        "∇L(Q(θ)), Q rounds matrices to b bits",
        *passes("0", "0"),
        "straight-through: Courbariaux et al., [1511.00363](https://arxiv.org/abs/1511.00363)",
        "weights that will be quantized",
    ),
    Method(
        lambda: AdversarialModelPerturbation(epsilon=0.5, zeta=1.0),
        "∇L(θ + δ), δ ← δ + ζ∇L(θ + δ), ‖δ‖ ≤ ε per tensor",
        *passes("1", "1"),
        "Zheng et al., [2010.04925](https://arxiv.org/abs/2010.04925)",
        "several ascents (`ascents=N`: N passes); with `scope='global'` SAM of radius ε where ζ‖g‖ ≥ ε",
    ),
    Method(
        lambda: SAM(rho=0.05, start_step=0.9),
        "SAM in the last tenth of the run",
        *passes("1/10", "1/10"),
        "Zhou et al., [2410.10373](https://arxiv.org/abs/2410.10373)",
        "most of SAM's gain for a tenth of its price, says the paper; every perturbation takes `start_*` and `stop_*`",
    ),
    Method(
        lambda: SAM(rho=0.05, fraction=0.25),
        "g of the first quarter of each batch, ∇L(θ + ρ g/‖g‖) of all of it",
        *passes("1/4", "1/4"),
        "common practice",
        "large batches; what `training_step` logs is that of the quarter",
    ),
    Method(
        lambda: SAM(rho=0.05, coordinates="sharp"),
        "SAM on the coordinates that IRE's mask does not call flat",
        *passes("1", "1"),
        "after sparse SAM: Mi et al., [2210.05177](https://arxiv.org/abs/2210.05177)",
        "IRE and SAM each on coordinates of its own; needs `kappa` > 0",
    ),
    Method(
        lambda: FriendlySAM(rho=0.05),
        "d = g - σm, m ← λm + (1 - λ)g; ∇L(θ + ρ d/‖d‖)",
        *passes("1", "1"),
        "Li et al., [2403.12350](https://arxiv.org/abs/2403.12350)",
        "noisy batches; σ = 1, λ = 0.9 as in the authors' code",
    ),
    Method(
        lambda: GSAM(rho=0.05),
        "g_p - α g⊥, g⊥ the part of g orthogonal to g_p = ∇L(θ + ρ g/‖g‖)",
        *passes("1", "1"),
        "Zhuang et al., [2203.08065](https://arxiv.org/abs/2203.08065)",
        "vision transformers, with `rho_schedule='lr'` as in the paper",
    ),
    Method(
        lambda: WeightedSAM(rho=0.05),
        "a step with g, then θ ← θ - lr·a (g_p - g), a = γ/(1 - γ)",
        *passes("1", "1"),
        "WSAM: Yue et al., [2305.15817](https://arxiv.org/abs/2305.15817)",
        "adaptive optimizers, whose moments see g only; γ = 0.9 as in the authors' code; `decouple=False`: a step with "
        "(1 - a)g + a g_p",
    ),
    Method(
        lambda: StableSAM(rho=0.05),
        "g_p ‖g‖/‖g_p‖",
        *passes("1", "1"),
        "Tan et al., [2401.07250](https://arxiv.org/abs/2401.07250)",
        "learning rates at which SAM is unstable; SAM's radii",
    ),
    Method(
        lambda: LookSAM(rho=0.05),
        "every k-th step SAM, g_v = the part of g_p orthogonal to g; between: g + α‖g‖/‖g_v‖ g_v",
        *passes("1/5", "1/5"),
        "Liu et al., [2203.02714](https://arxiv.org/abs/2203.02714)",
        "large batches; k = 5, α = 0.7",
    ),
    Method(
        lambda: LESAM(rho_max=0.05),
        "SAM with ρ = min(σ/‖g‖, ρ_max)",
        *passes("1", "1"),
        "[2605.10183](https://arxiv.org/abs/2605.10183)",
        "gradients that change much in size; σ in units of the loss",
    ),
    Method(
        lambda: FunctionalSAM(rho=0.05),
        "J(θ + ρ g/‖g‖)ᵀ ∂L/∂F(θ), F the outputs that the loss is called with",
        *passes("1", "1"),
        "Singh et al., [2502.02407](https://arxiv.org/abs/2502.02407)",
        "language models, where SAM does harm",
    ),
    Method(
        lambda: MomentumSAM(rho=0.05),
        "∇L(θ - ρ v/‖v‖), v the optimizer's momentum",
        *passes("0", "0"),
        "MSAM: Becker et al., [2401.12033](https://arxiv.org/abs/2401.12033)",
        "no second pass to spare; try larger radii than SAM's",
    ),
]


def methods_table() -> str:
    """The README's table."""
    lines = [f"| `{m.make()!r}` | {m.formula} | {cost(m)} | {m.source} | {m.use} |" for m in METHODS]
    head = ["| `curvature=`, `perturbation=` | formula | cost | source | when |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *lines])


def cost(method: Method) -> str:
    """The passes in words."""
    parts = [
        f"{count} {name}" for count, name in ((method.forwards, "forward"), (method.backwards, "backward")) if count
    ]
    return ", ".join(parts) or "no pass"
