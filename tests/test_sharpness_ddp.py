"""SharpnessMonitor in two processes: the numbers of one process on the joined probe, and runs that go on unchanged."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import sharpness_ddp_script as script
import torch
import torch.nn.functional as F
from modules import Classifier
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_ire import tags
from lightning_ire.callbacks._probe import Probe
from lightning_ire.functional import sgd_limit

pytestmark = pytest.mark.slow
SIZE, TENSORS = 92, 4  # of the module's parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharpness")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return cases.two_processes("sharpness_ddp_script.py", folder)


def flat_loss(batch: Any) -> Any:
    """The module's loss as a function of the vector of all its weights."""
    module = Classifier().double()
    named = dict(module.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in named.values()])
        weights = {name: piece.view_as(p) for piece, (name, p) in zip(pieces, named.items(), strict=True)}
        return F.cross_entropy(functional_call(module, weights, (batch[0],), tie_weights=False), batch[1])

    module.forward = module.net.forward  # type: ignore[method-assign]
    return loss


# The same numbers


@pytest.mark.parametrize("name", script.JOINED)
def test_equals_one_process_on_the_joined_probe(ranks: list[dict[str, Any]], name: str) -> None:
    alone = script.run(name, devices=1, batch_size=16)
    precise = 1e-5 if name == "joined-differences" else 1e-9
    for ours, theirs in zip(ranks[0][name]["seen"], alone["seen"], strict=True):
        assert ours["skipped"] == theirs["skipped"] == {}
        assert ours["values"].keys() == theirs["values"].keys()
        for tag, value in ours["values"].items():
            if not tag.startswith(tags.TRACE_FISHER):
                assert value == pytest.approx(theirs["values"][tag], rel=precise, abs=precise / 10), tag
        assert ours["layer_traces"] == pytest.approx(theirs["layer_traces"], rel=precise, abs=precise / 10)
        if theirs["density"] is not None:
            for power in range(1, 5):
                moments = [float((nodes**power) @ weights) for nodes, weights in (ours["density"], theirs["density"])]
                assert moments[0] == pytest.approx(moments[1], rel=1e-9)


def test_what_is_joined_covers_all_quantities(ranks: list[dict[str, Any]]) -> None:
    found = {tag for name in script.JOINED for tag in ranks[0][name]["seen"][-1]["values"]}
    apart = {tags.TRACE_GAUSS_NEWTON}  # signs, like labels, are each device's own
    assert {*tags.SHARPNESS_TAGS, tags.RATIO, tags.SGD_RATIO, tags.EDGE, tags.DELETION_GAP} - apart <= found
    assert ranks[0]["joined-sam"]["seen"][0]["density"]
    assert ranks[0]["joined-sam"]["seen"][0]["layer_traces"]


def test_the_covariance_is_that_of_the_batches_of_all_devices(ranks: list[dict[str, Any]]) -> None:
    (seen,) = ranks[0]["gaps"]["seen"]
    batches = [batch for rank in ranks for batch in rank["gaps"]["seen"][0]["probe"]]
    assert [len(batch[0]) for batch in batches] == [8] * 4
    weights = seen["weights"].requires_grad_()
    gradients = torch.stack([torch.autograd.grad(flat_loss(batch)(weights), weights)[0] for batch in batches])
    assert seen["values"][tags.TRACE_COVARIANCE] == pytest.approx(8 * float(gradients.var(0).sum()), rel=1e-9)


@pytest.mark.parametrize(("name", "tag"), [("fisher", tags.TRACE_FISHER), ("all-labels", tags.TRACE_GAUSS_NEWTON)])
def test_the_fisher_of_two_processes_is_unbiased(ranks: list[dict[str, Any]], name: str, tag: str) -> None:
    (seen,) = ranks[0][name]["seen"]
    x, _ = cases.data(32, dtype=torch.float64, seed=5).tensors
    exact = 0.0
    for sample in x:
        for label in range(cases.CLASSES):
            weights = seen["weights"].requires_grad_()
            loss = flat_loss((sample[None], torch.tensor([label])))(weights)
            (gradient,) = torch.autograd.grad(loss, weights)
            exact += float(torch.exp(-loss.detach()) * gradient.square().sum()) / len(x)
    value, stderr = seen["values"][tag], seen["values"][tag + tags.STDERR]
    assert len(seen["fishers"]) == 2 * 200
    assert stderr < 0.04 * exact
    assert abs(value - exact) < 3.5 * stderr
    locals_ = [torch.tensor(rank[name]["seen"][0]["fishers"], dtype=torch.float64) for rank in ranks]
    assert value == pytest.approx(float(torch.stack(locals_).mean()), rel=1e-12)


def test_each_device_draws_labels_of_its_own(ranks: list[dict[str, Any]]) -> None:
    """On one and the same sample, where equal labels would give equal numbers."""
    drawn = [rank["labels"]["seen"][0]["fishers"] for rank in ranks]
    assert all(2 <= len({round(value, 9) for value in values}) <= cases.CLASSES for values in drawn)
    first, second = (torch.tensor(values) for values in drawn)
    assert 0.05 < float((first - second).abs().lt(1e-6).double().mean()) < 0.95
    streams = [rank["own-fisher"]["seen"] for rank in ranks]
    draws = [draw for seen in streams for draw in seen[0]["draws"]]
    assert len(draws) == len(set(draws)) == 2 * 3 * 2
    assert all(one["draws"] == seen[0]["draws"] for seen in streams for one in seen)


def test_random_numbers_of_the_loss_are_the_same_at_every_pass_and_differ_between_batches_and_devices(
    ranks: list[dict[str, Any]],
) -> None:
    passes = [torch.tensor(rank["draws"]["seen"][0]["draws"]).view(3, 3) for rank in ranks]
    assert all(torch.equal(one[0], other) for one in passes for other in one[1:])
    assert len({float(draw) for one in passes for draw in one[0]}) == 6


def test_sam_with_a_norm_on_each_device(ranks: list[dict[str, Any]]) -> None:
    """The mean of rho / norm over the devices counts."""
    loss = flat_loss(cases.data(16, dtype=torch.float64, seed=5).tensors)
    norms = [rank["sam-local"]["norms"] for rank in ranks]
    assert all(abs(one - other) > 1e-3 for one, other in zip(*norms, strict=True))
    for step, seen in zip((2, 5), ranks[0]["sam-local"]["seen"], strict=True):
        hessian = torch.autograd.functional.hessian(loss, seen["weights"])
        ascent = sum(0.1 / one[step] for one in norms) / 2
        operator = 0.1 * (hessian + ascent * hessian @ hessian + 1e-3 * torch.eye(len(hessian), dtype=torch.float64))
        ratio = float(torch.linalg.eigvalsh(operator)[-1]) / sgd_limit(0.9)
        assert seen["values"][tags.RATIO] == pytest.approx(ratio, rel=1e-8)


@pytest.mark.parametrize(("name", "norm", "measured"), [("flat", 0.0, 6), ("no-ascent", math.nan, 2)])
def test_sam_that_stands_still_on_one_device(
    ranks: list[dict[str, Any]], name: str, norm: float, measured: int
) -> None:
    norms = [rank[name]["norms"][2] for rank in ranks]
    assert norms[1] == pytest.approx(norm, nan_ok=True)
    assert norms[0] > 0
    assert [len(rank[name]["seen"]) for rank in ranks] == [measured] * 2
    for seen in ranks[0][name]["seen"]:
        assert "stability" not in seen["skipped"]
        assert math.isfinite(seen["values"][tags.RATIO])


# Both devices do and see the same


@pytest.mark.parametrize("name", script.RUNS)
def test_all_numbers_and_decisions_are_the_same_on_both(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert len(first["seen"]) == len(second["seen"]) == script.STEPS // script.RUNS[name].get("every", script.EVERY)
    for ours, theirs in zip(first["seen"], second["seen"], strict=True):
        for key in ("values", "layer_traces"):  # to the bit, NaN included
            assert repr(ours[key]) == repr(theirs[key])
        assert ours["calls"] == theirs["calls"]
        assert ours["skipped"].keys() == theirs["skipped"].keys()
        assert ours["exact"] == theirs["exact"]
        assert ours["out_of_memory"] == theirs["out_of_memory"]
        assert len(ours["probe"]) == len(theirs["probe"])
        assert ours["gradients_untouched"]
        assert theirs["gradients_untouched"]
    for tag, value in first["seen"][-1]["values"].items():
        for rank in (first, second):
            assert cases.same_bits(rank["metrics"][tag], torch.tensor(value))
    assert cases.same_bits(first["weights"], second["weights"])


def test_the_number_of_draws_depends_on_the_numbers(ranks: list[dict[str, Any]]) -> None:
    """What the test above is about."""
    counts = [len(seen["calls"]) for seen in ranks[0]["adaptive"]["seen"]]
    assert len(set(counts)) > 1


BOTH = SIZE + 2  # a vector, and two marks


def test_one_reduction_for_each_product_and_each_draw(ranks: list[dict[str, Any]]) -> None:
    traces, lanczos, density, noise = 9 * [TENSORS + 2], [2, *7 * [BOTH]], 4 * 30 * [BOTH], 8 * 3 * [BOTH]
    fisher, gap = 9 * [3 + 2], [BOTH, 3 + 2, 3 + 2]
    expected = [2, 1, *traces, *lanczos, *density, *lanczos, *noise, *fisher, *gap]
    assert [sorted(seen["calls"]) for seen in ranks[0]["counted"]["seen"]] == [sorted(expected)] * 2
    with_sam = [2, 1, 1 + 2, 2, *7 * 2 * [BOTH]]
    assert [sorted(seen["calls"]) for seen in ranks[0]["counted-sam"]["seen"]] == [sorted(with_sam)] * 2


@pytest.mark.parametrize("name", ["counted", "counted-sam"])
def test_nothing_goes_through_the_reducer_of_ddp(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["hooked"] >= script.STEPS
        assert [seen["reducer"] for seen in rank[name]["seen"]] == [0] * 2


# The probe


@pytest.mark.parametrize(
    ("name", "batches", "size"),
    [("shards", 3, 4), ("few-samples", 1, 2), ("two-samples", 1, 1), ("training-data", 3, 8)],
)
def test_devices_share_no_sample(ranks: list[dict[str, Any]], name: str, batches: int, size: int) -> None:
    numbers: list[float] = []
    for rank in ranks:
        probe = rank[name]["seen"][0]["probe"]
        assert [len(x) for x, _ in probe] == [size] * batches
        numbers += [float(number) for x, _ in probe for number in x[:, 0]]
    assert len(set(numbers)) == 2 * batches * size


def test_random_transforms_draw_other_numbers_on_each_device(ranks: list[dict[str, Any]]) -> None:
    samples = [rank["same-sample"]["seen"][0]["probe"][0][0][0] for rank in ranks]
    assert samples[0][0] == samples[1][0] == 0
    assert samples[0][1] != samples[1][1]


@pytest.mark.parametrize("name", ["stream", "stream-one"])
def test_loaders_of_different_lengths_are_cut_to_the_shortest(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        for seen in rank[name]["seen"]:
            assert len(seen["probe"]) == 2
            assert not seen["skipped"]


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16, 17, 31])
@pytest.mark.parametrize("batch_size", [None, 3, 8])
def test_odd_numbers_of_samples_give_all_devices_equally_many(devices: int, samples: int, batch_size: Any) -> None:
    loader = DataLoader(script.Numbered(samples), batch_size)
    found = []
    for rank in range(devices):
        trainer: Any = SimpleNamespace(
            world_size=devices, global_rank=rank, lightning_module=Classifier(), strategy=None
        )
        probe = Probe.drawn(trainer, loader, num_batches=2, batch_size=None, seed=0)
        found.append([x[..., 0].reshape(-1).tolist() for x, _ in probe._batches])
    sizes = {tuple(map(len, batches)) for batches in found}
    assert len(sizes) == 1
    assert 1 <= len(found[0]) <= 2
    assert len(set(map(len, found[0]))) == 1
    numbers = [number for batches in found for batch in batches for number in batch]
    assert len(set(numbers)) == (len(numbers) if samples >= devices else samples)
    assert len(numbers) >= min(samples // 2, 2 * devices * (batch_size or 1))


# Training


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", script.TRAININGS)
def test_training_is_bit_identical_without_the_monitor(ranks: list[dict[str, Any]], name: str, rank: int) -> None:
    ours, alone = ranks[rank][name], ranks[rank][f"{name}-alone"]
    assert cases.same_bits(ours["weights"], alone["weights"])
    assert cases.same_bits(ours["buffers"], alone["buffers"])
    assert not alone["seen"]
    assert len(ours["weights"]) == script.STEPS * script.RUNS[name].get("accumulate", 1)
    assert not cases.same_bits(ours["weights"][-1], ours["weights"][-2]) or "accumulate" in script.RUNS[name]
    for seen in ours["seen"]:
        assert not seen["skipped"]
        assert all(map(math.isfinite, seen["values"].values()))


@pytest.mark.parametrize("name", [name for name in script.TRAININGS if name.startswith("reentrant")])
def test_reentrant_checkpointing_is_measured_by_differences(ranks: list[dict[str, Any]], name: str) -> None:
    assert [seen["exact"] for seen in ranks[0][name]["seen"]] == [False] * 3
    (warning,) = ranks[0][name]["warnings"]
    assert "cannot be differentiated twice" in warning
    if "norm" in name or "bucket" in name:  # another module, other steps
        return
    for ours, theirs in zip(ranks[0][name]["seen"], ranks[0]["plain"]["seen"], strict=True):
        assert ours["values"] == pytest.approx(theirs["values"], rel=1e-5, abs=1e-6)


# Failures on one device


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", script.FAILURES)
def test_training_goes_on_after_a_failure_on_one_device(ranks: list[dict[str, Any]], name: str, rank: int) -> None:
    assert cases.same_bits(ranks[rank][name]["weights"], ranks[rank]["plain-alone"]["weights"])


TOGETHER = (list(script.TRACES), ["lambda_max", "lambda_min"], ["trace_fisher"], ["ascent_gap"])
SKIPPING = [name for name in script.FAILURES if name.startswith(("raises-", "memory-")) and name != "raises-auto-2"]


@pytest.mark.parametrize("name", SKIPPING)
def test_what_fails_on_one_device_is_skipped_on_both_with_a_warning(ranks: list[dict[str, Any]], name: str) -> None:
    memory = name.startswith("memory")
    skipped = list(ranks[0][name]["seen"][1]["skipped"])
    assert skipped in TOGETHER
    for rank in ranks:
        assert [list(seen["skipped"]) for seen in rank[name]["seen"]] == [[], skipped, []]
        assert [seen["out_of_memory"] for seen in rank[name]["seen"]] == [False, memory, False]
        assert [seen["exact"] for seen in rank[name]["seen"]] == ["finite" not in name] * 3
        first, failed, last = (seen["values"].keys() for seen in rank[name]["seen"])
        assert failed < first == last
    reason = "it failed on another device, see the warning from there"
    warnings = [f"SharpnessMonitor skips {quantity}: {reason}" for quantity in skipped]
    assert ranks[0][name]["warnings"][: len(warnings)] == warnings
    assert len(ranks[0][name]["warnings"]) == len(warnings) + memory
    assert {text.split(":")[0] for text in ranks[1][name]["warnings"]} == {"SharpnessMonitor on device 1"}


def test_every_quantity_has_failed_once(ranks: list[dict[str, Any]]) -> None:
    """What the test above is about; should the order of the quantities change, other evaluations have to fail."""
    found = [list(ranks[0][name]["seen"][1]["skipped"]) for name in SKIPPING]
    assert all(together in found for together in TOGETHER)


def test_no_room_for_the_vectors_of_lanczos_on_one_device(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [list(seen["skipped"]) for seen in rank["basis"]["seen"]] == [
            [], ["lambda_max", "lambda_min", "stability"], [],
        ]  # fmt: skip
        assert [seen["out_of_memory"] for seen in rank["basis"]["seen"]] == [False, True, False]
    assert any("lower `batch_size`" in text for text in ranks[0]["basis"]["warnings"])


@pytest.mark.parametrize(
    ("name", "skipped"), [("nan-coherence", [[], ["coherence"], []]), ("uneven-gap", [["gap"]] * 3)]
)
def test_what_one_device_cannot_know_is_skipped_on_both(
    ranks: list[dict[str, Any]], name: str, skipped: list[list[str]]
) -> None:
    for rank in ranks:
        assert [list(seen["skipped"]) for seen in rank[name]["seen"]] == skipped


@pytest.mark.parametrize("name", ["raises-auto-2", "once"])
def test_a_second_derivative_that_fails_on_one_device_makes_both_take_differences(
    ranks: list[dict[str, Any]], name: str
) -> None:
    exact = [False] * 3 if name == "once" else [True, False, False]
    assert [seen["exact"] for seen in ranks[0][name]["seen"]] == exact
    (warning,) = ranks[0][name]["warnings"]
    assert "cannot be differentiated twice" in warning
    same = "plain" if name == "once" else "memory-auto-17"  # of the same probe
    for ours, theirs in zip(ranks[0][name]["seen"], ranks[0][same]["seen"], strict=True):
        assert not ours["skipped"]
        if theirs["skipped"]:
            continue
        assert ours["values"] == pytest.approx(theirs["values"], rel=1e-5, abs=1e-6)


def test_where_differences_fail_as_well_nothing_is_said_of_derivatives(ranks: list[dict[str, Any]]) -> None:
    assert [seen["exact"] for seen in ranks[0]["always"]["seen"]] == [True] * 3
    assert [set(seen["skipped"]) for seen in ranks[0]["always"]["seen"]] == [set(), set(script.CHEAP), set()]
    assert not any("twice" in text for text in ranks[0]["always"]["warnings"])


def test_a_probe_that_cannot_be_read_on_one_device(ranks: list[dict[str, Any]]) -> None:
    for rank, reason in zip(ranks, ["it failed on another device", "cannot be read"], strict=True):
        for seen in rank["probe-raises"]["seen"]:
            assert list(seen["skipped"]) == list(script.CHEAP)
            assert all(text.startswith(reason) for text in seen["skipped"].values())
            assert seen["calls"] == [2]
            assert not seen["values"]
    assert any("cannot be read" in text for text in ranks[1]["probe-raises"]["warnings"])


def test_a_loss_of_another_precision_that_has_no_labels_on_one_device(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [list(seen["skipped"]) for seen in rank["coarse"]["seen"]] == [["trace_fisher"]] * 3


def test_a_nan_on_one_device_is_a_nan_on_both(ranks: list[dict[str, Any]]) -> None:
    before, seen, after = ranks[0]["nan"]["seen"]
    assert math.isnan(seen["values"][tags.TRACE_HESSIAN])
    assert math.isnan(seen["values"][tags.LAMBDA_MAX])
    for other in (before, after):
        assert all(map(math.isfinite, other["values"].values()))


# Logs and validation


def test_only_rank_0_writes(ranks: list[dict[str, Any]], folder: Path) -> None:
    files = sorted(path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file())
    logs = [parts for parts in files if parts[0].startswith("logs")]
    events, table = ([parts for parts in logs if name in parts[-1]] for name in ("events", "metrics.csv"))
    assert len(events) == len(table) == 1
    assert {parts[0] for parts in logs} == {"logs0"}
    with open(folder.joinpath(*table[0])) as file:
        rows = [row for row in csv.DictReader(file) if row[tags.LAMBDA_MAX]]
    written = [float(row[tags.LAMBDA_MAX]) for row in rows]
    assert written == [seen["values"][tags.LAMBDA_MAX] for seen in ranks[0]["logged"]["seen"]]


def test_validate_measures_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["validated"] for rank in ranks)
    assert repr(first["table"]) == repr(second["table"])
    within, after = first["seen"]
    assert {tags.TRACE_FISHER, tags.TRACE_HESSIAN, tags.LAMBDA_MAX, tags.LAMBDA_MIN} <= within["values"].keys()
    assert within["skipped"].keys() == {"stability"}
    for tag, value in within["values"].items():
        assert first["table"][tag] == pytest.approx(value, rel=1e-6)
        assert second["seen"][0]["values"][tag] == after["values"][tag] == value
    assert first["warnings"] == [
        "SharpnessMonitor skips stability: there is no optimizer outside of fit",
    ]
