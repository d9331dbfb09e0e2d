"""Settings for all tests: one thread, fixed seeds, no test changes another's random numbers or working directory."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
