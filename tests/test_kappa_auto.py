"""The largest stable kappa, against closed forms and dense matrices, and the kappa that follows it."""

import warnings
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Exact, sgd
from test_sharpness_monitor import effective, probe_batches, sized, trained
from torch import Tensor, nn

from lightning_ire import IRE, SAM, ConfigurationError, HutchinsonHessian, IREStep, SharpnessMonitor, tags
from lightning_ire import measure_sharpness as measured_alone
from lightning_ire.functional import largest_stable_kappa

SHARP, FLAT = 8.0, 0.5  # curvatures of the quadratic, which has two coordinates of each
LR = 0.1
EXACT = {"tolerance": 1e-10, "max_iterations": 300}


class Quadratic(pl.LightningModule):
    """The loss is a diagonal quadratic of its weights, whatever the batch."""

    def __init__(
        self, lr: float = LR, curvatures: tuple[float, ...] = (SHARP, SHARP, FLAT, FLAT / 2), **sgd: Any
    ) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.weights = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
        self.lr, self.sgd = lr, sgd

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.curvatures * self.weights.square()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.sgd)


def ire(kappa: Any = "auto", **settings: Any) -> IRE:
    return IRE(kappa, gamma=0.5, curvature=HutchinsonHessian(), **settings)


def monitor(every: int = 4, **settings: Any) -> SharpnessMonitor:
    return SharpnessMonitor(every, None, ["stability"], **{**EXACT, **settings})


def run(module: pl.LightningModule, *callbacks: pl.Callback, steps: int = 8, **settings: Any) -> pl.Trainer:
    return cases.fit(module, callbacks, cases.loader(cases.data(32)), max_epochs=-1, max_steps=steps, **settings)


# The largest stable kappa


@pytest.mark.parametrize(("settings", "limit"), [({}, 2.0), ({"momentum": 0.9}, 3.8)], ids=["plain", "momentum"])
def test_headroom_of_a_diagonal_quadratic(settings: dict[str, float], limit: float) -> None:
    """Stable if and only if lr * (1 + kappa) * lambda_flat < 2 * (1 + momentum)."""
    watch = SharpnessMonitor(4, None, ["kappa_headroom"], **EXACT)
    trainer = run(Quadratic(**settings), ire(3.0), watch)
    closed = limit / (LR * FLAT) - 1
    assert watch.last.values[tags.KAPPA_HEADROOM] == pytest.approx(closed, rel=1e-8)
    assert watch.last.values[tags.KAPPA_HEADROOM + tags.CONVERGED] == 1.0
    assert float(trainer.callback_metrics[tags.KAPPA_HEADROOM]) == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("share", "stable"), [(0.97, True), (1.03, False)])
def test_steps_blow_up_just_above_the_headroom_and_not_just_below(momentum: float, share: float, stable: bool) -> None:
    kappa = share * (2 * (1 + momentum) / (LR * FLAT) - 1)
    module = Quadratic(momentum=momentum)
    run(module, ire(kappa), steps=700)
    assert bool(module.weights.abs().max() < 1) == stable


def test_no_kappa_is_stable_where_the_base_is_not_and_any_where_nothing_is_curved() -> None:
    for curvatures, found in (((100.0, 100.0, 1.0, 1.0), 0.0), ((1.0, 1.0, 0.0, 0.0), 1000.0)):
        watch = SharpnessMonitor(2, None, ["kappa_headroom"], **EXACT)
        run(Quadratic(lr=0.05, curvatures=curvatures), ire(1.0), watch, steps=2)
        assert watch.last.values[tags.KAPPA_HEADROOM] == pytest.approx(found)


@pytest.mark.parametrize("perturbation", [None, SAM(0.2)], ids=["boost", "sam"])
@pytest.mark.parametrize("mask", ["hard", "soft"])
def test_headroom_of_a_network_is_that_of_dense_matrices(perturbation: SAM | None, mask: str) -> None:
    module = Exact(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9))
    boost = IRE(4.0, gamma=0.6, interval=2, perturbation=perturbation, mask=mask)
    watch = SharpnessMonitor(quantities=["kappa_headroom", "stability"], **EXACT)
    trainer = trained(module, watch, boost)
    norm = boost.ascent_norm
    ascent = 0.2 / norm if norm else 0.0
    shares = {key: factor - 1 for key, factor in boost.boost_factors(module, trainer.optimizers[0], kappa=1.0).items()}

    def ratio(kappa: float) -> float:
        sizes = sized(module, lambda p: 0.3 * (1 + kappa * shares[id(p)].double()))
        matrix = effective(module, probe_batches(watch), sizes, ascent, torch.ones_like(sizes), 0.0)
        return float(torch.linalg.eigvalsh(matrix)[-1]) / 3.8

    low, high = 0.0, 1000.0
    assert ratio(low) < 1 < ratio(high)
    assert watch.last.values[tags.RATIO] == pytest.approx(ratio(4.0), rel=1e-6)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    assert watch.last.values[tags.KAPPA_HEADROOM] == pytest.approx(low, rel=1e-6)


def test_strengths_keep_their_proportions() -> None:
    """Of a mapping the headroom is the largest strength that there may be."""
    module = Quadratic(curvatures=(SHARP, FLAT, FLAT / 4, FLAT / 4))
    other = nn.Parameter(torch.ones(1, dtype=torch.float64))
    module.other = other
    module.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        0.5 * (module.curvatures * module.weights.square()).sum() + 0.05 * module.other.square().sum()
    )
    watch = SharpnessMonitor(4, None, ["kappa_headroom"], **EXACT)
    run(module, IRE({"weights": 1.0, "*": 4.0}, gamma=0.8, curvature=HutchinsonHessian()), watch, steps=4)
    # 0.1 * (1 + k) * 0.1 <= 2 for `other`, 0.1 * (1 + k / 4) * 0.5 <= 2 for the flat one of `weights`
    assert watch.last.values[tags.KAPPA_HEADROOM] == pytest.approx(min(199.0, 4 * 39.0), rel=1e-8)


def test_what_is_measured_without_a_mask() -> None:
    watch = SharpnessMonitor(4, None, ["kappa_headroom"], **EXACT)
    with pytest.warns(UserWarning, match="skips kappa_headroom: there is no mask of IRE in force"):
        run(Quadratic(), watch)
    assert tags.KAPPA_HEADROOM not in watch.last.values


def test_rounds_are_bounded_and_nothing_is_made_of_nan() -> None:
    n = torch.tensor([0.0, 1.0])
    assert (
        largest_stable_kappa(lambda kappa: (1 + kappa / 100, torch.tensor([0.9, 0.436])), n, 1.0, max_rounds=2)[1]
        is False
    )
    assert largest_stable_kappa(lambda kappa: (float("nan"), n), n, 1.0) == (0.0, False)


def test_headroom_takes_no_more_products_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ire.sharpness import landscape
    from lightning_ire.sharpness.job import Settings
    from lightning_ire.sharpness.quantities import max_cost

    count, product = [], landscape.hessian_product
    monkeypatch.setattr(landscape, "hessian_product", lambda *args: count.append(1) or product(*args))
    settings = {"max_iterations": 3, "tolerance": 1e-12}
    watch = SharpnessMonitor(None, 1, ["kappa_headroom"], **settings)
    trained(Exact(optimizer=sgd), watch, IRE(4.0, gamma=0.6, perturbation=SAM(0.2)))
    assert 0 < len(count) <= max_cost(["kappa_headroom"], Settings(**settings), 1, sam=True).products == 6 * 3 * 2


# kappa="auto"


@pytest.mark.parametrize(("settings", "limit"), [({}, 2.0), ({"momentum": 0.9}, 3.8)], ids=["plain", "momentum"])
@pytest.mark.parametrize("safety", [0.5, 1.0])
def test_kappa_is_a_share_of_the_headroom_and_stable(settings: dict[str, float], limit: float, safety: float) -> None:
    logger = cases.Rows()
    boost, module = ire(kappa_safety=safety), Quadratic(**settings)
    run(module, boost, monitor(), steps=100, logger=logger)
    kappas = [row[tags.KAPPA] for _, row in logger.rows if tags.KAPPA in row]
    closed = limit / (LR * FLAT) - 1
    assert kappas[:4] == [0.0] * 4
    assert kappas[4:] == pytest.approx([safety * closed] * 96, rel=1e-8)
    assert all(kappa <= closed * (1 + 1e-8) for kappa in kappas)
    if safety < 1:
        assert float(module.weights.detach().abs().max()) < 0.05
    ratios = [row[tags.RATIO] for _, row in logger.rows if tags.RATIO in row]
    assert max(ratios) <= 1 + 1e-8


def test_before_the_first_measurement_it_trains_as_the_base() -> None:
    bases = [Quadratic(), Quadratic()]
    run(bases[0], steps=3)
    with pytest.warns(UserWarning, match="`kappa='auto'` stayed 0 in this run"):
        run(bases[1], ire(), monitor(), steps=3)
    cases.assert_same_bits(*bases)


def test_resumed_runs_go_on_with_the_same_kappa(tmp_path: Any) -> None:
    def network() -> Exact:
        torch.manual_seed(5)
        return Exact(optimizer=sgd)

    whole, first, second = network(), network(), network()
    settings = {"train": cases.loader(cases.data(32, torch.float64)), "logger": False}

    def auto() -> list[pl.Callback]:
        return [
            IRE("auto", gamma=0.6, interval=2, curvature=HutchinsonHessian()),
            SharpnessMonitor(3, None, ["stability"]),
        ]

    cases.fit(whole, auto(), max_epochs=2, **settings)
    saving = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True, every_n_epochs=1)
    cases.fit(first, [*auto(), saving], max_epochs=1, enable_checkpointing=True, **settings)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    (state,) = [one for key, one in saved["callbacks"].items() if "IRE" in key]
    resumed = auto()
    cases.fit(second, resumed, max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"), **settings)
    assert state["optimizers"][0]["auto_kappa"] > 0
    cases.assert_same_bits(whole, second)


def test_in_a_loop_of_ones_own() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = IREStep(model, optimizer, kappa="auto", gamma=0.5, curvature=HutchinsonHessian(), kappa_safety=0.25)
    curvatures = torch.tensor([SHARP, FLAT], dtype=torch.float64)

    def loss_of(batch: Any) -> Tensor:
        return 0.5 * (curvatures * model.weight.square()).sum()

    step(loss_of, None)
    found = measured_alone(model, loss_of, [None], ["kappa_headroom"], step=step, **EXACT).values[tags.KAPPA_HEADROOM]
    assert (float(step.logs[tags.KAPPA]), found) == (0.0, pytest.approx(39.0))
    step.note_headroom(found)
    step(loss_of, None)
    assert float(step.logs[tags.KAPPA]) == pytest.approx(39 / 4)
    step.note_headroom(float("nan"))  # a measurement that failed
    assert step.progress.auto_kappa == pytest.approx(39 / 4)
    other = IREStep(nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=LR), kappa=2.0)
    other.note_headroom(found)
    assert other.progress.auto_kappa == 0.0


class Grouped(Quadratic):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [self.weights], "ire_kappa": 2.0}], lr=self.lr)


class Twice(Quadratic):
    automatic_optimization = False

    def sharpness_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        self.other = nn.Parameter(torch.ones(1, dtype=torch.float64))
        return [super().configure_optimizers(), torch.optim.SGD([self.other], lr=1.0)]


@pytest.mark.parametrize(
    ("module", "watch", "line"),
    [
        (Quadratic, [], "Expected a SharpnessMonitor that measures the stability beside `kappa='auto'`, got none"),
        (Quadratic, [SharpnessMonitor(None, None, ["stability"])], "got none: add SharpnessMonitor"),
        (Quadratic, [SharpnessMonitor(1, None, ["lambda_max"])], "got one without: add SharpnessMonitor"),
        (Grouped, [monitor()], "Expected no `ire_kappa` in parameter groups for `kappa='auto'`"),
        (Twice, [monitor()], "Expected one optimizer for `kappa='auto'`, got 2: set `kappa` to a number"),
    ],
)  # fmt: skip
def test_refused_in_one_line(module: Any, watch: list[pl.Callback], line: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        run(module(), ire(), *watch)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("safety", [0.0, 1.5, "x"])
def test_a_share_out_of_range(safety: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `kappa_safety` to be a number in \(0, 1\]"):
        IRE("auto", kappa_safety=safety)


def test_settings_are_shown() -> None:
    boost = ire(kappa_safety=0.25)
    assert repr(boost) == "IRE(kappa='auto', gamma=0.5, curvature=HutchinsonHessian(), kappa_safety=0.25)"
    assert boost.hyper_parameters()["kappa"] == "auto"


@pytest.mark.slow
def test_two_processes_have_one_kappa(tmp_path: Any) -> None:
    ranks = cases.two_processes("kappa_auto_ddp_script.py", tmp_path)
    assert ranks[0]["kappas"] == ranks[1]["kappas"]
    assert len(set(ranks[0]["kappas"])) == 3  # 0, and those of two measurements
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


# Steps that stay unstable


def test_a_ratio_above_1_is_warned_about_once_and_says_what_to_lower() -> None:
    """0.3 * 8 > 2; the second three in a row say no more."""

    class Calmer(Quadratic):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.001 if self.global_step == 4 else 0.3

    with pytest.warns(UserWarning, match="in a row") as caught:
        run(Calmer(), ire(1.0, perturbation=SAM(0.1)), monitor(1), steps=9)
    said = [str(one.message) for one in caught if "in a row" in str(one.message)]
    assert len(said) == 1
    assert "`stability/ratio` was above 1 in 3 measurements in a row (now " in said[0]
    assert said[0].endswith("lower the learning rate or `kappa` or the radius of the perturbation.")


@pytest.mark.parametrize("steps", [2, 7])
def test_no_warning_of_ratios_that_are_not_three_in_a_row(steps: int) -> None:
    """Every third step has a stable learning rate."""

    class Pausing(Quadratic):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 if self.global_step % 3 == 2 else 0.3

    watch = monitor(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in a row")
        run(Pausing(), watch, steps=steps)
    assert watch._unstable in (0, 1, 2)
    assert watch.last.values[tags.RATIO] > 1
