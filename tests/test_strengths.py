"""Kappa per parameter group and per name, and what is refused."""

from typing import Any

import cases
import pytest
import torch
from modules import Classifier
from torch import nn

from lightning_ire import IRE, SAM, ConfigurationError, IREStep, tags


def groups(*strengths: Any) -> Any:
    """An optimizer with a group for each parameter, and these strengths (``None``: none of its own)."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        own = [{} if one is None else {"ire_kappa": one} for one in strengths]
        pairs = zip(module.parameters(), own, strict=True)
        return torch.optim.SGD([{"params": [parameter], **extra} for parameter, extra in pairs], lr=0.1)

    return make


def step_of(settings: dict[str, Any], optimizer: Any = None) -> tuple[dict[str, float], IREStep, list[torch.Tensor]]:
    """By how much IRE lengthened one step of each parameter, whose mask is all ones."""
    torch.manual_seed(0)
    model = Classifier().double()
    optimizer = (optimizer or groups(*[None] * 4))(model)
    step = IREStep(model, optimizer, **{"gamma": 1.0, **settings})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (x, y), *_ = cases.loader(cases.data(dtype=torch.float64))
    step(cases.loss_of(model), (x, y))
    found = {}
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        ratio = (parameter.detach() - old) / (-0.1 * parameter.grad)
        torch.testing.assert_close(ratio, ratio[(0,) * ratio.dim()].expand_as(ratio), rtol=1e-8, atol=0)
        found[name] = round(float(ratio.flatten()[0]), 8)
    return found, step, list(model.parameters())


def test_a_group_has_its_own_kappa() -> None:
    found, step, parameters = step_of({"kappa": 2.0}, groups(0.5, None, 0, 7))
    assert list(found.values()) == [1.5, 3.0, 1.0, 8.0]
    assert step.logs[tags.KAPPA] == 7
    factors = step.boost_factors(step.module, step.optimizer)
    assert [float(factors[id(parameter)].max()) for parameter in parameters] == [1.5, 3.0, 1.0, 8.0]


@pytest.mark.parametrize("perturbation", [None, SAM(0.1)])
def test_a_kappa_of_a_group_without_a_boost_is_refused(perturbation: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`kappa` > 0 where a parameter group has `ire_kappa`, got 0.0"
    ) as error:
        cases.fit(Classifier(optimizer=groups(None, 1.0, None, None)), [IRE(kappa=0, perturbation=perturbation)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [-1, "2", float("nan"), True])
def test_a_kappa_of_a_group_has_to_be_a_number(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected `ire_kappa` to be a number >= 0, got"):
        cases.fit(Classifier(optimizer=groups(None, wrong, None, None)), [IRE()])
