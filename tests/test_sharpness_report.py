"""What a measurement looks like from outside: event and CSV files, the HPARAMS tab, the command line, the summary."""

import copy
import csv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from modules import Classifier, Net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_ire import IRE, SAM, AverageSAM, EmpiricalFisher, SharpnessMonitor, tags
from lightning_ire.callbacks import _report
from lightning_ire.cli import main
from lightning_ire.functional import SpectralDensity
from lightning_ire.sharpness.job import Settings
from lightning_ire.sharpness.quantities import max_cost

ROOT = Path(__file__).parents[1]
QUICK = {"max_vectors": 8, "max_iterations": 8}
SCALARS = {*tags.SHARPNESS_TAGS, *tags.STABILITY_TAGS} - {tags.KAPPA_HEADROOM}


class Scored(Classifier):
    """Logs as users do: per step, per epoch, in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self.net(batch[0])
        self.log("val/loss", F.cross_entropy(scores, batch[1]))
        self.log("val/accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def train_dataloader(self) -> Any:
        return cases.loader(cases.data(24))

    def val_dataloader(self) -> Any:
        return cases.loader(cases.data(16, seed=2))


class Saving(Scored):
    """Keeps hyper-parameters: Lightning then writes a record of its own, with a placeholder, at fit start."""

    def __init__(self, width: int = 8, nested: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], logger: Any, **kwargs: Any) -> pl.Trainer:
    trainer = cases.trainer(callbacks, logger=logger, **{"max_epochs": 2, "log_every_n_steps": 2, **kwargs})
    torch.manual_seed(3)
    trainer.fit(module)
    return trainer


def events(folder: str | Path) -> EventAccumulator:
    (path,) = Path(folder).glob("events.*")
    found = EventAccumulator(str(path), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    found.Reload()
    return found


def records(folder: str | Path) -> list[HParamsPluginData]:
    (path,) = Path(folder).glob("events.*")
    values = [value for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    ours = [value for value in values if value.tag.startswith("_hparams_")]
    return [HParamsPluginData.FromString(value.metadata.plugin_data.content) for value in ours]


def test_event_file_and_csv_file_get_the_same_scalars_at_the_steps_of_other_metrics(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    monitor = SharpnessMonitor(quantities=cases.BARE, every_n_steps=2, **QUICK)
    fit(Scored(), [monitor], [board, table])
    found = events(board.log_dir)
    assert set(found.Tags()["scalars"]) > SCALARS
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for tag in SCALARS:
        points = [(event.step, event.value) for event in found.Scalars(tag)]
        # three steps in an epoch: after steps 2, 4, 6 (the end of the second epoch), and at the end of the first
        assert [step for step, _ in points] == [1, 2, 3, 5]
        written = [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
        assert [step for step, _ in written] == [1, 2, 3, 5]
        assert [value for _, value in points] == pytest.approx([value for _, value in written], rel=1e-6)
    assert [event.step for event in found.Scalars("train_loss_step")] == [1, 3, 5]
    assert [event.step for event in found.Scalars("train_loss_epoch")] == [2, 5]
    assert [event.step for event in found.Scalars("val/accuracy")] == [2, 5]
    assert monitor.last.values[tags.LAMBDA_MAX] == pytest.approx(found.Scalars(tags.LAMBDA_MAX)[-1].value, rel=1e-6)


def test_figures_and_histograms(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    quantities = ["spectral_density", "layer_traces", "block_curvature"]
    fit(Scored(), [SharpnessMonitor(quantities=quantities, **QUICK)], board)
    found = events(board.log_dir)
    assert [image.step for image in found.Images(tags.BLOCKS)] == [2, 5]
    for tag in (tags.DENSITY, tags.LAYERS):
        assert [image.step for image in found.Images(tag)] == [2, 5]
        assert all(min(image.width, image.height) > 200 for image in found.Images(tag))
        assert [one.step for one in found.Histograms(tag + tags.HISTOGRAM)] == [2, 5]
    kinds = [name for kind in ("images", "histograms", "scalars") for name in found.Tags()[kind]]
    assert len(kinds) == len(set(kinds))  # TensorBoard shows only one kind of thing under a tag
    assert found.Histograms(tags.LAYERS + tags.HISTOGRAM)[0].histogram_value.num == 4
    density = found.Histograms(tags.DENSITY + tags.HISTOGRAM)[0].histogram_value
    assert density.num == pytest.approx(1000)
    assert sum(density.bucket) == pytest.approx(1000)


def test_bars_of_the_blocks_over_the_run() -> None:
    """A bar per kind and measurement; of many measurements eight, the first and the last among them."""
    measured = [(10 * step, {"norm": 1.0 + step, "head": -0.5}) for step in range(20)]
    (axes,) = _report.block_figure(measured).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["norm", "head"]
    steps = [text.get_text() for text in axes.get_legend().get_texts()]
    assert (len(steps), steps[0], steps[-1]) == (8, "step 0", "step 190")
    assert [bar.get_height() for bar in axes.containers[-1]] == [20.0, -0.5]


def test_without_matplotlib_there_are_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report.importlib.util, "find_spec", lambda name: None)
    board = TensorBoardLogger(tmp_path)
    fit(Scored(), [SharpnessMonitor(quantities=["spectral_density", "layer_traces"], **QUICK)], board)
    found = events(board.log_dir)
    assert not found.Tags()["images"]
    assert set(found.Tags()["histograms"]) == {tags.DENSITY + tags.HISTOGRAM, tags.LAYERS + tags.HISTOGRAM}


def test_weights_that_are_not_finite_are_logged_as_such(tmp_path: Path) -> None:
    class Diverged(Scored):
        def on_train_start(self) -> None:
            torch.nn.init.constant_(self.net[0].weight, float("nan"))

    board = TensorBoardLogger(tmp_path)
    monitor = SharpnessMonitor(quantities=cases.BARE, **QUICK)
    with pytest.warns(UserWarning, match="skips spectral_density: Expected finite products"):
        fit(Diverged(), [monitor], board)
    found = events(board.log_dir)
    assert [event.value for event in found.Scalars(tags.TRACE_HESSIAN)] == pytest.approx(
        [float("nan")] * 2, nan_ok=True
    )
    assert [event.value for event in found.Scalars(tags.LAMBDA_MAX + tags.CONVERGED)] == [0.0, 0.0]
    assert not found.Tags()["images"] + found.Tags()["histograms"]


def logger_like(name: str, **members: Any) -> Logger:
    """A stand-in for a logger whose package is not here: of its name, with a record of every call of its methods."""

    def log_metrics(self: Any, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_hyperparams(self: Any, params: dict[str, Any]) -> None:
        self.hyper_parameters.append(dict(params))

    fixed = {"name": name, "version": 0, "log_metrics": log_metrics, "log_hyperparams": log_hyperparams}
    logger = type(name, (Logger,), {**fixed, **members})()
    logger.metrics, logger.hyper_parameters = [], []
    return logger


class Calls(dict):
    """Keeps what it is called with, as a function, as an object with methods or as a mapping of such."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.made.append((*args, kwargs) if kwargs else args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self(name, *args, **kwargs)

    def __missing__(self, tag: str) -> Any:
        record = Calls()
        record.made = self.made
        return SimpleNamespace(append=lambda *args, **kwargs: self(tag, *args, **kwargs))


# how each logger's package wants a figure, in the words of its documentation
WANTED: dict[str, Callable[[str, Any, int], tuple[Any, ...]]] = {
    "WandbLogger": lambda tag, figure, step: (tag, [figure], {"step": step}),
    "MLFlowLogger": lambda tag, figure, step: ("log_figure", "run", figure, f"{tag}/{step:08d}.png"),
    "CometLogger": lambda tag, figure, step: ("log_figure", tag, figure, {"step": step}),
    "NeptuneLogger": lambda tag, figure, step: (tag, figure, {"step": step}),
}
ONLY_FIGURES: dict[str, Any] = {"quantities": ["spectral_density", "layer_traces"], **QUICK}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("derived", [False, True])
def test_figures_go_to_every_logger_that_shows_some(name: str, derived: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Calls()
    logger = logger_like(name, experiment=made, log_image=made, run_id="run")
    if derived:
        logger.__class__ = type("Mine", (type(logger),), {})
    monkeypatch.setattr(_report, "density_figure", lambda density: "density")
    monkeypatch.setattr(_report, "layer_figure", lambda traces: "layers")
    monitor = SharpnessMonitor(**ONLY_FIGURES)
    fit(Scored(), [monitor], logger)
    figures = ((tags.DENSITY, "density"), (tags.LAYERS, "layers"))
    assert made.made == [WANTED[name](tag, figure, step) for step in (2, 5) for tag, figure in figures]
    assert (5, monitor.last.values) in logger.metrics


def test_quantities_that_are_figures_are_scalars_too_and_files_in_the_folder(tmp_path: Path) -> None:
    table = CSVLogger(tmp_path, "table")
    monitor = SharpnessMonitor(**ONLY_FIGURES)
    fit(Scored(), [monitor], table)
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        row = [row for row in csv.DictReader(file) if row["sharpness/spectral_density/quantile_50"]][-1]
    for name, value in monitor.last.layer_traces.items():
        assert float(row[f"sharpness/layer_traces/{name}"]) == pytest.approx(value)
    density = monitor.last.density
    order = density.nodes.argsort()
    for percent in (0, 1, 10, 50, 90, 99, 100):
        place = int((density.weights[order].cumsum(0) < percent / 100 - 1e-12).sum())
        assert float(row[f"sharpness/spectral_density/quantile_{percent}"]) == pytest.approx(
            float(density.nodes[order][place])
        )
    files = sorted(Path(table.log_dir).rglob("*.png"))
    assert [str(file.relative_to(table.log_dir)) for file in files] == [
        f"{tag}/{step:08d}.png" for tag in (tags.LAYERS, tags.DENSITY) for step in (2, 5)
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_without_a_logger_the_numbers_are_in_the_last_measurement() -> None:
    monitor = SharpnessMonitor(**ONLY_FIGURES)
    trainer = fit(Scored(), [monitor], False)
    assert len(monitor.last.values) == 4 + 7
    assert monitor.last.values.keys() <= trainer.callback_metrics.keys()


def test_a_logger_that_takes_no_figure_is_no_reason_to_stop() -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with pytest.warns(UserWarning, match="skips the figure sharpness/layer_traces in WandbLogger: no space left"):
        fit(Scored(), [SharpnessMonitor(**ONLY_FIGURES)], logger_like("WandbLogger", log_image=broken))


def test_an_unforeseen_error_skips_the_quantity(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("unforeseen")

    monkeypatch.setattr("lightning_ire.sharpness.job.StepGeometry.of", broken)
    monitor = SharpnessMonitor(quantities=["stability", "ascent_gap"], **QUICK)
    with pytest.warns(UserWarning, match="SharpnessMonitor skips stability: 'unforeseen'"):
        fit(Scored(), [monitor], False)
    assert set(monitor.last.skipped) == {"stability"}
    assert tags.ASCENT_GAP in monitor.last.values


def test_the_histogram_of_the_density_counts_weights() -> None:
    density = SpectralDensity(torch.tensor([0.0, 1.0, 10.0]).double(), torch.tensor([0.7, 0.2, 0.1]).double(), 0.1)
    kept: dict[str, Any] = {}

    class Writer:
        def add_histogram_raw(self, tag: str, **values: Any) -> None:
            kept.update(values, tag=tag)

    _report._histogram(Writer(), density, step=4, buckets=10)
    assert (kept["tag"], kept["global_step"], kept["min"], kept["max"]) == (
        tags.DENSITY + tags.HISTOGRAM, 4, 0.0, 10.0,
    )  # fmt: skip
    assert kept["bucket_limits"] == pytest.approx(list(range(1, 11)))
    assert kept["bucket_counts"] == pytest.approx([700, 200, 0, 0, 0, 0, 0, 0, 0, 100])
    assert (kept["num"], kept["sum"], kept["sum_squares"]) == pytest.approx((1000, 1200, 10200))


def test_a_density_of_equal_eigenvalues_can_be_shown() -> None:
    density = SpectralDensity(torch.zeros(3).double(), torch.full((3,), 1 / 3).double(), 0.0)
    assert _report.density_figure(density).axes[0].get_yscale() == "log"


def test_bars_of_many_layers_are_cut_to_the_largest() -> None:
    traces = {f"layer{i}": float(i) for i in range(100)}
    (axes,) = _report.layer_figure(traces, most=10).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [*(f"layer{i}" for i in range(91, 100)), "91 others, sum"]
    assert axes.patches[-1].get_width() == sum(range(91))


# The HPARAMS tab


SETTINGS: dict[str, tuple[list[pl.Callback], dict[str, Any]]] = {
    "plain": ([], {"kappa": 0.0, "gamma": 0.0, "rho": 0.0, "using/perturbation": "none", "using/curvature": "none"}),
    "ire": (
        [IRE(2.0, gamma=0.7, curvature=EmpiricalFisher())],
        {"kappa": 2.0, "gamma": 0.7, "rho": 0.0, "using/perturbation": "none", "using/curvature": "EmpiricalFisher()"},
    ),
    "sam": (
        [IRE(0.0, perturbation=SAM(0.3))],
        {"kappa": 0.0, "gamma": 0.0, "rho": 0.3, "using/perturbation": "SAM", "using/curvature": "none"},
    ),
    "average-sam": (
        [IRE(1.0, perturbation=AverageSAM(0.2))],
        {
            "kappa": 1.0,
            "gamma": 0.9,
            "rho": 0.2,
            "using/perturbation": "AverageSAM",
            "using/curvature": "SampledFisher()",
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", [Scored, Saving], ids=["plain", "saving"])
def test_hparams_hold_settings_and_final_metrics(name: str, make: Any, tmp_path: Path) -> None:
    callbacks, expected = SETTINGS[name]
    board = TensorBoardLogger(tmp_path)  # with Lightning's default placeholder on
    fit(make(), [*callbacks, SharpnessMonitor(**QUICK)], board)
    experiment, start, end = records(board.log_dir)
    names = [info.name.tag for info in experiment.experiment.metric_infos]
    assert names[:4] == ["val/accuracy", tags.TRACE_FISHER, tags.TRACE_HESSIAN, tags.LAMBDA_MAX]
    assert names[4:] == ["val/loss", "train_loss_epoch"]
    values = {key: value.WhichOneof("kind") and getattr(value, value.WhichOneof("kind"))
              for key, value in start.session_start_info.hparams.items()}  # fmt: skip
    expected = expected | {"lr": 0.1, "using/optimizer": "SGD"}
    expected |= {"width": 8, "nested": "None"} if make is Saving else {}
    assert values == expected
    assert end.session_end_info.status
    scalars = events(board.log_dir).Tags()["scalars"]
    assert "hp_metric" not in scalars
    assert set(names) <= set(scalars)  # TensorBoard takes the values from the curves


class Focal(Scored):
    """Has hyper-parameters of its own with our names."""

    def __init__(self, gamma: float = 0.123, rho: float = 7.0, kappa: int = 3, nested: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def shown(folder: str | Path) -> dict[str, Any]:
    (start,) = [one for one in records(folder) if one.HasField("session_start_info")]
    pairs = start.session_start_info.hparams.items()
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in pairs}


RECORDED: dict[str, Callable[[], list[pl.Callback]]] = {
    "monitor": lambda: [SharpnessMonitor(**QUICK)],
    "ire": lambda: [IRE(2.0, gamma=0.7, perturbation=SAM(0.3))],
    "both": lambda: [SharpnessMonitor(**QUICK), IRE(2.0, gamma=0.7, perturbation=SAM(0.3))],
    "both, the other way round": lambda: [IRE(2.0, gamma=0.7, perturbation=SAM(0.3)), SharpnessMonitor(**QUICK)],
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_the_modules_own_hyper_parameters_stay(name: str, default_hp_metric: bool, tmp_path: Path) -> None:
    """The record is written once, by IRE without the monitor too."""
    board = TensorBoardLogger(tmp_path, default_hp_metric=default_hp_metric)
    other = logger_like("Other")
    module = Focal(nested={"using": {"optimizer": "mine"}, "ire_rho": 1})
    fit(module, RECORDED[name](), [board, other])
    values = shown(board.log_dir)
    assert (values["gamma"], values["rho"], values["kappa"]) == (0.123, 7.0, 3)
    ours = (0.0, 0.0, 0.0) if name == "monitor" else (2.0, 0.7, 0.3)
    assert (values["ire_kappa"], values["ire_gamma"], values["ire_rho"]) == ours
    assert values["lr"] == 0.1
    assert len(records(board.log_dir)) == 3
    assert "hp_metric" not in events(board.log_dir).Tags()["scalars"]
    assert "val/accuracy" in [info.name.tag for info in records(board.log_dir)[0].experiment.metric_infos]
    settings, own = other.hyper_parameters  # ours, then what Lightning says
    assert own == dict(module.hparams)
    assert {key: settings[f"ire_{key}"] for key in ("kappa", "gamma", "rho")} == dict(
        zip(("kappa", "gamma", "rho"), ours, strict=True)
    )
    assert not settings.keys() & own.keys()


class FocalData(pl.LightningDataModule):
    def __init__(self, gamma: float = 5.0, ire_gamma: float = 6.0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return cases.loader(cases.data(24))


def test_hyper_parameters_of_the_datamodule_stay_too(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    trainer = cases.trainer([IRE(2.0, gamma=0.7)], logger=board, max_epochs=1)
    trainer.fit(Classifier(), datamodule=FocalData())
    values = shown(board.log_dir)
    assert (values["gamma"], values["ire_gamma"], values["ire_ire_gamma"]) == (5.0, 6.0, 0.7)


@pytest.mark.parametrize("idle", [IRE(0.0), SharpnessMonitor(every_n_epochs=None)], ids=["ire", "monitor"])
def test_an_idle_callback_writes_no_record(idle: pl.Callback, tmp_path: Path) -> None:
    board, other = TensorBoardLogger(tmp_path, default_hp_metric=False), logger_like("Other")
    fit(Focal(), [idle], [board, other])
    assert not records(board.log_dir)
    assert len(other.hyper_parameters) == 1  # the module's


@pytest.mark.parametrize("logger", [False, None])
def test_settings_need_no_logger(logger: Any, tmp_path: Path) -> None:
    fit(Focal(), [IRE(1.0)], logger, default_root_dir=tmp_path)


def test_a_logger_that_takes_no_settings_is_no_reason_to_stop() -> None:
    def refused(self: Any, params: dict[str, Any]) -> None:
        if "kappa" in params:
            raise ValueError("changing parameters is not allowed")

    with pytest.warns(UserWarning, match="MLFlowLogger did not take the settings of the run: changing"):
        fit(Scored(), [IRE(1.0)], logger_like("MLFlowLogger", log_hyperparams=refused))


def test_a_copy_of_a_callback_in_a_fit_knows_nothing_of_its_record(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            copies.extend(copy.deepcopy(one._record) for one in (ire, monitor))

    ire, monitor = IRE(1.0), SharpnessMonitor(**QUICK)
    fit(Scored(), [Copies(), ire, monitor], TensorBoardLogger(tmp_path))
    assert [one._trainer for one in copies] == [None, None]


def test_without_an_optimizer_every_epoch_is_measured(tmp_path: Path) -> None:
    """Weights that are set by hand: Lightning runs with a stand-in that has no groups."""

    class ByHand(Scored):
        def configure_optimizers(self) -> None:
            return None

        def on_train_epoch_start(self) -> None:
            torch.nn.init.constant_(self.net[0].bias, float(self.current_epoch))

    board = TensorBoardLogger(tmp_path)
    monitor = SharpnessMonitor(quantities=["trace_fisher", "stability"], **QUICK)
    with pytest.warns(UserWarning, match="skips stability: there is no optimizer"):
        fit(ByHand(), [monitor], board)
    values = [event.value for event in events(board.log_dir).Scalars(tags.TRACE_FISHER)]
    assert len(values) == 2
    assert values[0] != values[1]
    assert not [name for name in shown(board.log_dir) if name.startswith(("lr", "using/optimizer"))]


def test_a_run_that_is_interrupted_is_in_the_tab_too(tmp_path: Path) -> None:
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise ValueError("stopped")

    board = TensorBoardLogger(tmp_path)
    with pytest.raises(ValueError, match="stopped"):
        fit(Saving(), [SharpnessMonitor(**QUICK), Stops()], board)
    assert tags.LAMBDA_MAX in [info.name.tag for info in records(board.log_dir)[0].experiment.metric_infos]
    assert not hasattr(board.log_hyperparams, "__wrapped__") or "log_hyperparams" not in vars(board)


def test_metrics_that_the_user_names_win(tmp_path: Path) -> None:
    class Names(Scored):
        def on_fit_start(self) -> None:
            self.logger.log_hyperparams({"mine": 1}, {"val/loss": 0.5})

    board = TensorBoardLogger(tmp_path)
    fit(Names(), [SharpnessMonitor(**QUICK)], board)
    assert [info.name.tag for info in records(board.log_dir)[0].experiment.metric_infos] == ["val/loss"]


# The summary at fit start


class Counting(Scored):
    """Counts forward passes, first and second derivatives."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.forwards = getattr(self, "forwards", 0) + 1
        return loss


@pytest.mark.parametrize("num_batches", cases.first_at_once([3, 1]))
@pytest.mark.parametrize(
    "quantities",
    [[name] for name in [*cases.BARE, *sorted(cases.SPECIAL - {"kappa_headroom"})]] + [cases.BARE],
    ids=lambda q: "-".join(q)[:20],
)
@pytest.mark.parametrize("sam", [False, True])
def test_no_more_work_than_said(num_batches: int, quantities: list[str], sam: bool, monkeypatch: Any) -> None:
    from lightning_ire.sharpness import landscape

    count = {"backward": 0, "products": 0}
    grad, product = torch.autograd.grad, landscape.hessian_product

    def counted_product(*args: Any) -> Any:
        count["products"] += 1
        return product(*args)

    def counted_grad(*args: Any, **kwargs: Any) -> Any:
        count["backward"] += 1
        return grad(*args, **kwargs)

    if num_batches == 1 and "gap" in quantities:
        pytest.skip("needs two batches")
    module = Counting(Net(batch_norm=True, dropout=0.3))
    accuracy = {"max_vectors": 12, "max_iterations": 6, "relative_error": 0.0, "tolerance": 1e-12, "num_samples": 3}
    monitor = SharpnessMonitor(None, None, quantities, num_batches=num_batches, **accuracy)
    ire = [IRE(0.0, perturbation=SAM(0.1))] if sam else []
    trainer = fit(module, [*ire, monitor], False, max_epochs=1)
    monkeypatch.setattr(landscape, "hessian_product", counted_product)
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    module.forwards = 0
    refused = sam and bool({"sgd_ratio", "gap", "coherence"} & set(quantities))
    with pytest.warns(UserWarning, match="steps without SAM only") if refused else nullcontext():
        monitor.measure(trainer, module)
    said = max_cost(quantities, Settings(**accuracy), num_batches, sam)
    assert count["products"] <= said.products
    assert count["backward"] - count["products"] <= said.backward
    assert module.forwards <= said.forward
    if refused:
        return  # refused with SAM: less is done than the most
    assert count["products"] == said.products
    assert count["backward"] - count["products"] >= 0.4 * said.backward


def test_the_summary_says_when_what_and_at_what_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Scored(), [SharpnessMonitor(every_n_steps=5, num_batches=2)], False)
    (line,) = [record.message for record in caplog.records if record.message.startswith("SharpnessMonitor")]
    assert "trace_fisher, trace_hessian, lambda_max every 5 steps and every epoch on 2 batches of 8 per device" in line
    assert "92 parameters" in line
    assert "eval mode" in line
    work = max_cost(("trace_fisher", "trace_hessian", "lambda_max"), Settings(), 2, sam=False)
    assert work == (356, 356, 228)
    assert "at most 356 forward passes, 356 backward passes and 228 Hessian products" in line


# The command line


CONFIG = f"--config {ROOT}/configs/digits_resnet_sgd_ire.yaml"
QUIET = (
    "--ire.kappa 0 --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)
SMALL = "--trainer.max_epochs 2 --trainer.limit_train_batches 3 --sharpness.max_vectors 8 --sharpness.max_iterations 5"


@pytest.mark.usefixtures("own_folder")
def test_one_flag_fills_tensorboard_and_validate_measures_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *f"{CONFIG} {QUIET} {SMALL} --sharpness.every_n_epochs 1".split()]) == 0
    run = Path("logs/digits_resnet_sgd_ire/version_0")
    (path, *_) = sorted(run.glob("events.*"))
    found = EventAccumulator(str(path))
    found.Reload()
    last = {}
    for tag in (tags.TRACE_FISHER, tags.TRACE_HESSIAN, tags.LAMBDA_MAX):
        assert len(found.Scalars(tag)) == 2
        last[tag] = found.Scalars(tag)[-1].value
    capsys.readouterr()
    checkpoint = f"--ckpt_path {run}/checkpoints/last.ckpt"
    assert main(["validate", *f"--config {run}/config.yaml {checkpoint}".split()]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]  # boxes, if rich is there
    shown = dict(line for line in lines if len(line) == 2)
    for tag, value in last.items():
        assert float(shown[tag]) == pytest.approx(value, rel=1e-5)


@pytest.mark.usefixtures("own_folder")
def test_the_monitor_is_off_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="`--sharpness.max_vectors` has no effect: add `--sharpness.every_n_epochs 1`"):
        assert main(["fit", *f"{CONFIG} {QUIET} {SMALL}".split()]) == 0
    (path, *_) = sorted(Path("logs/digits_resnet_sgd_ire/version_0").glob("events.*"))
    found = EventAccumulator(str(path))
    found.Reload()
    assert not [tag for tag in found.Tags()["scalars"] if tag.startswith(("sharpness", "stability"))]


WRONG = {
    "--sharpness.every_n_epochs 0": "Expected `sharpness.every_n_epochs` to be a whole number >= 1, got 0",
    "--sharpness.quantities [lambda]": "sharpness.quantities: Expected Literal",
    "--sharpness.quantity [lambda_max]": "--sharpness.quantity",
    "--sharpness.mode test": "sharpness.mode: Expected Literal['eval', 'train'], got test",
}


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_key_or_value_is_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *f"{CONFIG} {QUIET} {flags}".split()])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "eed set to" not in line]
    assert WRONG[flags] in line


@pytest.mark.usefixtures("own_folder")
def test_the_key_and_a_listed_monitor_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text("trainer:\n  callbacks:\n    - class_path: SharpnessMonitor\n")
    with pytest.raises(SystemExit):
        main(["fit", *f"{CONFIG} --config more.yaml {QUIET} --sharpness.every_n_epochs 1".split()])
    assert "Expected SharpnessMonitor to be set up in one place" in capsys.readouterr().err
