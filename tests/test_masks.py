"""The masks of a run by themselves: the moving average of h, and what of a saved state fits which parameters."""

from typing import Any

import cases
import pytest
import torch
from modules import Classifier
from torch import Tensor
from torch.optim import Optimizer

from lightning_ire import IREStep, tags
from lightning_ire.engine.masks import FlatMasks
from lightning_ire.functional import as_shares, flat_masks, flat_threshold, pack_mask

BETA, GAMMA = 0.9, 0.5


def estimates(count: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    """A list of estimates, skewed as curvatures are: squares of normal numbers times a spread of scales."""
    generator = torch.Generator().manual_seed(0)
    scales = [torch.randn(shape, generator=generator).exp() for shape in shapes]
    return [[scale * torch.randn(scale.shape, generator=generator).square() for scale in scales] for _ in range(count)]


def masks(beta: float = BETA, scope: str = "global") -> FlatMasks:
    return FlatMasks(GAMMA, scope, False, beta)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_moving_average_is_the_authors(scope: Any) -> None:
    """h_t = beta * h_(t - 1) + (1 - beta) * new from h_0 = 0; started at the first estimate many bits would differ."""
    ours, differ = masks(scope=scope), 0
    authors = [torch.zeros(30, 20), torch.zeros(30)]
    ours_before: list[Tensor] = []
    for new in estimates(6, (30, 20), (30,)):
        authors = [BETA * old + (1 - BETA) * h for old, h in zip(authors, new, strict=True)]
        started_at_first = [BETA * old + (1 - BETA) * h for old, h in zip(ours_before or new, new, strict=True)]
        ours_before = started_at_first
        ours.refresh(["w", "b"], new)
        expected = flat_masks(authors, GAMMA, scope=scope)
        for name, mask, other in zip("wb", expected, flat_masks(started_at_first, GAMMA, scope=scope), strict=True):
            assert torch.equal(ours.masks[name], mask)
            differ += int((mask != other).sum())
    assert differ > 100


def test_the_logged_threshold_is_that_of_the_average_without_its_bias() -> None:
    """Of estimates that are all the same it is their own."""
    (h,) = estimates(1, (30, 20))
    ours = masks()
    for count in range(1, 5):
        ours.refresh(["w"], h)
        torch.testing.assert_close(ours.average["w"], (1 - BETA**count) * h[0])
        torch.testing.assert_close(ours.logs[tags.THRESHOLD], flat_threshold(h, GAMMA))


@pytest.mark.parametrize("why", ["unfrozen", "resized"])
def test_a_parameter_that_joins_later_is_ranked_as_if_it_had_been_there(why: str) -> None:
    """Its average starts with the weight that the others' have by then: started at zero it would look flat."""
    (first,) = estimates(1, (40,))
    ours = masks()
    for _ in range(3):
        ours.refresh(["old", "new"], [first[0], None if why == "unfrozen" else torch.ones(7)])
    ours.refresh(["old", "new"], [first[0], first[0]])
    torch.testing.assert_close(ours.average["new"], ours.average["old"])
    assert torch.equal(ours.masks["new"], ours.masks["old"])
    ours.refresh(["old", "new"], [first[0], 3 * first[0]])
    torch.testing.assert_close(ours.average["new"], ours.average["old"] + 0.1 * 2 * first[0])


def test_without_beta_nothing_is_averaged() -> None:
    ours = masks(beta=0.0)
    for h in estimates(3, (30,)):
        ours.refresh(["w"], h)
        assert torch.equal(ours.logs[tags.THRESHOLD], flat_threshold(h, GAMMA))
        assert torch.equal(ours.masks["w"], flat_masks(h, GAMMA)[0])
    assert ours.average == {}
    assert ours.average_weight == 0


def test_a_saved_average_goes_on() -> None:
    first, second, third = estimates(3, (30,))
    straight, half, resumed = masks(), masks(), masks()
    for h in (first, second, third):
        straight.refresh(["w"], h)
    for h in (first, second):
        half.refresh(["w"], h)
    assert resumed.load_state_dict(half.state_dict(), {"w": torch.zeros(30)}) == []
    resumed.refresh(["w"], third)
    assert torch.equal(resumed.average["w"], straight.average["w"])
    assert torch.equal(resumed.logs[tags.THRESHOLD], straight.logs[tags.THRESHOLD])


def test_the_average_of_an_older_release_goes_on_as_it_was() -> None:
    """It started at the first estimate, so it has no bias: neither have the threshold and who joins."""
    first, second = estimates(2, (30,))
    ours = masks()
    old = {"masks": {"w": pack_mask(torch.ones(30, dtype=torch.bool))}, "average": {"w": first[0]}, "logs": {}}
    assert ours.load_state_dict(old, {"w": torch.zeros(30)}) == []
    ours.refresh(["w", "new"], [second[0], second[0]])
    expected = BETA * first[0] + (1 - BETA) * second[0]
    torch.testing.assert_close(ours.average["w"], expected)
    torch.testing.assert_close(ours.average["new"], second[0])
    torch.testing.assert_close(ours.logs[tags.THRESHOLD], flat_threshold([expected, second[0]], GAMMA))


def test_beta_switched_on_at_a_resume_starts_at_zero() -> None:
    (h,) = estimates(1, (30,))
    plain, ours = masks(beta=0.0), masks()
    plain.refresh(["w"], h)
    for drop in ((), ("average_weight",)):
        state = {key: value for key, value in plain.state_dict().items() if key not in drop}
        ours.load_state_dict(state, {"w": torch.zeros(30)})
        ours.refresh(["w"], h)
        torch.testing.assert_close(ours.average["w"], (1 - BETA) * h[0])


# saved shape and the parameter's: as many bytes in each pair
OTHER_SHAPES = {
    "longer": ((10,), (12,)),
    "shorter": ((12,), (10,)),
    "another-layout": ((2, 3), (3, 2)),
    "flattened": ((2, 3), (6,)),
    "one-more-dimension": ((6,), (6, 1)),
    "scalar": ((1,), ()),
}


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(("saved", "now"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_a_mask_of_another_shape_does_not_fit(saved: tuple[int, ...], now: tuple[int, ...], beta: float) -> None:
    before, after = masks(beta), masks(beta)
    before.refresh(["w", "same"], [torch.rand(saved), torch.rand(4, 3)])
    state = before.state_dict()
    assert after.load_state_dict(state, {"w": torch.zeros(now), "same": torch.zeros(4, 3)}) == ["w"]
    assert list(after.masks) == ["same"]
    assert torch.equal(after.masks["same"], before.masks["same"])
    assert list(after.average) == (["same"] if beta else [])
    if beta:  # an older release saved no shapes, but that of the average
        del state["shapes"]
        assert after.load_state_dict(state, {"w": torch.zeros(now), "same": torch.zeros(4, 3)}) == ["w"]


def test_a_mask_without_a_shape_is_made_anew() -> None:
    """A number of bytes does not tell 10 coordinates from 12, nor one layout from another."""
    state = masks(0.0).state_dict()
    del state["shapes"]
    state["masks"] = {"w": pack_mask(torch.ones(10, dtype=torch.bool))}
    ours = masks(0.0)
    for shape in ((12,), (5, 2), (10,)):
        assert ours.load_state_dict(state, {"w": torch.zeros(shape)}) == ["w"]
        assert not ours.masks


# soft masks


def soft(beta: float = 0.0) -> FlatMasks:
    return FlatMasks(GAMMA, "global", False, beta, soft=True)


def test_soft_masks_are_logged_as_means() -> None:
    first, second = estimates(2, (30, 20), (7,))
    ours = soft()
    ours.refresh(["w", "b"], first)
    before = [as_shares(ours.masks[name], torch.float64) for name in "wb"]
    ours.refresh(["w", "b"], second)
    now = [as_shares(ours.masks[name], torch.float64) for name in "wb"]
    flat = torch.cat([n.flatten() for n in now])
    assert float(ours.logs[tags.FLAT_FRACTION]) == pytest.approx(float(flat.mean()))
    assert float(flat.mean()) == pytest.approx(GAMMA, abs=2e-3)
    sharp = [1 - torch.cat([n.flatten() for n in some]) for some in (before, now)]
    jaccard = torch.minimum(*sharp).sum() / torch.maximum(*sharp).sum()
    assert float(ours.logs[tags.MASK_IOU]) == pytest.approx(float(jaccard), rel=1e-5)
    assert tags.MASK_IOU_CHANCE not in ours.logs
    half = float(ours.logs[tags.THRESHOLD])  # n falls from 1 at 2/3 of it to 0 at 4/3 of it
    expected = (2 - (1.5 / half) * torch.cat([h.flatten() for h in second])).clamp(0, 1)
    torch.testing.assert_close(flat.float(), expected, rtol=0, atol=3e-3)
    assert ours.flat_counts() == {"w": round(float(now[0].sum())), "b": round(float(now[1].sum()))}
    assert "50.1 %" in ours.table({"w": torch.zeros(30, 20), "b": torch.zeros(7)}).splitlines()[-1]


def test_soft_masks_are_saved_as_they_are() -> None:
    first, second = estimates(2, (30, 20), (1,))
    ours, resumed = soft(BETA), soft(BETA)
    ours.refresh(["w", "b"], first)
    state = ours.state_dict()
    parameters = {"w": torch.zeros(30, 20), "b": torch.zeros(1)}
    assert resumed.load_state_dict(state, parameters) == []
    for one in (ours, resumed):
        assert one.masks["w"].dtype == torch.uint8
        one.refresh(["w", "b"], second)
    assert all(torch.equal(ours.masks[name], resumed.masks[name]) for name in "wb")
    assert resumed.logs.keys() == ours.logs.keys()
    assert all(torch.equal(value, resumed.logs[tag]) for tag, value in ours.logs.items())


def test_the_other_kind_stays_in_force_until_the_next_refresh() -> None:
    first, second = estimates(2, (30, 20))
    parameters = {"w": torch.zeros(30, 20)}
    for before, after in ((soft(), masks(0.0)), (masks(0.0), soft())):
        before.refresh(["w"], first)
        assert after.load_state_dict(before.state_dict(), parameters) == []
        assert torch.equal(after.masks["w"], before.masks["w"])
        after.refresh(["w"], second)
        assert after.masks["w"].dtype != before.masks["w"].dtype
        assert tags.MASK_IOU not in after.logs


def test_hard_masks_are_saved_as_before() -> None:
    ours = masks(0.0)
    ours.refresh(["w"], [torch.rand(10)])
    state = ours.state_dict()
    assert list(state) == ["masks", "shapes", "average", "average_weight", "logs"]
    assert state["masks"]["w"].shape == (2,)


class Steps(Optimizer):
    """An optimizer of the user's own, whose exact zeros stay zeros."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(torch.where(parameter.grad > 0, 0.0, parameter - 0.1 * parameter.grad))


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), Steps], ids=["sgd", "proximal"])
def test_a_step_is_lengthened_by_the_soft_mask(make: Any) -> None:
    torch.manual_seed(0)
    model = Classifier().double()
    step = IREStep(model, make(model.parameters()), kappa=3.0, gamma=0.6, mask="soft")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(cases.loss_of(model), next(iter(cases.loader(cases.data(dtype=torch.float64)))))
    flat = sharp = 0.0
    factors = step.boost_factors(model, step.optimizer)
    for parameter, old, mask in zip(model.parameters(), before, step.progress.masks.masks.values(), strict=True):
        n = mask.double() / 255
        base = old - 0.1 * parameter.grad
        if make is Steps:
            base = torch.where(parameter.grad > 0, 0.0, base)
            n = torch.where(base == 0, 0.0, n)
        else:
            torch.testing.assert_close(factors[id(parameter)], 1 + 3 * n)
        torch.testing.assert_close(parameter.detach(), base + 3 * n * (base - old), rtol=1e-12, atol=1e-12)
        n = mask.double() / 255
        flat += float((n * (parameter.detach() - old)).square().sum())
        sharp += float(((1 - n) * (parameter.detach() - old)).square().sum())
    assert float(step.logs[tags.STEP_NORM_FLAT]) == pytest.approx(flat**0.5, rel=1e-6)
    assert float(step.logs[tags.STEP_NORM_SHARP]) == pytest.approx(sharp**0.5, rel=1e-6)
