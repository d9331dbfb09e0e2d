"""The two options that make a network faster change its results by rounding only, also under the callback."""

from functools import partial

import cases
import pytest
import torch
from small import CLASSES, classifier, loader, trainer
from torch import nn

from lightning_ire import IRE, SAM
from lightning_ire.models import ImageClassifier, ResNet, WideResNet

MAKERS = {
    "ResNet": partial(ResNet, in_channels=1, num_classes=CLASSES, blocks=[1, 1], widths=[4, 8]),
    "WideResNet": partial(WideResNet, 10, 1, in_channels=1, num_classes=CLASSES),
}


def network(maker) -> nn.Module:
    torch.manual_seed(0)
    return maker()


class Compiler:
    """In place of inductor: the quickest backend (or with autograd's graphs, too), which counts what it is given."""

    def __init__(self, monkeypatch):
        self.graphs = 0
        self.name = "eager"
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compile(function, backend=self.backend))
        torch.compiler.reset()

    def backend(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.name)(graph, example_inputs)


@pytest.fixture
def compiler(monkeypatch):
    yield Compiler(monkeypatch)
    torch.compiler.reset()


def fitted(tmp_path, model, with_ire=True, ckpt_path=None, **settings):
    """Train in float64, where no coordinate is so near the threshold that rounding changes the mask."""
    callbacks = [IRE(kappa=1.0, gamma=0.9, interval=2, perturbation=SAM(rho=0.05))] if with_ire else []
    run = trainer(tmp_path, callbacks=callbacks, precision="64-true", **{"max_epochs": 2, **settings})
    run.fit(model, loader(32, size=8), loader(16, size=8), ckpt_path=ckpt_path)
    return run


def made(blocks=(1, 1), **settings) -> ImageClassifier:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    shallow = network(partial(ResNet, in_channels=1, num_classes=CLASSES, blocks=blocks, widths=[4, 8][: len(blocks)]))
    return classifier(shallow, label_smoothing=0.1, optimizer=optimizer, **settings)


def assert_close(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(value.isfinite().all() for value in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_channels_last_gives_the_same_logits(maker):
    plain = ImageClassifier(network(maker), CLASSES).eval()
    other = ImageClassifier(network(maker), CLASSES, channels_last=True).eval()
    lies = []
    other.model.stages[0].register_forward_hook(
        lambda module, args, output: lies.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(2):  # every stage of the trainer configures the model
        other.configure_model()
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(other(images), plain(images))
    convolutions = [module for module in other.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert lies == [True]


def test_images_are_channels_last():
    model = ImageClassifier(nn.Identity(), 3, channels_last=True)
    images = torch.randn(2, 3, 4, 4)
    assert not images.is_contiguous(memory_format=torch.channels_last)
    assert model(images).is_contiguous(memory_format=torch.channels_last)
    assert ImageClassifier(nn.Identity(), 3)(images) is images


def test_channels_last_trains_alike_under_the_callback(tmp_path):
    plain, other = made(), made(channels_last=True)
    fitted(tmp_path, plain)
    fitted(tmp_path, other)
    assert other.model.stages[1][0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(other, plain)


def test_compiled_trains_alike_under_the_callback(tmp_path, compiler):
    compiler.name = "aot_eager"
    plain, other = made([1]), made([1], compile=True)
    fitted(tmp_path, plain)
    assert compiler.graphs == 0
    fitted(tmp_path, other)
    assert compiler.graphs == 3  # in evaluation, in training, and in training seen by the curvature estimate
    assert_close(other, plain)


@pytest.mark.parametrize("option", ["channels_last", "compile"])
def test_checkpoints_fit_both(option, tmp_path, compiler):
    for first, second in ((False, True), (True, False)):
        whole, begun, resumed = made(), made(**{option: first}), made(**{option: second})
        fitted(tmp_path, whole, with_ire=False)
        run = fitted(tmp_path, begun, with_ire=False, max_epochs=1)
        path = tmp_path / f"{first}.ckpt"
        run.save_checkpoint(path)
        assert list(torch.load(path, weights_only=True)["state_dict"]) == list(whole.state_dict())
        resumed.double()  # or Lightning would load the float64 weights as float32
        fitted(tmp_path, resumed, with_ire=False, ckpt_path=path)
        assert_close(resumed, whole)
    assert bool(compiler.graphs) == (option == "compile")


def test_compiling_again_compiles_nothing(tmp_path, compiler):
    model = made(compile=True)
    fitted(tmp_path, model, with_ire=False)
    assert compiler.graphs == 2  # in training and in evaluation
    run = fitted(tmp_path, model, with_ire=False)
    assert compiler.graphs == 2
    for _ in range(2):
        run.validate(model, loader(16, size=8), verbose=False)
        assert compiler.graphs == 3  # outside of fit Lightning evaluates in inference mode


@pytest.mark.slow
def test_compiled_by_inductor_under_the_callback(tmp_path):
    plain, other = made(), made(compile=True)
    fitted(tmp_path, plain)
    fitted(tmp_path, other)
    assert_close(other, plain)
    assert cases.moved(made().double(), other) > 0.01
