"""The callback on a CUDA device: overflows, random streams, fused optimizers, streams, graphs, synchronizations."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import sharded_script
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from modules import Classifier, Net, sgd
from torch import Tensor, nn

from lightning_ire import IRE, SAM, EmpiricalFisher, RandomMask, SampledFisher, SecondMoment, tags
from lightning_ire.functional import flat_masks, flat_threshold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
CURVATURES: list[Callable[[], Any]] = [SampledFisher, EmpiricalFisher, SecondMoment, RandomMask]


def fit(module: Classifier, callbacks: list[Any], **kwargs: Any) -> Any:
    return cases.fit(module, callbacks, accelerator=DEVICE, **kwargs)


def half(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=scale, growth_interval=5))


def adam(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, **options)


SHARDED = ["sam-sampled", "average-sam-sampled", "second-moment", "hessian", "validated-sam", "kept-after-backward"]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_models_equal_whole_ones(name: str, tmp_path: Path) -> None:
    """FSDP2 and NCCL on every GPU there is, one too: moves of shards against all-gathers on other streams."""
    count = torch.cuda.device_count()
    count = max(size for size in (1, 2, 3, 4) if size <= count)
    found = cases.two_processes("sharded_script.py", tmp_path, str(count), f"{name}@gpu", processes=count)
    alone = sharded_script.run(name, 1, accelerator="gpu")
    for rank in found:
        assert cases.same_bits(rank[f"{name}@gpu"]["weights"], found[0][f"{name}@gpu"]["weights"])
    torch.testing.assert_close(found[0][f"{name}@gpu"]["weights"], alone["weights"], rtol=1e-11, atol=1e-12)
    for key, mask in alone["masks"].items():
        assert torch.equal(found[0][f"{name}@gpu"]["masks"][key], mask)


def test_sharded_models_in_bfloat16_stay_finite(tmp_path: Path) -> None:
    (found,) = cases.two_processes("sharded_script.py", tmp_path, "1", "sam-sampled@gpu-bf16", processes=1)
    assert torch.isfinite(found["sam-sampled@gpu-bf16"]["weights"]).all()


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [half(2.0**10)]},
    "fp16-overflows": lambda: {"plugins": [half(2.0**30)]},
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forced_second_pass_at_rho_0_changes_nothing(precision: str, accumulate: int) -> None:
    """The dropout of the second pass is that of the first, BatchNorm moves once, the scaler sees one step."""
    loop = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    torch.manual_seed(0)
    plain = Classifier(Net(batch_norm=True, dropout=0.2))
    forced = cases.clone(plain)
    first = fit(plain, [], **loop, **PRECISIONS[precision]())
    after = torch.cuda.get_rng_state()
    second = fit(forced, [IRE(kappa=0, perturbation=SAM(0.0))], **loop, **PRECISIONS[precision]())
    cases.assert_same_bits(plain, forced)
    assert torch.equal(after, torch.cuda.get_rng_state())
    assert first.global_step == second.global_step
    assert forced.calls == 2 * plain.calls
    if "fp16" in precision:
        assert first.precision_plugin.scaler.get_scale() == second.precision_plugin.scaler.get_scale()


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_new_masks_leave_the_random_streams_alone(precision: str, curvature: Any) -> None:
    """With a strength of next to nothing the run is the plain one."""
    torch.manual_seed(0)
    plain = Classifier(Net(dropout=0.2), optimizer=adam())
    watched = cases.clone(plain)
    fit(plain, [], **PRECISIONS[precision]())
    after = torch.cuda.get_rng_state()
    fit(watched, [IRE(kappa=1e-30, interval=1, curvature=curvature())], **PRECISIONS[precision]())
    cases.assert_same_bits(plain, watched)
    assert torch.equal(after, torch.cuda.get_rng_state())


class Watched(Callback):
    """Weights before and after one step."""

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.after = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


OPTIMIZERS = {
    "sgd": sgd,
    "sgd-fused": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": adam(foreach=False),
    "adamw-foreach": adam(foreach=True),
    "adamw-fused": adam(fused=True),
    "adamw-capturable": adam(capturable=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_is_that_of_the_base_optimizer_times_one_plus_kappa(optimizer: str) -> None:
    torch.manual_seed(0)
    plain = Classifier(Net(), optimizer=OPTIMIZERS[optimizer])
    boosted = cases.clone(plain)
    one = {"max_epochs": 1, "limit_train_batches": 1}
    base, ours = Watched(), Watched()
    fit(plain, [base], **one)
    ire = IRE(kappa=2.0, gamma=0.7)
    fit(boosted, [ire, ours], **one)
    masks = ire._progress.masks.masks
    assert {mask.device.type for mask in masks.values()} == {DEVICE}
    assert 0.6 < sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()) < 0.8
    for name, old in base.before.items():
        expected = old + (1 + 2.0 * masks[name]) * (base.after[name] - old)
        torch.testing.assert_close(ours.after[name], expected)


@pytest.mark.parametrize("exclude_zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_threshold_and_masks_are_those_of_the_cpu(dtype: torch.dtype, exclude_zero: bool) -> None:
    """Little data, and more than is looked at together."""
    torch.manual_seed(0)
    for sizes in ([(7,), (3, 5)], [(1 << 24) + 3, 1001, (512, 1023)]):
        values = [torch.randn(size).to(dtype) for size in sizes]
        values[0][:2] = 0
        there = [value.to(DEVICE) for value in values]
        options = {"exclude_zero": exclude_zero}
        threshold = flat_threshold(there, 0.8, **options)
        assert threshold.device.type == DEVICE
        assert torch.equal(threshold.cpu(), flat_threshold(values, 0.8, **options))
        pairs = zip(flat_masks(there, 0.8, **options), flat_masks(values, 0.8, **options), strict=True)
        assert all(torch.equal(mask.cpu(), expected) for mask, expected in pairs)


def same_net_twice(optimizer: Any = sgd) -> tuple[Classifier, Classifier]:
    torch.manual_seed(0)
    module = Classifier(Net(batch_norm=True, dropout=0.2), optimizer=optimizer)
    return module, cases.clone(module)


def test_in_a_stream_of_its_own() -> None:
    default, other = same_net_twice(adam(fused=True))
    settings: dict[str, Any] = {"kappa": 2.0, "interval": 2}
    fit(default, [IRE(**settings, perturbation=SAM(0.05))])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fit(other, [IRE(**settings, perturbation=SAM(0.05))])
    stream.synchronize()
    cases.assert_same_bits(default, other)


class Waits(Callback):
    """How often the host waits for the device, batch by batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.recording = warnings.catch_warnings(record=True)
        self.caught = self.recording.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.recording.__exit__(None, None, None)
        self.counts.append(sum("synchronizing" in str(one.message) for one in self.caught))


@pytest.mark.parametrize("perturbation", [None, SAM(0.05)])
def test_a_kept_step_never_waits_for_the_device(perturbation: Any) -> None:
    """Beside the steps whose masks are new, and those that are logged, a batch waits as often as without."""
    plain, ours = same_net_twice(adam())
    rare = {"log_every_n_steps": 1000, "max_epochs": 1}
    expected, found = Waits(), Waits()
    fit(plain, [expected], **rare)
    fit(ours, [IRE(kappa=1.0, interval=4, perturbation=perturbation), found], **rare)
    kept = [index for index in range(2, len(found.counts)) if index % 4]
    assert [found.counts[index] for index in kept] == [expected.counts[index] for index in kept]


@pytest.mark.parametrize("perturbation", [None, SAM(0.05)])
def test_networks_that_run_as_cuda_graphs(perturbation: Any) -> None:
    """`mode="reduce-overhead"`: a replay overwrites what the last one returned, and nobody reads that again."""
    eager, graphs = same_net_twice()
    eager.net[3].p = graphs.net[3].p = 0.0
    graphs.net.compile(mode="reduce-overhead", dynamic=False)
    settings: dict[str, Any] = {"kappa": 1.0, "interval": 3, "curvature": RandomMask()}
    for module in (eager, graphs):
        fit(module, [IRE(**settings, perturbation=perturbation)])
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(graphs.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_an_estimate_of_a_network_that_runs_as_cuda_graphs() -> None:
    eager, graphs = same_net_twice()
    eager.net[3].p = graphs.net[3].p = 0.0
    graphs.net.compile(mode="reduce-overhead", dynamic=False)
    one = {"max_epochs": 1, "limit_train_batches": 3, "log_every_n_steps": 1}
    values: list[Tensor] = []
    for module in (eager, graphs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a forward pass of its own is needed
            trainer = fit(module, [IRE(kappa=1.0, interval=1)], **one)
        values.append(trainer.callback_metrics[tags.THRESHOLD])
    assert float(values[1]) == pytest.approx(float(values[0]), rel=0.05)


class Captures(Classifier):
    """A manual module whose optimizer steps inside a graph."""

    def __init__(self) -> None:
        super().__init__(optimizer=adam(capturable=True))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


def test_an_optimizer_step_inside_a_graph_is_refused() -> None:
    with pytest.raises(Exception, match="CUDA graph"):
        fit(Captures(), [IRE(kappa=1.0, curvature=EmpiricalFisher())])
