"""Two processes on the CPU: replicas never drift, and equal one process on the joined batch where they should."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import cases
import ddp_script
import pytest
import torch
import torch.nn.functional as F
from modules import Classifier, Net, sgd


class Results(dict):
    """What one rank has; the runs of `make test` are made together, the others too, when one of them is asked for."""

    def __init__(self, load: Callable[[str], dict[str, Any]]) -> None:
        super().__init__()
        self.load = load

    def __missing__(self, name: str) -> Any:
        self.update(self.load(name))
        return self[name]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    known: dict[bool, list[dict[str, Any]]] = {}

    def load(name: str, rank: int) -> dict[str, Any]:
        fast = name in ddp_script.FAST
        if fast not in known:
            names = [one for one in ddp_script.RUNS if (one in ddp_script.FAST) == fast]
            known[fast] = cases.two_processes("ddp_script.py", tmp_path_factory.mktemp("ddp"), *names)
        return known[fast][rank]

    return [Results(partial(load, rank=rank)) for rank in range(2)]


def runs(names: Iterable[str]) -> list[Any]:
    """Those that are not of `make test` are slow."""
    return [pytest.param(name, marks=[] if name in ddp_script.FAST else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", runs(ddp_script.RUNS))
def test_replicas_are_bit_identical_after_every_step(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert cases.same_bits(first["weights"], second["weights"])
    assert torch.isfinite(first["weights"]).all() or name in ("nan", "nan-plain")
    assert first["masks"].keys() == second["masks"].keys()
    for key, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][key])
    assert bool(first["masks"]) == (ddp_script.RUNS[name]["ire"]["kappa"] > 0)
    assert first["started_at"] == second["started_at"]


JOINED = [
    "plain", "empirical", "sam-sync", "empirical-sam-sync", "average-sam", "own-fisher", "own-fisher-accumulated",
    "partial-window-sync", "joined-norm", "hessian", "hessian-accumulated", "random", "second-moment", "ball-sync",
    "radii", "own-fisher-sample", "friendly", "gsam", "weighted", "look", "momentum", "functional",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:SampledFisher.form='sample'. takes the samples one by one:UserWarning")
@pytest.mark.parametrize("name", runs(JOINED))
def test_equals_one_process_on_the_joined_batch(ranks: list[dict[str, Any]], name: str) -> None:
    alone = ddp_script.run(name, devices=1, batch_size=16)
    torch.testing.assert_close(ranks[0][name]["weights"], alone["weights"], rtol=1e-10, atol=1e-12)
    assert ranks[0][name]["threshold"] == pytest.approx(alone["threshold"], rel=1e-8)


@pytest.mark.slow
def test_each_device_climbs_by_its_own_gradients_twice(ranks: list[dict[str, Any]]) -> None:
    """The second ascent's gradient is each device's own too; only the step's is averaged."""
    torch.manual_seed(11)
    module = Classifier(Net()).double()
    weights = list(module.parameters())
    optimizer = sgd(module)
    x, y = cases.data(16 * ddp_script.STEPS, dtype=torch.float64).tensors
    for step in range(ddp_script.STEPS):
        base = [w.detach().clone() for w in weights]
        gradients = []
        for rank in range(2):
            rows = slice(16 * step + rank, 16 * (step + 1), 2)
            moves = [torch.zeros_like(w) for w in base]
            for ascent in range(3):
                g = torch.autograd.grad(F.cross_entropy(module.net(x[rows]), y[rows]), weights)
                if ascent == 2:
                    gradients.append(g)
                    break
                moves = [move + 0.5 * one for move, one in zip(moves, g, strict=True)]
                length = torch.cat([move.reshape(-1) for move in moves]).norm()
                moves = [move * min(1.0, 0.2 / length) for move in moves]
                _put(weights, [b + move for b, move in zip(base, moves, strict=True)])
            _put(weights, base)
        for w, one, other in zip(weights, *gradients, strict=True):
            w.grad = (one + other) / 2
        optimizer.step()
        after = torch.cat([w.detach().reshape(-1) for w in weights])
        torch.testing.assert_close(ranks[0]["ball-local"]["weights"][step], after, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def _put(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@pytest.mark.parametrize("loop", cases.first_at_once(["", "-accumulated"]))
def test_forced_second_pass_at_rho_0_changes_nothing(ranks: list[dict[str, Any]], loop: str) -> None:
    plain, forced = ranks[0][f"plain{loop}"], ranks[0][f"rho-0{loop}"]
    assert cases.same_bits(forced["weights"], plain["weights"])
    assert forced["calls"] == 2 * plain["calls"]


def test_each_device_draws_its_own_labels_anew_at_each_refresh(ranks: list[dict[str, Any]]) -> None:
    draws = [draw for rank in ranks for draw in rank["own-fisher"]["draws"]]
    assert len(draws) == 2 * ddp_script.STEPS // 2
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize(("name", "parts"), cases.first_at_once([("sam-local", 1), ("sam-local-accumulated", 2)]))
def test_each_device_perturbs_with_its_own_gradient(ranks: list[dict[str, Any]], name: str, parts: int) -> None:
    """m-sharpness: the mean over devices of the gradients at each device's own worst point."""
    torch.manual_seed(11)
    module = Classifier(Net()).double()
    weights = list(module.parameters())
    optimizer = sgd(module)
    x, y = cases.data(16 * ddp_script.STEPS, dtype=torch.float64).tensors
    for step in range(ddp_script.STEPS):
        gradients = []
        for rank in range(2):
            rows = slice(16 * step + rank, 16 * (step + 1), 2)
            first = torch.autograd.grad(F.cross_entropy(module.net(x[rows]), y[rows]), weights)
            norm = torch.cat([g.reshape(-1) for g in first]).norm()
            with torch.no_grad():
                base = [w.clone() for w in weights]
                for w, g in zip(weights, first, strict=True):
                    w += 0.1 * g / norm
            gradients.append(torch.autograd.grad(F.cross_entropy(module.net(x[rows]), y[rows]), weights))
            with torch.no_grad():
                for w, b in zip(weights, base, strict=True):
                    w.copy_(b)
        for w, one, other in zip(weights, *gradients, strict=True):
            w.grad = (one + other) / 2
        optimizer.step()
        after = torch.cat([w.detach().reshape(-1) for w in weights])
        seen = ranks[0][name]["weights"][(step + 1) * parts - 1]
        torch.testing.assert_close(seen, after, rtol=1e-10, atol=1e-12)
    sync = ranks[0]["sam-sync"]["weights"][-1]
    assert float((sync - after).abs().max()) > 1e-5


@pytest.mark.slow
def test_start_by_loss_is_decided_together(ranks: list[dict[str, Any]]) -> None:
    assert [rank["start-loss"]["started_at"] for rank in ranks] == [ddp_script.STEPS] * 2


@pytest.mark.slow
def test_a_nan_on_one_device_does_what_it_does_in_plain_ddp(ranks: list[dict[str, Any]]) -> None:
    """The mean over devices spreads it: all weights of all replicas are NaN after the step."""
    plain, ours = (torch.isnan(ranks[0][name]["weights"]) for name in ("nan-plain", "nan"))
    assert torch.equal(ours, plain)
    assert plain.all(1).tolist() == plain.any(1).tolist() == [False, False, True, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan-ascent", "nan-ascent-empirical"])
def test_a_nan_in_one_devices_ascent_gradient_alone_costs_nothing(ranks: list[dict[str, Any]], name: str) -> None:
    """That device does not move and runs its second pass all the same; the estimate is made again at the next step."""
    assert all(torch.isfinite(rank[name]["weights"]).all() for rank in ranks)
    assert [rank[name]["calls"] for rank in ranks] == [12, 12]


@pytest.mark.slow
def test_an_estimate_that_fails_on_one_device_is_made_again_on_all(ranks: list[dict[str, Any]]) -> None:
    """Steps 0, 2 (not finite on rank 1), 3 (again), 4."""
    assert [len(rank["nan-fisher"]["draws"]) for rank in ranks] == [4, 4]
    assert [len(rank["own-fisher"]["draws"]) for rank in ranks] == [3, 3]


SAME = [
    ("by-hand", "bucket-view"),
    ("ball-by-hand", "ball-local"),
    ("unused-search", "straight"),
    ("bucket-view", "straight"),
    ("bucket-view-accumulated", "no-view"),
    ("static-ire", "sampled"),
    ("static-own-fisher", "own-fisher"),
    ("static-empirical-sam-sync", "empirical-sam-sync"),
    ("static-average-sam", "average-sam"),
    ("resumed", "straight"),  # a checkpoint after one epoch, another trainer and another callback
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), SAME)
def test_options_of_ddp_and_a_resume_change_nothing(ranks: list[dict[str, Any]], name: str, other: str) -> None:
    ours, theirs = ranks[0][name], ranks[0][other]
    count = len(ours["weights"])
    assert count == ddp_script.STEPS * ddp_script.RUNS[name].get("accumulate", 1) * ddp_script.RUNS[name].get(
        "epochs", 1
    )
    assert cases.same_bits(ours["weights"], theirs["weights"][:count])


@pytest.mark.slow
def test_start_in_the_middle_of_the_run(ranks: list[dict[str, Any]]) -> None:
    assert [rank["start-step"]["started_at"] for rank in ranks] == [3, 3]
    boosted, unboosted = (ranks[0][name]["weights"] for name in ("start-step", "sam-local"))
    assert cases.same_bits(boosted[:3], unboosted[:3])
    assert not torch.equal(boosted[3], unboosted[3])


@pytest.mark.slow
def test_the_last_window_of_an_epoch_may_be_short(ranks: list[dict[str, Any]]) -> None:
    whole, part = (ranks[0][name]["weights"] for name in ("sampled-sam-local-accumulated", "partial-window"))
    last = 2 * ddp_script.STEPS - 2
    assert cases.same_bits(part[:last], whole[:last])
    assert not torch.equal(part[last], part[last - 1])  # a step all the same
    assert cases.same_bits(whole[last], whole[last - 1])  # where the full window goes on


@pytest.mark.slow
def test_early_stopping_stops_all_devices_together(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["early-stopping"]["weights"]) for rank in ranks] == [2 * ddp_script.STEPS] * 2


@pytest.mark.slow
def test_what_does_not_run_says_so_on_all_devices(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refusals"] == ranks[1]["refusals"]
    messages = ranks[0]["refusals"]
    assert messages["static-graph"].startswith(
        "Expected DDP without static_graph for SAM with each device's own gradient"
    )
    # Plain Lightning, without the callback; when one of these runs there is more to test here.
    assert "INTERNAL ASSERT FAILED" in messages["static-graph-accumulated"]
    assert messages["sync-batch-norm"] == "SyncBatchNorm layers only work with GPU modules"
