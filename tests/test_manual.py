"""Modules in manual optimization: IRE around each step they make, SAM where they give a closure."""

import logging
import re
import warnings
from typing import Any

import cases
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from modules import Classifier, Manual, Net, TwoPlayers
from torch import Tensor, nn

from lightning_ire import IRE, SAM, AverageSAM, ConfigurationError, EmpiricalFisher, tags

BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 3}


SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "ire": (BOOST, False),
    "ire-closure": (BOOST, True),
    "ire-empirical": ({**BOOST, "curvature": EmpiricalFisher()}, False),
    "ire-late": ({**BOOST, "start_step": 5, "beta": 0.5, "kappa_schedule": "lr"}, False),
    "sam": ({"kappa": 0.0, "perturbation": SAM(0.1)}, True),
    "sam-sync": ({"kappa": 0.0, "perturbation": SAM(0.1, sync=True)}, True),
    "sam-sometimes": ({"kappa": 0.0, "perturbation": SAM(0.1, interval=3)}, True),
    "sam-ire": ({**BOOST, "perturbation": SAM(0.1)}, True),
    "average-sam": ({"kappa": 0.0, "perturbation": AverageSAM(0.1)}, True),
}


@pytest.mark.parametrize(("settings", "closure"), SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("net", [Net(), Net(batch_norm=True, dropout=0.3)], ids=["plain", "batchnorm-dropout"])
def test_the_same_steps_by_hand_and_automatically(settings: dict[str, Any], closure: bool, net: nn.Module) -> None:
    automatic = cases.clone(Classifier(net)).double()
    manual = Manual(cases.clone(automatic).net, closure)
    cases.fit(automatic, [IRE(**settings)], cases.loader(cases.data(dtype=torch.float64)), precision="64-true")
    ire = IRE(**settings)
    cases.fit(manual, [ire], cases.loader(cases.data(dtype=torch.float64)), precision="64-true")
    cases.assert_same_bits(manual, automatic)
    assert manual.calls == automatic.calls
    assert ire._progress.step == 16


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_parity_at_kappa_0_with_a_forced_second_pass(closure: bool, precision: str) -> None:
    def run(callbacks: list[pl.Callback]) -> tuple[Manual, pl.Trainer]:
        torch.manual_seed(4)
        module = Manual(Net(batch_norm=True, dropout=0.3), closure)
        loop: dict[str, Any] = {"precision": precision}
        if precision == "fp16":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
            loop = {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
        return module, cases.fit(module, callbacks, **loop)

    plain, trainer = run([])
    callback = IRE(kappa=0, perturbation=SAM(0.0)) if closure else IRE(kappa=5, interval=2, exclude="*")
    forced, same = run([callback])
    cases.assert_same_bits(plain, forced)
    assert trainer.global_step == same.global_step
    assert torch.equal(trainer.callback_metrics["loss"], same.callback_metrics["loss"])
    assert forced.calls == (2 if closure else 1) * plain.calls
    assert {"training_step", "manual_backward", "log"}.isdisjoint(vars(forced))
    assert "zero_grad" not in vars(same.optimizers[0])
    assert "step" not in vars(forced.optimizers())


def test_sam_without_a_closure_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `optimizer.step\(closure\)` for SAM\(rho=0.1\).*moved wei"):
        cases.fit(Manual(), [IRE(kappa=0, perturbation=SAM(0.1))])


class Halfway(Manual):
    """A closure that leaves out part of the gradient's computation."""

    def __init__(self, what: str) -> None:
        super().__init__(Net() if what != "one-layer" else nn.Linear(cases.FEATURES, cases.CLASSES))
        self.what = what

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        part = self.net[0](batch[0]) if self.what == "part" else None
        loss = None if self.what == "part" else self.loss(batch)
        if self.what in ("no-backward", "forward-only"):
            self.manual_backward(loss)

        def closure() -> Any:
            if self.what == "forward-only":
                return self.loss(batch)
            if self.what == "part":
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net[2](self.net[1](part)), batch[1]))
            if self.what in ("loss", "one-layer"):
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=self.what == "one-layer")
            if self.what == "raw-backward":
                optimizer.zero_grad()
                loss.backward(retain_graph=True)
            return loss

        optimizer.step(closure)


NO_GRADIENT = "a closure that makes no gradient"
EARLIER = "a closure that goes backward through a forward pass made before it"
HALVES = {
    "no-backward": NO_GRADIENT,
    "forward-only": NO_GRADIENT,
    "loss": EARLIER,
    "one-layer": EARLIER,
    "raw-backward": EARLIER,
    "part": EARLIER,
}


@pytest.mark.parametrize("perturbation", [SAM(0.5), SAM(0.5, sync=True), AverageSAM(0.5)], ids=repr)
@pytest.mark.parametrize(("what", "got"), HALVES.items(), ids=HALVES.keys())
def test_a_closure_that_does_not_do_all_the_work_is_an_error(what: str, got: str, perturbation: Any) -> None:
    if what == "part" and not perturbation.uses_gradient:
        pytest.skip("one backward pass through each part: nothing shows where the weights were")
    module = Halfway(what)
    start = cases.clone(module)
    ire = IRE(kappa=0.0, perturbation=perturbation)
    message = (
        rf"Expected `optimizer\.step\(closure\)` for {re.escape(repr(perturbation))} .*, got {got}: give Halfway's"
    )
    with pytest.raises(ConfigurationError, match=message) as caught:
        cases.fit(module, [ire])
    assert "\n" not in str(caught.value)
    cases.assert_same_bits(module, start)
    assert ire._progress.step == 0
    cases.fit(cases.clone(start))  # a plain run has nothing against it


def test_a_step_without_a_closure_is_refused_before_anything_is_changed() -> None:
    module = Manual()
    start = cases.clone(module)
    ire = IRE(perturbation=SAM(0.1))
    trainer = cases.trainer([ire])
    with pytest.raises(ConfigurationError, match=r"got `optimizer\.step\(\)`: give Manual's step"):
        trainer.fit(module, cases.loader(cases.data()))
    cases.assert_same_bits(module, start)
    assert (trainer.global_step, ire._progress.step, dict(trainer.optimizers[0].state)) == (0, 0, {})


def test_a_perturbation_by_hand_says_at_the_start_that_it_needs_a_closure(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        cases.fit(Manual(closure=True), [IRE(kappa=0.0, perturbation=SAM(0.1))])
    assert "IRE: SAM(rho=0.1) at each `optimizer.step(closure)`; 92 parameters" in caplog.text


class Outside(Manual):
    """zero_grad where it is called outside the closure, or never."""

    zero = "before"

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if self.zero == "before":
            optimizer.zero_grad(set_to_none=batch_idx % 2 == 0)

        def closure() -> Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        if self.zero == "after":
            optimizer.zero_grad()


@pytest.mark.parametrize("zero", ["before", "after"])
def test_gradients_may_be_zeroed_outside_the_closure(zero: str) -> None:
    inside = Manual(closure=True)
    outside = Outside(cases.clone(inside).net)
    outside.zero = zero
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has a part from before.*")
        for module in (inside, outside):
            cases.fit(module, [IRE(kappa=0.0, perturbation=SAM(0.1))])
    cases.assert_same_bits(inside, outside)


def test_gradients_that_nobody_zeroes_count_once_and_are_warned_about() -> None:
    plain = Outside()
    plain.zero = "never"
    forced = cases.clone(plain)
    cases.fit(plain)
    message = (
        r"gradient of SGD's step has a part from before the closure, which SAM\(rho=0\) leaves as it is: call zero"
    )
    with pytest.warns(UserWarning, match=message):
        cases.fit(forced, [IRE(kappa=0.0, perturbation=SAM(0.0))])
    cases.assert_same_bits(plain, forced)


def test_a_start_by_loss_needs_one() -> None:
    with (
        pytest.warns(UserWarning, match=r"`start_loss` had no loss to look at.*let Manual\.training_step return it"),
        pytest.warns(UserWarning, match="IRE never switched on"),
    ):
        cases.fit(Manual(), [IRE(start_loss=9.0)])


class Raw(Manual):
    """Back-propagates past Lightning."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


def test_a_backward_pass_that_an_estimate_cannot_see_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`Raw`.*to call `self\.manual_backward\(loss\)`, got gradients"):
        cases.fit(Raw(), [IRE(**BOOST)])
    ire = IRE(**BOOST, curvature=EmpiricalFisher())
    cases.fit(Raw(), [ire])
    assert ire._progress.masks.masks


def test_frozen_weights_that_the_optimizer_has_are_not_perturbed() -> None:
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        net = Net()
        net[0].requires_grad_(False)
        module = Manual(net, closure=True) if by_hand else Classifier(net)
        cases.fit(module, [IRE(kappa=0.0, perturbation=AverageSAM(0.5))])
        ends.append(module)
    cases.assert_same_bits(*ends)


def by_hand(module: TwoPlayers, batches: Any, curvature: str, kappa: float = 2.0, interval: int = 3) -> None:
    """The two players with the boost written out, the empirical Fisher as curvature."""
    optimizers = module.configure_optimizers()
    counts, masks = [0, 0], [[], []]
    for x, y in batches:
        for index in (0, 1, 1):
            weights = list((module.first, module.second)[index].parameters())
            gradient = torch.autograd.grad(F.cross_entropy(module.first(x) + module.second(x), y), weights)
            if counts[index] % interval == 0:
                h = torch.cat([(g * g).reshape(-1) for g in gradient])
                threshold = h.kthvalue(max(1, int(len(h) * 0.7))).values
                masks[index] = [g * g <= threshold for g in gradient]
            old = [w.detach().clone() for w in weights]
            for w, g in zip(weights, gradient, strict=True):
                w.grad = g
            optimizers[index].step()
            counts[index] += 1
            with torch.no_grad():
                for w, o, m in zip(weights, old, masks[index], strict=True):
                    w.add_((w - o) * m, alpha=kappa)


@pytest.mark.parametrize("toggle", [True, False])
def test_every_optimizer_has_its_own_masks_and_counts(toggle: bool) -> None:
    module = TwoPlayers(toggle).double()
    expected = cases.clone(module)
    dataset = cases.data(dtype=torch.float64)
    ire = IRE(**BOOST, curvature=EmpiricalFisher())
    trainer = cases.fit(module, [ire], cases.loader(dataset), precision="64-true", max_epochs=1)
    by_hand(expected, list(cases.loader(dataset)), "empirical")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    assert [progress.step for progress in ire._progresses] == [8, 16]
    assert [len(progress.masks.masks) for progress in ire._progresses] == [4, 6]
    assert {tags.KAPPA, f"{tags.KAPPA}/optimizer_1"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("toggle", [True, False])
def test_sampled_fisher_with_two_optimizers(toggle: bool) -> None:
    ire = IRE(**BOOST)
    module = TwoPlayers(toggle)
    before = cases.clone(module)
    cases.fit(module, [ire])
    assert [progress.step for progress in ire._progresses] == [16, 32]
    assert [len(progress.masks.masks) for progress in ire._progresses] == [4, 6]
    assert cases.moved(module, before) > 1e-3


def test_resume_with_two_optimizers_is_exact(tmp_path: Any) -> None:
    start = TwoPlayers()
    whole, half, resumed = (cases.clone(start) for _ in range(3))
    cases.fit(whole, [IRE(**BOOST)], max_epochs=4)
    cases.fit(half, [IRE(**BOOST)]).save_checkpoint(tmp_path / "half.ckpt")
    ire = IRE(**BOOST)
    cases.fit(resumed, [ire], max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    cases.assert_same_bits(resumed, whole)
    assert [progress.step for progress in ire._progresses] == [32, 64]


class Accumulates(Manual):
    """Steps at every second batch, on gradients that two batches left."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2 if self.divide else loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    divide = False


def test_the_mean_by_hand_has_the_masks_of_the_sum() -> None:
    """Half of each loss is back-propagated: half of h, the same ranking."""
    whole = Accumulates()
    half = cases.clone(whole)
    half.divide = True
    masks = []
    for module in (whole, half):
        ire = IRE(kappa=1.0, gamma=0.7, exclude="*.bias")
        cases.fit(module, [ire], limit_train_batches=2, max_epochs=1)
        masks.append(ire._progress.masks.masks)
    assert masks[0].keys() == masks[1].keys() == {"net.0.weight", "net.2.weight"}
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("curvature", [None, EmpiricalFisher()])
def test_accumulation_by_hand_is_one_estimate(curvature: Any) -> None:
    """The sum of two means: half the learning rate of what Lightning does with the mean of two."""
    automatic = Classifier(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.2)).double()
    manual = Accumulates(cases.clone(automatic).net, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    dataset = cases.data(dtype=torch.float64)
    settings = {**BOOST, "curvature": curvature}
    cases.fit(automatic, [IRE(**settings)], cases.loader(dataset), precision="64-true", accumulate_grad_batches=2)
    cases.fit(manual, [IRE(**settings)], cases.loader(dataset), precision="64-true")
    for name, value in automatic.state_dict().items():
        torch.testing.assert_close(manual.state_dict()[name], value, rtol=1e-10, atol=1e-12)


class Unseen(Accumulates):
    """No loss that targets could be drawn for."""

    def loss(self, batch: Any) -> Any:
        return self.net(batch[0]).square().mean()


def test_a_loss_without_a_likelihood_names_the_ways_out() -> None:
    module = Unseen()
    with pytest.raises(ConfigurationError, match=r"Unseen` \(manual optimization\).*fisher_loss.*EmpiricalFisher"):
        cases.fit(module, [IRE()])
    module = Unseen()
    module.fisher_loss = lambda batch, batch_idx: (F.cross_entropy(module.net(batch[0]), batch[1]), len(batch[0]))
    ire = IRE()
    cases.fit(module, [ire])
    assert ire._progress.masks.masks


def test_gradients_of_the_other_player_are_left_alone_by_the_second_pass() -> None:
    class Closures(TwoPlayers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            for optimizer in self.optimizers():

                def closure(optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(self.first(x) + self.second(x), y)
                    self.manual_backward(loss)
                    return loss

                optimizer.step(closure)

    plain, forced = Closures(), Closures()
    forced.load_state_dict(plain.state_dict())
    cases.fit(plain)
    cases.fit(forced, [IRE(kappa=0, perturbation=SAM(0.0))])
    cases.assert_same_bits(plain, forced)
    for ours, theirs in zip(forced.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_stepping_the_raw_optimizer_is_warned_about() -> None:
    class Raw(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.warns(UserWarning, match=r"SGD was stepped directly, without IRE.*`self.optimizers\(\)`"):
        cases.fit(Raw(), [IRE()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stepped directly.*")
        cases.fit(Raw(), [IRE(kappa=0)])
        cases.fit(Manual(), [IRE()])


@pytest.mark.parametrize("where", [5, 6])
def test_an_exception_in_a_closure_leaves_unmoved_weights(where: int) -> None:
    class Boom(Manual):
        def loss(self, batch: Any) -> Tensor:
            if self.calls == 4:
                self.at = [p.detach().clone() for p in self.parameters()]
            if self.calls + 1 == where:
                raise RuntimeError("boom")
            return super().loss(batch)

    class AtException(pl.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            assert all(torch.equal(a, b) for a, b in zip(pl_module.parameters(), pl_module.at, strict=True))

    module = Boom(closure=True)
    with pytest.raises(RuntimeError, match="boom"):
        cases.fit(module, [AtException(), IRE(perturbation=SAM(0.5))])
    assert {"training_step", "log"}.isdisjoint(vars(module))


def test_a_step_inside_the_capture_of_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here only what is asked of torch; with a real graph: tests/test_gpu.py."""
    module = Classifier()
    start = cases.clone(module)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigurationError, match=r"SGD to step outside of a CUDA graph.*reduce-overhead"):
        cases.fit(module, [IRE(kappa=1.0)])
    cases.assert_same_bits(module, start)


def test_before_the_start_nothing_is_wrapped() -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(("training_step" in vars(pl_module), "step" in vars(pl_module.optimizers())))

    cases.fit(Manual(), [IRE(start_step=9), Look()])
    assert seen == [(False, False)] * 9 + [(True, True)] * 7
