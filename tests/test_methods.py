"""The README's table of estimates and perturbations: complete, and its costs counted."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, Method, methods_table
from modules import Classifier
from torch import Tensor, nn

import lightning_ire
from lightning_ire import IRE, Curvature, Perturbation, RandomMask

STEPS, BATCH = 20, 8


class Counted(torch.autograd.Function):
    """The identity; counts the samples that go through it in either direction, and in the second derivative."""

    generate_vmap_rule = True
    forwards = backwards = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        Counted.forwards += len(x)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counted.backwards += len(gradient)
        return Back.apply(gradient)


class Back(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counted.backwards += len(gradient)
        return gradient.clone()


class CountedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(cases.FEATURES, 8), nn.Linear(8, cases.CLASSES)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.tanh(Counted.apply(self.norm(self.first(x)))))


def passes_of(ire: IRE | None) -> tuple[int, int]:
    """Samples that went forward and backward in a run of `STEPS` steps."""
    module = Classifier(CountedNet(), lambda module: torch.optim.Adam(module.parameters(), lr=0.01))
    Counted.forwards = Counted.backwards = 0
    cases.fit(module, [] if ire is None else [ire], cases.loader(cases.data(STEPS * BATCH), BATCH), max_epochs=1)
    return Counted.forwards, Counted.backwards


@pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method.make()))
def test_passes_are_those_of_the_table(method: Method) -> None:
    made = method.make()
    if isinstance(made, Curvature):
        ire = IRE(kappa=1.0, interval=1, curvature=made)
    else:
        ire = IRE(kappa=float(made.needs_mask), curvature=RandomMask(), perturbation=made)
    plain, ours = passes_of(None), passes_of(ire)
    assert plain == (STEPS * BATCH, STEPS * BATCH)
    unit = STEPS * (1 if method.vectorized else BATCH)
    assert Fraction(ours[0] - plain[0], unit) == method.forwards
    assert Fraction(ours[1] - plain[1], unit) == method.backwards


def test_every_estimate_and_perturbation_is_in_the_table() -> None:
    public = [getattr(lightning_ire, name) for name in lightning_ire.__all__]
    bases = (Curvature, Perturbation)
    classes = {one for one in public if isinstance(one, type) and issubclass(one, bases) and one not in bases}
    assert classes == {type(method.make()) for method in METHODS}


def test_what_the_table_says_to_write_makes_it() -> None:
    for method in METHODS:
        made = method.make()
        again = eval(repr(made), vars(lightning_ire))
        assert vars(again) == vars(made)


def test_the_readme_shows_the_methods() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    begin, end = "checked by tests/test_methods.py -->\n", "\n<!-- end of methods -->"
    assert readme.split(begin)[1].split(end)[0] == methods_table()
