"""IRE and SAM in a plain PyTorch loop: bit for bit what the callback does under a Trainer."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cases
import loop_ddp_script
import pytest
import torch
from cases import PERTURBATIONS
from modules import OPTIMIZERS, Classifier, Net, Scaler
from torch import Tensor, nn

from lightning_ire import (
    IRE,
    SAM,
    EmpiricalFisher,
    HutchinsonHessian,
    IREStep,
    LocalHost,
    tags,
)
from lightning_ire._checks import ConfigurationError

BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 3}


def module(optimizer: str = "sgd", seed: int = 1) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Net(batch_norm=True, dropout=0.3), OPTIMIZERS[optimizer])


def loop(model: Classifier, step: IREStep, epochs: int = 2, accumulate: int = 1, first: int = 0, seed: int = 3) -> None:
    """As `cases.fit` trains."""
    torch.manual_seed(seed)
    loader = cases.loader(cases.data())
    for epoch in range(first, epochs):
        step.epoch = epoch
        batches = list(loader)
        for index in range(0, len(batches), accumulate):
            step(cases.loss_of(model), *batches[index : index + accumulate])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plain_loop_is_the_trainer(optimizer: str, perturbation: str, accumulate: int) -> None:
    """Weights, buffers, the optimizer's state, masks, logged values and all else that is saved."""
    settings = {**BOOST, "perturbation": PERTURBATIONS[perturbation]}
    theirs, ire = module(optimizer), IRE(**settings)
    trainer = cases.fit(theirs, [ire], accumulate_grad_batches=accumulate, log_every_n_steps=1)
    ours = module(optimizer)
    own_optimizer = ours.configure_optimizers()
    step = IREStep(ours, own_optimizer, **settings)
    loop(ours, step, accumulate=accumulate)
    cases.assert_same_bits(ours, theirs)
    assert not list(cases.differences(own_optimizer.state_dict(), trainer.optimizers[0].state_dict()))
    assert not list(cases.differences(step.state_dict(), ire.state_dict()))
    assert step.state_dict()["optimizers"][0]["flat"]["masks"]
    assert tags.STEP_NORM_FLAT in step.logs
    assert (tags.PERTURBED_LOSS in step.logs) == (perturbation != "none")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"kappa": 0.0, "perturbation": SAM(0.1, interval=2)}, id="sam"),
        pytest.param({**BOOST, "curvature": EmpiricalFisher(), "start_step": 3}, id="empirical"),
        pytest.param({**BOOST, "curvature": HutchinsonHessian(), "beta": 0.5}, id="hutchinson"),
        pytest.param({**BOOST, "start_epoch": 1, "kappa_schedule": "lr"}, id="epoch"),
        pytest.param({**BOOST, "kappa_schedule": "ramp", "ramp_steps": 7, "start_step": 2}, id="ramp"),
        pytest.param({**BOOST, "exclude": "*.bias", "scope": "tensor"}, id="exclude"),
        pytest.param({**BOOST, "mask": "soft", "scope": "tensor", "gamma": {"*.bias": 0.5, "*": 0.9}}, id="soft"),
    ],
)
def test_other_settings(settings: dict[str, Any]) -> None:
    theirs, ire = module(), IRE(**settings)
    cases.fit(theirs, [ire], log_every_n_steps=1)  # as a plain loop does: the last row is saved
    ours = module()
    step = IREStep(ours, ours.configure_optimizers(), **settings)
    loop(ours, step)
    cases.assert_same_bits(ours, theirs)
    assert not list(cases.differences(step.state_dict(), ire.state_dict()))


def test_a_start_by_loss_is_decided_where_an_epoch_ends() -> None:
    for aim, expected in ((100.0, True), (0.0, False)):
        settings = {**BOOST, "start_loss": aim}
        theirs, ire = module(), IRE(**settings)
        with nullcontext() if expected else pytest.warns(UserWarning, match="never switched on"):
            cases.fit(theirs, [ire])
        ours = module()
        step = IREStep(ours, ours.configure_optimizers(), **settings)
        loop(ours, step)
        assert (step.progress.started_at is not None) is expected
        assert step.progress.started_at == (None if not expected else len(cases.loader(cases.data())))
        cases.assert_same_bits(ours, theirs)


def test_clipping_comes_between_the_last_backward_pass_and_the_step() -> None:
    settings = {**BOOST, "perturbation": SAM(0.1)}
    theirs = module()
    cases.fit(theirs, [IRE(**settings)], gradient_clip_val=0.05)
    ours = module()
    step = IREStep(
        ours, ours.configure_optimizers(), clip=lambda some: nn.utils.clip_grad_norm_(some, 0.05), **settings
    )
    loop(ours, step)
    cases.assert_same_bits(ours, theirs)


def test_a_resumed_loop_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    settings = {**BOOST, "perturbation": SAM(0.1), "beta": 0.5}
    straight = module()
    step = IREStep(straight, straight.configure_optimizers(), **settings)
    loop(straight, step, epochs=1)
    loop(straight, step, epochs=2, first=1, seed=4)
    half = module()
    optimizer = half.configure_optimizers()
    step = IREStep(half, optimizer, **settings)
    loop(half, step, epochs=1)
    torch.save([half.state_dict(), optimizer.state_dict(), step.state_dict()], tmp_path / "half.pt")
    resumed = module(seed=9)
    optimizer = resumed.configure_optimizers()
    step = IREStep(resumed, optimizer, **settings)
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    for one, state in zip((resumed, optimizer, step), saved, strict=True):
        one.load_state_dict(state)
    loop(resumed, step, epochs=2, first=1, seed=4)
    cases.assert_same_bits(resumed, straight)


def test_the_loop_goes_on_from_the_callbacks_state() -> None:
    theirs, ire = module(), IRE(**BOOST)
    cases.fit(theirs, [ire], max_epochs=1)
    ours = module()
    step = IREStep(ours, ours.configure_optimizers(), **BOOST)
    step.load_state_dict(ire.state_dict())
    assert not list(cases.differences(step.state_dict(), ire.state_dict()))
    assert step.progress.step == len(cases.loader(cases.data()))


def test_a_grad_scaler_scales_unscales_and_skips() -> None:
    """The powers of two are exact: but for the step that is skipped, nothing differs from a loop without."""
    settings = {**BOOST, "perturbation": SAM(0.1)}
    scaled = module()
    scaled.net.double()
    step = IREStep(scaled, scaled.configure_optimizers(), host=LocalHost(Scaler()), **settings)
    plain = cases.clone(scaled)
    other = IREStep(plain, plain.configure_optimizers(), **settings)
    batches = [(x.double(), y) for x, y in cases.loader(cases.data())]
    for number, batch in enumerate(batches[:5], start=1):
        torch.manual_seed(number)
        step(cases.loss_of(scaled), batch)
        if number != 3:
            torch.manual_seed(number)
            other(cases.loss_of(plain), batch)
    assert step.progress.step == other.progress.step == 4
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_weights_are_put_back_when_the_loss_function_fails() -> None:
    model = module()
    step = IREStep(model, model.configure_optimizers(), kappa=0.0, perturbation=SAM(0.5))
    batch = next(iter(cases.loader(cases.data())))
    calls = 0

    def fails(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return cases.loss_of(model)(batch)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        step(fails, batch)
    assert calls == 2
    assert all(cases.same_bits(one, other) for one, other in zip(model.parameters(), before, strict=True))
    step(cases.loss_of(model), batch)
    assert step.progress.step == 1


def test_released_it_does_nothing_more() -> None:
    model = module()
    optimizer = model.configure_optimizers()
    step = IREStep(model, optimizer, **BOOST)
    with pytest.raises(ConfigurationError, match=r"no other IREStep serves.*`release\(\)`"):
        IREStep(model, optimizer, **BOOST)
    step.release()
    IREStep(model, optimizer, kappa=0.0).release()
    optimizer.step()
    assert step.progress.step == 0
    with pytest.raises(ConfigurationError, match=r"after `release\(\)`: make another IREStep"):
        step(cases.loss_of(model), next(iter(cases.loader(cases.data()))))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kappa": -1}, "`kappa`"),
        ({"dry_run": True}, "got `dry_run`"),
        ({"start_step": 0.5}, "number of steps for IREStep"),
        ({"kappa_schedule": "ramp", "ramp_steps": 0.5}, "`ramp_steps` to be a number of steps for IREStep"),
        ({"kappa_schedule": "cosine"}, "`kappa_schedule`"),
        ({"kappa": 0, "perturbation": SAM(0.1, parameters="norm")}, "normalization layers"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    model = Classifier()
    with pytest.raises(ConfigurationError, match=words) as caught:
        IREStep(model, model.configure_optimizers(), **settings)
    assert "\n" not in str(caught.value)


def test_what_is_no_loss_is_one_line() -> None:
    model = module()
    step = IREStep(model, model.configure_optimizers(), **BOOST)
    (x, y), *_ = cases.loader(cases.data())
    with pytest.raises(ConfigurationError, match="at least one batch, got none"):
        step(cases.loss_of(model))
    with pytest.raises(ConfigurationError, match="got a tuple in place of the function"):
        step((x, y), cases.loss_of(model))
    with pytest.raises(ConfigurationError, match=r"Expected `preview\(loss_of, batch\)` with at least one"):
        step.preview(cases.loss_of(model))
    for headroom in (-5.0, "x", None):
        with pytest.raises(ConfigurationError, match="`headroom` to be a number >= 0"):
            step.note_headroom(headroom)
    with pytest.raises(ConfigurationError, match="a mapping, got NoneType"):
        step.load_state_dict(None)
    with pytest.raises(ConfigurationError, match=r"a scalar loss with its graph, got a tensor of shape \(8, 4\)"):
        step(lambda batch: model.net(batch[0]), (x[:8], y))
    with pytest.raises(ConfigurationError, match="got one without a graph"):
        step(lambda batch: torch.tensor(1.0), (x, y))
    with pytest.raises(ConfigurationError, match="got NoneType"):
        step(lambda batch: None, (x, y))
    with pytest.raises(ConfigurationError, match="Expected the state of one optimizer for IREStep, got 2"):
        step.load_state_dict({"optimizers": [{}, {}]})


def test_plain_where_nothing_is_asked_for() -> None:
    plain, ours = module(), module()
    optimizer = plain.configure_optimizers()
    step = IREStep(ours, ours.configure_optimizers(), kappa=0.0)
    torch.manual_seed(3)
    for batch in cases.loader(cases.data()):
        optimizer.zero_grad()
        cases.loss_of(plain)(batch).backward()
        optimizer.step()
    loop(ours, step, epochs=1)
    cases.assert_same_bits(ours, plain)
    assert step.logs == {}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("loop")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", loop_ddp_script.__file__]
    done = subprocess.run(
        [sys.executable, *command, str(folder)],
        env=cases.script_environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", loop_ddp_script.RUNS)
def test_replicas_of_torchrun_are_bit_identical(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert cases.same_bits(first["weights"], second["weights"])
    assert first["masks"].keys() == second["masks"].keys()
    assert all(torch.equal(mask, second["masks"][key]) for key, mask in first["masks"].items())
    assert first["measured"] == second["measured"]


@pytest.mark.slow
@pytest.mark.parametrize("name", loop_ddp_script.JOINED)
def test_torchrun_equals_one_process_on_the_joined_batch(ranks: list[dict[str, Any]], name: str) -> None:
    alone = loop_ddp_script.run(name)
    torch.testing.assert_close(ranks[0][name]["weights"], alone["weights"], rtol=1e-10, atol=1e-12)
    mean = (ranks[0][name]["losses"] + ranks[1][name]["losses"]) / 2
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-10, atol=1e-12)
    for tag, value in alone["measured"].items():
        assert ranks[0][name]["measured"][tag] == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_preview_shows_the_first_mask_and_trains_nothing(accumulate: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(accumulate)]

    def loss_of(batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    before = copy.deepcopy(model.state_dict())
    step = IREStep(model, optimizer, kappa=1.0, gamma=0.5, start_epoch=3, exclude="2.bias")
    table = step.preview(loss_of, *batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert step.progress.started_at is None
    assert not step.progress.masks.masks
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "takes no part" in table.splitlines()[6]
    step.release()
    real = IREStep(model, optimizer, kappa=1.0, gamma=0.5, exclude="2.bias")
    real(loss_of, *batches)
    assert table == real.progress.masks.table(dict(model.named_parameters()))
