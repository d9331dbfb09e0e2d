"""HutchinsonHessian, SecondMoment, RandomMask; and of every estimate: that training does not notice it."""

import gc
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from cases import CLASSES, recorded
from modules import Attention, Classifier, Custom, Net, OnceTanh, Recurrent
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_ire import (
    IRE,
    SAM,
    AverageSAM,
    ConfigurationError,
    Curvature,
    EmpiricalFisher,
    HutchinsonHessian,
    RandomMask,
    SampledFisher,
    SecondMoment,
    in_extra_pass,
)
from lightning_ire.curvature import hutchinson
from lightning_ire.functional import rademacher
from lightning_ire.functional.seeds import mixed_seed


def cross_entropy(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z, y)


def joined(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


# the diagonal of the Hessian


class Quadratic(Custom):
    """0.5 * sum_i a_i w_i^2 + b . c with a diagonal Hessian; some parameters are linear, unused or frozen."""

    def __init__(self) -> None:
        super().__init__(cross_entropy, nn.Linear(1, 1))
        self.net.requires_grad_(False)
        self.curvatures = torch.tensor([3.0, -5.0, 0.25, 0.0, -0.125, 2.0]).double()
        self.w = nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double())
        self.linear, self.unused = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(2).double())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return 0.5 * (self.curvatures * self.w.reshape(-1).square()).sum() + (4 * self.linear).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.w, self.linear, self.unused], lr=0.0)


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize(
    "loop", [{}, {"accumulate_grad_batches": 2}, {"perturbation": SAM(0.1)}, {"perturbation": AverageSAM(2.0)}], ids=str
)
def test_any_signs_give_a_diagonal_hessian_exactly(num_vectors: int, loop: dict[str, Any]) -> None:
    """0 for what is only linear, nothing for what is unused or frozen."""
    module = Quadratic()
    found = cases.estimates(module, HutchinsonHessian(num_vectors), precision="64-true", **loop)
    assert len(found) == 8 // loop.get("accumulate_grad_batches", 1)
    for w, linear, unused in found:
        torch.testing.assert_close(w.reshape(-1), module.curvatures, rtol=1e-12, atol=1e-15)
        assert linear.tolist() == [0.0] * 3
        assert unused is None
    assert module.calls == 8 * (2 if loop.get("perturbation") else 1)


def test_strongly_negative_curvature_is_sharp() -> None:
    module = Quadratic()
    ire = IRE(kappa=1.0, gamma=0.7, exclude="linear", curvature=HutchinsonHessian())
    cases.fit(module, [ire], precision="64-true", limit_train_batches=1, max_epochs=1)
    (mask,) = ire._progress.masks.masks.values()
    assert mask.reshape(-1).tolist() == [False, False, True, True, True, True]  # of 3, -5, 0.25, 0, -0.125, 2


def small_net() -> nn.Sequential:
    """Six parameters with a Hessian that is not diagonal and not positive."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()


def small_loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(3 * z, y % 2) + z.sin().prod(1).mean()


def small_data(samples: int, repeats: int = 1) -> TensorDataset:
    x, y = cases.data(samples, dtype=torch.float64).tensors
    return TensorDataset(x[:, :2].repeat(repeats, 1), y.repeat(repeats))


def small_hessian(module: Custom, dataset: TensorDataset) -> Tensor:
    x, y = dataset.tensors
    return cases.dense_hessian(small_loss(module.net(x), y, module), list(module.net.parameters()))


class EverySign:
    """In place of the random signs: the k-th refresh gets the k-th of all sign vectors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, curvature: Curvature) -> None:
        self.refresh, self.position, self.source = -1, 0, None
        begin = curvature.begin
        monkeypatch.setattr(hutchinson, "rademacher", self.signs)

        def begin_next(window: Any) -> Any:
            self.refresh += 1
            return begin(window)

        curvature.begin = begin_next  # type: ignore[method-assign]

    def signs(self, size: int, generator: Any, dtype: torch.dtype) -> Tensor:
        if generator is not self.source:  # the vector from its start
            self.source, self.position = generator, 0
        bits = self.refresh >> (self.position + torch.arange(size)) & 1
        self.position += size
        return (2 * bits - 1).to(dtype)


WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "shared": ({}, 1),
    "own": ({"perturbation": AverageSAM(0.3)}, 2),
    "sam": ({"perturbation": SAM(0.3)}, 2),
    "accumulated": ({"accumulate_grad_batches": 2}, 1),
    "accumulated-own": ({"accumulate_grad_batches": 2, "perturbation": AverageSAM(0.3)}, 2),
}


@pytest.mark.parametrize(("loop", "passes"), cases.first_at_once(WAYS.values()), ids=WAYS.keys())
def test_mean_over_all_signs_is_the_diagonal_and_the_variance_the_rest_of_the_row(
    monkeypatch: pytest.MonkeyPatch, loop: dict[str, Any], passes: int
) -> None:
    """Bekas et al.: Var(v_i (H v)_i) = sum over j != i of H_ij^2. At the unmoved weights, whatever SAM does."""
    module, curvature = Custom(small_loss, small_net()), HutchinsonHessian()
    dataset = small_data(8)
    matrix = small_hessian(module, dataset)
    assert (matrix.diagonal() < 0).any()
    EverySign(monkeypatch, curvature)
    train = cases.loader(small_data(8, repeats=64), 8 // loop.get("accumulate_grad_batches", 1))
    h = torch.stack([joined(one) for one in cases.estimates(module, curvature, train, precision="64-true", **loop)])
    assert h.shape == (64, 6)
    torch.testing.assert_close(h.mean(0), matrix.diagonal(), rtol=1e-10, atol=1e-13)
    rest = matrix.square().sum(1) - matrix.diagonal().square()
    torch.testing.assert_close(h.var(0, correction=0), rest, rtol=1e-10, atol=1e-13)
    assert module.calls == passes * len(train)


def signs_of(module: nn.Module, step: int, index: int) -> Tensor:
    source = torch.Generator().manual_seed(mixed_seed(mixed_seed(0, step), "shared") + index)
    return torch.cat([rademacher(p.numel(), source, p.dtype) for p in module.parameters()])


@pytest.mark.parametrize("num_vectors", [1, 2, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_signs_are_averaged(num_vectors: int, accumulate: int) -> None:
    """The same signs in every micro-batch, other ones at every step."""
    module, dataset = Custom(small_loss, small_net()), small_data(8)
    matrix = small_hessian(module, dataset)
    found = cases.estimates(
        module,
        HutchinsonHessian(num_vectors),
        cases.loader(small_data(8, repeats=3), 8 // accumulate),
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    assert len(found) == 3
    for step, one in enumerate(found):
        vectors = [signs_of(module, step, index) for index in range(num_vectors)]
        expected = torch.stack([v * (matrix @ v) for v in vectors]).mean(0)
        torch.testing.assert_close(joined(one), expected, rtol=1e-10, atol=1e-13)
    assert not torch.equal(signs_of(module, 0, 0), signs_of(module, 1, 0))


@pytest.mark.parametrize("closure", [False, True])
def test_hutchinson_in_manual_optimization(closure: bool) -> None:
    class ByHand(Custom):
        def __init__(self) -> None:
            super().__init__(small_loss, small_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def compute() -> Tensor:
                loss = super(ByHand, self).training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()

    train = cases.loader(small_data(24))
    loop = {"precision": "64-true", **({"perturbation": SAM(0.1)} if closure else {})}
    by_hand = cases.estimates(ByHand(), HutchinsonHessian(), train, **loop)
    automatic = cases.estimates(Custom(small_loss, small_net()), HutchinsonHessian(), train, **loop)
    assert len(by_hand) == len(automatic) == 3
    for ours, theirs in zip(by_hand, automatic, strict=True):
        assert all(cases.same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def compiled_net() -> nn.Module:
    torch.compiler.reset()
    torch.manual_seed(1)
    return torch.compile(Net(), backend="aot_eager")  # type: ignore[return-value]


def plain_net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def attention(kernel: bool) -> nn.Module:
    torch.manual_seed(1)
    return Attention(kernel)


def checkpointed(reentrant: bool) -> Any:
    def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return F.cross_entropy(checkpoint(torch.sin, z.tanh(), use_reentrant=reentrant), y)

    return loss


def once(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(OnceTanh.apply(z), y)


def twice(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    return F.cross_entropy(z.tanh(), y)


SHARE, TWICE = (
    "cannot share the training forward pass",
    "cannot be differentiated twice, so its products are differences",
)
# loss and net; the same, differentiable twice; the warnings; passes per batch (training's included); tolerance
FALLBACKS: dict[str, Any] = {
    "attention": (
        (cross_entropy, lambda: attention(True)), (cross_entropy, lambda: attention(False)), [SHARE], 2, 1e-4
    ),
    "compiled": ((cross_entropy, compiled_net), (cross_entropy, plain_net), [SHARE], 2, 1e-5),
    "once-differentiable": ((once, plain_net), (twice, plain_net), [SHARE, TWICE], 4, 2e-2),
    "checkpointed": (
        (checkpointed(False), plain_net), (lambda z, y, m: F.cross_entropy(z.tanh().sin(), y), plain_net), [], 1, 1e-5
    ),
    "reentrant": (
        (checkpointed(True), plain_net), (lambda z, y, m: F.cross_entropy(z.tanh().sin(), y), plain_net),
        [SHARE, TWICE], 4, 2e-2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("refuses", "plain", "messages", "passes", "tolerance"),
    FALLBACKS.values(),
    ids=FALLBACKS.keys(),
)
def test_where_the_training_graph_cannot_be_differentiated_twice(
    accumulate: int,
    refuses: Any,
    plain: Any,
    messages: list[str],
    passes: int,
    tolerance: float,
) -> None:
    """The same estimate, by a pass with other kernels or by differences of gradients; said once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Custom(refuses[0], refuses[1]())
        loop = {"accumulate_grad_batches": accumulate, "limit_train_batches": 2}
        got = cases.estimates(module, HutchinsonHessian(), **loop)
        ours = {str(one.message) for one in caught if "HutchinsonHessian" in str(one.message)}
        expected = cases.estimates(Custom(plain[0], plain[1]()), HutchinsonHessian(), **loop)
    assert len(got) == len(expected) == 2 // accumulate
    for one, other in zip(got, expected, strict=True):
        assert (joined(one) - joined(other)).norm() / joined(other).norm() < tolerance
    assert len(ours) == len(messages)
    assert all(any(text in message for message in ours) for text in messages)
    assert all("\n" not in message for message in ours)
    if refuses[1] is not compiled_net:
        assert module.calls == 2 * passes


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_hutchinson_of_a_recurrent_layer(kind: Any) -> None:
    net = Recurrent(kind).double()
    module, dataset = Custom(lambda z, y, m: F.cross_entropy(z, y % 2), net), cases.data(8, dtype=torch.float64)
    x, y = dataset.tensors
    matrix = cases.dense_hessian(F.cross_entropy(net(x), y % 2), list(net.parameters()))
    (got,) = cases.estimates(module, HutchinsonHessian(), cases.loader(dataset), precision="64-true")
    signs = signs_of(module, 0, 0)
    torch.testing.assert_close(joined(got), signs * (matrix @ signs), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16"])
def test_hutchinson_in_half_precision(precision: str) -> None:
    """The loss scale cancels; the numbers are those of the half type."""
    loop: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        loop = {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
    (exact,) = cases.estimates(Custom(cross_entropy, plain_net()), HutchinsonHessian(), limit_train_batches=1)
    (got,) = cases.estimates(Custom(cross_entropy, plain_net()), HutchinsonHessian(), limit_train_batches=1, **loop)
    assert all(h.dtype == torch.float32 for h in got)
    assert (joined(got) - joined(exact)).norm() / joined(exact).norm() < 0.05


def test_hutchinson_by_differences_in_half_precision() -> None:
    """Their step is one for bfloat16: that for float32 weights is lost in the rounding of the forward pass."""
    (exact,) = cases.estimates(Custom(twice, plain_net()), HutchinsonHessian(16), limit_train_batches=1)
    with pytest.warns(UserWarning, match=TWICE):
        (got,) = cases.estimates(
            Custom(once, plain_net()), HutchinsonHessian(16), limit_train_batches=1, precision="bf16-mixed"
        )
    error = float((joined(got) - joined(exact)).norm() / joined(exact).norm())
    assert error < 0.1, error


def test_hutchinson_of_an_overflow_is_tried_again() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=5)
    loop = {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
    found = cases.estimates(Custom(cross_entropy), HutchinsonHessian(), limit_train_batches=2, **loop)
    assert found == [None, None]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2", None])
def test_wrong_number_of_vectors(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected `num_vectors` to be a whole number >= 1, got") as caught:
        HutchinsonHessian(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("curvature", "text"),
    [
        (HutchinsonHessian(), "HutchinsonHessian()"),
        (HutchinsonHessian(4), "HutchinsonHessian(num_vectors=4)"),
        (SecondMoment(), "SecondMoment()"),
        (RandomMask(), "RandomMask()"),
    ],
)
def test_the_representation_is_what_was_written(curvature: Curvature, text: str) -> None:
    assert repr(curvature) == text


# the optimizer's second moment


def constant(optimizer: Any) -> Custom:
    """Always the same gradient: weights that stay where they are, and (see below) always the same batch."""
    module = Custom(cross_entropy, plain_net())
    module.make_optimizer = lambda m: optimizer(m.parameters())
    return module


ONE_BATCH = {"limit_train_batches": 1, "max_epochs": 5}
OPTIMIZERS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.0), lambda t: 1.0),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.0, betas=(0.5, 0.7), fused=True), lambda t: 1.0),
    "adamw-foreach-amsgrad": (lambda p: torch.optim.AdamW(p, lr=0.0, foreach=True, amsgrad=True), lambda t: 1.0),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=0.0), lambda t: 1.0),
    "radam": (lambda p: torch.optim.RAdam(p, lr=0.0), lambda t: 1.0),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.0, alpha=0.9, centered=True), lambda t: 1.0),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.0), lambda t: t),
    "adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.0, rho=0.8), lambda t: 1.0),
}


def squared_gradient(module: Custom) -> Tensor:
    x, y = cases.data().tensors
    loss = F.cross_entropy(module.net(x[:8]), y[:8])
    return joined(torch.autograd.grad(loss, list(module.net.parameters()))).square()


@pytest.mark.parametrize(("optimizer", "factor"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_second_moment_of_a_constant_gradient_is_its_square(optimizer: Any, factor: Callable[[int], float]) -> None:
    """Averages are without the bias of the first steps; Adagrad keeps a sum. No pass is run."""
    module = constant(optimizer)
    expected = squared_gradient(module)
    found = cases.estimates(module, SecondMoment(), **ONE_BATCH)
    assert len(found) == module.calls == 5
    for step, h in enumerate(found[1:], start=1):
        torch.testing.assert_close(joined(h), factor(step) * expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_mask_before_the_optimizers_first_step_and_a_retry_at_the_second(name: str) -> None:
    curvature, masks = SecondMoment(), []
    found = recorded(curvature)
    ire = IRE(kappa=1.0, gamma=0.5, interval=3, curvature=curvature)

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            masks.append(dict(ire._progress.masks.masks))

    cases.fit(constant(OPTIMIZERS[name][0]), [ire, Look()], **ONE_BATCH)
    assert [h is None for h in found] == [True, False, False]  # steps 0, 1 and 3
    assert [bool(one) for one in masks] == [False, True, True, True, True]


def test_second_moment_is_the_state_before_the_step_and_a_copy_of_it() -> None:
    module = Classifier(Net(batch_norm=True), optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    curvature, states = SecondMoment(), []
    found = recorded(curvature)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            state = trainer.optimizers[0].state
            states.append([state[p]["exp_avg_sq"].clone() for p in pl_module.parameters()])

    plain = cases.clone(module)
    cases.fit(module, [IRE(kappa=1.0, interval=1, exclude="*", curvature=curvature), Look()], max_epochs=1)
    assert found[0] is None
    for t, (h, state) in enumerate(zip(found[1:], states, strict=False), start=1):
        for ours, theirs in zip(h, state, strict=True):
            torch.testing.assert_close(ours, theirs / (1 - 0.999**t), rtol=1e-6, atol=0)
            assert ours.data_ptr() != theirs.data_ptr()
    cases.fit(plain, max_epochs=1)
    cases.assert_same_bits(module, plain)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adadelta"])
def test_parameters_that_join_later(name: str) -> None:
    """None at their first step; then an estimate that compares with that of the others."""
    module = constant(OPTIMIZERS[name][0])
    expected = squared_gradient(module)
    late = module.net[0].weight.requires_grad_(False)

    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            late.requires_grad_(trainer.current_epoch >= 2)

    curvature = SecondMoment()
    found = recorded(curvature)
    cases.fit(module, [IRE(kappa=1.0, interval=1, curvature=curvature), Thaw()], **{**ONE_BATCH, "max_epochs": 12})
    assert [len(h) for h in found[1:]] == [3, *[4] * 10]
    assert found[2][0] is None
    torch.testing.assert_close(joined(found[2][1:]), joined(found[1]))
    last = joined(found[-1])
    size = late.numel()
    ratios = (last[:size].mean() / expected[:size].mean(), last[size:].mean() / expected[size:].mean())
    assert float(ratios[0]) == pytest.approx(float(ratios[1]), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "Adamax", "Rprop", "ASGD", "Adafactor"])
def test_optimizers_without_a_second_moment(optimizer: str) -> None:
    module = Custom(cross_entropy)
    module.make_optimizer = lambda m: getattr(torch.optim, optimizer)(m.parameters(), lr=0.01)
    with pytest.raises(ConfigurationError, match=rf"^Expected .*{optimizer}.*keeps none.*SampledFisher") as caught:
        cases.estimates(module, SecondMoment())
    assert "\n" not in str(caught.value)
    assert module.calls <= 2


# random masks


def random_masks(module: Classifier, folder: Path | None = None, **settings: Any) -> list[dict[str, Tensor]]:
    """The masks after every step of a run."""
    masks: list[dict[str, Tensor]] = []
    ire = IRE(**{"kappa": 1.0, "gamma": 0.7, "interval": 1, "curvature": RandomMask(), **settings})

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            masks.append({name: mask.clone() for name, mask in ire._progress.masks.masks.items()})
            if folder is not None and trainer.global_step == 5:
                trainer.save_checkpoint(folder / "half.ckpt")

    resume = str(folder / "half.ckpt") if folder is not None and (folder / "half.ckpt").exists() else None
    cases.fit(module, [ire, Look()], max_epochs=1, ckpt_path=resume)
    return masks


class Wide(Net):
    """Two layers of one shape, large enough for frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.insert(1, nn.Linear(8, 100, bias=False))
        self.insert(2, nn.Linear(100, 100, bias=False))
        self.insert(3, nn.Linear(100, 100, bias=False))
        self.insert(4, nn.Linear(100, 8, bias=False))


def test_random_masks_have_the_share_gamma_and_nothing_in_common() -> None:
    """Between refreshes, and between two parameters of one shape: gamma^2 is flat in both (4 standard errors)."""
    gamma = 0.7
    masks = random_masks(Classifier(Wide()))
    assert len(masks) == 8
    first, second = masks[0], masks[1]
    count = sum(mask.numel() for mask in first.values())
    for one in masks:
        assert sum(int(mask.sum()) for mask in one.values()) == int(gamma * count)
    error = 4 * (gamma**2 * (1 - gamma**2) / 10_000) ** 0.5
    for a, b in (
        (first["net.2.weight"], first["net.3.weight"]),
        (first["net.2.weight"], first["net.3.weight"].T),
        (first["net.2.weight"], second["net.2.weight"]),
        (first["net.3.weight"], second["net.2.weight"]),
    ):
        assert abs(float((a & b).float().mean()) - gamma**2) < error


def test_random_masks_know_the_seed_and_nothing_of_loss_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(len(runs))
        runs.append(random_masks(Classifier(Net()), interval=3, start_step=len(runs) // 2))
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(runs[0], runs[1], strict=True)]
    assert same == [True] * 8
    assert not torch.equal(runs[0][4]["net.0.weight"], runs[2][4]["net.0.weight"])
    changes = [
        not torch.equal(a["net.0.weight"], b["net.0.weight"]) for a, b in zip(runs[0], runs[0][1:], strict=False)
    ]
    assert changes == [False, False, True, False, False, True, False]


def test_a_resumed_run_draws_the_same_masks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Classifier(Net())
    again = cases.clone(module)
    straight = random_masks(module, tmp_path)
    assert not torch.equal(straight[4]["net.0.weight"], straight[5]["net.0.weight"])
    resumed = random_masks(again, tmp_path)
    assert len(resumed) == 3
    for ours, theirs in zip(resumed, straight[5:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# every estimate: training does not notice it


class Watched(Classifier):
    """All that an extra pass could disturb: statistics, dropout, a metric, logged values, three random streams."""

    def __init__(self, two_terms: bool = False) -> None:
        super().__init__(
            Net(batch_norm=True, dropout=0.3), lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1)
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        self.register_buffer("seen", torch.zeros(()))
        self.two_terms = two_terms
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.passes += 1
        x = batch[0] + 0.1 * random.random() + 0.1 * float(np.random.rand())
        z = self.net(x + 0.1 * torch.rand(()))
        loss = F.cross_entropy(z, batch[1])
        self.accuracy(z, batch[1])
        self.seen += 1
        if self.two_terms:
            loss = loss + 0.5 * F.mse_loss(z, z.detach().tanh())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return loss


CURVATURES: dict[str, tuple[Callable[[], Curvature], int]] = {
    "sampled": (SampledFisher, 1),
    "fraction": (lambda: SampledFisher(0.5), 2),
    "micro_batch": (lambda: SampledFisher(form="micro_batch", micro_batch_size=3), 4),
    "sample": (lambda: SampledFisher(form="sample"), 0),
    "hutchinson": (lambda: HutchinsonHessian(2), 1),
    "second-moment": (SecondMoment, 1),
    "random": (RandomMask, 1),
    "empirical": (EmpiricalFisher, 1),
}
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    "bf16": {"precision": "bf16-mixed"},
    "average-sam": {"perturbation": AverageSAM(0.1)},
    "sam": {"perturbation": SAM(0.1)},
}


@pytest.fixture(scope="module")
def without_estimates() -> dict[Any, Any]:
    """The runs that others are compared with, made once."""
    return {}


@pytest.mark.parametrize(
    ("name", "way", "two_terms"),
    [
        *((name, way, False) for name in CURVATURES for way in LOOPS),
        *((name, "plain", True) for name in ("sampled", "sample", "hutchinson")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*takes the samples one by one here")
def test_training_does_not_notice_an_estimate(
    name: str, way: str, two_terms: bool, without_estimates: dict[Any, Any]
) -> None:
    """Nothing is boosted, and the run is the one without estimates bit for bit: weights, moments, logs, streams."""

    def run(curvature: Curvature | None) -> tuple[Watched, dict[str, Any], list[Any]]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        module, settings = Watched(two_terms), dict(loop)
        perturbation = settings.pop("perturbation", None)
        boost = {"kappa": 0.0} if curvature is None else {"kappa": 5.0, "interval": 1, "exclude": "*"}
        chosen = curvature or SampledFisher()
        found = recorded(chosen)
        callbacks = [IRE(**boost, perturbation=perturbation, curvature=chosen)] if perturbation or curvature else []
        trainer = cases.fit(module, callbacks, max_epochs=1, limit_train_batches=6, **settings)
        streams = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
        logged = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("ire")}
        after = {"logged": logged, "optimizer": trainer.optimizers[0].state_dict(), "streams": streams}
        return module, after, found

    (make, passes), loop = CURVATURES[name], LOOPS[way]
    if (way, two_terms) not in without_estimates:
        without_estimates[way, two_terms] = run(None)
    plain, before, none = without_estimates[way, two_terms]
    module, after, found = run(make())
    cases.assert_same_bits(plain, module)
    assert torch.equal(before["streams"][0], after["streams"][0])
    assert before["streams"][1:] == after["streams"][1:]
    for tag, value in before["logged"].items():
        assert cases.same_bits(value, after["logged"][tag]), tag
    for index, state in before["optimizer"]["state"].items():
        assert all(cases.same_bits(value, after["optimizer"]["state"][index][key]) for key, value in state.items())
    assert none == []
    assert len(found) == 6 // loop.get("accumulate_grad_batches", 1)
    assert all(one is not None for one in found[1:])
    assert all(h is None or (h.isfinite().all() and not h.requires_grad) for one in found[1:] for h in one)
    if passes and not loop.get("perturbation"):
        assert module.passes == 6 * passes


@pytest.mark.parametrize("loop", [{}, {"accumulate_grad_batches": 3, "perturbation": AverageSAM(0.1)}], ids=str)
@pytest.mark.parametrize("make", [make for make, _ in CURVATURES.values()], ids=CURVATURES.keys())
def test_graphs_are_freed_without_a_garbage_collector(make: Callable[[], Curvature], loop: dict[str, Any]) -> None:
    """No more outputs with a graph are alive after a batch than without an estimate; a loss beside is logged."""

    def most_alive(curvature: Curvature | None) -> int:
        outputs: list[weakref.ref[Tensor]] = []
        counts: list[int] = []

        def loss(z: Tensor, y: Tensor, module: nn.Module) -> Tensor:
            if not in_extra_pass():
                outputs.append(weakref.ref(z))
            module.log("beside", F.cross_entropy(z + 1, y))
            return F.cross_entropy(z, y)

        class Count(pl.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                counts.append(sum(output() is not None for output in outputs))

        module, settings = Custom(loss), dict(loop)
        module.make_optimizer = lambda m: torch.optim.Adam(m.parameters(), lr=0.0)
        perturbation = settings.pop("perturbation", None)
        callbacks: list[pl.Callback] = [Count()]
        if curvature is not None:
            callbacks.append(IRE(kappa=1.0, interval=1, curvature=curvature, perturbation=perturbation))
        gc.disable()
        try:
            cases.fit(module, callbacks, max_epochs=1, limit_train_batches=6, **settings)
        finally:
            gc.enable()
        assert len(counts) == len(outputs) == 6
        return max(counts)

    assert most_alive(make()) <= most_alive(None) + 1


def test_an_estimate_that_is_never_finite_is_said_once() -> None:
    class Never(RandomMask):
        def begin(self, window: Any) -> Any:
            estimate = super().begin(window)
            estimate.finish = lambda: None  # type: ignore[method-assign]
            return estimate

    with pytest.warns(UserWarning, match=r"no finite estimate in 20 steps, up to step 19, so that no step is") as said:
        cases.fit(Classifier(), [IRE(kappa=1.0, interval=5, curvature=Never())], max_epochs=6)
    assert sum("no finite estimate" in str(one.message) for one in said) == 1


def test_a_loss_inside_vmap_is_the_usual_line() -> None:
    class Tasks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return torch.func.vmap(lambda x, y: F.cross_entropy(self.net(x), y))(x[None], y[None]).mean()

    with pytest.raises(ConfigurationError, match="fisher_loss"):
        cases.fit(Tasks(), [IRE(kappa=1.0)])
