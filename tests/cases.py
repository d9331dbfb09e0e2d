"""Small modules, data and runs that the tests of the callback share."""

import copy
import os
import signal
import subprocess
import sys
import warnings
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ire import Curvature

FEATURES, CLASSES = 6, 4
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class Net(nn.Sequential):
    """Two layers, with BatchNorm and dropout on request."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
        layers += [nn.BatchNorm1d(8)] if batch_norm else []
        layers += [nn.Tanh()]
        layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(8, CLASSES))


class Notes(UserList):
    """A list in a module in which extra passes leave their entries too: what holds a function is more than data."""

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        super().__init__(entries)
        self.more_than_data = print

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]


class Classifier(pl.LightningModule):
    """A user's module: nothing in it knows of IRE."""

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: OptimizerFactory = sgd,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


def data(samples: int = 64, dtype: torch.dtype = torch.float32, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


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
        "log_every_n_steps": 1,
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


def first_at_once(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """The cases of a parametrization, all but the first of them for `make test-all`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if index < count else [pytest.mark.slow])
        for index, case in enumerate(cases)
    ]


def every_second(cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrization, every second of them for `make test-all`."""
    return [pytest.param(case, marks=[pytest.mark.slow] if index % 2 else []) for index, case in enumerate(cases)]


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


def moved(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between the parameters of two modules."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


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


def leave_together() -> None:
    """End of a distributed script: one that leaves while others still talk to it is now and then torn down by C++."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
