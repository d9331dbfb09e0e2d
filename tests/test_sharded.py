"""Sharded models (FSDP2, tensor parallel, both) on the CPU: equal to one process on the joined batch."""

from pathlib import Path
from typing import Any

import cases
import pytest
import report
import sharded
import sharded_script as script
import torch
from lightning.pytorch.strategies import FSDPStrategy

from lightning_ire import IRE, tags
from lightning_ire._checks import ConfigurationError
from lightning_ire._lightning import check_strategy
from lightning_ire.engine.masks import FlatMasks

FAST = [*script.FAST, "@contract", "@plain-loop", "@plain-loop-tp", "@dry-run", "@refusals", "@traffic"]
RELATIVES = ["friendly", "gsam", "look", "weighted", "momentum", "stable", "functional", "sharp"]
TWO = [name for name in script.CELLS if name not in (*script.FAST, *RELATIVES)]
BF16 = [f"{name}@{precision}" for name in ("sam-sampled", "second-moment") for precision in ("bf16-mixed", "bf16-true")]
TWO += ["sampled@tp", "sam-sampled@tp", "empirical@tp", "hessian@tp"]
SAVED = ["scheduled@saved-parts", "scheduled@saved-file"]
RESUMED = ["scheduled@resumed-parts", "scheduled@resumed-file"]
THREE = [
    "sampled",
    "sam-sampled",
    "second-moment",
    "random",
    "excluded",
    "tensor-scope",
    "by-name",
    "scheduled",
    "hessian",
]
THREE = [f"{name}@empty" for name in [*THREE, "by-name", "soft", "soft-tensor"]]
FOUR = ["sampled@2d", "sam-sampled@2d", "second-moment@2d", "hessian@2d", "sam-sampled@hybrid", "sampled@hybrid"]


# passes more than those of plain training, as collectives of so many groups of layers, and sums over all ranks
EXTRA: dict[str, tuple[Any, int]] = {
    "plain": (lambda layers: {"all_gather": 0, "reduce_scatter": 0}, 0),
    "SampledFisher": (lambda layers: {"all_gather": layers, "reduce_scatter": layers}, 5),
    "EmpiricalFisher": (lambda layers: {"all_gather": 0, "reduce_scatter": 0}, 4),
    "SecondMoment": (lambda layers: {"all_gather": 0, "reduce_scatter": 0}, 4),
    "HutchinsonHessian": (lambda layers: {"all_gather": 2 * (2 * layers - 1), "reduce_scatter": 2 * layers}, 8),
    "SAM(sync=True)": (lambda layers: {"all_gather": 2 * layers - 1, "reduce_scatter": layers}, 1),
    "AverageSAM": (lambda layers: {"all_gather": 0, "reduce_scatter": 0}, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Any:
    """What each rank has; a group of cells is run in one launch, when the first of them is asked for."""
    known: dict[tuple[int, str], list[dict[str, Any]]] = {}
    launches = [(2, FAST), (2, TWO + BF16 + SAVED), (2, RELATIVES), (2, RESUMED), (3, THREE), (3, RESUMED), (4, FOUR)]

    def ask(processes: int, name: str) -> list[Any]:
        if (processes, name) not in known:
            if name in RESUMED:
                ask(2, SAVED[0])
            (names,) = [names for count, names in launches if count == processes and name in names]
            found = cases.two_processes("sharded_script.py", folder, str(processes), *names, processes=processes)
            known.update({(processes, one): [rank[one] for rank in found] for one in names})
        return known[processes, name]

    return ask


def alone(name: str, **more: Any) -> dict[str, Any]:
    cell, _, variant = name.partition("@")
    net = {"empty": script.with_empty, "tp": script.for_tensor_parallel, "2d": script.for_tensor_parallel}.get(variant)
    return script.run(cell, 1, net=net, **more)


def cells() -> list[Any]:
    return [
        pytest.param(processes, name, marks=[] if name in script.FAST else [pytest.mark.slow])
        for processes, names in ((2, script.FAST), (2, TWO), (2, RELATIVES), (3, THREE), (4, FOUR))
        for name in names
    ]


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any], boosts: bool) -> None:
    for rank in ranks:
        assert cases.same_bits(rank["weights"], ranks[0]["weights"])
        assert rank["logs"] == ranks[0]["logs"]
        assert rank["table"] == expected["table"]
        assert rank["started_at"] == expected["started_at"]
    count = len(ranks[0]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], expected["weights"][-count:], rtol=1e-11, atol=1e-12)
    assert ranks[0]["masks"].keys() == expected["masks"].keys()
    assert bool(expected["masks"]) == boosts
    for key, mask in expected["masks"].items():
        assert torch.equal(ranks[0]["masks"][key], mask)
    assert ranks[0]["logs"].keys() == expected["logs"].keys()
    for tag, value in expected["logs"].items():
        exact = 5e-7 if tag == tags.THRESHOLD else 1e-8  # a threshold is between two numbers, in single precision
        assert ranks[0]["logs"][tag] == pytest.approx(value, rel=exact, abs=1e-12), tag


@pytest.mark.parametrize(("processes", "name"), cells())
def test_equals_one_process_on_the_joined_batch(ranks: Any, processes: int, name: str) -> None:
    """To the rounding of float64; masks to the bit, and the gathered weights of all ranks."""
    more = {"how": "layers"} if name.endswith("@hybrid") else {}
    boosts = IRE(**script.CELLS[name.partition("@")[0]]["ire"]).boosts
    compare(ranks(processes, name), alone(name, **more), boosts)


@pytest.mark.slow
@pytest.mark.parametrize("name", BF16)
def test_half_precision_runs_and_ranks_agree(ranks: Any, name: str) -> None:
    """There is no reference to compare bits with: weights are finite, and as many are flat as asked."""
    first, second = ranks(2, name)
    assert cases.same_bits(first["weights"], second["weights"])
    assert torch.isfinite(first["weights"]).all()
    assert script.BOOST["gamma"] - 0.02 <= first["logs"][tags.FLAT_FRACTION] <= 1
    assert first["logs"] == second["logs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("processes", [2, 3])
def test_resumes_at_any_world_size(ranks: Any, processes: int, name: str) -> None:
    """A folder of parts, or one file, that two processes have saved."""
    compare(ranks(processes, name), alone("scheduled", epochs=2), True)


@pytest.mark.slow
def test_one_process_resumes_what_two_have_saved_in_one_file(ranks: Any, folder: Path) -> None:
    ranks(2, SAVED[0])
    found = alone("scheduled", epochs=2, ckpt_path=folder / "one.ckpt")
    compare([found], alone("scheduled", epochs=2), True)


@pytest.mark.slow
def test_the_file_holds_the_masks_that_one_process_saves(ranks: Any, folder: Path, tmp_path: Path) -> None:
    ranks(2, SAVED[0])
    script.saved("scheduled", 1, tmp_path, one_file=True)
    ours, theirs = (torch.load(path / "one.ckpt", weights_only=True)["callbacks"]["IRE"] for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    (ours,), (theirs,) = ours["optimizers"], theirs["optimizers"]
    assert ours.keys() == theirs.keys()
    assert ours["flat"].keys() == theirs["flat"].keys()
    assert ours["flat"]["shapes"] == theirs["flat"]["shapes"]
    for key, mask in theirs["flat"]["masks"].items():
        assert torch.equal(ours["flat"]["masks"][key], mask)
        torch.testing.assert_close(ours["flat"]["average"][key], theirs["flat"]["average"][key])


def test_only_the_first_rank_holds_whole_masks(ranks: Any) -> None:
    """Host memory does not grow with the number of ranks; the state of another one is refused."""
    first, second = ranks(2, "sam-sampled")
    assert (first["of_rank"], second["of_rank"]) == (0, 1)
    assert first["masks"]
    assert not second["masks"]
    with pytest.raises(ConfigurationError, match="Expected the state of IRE that rank 0 has"):
        FlatMasks(0.5, "global", False, 0.0).load_state_dict({"masks": {}, "of_rank": 1}, {})


def test_what_is_built_on_holds_in_this_release_of_torch(ranks: Any) -> None:
    for found in ranks(2, "@contract"):
        assert [name for name, holds in found.items() if not holds] == []
        assert len(found) == 11


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_a_plain_loop(ranks: Any, tensor_parallel: bool) -> None:
    """`IREStep` with `fully_shard`, and with `parallelize_module`, in two micro-batches."""
    first, second = ranks(2, "@plain-loop-tp" if tensor_parallel else "@plain-loop")
    assert cases.same_bits(first["weights"], second["weights"])
    expected = script.plain_loop(1, tensor_parallel)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=1e-11, atol=1e-12)
    assert expected["masks"]
    for key, mask in expected["masks"].items():
        assert torch.equal(first["masks"][key], mask)


def test_a_dry_run_shows_the_table_of_the_whole(ranks: Any) -> None:
    shown = ranks(2, "@dry-run")
    assert shown[0] == script.dry_run(1)
    assert "all that take part" in shown[0]
    assert shown[1] == ""


def test_what_a_step_sends_is_what_the_tables_say(ranks: Any) -> None:
    """benchmarks/RESULTS.md and docs/sharded.md: counts of collectives and bytes, here of both ranks."""
    for found in ranks(2, "@traffic"):
        assert found == report.load(report.SHARDED)["traffic"]
        gathered, scattered = (found["plain"][2]["calls"][kind] for kind in ("all_gather", "reduce_scatter"))
        layers = sharded.BLOCKS + 1
        assert (gathered, scattered) == (2 * layers - 1, layers)  # the root stays gathered until its backward pass
        for name, steps in found.items():
            more = [
                {kind: count - found["plain"][2]["calls"].get(kind, 0) for kind, count in step["calls"].items()}
                for step in steps
            ]
            passes, summed = EXTRA[name]
            assert more[2] == passes(layers) | ({"all_reduce": summed} if summed else {}), name
            if "SAM" not in name:
                assert not any(more[3].values()), name
        histograms = 2 * (1 << 16) * 8
        assert histograms <= found["EmpiricalFisher"][2]["bytes"]["all_reduce"] < histograms + 100
        assert found["SampledFisher"][3]["mask bytes per own parameter"] == 1


def test_what_does_not_run_says_so(ranks: Any) -> None:
    messages, others = ranks(2, "@refusals")
    assert messages == others
    assert messages["m-sharpness"] == (
        "Expected a perturbation with sync=True for sharded parameters, got SAM(rho=0.1): no device holds the weights "
        "that it could move by its own gradient; set `perturbation.sync` to true."
    )
    assert messages["form"] == (
        "Expected a curvature estimate that works with sharded parameters, got SampledFisher(form='micro_batch'): no "
        "device has a gradient of its own to square; set `curvature.form` to 'batch'."
    )


def test_fsdp1_is_refused_with_the_remedy() -> None:
    """Its parts of parameters are plain tensors, so that every norm would be silently local."""
    trainer = cases.trainer()
    trainer.strategy.connect(script.Sharded(script.even(), script.adamw))
    trainer.strategy.__class__ = type("Fsdp", (FSDPStrategy,), {})
    with pytest.raises(ConfigurationError, match=r"got Fsdp.*set `trainer.strategy` to ModelParallelStrategy and let"):
        check_strategy(trainer, "IRE")
