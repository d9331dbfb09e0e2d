"""Settings by name, and the text that says which settings a callback has."""

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import yaml
from modules import Classifier
from torch import nn

import lightning_ire
from lightning_ire import IRE, SAM, ConfigurationError, EmpiricalFisher, IREStep, SampledFisher
from lightning_ire.callbacks._presets import PRESETS
from lightning_ire.engine.recipe import Recipe
from lightning_ire.models import Llama

CONFIGS = {path.stem: path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml")}
RELATIVES = {"blockwise", "lite"}
NOT_OF_THE_PAPER = {"digits_resnet_sgd_ire", "stdlib_transformer_admire", "fineweb_llama1b_admire"}


def test_every_experiment_of_the_paper_is_a_preset() -> None:
    assert set(PRESETS) == set(CONFIGS) - NOT_OF_THE_PAPER | RELATIVES


@pytest.mark.parametrize("name", sorted(set(PRESETS) - RELATIVES))
def test_a_preset_is_what_the_config_says(name: str) -> None:
    said = yaml.safe_load(CONFIGS[name].read_text())["ire"]
    if "perturbation" in said:
        assert said["perturbation"]["class_path"] == "SAM"
        said["perturbation"] = SAM(**said["perturbation"]["init_args"])
    assert repr(IRE.preset(name)) == repr(IRE(**said))


def test_an_unknown_name_is_one_line_with_the_names() -> None:
    with pytest.raises(
        ConfigurationError, match=r"`name` to be one of 'cifar10_wrn28.*'blockwise', 'lite', got 'x'"
    ) as error:
        IRE.preset("x")
    assert "\n" not in str(error.value)


def test_changes_and_subclasses() -> None:
    class Own(IRE):
        """A subclass."""

    ire = Own.preset("cifar10_resnet56_sam_ire", kappa=3, start_epoch=None)
    assert repr(ire) == "Own(kappa=3.0, gamma=0.99, perturbation=SAM(rho=0.05))"
    assert isinstance(ire, Own)


EXAMPLES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "numbers": {"kappa": 1 / 3, "gamma": 0.123456789, "interval": 7, "beta": 0.5},
    "fraction": {"start_step": 0.25, "kappa_schedule": "ramp", "ramp_steps": 12},
    "epoch": {"start_epoch": 3, "scope": "tensor", "mask": "soft", "exclude": ["*.bias"]},
    "loss": {"start_loss": 1.5, "scale_weight_decay": "only", "exclude_zero_curvature": True, "exclude": "a*"},
    "by-name": {"kappa": {"*embed*": 9, "*": 4}, "gamma": {"*": 0.5}},
    "objects": {"curvature": EmpiricalFisher(), "perturbation": SAM(0.1, interval=2), "dry_run": True},
    "fraction-of-the-batch": {"curvature": SampledFisher(fraction=0.25), "kappa": 0},
}


@pytest.mark.parametrize("settings", EXAMPLES.values(), ids=EXAMPLES)
def test_the_text_makes_the_same_callback(settings: dict[str, Any]) -> None:
    ire = IRE(**settings)
    again = eval(
        repr(ire), vars(lightning_ire) | {name: getattr(lightning_ire, name) for name in lightning_ire.__all__}
    )
    plain = [{k: v for k, v in vars(one).items() if not k.startswith("_")} for one in (ire, again)]
    for key in ("curvature", "perturbation"):
        assert repr(plain[0].pop(key)) == repr(plain[1].pop(key))
    assert plain[0] == plain[1]
    assert repr(again) == repr(ire)


@pytest.mark.parametrize("name", PRESETS)
def test_the_text_of_a_preset_makes_it(name: str) -> None:
    names = {one: getattr(lightning_ire, one) for one in lightning_ire.__all__}
    assert repr(eval(repr(IRE.preset(name)), names)) == repr(IRE.preset(name))


def test_the_text_says_what_was_changed() -> None:
    assert repr(IRE()) == "IRE()"
    assert repr(IRE(kappa=2, start_epoch=5, exclude="*.bias")) == "IRE(kappa=2.0, start_epoch=5, exclude=['*.bias'])"
    assert repr(Recipe(gamma=0.8)) == "Recipe(gamma=0.8)"


def test_blockwise_makes_no_pass_and_takes_the_published_ratios() -> None:
    torch.manual_seed(0)
    model = Llama(11, width=8, num_layers=1, num_heads=2, feed_forward=12, context_length=8)
    preset = IRE.preset("blockwise")
    settings = {key: getattr(preset, key) for key in ("kappa", "gamma", "interval", "curvature")}
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    calls = []

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, -2), batch[:, 1:].flatten())

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(loss_of, torch.randint(11, (4, 8)))
    assert len(calls) == 1
    kinds = {"embed": 10, "q_proj": 8, "k_proj": 8, "v_proj": 4, "o_proj": 4, "mlp": 6, "norm": 1, "lm_head": 1}
    for name, parameter in model.named_parameters():
        (ratio,) = {ratio for part, ratio in kinds.items() if part in name}
        expected = before[name] - ratio * 0.1 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_lite_trains_with_adamw() -> None:
    module = Classifier(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    ire = IRE.preset("lite")
    cases.fit(module, [ire], max_epochs=4)
    masks = ire._progress.masks.masks
    assert {mask.dtype for mask in masks.values()} == {torch.uint8}
    for mask in masks.values():
        assert float(mask.float().mean() / 255) == pytest.approx(0.9, abs=2e-3)
    assert ire._progress.ramp == 16
    assert ire.started_at == 3
