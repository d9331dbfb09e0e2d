"""The rows: what a Trainer and a module can do, one each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from modules import Odd, sgd
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from matrix.modules import (
    BATCH,
    AccumulatesByHand,
    Backbone,
    ClosureFirst,
    DictBatches,
    DictOutput,
    EditsAfterBackward,
    EditsBeforeStep,
    EverySecond,
    GradientHooks,
    GradientPenalty,
    Groups,
    LastNone,
    LogsFromOutside,
    LooksAroundBackward,
    LooksBeforeZeroGrad,
    OneArgument,
    OwnBackward,
    OwnClipping,
    OwnScheduler,
    OwnSchedulerStep,
    OwnZeroGrad,
    Parent,
    RecurrentAttention,
    SomeNone,
    StopsTheEpoch,
    Tuned,
    TwoLoaders,
    WarmUpByHand,
    Words,
    Wrapper,
    adamw,
    checkpointed,
    compiled,
    loader,
    optimized,
    parametrized,
    scheduled,
    spectral,
    with_net,
)
from matrix.runs import Row


class FindsTwice(LearningRateFinder):
    """Lightning's documentation calls it FineTuneLearningRateFinder."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=8, early_stop_threshold=None)

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 1):
            self.lr_find(trainer, pl_module)


def fp16(scale: float, **settings: Any) -> Callable[[], dict[str, Any]]:
    """16-mixed on the CPU, from a given loss scale on."""

    def make() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **settings}

    return make


NORMAL, OVERFLOWS, HOPELESS = 2.0**10, 2.0**22, 2.0**126


def tune(method: str, **settings: Any) -> Callable[[pl.Trainer, Any, Any], None]:
    """Run the Tuner, then train."""

    def fit(trainer: pl.Trainer, module: Any, loaders: Any) -> None:
        getattr(Tuner(trainer), method)(module, val_dataloaders=loaders[1], **settings)
        trainer.fit(module, val_dataloaders=loaders[1])

    return fit


def from_module(trainer: pl.Trainer, module: Any, loaders: Any) -> None:
    trainer.fit(module, val_dataloaders=loaders[1])


def saver(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder / "saved", **settings)


STEP, EPOCH = {"interval": "step"}, {"interval": "epoch"}
ROWS: list[Row] = [
    Row("plain", "a plain fit with validation"),
    # clipping and accumulation
    Row("clip-norm", "gradient clipping by norm", trainer=lambda: {"gradient_clip_val": 0.1}),
    Row(
        "clip-value",
        "gradient clipping by value",
        trainer=lambda: {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ),
    Row("clip-own", "configure_gradient_clipping overridden", OwnClipping, lambda: {"gradient_clip_val": 0.05}),
    Row("accumulate", "gradient accumulation", trainer=lambda: {"accumulate_grad_batches": 4}),
    Row(
        "accumulate-clip",
        "gradient accumulation",
        trainer=lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "max_epochs": 3},
    ),
    Row(
        "accumulate-schedule",
        "GradientAccumulationScheduler",
        trainer=lambda: {"max_epochs": 3},
        callbacks=lambda folder: [GradientAccumulationScheduler({0: 1, 1: 4, 2: 5})],
    ),
    # schedulers
    Row(
        "schedule-step",
        "learning-rate schedulers per step",
        scheduled(make=lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12), **STEP),
        warns="still warms up",
    ),
    Row(
        "schedule-step-accumulate",
        "learning-rate schedulers per step",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.7), frequency=2, **STEP),
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
    ),
    Row(
        "schedule-epoch",
        "learning-rate schedulers per epoch",
        scheduled(make=lambda o: lr_scheduler.StepLR(o, 1, 0.5), frequency=2, **EPOCH),
        lambda: {"max_epochs": 5, "limit_train_batches": 3},
    ),
    Row(
        "schedule-plateau",
        "ReduceLROnPlateau",
        scheduled(
            make=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0), monitor="val_loss", **EPOCH
        ),
        lambda: {"max_epochs": 4},
    ),
    Row(
        "schedule-plateau-step",
        "ReduceLROnPlateau",
        scheduled(
            make=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, threshold=0.5),
            monitor="loss",
            **STEP,
        ),
        lambda: {"accumulate_grad_batches": 2},
    ),
    Row("schedule-own-step", "lr_scheduler_step overridden", OwnSchedulerStep),
    Row("schedule-own-class", "a scheduler that is not torch's", OwnScheduler),
    # precision
    Row("bf16-mixed", "precision bf16-mixed", trainer=lambda: {"precision": "bf16-mixed"}),
    Row(
        "bf16-mixed-accumulate-clip",
        "precision bf16-mixed",
        trainer=lambda: {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
    ),
    Row("bf16-true", "precision bf16-true", trainer=lambda: {"precision": "bf16-true"}),
    Row("16-true", "precision 16-true", trainer=lambda: {"precision": "16-true"}),
    Row("64-true", "precision 64-true", trainer=lambda: {"precision": "64-true"}),
    Row("16-mixed", "precision 16-mixed (GradScaler)", trainer=fp16(NORMAL)),
    Row("16-mixed-overflow", "precision 16-mixed, overflowing steps", trainer=fp16(OVERFLOWS, max_epochs=3)),
    Row("16-mixed-hopeless", "precision 16-mixed, overflowing steps", trainer=fp16(HOPELESS), made=False),
    Row(
        "16-mixed-accumulate-clip",
        "precision 16-mixed (GradScaler)",
        trainer=fp16(OVERFLOWS, accumulate_grad_batches=4, gradient_clip_val=0.1, max_epochs=5),
    ),
    Row("16-mixed-none", "precision 16-mixed, steps without a loss", SomeNone, fp16(NORMAL)),
    Row(
        "16-mixed-none-last",
        "precision 16-mixed, steps without a loss",
        LastNone,
        fp16(NORMAL, accumulate_grad_batches=4),
    ),
    Row("16-mixed-fused", "precision 16-mixed with a fused optimizer", optimized(adamw(fused=True)), fp16(OVERFLOWS)),
    Row(
        "16-mixed-epoch",
        "precision 16-mixed (GradScaler)",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.7), **STEP),
        fp16(OVERFLOWS),
    ),
    # batches and outputs of training_step
    Row("dict-output", "training_step returning a dict", DictOutput),
    Row("dict-output-accumulate", "training_step returning a dict", DictOutput, lambda: {"accumulate_grad_batches": 4}),
    Row("none-output", "training_step returning None at times", SomeNone),
    Row(
        "none-output-accumulate",
        "training_step returning None at times",
        SomeNone,
        lambda: {"accumulate_grad_batches": 4},
    ),
    Row("none-output-last", "training_step returning None at times", LastNone, lambda: {"accumulate_grad_batches": 4}),
    Row("one-argument", "training_step(batch) without batch_idx", OneArgument),
    Row("dict-batches", "batches of any structure, changed by the transfer hooks", DictBatches),
    Row(
        "two-loaders",
        "several training loaders (CombinedLoader)",
        TwoLoaders,
        train=lambda module: CombinedLoader([loader(), loader(30, seed=4)], "max_size_cycle"),
    ),
    Row(
        "stream",
        "training data without a length (IterableDataset)",
        trainer=lambda: {"accumulate_grad_batches": 3},
        train=lambda module: DataLoader(cases.Stream(28), batch_size=BATCH),
    ),
    # overridden hooks
    Row("own-optimizer-step", "optimizer_step overridden (warm-up by hand)", WarmUpByHand),
    Row(
        "own-optimizer-step-closure",
        "optimizer_step overridden (a step at every second batch)",
        EverySecond,
    ),
    Row(
        "own-accumulation",
        "optimizer_step and optimizer_zero_grad overridden to accumulate by hand",
        AccumulatesByHand,
    ),
    Row("own-closure-first", "optimizer_step overridden (runs the closure before the step)", ClosureFirst),
    Row("own-backward", "backward overridden", OwnBackward),
    Row("own-zero-grad", "optimizer_zero_grad overridden", OwnZeroGrad),
    Row("own-zero-grad-odd", "optimizer_zero_grad overridden", lambda: OwnZeroGrad(Odd())),
    Row("edits-before-step", "on_before_optimizer_step overridden (edits gradients)", EditsBeforeStep),
    Row(
        "edits-before-step-16",
        "on_before_optimizer_step overridden (edits gradients)",
        EditsBeforeStep,
        fp16(NORMAL, gradient_clip_val=0.1),
    ),
    Row("looks-before-zero-grad", "on_before_zero_grad overridden", LooksBeforeZeroGrad),
    Row(
        "looks-around-backward", "on_before_backward and on_after_backward overridden (read only)", LooksAroundBackward
    ),
    Row(
        "edits-after-backward",
        "on_after_backward overridden (edits gradients)",
        EditsAfterBackward,
        refused="on_after_backward",
    ),
    Row("gradient-hooks", "hooks on parameters and modules (register_hook, ...)", GradientHooks),
    Row(
        "stops-the-epoch",
        "on_train_batch_start returning -1",
        StopsTheEpoch,
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
        dropped=3,
    ),
    # callbacks
    Row(
        "checkpoint-steps",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True},
        callbacks=lambda folder: [saver(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)],
    ),
    Row(
        "checkpoint-steps-accumulate",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True, "accumulate_grad_batches": 4, "max_epochs": 3},
        callbacks=lambda folder: [saver(folder, every_n_train_steps=3, save_top_k=-1)],
    ),
    Row(
        "checkpoint-monitor",
        "ModelCheckpoint (every_n_train_steps, monitor, save_last)",
        trainer=lambda: {"enable_checkpointing": True, "max_epochs": 3},
        callbacks=lambda folder: [
            saver(folder, monitor="val_loss", filename="{epoch}-{val_loss:.6f}", save_last=True),
            saver(folder, monitor="double", filename="b-{step}-{double:.6f}", save_on_train_epoch_end=True),
        ],
    ),
    Row(
        "early-stopping",
        "EarlyStopping",
        trainer=lambda: {"max_epochs": 6},
        callbacks=lambda folder: [EarlyStopping("val_loss", min_delta=10.0, patience=2)],
    ),
    Row(
        "lr-monitor",
        "LearningRateMonitor",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **STEP),
        callbacks=lambda folder: [LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)],
    ),
    Row(
        "weight-averaging",
        "WeightAveraging and EMAWeightAveraging",
        callbacks=lambda folder: [WeightAveraging()],
    ),
    Row(
        "ema",
        "WeightAveraging and EMAWeightAveraging",
        trainer=lambda: {"accumulate_grad_batches": 2, "enable_checkpointing": True},
        callbacks=lambda folder: [
            EMAWeightAveraging(decay=0.9, update_every_n_steps=2),
            saver(folder, every_n_train_steps=2, save_top_k=-1),
        ],
    ),
    Row(
        "swa",
        "StochasticWeightAveraging",
        trainer=lambda: {"max_epochs": 4},
        callbacks=lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=2)],
    ),
    Row(
        "swa-accumulate",
        "StochasticWeightAveraging",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **EPOCH),
        lambda: {"max_epochs": 4, "accumulate_grad_batches": 4},
        callbacks=lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=0.5)],
    ),
    Row(
        "lr-finder",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        callbacks=lambda folder: [LearningRateFinder(num_training_steps=8, early_stop_threshold=None)],
        fit=from_module,
    ),
    Row(
        "lr-finder-in-between",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        callbacks=lambda folder: [FindsTwice()],
        fit=from_module,
    ),
    Row(
        "tuner-lr",
        "LearningRateFinder and Tuner.lr_find",
        Tuned,
        fit=tune("lr_find", num_training=8, early_stop_threshold=None),
    ),
    Row(
        "batch-size-finder",
        "BatchSizeFinder and Tuner.scale_batch_size",
        Tuned,
        callbacks=lambda folder: [BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=4)],
        fit=from_module,
    ),
    Row(
        "tuner-batch-size",
        "BatchSizeFinder and Tuner.scale_batch_size",
        Tuned,
        fit=tune("scale_batch_size", max_trials=2, steps_per_trial=2, init_val=4, mode="binsearch"),
        slow=True,
    ),
    Row(
        "finetuning",
        "BackboneFinetuning (parameters that join later)",
        Backbone,
        lambda: {"max_epochs": 4},
        callbacks=lambda folder: [BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)],
    ),
    Row("profiler-simple", "profilers", trainer=lambda: {"profiler": SimpleProfiler()}),
    Row("profiler-advanced", "profilers", trainer=lambda: {"profiler": AdvancedProfiler()}, slow=True),
    # the Trainer's own settings
    Row("max-steps", "max_steps", trainer=lambda: {"max_steps": 8, "max_epochs": -1}),
    Row(
        "max-steps-accumulate",
        "max_steps",
        trainer=lambda: {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 4},
    ),
    Row(
        "validation-in-between",
        "val_check_interval and check_val_every_n_epoch",
        trainer=lambda: {"val_check_interval": 3, "accumulate_grad_batches": 2},
    ),
    Row(
        "validation-seldom",
        "val_check_interval and check_val_every_n_epoch",
        trainer=lambda: {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0},
    ),
    Row(
        "limits",
        "limit_train_batches and limit_val_batches",
        trainer=lambda: {"limit_train_batches": 0.7, "limit_val_batches": 1, "accumulate_grad_batches": 3},
    ),
    Row("overfit", "overfit_batches", trainer=lambda: {"overfit_batches": 2}),
    Row("fast-dev-run", "fast_dev_run", trainer=lambda: {"fast_dev_run": 3}),
    Row("detect-anomaly", "detect_anomaly", trainer=lambda: {"detect_anomaly": True}),
    Row("barebones", "barebones", trainer=lambda: {"barebones": True}),
    Row(
        "log-every-3",
        "log_every_n_steps",
        trainer=lambda: {"log_every_n_steps": 3, "accumulate_grad_batches": 2, "max_epochs": 4},
    ),
    Row("reload", "reload_dataloaders_every_n_epochs", trainer=lambda: {"reload_dataloaders_every_n_epochs": 1}),
    Row(
        "everything",
        "many of these at once",
        scheduled(make=lambda o: lr_scheduler.ExponentialLR(o, 0.9), **STEP),
        lambda: {
            "accumulate_grad_batches": 4,
            "gradient_clip_val": 0.1,
            "precision": "bf16-mixed",
            "val_check_interval": 3,
            "max_steps": 5,
            "max_epochs": -1,
            "enable_checkpointing": True,
            "detect_anomaly": True,
            "profiler": "simple",
        },
        callbacks=lambda folder: [
            LearningRateMonitor(),
            EMAWeightAveraging(decay=0.9),
            EarlyStopping("val_loss", patience=100),
            saver(folder, every_n_train_steps=2, save_top_k=-1, save_last=True),
        ],
    ),
    # optimizers
    Row("adamw", "any first-order optimizer of torch", optimized(adamw())),
    Row("adamw-fused", "fused and foreach optimizers", optimized(adamw(fused=True, amsgrad=True))),
    Row("adamw-foreach", "fused and foreach optimizers", optimized(adamw(foreach=True))),
    Row(
        "sgd-fused",
        "fused and foreach optimizers",
        optimized(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)),
    ),
    Row("rmsprop", "any first-order optimizer of torch", optimized(lambda m: torch.optim.RMSprop(m.parameters()))),
    Row("wrapper", "optimizers around another (Lookahead)", optimized(lambda m: Wrapper(sgd(m)))),
    Row("groups", "parameter groups, parameters outside the optimizer", Groups),
    # modules
    *(
        Row(
            f"compiled-{what}-{backend}",
            f"torch.compile of {'a part' if what == 'part' else 'the module'} ({backend})",
            compiled(backend, what),
            # batches of one size: for a second size inductor makes kernels that round differently, and which of them
            # serves which step depends on what was compiled before
            train=lambda module: loader(6 * BATCH),
            slow=(what, backend) != ("part", "eager"),
            warns="cannot share the training forward pass" if (what, backend) == ("part", "inductor") else "",
        )
        for what in ("module", "logging", "part")
        for backend in ("eager", "aot_eager", "inductor")
    ),
    *(
        Row(
            f"checkpointing-{'reentrant' if reentrant else 'non-reentrant'}{'-batchnorm' if batch_norm else ''}",
            f"activation checkpointing ({'reentrant' if reentrant else 'non-reentrant'})",
            with_net(lambda reentrant=reentrant, batch_norm=batch_norm: checkpointed(reentrant, batch_norm)),
            warns="cannot share the training forward pass" if reentrant else "",
        )
        for reentrant in (True, False)
        for batch_norm in (False, True)
    ),
    Row("captured-log", "self.log handed to other objects", LogsFromOutside),
    Row("nested", "nested LightningModules that log", Parent),
    Row("odd-parameters", "frozen, unused, tied, scalar and empty parameters", with_net(Odd)),
    Row(
        "odd-parameters-accumulate",
        "frozen, unused, tied, scalar and empty parameters",
        with_net(Odd),
        lambda: {"accumulate_grad_batches": 4, "precision": "bf16-mixed"},
    ),
    Row(
        "sparse",
        "sparse gradients",
        with_net(Words, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
        lambda: {"accumulate_grad_batches": 2},
    ),
    Row("sparse-adam", "sparse gradients", with_net(Words, optimizer=lambda m: torch.optim.SparseAdam(m.parameters()))),
    Row("parametrized", "parametrizations (weight_norm, orthogonal)", with_net(parametrized)),
    Row(
        "spectral-norm",
        "layers that compute with buffers they change (spectral_norm, queues)",
        with_net(spectral),
    ),
    Row("gradient-penalty", "differentiating inside training_step (gradient penalties)", GradientPenalty),
    Row("recurrent-attention", "recurrent and attention layers", with_net(RecurrentAttention)),
]
