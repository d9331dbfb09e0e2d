"""Two processes in each loop: the same bits on all, and where the method says so those of one on the joined batch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from integrations import processes_script
from integrations.processes_script import HOSTS, JOINED, METHODS, MODELS, alone

pytestmark = pytest.mark.slow
CELLS = [(host, kind, method) for host in HOSTS for kind in MODELS for method in METHODS]


def launched(host: str, folder: Path) -> list[dict[Any, Any]]:
    """What each rank saved; Accelerate's processes are started by its own launcher."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if host == "accelerate":
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, processes_script.__file__, host, str(folder)],
        env=cases.script_environment(), capture_output=True, text=True, timeout=280, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, list[dict[Any, Any]]] = {}

    def of(host: str) -> list[dict[Any, Any]]:
        if host not in known:
            known[host] = launched(host, tmp_path_factory.mktemp(host))
        return known[host]

    return of


def assert_like_one(found: dict[str, Any], one: dict[str, Any], rel: float = 1e-6) -> None:
    torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-9, atol=1e-12)
    assert found["masks"].keys() == one["masks"].keys()
    assert not list(cases.differences(found["masks"], one["masks"]))
    for tag, value in one["measured"].items():
        assert found["measured"][tag] == pytest.approx(value, rel=rel, abs=rel)


@pytest.mark.parametrize(("host", "kind", "method"), CELLS)
def test_replicas_are_bit_identical(ranks: Any, host: str, kind: str, method: str) -> None:
    first, second = (dict(rank[kind, method]) for rank in ranks(host))
    norms = first.pop("ascent"), second.pop("ascent")
    assert not list(cases.differences(first, second))
    assert (norms[0] != norms[1]) == (method == "sam-ire")  # each by its own gradient
    assert bool(first["masks"]) == (method != "average-sam")


@pytest.mark.parametrize(("host", "kind", "method"), [cell for cell in CELLS if cell[2] in JOINED])
def test_two_processes_are_one_on_the_joined_batch(
    ranks: Any, host: str, kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_like_one(ranks(host)[0][kind, method], alone(host, kind, method))


@pytest.mark.parametrize("method", JOINED)
def test_fabric_shards_like_one_process(ranks: Any, method: str) -> None:
    """`fully_shard` under ModelParallelStrategy; Llama's norms are float32, so differences of gradients are coarse."""
    found = ranks("shards")[0]["language model", method]
    assert cases.same_bits(found["weights"], ranks("shards")[1]["language model", method]["weights"])
    assert_like_one(found, alone("fabric", "language model", method), rel=1e-2)
