"""Every number of the SharpnessMonitor against a dense Hessian or Fisher of the same loss, and what the loggers get."""

from collections.abc import Callable
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Rows
from modules import Classifier, Exact, Net, sgd
from torch import Tensor, nn

from lightning_ire import (
    GSAM,
    IRE,
    LESAM,
    SAM,
    ConfigurationError,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    SharpnessMonitor,
    StableSAM,
    WeightedSAM,
    tags,
)
from lightning_ire.sharpness.quantities import KINDS, QUANTITIES

SAMPLES, BATCH = 24, 8
EXACT = {"relative_error": 0.0, "tolerance": 1e-10, "max_iterations": 300}


def trained(module: pl.LightningModule, monitor: SharpnessMonitor, *others: pl.Callback, **kwargs: Any) -> pl.Trainer:
    train = cases.loader(cases.data(SAMPLES, torch.float64), BATCH)
    return cases.fit(module, [*others, monitor], train, max_epochs=1, **kwargs)


def probe_batches(monitor: SharpnessMonitor) -> list[Any]:
    assert monitor._probe is not None
    return monitor._probe._batches


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def loss_at(module: Classifier, weights: Tensor, batches: list[Any]) -> Tensor:
    """The mean loss over batches as a function of one vector of all weights."""
    names = [name for name, _ in module.named_parameters()]
    pieces = weights.split([p.numel() for p in module.parameters()])
    values = {
        name.removeprefix("net."): piece.view(p.shape)
        for name, piece, p in zip(names, pieces, module.parameters(), strict=True)
    }
    losses = [F.cross_entropy(torch.func.functional_call(module.net, values, (x,)), y) for x, y in batches]
    return torch.stack(losses).mean()


def dense_hessian(module: Classifier, batches: list[Any]) -> Tensor:
    return torch.autograd.functional.hessian(lambda w: loss_at(module, w, batches), flat(module))


def dense_fisher(module: Classifier, batches: list[Any]) -> Tensor:
    """Sum over all labels, weighted by the model's probabilities, of the outer products of single gradients."""
    total = torch.zeros(flat(module).numel(), flat(module).numel(), dtype=torch.float64)
    count = 0
    parameters = list(module.parameters())
    for x, _ in batches:
        for sample in x:
            scores = module.net(sample[None]).log_softmax(-1)[0]
            for label in range(CLASSES):
                gradient = torch.autograd.grad(scores[label], parameters, retain_graph=True)
                vector = torch.cat([g.reshape(-1) for g in gradient])
                total += scores[label].exp().detach() * torch.outer(vector, vector)
            count += 1
    return total / count


def block_traces(module: nn.Module, hessian: Tensor) -> dict[str, float]:
    diagonal = hessian.diagonal().split([p.numel() for p in module.parameters()])
    return {name: float(part.sum()) for (name, _), part in zip(module.named_parameters(), diagonal, strict=True)}


@pytest.mark.parametrize("num_batches", cases.first_at_once([2, 1]))
@pytest.mark.parametrize("hvp", cases.first_at_once(["exact", "finite_difference"]))
def test_the_hessian_is_that_of_the_probe(num_batches: int, hvp: str) -> None:
    module = Exact()
    monitor = SharpnessMonitor(
        quantities=["trace_hessian", "trace_normalized", "layer_traces", "lambda_max", "lambda_min", "ascent_gap"],
        num_batches=num_batches, hvp=hvp, num_eigenvalues=3, max_vectors=200, rho=0.3, **EXACT,
    )  # fmt: skip
    trained(module, monitor)
    batches = probe_batches(monitor)
    assert len(batches) == num_batches
    hessian = dense_hessian(module, batches)
    values, found = monitor.last.values, monitor.last
    accuracy = {"rel": 1e-8} if hvp == "exact" else {"rel": 1e-5}
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert values[tags.LAMBDA_MAX] == pytest.approx(float(eigenvalues[-1]), **accuracy)
    assert values["sharpness/lambda_2"] == pytest.approx(float(eigenvalues[-2]), **accuracy)
    assert values["sharpness/lambda_3"] == pytest.approx(float(eigenvalues[-3]), **accuracy)
    assert values[tags.LAMBDA_MIN] == pytest.approx(float(eigenvalues[0]), **accuracy)
    assert values[tags.LAMBDA_MAX + tags.RESIDUAL] < 1e-6
    if hvp == "exact":
        assert values[tags.LAMBDA_MAX + tags.CONVERGED] == values[tags.LAMBDA_MIN + tags.CONVERGED] == 1.0
    # the traces are estimates: within three standard errors, smaller than without the subspace of the eigenvalues
    error = values[tags.TRACE_HESSIAN + tags.STDERR]
    off_diagonal = hessian - hessian.diag().diag()
    assert error < 0.8 * (2 * float(off_diagonal.square().sum()) / 200) ** 0.5
    assert abs(values[tags.TRACE_HESSIAN] - float(hessian.trace())) < 3 * error
    blocks = block_traces(module, hessian)
    assert found.layer_traces.keys() == blocks.keys()
    assert sum(found.layer_traces.values()) == pytest.approx(values[tags.TRACE_HESSIAN])
    for name, truth in blocks.items():
        assert found.layer_traces[name] == pytest.approx(truth, abs=0.15 * float(hessian.trace()))
    normalized = sum(float(p.detach().square().sum()) * blocks[name] for name, p in module.named_parameters())
    error = values[tags.TRACE_NORMALIZED + tags.STDERR]
    assert abs(values[tags.TRACE_NORMALIZED] - normalized) < 3 * error < 0.5 * normalized
    # the ascent gap has no chance in it
    weights = flat(module).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(module, weights, batches), weights)
    moved = weights + 0.3 * gradient / gradient.norm()
    gap = loss_at(module, moved, batches) - loss_at(module, weights, batches)
    assert values[tags.ASCENT_GAP] == pytest.approx(float(gap), rel=1e-9)


def test_a_trace_alone_is_hutchinsons() -> None:
    module = Exact()
    monitor = SharpnessMonitor(quantities=["trace_hessian", "layer_traces"], relative_error=0.0, max_vectors=800)
    trained(module, monitor)
    hessian = dense_hessian(module, probe_batches(monitor))
    value, error = (monitor.last.values[tags.TRACE_HESSIAN + suffix] for suffix in ("", tags.STDERR))
    off_diagonal = hessian - hessian.diag().diag()
    assert error == pytest.approx((2 * float(off_diagonal.square().sum()) / 800) ** 0.5, rel=0.1)
    assert abs(value - float(hessian.trace())) < 3 * error
    for name, truth in block_traces(module, hessian).items():
        assert monitor.last.layer_traces[name] == pytest.approx(truth, abs=0.05 * value)


@pytest.mark.parametrize("quantity", cases.first_at_once(["trace_fisher", "trace_hessian"]))
def test_traces_converge_with_the_square_root_of_the_draws(quantity: str) -> None:
    """Over many seeds: no bias, an error that halves with four times the draws, and an honest standard error."""
    module, errors = Exact(), {}
    monitor = SharpnessMonitor(quantities=[quantity])
    trainer = trained(module, monitor)
    batches = probe_batches(monitor)
    truth = float((dense_hessian if quantity == "trace_hessian" else dense_fisher)(module, batches).trace())
    tag = f"sharpness/{quantity}"
    for draws in (10, 40):
        runs = []
        for seed in range(60):
            again = SharpnessMonitor(quantities=[quantity], relative_error=0.0, max_vectors=draws, seed=seed)
            again._probe = monitor._probe
            values = again.measure(trainer, module).values
            runs.append((values[tag] - truth, values[tag + tags.STDERR]))
        off = torch.tensor(runs, dtype=torch.float64)
        errors[draws] = float(off[:, 0].square().mean().sqrt())
        assert abs(float(off[:, 0].mean())) < 3 * errors[draws] / 60**0.5
        assert float((off[:, 0].abs() < 2 * off[:, 1]).double().mean()) > 0.85
    assert 1.5 < errors[10] / errors[40] < 2.7


def test_draws_stop_at_the_relative_error() -> None:
    module = Exact()
    monitor = SharpnessMonitor(quantities=["trace_fisher", "trace_hessian"], relative_error=0.2, max_vectors=1000)
    trained(module, monitor)
    for tag in (tags.TRACE_FISHER, tags.TRACE_HESSIAN):
        assert 0.1 < monitor.last.values[tag + tags.STDERR] / monitor.last.values[tag] <= 0.2


def test_the_fisher_of_several_batches_is_the_mean_of_theirs() -> None:
    module = Exact()
    monitor = SharpnessMonitor(quantities=["trace_fisher"], num_batches=3, relative_error=0.0, max_vectors=150)
    trained(module, monitor)
    truth = float(dense_fisher(module, probe_batches(monitor)).trace())
    value, error = (monitor.last.values[tags.TRACE_FISHER + suffix] for suffix in ("", tags.STDERR))
    assert abs(value - truth) < 3 * error < 0.25 * truth


def test_the_spectral_density_has_the_moments_of_the_hessian() -> None:
    torch.manual_seed(0)  # Lanczos is slow to find an eigenvalue that has others beside it
    module = Exact()
    monitor = SharpnessMonitor(quantities=["spectral_density"])
    trained(module, monitor)
    hessian = dense_hessian(module, probe_batches(monitor))
    density, size = monitor.last.density, hessian.size(0)
    assert float(density.weights.sum()) == pytest.approx(1)
    assert abs(density.mean - float(hessian.trace()) / size) < 4 * density.stderr
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert float(density.nodes.max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert float(density.nodes.min()) == pytest.approx(float(eigenvalues[0]), rel=1e-2)
    bulk = float(density.weights[density.nodes.abs() < 0.05].sum())
    assert bulk == pytest.approx(float((eigenvalues.abs() < 0.05).double().mean()), abs=0.15)


# Stability


def effective(module: Classifier, batches: list[Any], sizes: Tensor, ascent: float, scale: Tensor, decay: float) -> Any:
    hessian = dense_hessian(module, batches)
    middle = hessian + ascent * hessian @ torch.diag(scale.square()) @ hessian + decay * torch.eye(len(sizes))
    root = torch.diag(sizes.sqrt())
    return root @ middle @ root


def sized(module: Classifier, make: Callable[[nn.Parameter], Tensor]) -> Tensor:
    return torch.cat([torch.as_tensor(make(p)).broadcast_to(p.shape).reshape(-1) for p in module.parameters()])


SGDS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 2.0),
    "momentum": ({"momentum": 0.9}, 3.8),
    "dampening": ({"momentum": 0.9, "dampening": 0.5}, 7.6),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    "decay": ({"momentum": 0.5, "weight_decay": 0.1}, 3.0),
}


@pytest.mark.parametrize("name", SGDS)
def test_ratio_and_edge_of_sgd(name: str) -> None:
    settings, limit = SGDS[name]
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3, **settings))
    monitor = SharpnessMonitor(quantities=["stability", "lambda_max"], **EXACT)
    trained(module, monitor)
    top = monitor.last.values[tags.LAMBDA_MAX]
    decay = settings.get("weight_decay", 0.0)
    assert monitor.last.values[tags.RATIO] == pytest.approx(0.3 * (top + decay) / limit, rel=1e-8)
    assert monitor.last.values[tags.EDGE] == pytest.approx(limit / 0.3 - decay, rel=1e-12)
    assert monitor.last.values[tags.RATIO + tags.CONVERGED] == 1.0


@pytest.mark.parametrize("adaptive", [False, True, "weights"])
@pytest.mark.parametrize("kappa", [0.0, 4.0])
def test_ratio_of_sam_and_ire(adaptive: bool | str, kappa: float) -> None:
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9))
    ire = IRE(kappa, gamma=0.6, interval=2, perturbation=SAM(0.2, adaptive=adaptive, eta=0.1 if adaptive else 0.0))
    monitor = SharpnessMonitor(quantities=["stability"], **EXACT)
    logger = Rows()
    trained(module, monitor, ire, logger=logger)
    batches = probe_batches(monitor)
    masks = {id(p): 0.0 for p in module.parameters()}
    if kappa:
        masks = {id(p): ire._progress.masks.masks[name] for name, p in module.named_parameters()}
    sizes = sized(module, lambda p: torch.as_tensor(0.3 * (1 + kappa * masks[id(p)])).double())
    adapting = {id(p) for name, p in module.named_parameters() if adaptive is True or (adaptive and "weight" in name)}
    scale = sized(module, lambda p: p.detach().abs() + 0.1 if id(p) in adapting else torch.ones_like(p))
    norm = [row[tags.GRAD_NORM] for _, row in logger.rows if tags.GRAD_NORM in row][-1]
    assert ire.ascent_norm == pytest.approx(norm)
    matrix = effective(module, batches, sizes, 0.2 / norm, scale, 0.0)
    truth = float(torch.linalg.eigvalsh(matrix)[-1]) / 3.8
    assert monitor.last.values[tags.RATIO] == pytest.approx(truth, rel=1e-6)
    assert (tags.EDGE in monitor.last.values) == (not adaptive and not kappa)
    if tags.EDGE in monitor.last.values:
        edge = monitor.last.values[tags.EDGE]
        assert 0.3 * (edge + 0.2 / norm * edge**2) == pytest.approx(3.8, rel=1e-6)


def test_the_boost_of_a_step_follows_the_schedule_of_kappa_and_the_start() -> None:
    def falling(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.25)

    module = Exact(optimizer=sgd)
    module.make_scheduler = falling
    ire = IRE(4.0, gamma=0.5, kappa_schedule="lr", exclude="net.0.bias", interval=1)
    trainer = trained(module, SharpnessMonitor(None, None), ire)
    factors = ire.boost_factors(module, trainer.optimizers[0])
    masks = ire._progress.masks.masks
    assert {id(p) for name, p in module.named_parameters() if name != "net.0.bias"} == factors.keys()
    for name, parameter in module.named_parameters():
        if name != "net.0.bias":
            assert torch.equal(factors[id(parameter)], torch.where(masks[name], 2.0, 1.0).double())
    ire._progress.started_at = None  # as before the start
    assert ire.boost_factors(module, trainer.optimizers[0]) == {}


def test_ascent_before_the_first_step_uses_the_gradient_of_the_probe() -> None:
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3))
    ire = IRE(0.0, perturbation=SAM(0.2))
    monitor = SharpnessMonitor(quantities=["stability"], **EXACT)
    trainer = trained(module, monitor, ire)
    ire._progress.ascent_norm = None
    value = monitor.measure(trainer, module).values[tags.RATIO]
    batches = probe_batches(monitor)
    weights = flat(module).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(module, weights, batches), weights)
    ones = torch.ones_like(gradient)
    matrix = effective(module, batches, 0.3 * ones, 0.2 / float(gradient.norm()), ones, 0.0)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]) / 2, rel=1e-8)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.5)


@pytest.mark.parametrize(
    ("perturbation", "radius"),
    [
        (SAM(0.2), 0.2),
        (SAM(0.2, start_step=0, stop_step=10_000), 0.2),
        (SAM(0.2, start_step=2), 0.2),
        (SAM(0.2, stop_step=2), 0.0),
        (SAM(0.2, rho_schedule="lr"), 0.1),
        (LESAM(0.2, sigma=1e-3), None),
    ],
)
def test_the_ascent_is_that_of_the_next_step(perturbation: SAM, radius: float | None) -> None:
    """Between start and stop, as long as the schedule has it now."""
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3))
    module.make_scheduler = halving
    ire = IRE(0.0, perturbation=perturbation)
    monitor = SharpnessMonitor(quantities=["stability"], **EXACT)
    trained(module, monitor, ire)
    norm = ire.ascent_norm or 1.0
    rho = 1e-3 / norm if radius is None else radius
    sizes = torch.full_like(flat(module), 0.15)
    matrix = effective(module, probe_batches(monitor), sizes, rho / norm, torch.ones_like(sizes), 0.0)
    truth = float(torch.linalg.eigvalsh(matrix)[-1]) / 2
    assert monitor.last.values[tags.RATIO] == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_ratio_of_adam(kind: type, amsgrad: bool) -> None:
    module = Exact(
        optimizer=lambda net: kind(net.parameters(), lr=0.01, betas=(0.8, 0.99), weight_decay=0.1, amsgrad=amsgrad)
    )
    ire = IRE(2.0, gamma=0.5, interval=1)
    monitor = SharpnessMonitor(quantities=["stability"], **EXACT)
    trainer = trained(module, monitor, ire)
    state = trainer.optimizers[0].state

    def size(p: nn.Parameter) -> Tensor:
        moment = state[p]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        p_t = (moment / (1 - 0.99 ** float(state[p]["step"]))).sqrt() + 1e-8
        name = next(name for name, q in module.named_parameters() if q is p)
        return 0.01 * (1 + 2.0 * ire._progress.masks.masks[name]) / p_t

    sizes = sized(module, size)
    decay = 0.1 if kind is torch.optim.Adam else 0.0
    matrix = effective(module, probe_batches(monitor), sizes, 0.0, sizes, decay)
    truth = float(torch.linalg.eigvalsh(matrix)[-1]) / (2 * 1.8 / 0.2)
    assert monitor.last.values[tags.RATIO] == pytest.approx(truth, rel=1e-6)
    assert tags.EDGE not in monitor.last.values


def test_groups_with_their_own_rates_and_decays_and_weights_outside_the_optimizer() -> None:
    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        first, second = list(net.parameters())[:2], list(net.parameters())[2:3]
        return torch.optim.SGD([{"params": first, "lr": 0.5, "weight_decay": 0.2}, {"params": second}], lr=0.1)

    module = Exact(optimizer=optimizer)
    monitor = SharpnessMonitor(quantities=["stability"], **EXACT)
    trained(module, monitor)
    rates = dict(zip(map(id, module.parameters()), [0.5, 0.5, 0.1, 0.0], strict=True))
    sizes = sized(module, lambda p: torch.tensor(rates[id(p)], dtype=torch.float64))
    decays = torch.diag(torch.where(sizes == 0.5, 0.2, 0.0))
    root = torch.diag(sizes.sqrt())
    matrix = root @ (dense_hessian(module, probe_batches(monitor)) + decays) @ root
    assert monitor.last.values[tags.RATIO] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]) / 2, rel=1e-8)
    assert tags.EDGE not in monitor.last.values


UNKNOWN: dict[str, tuple[Callable[..., Any], list[Any], str]] = {
    "optimizer": (lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01), [], "RMSprop"),
    "subclass": (lambda net: type("Mine", (torch.optim.SGD,), {})(net.parameters(), lr=0.1), [], "Mine"),
    "interval": (sgd, [IRE(0.0, perturbation=SAM(interval=2))], "every 2th step"),
    **{
        type(one).__name__: (sgd, [IRE(0.0, perturbation=one)], "is not a number times the gradient")
        for one in (FriendlySAM(), GSAM(), WeightedSAM(), StableSAM(), LookSAM(), FunctionalSAM(), MomentumSAM())
    },
    "maximize": (lambda net: torch.optim.SGD(net.parameters(), lr=0.1, maximize=True), [], "maximizes"),
    "momenta": (
        lambda net: torch.optim.SGD(
            [{"params": list(net.parameters())[:1], "momentum": 0.5}, {"params": list(net.parameters())[1:]}], lr=0.1
        ),
        [],
        "different momentum",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_stability_line_where_the_step_is_not_known(name: str) -> None:
    optimizer, callbacks, words = UNKNOWN[name]
    module = Exact(optimizer=optimizer)
    monitor = SharpnessMonitor(quantities=["stability", "trace_hessian"])
    with pytest.warns(UserWarning, match=words):
        trained(module, monitor, *callbacks)
    assert not {tags.EDGE, tags.RATIO} & monitor.last.values.keys()
    assert tags.TRACE_HESSIAN in monitor.last.values
    assert words in monitor.last.skipped["stability"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sgd_ratio_converges_to_its_definition(accumulate: int) -> None:
    """(eta / 2) mean ||H_B||_F^2 / mean Tr H_B over training batches, which two probe batches may make up."""
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5, dampening=0.2))
    monitor = SharpnessMonitor(quantities=["sgd_ratio"], num_batches=2, batch_size=6, max_vectors=1200)
    trained(module, monitor, accumulate_grad_batches=accumulate)
    batches = probe_batches(monitor)
    groups = [[batch] for batch in batches] if accumulate == 1 else [batches]
    hessians = [dense_hessian(module, group) for group in groups]
    norm = sum(float(h.square().sum()) for h in hessians) / sum(float(h.trace()) for h in hessians)
    truth = 0.3 * 0.8 / 0.5 / 2 * norm
    value, error = (monitor.last.values[tags.SGD_RATIO + suffix] for suffix in ("", tags.STDERR))
    assert abs(value - truth) < 3 * error < 0.25 * truth


def test_sgd_ratio_is_skipped_where_it_is_not_known() -> None:
    for callbacks, kwargs, words in (
        ([IRE(0.0, perturbation=SAM())], {}, "without SAM"),
        ([], {"accumulate_grad_batches": 3}, "raise `num_batches`"),
    ):
        monitor = SharpnessMonitor(quantities=["sgd_ratio"])
        with pytest.warns(UserWarning, match=words):
            trained(Exact(), monitor, *callbacks, **kwargs)
        assert monitor.last.values == {}


def test_stability_is_that_of_training_mode_and_the_rest_that_of_the_mode_asked_for() -> None:
    """With BatchNorm the two differ much; a measurement in one mode does not disturb those in the other."""
    module = Exact(Net(batch_norm=True), lambda net: torch.optim.SGD(net.parameters(), lr=0.3))
    quantities = ["trace_hessian", "lambda_max", "stability", "ascent_gap"]
    monitor = SharpnessMonitor(quantities=quantities, **EXACT)
    trainer = trained(module, monitor)
    batches = probe_batches(monitor)
    tops, gaps = {}, {}
    for mode in ("eval", "train"):
        module.train(mode == "train")
        state = {name: buffer.clone() for name, buffer in module.named_buffers()}
        tops[mode] = float(torch.linalg.eigvalsh(dense_hessian(module, batches))[-1])
        weights = flat(module).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(module, weights, batches), weights)
        moved = weights + 0.05 * gradient / gradient.norm()
        gaps[mode] = float(loss_at(module, moved, batches) - loss_at(module, weights, batches))
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
    assert abs(tops["eval"] / tops["train"] - 1) > 0.1
    for mode in ("eval", "train"):
        again = SharpnessMonitor(quantities=quantities, mode=mode, **EXACT)
        values = again.measure(trainer, module).values
        assert values[tags.LAMBDA_MAX] == pytest.approx(tops[mode], rel=1e-8)
        assert values[tags.ASCENT_GAP] == pytest.approx(gaps[mode], rel=1e-8)
        assert values[tags.RATIO] == pytest.approx(0.3 * tops["train"] / 2, rel=1e-8)


@pytest.mark.slow
def test_the_normalized_trace_does_not_change_with_the_scale_of_weights_before_a_norm() -> None:
    """Doubling a weight before BatchNorm divides the raw trace of its block by four."""
    net = Net(batch_norm=True)
    net[1].eps = 1e-12
    module = Exact(net)
    monitor = SharpnessMonitor(
        quantities=["trace_normalized", "layer_traces"], mode="train", relative_error=0.0, max_vectors=2000
    )
    trainer = trained(module, monitor)
    module.train()
    blocks, found = [], []
    for factor in (1, 2):
        with torch.no_grad():
            net[0].weight.mul_(factor)
        found.append(monitor.measure(trainer, module))
        blocks.append(block_traces(module, dense_hessian(module, probe_batches(monitor))))
    assert blocks[1]["net.0.weight"] == pytest.approx(blocks[0]["net.0.weight"] / 4, rel=1e-6)
    assert blocks[1]["net.3.weight"] == pytest.approx(blocks[0]["net.3.weight"], rel=1e-6)
    for truth, measurement in zip(blocks, found, strict=True):
        for name in ("net.0.weight", "net.3.weight"):
            assert measurement.layer_traces[name] == pytest.approx(truth[name], rel=0.2)
    before, after = (measurement.values[tags.TRACE_NORMALIZED] for measurement in found)
    errors = [measurement.values[tags.TRACE_NORMALIZED + tags.STDERR] for measurement in found]
    assert abs(after - before) < 3 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 < 0.2 * before


# Settings and words


def test_the_names_of_the_quantities_are_the_same_in_both_places() -> None:
    assert sorted(QUANTITIES) == sorted(quantity for kind in KINDS for quantity in kind.names)
    assert {tag.split("/")[1] for tag in tags.SHARPNESS_TAGS} < set(QUANTITIES)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"every_n_steps": 0}, "`every_n_steps` to be a whole number >= 1, got 0"),
    "epochs": ({"every_n_epochs": 1.5}, "`every_n_epochs`.*got 1.5"),
    "name": (
        {"quantities": ["sharpness"]},
        "`quantities` to be one of 'trace_fisher'.*got 'sharpness'",
    ),
    "string": ({"quantities": "lambda_max"}, "a list of names .*got 'lambda_max'"),
    "none": ({"quantities": []}, "a list of names"),
    "batches": ({"num_batches": 0}, "`num_batches`"),
    "size": ({"batch_size": 0}, "`batch_size`"),
    "mode": ({"mode": "test"}, "`mode` to be one of 'eval', 'train', got 'test'"),
    "hvp": ({"hvp": "fast"}, "`hvp` to be one of"),
    "error": ({"relative_error": -1.0}, "`relative_error`"),
    "vectors": ({"max_vectors": 1}, "`max_vectors`"),
    "tolerance": ({"tolerance": 0.0}, "`tolerance`"),
    "iterations": ({"max_iterations": 0}, "`max_iterations`"),
    "eigenvalues": ({"num_eigenvalues": 0}, "`num_eigenvalues`"),
    "rho": ({"rho": 0.0}, "`rho`"),
    "seed": ({"seed": -1}, "`seed`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(name: str) -> None:
    settings, words = WRONG[name]
    with pytest.raises(ConfigurationError, match=words) as error:
        SharpnessMonitor(**settings)
    assert "\n" not in str(error.value)
