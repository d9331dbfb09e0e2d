"""What a pass of SAM, of an estimate or of the monitor changes in a module is put back; who can tell such a pass."""

import contextvars
import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import threading
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import cases
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from lightning.pytorch.loops.optimization.automatic import Closure
from modules import Classifier, Manual, Net, TakesTheIterator, sgd
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ire import (
    IRE,
    SAM,
    AverageSAM,
    ConfigurationError,
    EmpiricalFisher,
    HutchinsonHessian,
    SampledFisher,
    SecondMoment,
    SharpnessMonitor,
    in_extra_pass,
)
from lightning_ire.engine._torch import extra_pass
from lightning_ire.engine.module_state import MovingWeights, modules_of, weights_of

FRACTION = {"kappa": 1e-3, "interval": 1, "curvature": SampledFisher(fraction=0.5)}
PASSES: dict[str, Callable[[], pl.Callback]] = {
    "SAM": lambda: IRE(kappa=0.0, perturbation=SAM(0.0)),
    "fraction": lambda: IRE(**FRACTION),
    "monitor": lambda: SharpnessMonitor(every_n_steps=3, quantities=["lambda_max", "trace_fisher"], max_vectors=2),
}


def states(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# weights that the module moves


def in_place(key: nn.Module, query: nn.Module) -> None:
    for k, q in zip(key.parameters(), query.parameters(), strict=True):
        k.lerp_(q, 0.1)


def by_data(key: nn.Module, query: nn.Module) -> None:
    """As the authors of momentum contrast write it: no counter of torch's sees it."""
    for k, q in zip(key.parameters(), query.parameters(), strict=True):
        k.data = k.data * 0.9 + q.data * 0.1


def in_data(key: nn.Module, query: nn.Module) -> None:
    for k, q in zip(key.parameters(), query.parameters(), strict=True):
        k.data.mul_(0.9).add_(q.data, alpha=0.1)


class Momentum(Classifier):
    """Momentum contrast: a frozen copy follows the network inside `training_step`."""

    def __init__(self, move: Callable[[nn.Module, nn.Module], None] = in_place, hidden: bool = False) -> None:
        super().__init__(Net(batch_norm=True))
        key = copy.deepcopy(self.net).requires_grad_(False)
        self.move, self.hidden = move, hidden
        self.keys = [key] if hidden else nn.ModuleList([key])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.move(self.keys[0], self.net)
            target = self.keys[0](batch[0]).softmax(-1)
        return F.cross_entropy(self.net(batch[0]), target) + F.cross_entropy(self.net(batch[0]), batch[1])

    def states(self) -> dict[str, Tensor]:
        return states(self) | {f"keys.{name}": value.clone() for name, value in self.keys[0].state_dict().items()}


class ManualMomentum(Momentum):
    """The same in manual optimization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(ManualMomentum, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("hidden", [False, True], ids=["registered", "in a list"])
@pytest.mark.parametrize("move", [in_place, by_data, in_data])
@pytest.mark.parametrize("passes", PASSES)
def test_weights_that_the_step_moves_move_once(passes: str, move: Callable[..., None], hidden: bool) -> None:
    """With an estimate, whose boost changes the weights after the first step, one step is compared."""
    ends = []
    for callbacks in ([], [PASSES[passes]()]):
        torch.manual_seed(0)
        module = Momentum(move, hidden)
        cases.fit(module, callbacks, max_epochs=1, max_steps=1 if passes == "fraction" else 7)
        ends.append(module.states())
    if passes == "fraction":
        ends = [{name: value for name, value in end.items() if "net" not in name} for end in ends]
    assert not list(cases.differences(*ends))


@pytest.mark.parametrize(("kind", "loop"), [(Momentum, {"accumulate_grad_batches": 2}), (ManualMomentum, {})])
def test_they_start_where_the_first_pass_did(kind: type[Momentum], loop: dict[str, Any]) -> None:
    ends = []
    for callbacks in ([], [PASSES["SAM"]()]):
        torch.manual_seed(0)
        module = kind()
        cases.fit(module, callbacks, max_epochs=1, **loop)
        ends.append(module.states())
    assert not list(cases.differences(*ends))


class Prototypes(Classifier):
    """SwAV: trained weights that every step puts back on the sphere first; and a backbone larger than what trains."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 64).requires_grad_(False), nn.Linear(64, 4, bias=False)))
        self.net[0].requires_grad_(False)
        self.register_parameter("teacher", nn.Parameter(torch.zeros(4), requires_grad=False))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net[1].weight.mul_(1.5)  # not idempotent, so that one more shows
            self.teacher += 1
        return super().training_step(batch, batch_idx)


def test_what_a_training_pass_was_seen_to_change_is_put_back_beside_a_large_frozen_backbone() -> None:
    ends = []
    for callbacks in ([], [IRE(**FRACTION)]):
        torch.manual_seed(0)
        module = Prototypes()
        module.make_optimizer = lambda m: torch.optim.SGD(m.net[1].parameters(), lr=0.0)
        cases.fit(module, callbacks, max_epochs=1)
        ends.append(states(module))
    assert not list(cases.differences(*ends))


class Teacher(Classifier):
    """DINO's own form of the teacher, which may require a gradient, beside a backbone or not."""

    def __init__(self, frozen: bool, backbone: bool) -> None:
        super().__init__(optimizer=lambda m: torch.optim.SGD(m.net.parameters(), lr=0.1))
        self.teacher = copy.deepcopy(self.net).requires_grad_(not frozen)
        self.backbone = nn.Linear(100, 100).requires_grad_(False) if backbone else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        in_data(self.teacher, self.net)
        with torch.no_grad():
            aim = self.teacher(batch[0]) + 1
        return F.mse_loss(self.net(batch[0]), aim)


@pytest.mark.parametrize("passes", ["SAM", "monitor"])
@pytest.mark.parametrize(("frozen", "backbone"), [(False, False), (True, True), (False, True)])
def test_a_teacher_of_any_kind_moves_once(frozen: bool, backbone: bool, passes: str) -> None:
    ends = []
    for callbacks in ([], [PASSES[passes]()]):
        torch.manual_seed(0)
        module = Teacher(frozen, backbone)
        cases.fit(module, callbacks, max_epochs=1)
        ends.append(states(module))
    assert not list(cases.differences(*ends))


class Rearranged(Classifier):
    """Weights that the step moves in every other way, and what it makes itself; a teacher that the loss depends on."""

    HOWS = (
        "assign", "parameter", "module", "dictionary", "in the optimizer", "data in the optimizer", "noise", "decay",
        "clamp", "buffer", "parameter that is none", "registered", "shadow", "modules", "generator in an object",
        "slots", "teacher in an object", "array", "parameters in a list", "called", "hook", "pruned",
    )  # fmt: skip

    def __init__(self, how: str) -> None:
        super().__init__(
            Net(batch_norm=True), lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        )
        self.how = how
        self.key = copy.deepcopy(self.net).requires_grad_(how.endswith("optimizer"))
        self.entries = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(4), requires_grad=False)})
        self.register_buffer("center", None)
        self.register_parameter("shift", None)
        self.shadow: list[Any] = [torch.zeros(4) for _ in range(40)]
        if how == "parameters in a list":
            self.shadow = [nn.Parameter(one, requires_grad=False) for one in self.shadow]
        self.hidden = [nn.Linear(1, 4) for _ in range(40)]
        self.held = Held() if how != "slots" else Slotted()
        self.held.inner = Meter()
        self.held.stream = np.random.default_rng(0)
        self.held.values = [torch.zeros(4)]
        self.held.module = copy.deepcopy(self.net) if how == "teacher in an object" else None

    def moved(self) -> dict[str, Tensor]:
        return {name: 0.9 * value + 0.1 for name, value in self.key.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def move(self, z: Tensor) -> Tensor:
        """Do what is asked for; returns what the loss is to depend on."""
        weight = self.net[0].weight
        if self.how == "assign":
            self.key.load_state_dict(self.moved(), strict=False, assign=True)
        elif self.how == "parameter":
            self.key[0].weight = nn.Parameter(0.9 * self.key[0].weight + 0.1, requires_grad=False)
        elif self.how == "module":
            self.key = copy.deepcopy(self.key)
            in_place(self.key, self.net)
        elif self.how == "dictionary":
            self.entries["bias"] = nn.Parameter(self.entries["bias"] + 1, requires_grad=False)
            return self.entries["bias"]
        elif self.how.endswith("in the optimizer"):
            (in_data if "data" in self.how else in_place)(self.key, self.net)
        elif self.how == "noise":
            weight.add_(0.01 * torch.randn_like(weight))
        elif self.how == "decay":
            weight.mul_(0.99)
        elif self.how == "clamp":
            weight.data.clamp_(-0.1, 0.1)
        elif self.how in ("buffer", "registered", "parameter that is none"):
            return self.make(z)
        elif self.how in ("shadow", "parameters in a list"):
            for one in self.shadow:
                one.add_(1)
            return self.shadow[-1]
        elif self.how == "modules":
            self.hidden[-1].bias.data.add_(1)
            return self.hidden[-1].bias
        elif self.how == "array":
            self.shadow[0].numpy()[...] += 1
            return self.shadow[0]
        elif self.how == "generator in an object":
            return torch.from_numpy(self.held.stream.normal(size=4)).float()
        elif self.how == "hook":
            self.net[0].register_forward_hook(lambda layer, inputs, output: 1.1 * output)
        elif self.how == "pruned" and not hasattr(self.key[0], "weight_mask"):
            torch.nn.utils.prune.l1_unstructured(self.key[0], "weight", 0.5)
        elif self.how == "teacher in an object":
            in_place(self.held.module, self.net)
            return self.held.module[0].bias[:4]
        else:  # "slots", "called"
            self.held.inner.values.append(1.0)
            self.held.values[0].add_(len(self.held.inner.values))
            return self.held.values[0]
        return self.key(torch.ones(2, 6))[0]

    def make(self, z: Tensor) -> Tensor:
        """State that the first pass makes; the loss of that pass does not depend on it."""
        name = {"buffer": "center", "registered": "made", "parameter that is none": "shift"}[self.how]
        first = getattr(self, name, None) is None
        if self.how == "registered" and first:
            self.register_buffer(name, torch.zeros(4))
        elif first:
            made = torch.zeros(4)
            setattr(self, name, nn.Parameter(made, requires_grad=False) if self.how.startswith("param") else made)
        getattr(self, name).add_(z.mean(0))
        return torch.zeros(4) if first else getattr(self, name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.key.eval()
        with torch.no_grad():
            z = self.net[0](batch[0])[:, :4]
        aim = self.move(z)
        return F.cross_entropy(self.net(batch[0]) + aim, batch[1])


class Held:
    """Holds nothing but data, an object of its own among it; and can be called."""

    def __call__(self) -> None:
        raise NotImplementedError


class Slotted:
    __slots__ = ("inner", "module", "stream", "values")


@pytest.mark.parametrize("passes", cases.first_at_once(["SAM", "average", "monitor"]))
@pytest.mark.parametrize("how", Rearranged.HOWS)
def test_training_is_the_same_whatever_the_step_moves_and_makes(how: str, passes: str) -> None:
    ends = []
    for callbacks in ([], [PASSES.get(passes, lambda: IRE(kappa=0.0, perturbation=AverageSAM(0.0)))()]):
        torch.manual_seed(0)
        module = Rearranged(how)
        cases.fit(module, callbacks, max_epochs=1)
        ends.append(states(module))
    assert not list(cases.differences(*ends))


def test_weights_that_the_step_decays_are_perturbed_from_what_they_were() -> None:
    """One step of SAM by hand: W is halved in the step, so both gradients are those at W / 2 and at (W + e) / 2."""

    class Halved(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.net.weight.mul_(0.5)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    torch.manual_seed(0)
    module = Halved(nn.Linear(6, 4, bias=False), lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    start = module.net.weight.detach().clone()
    (x, y), *_ = loader = cases.loader(cases.data(8))
    cases.fit(module, [IRE(kappa=0.0, perturbation=SAM(0.5))], loader, max_epochs=1)

    def gradient(weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x @ weight.T, y), weight)[0]

    first = gradient(start / 2)
    move = 0.5 * first / first.norm()
    expected = start / 2 - 0.1 * gradient((start + move) / 2)
    torch.testing.assert_close(module.net.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_average_sam_keeps_what_the_step_does_to_its_weights() -> None:
    """The step adds 1 to every weight, whatever the random move is: the unperturbed weights have it too."""

    class Adds(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.net.weight.add_(1)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Adds(nn.Linear(6, 4), lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    start = module.net.weight.detach().clone()
    cases.fit(module, [IRE(kappa=0.0, perturbation=AverageSAM(0.5))], cases.loader(cases.data(16)), max_epochs=1)
    torch.testing.assert_close(module.net.weight.detach(), start + 2, rtol=0, atol=1e-5)


def test_a_backbone_is_not_copied_in_every_step() -> None:
    """A teacher is as large as its student; frozen weights of more are copied until it is clear which of them move."""
    module = Teacher(frozen=True, backbone=True)
    optimizer = module.make_optimizer(module)
    moving, weights = MovingWeights([optimizer]), weights_of(modules_of(module))
    assert len(moving.parameters(weights)) == 6
    assert moving.offload, "in host memory"
    for _ in range(3):
        with moving.watched(weights), torch.no_grad():
            in_data(module.teacher, module.net)
            for parameter in module.net.parameters():
                parameter += 1
        moving.parameters(weights)
    teacher = {id(parameter) for parameter in module.teacher.parameters()}
    assert {id(parameter) for parameter in moving.parameters(weights, trained=False)} == teacher
    assert {id(parameter) for parameter in moving.parameters(weights)} == teacher | {
        id(p) for p in module.net.parameters()
    }
    assert not moving.offload
    student = Momentum()
    few = MovingWeights([sgd(student)]).parameters(weights_of(modules_of(student)))
    assert {id(parameter) for parameter in few} == {id(parameter) for parameter in student.keys.parameters()}


# Python attributes


class Meter:
    """An average, as training scripts have it."""

    def __init__(self) -> None:
        self.total, self.count, self.values = 0.0, 0, []

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.values.append(value)


class Keeps(Classifier):
    """Keeps what it has seen in each of the ways that modules do; a BatchNorm and random numbers of its own besides."""

    def __init__(self) -> None:
        super().__init__(Net(batch_norm=True, dropout=0.2))
        self.outputs: list[Tensor] = []
        self.metrics = {"accuracy": MulticlassAccuracy(4, average="micro"), "more": [MulticlassAccuracy(4)]}
        self.by_class: dict[int, list[float]] = {}
        self.window: deque[float] = deque(maxlen=5)
        self.labels: Counter[int] = Counter()
        self.known: set[int] = set()
        self.histogram = np.zeros(4)
        self.running = torch.zeros(2)
        self.meter = Meter()
        self.streams = [torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3)]
        self.last: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        generator, numpy, python = self.streams
        noise = torch.randn(x.shape, generator=generator) + float(numpy.normal()) + python.gauss(0, 1)
        z = self.net(x + 0.1 * noise)
        loss = F.cross_entropy(z, y)
        value = float(loss.detach())
        self.outputs.append(loss.detach())
        self.metrics["accuracy"].update(z, y)
        self.metrics["more"][0].update(z, y)
        for label in y.tolist():
            self.by_class.setdefault(label, []).append(value)
            self.labels[label] += 1
            self.known.add(label)
            self.histogram[label] += 1
        self.window.append(value)
        self.running.mul_(0.9).add_(value)
        self.meter.update(value)
        self.last = loss.detach()
        return loss

    def notes(self) -> Any:
        metrics = (self.metrics["accuracy"], *self.metrics["more"])
        counts = [[int(metric._update_count), metric.tp.tolist(), metric.fn.tolist()] for metric in metrics]
        return (
            torch.stack(self.outputs).tolist(), counts, self.by_class, list(self.window), dict(self.labels), self.known,
            self.histogram.tolist(), self.running.tolist(), vars(self.meter), float(self.last),
            self.streams[0].get_state().tolist(), self.streams[1].bit_generator.state, self.streams[2].getstate(),
        )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("passes", PASSES)
def test_what_a_module_keeps_in_attributes_is_what_training_showed_it(passes: str, accumulate: int) -> None:
    notes, ends = [], []
    for callbacks in ([], [PASSES[passes]()]):
        torch.manual_seed(0)
        module = Keeps()
        steps = 1 if passes == "fraction" else 4  # its boost changes the second loss
        cases.fit(module, callbacks, max_epochs=1, max_steps=steps, accumulate_grad_batches=accumulate)
        notes.append(module.notes())
        ends.append(states(module))
    assert notes[0] == notes[1]
    if passes != "fraction":
        assert not list(cases.differences(*ends))


class Annealed(Classifier):
    """A hook sets what the step uses, a new one before every micro-batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weight = {"loss": 1.0 + batch_idx}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight["loss"] * super().training_step(batch, batch_idx)


def test_a_replay_sees_the_attributes_of_its_micro_batch() -> None:
    ends = []
    for callbacks in ([], [PASSES["SAM"]()]):
        torch.manual_seed(0)
        module = Annealed()
        cases.fit(module, callbacks, max_epochs=1, accumulate_grad_batches=4)
        ends.append(states(module))
    assert not list(cases.differences(*ends))


class Counts(Classifier):
    """Numbers are left alone, so that a module can count its passes; what is too large cannot be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0
        self.many = list(range(100_001))
        self.large = torch.zeros(1 << 24).expand(2, -1).contiguous().view(-1)[1:]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.samples += len(batch[0])
        self.many.append(0)
        self.large[0] += 1
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_put_back_is_said_once_by_its_name() -> None:
    module = Counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        cases.fit(module, [PASSES["SAM"]()], max_epochs=1)
    ours = [str(one.message) for one in caught if "An extra pass changed" in str(one.message)]
    assert sorted(text.split("`")[1] for text in ours) == [
        "Counts.calls",
        "Counts.large",
        "Counts.many",
        "Counts.samples",
    ]
    assert all("in_extra_pass()" in text for text in ours)
    assert module.samples == 2 * 64


def test_hidden_modules_are_found_once() -> None:
    module = Keeps()
    module.again = [module.net, {"deep": (nn.BatchNorm1d(2),)}]
    found = modules_of(module)
    assert len(found) == len({id(one) for one in found}) == len(list(module.modules())) + 3


# buffers that a pass resizes


class Resized(Classifier):
    """Observers of quantization-aware training are empty until they see a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.memory.numel() == 0:
            self.memory.resize_(6).zero_()
        self.memory += batch[0].mean(0)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:SampledFisher.*one by one")
@pytest.mark.parametrize(
    "ire",
    [
        {"kappa": 0.0, "perturbation": SAM(0.0)},
        {"kappa": 0.0, "perturbation": AverageSAM(0.0)},
        FRACTION,
        {"kappa": 1e-3, "curvature": SampledFisher(form="sample")},
    ],
    ids=["SAM", "AverageSAM", "fraction", "sample"],
)
def test_a_buffer_that_the_first_pass_resizes(ire: dict[str, Any]) -> None:
    memories = []
    for callbacks in ([], [IRE(**ire)]):
        module = Resized()
        cases.fit(module, callbacks, max_epochs=1)
        memories.append(module.memory.clone())
    assert torch.equal(*memories)


# who can tell such a pass


class Hooked(Classifier):
    """Collects factors in hooks of a layer, as K-FAC does, with the documented guard."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0
        self.net[0].register_forward_hook(self._forward)
        self.net[2].register_full_backward_hook(self._backward)

    def _forward(self, *_: Any) -> None:
        self.forwards += not in_extra_pass()

    def _backward(self, *_: Any) -> None:
        self.backwards += not in_extra_pass()


@pytest.mark.parametrize(
    "ire",
    [
        {"kappa": 1.0, "interval": 1},
        FRACTION,
        {"kappa": 1.0, "interval": 1, "curvature": HutchinsonHessian()},
        {"kappa": 1.0, "interval": 1, "curvature": SampledFisher(form="micro_batch", micro_batch_size=2)},
        {"kappa": 0.0, "perturbation": SAM(0.05)},
    ],
    ids=["sampled", "fraction", "hutchinson", "micro_batch", "SAM"],
)
def test_hooks_can_tell_the_passes_of_training(ire: dict[str, Any]) -> None:
    module = Hooked()
    cases.fit(module, [IRE(**ire)], max_epochs=1)
    assert (module.forwards, module.backwards) == (8, 8)


def test_an_extra_pass_is_one_of_its_own_thread_and_context() -> None:
    elsewhere: list[bool] = []
    before = contextvars.copy_context()
    with extra_pass():
        assert in_extra_pass()
        with extra_pass():
            assert in_extra_pass()
        assert in_extra_pass()
        thread = threading.Thread(target=lambda: elsewhere.append(in_extra_pass()))
        thread.start()
        thread.join()
        elsewhere.append(before.run(in_extra_pass))
    assert elsewhere == [False, False]
    assert not in_extra_pass()


class Nested(torch.autograd.Function):
    """A backward pass in a backward pass: from a depth of 60 on autograd goes on in a thread of its own."""

    seen: ClassVar[set[tuple[int, bool]]] = set()

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int) -> Tensor:
        ctx.depth = depth
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        Nested.seen.add((threading.get_ident(), in_extra_pass()))
        if ctx.depth:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                Nested.apply(x, ctx.depth - 1).sum().backward()
        return gradient, None


def told_in_threads() -> list[list[Any]]:
    """In an extra pass and outside: in how many threads hooks ran, and what they were told."""
    found = []
    for block in (extra_pass(), nullcontext()):
        Nested.seen = set()
        with block:
            Nested.apply(torch.ones(1, requires_grad=True), 70).sum().backward()
        found.append([len(Nested.seen), *{inside for _, inside in Nested.seen}])
    return found


@pytest.mark.slow
def test_threads_of_autograd_know_whose_pass_they_work_for() -> None:
    """On a GPU all hooks run in such threads. In a process of its own: after them a fork cannot go backward."""
    code = "import test_extra_pass; print(test_extra_pass.told_in_threads())"
    environment = cases.script_environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["[[2, True], [2, False]]"], done.stderr[-2000:]


class Told(Classifier):
    """Remembers what it was told in each pass."""

    def __init__(self, meet: threading.Barrier | None = None) -> None:
        super().__init__()
        self.meet = meet

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        told = in_extra_pass()
        if self.meet is not None:
            self.meet.wait(30)
        TOLD[threading.current_thread().name].append(told == in_extra_pass() == bool(told))
        PASS[threading.current_thread().name].append(told)
        return super().training_step(batch, batch_idx)


TOLD: dict[str, list[bool]] = {}
PASS: dict[str, list[bool]] = {}


def test_two_trainers_in_two_threads() -> None:
    """While one is in an extra pass, the other is not told so: each sees its own pattern."""
    meet = threading.Barrier(2)
    for name in ("SAM", "plain"):
        TOLD[name], PASS[name] = [], []
    jobs = {
        "SAM": lambda: cases.trainer([PASSES["SAM"]()], max_steps=4).fit(Told(meet), cases.loader(cases.data())),
        "plain": lambda: cases.trainer([], max_steps=8).fit(Told(meet), cases.loader(cases.data())),
    }
    threads = [threading.Thread(target=job, name=name) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert PASS == {"SAM": [False, True] * 4, "plain": [False] * 8}
    assert all(TOLD["SAM"])
    assert all(TOLD["plain"])


# copies and pickles of a module that is being trained


class Nest(Classifier):
    """A module inside that logs too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier()


def copies(module: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(module)
    yield copy.copy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


class KeepBest(pl.Callback):
    """What callbacks do that keep the best model in memory or in a file."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept = list(copies(pl_module))
        for optimizer in trainer.optimizers:
            pickle.dumps(optimizer)
            copy.deepcopy(optimizer)


@pytest.mark.parametrize("kind", [Nest, Manual])
def test_copies_and_pickles_have_the_plain_methods(kind: type[Classifier]) -> None:
    keep = KeepBest()
    for callbacks in ([], [IRE(kappa=1.0, interval=2)]):
        module = kind()
        module.make_optimizer = sgd
        cases.fit(module, [*callbacks, keep], max_epochs=1)
        for kept in keep.kept:
            attributes = {
                (type(owner).__name__, name)
                for owner in kept.modules()
                for name, value in vars(owner).items()
                if isinstance(value, types.FunctionType | types.MethodType) and name != "make_optimizer"
            }
            assert not attributes
            before = states(kept)
            cases.fit(kept, max_epochs=1)
            assert cases.moved(kept, kind()) > 0
            assert not all(torch.equal(a, b) for a, b in zip(before.values(), kept.state_dict().values(), strict=True))


def test_an_attribute_of_the_users_own_is_kept_in_copies() -> None:
    module = Classifier()
    own = types.MethodType(lambda self, batch, batch_idx: Classifier.training_step(self, batch, batch_idx), module)
    module.training_step = own  # type: ignore[method-assign]
    keep: list[Any] = []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            keep.append(copy.copy(pl_module))

    cases.fit(module, [IRE(kappa=1.0), Keep()], max_epochs=1)
    assert vars(keep[0])["training_step"] is own


# torch.compile


class Logs(Classifier):
    """Logs a few values, under names that dynamo would compile one by one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        self.log("twice", 2 * loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        GRAPHS.append(len(COMPILED))


GRAPHS: list[int] = []
COMPILED: list[Any] = []


@pytest.mark.slow
def test_nothing_is_compiled_anew_after_the_first_steps() -> None:
    """60 steps with `self.log`, IRE and SAM: the second pass runs what the first has compiled."""

    def backend(graph: Any, inputs: Any) -> Any:
        COMPILED.append(graph)
        return graph.forward

    counts = {}
    for name, ire in (("SAM", IRE(kappa=0.0, perturbation=SAM(0.05))), ("both", IRE(1.0, perturbation=SAM(0.05)))):
        torch.compiler.reset()
        GRAPHS.clear()
        COMPILED.clear()
        module = torch.compile(Logs(), backend=backend)
        cases.fit(module, [ire], max_epochs=-1, max_steps=60)  # type: ignore[arg-type]
        counts[name] = list(GRAPHS)
    COMPILED.clear()
    torch.compiler.reset()
    gc.collect()
    assert len(counts["SAM"]) == len(counts["both"]) == 60
    assert set(counts["SAM"][1:]) == {2}, "the step before and after its calls of `self.log`"
    assert len(set(counts["both"][2:])) == 1
    assert counts["both"][-1] <= 8


# what an extra pass must not say or be given


class Prints(Classifier):
    """Prints at each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.print("step", batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("passes", PASSES)
def test_self_print_prints_once(passes: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases.fit(Prints(), [PASSES[passes]()], max_epochs=1)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert printed == [f"step {index}" for index in range(8)]


@pytest.mark.parametrize("direct", [False, True], ids=["called", "its method"])
def test_an_overridden_optimizer_step_gets_lightnings_closure(direct: bool) -> None:
    class Overrides(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            assert isinstance(optimizer_closure, Closure)
            if not direct:
                optimizer.step(closure=optimizer_closure)
                return
            optimizer_closure._result = optimizer_closure.closure()
            optimizer.step()

    modules = []
    for kind in (Classifier, Overrides):
        torch.manual_seed(0)
        modules.append(kind())
        cases.fit(modules[-1], [IRE(kappa=0.0, perturbation=SAM(0.1))], max_epochs=1)
    cases.assert_same_bits(*modules)
    assert modules[1].calls == 16


@pytest.mark.parametrize("curvature", [EmpiricalFisher(), SecondMoment()], ids=str)
def test_a_step_that_takes_the_iterator_with_estimates_that_replay_nothing(curvature: Any) -> None:
    modules = []
    for kind in (Classifier, TakesTheIterator):
        torch.manual_seed(0)
        modules.append(kind(optimizer=lambda m: torch.optim.Adam(m.parameters())))
        ire = IRE(kappa=2.0, interval=2, curvature=curvature)
        cases.fit(modules[-1], [ire], max_epochs=1)
        assert ire.started_at == 0
        assert ire._progress.masks.masks
    cases.assert_same_bits(*modules)


@pytest.mark.parametrize(
    "ire", [{}, {"kappa": 0.0, "perturbation": SAM(0.1)}, FRACTION], ids=["IRE", "SAM", "fraction"]
)
def test_a_step_that_takes_the_iterator_cannot_be_replayed(ire: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="`dataloader_iter`: its batches cannot be replayed"):
        cases.fit(TakesTheIterator(), [IRE(**ire)])


# constraints


class Proximal(torch.optim.SGD):
    """Soft thresholding after the step: exact zeros."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(parameter.sign() * (parameter.abs() - 0.02).clamp(min=0))
            self.zeros = [*getattr(self, "zeros", []), (parameter, parameter == 0)]
        return loss


def test_the_zeros_of_a_proximal_step_stay() -> None:
    made: list[Proximal] = []
    survived: list[float] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            zeros = made[0].__dict__.pop("zeros")
            survived.extend(float(parameter.detach()[zero].abs().sum()) for parameter, zero in zeros)
            assert sum(int(zero.sum()) for _, zero in zeros)

    module = Classifier(optimizer=lambda m: made.append(Proximal(m.parameters(), lr=0.1)) or made[0])
    cases.fit(module, [IRE(kappa=3.0, gamma=0.9, interval=2), Look()])
    assert survived
    assert set(survived) == {0.0}


class NormsKept(Classifier):
    """A hook of the user's own after the optimizer's step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        norms = [parameter.detach().norm() for parameter in self.parameters()]

        @torch.no_grad()
        def project(*_: Any) -> None:
            for parameter, norm in zip(self.parameters(), norms, strict=True):
                parameter.mul_(norm / parameter.norm())

        self.norms = norms
        optimizer.register_step_post_hook(project)
        return optimizer


def test_a_hook_after_the_step_has_the_last_word() -> None:
    errors, modules = [], []
    for callbacks in ([], [IRE(kappa=3.0, gamma=0.9, interval=2)]):
        torch.manual_seed(0)
        module = NormsKept()
        cases.fit(module, callbacks)
        modules.append(module)
        pairs = zip(module.parameters(), module.norms, strict=True)
        errors.append(max(float((parameter.detach().norm() / norm - 1).abs()) for parameter, norm in pairs))
    assert cases.moved(*modules) > 0.01, "IRE did something"
    assert max(errors) < 1e-6
