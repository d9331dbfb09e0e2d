"""SAM and AverageSAM as users meet them: arguments, the weights they move, what they are not."""

import math
import pickle
import re

import pytest
import torch
from lightning import Trainer
from torch import nn

from lightning_ire import SAM, AverageSAM, ConfigurationError, Perturbation
from lightning_ire.functional import average_sam_displacement, sam_displacement


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, "0.1", True, None])
@pytest.mark.parametrize("kind", [SAM, AverageSAM])
def test_rho_is_a_finite_number_from_zero(kind, rho):
    with pytest.raises(ConfigurationError, match=f"Expected `rho` to be a number >= 0, got {rho!r}"):
        kind(rho)


@pytest.mark.parametrize("rho", [0, 0.0, 0.05, 3])
@pytest.mark.parametrize("kind", [SAM, AverageSAM])
def test_rho_may_be_zero_or_whole(kind, rho):
    got = kind(rho).rho
    assert got == rho
    assert isinstance(got, float)


@pytest.mark.parametrize("interval", [0, -2, 1.5, 2.0, True, None, "2"])
def test_interval_is_a_whole_number_from_one(interval):
    with pytest.raises(ConfigurationError, match=f"Expected `interval` to be a whole number >= 1, got {interval!r}"):
        SAM(interval=interval)


@pytest.mark.parametrize("parameters", ["bias", "Norm", None, ["norm"]])
def test_parameters_are_all_or_norm(parameters):
    with pytest.raises(ConfigurationError, match="Expected `parameters` to be one of 'all', 'norm', got "):
        SAM(parameters=parameters)


def test_defaults():
    sam = SAM()
    assert (sam.rho, sam.adaptive, sam.interval, sam.parameters, sam.sync) == (0.05, False, 1, "all", False)
    assert sam.uses_gradient
    average = AverageSAM()
    assert (average.rho, average.interval, average.sync) == (0.05, 1, False)
    assert not average.uses_gradient


@pytest.mark.parametrize(
    ("perturbation", "text"),
    [
        (SAM(0.05), "SAM(rho=0.05)"),
        (SAM(0), "SAM(rho=0)"),
        (SAM(2.0, adaptive=True, interval=5, parameters="norm", sync=True), None),
        (AverageSAM(0.1), "AverageSAM(rho=0.1)"),
    ],
)
def test_repr_is_what_to_write(perturbation, text):
    text = text or "SAM(rho=2, adaptive=True, interval=5, parameters='norm', sync=True)"
    assert repr(perturbation) == text
    again = eval(text, {"SAM": SAM, "AverageSAM": AverageSAM})
    assert vars(again) == vars(perturbation)


def test_perturbations_can_be_pickled():
    sam = pickle.loads(pickle.dumps(SAM(0.2, adaptive=True, interval=3)))
    assert vars(sam) == vars(SAM(0.2, adaptive=True, interval=3))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_moves_along_the_gradient(adaptive):
    weights, gradients = [torch.tensor([1.0, -2.0]), torch.tensor([0.5])], [torch.tensor([3.0, 1.0]), None]
    moves, norm = SAM(0.3, adaptive=adaptive).displacement(weights, gradients, [])
    expected, expected_norm = sam_displacement(weights, gradients, 0.3, adaptive=adaptive)
    assert torch.equal(moves[0], expected[0])
    assert moves[1] is None
    assert norm == expected_norm


def test_average_sam_moves_by_the_generators():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    weights = [torch.zeros(3), torch.zeros(2, 2)]
    moves, norm = AverageSAM(0.3).displacement(weights, [None, None], generators())
    assert all(map(torch.equal, moves, average_sam_displacement(weights, 0.3, generators=generators())))
    assert norm is None


class PreNorm(nn.Module):
    """A block that is called after its first layer, as in many vision transformers."""

    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(4)
        self.then = nn.Linear(4, 4)


class Mixed(nn.Module):
    """Every kind of normalization layer beside layers that are none."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.layer = nn.LayerNorm(4)
        self.root = nn.RMSNorm(4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.scale = nn.Parameter(torch.ones(4))
        self.embedding = nn.Embedding(5, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.block = PreNorm()
        self.head = nn.Linear(4, 2)


def test_norm_selects_the_normalization_layers_parameters():
    expected = {"body.1.weight", "body.1.bias", "body.3.weight", "body.3.bias", "layer.weight", "layer.bias"}
    expected |= {"root.weight", "instance.weight", "instance.bias", "block.first.weight", "block.first.bias"}
    module = Mixed()
    assert SAM(parameters="norm").selects(module) == expected
    assert expected < {name for name, _ in module.named_parameters()}


def test_norm_selects_the_parameters_of_a_bare_layer():
    assert SAM(parameters="norm").selects(nn.LayerNorm(3)) == {"weight", "bias"}


def test_norm_finds_a_shared_layer_by_the_name_that_its_parameters_have():
    module = nn.Module()
    module.first = nn.LayerNorm(3)
    module.second = module.first
    named = {name for name, _ in module.named_parameters()}
    assert SAM(parameters="norm").selects(module) & named == {"first.weight", "first.bias"}


@pytest.mark.parametrize("perturbation", [SAM(), AverageSAM()])
def test_all_weights_by_default(perturbation):
    assert perturbation.selects(Mixed()) is None


@pytest.mark.parametrize(
    "module", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, affine=False))]
)
def test_norm_without_normalization_weights_is_refused(module):
    with pytest.raises(
        ConfigurationError, match=r"normalization layers for `parameters='norm'`, got none .*set `parameters` to 'all'"
    ):
        SAM(parameters="norm").selects(module)


@pytest.mark.parametrize("perturbation", [SAM(0.05), SAM(0.1, adaptive=True), AverageSAM(0.2)])
def test_given_as_a_callback_the_error_shows_what_to_write(perturbation):
    message = (
        f"Expected `callbacks` to hold callbacks, got the perturbation {perturbation!r}: "
        f"for {type(perturbation).__name__} alone write callbacks=[IRE(kappa=0, perturbation={perturbation!r})]."
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        Trainer(callbacks=[perturbation], logger=False, accelerator="cpu", enable_checkpointing=False)


def test_a_relative_needs_its_displacement_only():
    with pytest.raises(TypeError, match=r"abstract.*displacement"):
        Perturbation()

    class Up(Perturbation):
        def displacement(self, parameters, gradients, generators):
            return [torch.ones_like(parameter) for parameter in parameters], None

    up = Up()
    assert (up.uses_gradient, up.interval, up.sync, up.selects(nn.Linear(1, 1))) == (True, 1, False, None)
