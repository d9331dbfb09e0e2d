"""Where the training data goes on. The samples are numbers, so that what was seen can be read off."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import trainer
from text_data import LENGTH, order, row
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from lightning_ire import ConfigurationError
from lightning_ire.data._batches import BatchPlan, WholeBatches, own_draws
from lightning_ire.data._resumable import ResumableLoader
from lightning_ire.data._windows import Crops
from lightning_ire.data.global_batch import GlobalBatchData


class Drawing(Dataset):
    """Each number with a random one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        with own_draws(index):
            return int(index), float(torch.rand(()))


class Numbers(GlobalBatchData):
    """The numbers below `count`; `device` and `devices` are played in one process."""

    def __init__(
        self, batch: int = 8, micro: int | None = None, count: int = 100, workers: int = 0, device: int = 0,
        devices: int = 1, rows: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(batch, micro, None, workers, False)
        self.count, self.device, self.devices, self.rows = count, device, devices, rows

    rank = property(lambda self: self.device)

    def setup(self, stage: str) -> None:
        self.make_plan(fitting=True)
        per_device = self.plan.per_device // self.devices
        self._plan = BatchPlan(self.devices, self.plan.accumulation, per_device)

    def training_order(self) -> WholeBatches:
        seed = self.order_seed()
        return WholeBatches(Drawing(self.count), self.global_batch_size, self.devices, self.rank, seed)

    def order_depends_on(self) -> dict[str, Any]:
        return {"rows": self.rows, "images": f"{self.count} images", "seed_everything": self.order_seed()}

    def train_dataloader(self) -> DataLoader:
        return self.training_loader()

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(2))


class Model(pl.LightningModule):
    """Keeps (epoch, numbers of an optimizer step) and (epoch, batch index)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(100))
        self.steps: list[tuple[int, list[int]]] = []
        self.batches: list[tuple[int, int]] = []
        self._window: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        numbers, drawn = batch
        self._window += numbers.tolist()
        self.batches.append((self.current_epoch, batch_idx))
        return ((self.weight[numbers] - drawn) ** 2).mean() + self.weight.square().sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps.append((self.current_epoch, sorted(self._window)))
        self._window = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches  # makes the loader early
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 100))]


class Save(pl.Callback):
    """Writes a checkpoint in a hook, at a batch of an epoch."""

    def __init__(self, path: Path, hook: str, epoch: int, batch: int | None = None) -> None:
        self.path, self.at = path, (epoch, batch)
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_idx
        if not trainer.sanity_checking and self.at in ((trainer.current_epoch, batch), (trainer.current_epoch, None)):
            trainer.save_checkpoint(self.path)


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "saved.ckpt"


def fit(data: Numbers, callbacks=(), ckpt_path=None, **settings) -> tuple[pl.Trainer, Model]:
    run, model = trainer(callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **settings}), Model()
    run.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return run, model


def counts(run: pl.Trainer) -> tuple[int, ...]:
    loop = run.fit_loop.epoch_loop
    return run.global_step, loop._batches_that_stepped, loop.batch_progress.total.ready, loop.total_batch_idx


def epoch_order(epoch: int, count: int = 100) -> list[int]:
    sampler = WholeBatches(range(count), 1, 1, 0, 3)
    sampler.set_epoch(epoch)
    return [int(index) for index in sampler]


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [sorted(numbers[start : start + size]) for start in range(0, len(numbers) - size + 1, size)]


SPLITS = [
    pytest.param({}, id="same"),
    pytest.param({"micro": 4}, id="micro-batch"),
    pytest.param({"micro": 1}, id="micro-batch of 1"),
    pytest.param({"batch": 4}, id="half"),
    pytest.param({"batch": 16}, id="twice"),
    pytest.param({"batch": 12, "micro": 6}, id="no multiple"),
    pytest.param({"batch": 60}, id="all that is left"),
]


@pytest.mark.parametrize("saved", [{}, {"micro": 2}])
@pytest.mark.parametrize("now", SPLITS)
def test_an_epoch_is_finished_in_other_batches(path, saved, now):
    """Five batches of 8 are behind it: each of the other numbers comes once, but for fewer than a batch."""
    accumulated = 4 if saved else 1
    fit(Numbers(**saved), [Save(path, "on_train_batch_end", 1, 5 * accumulated - 1)])
    data = Numbers(**now)
    run, model = fit(data, ckpt_path=path, max_epochs=3)
    batch, (first, second) = data.global_batch_size, (epoch_order(1), epoch_order(2))
    expected = [(1, step) for step in chunks(first[40:], batch)] + [(2, step) for step in chunks(second, batch)]
    assert model.steps == expected
    length = 100 // batch * data.plan.accumulation
    assert [index for _, index in model.batches][-2 * length :][-length:] == list(range(length))
    left = [index for epoch, index in model.batches if epoch == 1]
    assert left == list(range(length - len(left), length))
    assert run.global_step == 12 + 5 + len(expected)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


@pytest.mark.parametrize("now", [{}, {"micro": 4}, {"batch": 24, "micro": 6}])
def test_an_epoch_is_finished_on_other_devices(path, now):
    fit(Numbers(micro=2), [Save(path, "on_train_batch_end", 0, 11)])  # three steps of four batches
    shares = [fit(Numbers(devices=2, device=device, **now), ckpt_path=path)[1].steps for device in range(2)]
    batch = now.get("batch", 8)
    whole = [(0, step) for step in chunks(epoch_order(0)[24:], batch)]
    whole += [(1, step) for step in chunks(epoch_order(1), batch)]
    assert [(epoch, sorted(one + other)) for (epoch, one), (_, other) in zip(*shares, strict=True)] == whole
    fit(Numbers(devices=2), [Save(path, "on_train_batch_end", 0, 2)])  # the first device writes
    assert fit(Numbers(**now), ckpt_path=path)[1].steps == whole


BREAKS = [
    pytest.param("on_train_batch_end", 9, id="in a window"),
    pytest.param("on_train_batch_end", 1, id="in the first window"),
    pytest.param("on_train_batch_end", 11, id="after a step"),
    pytest.param("on_train_batch_start", 9, id="before a batch is done"),
    pytest.param("on_train_batch_start", 12, id="before a window's first batch is done"),
    pytest.param("on_train_batch_start", 47, id="before the last batch is done"),
    pytest.param("on_validation_end", 9, id="validation in a window"),
    pytest.param("on_validation_end", 11, id="validation after a step"),
]


@pytest.mark.parametrize("epoch", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("hook", "batch"), BREAKS)
def test_goes_on_after_the_last_optimizer_step(path, hook, batch, epoch):
    """The gradients of a half-filled window are not in a checkpoint: its batches come again, to the same weights."""
    settings = {"limit_val_batches": 1, "val_check_interval": 2} if hook == "on_validation_end" else {}
    whole_run, whole = fit(Numbers(micro=2), [Save(path, hook, epoch, batch)], **settings)
    run, resumed = fit(Numbers(micro=2), ckpt_path=path, **settings)
    step = (batch + (hook != "on_train_batch_start")) // 4
    assert resumed.steps == whole.steps[12 * epoch + step :]
    assert torch.equal(resumed.weight, whole.weight)
    assert counts(run) == counts(whole_run)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("now", [{}, {"micro": 2}, {"batch": 25}, {"count": 50}, {"rows": 2, "devices": 2}])
def test_the_end_of_an_epoch_is_resumed_with_anything(path, monkeypatch, hook, now):
    settings = {"limit_val_batches": 1} if hook == "on_validation_end" else {}
    fit(Numbers(micro=4), [Save(path, hook, 0, 23)], **settings)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    expected = fit(Numbers(**now))[1]
    run, resumed = fit(Numbers(**now), ckpt_path=path, **settings)
    assert resumed.steps == [step for step in expected.steps if step[0] == 1]
    assert resumed.batches == [batch for batch in expected.batches if batch[0] == 1]
    assert run.fit_loop.epoch_loop.batch_progress.total.ready == 2 * len(resumed.batches)


@pytest.mark.parametrize("now", [{}, {"micro": 2}])
def test_a_run_that_ended_inside_an_epoch_finishes_it(path, now):
    """Lightning counts the epoch as done when `max_steps` has cut it off."""
    whole = fit(Numbers())[1]
    fit(Numbers(), [Save(path, "on_train_epoch_end", 0)], max_steps=5)
    run, resumed = fit(Numbers(**now), ckpt_path=path)
    assert resumed.steps == whole.steps[5:]
    assert counts(run)[:2] == (24, 24)


def test_resumed_twice_with_a_position_between_the_batches(path):
    fit(Numbers(), [Save(path, "on_train_batch_end", 0, 4)])
    fit(Numbers(batch=12), [Save(path, "on_train_batch_end", 0, 4)], ckpt_path=path)  # 40, then two of 12
    for now in ({"batch": 12}, {"batch": 8}):
        steps = fit(Numbers(**now), ckpt_path=path)[1].steps
        assert [step for epoch, step in steps if epoch == 0] == chunks(epoch_order(0)[64:], now["batch"])


@pytest.mark.parametrize(
    ("now", "settings", "message"),
    [
        (
            {"rows": 2},
            {},
            "^Expected `rows` to be 1 for the rest of the epoch that the checkpoint is inside of, got 2: ",
        ),
        (
            {"count": 99},
            {},
            r"^Expected the training images \(`root` and what is held out\) to be '100 images' for .*, got '99 images'",
        ),
        (
            {"batch": 61},
            {},
            "^Expected `global_batch_size` .* to leave a batch in the epoch .*, got 61 .* with 60 samples",
        ),
        ({}, {"limit_train_batches": 5}, r"^Expected .* \(or `trainer.limit_train_batches`\) to leave .* \(or 5\)"),
        ({}, {"limit_train_batches": 0.4}, r"\(or 0.4\) with 60 samples left"),
        (
            {},
            {"seed": "4"},
            "^Expected `seed_everything` to be 3 for the rest .*, got 4: set it back, or resume from a ",
        ),
    ],
)
def test_an_epoch_that_cannot_be_finished(path, monkeypatch, now, settings, message):
    fit(Numbers(), [Save(path, "on_train_batch_end", 0, 4)])
    monkeypatch.setenv("PL_GLOBAL_SEED", settings.pop("seed", "3"))
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(Numbers(**now), ckpt_path=path, **settings)
    assert "\n" not in str(caught.value)


def test_nothing_is_compared_before_the_first_step(path, monkeypatch):
    fit(Numbers(micro=4), [Save(path, "on_train_batch_end", 0, 0)])
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert fit(Numbers(count=64), ckpt_path=path)[1].steps == fit(Numbers(count=64))[1].steps


def test_checkpoints_of_an_older_release(path, caplog):
    whole = fit(Numbers(), [Save(path, "on_train_batch_end", 0, 4)])[1]
    checkpoint = torch.load(path)
    whole_state = checkpoint["Numbers"]
    del whole_state["order"]["rows"]
    checkpoint["Numbers"] = {"epoch": 0, "batches": 5}  # of a text
    torch.save(checkpoint, path)
    with caplog.at_level("INFO"):
        assert fit(Numbers(), ckpt_path=path)[1].steps == whole.steps[5:]
    assert "of an older release: its seed, batch and data cannot be compared." in caplog.text
    checkpoint["Numbers"] = whole_state  # of the release before: without one of the keys
    torch.save(checkpoint, path)
    assert fit(Numbers(rows=2), ckpt_path=path)[1].steps == whole.steps[5:]
    del checkpoint["Numbers"], checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]  # of images
    torch.save(checkpoint, path)
    with pytest.warns(
        UserWarning, match="^No position in the data is in the checkpoint: its epoch goes on with the fir"
    ):
        steps = fit(Numbers(), ckpt_path=path)[1].steps
    assert steps == whole.steps[:7] + whole.steps[12:]


@pytest.mark.parametrize(
    ("workers", "hook", "settings"),
    [
        pytest.param(2, "on_train_epoch_end", {}, id="end"),
        pytest.param(2, "on_train_batch_end", {}, id="inside", marks=pytest.mark.slow),
        pytest.param(2, "on_train_epoch_end", {"reload_dataloaders_every_n_epochs": 1}, marks=pytest.mark.slow),
        pytest.param(0, "on_train_epoch_end", {"reload_dataloaders_every_n_epochs": 1}),
        pytest.param(0, "on_train_batch_end", {"reload_dataloaders_every_n_epochs": 1}),
    ],
)
def test_processes_know_the_epoch(path, workers, hook, settings):
    """Lightning-AI/pytorch-lightning#21938."""
    batch = {"on_train_epoch_end": 11, "on_train_batch_end": 4}[hook]
    whole = fit(Numbers(), [Save(path, hook, 1, batch)], max_epochs=3)[1]
    resumed = fit(Numbers(workers=workers), ckpt_path=path, max_epochs=3, **settings)[1]
    assert resumed.steps == whole.steps[12 + batch + 1 :]
    assert torch.equal(resumed.weight, whole.weight)  # what was drawn is the same too


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_fit_goes_on(workers):
    whole = fit(Numbers())[1]
    data = Numbers(workers=workers)
    run, model = fit(data, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(model, datamodule=data)
    assert model.steps == whole.steps


def test_what_is_drawn_is_a_samples_own():
    def drawn(workers: int = 0, batch: int = 4, epoch: int = 0, seed: int = 0) -> dict[int, float]:
        data = Drawing(20)
        sampler = WholeBatches(data, 20, 1, 0, seed)
        sampler.set_epoch(epoch)
        loader = ResumableLoader(data, batch_size=batch, sampler=sampler, num_workers=workers)
        return dict(pair for numbers, values in loader for pair in zip(numbers.tolist(), values.tolist(), strict=True))

    first = drawn()
    assert len(set(first.values())) == 20
    torch.rand(5)
    assert drawn(batch=10) == drawn(workers=1) == first
    assert not set(drawn(epoch=1).values()) & set(first.values())
    assert not set(drawn(seed=1).values()) & set(first.values())
    before = torch.get_rng_state()
    Drawing(20)[next(iter(WholeBatches(Drawing(20), 20, 1, 0, 0)))]
    assert torch.equal(torch.get_rng_state(), before)
    assert Drawing(20)[0] != Drawing(20)[0]  # an index of no order: the next random numbers


# The loader.


def loader(workers: int = 0, devices: int = 1, rank: int = 0, shuffled: bool = True, epoch: int = 0) -> ResumableLoader:
    sampler = order(150, 4, devices, rank, shuffled, epoch=epoch)
    return ResumableLoader(
        sampler.dataset, batch_size=2 // devices, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )


def starts(batches) -> list[list[int]]:
    return [inputs[:, 0].tolist() for inputs, _ in batches]


@pytest.mark.parametrize(("workers", "shuffled", "devices"), [(0, True, 1), (0, False, 1), (0, True, 2), (2, True, 1)])
def test_an_epoch_that_goes_on(workers, shuffled, devices):
    whole = starts(loader(0, devices, devices - 1, shuffled, epoch=2))
    assert len(whole) == len(loader()) == 14
    going = loader(workers, devices, devices - 1, shuffled, epoch=2)
    fresh = loader(workers, devices, devices - 1, shuffled, epoch=2)
    iterator = iter(going)
    for number in range(1, 15):
        next(iterator)
        assert going.state_dict() == {"epoch": 2, "batches": number}
        if number in (1, 7, 13, 14) and (workers == 0 or number == 7):
            fresh.load_state_dict(pickle.loads(pickle.dumps(going.state_dict())))
            assert starts(fresh) == whole[number:]
            assert fresh.state_dict() == {"epoch": 2, "batches": 14}
            assert starts(fresh) == whole  # once
    assert len(fresh) == 14


def test_a_state_of_another_epoch_is_left_out():
    going = loader(epoch=3)
    going.load_state_dict({"epoch": 2, "batches": 5})
    assert starts(going) == starts(loader(epoch=3))
    going.load_state_dict({"epoch": 3, "batches": 5})
    iterator = iter(going)  # Lightning tells the epoch after this
    going.sampler.set_epoch(4)
    assert starts(iterator) == starts(loader(epoch=4))


def test_states_between_the_batches():
    going = loader(epoch=2)
    assert going.state_dict()["batches"] == 0
    going.load_state_dict({"epoch": 2, "batches": 5})
    assert going.state_dict() == {"epoch": 2, "batches": 5}  # saved again before it has gone on
    list(going)
    going.sampler.set_epoch(3)
    state = going.state_dict()  # of epoch 2: nothing of epoch 3 was given
    going.load_state_dict(state)
    assert starts(going) == starts(loader(epoch=3))


def test_iterating_twice_begins_anew():
    going = loader()
    first = starts(itertools.islice(going, 3))
    assert starts(going)[:3] == first
    assert going.state_dict() == {"epoch": 0, "batches": 14}


def test_another_sampler():
    """What Lightning puts there for `overfit_batches`."""
    crops = Crops(row(30), LENGTH)
    plain = ResumableLoader(crops, batch_size=2, sampler=SequentialSampler(crops))
    assert starts(plain)[:2] == [[0, 1], [2, 3]]
    plain.load_state_dict({"epoch": 0, "batches": 5})
    assert starts(plain)[:2] == [[0, 1], [2, 3]]
    assert plain.state_dict() == {"epoch": 0, "batches": len(plain)}
