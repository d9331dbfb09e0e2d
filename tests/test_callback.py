"""Settings, refusals, timing, warnings, logs and state of the callback."""

import copy
import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from modules import Classifier, Complex, Net, TakesTheIterator
from torch import nn

from lightning_ire import (
    IRE,
    SAM,
    AdversarialModelPerturbation,
    Ascent,
    AverageSAM,
    ConfigurationError,
    EmpiricalFisher,
    Perturbation,
    RandomMask,
    tags,
)
from lightning_ire._checks import check_number
from lightning_ire.engine.masks import FlatMasks
from lightning_ire.engine.state import Progress

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "kappa": ({"kappa": -1}, r"Expected `kappa` to be a number >= 0, got -1\."),
    "kappa-nan": ({"kappa": float("nan")}, r"Expected `kappa` to be a number >= 0, got nan\."),
    "kappa-bool": ({"kappa": True}, r"Expected `kappa` to be a number >= 0, got True\."),
    "gamma-low": ({"gamma": 0}, r"Expected `gamma` to be a number in \(0, 1\], got 0\."),
    "gamma-high": ({"gamma": 1.5}, r"Expected `gamma` to be a number in \(0, 1\], got 1\.5\."),
    "interval": ({"interval": 0}, r"Expected `interval` to be a whole number >= 1, got 0\."),
    "interval-float": ({"interval": 2.5}, r"Expected `interval` to be a whole number >= 1, got 2\.5\."),
    "start_step": ({"start_step": -3}, r"Expected `start_step` to be a whole number >= 0, got -3\."),
    "start_step-float": ({"start_step": 1.5}, r"Expected `start_step` to be a whole number of steps .* got 1\.5\."),
    "start_epoch": ({"start_epoch": 0.5}, r"Expected `start_epoch` to be a whole number >= 0, got 0\.5\."),
    "start_loss": ({"start_loss": "low"}, r"Expected `start_loss` to be a number >= -inf, got 'low'\."),
    "two-starts": ({"start_step": 1, "start_epoch": 1}, r"Expected at most one .*`start_step` and `start_epoch`\."),
    "scope": ({"scope": "layer"}, r"Expected `scope` to be one of 'global', 'tensor', got 'layer'\."),
    "schedule": ({"kappa_schedule": "cosine"}, r"`kappa_schedule` to be one of 'constant', 'lr', 'ramp', got 'cosi"),
    "beta": ({"beta": 1.0}, r"Expected `beta` to be a number in \[0, 1\), got 1\.0\."),
    "perturbation": ({"perturbation": 0.05}, r"Expected `perturbation` to be a Perturbation such as SAM\(rho=0\.05\)"),
    "curvature": ({"curvature": "fisher"}, r"Expected `curvature` to be a Curvature such as SampledFisher\(\), got"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_name_the_key_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        IRE(**settings)
    assert "\n" not in str(caught.value)


# Refusals at fit start


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got LBFGS"):
        cases.fit(Classifier(optimizer=lambda m: torch.optim.LBFGS(m.parameters())), [IRE()])


def test_dataloader_iter_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"TakesTheIterator\.training_step` to take a batch"):
        cases.fit(TakesTheIterator(), [IRE()])


def test_sharded_strategies_are_refused_by_name() -> None:
    from lightning_ire._lightning import check_supported

    class Run:
        strategy = FSDPStrategy()
        optimizers: tuple[Any, ...] = ()

    with pytest.raises(ConfigurationError, match=r"got FSDPStrategy, .* set `trainer.strategy` to Model"):
        check_supported(Run(), Classifier(), local_gradients=False, replays=True)


def test_an_idle_callback_refuses_nothing() -> None:
    cases.fit(Classifier(optimizer=lambda m: torch.optim.LBFGS(m.parameters())), [IRE(kappa=0)])


def test_sam_on_without_norm_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Expected a module with normalization layers"):
        cases.fit(Classifier(), [IRE(kappa=0, perturbation=SAM(0.1, parameters="norm"))])


class Unknown(torch.optim.Optimizer):
    """A decay that nobody has described."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()


def test_unknown_weight_decay_is_refused_where_it_matters() -> None:
    with pytest.raises(ConfigurationError, match=r"decoupled weight decay for `scale_weight_decay=False`.*got Unknown"):
        cases.fit(Classifier(optimizer=lambda m: Unknown(m.parameters())), [IRE(scale_weight_decay=False)])
    cases.fit(Classifier(optimizer=lambda m: Unknown(m.parameters())), [IRE()])


def test_coupled_weight_decay_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="`scale_weight_decay=False` changes nothing here: SGD's weight decay"):
        cases.fit(Classifier(), [IRE(scale_weight_decay=False)])


def test_nothing_but_weight_decay_needs_a_decay() -> None:
    with pytest.raises(ConfigurationError, match=r"`scale_weight_decay=only`, got SGD without: set"):
        cases.fit(Classifier(), [IRE(scale_weight_decay="only")])
    no_decay = Classifier(optimizer=lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.0))
    with pytest.raises(ConfigurationError, match="`scale_weight_decay=only`, got AdamW without"):
        cases.fit(no_decay, [IRE(scale_weight_decay="only")])


def test_fraction_of_a_run_without_end_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"known length for `start_step=0.5`.*let `trainer.max_steps` alone"):
        cases.fit(Classifier(), [IRE(start_step=0.5)], max_epochs=-1, max_time={"seconds": 5})


def test_a_cached_graph_is_explained() -> None:
    class Caches(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.kept = self.net[0](batch[0]).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.kept

    with pytest.raises(ConfigurationError, match=r"Expected `Caches\.training_step` to make its graph anew.*detach"):
        cases.fit(Caches(), [IRE(kappa=0, perturbation=SAM(0.1))])


class SavesInTheEpochsLastBatch(pl.Callback):
    """As `ModelCheckpoint(every_n_train_steps=...)` may: before the end of the epoch is decided about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx + 1 == trainer.num_training_batches:
            trainer.save_checkpoint(self.path)


def test_a_start_by_loss_is_decided_for_an_epoch_that_was_cut_before_its_end(tmp_path: Path) -> None:
    settings = {"kappa": 2.0, "interval": 3, "start_loss": 100.0}
    straight, ire = Classifier(), IRE(**settings)
    torch.manual_seed(1)
    resumed = cases.clone(straight)
    cases.fit(straight, [ire, SavesInTheEpochsLastBatch(tmp_path / "last.ckpt")])
    again = IRE(**settings)
    cases.fit(resumed, [again], ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.started_at == ire.started_at == len(cases.loader(cases.data()))
    cases.assert_same_bits(resumed, straight)


def test_a_start_of_a_baseline_runs() -> None:
    """One without a perturbation is refused nothing: sweeps have kappa 0 among their values."""
    cases.fit(Classifier(), [IRE(kappa=0.0, start_epoch=1)])
    cases.fit(Classifier(), [IRE(kappa=0.0, start_epoch=1, perturbation=SAM(0.1), dry_run=True)])


# Complex parameters


@pytest.mark.parametrize("curvature", [None, EmpiricalFisher(), RandomMask()])
def test_masks_of_complex_parameters_are_refused_by_name(curvature: Any) -> None:
    message = r"Expected real parameters .*, got the complex `net\.weight` of Classifier: .*set `kappa` to 0\."
    for settings in ({"start_epoch": 1}, {"kappa": 0.0, "dry_run": True}):
        module = Classifier(Complex(pairs=False))
        with pytest.raises(ConfigurationError, match=message):
            cases.fit(module, [IRE(**settings, curvature=curvature)])
        assert module.calls == 0
    module.net.weight.requires_grad_(False)
    cases.fit(module, [IRE(curvature=curvature)])


@pytest.mark.parametrize(
    "perturbation", [SAM(0.3), SAM(0.3, sync=True), AdversarialModelPerturbation(0.3, zeta=0.3, ascents=2)], ids=repr
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_sam_takes_complex_parameters_as_pairs_of_real_ones(perturbation: Perturbation, optimizer: Any) -> None:
    torch.manual_seed(0)
    start = Classifier(Complex(pairs=False), lambda m: optimizer(m.parameters(), lr=0.05))
    pairs = Classifier(Complex(pairs=True), start.make_optimizer)
    pairs.net.head.load_state_dict(start.net.head.state_dict())
    plain = cases.clone(start)
    cases.fit(plain)
    for module in (start, pairs):
        cases.fit(module, [IRE(kappa=0.0, perturbation=perturbation)])
    torch.testing.assert_close(torch.view_as_real(start.net.weight), pairs.net.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(start.net.head.weight, pairs.net.head.weight, rtol=1e-5, atol=1e-6)
    assert cases.moved(start, plain) > 1e-3


# Maximized losses


class Negative(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -super().training_step(batch, batch_idx)


@pytest.mark.parametrize("by", ["group", "optimizer"])
@pytest.mark.parametrize(
    "perturbation",
    [
        SAM(0.5),
        SAM(0.5, adaptive=True, sync=True),
        AdversarialModelPerturbation(0.5, zeta=0.3, ascents=3),
        AdversarialModelPerturbation(0.5, scope="global", sync=True),
        AverageSAM(0.5),
    ],
    ids=repr,
)
def test_maximizing_a_loss_is_minimizing_minus_it(perturbation: Perturbation, by: str) -> None:
    class Maximizes(torch.optim.SGD):
        """Knows it by itself, as the optimizers of pytorch_optimizer do."""

        def __init__(self, parameters: Any, maximize: bool, **kwargs: Any) -> None:
            super().__init__(parameters, **kwargs)
            self.maximize = maximize

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = -parameter.grad if self.maximize else parameter.grad
            super().step()
            return loss

    kind = torch.optim.SGD if by == "group" else Maximizes
    ends = []
    for module in (Classifier, Negative):
        maximize = module is Negative
        torch.manual_seed(0)
        ends.append(module(Net(), lambda m, maximize=maximize: kind(m.parameters(), lr=0.1, maximize=maximize)))
        cases.fit(ends[-1], [IRE(kappa=2.0, curvature=EmpiricalFisher(), perturbation=perturbation)])
    cases.assert_same_bits(*ends)


# Timing


class Timeline(pl.Callback):
    """Step, epoch and whether the boost is on, after every batch."""

    def __init__(self, ire: IRE) -> None:
        self.ire = ire
        self.on: list[bool] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.on.append(bool(self.ire._progress.masks.masks))


@pytest.mark.parametrize(
    ("settings", "first"),
    [({}, 0), ({"start_step": 0}, 0), ({"start_step": 5}, 5), ({"start_step": 0.5}, 12), ({"start_epoch": 2}, 16)],
)
def test_start(settings: dict[str, Any], first: int) -> None:
    ire = IRE(**settings)
    timeline = Timeline(ire)
    cases.fit(Classifier(), [ire, timeline], max_epochs=3)
    assert timeline.on == [False] * first + [True] * (24 - first)
    assert ire.started_at == first


def test_masks_are_made_every_interval_steps_from_the_start_on() -> None:
    made = []

    class Counting(EmpiricalFisher):
        def begin(self, window: Any) -> Any:
            made.append(ire._progress.step)
            return super().begin(window)

    ire = IRE(interval=4, start_step=3, curvature=Counting())
    cases.fit(Classifier(), [ire])
    assert made == [3, 7, 11, 15]


def test_start_by_loss_latches_at_the_end_of_an_epoch() -> None:
    class Falling(Classifier):
        """Returned loss: 4, 3, 2, 1, 4, ... by epoch, whatever the weights."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss - loss.detach() + [4.0, 3.0, 2.0, 4.0][self.current_epoch] + 0.1 * (-1) ** batch_idx

    ire = IRE(start_loss=2.05, curvature=EmpiricalFisher(), perturbation=SAM(0.1))
    timeline = Timeline(ire)
    cases.fit(Falling(), [ire, timeline], max_epochs=4, accumulate_grad_batches=2)
    assert timeline.on == [False] * 24 + [False] + [True] * 7  # the mask is made when the first window closes
    assert ire.started_at == 12


@pytest.mark.parametrize("settings", [{"start_step": 16}, {"start_step": 500}, {"start_epoch": 2}])
def test_a_start_out_of_reach_is_warned_about_before_and_after(settings: dict[str, Any]) -> None:
    before = r"the run ends before that \(max_epochs=2, steps=16\): lower"
    with pytest.warns(UserWarning, match=before), pytest.warns(UserWarning, match="IRE never switched on in this run"):
        cases.fit(Classifier(), [IRE(**settings)])


@pytest.mark.parametrize(
    "settings", [{"start_step": 15}, {"start_epoch": 1}, {}, {"kappa": 0, "perturbation": SAM(0.1)}]
)
def test_a_start_within_reach_is_not(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*IRE(?!.*in_extra_pass)")
        cases.fit(Classifier(), [IRE(**settings)])


def linear_warmup(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)


@pytest.mark.parametrize("scheduler", [linear_warmup, one_cycle])
def test_starting_inside_the_warm_up_is_warned_about(scheduler: Any) -> None:
    with pytest.warns(UserWarning, match="a learning-rate scheduler still warms up"):
        cases.fit(Classifier(scheduler=scheduler), [IRE()])


@pytest.mark.parametrize(("scheduler", "settings"), [(cosine, {}), (linear_warmup, {"start_step": 6}), (None, {})])
def test_no_warm_up_no_warning(scheduler: Any, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*warms up.*")
        cases.fit(Classifier(scheduler=scheduler), [IRE(**settings)])


def test_a_loss_that_breaks_down_right_after_the_start_names_kappa_once() -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + (float("nan") if self.global_step >= 6 else 0.0)

    with pytest.warns(UserWarning, match="non-finite") as caught:
        cases.fit(Breaks(), [IRE(kappa=7, start_step=4, interval=5, curvature=EmpiricalFisher())])
    messages = [str(w.message) for w in caught if "non-finite" in str(w.message)]
    assert len(messages) == 1
    assert "within 5 steps of switching IRE on at step 4: `kappa` = 7 may be too large" in messages[0]


def test_a_loss_that_breaks_down_later_is_not_ours() -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + (float("nan") if self.global_step >= 10 else 0.0)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*non-finite.*")
        cases.fit(Breaks(), [IRE(interval=5, curvature=EmpiricalFisher())])


def test_a_pattern_that_fits_nothing_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"`exclude`: the pattern 'embed\*' fits no parameter of Classifier"):
        cases.fit(Classifier(), [IRE(exclude=["*.bias", "embed*"])])


# Words and numbers


def test_summary_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        cases.fit(Classifier(), [IRE(kappa=2, gamma=0.8, start_epoch=1, perturbation=SAM(0.05, interval=2))])
    lines = [record.message for record in caplog.records if record.message.startswith("IRE")]
    assert lines == [
        "IRE: kappa 2, gamma 0.8, from epoch 1 (run: 16 steps); SAM(rho=0.05, interval=2); 92 parameters. "
        "Extra passes: one SampledFisher() estimate every 10 steps, one more forward and backward every 2 steps. "
        "Extra memory: 0.0 MiB inside the step, 0.0 MiB for good."
    ]


def logged(tmp_path: Any, *callbacks: pl.Callback, **kwargs: Any) -> list[dict[str, str]]:
    import csv

    logger = CSVLogger(tmp_path)
    module = Classifier(Net(batch_norm=True))
    module.log_every = None
    cases.fit(module, callbacks, logger=logger, **kwargs)
    logger.save()
    path = tmp_path / "lightning_logs" / f"version_{logger.version}" / "metrics.csv"
    return list(csv.DictReader(path.open()))


def test_log_tags_and_their_values(tmp_path: Any) -> None:
    rows = logged(tmp_path, IRE(kappa=3.0, gamma=0.5, interval=2, perturbation=SAM(0.1)))
    assert len(rows) == 16
    assert {*tags.IRE_TAGS, *tags.SAM_TAGS} <= set(rows[0])
    assert [int(row["step"]) for row in rows] == list(range(16))
    for index, row in enumerate(rows):
        assert float(row[tags.KAPPA]) == 3
        assert 0.5 <= float(row[tags.FLAT_FRACTION]) < 0.55
        assert float(row[tags.THRESHOLD]) > 0
        assert float(row[tags.STEP_NORM_FLAT]) > 0
        assert float(row[tags.STEP_NORM_SHARP]) > 0
        assert float(row[tags.GRAD_NORM]) > 0
        assert float(row[tags.PERTURBED_LOSS]) > 0
        assert (row[tags.MASK_IOU] != "") == (index >= 2)  # two masks are needed
        if index >= 2:
            assert 0.2 < float(row[tags.MASK_IOU]) <= 1
            assert float(row[tags.MASK_IOU_CHANCE]) == pytest.approx(1 / 3, abs=0.05)


def test_logged_iou_is_that_of_the_sharp_sets_of_the_last_two_masks() -> None:
    seen: list[tuple[torch.Tensor, float, float]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            sharp = torch.cat([~mask.reshape(-1) for mask in ire._progress.masks.masks.values()])
            metrics = trainer.callback_metrics
            seen.append((sharp, *(float(metrics.get(tag, -1.0)) for tag in (tags.MASK_IOU, tags.MASK_IOU_CHANCE))))

    ire = IRE(gamma=0.6, interval=1)
    cases.fit(Classifier(), [ire, Look()], log_every_n_steps=1)
    for (before, _, _), (after, iou, chance) in itertools.pairwise(seen):
        assert iou == pytest.approx(float((before & after).sum() / (before | after).sum()))
        first, second = float(before.float().mean()), float(after.float().mean())
        assert chance == pytest.approx(first * second / (first + second - first * second))
    assert len({round(iou, 6) for _, iou, _ in seen}) > 5


def test_iou_where_everything_is_flat() -> None:
    metrics = cases.fit(Classifier(), [IRE(gamma=1.0, interval=1)]).callback_metrics
    assert metrics[tags.MASK_IOU] == metrics[tags.MASK_IOU_CHANCE] == metrics[tags.FLAT_FRACTION] == 1


def test_logs_come_with_lightnings_own_rows(tmp_path: Any) -> None:
    rows = logged(tmp_path, IRE(kappa=3.0), log_every_n_steps=5)
    assert [int(row["step"]) for row in rows] == [4, 9, 14]


def test_logged_norms_are_those_of_the_whole_step() -> None:
    before: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            before["weights"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            steps = {name: p.detach() - before["weights"][name] for name, p in pl_module.named_parameters()}
            masks = ire._progress.masks.masks
            flat = sum((steps[name] * mask).square().sum() for name, mask in masks.items()).sqrt()
            whole = sum(step.square().sum() for step in steps.values()).sqrt()
            norms = [trainer.callback_metrics[tag] for tag in (tags.STEP_NORM_FLAT, tags.STEP_NORM_SHARP)]
            torch.testing.assert_close(norms[0], flat, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(torch.stack(norms).square().sum().sqrt(), whole, rtol=1e-5, atol=1e-7)
            before["seen"] = before.get("seen", 0) + 1

    ire = IRE(kappa=2.0, gamma=0.6, exclude="net.2.bias")
    cases.fit(Classifier(), [ire, Look()], log_every_n_steps=1)
    assert before["seen"] == 16


def test_sam_logs_the_loss_and_gradient_of_its_two_passes() -> None:
    losses = []

    class Watch(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach())
            return loss

    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready % 2 == 0:
                seen.append((trainer.callback_metrics[tags.PERTURBED_LOSS], outputs["loss"] * 2))

    settings = {"accumulate_grad_batches": 2, "max_epochs": 1, "log_every_n_steps": 1}
    cases.fit(Watch(), [IRE(kappa=0.0, perturbation=SAM(0.1)), Look()], **settings)
    for index, (perturbed, reported) in enumerate(seen):
        _, second, moved_first, moved_second = losses[4 * index : 4 * index + 4]
        torch.testing.assert_close(perturbed, (moved_first + moved_second) / 2)
        assert torch.equal(reported, second)  # what Lightning reports is the unperturbed loss
    assert len(seen) == 4


# State


def test_one_callback_for_two_fits_starts_anew() -> None:
    ire = IRE(kappa=2.0, start_step=4)
    first, second = Classifier(), Classifier()
    second.load_state_dict(first.state_dict())
    cases.fit(first, [ire])
    cases.fit(second, [ire])
    assert ire._progress.step == 16
    assert ire.started_at == 4
    cases.assert_same_bits(first, second)


def test_a_fit_that_failed_in_its_first_step_begins_anew() -> None:
    class FailsOnce(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.calls == 1:
                raise RuntimeError("boom")

    ire = IRE(kappa=2.0)
    module, trainer = FailsOnce(), cases.trainer([ire])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, cases.loader(cases.data()))
    failed = ire._progress
    assert failed.masks.masks  # the mask was made before the step
    trainer.fit(module, cases.loader(cases.data()))
    assert ire._progress is not failed


def test_a_fit_that_goes_on_keeps_count() -> None:
    ire = IRE(kappa=2.0, interval=5)
    module = Classifier()
    trainer = cases.fit(module, [ire], max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, cases.loader(cases.data()))
    assert ire._progress.step == 24
    assert ire.started_at == 0


@pytest.mark.parametrize("settings", [
    {"kappa": 2.0, "interval": 3},
    {"kappa": 2.0, "interval": 3, "beta": 0.5, "start_step": 5, "kappa_schedule": "lr"},
    {"kappa": 2.0, "interval": 3, "perturbation": SAM(0.1, interval=3)},
    {"kappa": 2.0, "interval": 3, "perturbation": AverageSAM(0.1)},
    {"kappa": 2.0, "interval": 3, "start_loss": 100.0},
    {"kappa": 0.0, "perturbation": SAM(0.1, interval=3)},
])  # fmt: skip
def test_resume_at_an_epoch_boundary_is_exact(settings: dict[str, Any], tmp_path: Any) -> None:
    start = Classifier(scheduler=cosine)
    whole, first = cases.clone(start), cases.clone(start)
    straight = IRE(**settings)
    cases.fit(whole, [straight], max_epochs=4)

    trainer = cases.fit(first, [IRE(**settings)], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["IRE"]["optimizers"][0]
    assert state["step"] == 16
    resumed, ire = Classifier(scheduler=cosine), IRE(**settings)
    cases.fit(resumed, [ire], max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"), seed=77)
    cases.assert_same_bits(resumed, whole)
    assert ire._progress.step == straight._progress.step == 32
    assert ire.started_at == straight.started_at
    for name, mask in straight._progress.masks.masks.items():
        assert torch.equal(mask, ire._progress.masks.masks[name])


def test_a_resumed_run_draws_the_labels_of_the_run_it_goes_on_with(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Classifier()
    whole, half, resumed = cases.clone(start), cases.clone(start), cases.clone(start)
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    cases.fit(whole, [IRE(interval=3)], max_epochs=4)
    cases.fit(half, [IRE(interval=3)]).save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")  # another process, seeded otherwise
    cases.fit(resumed, [IRE(interval=3)], max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    cases.assert_same_bits(resumed, whole)


def test_masks_take_one_bit_per_parameter_in_a_checkpoint(tmp_path: Any) -> None:
    trainer = cases.fit(Classifier(Net()), [IRE(kappa=1.0)])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    flat = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["IRE"]["optimizers"][0]["flat"]
    assert {name: (packed.dtype, packed.numel()) for name, packed in flat["masks"].items()} == {
        "net.0.weight": (torch.uint8, 6),
        "net.0.bias": (torch.uint8, 1),
        "net.2.weight": (torch.uint8, 4),
        "net.2.bias": (torch.uint8, 1),
    }
    assert flat["average"] == {}


@pytest.mark.parametrize(
    "key",
    [
        *("version", "optimizers"),
        *Progress(FlatMasks(0.5, "global", False, 0.0)).state_dict(),
        *FlatMasks(0.5, "global", False, 0.0).state_dict(),
    ],
)
def test_a_state_of_an_older_release_goes_on_with_what_a_new_run_has(tmp_path: Any, key: str) -> None:
    """A later release may have added any key."""
    cases.fit(Classifier(), [IRE(interval=3, beta=0.5)], max_epochs=1).save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["IRE"]
    one = state["optimizers"][0]
    for holder in (state, one, one["flat"]):
        holder.pop(key, None)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    ire = IRE(interval=3, beta=0.5)
    cases.fit(Classifier(), [ire], max_epochs=2, ckpt_path=str(tmp_path / "old.ckpt"))
    assert ire._progress.step == 8 + (0 if key in ("optimizers", "step") else 8)
    assert ire.state_dict()["version"] == 1
    assert ire._progress.masks.masks


@pytest.mark.parametrize("ire", [IRE(), IRE(kappa=0.0, perturbation=SAM(0.1))], ids=["boost", "sam"])
def test_a_state_of_a_newer_release_is_refused(tmp_path: Any, ire: IRE) -> None:
    trainer = cases.fit(Classifier(), [ire], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    checkpoint["callbacks"]["IRE"]["version"] = 7
    torch.save(checkpoint, tmp_path / "new.ckpt")
    module = Classifier()
    before = cases.clone(module)
    with pytest.raises(ConfigurationError, match="Expected a checkpoint") as caught:
        cases.fit(module, [copy.deepcopy(ire)], max_epochs=2, ckpt_path=str(tmp_path / "new.ckpt"))
    assert str(caught.value) == (
        "Expected a checkpoint whose IRE state has version 1 or an older one, got version 7: install the lightning_ire "
        "release that wrote it, or a newer one."
    )
    cases.fit(before, [IRE(kappa=0.0)], max_epochs=2, ckpt_path=str(tmp_path / "new.ckpt"))  # not there at all


def test_a_plain_checkpoint_goes_on_with_ire_and_back(tmp_path: Any) -> None:
    module = Classifier()
    cases.fit(module, []).save_checkpoint(tmp_path / "plain.ckpt")
    ire = IRE(kappa=1.0, start_step=20)
    trainer = cases.fit(Classifier(), [ire], max_epochs=3, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert ire._progress.step == trainer.global_step == 24  # steps of the whole run, so start_step means the same
    assert ire.started_at == 20
    trainer.save_checkpoint(tmp_path / "ire.ckpt")
    back = cases.fit(Classifier(), [], max_epochs=4, ckpt_path=str(tmp_path / "ire.ckpt"))
    assert back.global_step == 32


def test_a_checkpoint_of_another_module_drops_its_masks_and_says_so(tmp_path: Any) -> None:
    class Bigger(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["optimizer_states"] = []

    cases.fit(Classifier(), [IRE(kappa=1.0)]).save_checkpoint(tmp_path / "small.ckpt")
    net = nn.Sequential(nn.Linear(cases.FEATURES, 30), nn.Tanh(), nn.Linear(30, cases.CLASSES))
    ire = IRE(kappa=1.0)
    with pytest.warns(UserWarning, match=r"masks of 3 parameters \(net.0.weight, ...\) fit none of this module"):
        cases.fit(Bigger(net), [ire], max_epochs=3, ckpt_path=str(tmp_path / "small.ckpt"))
    assert ire._progress.masks.masks["net.0.weight"].shape == (30, cases.FEATURES)


# Interfaces


def test_a_new_perturbation_is_one_class() -> None:
    """The class is the one that CONTRIBUTING shows."""
    guide = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    shown = guide.split("## A new perturbation")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"Perturbation": Perturbation, "Ascent": Ascent, "check_number": check_number}
    exec(shown, names)

    module = Classifier()
    plain = cases.clone(module)
    cases.fit(module, [IRE(kappa=0, perturbation=names["UnnormalizedSAM"](0.1))])
    cases.fit(plain)
    assert module.calls == 2 * plain.calls
    assert cases.moved(module, plain) > 1e-6


def test_decorated_one_argument_training_step() -> None:
    """Lightning looks through the decorator at the real signature; with our wrapper on top it must see the same."""
    import functools

    def decorator(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    class One(Classifier):
        @decorator
        def training_step(self, batch: Any) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    cases.fit(One(), [IRE(kappa=1.0, perturbation=SAM(0.1))])


def test_frozen_unused_tied_and_scalar_parameters() -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__(Net())
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(3))
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.tied = nn.Linear(8, 8)
            self.tied_too = nn.Linear(8, 8)
            self.tied_too.weight = self.tied.weight
            self.empty = nn.Parameter(torch.empty(0, 3))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = self.tied_too(self.tied(self.net[1](self.net[0](batch[0]))))
            return F.cross_entropy(self.net[2](hidden) * self.scale + self.empty.sum(), batch[1])

    module = Odd()
    ire = IRE(kappa=1.0, gamma=0.5, perturbation=SAM(0.1))
    cases.fit(module, [ire])
    masks = ire._progress.masks.masks
    assert {"frozen", "unused", "empty", "tied_too.weight"}.isdisjoint(masks)
    assert {"scale", "tied.weight"} <= set(masks)
    assert torch.equal(module.unused, torch.ones(3))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_an_epoch_cut_short_inside_a_window_is_dropped() -> None:
    """Lightning zeroes what the two micro-batches of the cut window had accumulated; they are not replayed either."""

    class Cuts(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 else None

    module = Cuts()
    plain = cases.clone(module)
    for run, callbacks in ((plain, []), (module, [IRE(kappa=0, perturbation=SAM(0.0))])):
        cases.fit(run, callbacks, accumulate_grad_batches=4, max_epochs=3)
    cases.assert_same_bits(module, plain)
    assert (plain.calls, module.calls) == (18, 18 + 3 * 4)


def test_the_callback_can_be_copied_and_pickled() -> None:
    import copy
    import pickle

    ire = IRE(kappa=2.0, perturbation=SAM(0.1))
    cases.fit(Classifier(), [ire])
    for other in (copy.deepcopy(ire), pickle.loads(pickle.dumps(ire))):
        assert other.kappa == 2.0
        assert other._progress.step == ire._progress.step
        cases.fit(Classifier(), [other])


def test_parameters_that_only_the_optimizer_has() -> None:
    strangers = [nn.Parameter(torch.ones(cases.FEATURES, dtype=torch.float32)) for _ in range(2)]

    class Outside(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.net(x * strangers[0] + strangers[1]), y)

    ire = IRE(kappa=1.0, gamma=1.0)
    cases.fit(Outside(optimizer=lambda m: torch.optim.SGD([*m.parameters(), *strangers], lr=0.1)), [ire])
    assert {"optimizer.parameter_0", "optimizer.parameter_1", "net.0.bias"} <= set(ire._progress.masks.masks)


def test_sparse_embedding() -> None:
    class Words(Classifier):
        def __init__(self, sparse: bool) -> None:
            super().__init__(Net(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            torch.manual_seed(2)
            self.words = nn.Embedding(20, cases.FEATURES, sparse=sparse)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(self.words(batch[1]) + batch[0]), batch[1])

    net = Net()
    runs = []
    for sparse in (True, False):
        module = Words(sparse)
        module.net.load_state_dict(net.state_dict())
        cases.fit(module, [IRE(kappa=1.0, gamma=0.5, perturbation=SAM(0.1))])
        runs.append(module)
    assert cases.moved(*runs) < 1e-5


def test_supported_strategy_is_the_one_lightning_picks() -> None:
    assert isinstance(cases.trainer().strategy, SingleDeviceStrategy)
