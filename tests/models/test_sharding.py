"""The shipped models under `ModelParallelStrategy` on the CPU: equal to one process on the joined batch."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import sharding_script as script
import torch
from torch import nn

from lightning_ire.models import ResNet, Transformer
from lightning_ire.models._sharding import layers_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

FAST = ["llama@run", "llama@tp"]
SAVED, RESUMED = ["tied@saved", "llama@tp-saved"], ["tied@resumed", "llama@tp-resumed"]
TWO = ["tied@tp", "checkpointed@run", "compiled@run", "transformer@run", "transformer-compiled@run"]
TWO += ["llama@validated", *SAVED, *RESUMED]
FOUR = ["llama@2d", "tied@2d"]

Ranks = Callable[[int, str], list[Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank has; a group of cells is run in one launch, when the first of them is asked for."""
    folder, known = tmp_path_factory.mktemp("spread"), {}
    launches = [(2, FAST), (2, [*TWO, "llama@bf16", "llama@gather", "@refusals"]), (4, FOUR)]

    def ask(processes: int, name: str) -> list[Any]:
        if (processes, name) not in known:
            (names,) = [names for count, names in launches if count == processes and name in names]
            found = cases.two_processes(
                "models/sharding_script.py", folder, str(processes), *names, processes=processes
            )
            known.update({(processes, one): [rank[one] for rank in found] for one in names})
        return known[processes, name]

    return ask


def alone(name: str, **more: Any) -> dict[str, Any]:
    """In one process; without recomputing and compiling."""
    cell, _, variant = name.partition("@")
    plain = {"checkpointed": {"net": script.llama}, "compiled": {"net": script.llama, "compile": False}}
    plain["transformer-compiled"] = {"compile": False}
    more |= {"epochs": 2} if variant.endswith("resumed") else {"validate": True} if variant == "validated" else {}
    return script.run(cell, 1, **plain.get(cell, {}), **more)


def cells() -> list[Any]:
    groups = [(2, FAST, []), (2, TWO, []), (4, FOUR, [pytest.mark.weekly])]  # four processes on two cores
    return [pytest.param(count, name, marks=marks) for count, names, marks in groups for name in names]


@pytest.mark.parametrize(("processes", "name"), cells())
def test_equals_one_process_on_the_joined_batch(ranks: Ranks, processes: int, name: str) -> None:
    """Weights of every step to the rounding of float64, with IRE, SAM, accumulation and clipping; masks to the bit."""
    found, expected = ranks(processes, name), alone(name)
    for rank in found:
        assert cases.same_bits(rank["weights"], found[0]["weights"])
    count = len(found[0]["weights"])
    torch.testing.assert_close(found[0]["weights"], expected["weights"][-count:], rtol=1e-11, atol=1e-11)
    assert expected["masks"]
    for key, mask in expected["masks"].items():
        assert torch.equal(found[0]["masks"][key], mask)
    assert found[0]["evaluated"].keys() == expected["evaluated"].keys()
    for key, value in expected["evaluated"].items():
        assert found[0]["evaluated"][key] == pytest.approx(value, rel=1e-6)  # metrics are kept in single precision


@pytest.mark.parametrize("name", FAST)
def test_devices_that_share_a_batch_count_once(ranks: Ranks, name: str) -> None:
    """Tensor parallel: the same random numbers, and one stream of tokens."""
    found = ranks(2, name)
    shared = name.endswith("tp")
    assert (found[0]["seeds"] == found[1]["seeds"]) == shared
    assert len(set(found[0]["seeds"])) == len(found[0]["seeds"])
    assert [rank["logged"]["train/tokens_per_second"] for rank in found] == [1.0 if shared else 2.0] * 2


@pytest.mark.parametrize("name", FAST)
def test_each_device_has_its_part(ranks: Ranks, name: str) -> None:
    """Of matrices a half, by FSDP2 in a group per layer; by tensor parallel also whole norms."""
    for rank in ranks(2, name):
        fsdp = name == "llama@run"
        assert rank["groups"] == (["", *(f"network.model.layers.{layer}" for layer in range(2))] if fsdp else [])
        assert rank["share"] == 0.5 if fsdp else 0.5 < rank["share"] < 0.52


@pytest.mark.parametrize("name", ["llama@bf16", "llama@gather"])
def test_bfloat16_is_near_single_precision(ranks: Ranks, name: str) -> None:
    first, second = ranks(2, name)
    assert first["weights"].dtype == torch.float32  # as they are kept
    assert cases.same_bits(first["weights"], second["weights"])
    exact = alone("llama", precision="32-true")["weights"][1]  # after the first step, of two batches
    assert 0 < (first["weights"][1] - exact).norm() / exact.norm() < 0.05
    assert not torch.equal(*(ranks(2, f"llama@{kind}")[0]["weights"] for kind in ("bf16", "gather")))


def test_what_does_not_run_says_so(ranks: Ranks) -> None:
    messages, others = ranks(2, "@refusals")
    assert messages == others
    key = "trainer.strategy.init_args.tensor_parallel_size"
    assert messages == {
        "network": f"Expected {key} to be 1, as Transformer has no plan for tensor parallel (Llama has one), got 2.",
        "heads": f"Expected {key} to divide `num_heads` = 3, got 2.",
        "compile": "Expected model.compile to be false with trainer.strategy.init_args.tensor_parallel_size > 1, got "
        "true: torch hands plain tensors to DTensor in a compiled layer's backward pass. Set one of the two.",
        "gather": "Expected `gather_bf16` to be false with a trainer.precision other than 'bf16-mixed', got '32-true'.",
        "images": "Expected `channels_last` to be false with ModelParallelStrategy, whose `fully_shard` takes no "
        "weights in this memory format, got true.",
    }


def test_layers_are_those_of_the_longest_list() -> None:
    network = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]), Transformer(5, 4, num_layers=3, num_heads=2))
    assert layers_of(network) == list(network[1].layers)
    assert layers_of(ResNet(blocks=(1,), widths=(4,))) == []
