"""The estimates and perturbations there are, as users are told: the README's table, whose costs are counted."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from lightning_ire import (
    SAM,
    AdversarialModelPerturbation,
    AverageSAM,
    Curvature,
    EmpiricalFisher,
    HutchinsonHessian,
    Perturbation,
    RandomMask,
    SampledFisher,
    SecondMoment,
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
        lambda: AdversarialModelPerturbation(epsilon=0.5, zeta=1.0),
        "∇L(θ + δ), δ ← δ + ζ∇L(θ + δ), ‖δ‖ ≤ ε per tensor",
        *passes("1", "1"),
        "Zheng et al., [2010.04925](https://arxiv.org/abs/2010.04925)",
        "several ascents (`ascents=N`: N passes); with `scope='global'` SAM of radius ε where ζ‖g‖ ≥ ε",
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
