"""How long a run will be is counted as it really turns out, or nobody says a number."""

from typing import Any

import cases
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from modules import Classifier, Manual, TwoPlayers
from torch.utils.data import DataLoader

from lightning_ire import IRE, ConfigurationError
from lightning_ire._run_length import batches_of_run, steps_of_run


class First(Classifier):
    """Takes the first of several loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first = batch[0] if isinstance(batch[0], (list, tuple)) else batch
        return super().training_step(first, batch_idx)


def stream() -> DataLoader:
    return DataLoader(cases.Stream(), batch_size=8)


def short() -> DataLoader:
    return cases.loader(cases.data(24))


class Counts(pl.Callback):
    """What is said as training starts, and what it comes to."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps, self.batches = steps_of_run(trainer), batches_of_run(trainer)
        self.seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen += 1
        trainer.should_stop = self.seen == 40


def combined(mode: str) -> Any:
    return CombinedLoader([cases.loader(cases.data()), short()], mode)


KNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "epochs": (None, {"max_epochs": 3}),
    "steps-first": (None, {"max_epochs": 3, "max_steps": 13}),
    "epochs-first": (None, {"max_epochs": 3, "max_steps": 100}),
    "steps": (None, {"max_epochs": -1, "max_steps": 13}),
    "stream-and-steps": (stream, {"max_epochs": -1, "max_steps": 13}),
    "stream-limited": (stream, {"max_epochs": 3, "limit_train_batches": 5}),
    "accumulation": (None, {"max_epochs": 3, "accumulate_grad_batches": 3}),
    "limit": (None, {"max_epochs": 3, "limit_train_batches": 5}),
    "limit-fraction": (None, {"max_epochs": 3, "limit_train_batches": 0.7}),
    "overfit": (None, {"max_epochs": 3, "overfit_batches": 2}),
    "dev-run": (None, {"fast_dev_run": 4}),
    "time": (None, {"max_epochs": 3, "max_time": {"hours": 1}}),
    "reload-too-late": (None, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 3}),
    "validation": (None, {"max_epochs": 3, "val_check_interval": 3, "accumulate_grad_batches": 2}),
    "cycle": (lambda: combined("max_size_cycle"), {"max_epochs": 3}),
    "min-size": (lambda: combined("min_size"), {"max_epochs": 3}),
}


@pytest.mark.parametrize(("data", "settings"), KNOWN.values(), ids=KNOWN.keys())
def test_the_steps_of_a_run(data: Any, settings: dict[str, Any]) -> None:
    counts = Counts()
    trainer = cases.fit(First(), [counts], data and data(), **settings)
    assert counts.steps == trainer.global_step > 0


@pytest.mark.parametrize(
    ("factors", "steps"),
    [({0: 1, 2: 8}, 8 + 8 + 1 + 1), ({1: 3, 3: 5}, 8 + 3 + 3 + 2), ({0: 2}, 16), ({9: 4}, 32), ({0: 3, 4: 1}, 12)],
)
@pytest.mark.parametrize("limit", [-1, 11])
def test_accumulation_that_changes_over_the_epochs(factors: dict[int, int], steps: int, limit: int) -> None:
    counts = Counts()
    callbacks = [GradientAccumulationScheduler({0: 7}), GradientAccumulationScheduler(factors), counts]
    trainer = cases.fit(Classifier(), callbacks, max_epochs=4, max_steps=limit)
    assert counts.steps == trainer.global_step == (min(steps, limit) if limit > 0 else steps)


UNKNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "no-end": (None, {"max_epochs": -1}),
    "stream": (stream, {"max_epochs": 4}),
    "stream-steps-or-epochs": (stream, {"max_epochs": 4, "max_steps": 40}),  # 32 steps
    "stream-beside": (lambda: CombinedLoader([stream(), short()], "max_size"), {"max_epochs": 4}),
    "reload": (None, {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 2}),
}


@pytest.mark.parametrize(("data", "settings"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_run_whose_length_nobody_knows(data: Any, settings: dict[str, Any]) -> None:
    counts = Counts()
    cases.fit(First(), [counts], data and data(), **settings)
    assert (counts.steps, counts.batches) == (None, None)
    module = First()
    start = cases.clone(module)
    with pytest.raises(ConfigurationError, match=r"Expected a run of known length for `start_step=0\.5`") as caught:
        cases.fit(module, [IRE(start_step=0.5)], data and data(), **settings)
    assert "\n" not in str(caught.value)
    cases.assert_same_bits(module, start)


@pytest.mark.parametrize("start", [5, 31])
def test_a_step_of_a_run_of_unknown_length_is_taken_as_it_is(start: int, recwarn: pytest.WarningsRecorder) -> None:
    ire = IRE(start_step=start)
    cases.fit(Classifier(), [ire], stream(), max_epochs=4)
    assert ire.started_at == start
    assert not [one for one in recwarn if "IRE" in str(one.message)]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 2: 8})]}, 9),  # of 16 + 2
        ({"callbacks": [GradientAccumulationScheduler({0: 8, 2: 1})]}, 9),
        ({"train": stream(), "max_epochs": -1, "max_steps": 12}, 6),
    ],
)
def test_half_of_the_run(settings: dict[str, Any], first: int) -> None:
    ire = IRE(start_step=0.5)
    cases.fit(Classifier(), [*settings.pop("callbacks", []), ire], **{"max_epochs": 4, **settings})
    assert ire.started_at == first


def test_a_resumed_run_starts_at_a_fraction_of_the_whole(tmp_path: Any) -> None:
    cases.fit(Classifier(), [IRE(start_step=0.5)], max_epochs=3).save_checkpoint(tmp_path / "3.ckpt")
    ire = IRE(start_step=0.8)
    cases.fit(Classifier(), [ire], max_epochs=5, ckpt_path=str(tmp_path / "3.ckpt"))
    assert ire.started_at == 12  # the checkpoint's latch: on for good
    ire = IRE(start_step=0.8)
    cases.fit(Classifier(), [ire], stream(), max_epochs=5, ckpt_path=str(tmp_path / "3.ckpt"))
    assert ire.started_at == 12  # whose length no longer matters
    cases.fit(Classifier(), max_epochs=3).save_checkpoint(tmp_path / "plain.ckpt")
    ire = IRE(start_step=0.8)
    cases.fit(Classifier(), [ire], max_epochs=5, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert ire.started_at == 32


class EverySecond(Classifier):
    """Lets every second step out."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_a_fraction_of_a_run_whose_steps_an_override_leaves_out_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`start_step=0\.4`.*`EverySecond\.optimizer_step`, which left one"):
        cases.fit(EverySecond(), [IRE(start_step=0.4)], max_epochs=4)
    ire = IRE(start_step=0.4)
    cases.fit(EverySecond(), [ire], max_epochs=100, max_steps=10)  # counted in real steps
    assert ire.started_at == 4
    cases.fit(EverySecond(), [IRE(start_step=3)], max_epochs=2)


# manual optimization: who steps how often is the module's affair


@pytest.mark.parametrize("settings", [{"max_epochs": 3}, {"fast_dev_run": 4}, {"limit_train_batches": 5}])
def test_the_batches_of_a_run(settings: dict[str, Any]) -> None:
    counts = Counts()
    cases.fit(Manual(), [counts], **settings)
    assert counts.batches == counts.seen > 0


def test_a_fraction_by_hand_is_one_of_the_batches() -> None:
    ire = IRE(start_step=0.5)
    cases.fit(TwoPlayers(), [ire], max_epochs=3)  # the second player steps twice in each of 24 batches
    assert [progress.started_at for progress in ire._progresses] == [12, 24]


def test_a_fraction_by_hand_needs_a_number_of_batches() -> None:
    for settings in ({"max_steps": 9}, {"train": stream()}):
        with pytest.raises(ConfigurationError, match=r"Expected a run of known length for `start_step=0\.5`"):
            cases.fit(Manual(), [IRE(start_step=0.5)], **settings)


def test_a_start_by_hand_beyond_the_batches_is_within_reach(recwarn: pytest.WarningsRecorder) -> None:
    ire = IRE(start_step=20)
    cases.fit(TwoPlayers(), [ire], max_epochs=3)
    assert [progress.started_at for progress in ire._progresses] == [20, 20]
    ire = IRE(start_step=30)
    cases.fit(TwoPlayers(), [ire], max_epochs=3)
    assert [progress.started_at for progress in ire._progresses] == [None, 30]
    assert not [one for one in recwarn if "the run ends before that" in str(one.message)]
