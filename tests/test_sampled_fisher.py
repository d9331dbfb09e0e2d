"""How the callback gets the sampled-label gradient: shared forward pass, own pass, the module's `fisher_loss`."""

from collections.abc import Callable
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Classifier, Net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_directly
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_ire import IRE, SAM, AverageSAM, ConfigurationError, SampledFisher


class Recorded(SampledFisher):
    """Keeps every estimate h that it hands over."""

    def __init__(self, fraction: float = 1.0) -> None:
        super().__init__(fraction)
        self.estimates: list[list[Tensor]] = []

    def begin(self, window: Any) -> Any:
        estimate = super().begin(window)
        finish = estimate.finish

        def recorded() -> Any:
            values = finish()
            self.estimates.append(values)
            return values

        estimate.finish = recorded
        return estimate


class Custom(Classifier):
    """A classifier whose loss is any function of (logits, targets, module)."""

    def __init__(self, loss: Callable[[Tensor, Tensor, nn.Module], Tensor], net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        x, y = batch
        return self.loss(self.net(x), y, self)


def estimates(
    module: pl.LightningModule, train: DataLoader | None = None, fraction: float = 1.0, **kwargs: Any
) -> list[list[Tensor]]:
    """The estimates of a run in which the weights stay where they are."""
    curvature = Recorded(fraction)
    module.make_optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.0)
    ire = IRE(kappa=1.0, interval=1, curvature=curvature, perturbation=kwargs.pop("perturbation", None))
    cases.fit(module, [ire], train, **{"max_epochs": 1, "log_every_n_steps": 100, **kwargs})
    return curvature.estimates


def assert_same_estimates(first: list[list[Tensor]], second: list[list[Tensor]], exact: bool = True) -> None:
    assert len(first) == len(second) > 0
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if exact:
                assert cases.same_bits(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def shared(logits: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(logits, y)


def own(logits: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(logits, y) * 1.0  # no longer the tensor that cross_entropy returned


@pytest.mark.parametrize(
    "loop", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "64-true"}]
)
@pytest.mark.parametrize("net", [Net(), Net(batch_norm=True, dropout=0.4)], ids=["plain", "batchnorm-dropout"])
def test_shared_forward_equals_a_separate_one_to_the_last_bit(loop: dict[str, Any], net: nn.Module) -> None:
    first, second = Custom(shared, net), Custom(own, net)
    first, second = cases.clone(first), cases.clone(second)
    assert_same_estimates(estimates(first, **loop), estimates(second, **loop))
    assert first.calls == 8
    assert second.calls == 16


WEIGHTS = torch.tensor([0.2, 1.0, 2.0, 0.5])
LOSSES: dict[str, tuple[Any, Any]] = {
    "class": (lambda z, y, m: nn.CrossEntropyLoss()(z, y), shared),
    "imported": (lambda z, y, m: imported_directly(z, y), shared),
    "keywords": (lambda z, y, m: F.cross_entropy(target=y, input=z), shared),
    "label-smoothing": (lambda z, y, m: F.cross_entropy(z, y, label_smoothing=0.3), shared),
    "soft-targets": (lambda z, y, m: F.cross_entropy(z, F.one_hot(y, CLASSES).float() * 0.9 + 0.025), shared),
    "sum": (lambda z, y, m: F.cross_entropy(z, y, reduction="sum"), shared),
    "sum-flag": (lambda z, y, m: F.cross_entropy(z, y, size_average=False), shared),
    "none-then-mean": (lambda z, y, m: F.cross_entropy(z, y, reduction="none").mean(), shared),
    "none-flag": (lambda z, y, m: F.cross_entropy(z, y, reduce=False).mean(), shared),
    "penalty": (lambda z, y, m: F.cross_entropy(z, y) + m.net[0].weight.square().sum(), shared),
    "scaled": (lambda z, y, m: 7.0 * F.cross_entropy(z, y), shared),
    "halves": (
        lambda z, y, m: 0.5 * F.cross_entropy(z[:4], y[:4]) + 0.5 * F.cross_entropy(z[4:], y[4:]),
        shared,
    ),
    "metric-beside": (
        lambda z, y, m: (F.cross_entropy(z.detach(), y), F.cross_entropy(z, y))[1],
        shared,
    ),
    "class-weights-own": (
        lambda z, y, m: 1.0 * F.cross_entropy(z, y, weight=WEIGHTS),
        lambda z, y, m: F.cross_entropy(z, y, weight=WEIGHTS),
    ),
    "segmentation": (
        lambda z, y, m: F.cross_entropy(z.T[None], y[None]),  # [1, C, N] against [1, N]
        shared,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize(("loss", "same_as"), LOSSES.values(), ids=LOSSES.keys())
def test_losses_that_mean_the_same_give_the_same_estimate(loss: Any, same_as: Any) -> None:
    net = Net()
    first = estimates(cases.clone(Custom(loss, net)), precision="32-true")
    second = estimates(cases.clone(Custom(same_as, net)), precision="32-true")
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-8)


def test_micro_batches_are_one_batch() -> None:
    net = Net().double()
    dataset = cases.data(dtype=torch.float64)
    whole = estimates(cases.clone(Custom(shared, net)), cases.loader(dataset, 32), precision="64-true")
    for loss in (shared, own):
        parts = estimates(
            cases.clone(Custom(loss, net)), cases.loader(dataset, 8), precision="64-true", accumulate_grad_batches=4
        )
        assert_same_estimates(whole, parts, exact=False)


def exact_fisher(module: Custom, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Weighted mean over samples of sum_y p(y|x) (d log p(y|x))^2, weights w_i^2 / sum(w^2)."""
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    log_p = module.net(x).log_softmax(-1)
    for i in range(len(x)):
        for label in range(CLASSES):
            gradient = torch.autograd.grad(log_p[i, label], parameters, retain_graph=True, allow_unused=True)
            for into, g in zip(total, gradient, strict=True):
                if g is not None:
                    into += weights[i] ** 2 / weights.square().sum() * log_p[i, label].exp().detach() * g * g
    return total


def padded(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z, torch.where(torch.arange(len(y)) % 3 == 0, -100, y))


def padded_with_a_class(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    """Padding is class 0, which the model may also predict at a position that counts."""
    return F.cross_entropy(z, torch.where(torch.arange(len(y)) % 3 == 0, 0, y.clamp(min=1)), ignore_index=0)


def masked(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    mask = torch.arange(len(y)) % 3 != 0
    return (F.cross_entropy(z, y, reduction="none") * mask).sum() / mask.sum()


def rising(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    weights = torch.arange(1.0, len(y) + 1, dtype=z.dtype)
    return (F.cross_entropy(z, y, reduction="none") * weights).sum() / weights.sum()


class OwnLoss(Custom):
    """No cross_entropy anywhere: the module brings its own sampled-label loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self.net(x).log_softmax(-1)[torch.arange(len(x)), y].mean()

    def fisher_loss(self, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
        log_p = self.net(batch[0]).log_softmax(-1)
        labels = torch.distributions.Categorical(logits=log_p.detach()).sample()
        return -log_p[torch.arange(len(labels)), labels].mean(), len(labels)


EVERY_THIRD_OUT = (torch.arange(8) % 3 != 0).float()
CONVERGENCE = {
    "shared": (lambda: Custom(shared), torch.ones(8)),
    "own": (lambda: Custom(own), torch.ones(8)),
    "padded": (lambda: Custom(padded), EVERY_THIRD_OUT),
    "padded-with-a-class": (lambda: Custom(padded_with_a_class), EVERY_THIRD_OUT),
    "masked": (lambda: Custom(masked), EVERY_THIRD_OUT),
    "rising-weights": (lambda: Custom(rising), torch.arange(1.0, 9.0)),
    "fisher_loss": (lambda: OwnLoss(shared), torch.ones(8)),
}


@pytest.mark.parametrize(("make", "weights"), CONVERGENCE.values(), ids=CONVERGENCE.keys())
def test_mean_estimate_converges_to_the_fisher_diagonal(make: Callable[[], Custom], weights: Tensor) -> None:
    """Through the real callback, always the same batch of 8, weights fixed: the mean of 800 draws.

    One draw of a coordinate has a relative standard deviation of about 1.5, so 0.05 is to be expected of the diagonal;
    a wrong B (8 instead of 5, say) would be off by 0.6.
    """
    module = make().double()
    with torch.no_grad():
        module.net[2].weight.mul_(3)  # some classes likelier than others
    x, y = cases.data(8, dtype=torch.float64).tensors
    expected = exact_fisher(module, x, weights.double())
    same_batch = torch.utils.data.TensorDataset(x.repeat(800, 1), y.repeat(800))
    draws = estimates(module, cases.loader(same_batch), precision="64-true")
    assert len(draws) == 800

    def error(count: int) -> float:
        means = [torch.stack([draw[index] for draw in draws[:count]]).mean(0) for index in range(len(expected))]
        off = sum(float((mean - exact).square().sum()) for mean, exact in zip(means, expected, strict=True))
        return (off / sum(float(exact.square().sum()) for exact in expected)) ** 0.5

    assert error(800) < 0.12
    assert error(800) < error(50)
    traces = torch.tensor([sum(float(h.sum()) for h in draw) for draw in draws])
    exact_trace = sum(float(exact.sum()) for exact in expected)
    standard_error = float(traces.std()) / len(draws) ** 0.5
    assert standard_error < 0.05 * exact_trace
    assert abs(float(traces.mean()) - exact_trace) < 4 * standard_error


def test_draws_differ_between_steps_and_repeat_between_runs() -> None:
    net = Net()
    one_batch = cases.loader(cases.data(8))
    first = estimates(cases.clone(Custom(shared, net)), one_batch, max_epochs=3)
    again = estimates(cases.clone(Custom(shared, net)), one_batch, max_epochs=3, seed=99)
    assert_same_estimates(first, again)  # the user's own seed plays no part unless it is a global one
    assert not torch.equal(first[0][0], first[1][0])


def test_seed_everything_seeds_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    one_batch = cases.loader(cases.data(8))
    runs = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        runs.append(estimates(cases.clone(Custom(shared, net)), one_batch))
    assert_same_estimates(runs[0], runs[1])
    assert not torch.equal(runs[0][0][0], runs[2][0][0])


def test_average_sam_estimates_at_the_unmoved_weights() -> None:
    net = Net()
    moved = estimates(cases.clone(Custom(shared, net)), perturbation=AverageSAM(5.0))
    sam = estimates(cases.clone(Custom(shared, net)), perturbation=SAM(5.0))
    plain = estimates(cases.clone(Custom(shared, net)))
    assert_same_estimates(moved, plain)
    assert_same_estimates(sam, plain)


class DictBatch(Custom):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        self.sizes = [*getattr(self, "sizes", []), len(batch["inputs"]["x"])]
        assert batch["scale"].dim() == 0
        return F.cross_entropy(self.net(batch["inputs"]["x"]) * batch["scale"], batch["targets"][0])


def dict_batches(batch_size: int) -> DataLoader:
    def collate(samples: Any) -> Any:
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return {"inputs": {"x": x, "name": "text stays"}, "targets": [y], "scale": torch.tensor(1.0)}

    return DataLoader(cases.data(dtype=torch.float64), batch_size=batch_size, collate_fn=collate)


def test_fraction_estimates_on_the_first_part_of_any_batch() -> None:
    net = Net().double()
    quarter = cases.clone(DictBatch(shared, net))
    ours = estimates(quarter, dict_batches(8), fraction=0.25, precision="64-true")
    assert quarter.sizes == [8, 2] * 8
    x, y = cases.data(dtype=torch.float64).tensors
    keep = torch.arange(64) % 8 < 2
    first_parts = torch.utils.data.TensorDataset(x[keep], y[keep])
    theirs = estimates(cases.clone(Custom(shared, net)), cases.loader(first_parts, 2), precision="64-true")
    assert_same_estimates(ours, theirs, exact=False)


def test_no_cross_entropy_is_an_error_that_names_the_ways_out() -> None:
    module = Custom(lambda z, y, m: z.square().mean())
    with pytest.raises(ConfigurationError, match=r"fisher_loss\(batch, batch_idx\).*EmpiricalFisher\(\)") as caught:
        estimates(module)
    assert "\n" not in str(caught.value)
    assert "Custom.training_step" in str(caught.value)


def test_cross_entropy_that_the_loss_does_not_depend_on_is_an_error_too() -> None:
    module = Custom(lambda z, y, m: z.square().mean() + F.cross_entropy(z, y).detach())
    with pytest.raises(ConfigurationError, match="fisher_loss"):
        estimates(module)


def test_fisher_loss_that_returns_no_loss_is_an_error() -> None:
    module = OwnLoss(shared)
    module.fisher_loss = lambda batch, batch_idx: 3.0
    with pytest.raises(ConfigurationError, match=r"Expected `fisher_loss` to return a scalar loss.*got float"):
        estimates(module)


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, float("nan"), "half"])
def test_fraction_out_of_range(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `fraction` to be a number in \(0, 1\], got"):
        SampledFisher(bad)


def test_a_non_finite_estimate_keeps_the_mask_and_is_tried_again() -> None:
    class Overflows(Custom):
        """The sampled-label gradient is infinite in steps 4 and 5, the training gradient is not."""

        def fisher_loss(self, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
            factor = float("inf") if batch_idx in (4, 5) else 1.0
            return F.cross_entropy(self.net(batch[0]), batch[1]) * factor, len(batch[0])

    masks = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            masks.append(ire._progress.masks.masks["net.0.weight"])

    curvature = Recorded()
    ire = IRE(kappa=1.0, gamma=0.5, interval=4, curvature=curvature)
    cases.fit(Overflows(shared), [ire, Look()], max_epochs=1)
    assert [values is None for values in curvature.estimates] == [False, True, True, False]
    assert masks[3] is masks[4] is masks[5]
    assert masks[6] is not masks[5]


def test_all_positions_ignored_makes_no_mask() -> None:
    ire = IRE(kappa=1.0, interval=1)
    cases.fit(Custom(lambda z, y, m: F.cross_entropy(z, y * 0 - 100, reduction="sum")), [ire], limit_train_batches=2)
    assert not ire._progress.masks.masks


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(checkpoint(module.head, z, use_reentrant=reentrant), y)

    net = Net(dropout=0.3)
    checkpointed, plain = Custom(loss, net), Custom(lambda z, y, m: F.cross_entropy(m.head(z), y), net)
    head = nn.Sequential(nn.Linear(CLASSES, CLASSES), nn.Dropout(0.3))
    checkpointed.head, plain.head = head, head
    checkpointed, plain = cases.clone(checkpointed), cases.clone(plain)
    expected = estimates(plain)
    if reentrant:
        with pytest.warns(UserWarning, match="cannot share the training forward pass"):
            got = estimates(checkpointed)
    else:
        got = estimates(checkpointed)
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert checkpointed.calls == (16 if reentrant else 8)
