"""Range tests: against closed forms and loops by hand; what they leave behind; what the command says and writes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
from cases import Rows
from modules import Classifier, Manual, Net, sgd
from test_kappa_auto import FLAT, LR, SHARP, Quadratic
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ire import IRE, SAM, ConfigurationError, HutchinsonHessian, IREStep, LookSAM, find
from lightning_ire.cli import main
from lightning_ire.find._result import (
    RangeTest,
    crossing,
    diverges,
    doubling,
    raising,
    smoothed,
    spaced,
    steepest_descent,
)

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits_resnet_sgd_ire.yaml")


def boosted(kappa: Any = 1.0, **settings: Any) -> IRE:
    return IRE(kappa, gamma=0.5, curvature=HutchinsonHessian(), **settings)


def loader() -> DataLoader:
    return cases.loader(cases.data(32))


# What follows from the numbers


def test_values_have_equal_ratios() -> None:
    assert spaced(1e-3, 10.0, 5) == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 10.0])


def test_smoothing_keeps_constants_and_lines_and_has_no_lag() -> None:
    assert smoothed([3.0] * 40) == pytest.approx([3.0] * 40)
    line = [0.5 * place for place in range(100)]
    assert smoothed(line)[20:80] == pytest.approx(line[20:80])
    bump = smoothed([float(place == 50) for place in range(101)])
    assert max(range(101), key=bump.__getitem__) == 50
    assert bump[46] == pytest.approx(bump[50] * math.exp(-0.5 * (4 / (101 / 25)) ** 2), rel=1e-6)


def test_steepest_descent_of_a_step_in_the_loss() -> None:
    values = spaced(1e-4, 1.0, 81)
    step = [2 - 1 / (1 + (0.01 / value) ** 2) for value in values]  # steepest, by log(value), at 0.01
    assert steepest_descent(values, step) == pytest.approx(0.01)
    assert steepest_descent(values, [-loss for loss in step]) is None
    assert steepest_descent(values[:2], step[:2]) is None


def test_crossing_of_a_power_law_is_exact() -> None:
    pairs = [(value, (value / 0.3) ** 1.5) for value in spaced(1e-3, 10.0, 6)]
    assert crossing(pairs) == pytest.approx(0.3)
    assert crossing(pairs[:3]) is None
    assert crossing(pairs[-2:]) == pairs[-2][0]
    assert crossing([]) is None


def test_radii_at_which_the_gap_is_twice_its_first_order_or_a_tenth_of_the_loss() -> None:
    """Gap = s rho + q rho^2: twice the first order at s / q."""
    values = spaced(1e-3, 1.0, 400)
    gaps = [0.6 * rho + 4.0 * rho**2 for rho in values]
    assert doubling(values, gaps, 0.6) == pytest.approx(0.15, rel=1e-3)
    assert doubling(values, [0.6 * rho for rho in values], 0.6) is None
    assert doubling(values, gaps, 0.0) is None
    assert raising(values, [0.6 * rho for rho in values], 3.0) == pytest.approx(0.5)
    assert raising(values, gaps, -1.0) is None


@pytest.mark.parametrize(
    ("loss", "first", "best", "over"),
    [
        (8.1, 2.0, 2.0, True), (7.9, 2.0, 2.0, False), (math.nan, 2.0, 2.0, True), (math.inf, 2.0, 2.0, True),
        (0.5, 1.0, 0.0, False), (3.1, 1.0, 0.0, True), (1.0, -1.0, -2.0, False), (4.1, -1.0, -2.0, True),
    ],
)  # fmt: skip
def test_when_a_loss_diverges(loss: float, first: float, best: float, over: bool) -> None:
    assert diverges(loss, first, best) == over


# The learning rate


@pytest.mark.parametrize(("settings", "limit"), [({}, 2.0), ({"momentum": 0.9}, 3.8)], ids=["plain", "momentum"])
def test_ratio_and_suggestion_on_a_quadratic(settings: dict[str, float], limit: float) -> None:
    """Its sharp coordinates (of curvature 8) are not boosted: the ratio is 8 lr / c; the flat ones have 4 * 0.5."""
    found = find.learning_rates(
        cases.trainer([boosted(3.0)]), Quadratic(**settings), loader(), low=1e-3, high=2.0, steps=40, progress=False
    )
    assert [ratio for _, ratio in found.ratios] == pytest.approx(
        [SHARP * rate / limit for rate, _ in found.ratios], rel=1e-3
    )
    assert found.ratios[0][0] == 1e-3
    assert len(found.ratios) > 3
    assert found.suggestion is not None
    assert found.suggestion <= limit / SHARP * (1 + 1e-3)
    assert f"passes 1 at {limit / SHARP:.3g}" in found.reason or found.suggestion == pytest.approx(limit / SHARP)


def test_the_suggestion_is_capped_where_steps_become_unstable() -> None:
    """A loss that falls fastest at a rate that is unstable: nearly all of it is in flat coordinates."""

    class Tilted(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.weights[:2] = 0.0

    found = find.learning_rates(
        cases.trainer(), Tilted(), loader(), low=1e-3, high=3.0, steps=40, measurements=40, progress=False
    )
    assert steepest_descent(found.values, found.losses) > 0.25
    assert found.suggestion == pytest.approx(2 / SHARP, rel=1e-3)
    assert found.reason.startswith("stability/ratio passes 1 there; the loss falls fastest at ")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_those_of_a_loop_by_hand_with_sam_and_ire(accumulate: int) -> None:
    module, ours = Classifier(Net(), sgd), Classifier(Net(), sgd)
    ours.load_state_dict(module.state_dict())
    settings = {"kappa": 2.0, "gamma": 0.6, "interval": 3, "perturbation": SAM(0.1)}
    late = {**settings, "start_epoch": 7, "perturbation": SAM(0.1, start_epoch=5, stop_epoch=6)}
    trainer = cases.trainer([IRE(**late)], accumulate_grad_batches=accumulate)
    found = find.learning_rates(trainer, module, loader(), low=1e-3, high=0.5, steps=12, measurements=2, progress=False)
    optimizer = ours.configure_optimizers()
    step, losses = IREStep(ours, optimizer, **settings), []
    batches = [batch for _ in range(2 * 12) for batch in loader()]
    for place, rate in enumerate(spaced(1e-3, 0.5, 12)):
        optimizer.param_groups[0]["lr"] = rate
        losses.append(float(step(cases.loss_of(ours), *batches[accumulate * place : accumulate * (place + 1)])))
    assert found.values == pytest.approx(spaced(1e-3, 0.5, 12))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.notes[0] == "`start_epoch` is left out: the boost is on from the first step of the test"
    assert re.fullmatch(r"the start and stop of SAM\(.*\) are left out: it is on all the time", found.notes[1])


class Noting(Quadratic):
    """Notes the learning rates of its steps, in whatever copy; two groups and a schedule that warms up."""

    rates: list[list[float]] = []  # noqa: RUF012

    def configure_optimizers(self) -> Any:
        self.other = nn.Parameter(torch.ones(1, dtype=torch.float64))
        groups = [{"params": [self.weights], "lr": 0.1}, {"params": [self.other], "lr": 0.02}]
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return loss


def test_groups_keep_their_proportions_and_the_schedule_is_out() -> None:
    Noting.rates.clear()
    find.learning_rates(
        cases.trainer(), Noting(), loader(), low=1e-3, high=0.1, steps=10, measurements=0, progress=False
    )
    expected = spaced(1e-3, 0.1, 10)
    assert [first for first, _ in Noting.rates] == pytest.approx(expected)
    assert [second for _, second in Noting.rates] == pytest.approx([rate / 5 for rate in expected])
    Noting.rates.clear()
    find.kappas(
        cases.trainer([boosted()]),
        Noting(),
        loader(),
        low=0.1,
        high=1.0,
        steps=10,
        warm_up=2,
        measurements=0,
        progress=False,
    )
    firsts = [first for first, _ in Noting.rates if first > 0.0045]
    assert firsts == pytest.approx([0.1] * len(firsts))
    assert [first for first, _ in Noting.rates[:1]] == pytest.approx([0.002])


def test_it_ends_early_where_the_loss_diverges() -> None:
    found = find.learning_rates(
        cases.trainer(), Quadratic(), loader(), low=0.01, high=1e4, steps=60, measurements=0, progress=False
    )
    assert found.diverged
    assert len(found.values) < 50
    assert "is not known" in found.reason
    assert all(math.isfinite(loss) for loss in found.losses)


# Kappa


def test_kappa_and_its_losses_on_a_quadratic() -> None:
    """A flat weight shrinks by 1 - lr (1 + kappa) lambda at each step, a sharp one by 1 - lr lambda."""
    found = find.kappas(
        cases.trainer([boosted("auto", kappa_safety=0.4, start_step=50)]), Quadratic(), loader(), steps=12, warm_up=3,
        measurements=2, progress=False,
    )  # fmt: skip
    curvatures = torch.tensor((SHARP, SHARP, FLAT, FLAT / 2), dtype=torch.float64)
    weights, losses = (1 - LR * curvatures) ** 3, []
    for kappa in spaced(0.1, 100.0, 12):
        losses.append(float(0.5 * (curvatures * weights.square()).sum()))
        weights = weights * (1 - LR * curvatures * (1 + kappa * torch.tensor([0.0, 0.0, 1.0, 1.0])))
    assert found.losses == pytest.approx(losses, rel=1e-6)
    headroom = 2 / (LR * FLAT) - 1
    assert found.headroom == pytest.approx(headroom, rel=1e-3)
    assert found.suggestion == pytest.approx(0.4 * headroom, rel=1e-3)
    assert found.reason.startswith("0.4 of the largest stable kappa, 39; while kappa rose, stability/ratio passed 1")
    assert [ratio for _, ratio in found.ratios] == pytest.approx([0.4, LR * 101 * FLAT / 2], rel=1e-3)


def test_kappa_where_the_stability_is_not_known() -> None:
    """RMSprop: the loss tells, or nothing does."""

    class Unknown(Quadratic):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.RMSprop(self.parameters(), lr=self.lr)

    class Broken(Unknown):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * math.nan

    def test(module: pl.LightningModule, high: float) -> RangeTest:
        with cases.monitor_warnings() as said:
            found = find.kappas(
                cases.trainer([boosted()]), module, loader(), high=high, steps=30, warm_up=2, measurements=0,
                progress=False,
            )  # fmt: skip
        assert all("RMSprop is not known" in text or "finite" in text for text in said)
        assert found.headroom is None
        return found

    risen = test(Unknown(), 1e5)
    assert risen.diverged
    assert risen.suggestion == risen.values[min(range(len(risen.values)), key=smoothed(risen.losses).__getitem__)]
    calm = test(Unknown(lr=1e-3), 0.2)
    assert (calm.suggestion, calm.reason[:26]) == (None, "the stability is not known")
    broken = test(Broken(), 1e5)
    assert (broken.suggestion, broken.reason) == (None, "there is no finite loss: look at the run with kappa 0 first")


# The radius


@pytest.mark.parametrize("adaptive", [False, True])
def test_gaps_of_a_quadratic(adaptive: bool) -> None:
    """L(theta + d) - L(theta) = g d + d H d / 2."""
    sam = SAM(0.3, adaptive=adaptive, start_step=3) if adaptive else None
    module = Quadratic()
    found = find.radii(cases.trainer([sam] if sam else []), module, loader(), steps=5, warm_up=0, progress=False)
    curvatures = module.curvatures
    weights = torch.ones(4, dtype=torch.float64)
    gradient = curvatures * weights
    for rho, gap, loss in zip(found.values, found.gaps, found.losses, strict=True):
        move = rho * gradient / gradient.norm()  # T = |theta| = 1
        assert gap == pytest.approx(float(gradient @ move + 0.5 * (curvatures * move.square()).sum()), rel=1e-6)
        assert loss == pytest.approx(float(0.5 * curvatures.sum()) + gap, rel=1e-6)
    assert found.slope == pytest.approx(float(gradient.norm()))
    assert found.values == pytest.approx(spaced(1e-3, 1.0, 5))


def test_the_warm_up_before_the_radii_is_that_of_the_run() -> None:
    gaps = []
    for warm_up in (0, 5):
        found = find.radii(cases.trainer(), Quadratic(), loader(), steps=2, warm_up=warm_up, progress=False)
        gaps.append(found.slope)
    shrunk = torch.tensor((SHARP, SHARP, FLAT, FLAT / 2), dtype=torch.float64)
    assert gaps[1] == pytest.approx(float((shrunk * (1 - LR * shrunk) ** 5).norm()), rel=1e-6)
    assert gaps[0] > 2 * gaps[1]


def test_radii_adapt_to_the_weights_with_asam() -> None:
    class Unequal(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.weights.copy_(torch.tensor([0.1, 0.5, 1.0, 2.0]))

    found = find.radii(
        cases.trainer([SAM(1.0, adaptive=True)]), Unequal(), loader(), steps=2, warm_up=0, progress=False
    )
    weights = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    gradient = Unequal().curvatures * weights
    move = 1.0 * weights**2 * gradient / (weights * gradient).norm()
    exact = gradient @ move + 0.5 * (Unequal().curvatures * move.square()).sum()
    assert found.gaps[1] == pytest.approx(float(exact), rel=1e-6)
    other = find.radii(cases.trainer([LookSAM(0.1)]), Quadratic(), loader(), steps=2, warm_up=0, progress=False)
    assert other.notes == [f"the gap is that of SAM(rho), not that of {LookSAM(0.1)!r}"]


# What they leave behind


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.generator = torch.Generator().manual_seed(5)

    def train_dataloader(self) -> DataLoader:
        self.asked += 1
        return DataLoader(cases.data(32), batch_size=8, shuffle=True, generator=self.generator)


TESTS: dict[str, Any] = {
    "lr": lambda *args: find.learning_rates(*args, steps=10, measurements=1, progress=False),
    "kappa": lambda *args: find.kappas(*args, steps=10, warm_up=2, measurements=1, progress=False),
    "rho": lambda *args: find.radii(*args, steps=3, warm_up=3, progress=False),
}


@pytest.mark.parametrize("given", ["datamodule", "loader"])
@pytest.mark.parametrize("key", TESTS)
def test_no_trace_is_left(key: str, given: str) -> None:
    """Module, random streams, generators of the data and callbacks: a training afterwards is the one without a test."""

    def run(tested: bool) -> tuple[pl.LightningModule, list[Any], dict[str, Any], list[Any]]:
        cases.seed_all(7)
        module = Classifier(Net(batch_norm=True, dropout=0.3))
        data = Data()
        fed = data if given == "datamodule" else data.train_dataloader()
        callbacks, logger = [IRE(2.0, gamma=0.6, interval=2, perturbation=SAM(0.1))], Rows()
        trainer = cases.trainer(callbacks, logger=logger, max_epochs=2)
        before = cases.clone(module)
        if tested:
            found = TESTS[key](trainer, module, fed)
            assert len(found.values) == len(found.losses) > 2
            cases.assert_same_bits(before, module)
            assert module.training == before.training
            assert all(parameter.grad is None for parameter in module.parameters())
            assert (trainer.callbacks, trainer.loggers, trainer.global_step) == (callbacks, [logger], 0)
            assert logger.rows == []
            assert data.asked == (given == "loader")
            assert callbacks[0].started_at is None
        streams = cases.random_streams()
        trainer.fit(module, fed)
        return module, logger.rows, streams, [data.generator.get_state()]

    plain, tested = run(False), run(True)
    cases.assert_same_bits(plain[0], tested[0])
    assert plain[1] == tested[1]
    assert plain[2] == tested[2]
    assert torch.equal(plain[3][0], tested[3][0])


# What is refused


class Two(Quadratic):
    def configure_optimizers(self) -> Any:
        self.other = nn.Parameter(torch.ones(1))
        return [super().configure_optimizers(), torch.optim.SGD([self.other], lr=1.0)]


def rates(trainer: pl.Trainer | None = None, **settings: Any) -> RangeTest:
    return find.learning_rates(trainer or cases.trainer(), Quadratic(), loader(), **settings)


def used() -> pl.Trainer:
    return cases.fit(Quadratic(), train=loader(), max_steps=1, max_epochs=-1)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: rates(low=0.0), "Expected `low` to be a number > 0, got 0.0"),
        (lambda: rates(low=1.0, high=0.5), "Expected `high` to be a number > 1"),
        (lambda: rates(steps=3), "Expected `steps` to be a whole number >= 10"),
        (lambda: find.kappas(cases.trainer(), Quadratic(), warm_up=0), "Expected `warm_up` to be a whole number >= 1"),
        (lambda: find.learning_rates(cases.trainer(), Manual(), loader()), "got Manual in manual optimization"),
        (lambda: rates(trainer=used()), "that has not trained yet for a range test, got one"),
        (
            lambda: find.learning_rates(cases.trainer(fast_dev_run=True), Quadratic(), loader()),
            "Expected `fast_dev_run` to be false",
        ),
        (
            lambda: find.learning_rates(cases.trainer([boosted("auto")]), Quadratic(), loader()),
            "Expected `kappa` to be a number for find lr, got 'auto'",
        ),
        (
            lambda: find.kappas(cases.trainer([IRE({"*": 2.0})]), Quadratic(), loader()),
            "Expected `kappa` to be one number for find kappa, got {'*': 2.0}",
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line_before_anything_trains(call: Any, line: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        call()
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


# The command


def test_wrong_words_are_one_line_and_code_2(own_folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("")
    Path("file").write_text("")
    for flags, line in [
        ("", "the following arguments are required: lr|kappa|rho (python cli.py find --help)"),
        ("gamma --config c.yaml", "argument lr|kappa|rho: invalid choice: 'gamma'"),
        ("lr", "Expected `--config` to be a file, got 'none'."),
        ("lr --config d.yaml", "Expected `--config` to be a file, got 'd.yaml'."),
        ("lr --config c.yaml --low x", "argument --low: invalid float value: 'x'"),
        ("lr --config c.yaml --low -1", "Expected `--low` to be a number > 0, got -1.0."),
        ("lr --config c.yaml --low 1e-3 --high 1e-4", "Expected `--high` to be a number > 0.001, got 0.0001."),
        ("lr --config c.yaml --low 20", "Expected `--high` to be a number > 20, got 10.0."),
        ("kappa --config c.yaml --steps 5", "Expected `--steps` to be a whole number >= 10, got 5."),
        ("rho --config c.yaml --folder file", "Expected `--folder` to be a folder to write to, got 'file'"),
        ("rho --config c.yaml --lo 1", "unrecognized arguments: --lo 1"),
    ]:
        assert main(["find", *flags.split()]) == 2, flags
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {line}"), said
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "file"]


def test_a_wrong_key_of_fit_is_the_one_line_of_fit(own_folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["find", "rho", "--config", DIGITS, "--", "--ire.gamma", "2"])
    assert ended.value.code == 2
    assert "error: Expected `ire.gamma` to be a number in (0, 1], got 2.0." in capsys.readouterr().err
    assert not list(Path().iterdir())


SMALL = ["--trainer.accelerator", "cpu", "--data.batch_size", "16", "--model.model.widths", "[4,4,4]"]


@pytest.mark.parametrize("key", ["rho", *(pytest.param(key, marks=pytest.mark.slow) for key in ("lr", "kappa"))])
def test_the_command_writes_numbers_and_a_picture_and_nothing_over(
    key: str, own_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("", "-1"):
        assert main(["find", key, "--config", DIGITS, "--steps", "10", "--", *SMALL, "--ire.kappa", "0"]) == 0
        out, err = capsys.readouterr()
        files = [f"find/{key}-digits_resnet_sgd_ire{suffix}.{end}" for end in ("json", "png")]
        assert out.splitlines()[-1] == f"Written: {', '.join(files)}"
        assert re.fullmatch(rf"find {key}: (no suggestion|[\d.e-]+) \(.+\)", out.splitlines()[-2])
        assert f"find {key}" in err  # the bar
        found = json.loads(Path(files[0]).read_text())
        assert len(found["values"]) == len(found["losses"]) >= (10 if key == "rho" else 2)
        assert Path(files[1]).read_bytes().startswith(b"\x89PNG")
        assert (found["headroom"] is not None) == (key == "kappa")
    assert sorted(path.name for path in Path().iterdir()) == ["find"]
    assert len(list(Path("find").iterdir())) == 4


def test_the_line_and_the_picture_without_a_suggestion() -> None:
    found = RangeTest("lr", [0.1, 1.0], [2.0, 3.0], reason="why")
    assert found.line == "lr: no suggestion (why)"
    assert found.figure().axes[0].get_title() == found.line
