"""What the monitor measures, in a plain PyTorch loop: the same numbers, and no trace."""

import warnings
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from modules import Exact, Net
from torch import Tensor, nn
from torch.func import functional_call, hessian

from lightning_ire import IRE, SAM, IREStep, SharpnessMonitor, measure_sharpness, tags
from lightning_ire._checks import ConfigurationError
from lightning_ire.sharpness import QUANTITIES

FEW = {"max_vectors": 4, "max_iterations": 20, "num_eigenvalues": 2}


def batches() -> Any:
    return cases.loader(cases.data(24, torch.float64))


def assert_the_numbers_of_the_monitor(settings: dict[str, Any], quantities: tuple[str, ...], mode: str) -> None:
    torch.manual_seed(0)
    theirs = Exact(Net(batch_norm=True, dropout=0.3))
    ours = cases.clone(theirs)
    start = cases.clone(ours).state_dict()
    monitor = SharpnessMonitor(quantities=quantities, num_batches=3, mode=mode, **FEW)
    train = cases.loader(cases.data(dtype=torch.float64))
    with cases.monitor_warnings():
        cases.fit(theirs, [IRE(**settings), monitor], train, max_epochs=1)
    step = IREStep(ours, ours.configure_optimizers(), **settings)
    torch.manual_seed(3)
    for batch in train:
        step(cases.loss_of(ours), batch)
    cases.assert_same_bits(ours, theirs)
    assert monitor.last is not None
    assert monitor._probe is not None
    with warnings.catch_warnings():  # the same ones
        warnings.simplefilter("ignore")
        measured = measure_sharpness(
            ours,
            cases.loss_of(ours),
            monitor._probe._batches,
            quantities,
            step=step,
            mode=mode,
            start=start,
            train_size=64,
            train_batch=8,
            **FEW,
        )
    since_start = {tags.GAP_PREDICTED} & monitor.last.values.keys()  # which one measurement does not know
    assert measured.values == {tag: value for tag, value in monitor.last.values.items() if tag not in since_start}
    assert measured.skipped == monitor.last.skipped
    assert measured.layer_traces == monitor.last.layer_traces
    assert measured.step == monitor.last.step


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_all_numbers_of_the_monitor(mode: str) -> None:
    settings = {"kappa": 2.0, "gamma": 0.7, "interval": 3}
    assert_the_numbers_of_the_monitor(settings, QUANTITIES, mode)


def test_the_numbers_of_a_step_with_sam() -> None:
    settings = {"kappa": 1.0, "interval": 3, "perturbation": SAM(0.1, adaptive=True)}
    assert_the_numbers_of_the_monitor(settings, ("stability", "lambda_max"), "eval")


def test_the_dense_hessian() -> None:
    """All of it: the trace, both ends of the spectrum, and each tensor's part of the trace."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(5, 3).double(), torch.randint(2, (5,))) for _ in range(2)]
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.stack([F.cross_entropy(functional_call(model, weights, (x,)), y) for x, y in data]).mean()

    blocks = hessian(loss)(weights)
    dense = torch.cat([torch.cat([blocks[a][b].reshape(weights[a].numel(), -1) for b in weights], 1) for a in weights])
    dense = dense.detach()
    ends = torch.linalg.eigvalsh(dense)
    measured = measure_sharpness(
        model,
        lambda batch: {"loss": F.cross_entropy(model(batch[0]), batch[1])},
        data,
        ["trace_hessian", "lambda_max", "lambda_min", "layer_traces"],
        relative_error=0.0,
        max_vectors=400,
        tolerance=1e-12,
        max_iterations=200,
    )
    assert measured.values[tags.LAMBDA_MAX] == pytest.approx(float(ends[-1]), rel=1e-8)
    assert measured.values[tags.LAMBDA_MIN] == pytest.approx(float(ends[0]), rel=1e-6)
    assert measured.values[tags.TRACE_HESSIAN] == pytest.approx(float(dense.trace()), rel=0.02)
    assert sum(measured.layer_traces.values()) == pytest.approx(measured.values[tags.TRACE_HESSIAN])


def test_it_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Exact(Net(batch_norm=True, dropout=0.3))
    data = list(batches())
    before, stream = cases.clone(model), torch.get_rng_state()
    measure_sharpness(model, cases.loss_of(model), data, mode="train", **FEW)
    cases.assert_same_bits(model, before)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_a_loss_of_ones_own_has_a_fisher_loss() -> None:
    """Of squares of outputs no targets are known; the given loss against drawn targets has the trace of its squares."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(6, 3).double()
    with pytest.warns(UserWarning, match="measure_sharpness skips trace_fisher: the loss of Linear is not made with"):
        measured = measure_sharpness(model, lambda batch: model(batch).square().mean(), [x], ["trace_fisher"])
    assert "trace_fisher" in measured.skipped
    measured = measure_sharpness(
        model,
        lambda batch: model(batch).square().mean(),
        [x],
        ["trace_fisher"],
        fisher_loss=lambda batch: ((model(batch) * torch.randn(6, 1).double()).mean(), 6),
        relative_error=0.0,
        max_vectors=4000,
    )
    value, stderr = (measured.values[tags.TRACE_FISHER + end] for end in ("", tags.STDERR))
    assert value == pytest.approx(float(x.square().sum(1).mean()), abs=4 * stderr)
    assert stderr < 0.05 * value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantities": ["sharpness"]}, "`quantities` to be one of"),
        ({"quantities": []}, "a list of names"),
        ({"batches": []}, "at least one batch, got none"),
        ({"mode": "test"}, "`mode` to be one of 'eval', 'train', got 'test'"),
        ({"max_vectors": 1}, "`max_vectors`"),
        ({"every_n_epochs": 1}, "got `every_n_epochs`: leave it out"),
        ({"hvp": "fast"}, "`hvp`"),
        ({"model": nn.ReLU()}, "parameters that require a gradient"),
    ],
)
def test_wrong_arguments_are_one_line(settings: dict[str, Any], words: str) -> None:
    model = Exact(Net(batch_norm=True, dropout=0.3))
    arguments = {"model": model, "loss_of": cases.loss_of(model), "batches": list(batches()), **settings}
    with pytest.raises(ConfigurationError, match=words) as caught:
        measure_sharpness(**arguments)
    assert "\n" not in str(caught.value)


def test_stability_needs_an_optimizer() -> None:
    model = Exact(Net(batch_norm=True, dropout=0.3))
    with pytest.warns(UserWarning, match="skips stability: there is no optimizer outside of fit"):
        measure_sharpness(model, cases.loss_of(model), list(batches()), ["stability"], **FEW)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measured = measure_sharpness(
        model,
        cases.loss_of(model),
        list(batches()),
        ["stability", "lambda_max"],
        optimizer=optimizer,
        mode="train",
        **FEW,
    )
    assert measured.values[tags.EDGE] == pytest.approx(2 / 0.1)
    top = measured.values[tags.LAMBDA_MAX]
    assert measured.values[tags.RATIO] == pytest.approx(0.1 * top / 2, rel=1e-3)
