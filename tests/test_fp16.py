"""fp16 with a GradScaler, on the CPU (more on a GPU: test_gpu.py): scales cancel, and a skipped step is no step."""

from typing import Any

import cases
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from modules import Classifier, Net

from lightning_ire import IRE, SAM, EmpiricalFisher, tags

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def fit(
    module: Classifier, callbacks: list[Any], scale: float, device: str = "cpu", **kwargs: Any
) -> tuple[Any, float]:
    scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=5)
    plugin = MixedPrecision("16-mixed", device, scaler)
    trainer = cases.fit(module, callbacks, plugins=[plugin], accelerator=device, **kwargs)
    return trainer, scaler.get_scale()


NORMAL, OVERFLOWS, HOPELESS = 2.0**10, 2.0**30, 2.0**126


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scale", [NORMAL, OVERFLOWS, HOPELESS])
def test_forced_second_pass_at_rho_0_changes_nothing(scale: float, accumulate: int) -> None:
    plain = Classifier(Net(batch_norm=True, dropout=0.2))
    forced = cases.clone(plain)
    loop = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    first, first_scale = fit(plain, [], scale, **loop)
    second, second_scale = fit(forced, [IRE(kappa=0, perturbation=SAM(0.0))], scale, **loop)
    cases.assert_same_bits(plain, forced)
    assert first_scale == second_scale
    assert first.global_step == second.global_step
    assert forced.calls == 2 * plain.calls


def adamw(fused: bool) -> Any:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_neither_counted_nor_boosted(fused: bool, device: str) -> None:
    """Halved from 2^30 until the gradients fit; until then nothing moves, and the start counts real steps."""
    module = Classifier(Net(), optimizer=adamw(fused))
    start = cases.clone(module)
    ire = IRE(kappa=2.0, start_step=1, perturbation=SAM(0.1))
    with pytest.warns(UserWarning, match="IRE never switched on"):
        trainer, _ = fit(module, [ire], HOPELESS, device)
    assert trainer.global_step == 16
    assert ire._progress.step == 0
    assert ire.started_at is None
    cases.assert_same_bits(module.cpu(), start)
    module = cases.clone(start)
    ire = IRE(kappa=2.0, start_step=1)
    fit(module, [ire], 2.0**22, device)
    assert 0 < ire._progress.step < 16
    assert ire.started_at == 1


@pytest.mark.parametrize("curvature", [None, EmpiricalFisher()])
def test_logged_values_do_not_depend_on_the_scale(curvature: Any) -> None:
    start, one = Classifier(Net()), {"max_epochs": 1, "limit_train_batches": 1, "log_every_n_steps": 1}
    values = []
    for scale in (2.0**4, 2.0**10):
        module = cases.clone(start)
        ire = IRE(kappa=1.0, interval=1, curvature=curvature, perturbation=SAM(0.1))
        trainer, _ = fit(module, [ire], scale, **one)
        values.append({tag: float(trainer.callback_metrics[tag]) for tag in (tags.GRAD_NORM, tags.THRESHOLD)})
    assert values[0] == pytest.approx(values[1], rel=0.05)
    full = cases.fit(
        cases.clone(start),
        [IRE(kappa=1.0, interval=1, curvature=curvature, perturbation=SAM(0.1))],
        **one,
    )
    assert values[0] == pytest.approx({tag: float(full.callback_metrics[tag]) for tag in values[0]}, rel=0.05)
