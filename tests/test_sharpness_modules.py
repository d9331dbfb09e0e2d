"""Modules and data that are hard to measure: the monitor's numbers against dense Hessians of plain formulas."""

import copy
import math
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, FEATURES
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from modules import Attention, Checkpointed, Classifier, Complex, Net, Odd, OnceNet, Recurrent
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_ire import SharpnessMonitor, tags
from lightning_ire.functional import rademacher, seeded
from lightning_ire.functional.seeds import mixed_seed

pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:lightning\."),
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\."),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

VECTORS = 3
HESSIAN = ["trace_hessian", "lambda_max", "lambda_min"]
TIGHT: dict[str, Any] = {"max_vectors": VECTORS, "tolerance": 1e-10, "max_iterations": 300}
WHERE: dict[str, Any] = {"every_n_epochs": None}


class Numbers(SharpnessMonitor):
    """Measures the trace by itself: Hutchinson's plain estimate, without the subspace of the eigenvalues."""

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        wanted = self.quantities
        rest = tuple(quantity for quantity in wanted if quantity != "trace_hessian")
        parts = []
        for self.quantities in [part for part in (rest, ("trace_hessian",) * wanted.count("trace_hessian")) if part]:
            parts.append(super().measure(trainer, module))
        self.quantities = wanted
        for part in parts[1:]:
            parts[0].values |= part.values
            parts[0].skipped |= part.skipped
        self.last = parts[0]
        return self.last


class Module(Classifier):
    """In float64; its loss is `loss(batch)`."""

    dtype_of_data = torch.float64

    def __init__(self, net: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.to(self.dtype_of_data)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def data(samples: int = 16, dtype: torch.dtype = torch.float64) -> TensorDataset:
    return cases.data(samples, dtype)


def trained(module: Any, train: Any = None, **kwargs: Any) -> pl.Trainer:
    """A trainer that has made one step with the module."""
    trainer = cases.trainer(**{"max_steps": 1, "max_epochs": -1, **kwargs})
    torch.manual_seed(3)
    trainer.fit(module, cases.loader(data(), 8) if train is None else train)
    return trainer


def measured(
    module: Any, monitor: SharpnessMonitor | None = None, train: Any = None, **kwargs: Any
) -> tuple[dict[str, float], Any, list[str]]:
    """The numbers after one step, the probe's first batch, and what was said."""
    monitor = Numbers(quantities=HESSIAN, **TIGHT) if monitor is None else monitor
    trainer = trained(module, train, **kwargs)
    with cases.monitor_warnings() as said:
        result = monitor.measure(trainer, getattr(module, "_orig_mod", module))
    return result.values, monitor._probe._batches[0] if monitor._probe else None, said


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def assert_numbers(values: dict[str, float], hessian: Tensor, rel: float = 1e-7) -> None:
    """The same random signs as the monitor's give the same number, so that chance does not matter."""
    generator = torch.Generator().manual_seed(mixed_seed(0, "trace"))
    draws = [rademacher(len(hessian), generator, hessian.dtype) for _ in range(VECTORS)]
    trace = sum(float(v @ hessian @ v) for v in draws) / VECTORS
    eigenvalues = torch.linalg.eigvalsh(hessian)
    accuracy = {"rel": rel, "abs": rel * float(eigenvalues.abs().max())}
    assert values[tags.TRACE_HESSIAN] == pytest.approx(trace, **accuracy)
    assert values[tags.LAMBDA_MAX] == pytest.approx(float(eigenvalues[-1]), **accuracy)
    assert values[tags.LAMBDA_MIN] == pytest.approx(float(eigenvalues[0]), **accuracy)


# Layers


def checkpointed(reentrant: bool | None) -> nn.Module:
    return Checkpointed(reentrant, nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), width=5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "default attention": (Attention, lambda: Attention(kernel=False)),
    "LSTM": (lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.LSTM, kernel=False)),
    "GRU": (lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.GRU, kernel=False)),
    "checkpointing": (lambda: checkpointed(False), lambda: checkpointed(None)),
    "odd parameters": (Odd, Odd),
}


def twin(module: Module, plain: Callable[[], nn.Module]) -> Module:
    """The plain formulation with the module's weights and frozen parameters."""
    other = Module(plain())
    other.load_state_dict(module.state_dict())
    return other.eval()


@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_need_care(name: str, hvp: str) -> None:
    """Attention with the default kernel also where the module is in training mode."""
    make, plain = LAYERS[name]
    module = Module(make())
    monitor = Numbers(quantities=HESSIAN, hvp=hvp, **{**TIGHT, "tolerance": 1e-7})
    values, batch, said = measured(module, monitor)
    other = twin(module, plain)
    assert not said
    assert monitor._exact is (hvp == "auto")
    hessian = cases.dense_hessian(other.loss(batch), trained_parameters(other))
    assert_numbers(values, hessian, 1e-7 if hvp == "auto" else 3e-4)


@pytest.mark.parametrize(
    ("make", "plain", "words"),
    [
        (lambda: checkpointed(True), lambda: checkpointed(None), "checkpoint is incompatible"),
        (OnceNet, Net, "a backward pass without a derivative"),
    ],
    ids=["reentrant checkpointing", "once differentiable"],
)
def test_a_loss_that_cannot_be_differentiated_twice(make: Any, plain: Any, words: str) -> None:
    """One warning in all, not one per measurement; `hvp="exact"` skips instead."""
    module = Module(make())
    trainer = trained(module)
    quantities = [*HESSIAN, "ascent_gap", "trace_fisher"]
    monitor = Numbers(quantities=quantities, **{**TIGHT, "tolerance": 1e-7})
    with cases.monitor_warnings() as said:
        first, second = monitor.measure(trainer, module), monitor.measure(trainer, module)
    assert len(said) == 1
    assert words in said[0]
    assert "differences of gradients from now on" in said[0]
    assert not first.skipped
    assert not second.skipped
    assert first.values == pytest.approx(second.values, rel=1e-4)
    other, batch = twin(module, plain), monitor._probe._batches[0]
    assert_numbers(second.values, cases.dense_hessian(other.loss(batch), trained_parameters(other)), 1e-4)
    same = Numbers(quantities=quantities, **TIGHT).measure(trained_like(trainer), other)
    for tag in (tags.ASCENT_GAP, tags.TRACE_FISHER):
        assert second.values[tag] == pytest.approx(same.values[tag], rel=1e-9)
    strict = Numbers(quantities=quantities, hvp="exact", **TIGHT)
    with cases.monitor_warnings() as said:
        assert set(strict.measure(trainer, module).skipped) == set(HESSIAN)
    assert len(said) == 3


def trained_like(trainer: pl.Trainer) -> pl.Trainer:
    return trainer


@pytest.mark.parametrize("what", ["module", "part"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_modules(backend: str, what: str) -> None:
    torch._dynamo.reset()
    plain = Module()
    module: Any = Module(copy.deepcopy(plain.net))
    if what == "part":
        module.net = torch.compile(module.net, backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    values, batch, said = measured(module)
    inner = getattr(module, "_orig_mod", module)
    state = {name.replace("_orig_mod.", ""): value for name, value in inner.state_dict().items()}
    plain.load_state_dict(state)
    assert not said
    assert_numbers(values, cases.dense_hessian(plain.loss(batch), trained_parameters(plain)))


# Losses


@pytest.mark.parametrize("hvp", cases.first_at_once(["exact", "finite_difference"]))
@pytest.mark.parametrize(
    "optimizer",
    [lambda module: torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=0.1),
     lambda module: torch.optim.AdamW(module.parameters(), 0.01)],
    ids=["sgd", "adamw"],
)  # fmt: skip
def test_complex_weights_are_pairs_of_real_numbers(hvp: str, optimizer: Any) -> None:
    found = []
    for pairs in (True, False):
        monitor = SharpnessMonitor(quantities=cases.BARE, hvp=hvp, max_vectors=4, max_iterations=10, num_batches=2)
        data = cases.loader(cases.data(32, torch.float64))
        cases.fit(Classifier(Complex(pairs, torch.complex128), optimizer), [monitor], data, max_epochs=1)
        assert not monitor.last.skipped
        inner = [f"quantile_{percent}" for percent in (1, 10, 50, 90, 99)]  # rounding errors say which node it is
        found.append({tag: value for tag, value in monitor.last.values.items() if tag.split("/")[-1] not in inner})
    assert found[1] == pytest.approx(found[0], rel=1e-6 if hvp == "exact" else 1e-3, abs=1e-8)


class Linear(Module):
    """Linear in the weights."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0])[:, 0].mean()


class Constant(Module):
    """Knows nothing of the weights."""

    def loss(self, batch: Any) -> Tensor:
        return batch[0].square().mean()


@pytest.mark.parametrize("kind", [Linear, Constant])
@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_a_loss_without_curvature_or_without_a_graph(kind: Any, hvp: str) -> None:
    trainer = trained(Module())
    monitor = Numbers(quantities=[*HESSIAN, "ascent_gap"], hvp=hvp, **TIGHT)
    module = kind(nn.Linear(FEATURES, CLASSES))
    with cases.monitor_warnings() as said:
        result = monitor.measure(trainer, module)
    assert not said
    assert not result.skipped
    for tag in (tags.TRACE_HESSIAN, tags.LAMBDA_MAX, tags.LAMBDA_MIN):
        assert result.values[tag] == pytest.approx(0, abs=1e-9)
    gradient = torch.cat([batch[0].mean(0) for batch in monitor._probe._batches] + [torch.ones(1)])
    gap = 0.05 * float(gradient.norm()) if kind is Linear else 0.0  # rho ||g||
    assert result.values[tags.ASCENT_GAP] == pytest.approx(gap, rel=1e-6)


class Regression(Module):
    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).to(batch[0]))


class WithFisherLoss(Regression):
    """Draws nothing, so that B ||G||^2 is a known number."""

    def fisher_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch), len(batch[0])


class AddsUp(WithFisherLoss):
    """The sum over the samples of the batch, as one prediction."""

    def fisher_loss(self, batch: Any) -> Any:
        return self.loss(batch) * len(batch[0])


class Robust(Module):
    def loss(self, batch: Any) -> Tensor:
        return F.huber_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).to(batch[0]))


def test_the_fisher_of_squared_errors_is_their_gauss_newton_matrix() -> None:
    """Tr F = mean over the outputs of 2 ||J||^2, within four standard errors."""
    module = Regression()
    monitor = Numbers(quantities=["trace_fisher"], **{**TIGHT, "max_vectors": 300, "relative_error": 0})
    values, batch, said = measured(module, monitor)
    assert not said
    outputs = module.net(batch[0]).reshape(-1)
    exact = 0.0
    for output in outputs:
        gradients = torch.autograd.grad(output, trained_parameters(module), retain_graph=True)
        exact += sum(2 / len(outputs) * float(g.square().sum()) for g in gradients)
    error = values[tags.TRACE_FISHER + tags.STDERR]
    assert 0 < error < 0.1 * exact
    assert abs(values[tags.TRACE_FISHER] - exact) < 4 * error


def test_the_fisher_needs_a_likelihood_or_a_method_of_the_modules_own() -> None:
    quantities = ["trace_fisher", *HESSIAN]
    module = Robust()
    values, batch, said = measured(module, Numbers(quantities=quantities, **TIGHT))
    assert len(said) == 1
    assert "trace_fisher" in said[0]
    assert "not made with `cross_entropy`" in said[0]
    assert "`fisher_loss" in said[0]
    assert tags.TRACE_FISHER not in values
    assert_numbers(values, cases.dense_hessian(module.loss(batch), trained_parameters(module)))


@pytest.mark.parametrize(("kind", "factor"), [(WithFisherLoss, 8), (AddsUp, 64)])
def test_a_fisher_loss_of_the_modules_own(kind: Any, factor: int) -> None:
    module = kind()
    values, batch, said = measured(module, Numbers(quantities=["trace_fisher"], **TIGHT))
    assert not said
    gradients = torch.autograd.grad(module.loss(batch), trained_parameters(module))
    square = sum(float(g.square().sum()) for g in gradients)
    assert values[tags.TRACE_FISHER] == pytest.approx(factor * square)
    assert values[tags.TRACE_FISHER + tags.STDERR] == pytest.approx(0, abs=1e-12)


class Returns(Module):
    """Returns something else than a loss."""

    what: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "more": batch} if self.what == "dict" else self.what


def test_a_step_may_return_a_dictionary() -> None:
    module = Returns()
    module.what = "dict"
    monitor = Numbers(quantities=HESSIAN, **TIGHT)
    result = monitor.measure(trained(Module()), module)
    assert not result.skipped
    loss = module.loss(monitor._probe._batches[0])
    assert_numbers(result.values, cases.dense_hessian(loss, trained_parameters(module)))


@pytest.mark.parametrize("what", [None, 3.0, "many", {"no": 1}])
def test_a_step_without_a_loss_on_the_probe_is_said(what: Any) -> None:
    module = Returns()
    module.what = torch.ones(3) if what == "many" else what
    wanted = set(cases.BARE) - {"stability", "sgd_ratio"}  # the trainer's optimizer is that of another module
    with cases.monitor_warnings() as said:
        result = Numbers(quantities=wanted, num_batches=2, **TIGHT).measure(trained(Module()), module)
    assert result.values == {}
    assert set(result.skipped) == set(wanted)
    assert {text.partition(": ")[2] for text in said} == {"Returns returned no loss on the probe"}
    assert len(said) == len(wanted)


class OneArgument(Module):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


class Indexed(Module):
    """The loss depends on which batch it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (1 + 10 * batch_idx)


@pytest.mark.parametrize("kind", [OneArgument, Indexed])
def test_arguments_of_the_step(kind: Any) -> None:
    module = kind()
    monitor = Numbers(quantities=HESSIAN, num_batches=2, **TIGHT)
    values, _, said = measured(module, monitor)
    assert not said
    first, second = (module.loss(batch) for batch in monitor._probe._batches)
    loss = (first + second * (11 if kind is Indexed else 1)) / 2
    assert_numbers(values, cases.dense_hessian(loss, trained_parameters(module)))


# Steps that change something


class Moving(Module):
    """What it computes depends on buffers that every forward pass changes, and on draws."""

    def __init__(self) -> None:
        normed = parametrizations.spectral_norm(nn.Linear(FEATURES, 5))
        super().__init__(nn.Sequential(normed, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES)))
        self.register_buffer("memory", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.memory = 0.5 * self.memory + 0.5 * x.mean(0)
        self.count += 1
        x = x + self.memory * self.count + 0.3 * torch.randn_like(x)
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_every_evaluation_has_the_same_buffers_and_draws(mode: str, hvp: str) -> None:
    module = Moving()
    trainer = trained(module)
    # differences see that spectral_norm's buffers follow the weights, which derivatives leave out: no truth to reach
    compared = mode == "eval" or hvp == "auto"
    settings = {**TIGHT, "tolerance": 1e-7, "max_iterations": 300 if compared else 20}
    monitor = Numbers(quantities=HESSIAN, mode=mode, hvp=hvp, **settings)
    first = monitor.measure(trainer, module).values
    torch.rand(7)
    assert monitor.measure(trainer, module).values == first
    if not compared:
        return
    other = copy.deepcopy(module).train(mode == "train")
    with seeded(mixed_seed(0, "pass", 0, 0)):
        loss = other.loss(monitor._probe._batches[0])
    assert_numbers(first, cases.dense_hessian(loss, trained_parameters(other)), 1e-7 if hvp == "auto" else 1e-4)


def test_the_mean_over_batches_that_change_buffers() -> None:
    """Each batch begins with the buffers of the moment of the measurement, not with those of the batch before."""
    module = Moving()
    trainer = trained(module)
    monitor = Numbers(quantities=HESSIAN, mode="train", num_batches=2, **TIGHT)
    values = monitor.measure(trainer, module).values
    hessians = []
    for index, batch in enumerate(monitor._probe._batches):
        other = copy.deepcopy(module).train()
        with seeded(mixed_seed(0, "pass", index, 0)):
            hessians.append(cases.dense_hessian(other.loss(batch), trained_parameters(other)))
    assert_numbers(values, sum(hessians) / 2)


def test_quantities_of_both_modes_begin_with_the_same_buffers() -> None:
    module = Moving()
    trainer = trained(module)
    alone = Numbers(quantities=["stability"], **TIGHT).measure(trainer, module).values
    after = Numbers(quantities=["stability", "lambda_max"], **TIGHT).measure(trainer, module).values
    assert after[tags.RATIO] == alone[tags.RATIO]


class OneGraph(Module):
    """Looks whether the graphs of the passes before are still there."""

    def loss(self, batch: Any) -> Tensor:
        assert not any(graph() is not None for graph in self.graphs)
        x = self.net(batch[0])
        self.graphs.append(weakref.ref(x))
        return F.cross_entropy(x, batch[1])


@pytest.mark.parametrize("num_batches", [1, 2])
def test_there_is_one_graph_at_a_time(num_batches: int) -> None:
    module = OneGraph()
    module.graphs = cases.Notes()
    trainer = trained(module)
    module.graphs.clear()
    wanted = set(cases.BARE) - {"spectral_density"}
    few = {"max_vectors": 2, "max_iterations": 3}
    result = SharpnessMonitor(quantities=wanted, num_batches=num_batches, **few).measure(trainer, module)
    assert not result.skipped
    # one forward pass for all products in a mode, one for both Fishers; three, five and three for the gaps
    assert (len(module.graphs) == 1 + 1 + 1 + 3 + 5 + 3) is (num_batches == 1)


class Graphs:
    """A batch of the user's own kind, as in graph libraries."""

    def __init__(self, samples: list[Any]) -> None:
        self.x, self.y = (torch.stack(part) for part in zip(*samples, strict=True))
        self.sizes = [len(samples)]


class EditsTheBatch(Module):
    """Changes its batch in place, in every way."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, Graphs):
            x, y = batch.x, batch.y
            batch.sizes.append(0)
            x *= batch.sizes[0]
            batch.sizes[0] += 1
        else:
            x, y = batch["pair"]
            x *= 1.0 + len(batch["names"])
            batch["names"].append("seen")
            batch["pair"][1] = y + 1
        x += 1
        return F.cross_entropy(self.net(x), y % CLASSES)


@pytest.mark.parametrize("moved", [False, True], ids=["drawn", "recorded"])
@pytest.mark.parametrize("kind", ["dict", "object"])
def test_a_step_that_edits_its_batch_does_not_change_the_probe(kind: str, moved: bool) -> None:
    def collate(samples: list[Any]) -> Any:
        batch = Graphs(samples)
        return batch if kind == "object" else {"pair": [batch.x, batch.y], "names": ["a"]}

    module = EditsTheBatch()
    sampler = Shuffled(data()) if moved else None
    train = DataLoader(data(), batch_size=8, collate_fn=collate, sampler=sampler)
    monitor = Numbers(every_n_epochs=None, quantities=HESSIAN, **TIGHT)
    trainer = trained(module, train, callbacks=[monitor])
    assert monitor._recording is False
    assert len(monitor._probe) == 1 if moved else monitor._probe is None
    first = monitor.measure(trainer, module)
    second = monitor.measure(trainer, module)
    assert not first.skipped
    assert first.values == second.values
    batch = copy.deepcopy(monitor._probe._batches[0])
    original = batch.x if kind == "object" else batch["pair"][0]
    assert any(torch.equal(original[0], x) for x in data().tensors[0])
    assert_numbers(first.values, cases.dense_hessian(module.training_step(batch, 0), trained_parameters(module)))


# Precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_measured_in_single_precision(precision: str) -> None:
    class Single(Module):
        dtype_of_data = torch.float32

    train = cases.loader(data(16, torch.float32), 8)
    first, second = Single(), Single()
    trainer = trained(first, train, precision=precision)
    other = trained(second, train)
    second.load_state_dict(first.state_dict())
    quantities = [*HESSIAN, "trace_fisher", "ascent_gap"]
    values = Numbers(quantities=quantities, **TIGHT).measure(trainer, first).values
    assert values == Numbers(quantities=quantities, **TIGHT).measure(other, second).values


def test_double_precision() -> None:
    module = Module()
    values, batch, said = measured(module, train=cases.loader(data(16, torch.float32), 8), precision="64-true")
    assert not said
    assert batch[0].dtype == torch.float32  # the precision plugin converts at every use
    batch = [batch[0].double(), batch[1]]
    assert_numbers(values, cases.dense_hessian(module.loss(batch), trained_parameters(module)), 1e-9)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision(precision: str) -> None:
    """Numbers are near those of a float64 copy of the weights."""

    class Half(Module):
        dtype_of_data = torch.float32

    module = Half()
    monitor = Numbers(quantities=[*HESSIAN, "trace_fisher", "spectral_density"], **{**TIGHT, "tolerance": 0.01})
    values, batch, said = measured(module, monitor, cases.loader(data(16, torch.float32), 8), precision=precision)
    assert not said
    assert all(math.isfinite(value) for value in values.values())
    other = Module(copy.deepcopy(module.net))
    hessian = cases.dense_hessian(other.loss([batch[0].double(), batch[1]]), trained_parameters(other))
    assert values[tags.LAMBDA_MAX] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.05)
    density = monitor.last.density
    assert abs(density.mean - float(hessian.trace()) / len(hessian)) < 4 * density.stderr


# Where the probe comes from


class Shuffled(Sampler):
    """A sampler of the user's own: there is no telling which indices it gives."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self.dataset)).tolist())

    def __len__(self) -> int:
        return len(self.dataset)


class Numbered(Dataset):
    """Every sample tells its number; with random augmentation on request."""

    def __init__(self, size: int = 20, augmented: bool = False) -> None:
        self.size, self.augmented = size, augmented

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        x = torch.full((FEATURES,), float(index))
        if self.augmented:
            x[1:] += torch.rand(FEATURES - 1) + float(np.random.rand()) + random.random()
        return x, index % CLASSES


class Sees(Classifier):
    """Keeps the batches that its step gets, in measurements and in training."""

    inside = False

    def __init__(self, **hooks: Any) -> None:
        super().__init__()
        self.seen = cases.Notes()
        self.trained = cases.Notes()
        vars(self).update(hooks)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (self.seen if self.inside else self.trained).append(copy.deepcopy(batch))
        first = batch["a"] if isinstance(batch, dict) else batch[0] if isinstance(batch[0], (list, tuple)) else batch
        return F.cross_entropy(self.net(first[0].reshape(-1, FEATURES) / 20), torch.as_tensor(first[1]).reshape(-1))


class Looks(SharpnessMonitor):
    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        module.inside = True
        try:
            return super().measure(trainer, module)
        finally:
            module.inside = False


def probed(
    train: Any, module: Sees | None = None, monitor: Any = None, start: int = 3, **kwargs: Any
) -> tuple[list[Tensor], Sees, Any]:
    """The x of the probe's batches as the step gets them, in a run that measures after its second step."""
    module = Sees() if module is None else module
    settings = {"every_n_steps": 2, "every_n_epochs": None, "quantities": ["ascent_gap"]}
    looks = Looks(**settings | (monitor or {}))
    trainer = cases.trainer([looks], max_steps=3, max_epochs=-1, **kwargs)
    cases.seed_all(start)
    trainer.fit(
        module, **({"datamodule": train} if isinstance(train, pl.LightningDataModule) else {"train_dataloaders": train})
    )
    count = len(module.seen) // 3  # the gap takes three evaluations of each batch
    assert not looks.last.skipped
    assert len(module.seen) == 3 * count > 0
    for index in range(count):  # gradient, loss, and loss at the end of the climb
        for again in (1, 2):
            assert not list(cases.differences(module.seen[index], module.seen[index + again * count]))
    return (
        [next(iter(batch.values() if isinstance(batch, dict) else batch)) for batch in module.seen[:count]],
        module,
        looks,
    )


def flat_list(lists: list[list[int]]) -> list[int]:
    return [number for one in lists for number in one]


def numbers(batches: list[Tensor]) -> list[list[int]]:
    return [[round(value) for value in x[:, 0].tolist()] for x in batches]


def test_the_probe_is_a_random_part_of_the_data_that_a_seed_decides() -> None:
    train = DataLoader(Numbered(), batch_size=4, shuffle=True)
    plain = Sees()
    cases.seed_all(3)
    cases.trainer(max_steps=3, max_epochs=-1).fit(plain, DataLoader(Numbered(), batch_size=4, shuffle=True))
    first, module, _ = probed(train, monitor={"num_batches": 2})
    assert not list(cases.differences(module.trained, plain.trained))  # the loader's own order is not disturbed
    assert [len(x) for x in first] == [4, 4]
    drawn = flat_list(numbers(first))
    assert len(set(drawn)) == 8
    assert drawn != sorted(drawn)
    assert numbers(probed(train, monitor={"num_batches": 2})[0]) == numbers(first)
    others = [numbers(probed(train, monitor={"num_batches": 2, "seed": seed})[0]) for seed in (1, 2)]
    assert numbers(first) not in others
    assert others[0] != others[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_is_drawn_once_and_the_training_stream_is_untouched(workers: int) -> None:
    def train() -> DataLoader:
        return DataLoader(Numbered(augmented=True), batch_size=4, shuffle=True, num_workers=workers)

    plain = Sees()
    cases.seed_all(3)
    cases.trainer(max_steps=3, max_epochs=-1).fit(plain, train())
    first, module, _ = probed(train())
    assert not list(cases.differences(module.trained, plain.trained))
    assert bool((first[0][:, 1] != first[0][:, 0]).all())
    assert torch.equal(probed(train(), start=4)[0][0], first[0])
    assert not torch.equal(probed(train(), monitor={"seed": 1})[0][0][:, 1], first[0][:, 1])


@pytest.mark.parametrize(
    ("samples", "size", "settings", "shape"),
    [
        (20, 4, {}, [4]),
        (3, 8, {}, [3]),  # less than one batch
        (20, 8, {"num_batches": 9}, [8, 8]),  # more batches than there are
        (20, 4, {"batch_size": 7, "num_batches": 2}, [7, 7]),
        (20, 4, {"batch_size": 50}, [20]),
        (1, 1, {}, [1]),
    ],
)
def test_sizes(samples: int, size: int, settings: dict[str, int], shape: list[int]) -> None:
    batches, _, monitor = probed(DataLoader(Numbered(samples), batch_size=size), monitor=settings)
    assert [len(x) for x in batches] == shape
    assert len(set(flat_list(numbers(batches)))) == sum(shape)
    assert monitor._probe.samples == shape[0]


def test_a_subset_sampler_gives_the_allowed_samples() -> None:
    allowed = [1, 3, 5, 7, 9, 11]
    train = DataLoader(Numbered(), batch_size=2, sampler=SubsetRandomSampler(allowed))
    batches, _, _ = probed(train, monitor={"num_batches": 3})
    assert sorted(flat_list(numbers(batches))) == allowed


def test_loaders_that_do_not_batch() -> None:
    """Every item of the dataset is a batch."""
    train = DataLoader(Numbered(), batch_size=None, shuffle=True)
    batches, module, _ = probed(train, monitor={"num_batches": 3, "batch_size": 5})
    assert [x.shape for x in batches] == [(FEATURES,)] * 3
    assert len({float(x[0]) for x in batches}) == 3
    assert module.trained[0][0].shape == (FEATURES,)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(20).tolist()
        yield from (Numbered()[index] for index in order)


class Rewritten(DataLoader):
    """Gives something else than its dataset holds."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield x + 100, y


class Batches:
    """An iterable of batches, no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(5):
            yield [torch.full((2, FEATURES), float(index)), torch.zeros(2, dtype=torch.long)]


class EveryOther(BatchSampler):
    pass


def own_sampler() -> Any:
    return DataLoader(Numbered(), batch_size=4, sampler=Shuffled(Numbered()))


RECORDED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "own sampler": (own_sampler, {}),
    "weighted sampler": (
        lambda: DataLoader(Numbered(), batch_size=4, sampler=WeightedRandomSampler([0.0, 1.0] * 10, 20)),
        {},
    ),
    "own batch sampler": (
        lambda: DataLoader(Numbered(), batch_sampler=EveryOther(RandomSampler(Numbered()), 4, False)),
        {},
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), {}),
    "own loader": (lambda: Rewritten(Numbered(), batch_size=4, shuffle=True), {}),
    "no loader": (lambda: Batches(), {}),
    "overfit": (lambda: DataLoader(Numbered(), batch_size=4, shuffle=True), {"overfit_batches": 3}),
    "combined": (
        lambda: CombinedLoader([DataLoader(Numbered(), 4, shuffle=True), DataLoader(Numbered(9), 2)], "max_size_cycle"),
        {},
    ),
    "dict": (lambda: {"a": DataLoader(Numbered(), 4, shuffle=True), "b": DataLoader(Numbered(9), 2)}, {}),
}


class Adds(Sees):
    """Transfer hooks that draw, and whose effect would add up."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return apply_to_collection(batch, Tensor, lambda x: x + 1000 if x.is_floating_point() else x)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return apply_to_collection(batch, Tensor, lambda x: x * 2 + torch.rand(()) if x.is_floating_point() else x)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("num_batches", [1, 2])
def test_the_first_batches_of_training_where_data_cannot_be_drawn(name: str, num_batches: int) -> None:
    """Exactly what `training_step` got, after the transfer; the run itself is not disturbed."""
    make, settings = RECORDED[name]
    plain = Adds()
    cases.seed_all(3)
    cases.trainer(max_steps=3, max_epochs=-1, **settings).fit(plain, make())
    _, module, _ = probed(make(), Adds(), {"num_batches": num_batches}, **settings)
    assert not list(cases.differences(module.trained, plain.trained))
    assert not list(cases.differences(module.seen[:num_batches], module.trained[:num_batches]))
    assert len(module.seen) == 3 * num_batches


def test_transfer_hooks_run_with_fixed_draws_at_every_use() -> None:
    module = Adds()
    (x,), _, monitor = probed(DataLoader(Numbered(), batch_size=4, shuffle=True), module)
    raw = monitor._probe._batches[0][0]
    noise = x - 2 * (raw + 1000)
    assert bool((noise > 0).all())
    assert float(noise.max() - noise.min()) < 1e-3
    assert float(noise.max()) < 1


class Data(pl.LightningDataModule):
    def __init__(self, own: bool) -> None:
        super().__init__()
        if own:
            self.probe_dataloader = plain_data

    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(augmented=True), batch_size=4, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] - 1, batch[1]]


def plain_data() -> Any:
    torch.rand(3)
    return DataLoader(Numbered(6), batch_size=3, shuffle=False)


def test_a_probe_dataloader_of_the_datamodule_or_the_module() -> None:
    (x,), module, _ = probed(Data(own=True))
    plain = Sees()
    cases.seed_all(3)
    cases.trainer(max_steps=3, max_epochs=-1).fit(plain, datamodule=Data(own=False))
    assert not list(cases.differences(module.trained, plain.trained))  # nor does the method draw from the run's stream
    assert x.shape == (3, FEATURES)
    assert torch.equal(x, (x[:, :1]).expand(3, FEATURES))  # no augmentation
    assert set(x[:, 0].tolist()) < {-1.0, 0.0, 1.0, 2.0, 3.0, 4.0}  # after the datamodule's hook
    both, _, _ = probed(Data(own=True), Sees(probe_dataloader=Batches))
    assert torch.equal(both[0], x)  # the datamodule's
    batches, _, _ = probed(DataLoader(Numbered(), 4), Sees(probe_dataloader=Batches), {"num_batches": 2})
    assert [x[:, 0].tolist() for x in batches] == [[0.0, 0.0], [1.0, 1.0]]


def test_no_data_for_the_probe() -> None:
    module = Sees(probe_dataloader=lambda: DataLoader(Numbered(0), 4))
    monitor = SharpnessMonitor(quantities=["ascent_gap", "trace_hessian"])
    with cases.monitor_warnings() as said:
        result = monitor.measure(trained(module, DataLoader(Numbered(), 4)), module)
    assert result.values == {}
    assert said == ["SharpnessMonitor skips everything: the data for the probe is empty"]
