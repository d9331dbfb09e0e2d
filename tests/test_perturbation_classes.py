"""SAM and AverageSAM as users meet them: arguments, the weights they move, what they are not."""

import math
import pickle

import pytest
import torch
from torch import nn

from lightning_ire import SAM, AdversarialModelPerturbation, Ascent, AverageSAM, ConfigurationError, Perturbation
from lightning_ire.functional import average_sam_displacement, global_norm, sam_displacement


def ascent(weights, gradients, generators=(), groups=None, moves=None):
    return Ascent(weights, gradients, groups or [{}] * len(weights), generators, moves)


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


@pytest.mark.parametrize("parameters", ["", None, [], ["a", 3], 7, {"a": 1}, [""]])
def test_parameters_are_all_or_norm_or_patterns(parameters):
    with pytest.raises(ConfigurationError, match="Expected `parameters` to be 'all', 'norm' or name patterns, got "):
        SAM(parameters=parameters)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*.bias", {"0.bias", "1.bias", "3.bias"}),
        (["1.*", "3.weight"], {"1.weight", "1.bias", "3.weight"}),
        (("0.weight", "no.such"), {"0.weight"}),
    ],
)
def test_patterns_select_by_name(patterns, expected):
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))
    assert SAM(parameters=patterns).selects(module) == expected


def test_a_pattern_selects_a_tied_weight_under_any_of_its_names():
    module = nn.Module()
    module.embedding, module.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    module.head.weight = module.embedding.weight
    assert SAM(parameters="head.*").selects(module) == {"head.weight"}


def test_patterns_that_fit_nothing_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"fit names of Linear's parameters \(such as 'weight'\), got 'wieght'"
    ):
        SAM(parameters="wieght").selects(nn.Linear(2, 2))


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
        (SAM(2, adaptive="weights", eta=0.01), "SAM(rho=2, adaptive='weights', eta=0.01)"),
        (SAM(parameters=["*.bias"]), "SAM(rho=0.05, parameters=['*.bias'])"),
        (AverageSAM(0.1), "AverageSAM(rho=0.1)"),
        (AdversarialModelPerturbation(), "AdversarialModelPerturbation(epsilon=0.5)"),
        (
            AdversarialModelPerturbation(0.2, 3, 2, "global", sync=True),
            "AdversarialModelPerturbation(epsilon=0.2, zeta=3, ascents=2, scope='global', sync=True)",
        ),
    ],
)
def test_repr_is_what_to_write(perturbation, text):
    text = text or "SAM(rho=2, adaptive=True, interval=5, parameters='norm', sync=True)"
    assert repr(perturbation) == text
    classes = {kind.__name__: kind for kind in (SAM, AverageSAM, AdversarialModelPerturbation)}
    again = eval(text, classes)
    assert vars(again) == vars(perturbation)


def test_perturbations_can_be_pickled():
    sam = pickle.loads(pickle.dumps(SAM(0.2, adaptive=True, interval=3)))
    assert vars(sam) == vars(SAM(0.2, adaptive=True, interval=3))


@pytest.mark.parametrize("adaptive", ["weight", "all", 1, None])
def test_adaptive_is_true_false_or_weights(adaptive):
    with pytest.raises(ConfigurationError, match=f"`adaptive` to be true, false or 'weights', got {adaptive!r}"):
        SAM(adaptive=adaptive)


@pytest.mark.parametrize("eta", [-0.1, math.inf, "0.1", True])
def test_eta_is_a_finite_number_from_zero(eta):
    with pytest.raises(ConfigurationError, match=f"Expected `eta` to be a number >= 0, got {eta!r}"):
        SAM(adaptive=True, eta=eta)


def test_eta_needs_sizes_to_be_added_to():
    with pytest.raises(ConfigurationError, match=r"`adaptive` to be true or 'weights' for `eta=0.01`.*set `adaptive`"):
        SAM(eta=0.01)


def test_adaptive_weights_are_those_with_weight_in_their_name():
    """The loop of the authors' script (github.com/SamsungLabs/ASAM, asam.py), with its eta."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    named = dict(module.named_parameters())
    gradients = {name: torch.randn_like(p) for name, p in named.items()}
    scaled = {name: g * (named[name].abs() + 0.01) if "weight" in name else g for name, g in gradients.items()}
    norm = torch.stack([g.norm() for g in scaled.values()]).norm()
    sam = SAM(0.5, adaptive="weights", eta=0.01)
    moves, found = sam.displacement(
        Ascent(list(named.values()), list(gradients.values()), [{}] * 6, (), names=list(named))
    )
    torch.testing.assert_close(found, norm)
    for name, move in zip(named, moves, strict=True):
        size = named[name].abs() + 0.01 if "weight" in name else 1.0
        torch.testing.assert_close(move, 0.5 * size * scaled[name] / norm)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_moves_along_the_gradient(adaptive):
    weights, gradients = [torch.tensor([1.0, -2.0]), torch.tensor([0.5])], [torch.tensor([3.0, 1.0]), None]
    moves, norm = SAM(0.3, adaptive=adaptive).displacement(ascent(weights, gradients))
    expected, expected_norm = sam_displacement(weights, gradients, 0.3, adaptive=adaptive)
    assert torch.equal(moves[0], expected[0])
    assert moves[1] is None
    assert norm == expected_norm


def test_average_sam_moves_by_the_generators():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    weights = [torch.zeros(3), torch.zeros(2, 2)]
    moves, norm = AverageSAM(0.3).displacement(ascent(weights, [None, None], generators()))
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


def test_a_relative_needs_its_displacement_only():
    with pytest.raises(TypeError, match=r"abstract.*displacement"):
        Perturbation()

    class Up(Perturbation):
        def displacement(self, ascent):
            return [torch.ones_like(parameter) for parameter in ascent.parameters], None

    up = Up()
    assert (up.uses_gradient, up.ascents, up.interval, up.sync) == (True, 1, 1, False)
    assert up.selects(nn.Linear(1, 1)) is None
    assert up.effective_radius(1.0) is None


# radii of parameter groups


@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_with_a_radius_move_by_it_and_share_the_norm(adaptive):
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([0.5]), torch.tensor([4.0])]
    gradients = [torch.tensor([3.0, 1.0]), torch.tensor([2.0]), torch.tensor([-1.0])]
    groups = [{"sam_rho": 0.6, "rho": 0.9}, {"sam_rho": 0}, {"rho": 0.9}]  # Adadelta has a "rho" of its own
    moves, norm = SAM(0.3, adaptive=adaptive).displacement(ascent(weights, gradients, groups=groups))
    plain, plain_norm = sam_displacement(weights, gradients, 0.3, adaptive=adaptive)
    assert norm == plain_norm
    torch.testing.assert_close(moves[0], 2 * plain[0], rtol=1e-6, atol=0)
    assert moves[1].tolist() == [0.0]
    assert torch.equal(moves[2], plain[2])


def test_random_moves_have_the_radius_of_their_group():
    weights = [torch.zeros(3), torch.zeros(2, 2)]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    moves, _ = AverageSAM(0.3).displacement(ascent(weights, [None] * 2, generators, [{"sam_rho": 3.0}, {}]))
    again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plain = average_sam_displacement(weights, 0.3, generators=again)
    torch.testing.assert_close(moves[0], 10 * plain[0], rtol=1e-6, atol=0)
    assert torch.equal(moves[1], plain[1])


# adversarial model perturbation


GRADIENTS = [torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]])]  # norm 5
WEIGHTS = [torch.zeros(2), torch.zeros(7), torch.zeros(1, 1)]


@pytest.mark.parametrize("zeta", [0.1, 0.2, 1.0, 50.0])
def test_one_ascent_in_one_ball_is_sam_outside_and_unnormalized_sam_inside(zeta):
    """RELATED_WORK 4: SAM with rho = epsilon where zeta ||g|| >= epsilon, else theta + zeta g."""
    adversarial = AdversarialModelPerturbation(1.0, zeta, scope="global")
    moves, norm = adversarial.displacement(ascent(WEIGHTS, GRADIENTS))
    assert norm == 5
    expected, _ = sam_displacement(WEIGHTS, GRADIENTS, 1.0 if zeta * 5 >= 1 else zeta * 5)
    for move, same in zip(moves, expected, strict=True):
        assert (move is None) == (same is None)
        if move is not None:
            torch.testing.assert_close(move, same, rtol=1e-6, atol=0)
    assert adversarial.effective_radius(5.0) == pytest.approx(float(global_norm(moves)) / 5)


def test_a_ball_for_each_tensor():
    moves, _ = AdversarialModelPerturbation(0.5, zeta=0.15).displacement(ascent(WEIGHTS, GRADIENTS))
    torch.testing.assert_close(moves[0], torch.tensor([0.45, 0.0]))  # inside
    torch.testing.assert_close(moves[2], torch.tensor([[0.5]]))  # at its edge


def test_further_ascents_go_on_from_the_last_one():
    before = [torch.tensor([0.0, 0.3]), torch.ones(7), None]
    adversarial = AdversarialModelPerturbation(100.0, zeta=0.1, ascents=2, scope="global")
    moves, _ = adversarial.displacement(ascent(WEIGHTS, GRADIENTS, moves=before))
    torch.testing.assert_close(moves[0], torch.tensor([0.3, 0.3]))
    assert torch.equal(moves[1], torch.ones(7))
    torch.testing.assert_close(moves[2], torch.tensor([[0.4]]))
    assert before[0].tolist() == [0.0, pytest.approx(0.3)]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(scope, bad):
    gradients = [torch.tensor([bad, 1.0]), torch.ones(7), torch.ones(1, 1)]
    moves, norm = AdversarialModelPerturbation(scope=scope).displacement(ascent(WEIGHTS, gradients))
    assert not math.isfinite(float(norm))
    assert all(not move.any() for move in moves)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_zero_gradient_and_a_ball_of_radius_zero_move_nothing(scope):
    for epsilon, gradients in ((0.0, GRADIENTS), (0.5, [torch.zeros(2), None, torch.zeros(1, 1)])):
        moves, _ = AdversarialModelPerturbation(epsilon, scope=scope).displacement(ascent(WEIGHTS, gradients))
        assert [None if move is None else move.any().item() for move in moves] == [False, None, False]


def test_half_gradients_are_climbed_in_float32():
    gradient = torch.tensor([300.0, 400.0], dtype=torch.float16)  # its square overflows
    (move,), norm = AdversarialModelPerturbation(0.5).displacement(ascent([torch.zeros(2).half()], [gradient]))
    assert norm == 500
    assert move.dtype == torch.float16
    torch.testing.assert_close(move.float(), torch.tensor([0.3, 0.4]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1}, "Expected `epsilon` to be a number >= 0, got -1"),
        ({"zeta": 0}, "Expected `zeta` to be a number > 0, got 0"),
        ({"ascents": 0}, "Expected `ascents` to be a whole number >= 1, got 0"),
        ({"scope": "layer"}, "Expected `scope` to be one of 'tensor', 'global', got 'layer'"),
    ],
)
def test_settings_of_the_ball_are_checked(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        AdversarialModelPerturbation(**settings)


@pytest.mark.parametrize(
    ("perturbation", "radius"),
    [
        (SAM(0.3), 0.1),
        (AdversarialModelPerturbation(0.3, zeta=9, scope="global"), 0.1),
        (AdversarialModelPerturbation(0.3, zeta=0.05, scope="global"), 0.05),
        (AdversarialModelPerturbation(0.3, scope="tensor"), None),
        (AdversarialModelPerturbation(0.3, ascents=2, scope="global"), None),
        (AverageSAM(0.3), None),
    ],
)
def test_effective_radius_at_a_gradient_of_norm_3(perturbation, radius):
    assert perturbation.effective_radius(3.0) == (None if radius is None else pytest.approx(radius))
