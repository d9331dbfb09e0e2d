"""Data, runs, records of them and comparisons to the bit, which the tests share; the modules are in modules.py."""

import copy
import hashlib
import os
import random
import signal
import subprocess
import sys
import warnings
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ire import IRE, SAM, AdversarialModelPerturbation, AverageSAM, Curvature, Perturbation
from lightning_ire.sharpness import QUANTITIES

FEATURES, CLASSES = 6, 4
# of what not every run has: a mask, a normalization layer, dropout, two batches, a single cross entropy
SPECIAL = {"kappa_headroom", "effective_lr", "dropout_variance", "gap", "coherence"}
BARE = [name for name in QUANTITIES if name not in SPECIAL]
PERTURBATIONS: dict[str, Perturbation | None] = {
    "none": None,
    "sam": SAM(0.1),
    "asam": SAM(0.5, adaptive=True),
    "average-sam": AverageSAM(0.1),
    "amp": AdversarialModelPerturbation(0.2, zeta=0.5, ascents=2),
}


class Notes(UserList):
    """A list in a module in which extra passes leave their entries too: what holds a function is more than data."""

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        super().__init__(entries)
        self.more_than_data = print

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]


def data(samples: int = 64, dtype: torch.dtype = torch.float32, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


class Stream(IterableDataset):
    """The same samples, of which nobody knows how many they are."""

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(data(self.samples))


def loader(dataset: TensorDataset, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def trainer(callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1 if kwargs.get("logger") else 8,  # IRE's row costs half a step of these
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def fit(
    module: pl.LightningModule,
    callbacks: Sequence[pl.Callback] = (),
    train: DataLoader | None = None,
    seed: int = 3,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Train a module from a fixed random state."""
    run = trainer(callbacks, **kwargs)
    torch.manual_seed(seed)
    run.fit(module, train if train is not None else loader(data()), ckpt_path=ckpt_path)
    return run


class Rows(Logger):
    """A logger that keeps what it is given."""

    name = "rows"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def first_at_once(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """The cases of a parametrization, all but the first of them for `make test-all`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if index < count else [pytest.mark.slow])
        for index, case in enumerate(cases)
    ]


def every_second(cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrization, every second of them for `make test-all`."""
    return [pytest.param(case, marks=[pytest.mark.slow] if index % 2 else []) for index, case in enumerate(cases)]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_streams() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
    return {
        "torch": digest([torch.get_rng_state()]),
        "numpy": (hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest(), *rest),
        "python": hash(random.getstate()),
    }


def under(strategy: type) -> Any:
    """A trainer with a strategy that this machine may be unable to run."""
    return SimpleNamespace(strategy=strategy.__new__(strategy), optimizers=[])


def clone(module: pl.LightningModule) -> pl.LightningModule:
    return copy.deepcopy(module)


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    """All parameters and buffers equal to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not same_bits(ours[name], theirs[name])]
    assert not different, f"different: {different}"


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality that tells +0.0 from -0.0 and takes a NaN for itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def digest(tensors: Sequence[Tensor | None]) -> str:
    """A name for the exact bits of some tensors."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is None:
            total.update(b"none")
            continue
        dense = tensor.detach().to_dense().contiguous().reshape(-1)
        total.update(str((tensor.dtype, tuple(tensor.shape), tensor.layout)).encode())
        total.update(dense.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, to the last bit of every tensor and number."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if digest([first]) != digest([second]):
            yield f"{path}: {first} != {second}"
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        if list(first) != list(second):
            yield f"{path}: keys {list(first)} != {list(second)}"
            return
        for key in first:
            yield from differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple, Notes)) and isinstance(second, (list, tuple, Notes)):
        for index, pair in enumerate(zip(first, second, strict=False)):
            yield from differences(*pair, f"{path}[{index}]")
        if len(first) != len(second):
            yield f"{path}: length {len(first)} != {len(second)}"
    elif isinstance(first, float) and isinstance(second, float):
        if first != second and not (first != first and second != second):
            yield f"{path}: {first!r} != {second!r}"
    elif type(first) is not type(second) or first != second:
        yield f"{path}: {first!r} != {second!r}"


def moved(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between the parameters of two modules."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    """The loss of a batch as a plain loop computes it."""
    return lambda batch: F.cross_entropy(model.net(batch[0]), batch[1])


def flat_like(gradients: Any, parameters: Sequence[nn.Parameter]) -> Tensor:
    """One vector of gradients, 0 where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1) for g, p in pairs])


def dense_hessian(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """All second derivatives, one coordinate after the other."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    rows = []
    for element in flat_like(gradients, parameters):
        row: Any = (None,) * len(parameters)
        if element.requires_grad:
            row = torch.autograd.grad(element, parameters, retain_graph=True, allow_unused=True)
        rows.append(flat_like(row, parameters))
    return torch.stack(rows)


def script_environment() -> dict[str, str]:
    """The environment of a script of this folder in a process of its own: one thread, nothing of pytest's run."""
    here = Path(__file__).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PL_"))}
    paths = [str(here), str(here.parent), str(here.parent / "benchmarks")]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def two_processes(script: str, folder: Path, *arguments: str, processes: int = 2) -> list[dict[str, Any]]:
    """Run a script of this folder, which trains in two (or so many) processes; what each rank saved in `folder`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / script), str(folder), *arguments],
        env=script_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        errors = process.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:  # ranks that wait for each other
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@contextmanager
def monitor_warnings() -> Iterator[list[str]]:
    """What SharpnessMonitor says in the block; only this is kept from being an error."""
    ours: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ours
    ours += [str(one.message) for one in caught if "SharpnessMonitor" in str(one.message)]


def recorded(curvature: Curvature) -> list[list[Tensor | None] | None]:
    """Every estimate h that a curvature will hand over."""
    found: list[list[Tensor | None] | None] = []
    begin = curvature.begin

    def begin_recorded(window: Any) -> Any:
        estimate = begin(window)
        finish = estimate.finish

        def finish_recorded() -> Any:
            found.append(finish())
            return found[-1]

        estimate.finish = finish_recorded  # type: ignore[method-assign]
        return estimate

    curvature.begin = begin_recorded  # type: ignore[method-assign]
    return found


def estimates(module: pl.LightningModule, curvature: Curvature, train: Any = None, **kwargs: Any) -> list[Any]:
    """Those of all steps of one epoch of IRE."""
    found = recorded(curvature)
    ire = IRE(kappa=1.0, interval=1, curvature=curvature, perturbation=kwargs.pop("perturbation", None))
    fit(module, [ire], train, **{"max_epochs": 1, "log_every_n_steps": 100, **kwargs})
    return found


def leave_together() -> None:
    """End of a distributed script: one that leaves while others still talk to it is now and then torn down by C++."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
