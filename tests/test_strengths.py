"""Kappa per parameter group and per name, and what is refused."""

from typing import Any

import cases
import pytest
import torch
from modules import Classifier
from torch import nn

from lightning_ire import IRE, SAM, ConfigurationError, IREStep, tags
from lightning_ire.engine.masks import FlatMasks


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


# by name


BY_NAME = {"*.0.*": 0.5, "*.bias": 0, "*": 4}


def test_the_first_pattern_that_fits_gives_kappa() -> None:
    found, step, _ = step_of({"kappa": BY_NAME})
    assert found == {"net.0.weight": 1.5, "net.0.bias": 1.5, "net.2.weight": 5.0, "net.2.bias": 1.0}
    assert step.logs[tags.KAPPA] == 4
    factors = step.boost_factors(step.module, step.optimizer)
    assert [float(factors[id(parameter)].max()) for parameter in step.module.parameters()] == [1.5, 1.5, 5.0, 1.0]


def test_a_group_goes_before_a_pattern() -> None:
    found, step, _ = step_of({"kappa": BY_NAME}, groups(None, 7, None, 2))
    assert list(found.values()) == [1.5, 8.0, 5.0, 3.0]
    assert step.logs[tags.KAPPA] == 7


def test_a_mapping_of_one_pattern_is_the_number() -> None:
    runs = []
    for settings in ({"kappa": 2.0, "gamma": 0.7}, {"kappa": {"*": 2}, "gamma": {"*": 0.7}}):
        module = Classifier()
        torch.manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        ire = IRE(**settings)
        cases.fit(module, [ire], log_every_n_steps=1)
        runs.append((module, ire.state_dict()))
    cases.assert_same_bits(runs[0][0], runs[1][0])
    plain, mapped = (state["optimizers"][0] for _, state in runs)
    assert mapped["shown"].pop(f"{tags.THRESHOLD}/*") == plain["shown"].pop(tags.THRESHOLD)
    assert mapped["flat"]["logs"].keys() ^ plain["flat"]["logs"].keys() == {tags.THRESHOLD, f"{tags.THRESHOLD}/*"}
    assert not list(cases.differences(plain["flat"]["masks"], mapped["flat"]["masks"]))


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight
        self.tail = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.head(self.embed(x)))


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [({"*head*": 2, "*": 1}, 3), ({"*embed*": 5, "*": 1}, 6), ({"*tail*": 1, "*head*": 2}, 3)],
)
def test_any_name_of_a_tied_weight_counts(kappa: Any, expected: float) -> None:
    model = Classifier(Tied())
    step = IREStep(model, torch.optim.SGD(model.parameters(), lr=0.1), kappa=kappa, gamma=1.0)
    step(cases.loss_of(model), next(iter(cases.loader(cases.data()))))
    factors = step.boost_factors(model, step.optimizer)
    assert float(factors[id(model.net.embed.weight)].max()) == expected
    assert float(factors[id(model.net.tail.weight)].max()) == 2


def test_parameters_of_a_pattern_are_ranked_among_themselves() -> None:
    h = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0]), torch.tensor([5.0, 6.0])]
    ours = FlatMasks({"a": 0.5, "b": 1.0, "none": 0.1}, "global", False, 0.0)
    ours.refresh(["x", "y", "z"], h, patterns=["a", "b", "a"])
    assert [ours.masks[name].tolist() for name in "xyz"] == [[1, 1, 1, 0], [1, 1], [0, 0]]
    assert list(ours.masks) == ["x", "y", "z"]
    thresholds = {tag: float(value) for tag, value in ours.logs.items() if tag.startswith(tags.THRESHOLD)}
    assert thresholds == {"ire/threshold/a": 3.0, "ire/threshold/b": 20.0}
    assert float(ours.logs[tags.FLAT_FRACTION]) == pytest.approx(5 / 8)


@pytest.mark.parametrize("key", ["kappa", "gamma"])
def test_a_parameter_without_a_pattern_is_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{key}` to have a pattern.*`net.0.bias`.*add \"\*\"") as error:
        cases.fit(Classifier(), [IRE(**{key: {"*.weight": 0.5}})])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["kappa", "gamma"])
@pytest.mark.parametrize("patterns", [["nothing*", "*"], ["*.bias", "*.0.bias", "*"], ["*", "*.bias"]])
def test_a_pattern_that_does_nothing_is_warned_about(key: str, patterns: list[str]) -> None:
    with pytest.warns(UserWarning, match=rf"`{key}`: the pattern '\S+' fits no parameter of Classifier"):
        cases.fit(Classifier(), [IRE(**{key: dict.fromkeys(patterns, 0.5)})])


def test_the_rest_may_be_nothing() -> None:
    cases.fit(Classifier(), [IRE(kappa={"*.weight": 1, "*.bias": 0, "*": 2})])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kappa": {}}, r"`kappa` to be a number, or a mapping from name patterns to numbers such as .*, got {}"),
        ({"kappa": {3: 1.0}}, r"a mapping from name patterns.*got {3: 1.0}"),
        ({"kappa": {"*": -1}}, r"`kappa` of '\*' to be a number >= 0, got -1"),
        ({"gamma": {"a": 0.5, "*": 0}}, r"`gamma` of '\*' to be a number in \(0, 1\], got 0"),
        ({"gamma": {"a": "x"}}, r"`gamma` of 'a' to be a number"),
    ],
)
def test_wrong_mappings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        IRE(**settings)
    assert "\n" not in str(error.value)


def test_kappa_zero_for_all_is_off() -> None:
    assert IRE(kappa={"*": 0}).idle
    assert not IRE(kappa={"a": 0, "*": 1}).idle


def test_mappings_are_told_in_words(capsys: Any) -> None:
    ire = IRE(kappa={"*.bias": 0, "*": 4}, gamma={"*": 0.5}, dry_run=True)
    assert ire.hyper_parameters()["kappa"] == "0 for *.bias, 4 for *"
    assert ire.hyper_parameters()["gamma"] == "0.5 for *"
    assert IRE(kappa={"*": 0}, gamma={"*": 0.5}).hyper_parameters()["gamma"] == 0.0
    cases.fit(Classifier(), [ire])
    assert "gamma 0.5 for *, step 0" in capsys.readouterr().out


class ByHand(Classifier):
    """Two optimizers, one for each layer, stepped by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(cases.loss_of(self)(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 2)]


def test_by_name_in_manual_optimization() -> None:
    module, ire = ByHand(), IRE(kappa=BY_NAME, gamma={"*.bias": 0.5, "*": 1.0})
    trainer = cases.fit(module, [ire])
    found = [ire.boost_factors(module, optimizer) for optimizer in trainer.optimizers]
    expected = [{"net.0.weight": 1.5, "net.0.bias": 1.5}, {"net.2.weight": 5.0, "net.2.bias": 1.0}]
    names = dict(module.named_parameters())
    for factors, maxima in zip(found, expected, strict=True):
        assert {name: float(factors[id(names[name])].max()) for name in maxima} == maxima
        assert len(factors) == 2
    assert float((found[0][id(names["net.0.bias"])] == 1).float().mean()) == 0.5
