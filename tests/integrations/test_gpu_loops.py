"""The loops of others on a CUDA device: fp16 with each loop's own GradScaler, which Accelerate refuses on a CPU."""

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from modules import Net, sgd
from torch import Tensor

from integrations.features import BOOST
from integrations.loops import Job, WithLoss, fresh_accelerate, trainer_of
from lightning_ire import SAM, AccelerateHost, FabricHost, IREStep
from lightning_ire.integrations.transformers import attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batches() -> list[Any]:
    return [(x.cuda(), y.cuda()) for x, y in cases.loader(cases.data())]


def weights_after(loop: str, precision: str, perturbation: Any) -> tuple[Tensor, int]:
    """Of 16 steps, by hand; and how many of them were real."""
    torch.manual_seed(1)
    module = WithLoss(Net())
    if loop == "fabric":
        fabric = Fabric(accelerator="cuda", devices=1, precision=precision)  # type: ignore[arg-type]
        model, optimizer = fabric.setup(module, sgd(module))
        host: Any = FabricHost(fabric)
    else:
        accelerator = Accelerator(mixed_precision=precision)
        model, optimizer = accelerator.prepare(module, sgd(module))
        host = AccelerateHost(accelerator)
    settings = {**BOOST} if perturbation is None else {"kappa": 0.0, "perturbation": perturbation}
    step = IREStep(model, optimizer, host=host, **settings)
    for batch in batches() * 2:
        step(lambda batch: model(*batch), batch)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), step.progress.step


@pytest.mark.parametrize("perturbation", [None, SAM(0.1)])
@pytest.mark.parametrize(("loop", "plain", "half"), [("fabric", "32-true", "16-mixed"), ("accelerate", "no", "fp16")])
def test_fp16_is_near_float32(loop: str, plain: str, half: str, perturbation: Any) -> None:
    """The scale starts at 65536: steps that overflow at first are left out, and not counted."""
    with fresh_accelerate():
        exact, _ = weights_after(loop, plain, perturbation)
    with fresh_accelerate():
        found, steps = weights_after(loop, half, perturbation)
    assert 12 <= steps <= 16
    if steps == 16:
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_a_second_pass_at_the_same_weights_is_the_plain_trainer(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Trainer, with dropout: to the last bit, overflowing steps left out alike."""
    monkeypatch.chdir(tmp_path)
    trained = []
    for second in (False, True):
        with fresh_accelerate():
            options = {"use_cpu": False} | ({} if precision == "none" else {precision: True})
            trainer = trainer_of(Job(accumulate=2, clip=0.5), tmp_path, **options)
            attached = attach(trainer, SAM(0.0)) if second else None
            trainer.train()
            trained.append(trainer.model)
    cases.assert_same_bits(*trained)
    assert attached is not None
    assert attached.step is not None
    assert 0 < attached.step.progress.step <= 8
