"""The loss between two networks: against closed forms, what is left behind, what the command says and writes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import assert_same_bits, clone, random_streams, seed_all
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ire import Barrier, ConfigurationError, _cli_command, barrier
from lightning_ire._cli_barrier import _named
from lightning_ire.cli import main
from lightning_ire.models import ImageClassifier, ResNet

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits_resnet_sgd_ire.yaml")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Two(nn.Module):
    """Two weights, double precision."""

    def __init__(self, x: float = 0.0, y: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))


def well(model: nn.Module) -> Tensor:
    """(x^2 - 1)^2 + y: minima of the first part at -1 and 1, 1 between them."""
    x, y = model.weight
    return (x.square() - 1).square() + y


# Closed forms


def test_a_double_well_has_the_height_of_its_ridge() -> None:
    found = barrier(Two(), state_of(Two(-1.0, 0.2)), state_of(Two(1.0, 0.6)), well, points=5)
    assert found.alphas == [0.0, 0.25, 0.5, 0.75, 1.0]
    x = [-1 + 2 * alpha for alpha in found.alphas]
    assert found.values["loss"] == pytest.approx([(v * v - 1) ** 2 + 0.2 + 0.2 * (v + 1) for v in x], abs=1e-12)
    assert found.excess() == pytest.approx([(v * v - 1) ** 2 for v in x], abs=1e-12)
    assert (found.height, found.at) == (pytest.approx(1.0), 0.5)
    assert found.average == {"loss": pytest.approx(1.4)}
    assert not found.recalibrated
    assert found.notes == []


def test_the_highest_point_above_the_chord_is_not_the_highest_loss() -> None:
    found = barrier(Two(), state_of(Two(-1.0)), state_of(Two(1.5)), well, points=21)
    x = torch.linspace(-1, 1.5, 21, dtype=torch.float64)
    above = (x.square() - 1).square() - torch.linspace(0, 1, 21, dtype=torch.float64) * 1.25**2
    assert found.height == pytest.approx(float(above.max()))
    assert found.at == pytest.approx(float(above.argmax()) / 20)
    assert found.values["loss"][-1] == max(found.values["loss"])


def test_a_convex_loss_has_no_barrier() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, generator=generator), torch.randn(50, 1, generator=generator)
    model, one, other = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)
    found = barrier(model, one.state_dict(), other.state_dict(), lambda net: nn.functional.mse_loss(net(x), y))
    assert (found.height, found.at) == (0.0, 0.0)
    assert max(found.excess()[1:-1]) < 0
    assert found.line.startswith("no loss barrier: none of 9 points between is above the chord of ")
    same = barrier(model, one.state_dict(), one.state_dict(), lambda net: nn.functional.mse_loss(net(x), y))
    assert same.excess() == [0.0] * 11
    assert Barrier([0.0, 0.5, 1.0], {"loss": [1e17, 0.0, 1.0]}).excess()[-1] == 0.0


def test_losses_that_are_not_finite() -> None:
    between = Barrier([0.0, 0.5, 1.0], {"loss": [1.0, math.nan, 2.0]})
    assert (between.height, between.at) == (math.inf, 0.5)
    at_an_end = Barrier([0.0, 0.5, 1.0], {"loss": [1.0, 1.0, math.inf]})
    assert math.isnan(at_an_end.height)
    assert math.isnan(at_an_end.at)
    assert at_an_end.line.startswith("no barrier can be told: the loss is 1 and inf at the ends")
    for found in (between, at_an_end):
        assert found.figure().axes[0].get_ylabel() == "loss"


# What is interpolated


class Mixed(nn.Module):
    """Every kind of tensor, and a tied one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.coarse = nn.Parameter(torch.randn(300, generator=generator).bfloat16())
        self.turning = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.complex64))
        self.tied = self.coarse
        self.frozen = nn.Parameter(torch.full((2,), 0.1), requires_grad=False)
        self.register_buffer("count", torch.tensor(10 * seed))
        self.register_buffer("mask", torch.tensor([-torch.inf, float(seed)]))


def test_ends_are_exact_and_kinds_of_tensors_between() -> None:
    one, other, seen = Mixed(1), Mixed(2), []
    model = Mixed(3)
    barrier(model, one.state_dict(), other.state_dict(), lambda net: seen.append(state_of(net)) or 0.0, points=5)
    for end, state in ((one, seen[0]), (other, seen[-1])):
        assert all(torch.equal(state[name], value) for name, value in end.state_dict().items())
    for alpha, state in zip((0.25, 0.5, 0.75), seen[1:-1], strict=True):
        exact = torch.lerp(one.coarse.detach().float(), other.coarse.detach().float(), alpha)
        assert torch.equal(state["coarse"], exact.bfloat16())
        assert torch.equal(state["tied"], state["coarse"])
        assert torch.allclose(state["turning"], (1 - alpha) * one.turning + alpha * other.turning)
        assert torch.equal(state["frozen"], one.frozen)
        assert state["count"] == (10 if alpha <= 0.5 else 20)
        assert state["mask"].tolist() == [-math.inf, 1 + alpha]
    assert model.tied is model.coarse


@pytest.mark.parametrize("end", ["first", "second"])
def test_the_models_own_state_may_be_an_end(end: str) -> None:
    model, other = Two(-1.0), state_of(Two(1.0))
    ends = {"first": other, "second": other, end: model.state_dict()}
    assert barrier(model, ends["first"], ends["second"], well, points=3).height == 1.0
    assert model.weight.tolist() == [-1.0, 0.0]


def test_files_and_a_compiled_model(tmp_path: Path) -> None:
    torch.save(state_of(Two(-1.0)), tmp_path / "plain.pt")
    torch.save({"state_dict": state_of(Two(1.0)), "epoch": 3}, tmp_path / "lightning.ckpt")
    for model in (Two(), torch.compile(Two())):
        found = barrier(model, tmp_path / "plain.pt", str(tmp_path / "lightning.ckpt"), well, points=3)
        assert found.values["loss"] == [0.0, 1.0, 0.0]


# BatchNorm


class Normed(nn.Module):
    """A layer whose outputs have another mean and variance at each point."""

    def __init__(self, factor: float, dropout: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.drop = nn.Dropout(0.5 if dropout else 0.0)
        self.norm = nn.BatchNorm1d(1, affine=False, momentum=0.3)
        self.unused = nn.BatchNorm1d(1)
        with torch.no_grad():
            self.first.weight.fill_(factor)
            self.first.bias.fill_(factor**2)
        self.norm.running_mean.fill_(factor**2)
        self.norm.running_var.fill_(factor**2)
        self.unused.running_mean.fill_(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.first(x)))


ROWS = torch.tensor([[-1.0], [1.0]])  # mean 0; torch's variance is 2, that over batches of one mean 1


def spread(model: nn.Module) -> dict[str, float]:
    """1 where outputs have variance 1 over these rows."""
    outputs = model(ROWS)
    return {"loss": outputs.square().mean(), "unused": float(model.unused.running_mean)}


def test_statistics_are_those_of_the_network_at_every_point() -> None:
    """At the middle the weight is 0.5: its outputs have variance 0.25 and not (4 + 1) / 2 as the interpolation says."""
    one, other = Normed(2.0).state_dict(), Normed(-1.0).state_dict()
    model = Normed(5.0)
    off = barrier(model, one, other, spread, points=3)
    assert off.values["loss"][0] == pytest.approx(1.0, rel=1e-4)
    assert off.average["loss"] == pytest.approx(0.25 / 2.5, rel=1e-3)
    assert "BatchNorm's running statistics are interpolated" in off.notes[0]
    batches = [ROWS, [ROWS + 0.0, "labels"]]

    def by_hand(net: nn.Module) -> None:
        assert net.training
        assert not torch.is_grad_enabled()
        for _ in range(2):
            net(ROWS)

    for given in (batches, by_hand):
        on = barrier(model, one, other, spread, points=3, recalibrate=given)
        assert on.recalibrated
        assert on.notes == []
        assert on.values["loss"] == pytest.approx([0.5] * 3, rel=1e-3)  # unbiased variance, at the ends as well
        assert on.values["unused"] == [2.0, 0.5, -1.0]  # it saw no batch
    assert model.norm.momentum == 0.3


def test_networks_without_batch_norm_need_no_batches() -> None:
    found = barrier(Two(), state_of(Two(-1.0)), state_of(Two(1.0)), well, points=3, recalibrate=[])
    assert not found.recalibrated


# What is left behind


@pytest.mark.parametrize("fails", [None, "evaluate", "recalibrate", "second"])
def test_no_trace_is_left(fails: str | None) -> None:
    seed_all(3)
    model = Normed(5.0, dropout=True)
    model.drop.eval()
    first, second = Normed(2.0).state_dict(), Normed(-1.0).state_dict()
    before, streams, modes = clone(model), random_streams(), [one.training for one in model.modules()]
    if fails == "second":
        second = {**second, "first.bias": torch.ones(4)}
    drawn: list[float] = []

    def evaluate(net: nn.Module) -> float:
        assert not any(one.training for one in net.modules())
        drawn.append(float(torch.rand(())))
        net.norm.register_buffer("more", torch.ones(2))
        if fails == "evaluate" and len(drawn) == 2:
            raise KeyboardInterrupt
        return 0.0

    def recalibrate(net: nn.Module) -> None:
        net(ROWS)
        if fails == "recalibrate":
            raise OverflowError

    def run() -> Barrier:
        return barrier(model, first, second, evaluate, points=3, recalibrate=recalibrate)

    errors = {"evaluate": KeyboardInterrupt, "recalibrate": OverflowError, "second": ConfigurationError}
    if fails is None:
        run()
        assert len(set(drawn)) == 1  # every point has the same random numbers
    else:
        with pytest.raises(errors[fails]):
            run()
    assert_same_bits(before, model)
    assert model.norm.momentum == 0.3
    assert [one.training for one in model.modules()] == modes
    assert random_streams() == streams


# What is refused


def call(**changed: Any) -> Barrier:
    settings: dict[str, Any] = {"model": Normed(1.0), "evaluate": spread, "points": 3, **changed}
    ends = [settings.pop(name, Normed(2.0).state_dict()) for name in ("first", "second")]
    return barrier(settings.pop("model"), *ends, settings.pop("evaluate"), **settings)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"points": 1}, "Expected `points` to be a whole number >= 3, got 1."),
        ({"points": 4}, "Expected `points` to be an odd number, so that the averaged weights are among them, got 4."),
        ({"second": nn.Linear(2, 1).state_dict()}, "`second` to hold the weights of this Normed, got a mapping: "),
        ({"first": {**Normed(1.0).state_dict(), "first.weight": torch.ones(7, 1)}}, "size mismatch for first.weight"),
        ({"first": {}}, "Expected `first` to be a state dict, got a mapping without a tensor in it."),
        ({"first": 3}, "Expected `first` to be a state dict, or the path of a file with one, got int."),
        ({"recalibrate": 3}, "Expected `recalibrate` to be a list of batches or a function of the model, got int."),
        ({"recalibrate": "x"}, "Expected `recalibrate` to be a list of batches or a function of the model, got str."),
        ({"evaluate": 5}, "Expected `evaluate` to be a function of the model, got int."),
        ({"first": "nowhere.ckpt"}, "to be a file with a state dict, got 'nowhere.ckpt', which is no file."),
        ({"recalibrate": iter([ROWS])}, "Expected `recalibrate` to be batches that can be gone through 3 times, got a"),
        ({"recalibrate": []}, "Expected `recalibrate` to show BatchNorm's layers some batches in training mode"),
        ({"evaluate": lambda net: {"accuracy": 1}}, "with it under 'loss', got accuracy."),
        ({"evaluate": lambda net: "good"}, "Expected `evaluate` to return numbers, got a str for 'loss'"),
        ({"evaluate": lambda net: {"loss": 1, str(net.first.weight.data): 2}, "second": Normed(3.0).state_dict()},
         "Expected `evaluate` to return the same names at every point"),
        ({"model": nn.LazyLinear(1)}, "Expected a model whose weights have shapes, got `weight` without"),
    ],
)  # fmt: skip
def test_refused_in_one_line(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        call(**changed)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_may_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "net": nn.Linear(1, 1)}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=r"a\.ckpt' with a torch\S*\.Linear in it, which may run code\.$"):
        call(first=tmp_path / "a.ckpt")


# The picture and the sentence


def test_the_picture_and_the_sentence() -> None:
    values = {"loss": [0.1, 0.9, 0.3], "val_accuracy": [0.99, 0.5, 0.97], "b": [1.0, 2.0, 3.0], "c": [1.0, 2.0, 3.0]}
    found = Barrier([0.0, 0.5, 1.0], values)
    assert found.line == (
        "the loss barrier is 0.7, at alpha = 0.5: 0.9 there, 0.1 and 0.3 at the ends; averaged weights: loss 0.9, "
        "val_accuracy 0.5, at the ends 0.99 and 0.97"
    )
    figure = found.figure()
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "val_accuracy", "b"]
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == values["loss"]
    (ridge,) = figure.axes[0].collections
    assert ridge.get_segments()[0].ravel().tolist() == pytest.approx([0.5, 0.2, 0.5, 0.9])


# What is written


def test_numbers_and_picture_go_under_the_next_free_name(own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Barrier([0.0, 0.5, 1.0], {"loss": [0.0, math.inf, 1.0]})
    Path("d").mkdir()
    Path("d/a.b.png").write_text("kept")
    Path("d/a.b-1.json").write_text("kept")
    assert _cli_command.write(Path("d"), "a.b", {"height": found.height}, found.figure) == [
        "d/a.b-2.json",
        "d/a.b-2.png",
    ]
    assert json.loads(Path("d/a.b-2.json").read_text()) == {"height": None}
    assert Path("d/a.b-2.png").read_bytes().startswith(b"\x89PNG")
    assert [Path(f"d/a.b{name}").read_text() for name in (".png", "-1.json")] == ["kept", "kept"]

    def missing() -> None:
        raise ImportError

    assert _cli_command.write(Path("e"), "a", {}, missing) == ["e/a.json"]
    assert [path.name for path in Path("e").iterdir()] == ["a.json"]


def test_what_the_module_logs_by_name() -> None:
    assert _named({"val/loss": 1.0, "val/accuracy": 2.0, "other_loss": 3.0}, None) == {
        "loss": 1.0, "accuracy": 2.0, "other_loss": 3.0,
    }  # fmt: skip
    assert _named({"val_nll_loss": 1.0, "val_acc": 2.0}, None) == {"loss": 1.0, "acc": 2.0}
    assert _named({"nll": 1.0, "loss": 2.0}, "nll") == {"loss": 1.0}
    for logged, loss, said in (({"a_loss": 1.0, "b_loss": 2.0}, None, "none"), ({"a_loss": 1.0}, "b", "b")):
        with pytest.raises(
            ConfigurationError, match=rf"`--loss` to be a value .*\({', '.join(logged)}\), got '{said}'\.$"
        ):
            _named(logged, loss)


# The command


def test_wrong_words_are_one_line_and_code_2(own_folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("")
    Path("file").write_text("")
    for flags, line in [
        ("", "the following arguments are required: FIRST, SECOND (python cli.py barrier --help)"),
        ("a b", "Expected `--config` to be a file, got 'none'."),
        ("a b --config d.yaml", "Expected `--config` to be a file, got 'd.yaml'."),
        ("a b --config c.yaml --points 1", "Expected `--points` to be a whole number >= 3, got 1."),
        ("a b --config c.yaml --points 10", "Expected `--points` to be an odd number, so that"),
        ("a b --config c.yaml --recalibrate -1", "Expected `--recalibrate` to be a whole number >= 0, got -1."),
        ("a b --config c.yaml --data all", "argument --data: invalid choice: 'all'"),
        ("a b --config c.yaml --folder file", "Expected `--folder` to be a folder to write to, got 'file'"),
        (f"a b --config {DIGITS}", "Expected `FIRST` to be a checkpoint, got 'a', which is no file."),
        (f"file b --config {DIGITS}", "Expected `FIRST` to be a checkpoint, got 'file', which is damaged or something"),
        (f"a b --config {DIGITS} -- --ckpt_path c", "Expected no `ckpt_path` for barrier, got 'c': leave it out."),
    ]:
        assert main(["barrier", *flags.split()]) == 2, flags
        (said,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("Seed set")]
        assert said.startswith(f"error: {line}"), said
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "file"]


SMALL = ["--trainer.accelerator", "cpu", "--model.model.widths", "[4,4,4]", "--trainer.limit_val_batches", "1"]


def save(path: str, seed: int, widths: list[int]) -> None:
    torch.manual_seed(seed)
    module = ImageClassifier(ResNet(in_channels=1, num_classes=10, blocks=[1, 1, 1], widths=widths), num_classes=10)
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)


def test_the_command_writes_numbers_and_a_picture(own_folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("a.ckpt", "b.ckpt")):
        save(name, seed, [4, 4, 4])
    save("wide.ckpt", 0, [4, 4, 8])
    common = ["--config", DIGITS, "--points", "3", "--recalibrate", "2"]
    assert main(["barrier", "a.ckpt", "b.ckpt", *common, "--data", "train", "--", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"barrier \(train\): .*loss.*; averaged weights: loss [\d.]+, accuracy .*", out.splitlines()[-2]
    )
    assert (
        out.splitlines()[-1]
        == "Written: barrier/train-digits_resnet_sgd_ire.json, barrier/train-digits_resnet_sgd_ire.png"
    )
    assert "barrier: 100%" in err
    assert "without `ckpt_path`" not in err
    found = json.loads(Path("barrier/train-digits_resnet_sgd_ire.json").read_text())
    assert (found["data"], found["alphas"], found["recalibration_batches"]) == ("train", [0.0, 0.5, 1.0], 2)
    assert set(found["values"]) == {"loss", "accuracy", "accuracy_top5"}
    assert Path("barrier/train-digits_resnet_sgd_ire.png").read_bytes().startswith(b"\x89PNG")
    assert main(["barrier", "a.ckpt", "wide.ckpt", *common, "--", *SMALL]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: Expected `SECOND` to hold the weights of this ImageClassifier, got 'wide.ckpt': ")
    assert "size mismatch for model." in last
    assert sorted(path.name for path in Path().iterdir()) == ["a.ckpt", "b.ckpt", "barrier", "wide.ckpt"]
    assert len(list(Path("barrier").iterdir())) == 2


def test_what_lightning_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MisconfigurationException("No `validation_step()`\nmethod")

    assert _cli_command.code_of(fail) == 2
    assert capsys.readouterr().err.count("\n") == 1
