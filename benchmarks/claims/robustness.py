"""Accuracy on the digits when training labels are wrong, and when test images are disturbed.

Settings are those that equal tuning chose for tables 1 to 3 (16 trials, 2 seeds), once and not for each row here: for
wrong labels those tuned with 30 % of the labels drawn anew; for disturbed images those tuned on clean images and true
labels. So other shares of wrong labels, and all disturbances, meet settings that were not made for them, of any method.
A seed is one split, one initialization, one order of batches, and one draw of the noise, the same for all methods;
differences are paired by seed. p-values are Holm-corrected, in two families: wrong labels, and images. They take what
tuning chose as given; tables 1 to 3 tell how much of a difference may be the luck of the search.

Wrong labels: of 500 training images, 0 to 45 % have their label drawn anew from all ten digits (a tenth of these comes
out right). Test labels are true. The row of 30 % is made of the runs of tables 1 to 3, which have 20 seeds.

Disturbed images are evaluations of the same trained networks, of which no training image was disturbed: Gaussian noise
on each pixel, or FGSM (Goodfellow et al., arXiv 1412.6572), a step of epsilon along the sign of the gradient of the
loss with respect to the pixels. Sizes are in units of the range from black (0) to white (1), and disturbed pixels stay
in that range. FGSM is one step of one attack: accuracy under it is no bound for others. The radius that SAM took on
clean images is small, 0.031: what larger ones do for disturbed images was not measured.

A ResNet of 19,074 parameters, 300 steps, cosine to 0, label smoothing 0.1, SGD with momentum 0.9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings
from claims._train import SPLITS, Digits, train_digits
from claims.accuracy import chosen, make_ire, reported
from lightning_ire._checks import ConfigurationError
from lightning_ire.compare.statistics import Difference, holm, interval, paired

QUESTION = "Noisy labels, noisy images and FGSM: are flat minima more robust?"
METHODS = ("SGD", "SGD-IRE", "SAM", "SAM-IRE")
LABELS, IMAGES = "noisy labels", "digits"  # the splits of which the claim on tables 1 to 3 has tuned settings
SHARES = (0.0, 0.15, 0.3, 0.45)  # of the training images, whose label is drawn anew
TUNED = SPLITS[LABELS][1]  # of these the one that settings were tuned with, and whose runs tables 1 to 3 have
SIZES_OF = {"noise": (0.1, 0.2, 0.4), "FGSM": (0.02, 0.05, 0.1)}  # black is 0, white is 1
CONDITIONS = {  # split, share of wrong labels, value
    **{f"{100 * share:g} % of labels redrawn": (LABELS, share, "test_accuracy") for share in SHARES},
    "clean images": (IMAGES, 0.0, "test_accuracy"),
    **{f"{kind} {size:g}": (IMAGES, 0.0, f"{kind} {size:g}") for kind in ("noise", "FGSM") for size in SIZES_OF[kind]},
}
UNDISTURBED = ("0 % of labels redrawn", "clean images")
ANSWERS = {  # by whether clear differences are gains
    frozenset({True}): "yes",
    frozenset({False}): "no, some are less",
    frozenset({True, False}): "mixed",
    frozenset(): "no",
}
SIZES = {"default": (5, 300), "full": (20, 300), "tiny": (2, 4)}  # seeds, steps


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    seeds, steps = SIZES[size]
    tuned = _tuned()
    return [
        {**chosen(tuned, split, method), "label_noise": share, "steps": steps, "seed": seed}
        for seed in range(seeds)
        for split, share in [(IMAGES, 0.0), *((LABELS, share) for share in SHARES if share != TUNED)]
        for method in METHODS
    ]


def _tuned() -> Runs:
    """The runs of tables 1 to 3."""
    runs = Runs(Path(__file__).parent / "results" / "accuracy.json")
    if not len(runs):
        raise ConfigurationError("Expected the runs of the claim `accuracy`, whose settings this takes, got none.")
    return runs


def measure(settings: Settings) -> Result:
    split, seed, steps, lr, decay = (settings[name] for name in ("split", "seed", "steps", "lr", "weight_decay"))
    return train_digits(
        split,
        seed,
        steps,
        lr,
        decay,
        ire=make_ire(settings),
        label_noise=settings["label_noise"],
        evaluate=disturbed if split == IMAGES else None,
    )


def disturbed(network: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy on the test images with Gaussian noise, the same for all methods, and on those that FGSM makes."""
    images, labels = data.parts["test"]
    generator = torch.Generator().manual_seed(data.seed)
    noise = torch.randn(images.shape, generator=generator)
    gradient = loss_gradient(network, images, labels)
    directions = {"noise": noise, "FGSM": gradient.sign()}
    low, high = ((bound - data.mean) / data.std for bound in (0.0, 1.0))
    return {
        f"{kind} {size:g}": _accuracy(network, (images + size / data.std * direction).clamp(low, high), labels)
        for kind, direction in directions.items()
        for size in SIZES_OF[kind]
    }


def loss_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross entropy with respect to its pixels: FGSM goes along its sign."""
    images = images.clone().requires_grad_()
    loss = F.cross_entropy(network(images), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]


@torch.no_grad()
def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (network(images).argmax(1) == labels).double().mean().item()


def _values(runs: Runs, method: str, condition: str) -> dict[int, float]:
    """Accuracy by seed."""
    split, share, value = CONDITIONS[condition]
    if (split, share) == (LABELS, TUNED):
        return reported(_tuned(), split, method)
    return {one["seed"]: result[value] for one, result in runs.where(method=method, split=split, label_noise=share)}


def _differences(runs: Runs) -> dict[tuple[str, str], Difference]:
    return {
        (condition, method): paired(_values(runs, method, condition), _values(runs, "SGD", condition))
        for condition in CONDITIONS
        for method in METHODS[1:]
    }


def _adjusted(differences: dict[tuple[str, str], Difference]) -> dict[tuple[str, str], float]:
    """p-values after Holm's correction, the rows of wrong labels being one family, those of images another."""
    adjusted = {}
    for split in (LABELS, IMAGES):
        keys = [key for key in differences if _of(key, split)]
        adjusted |= dict(zip(keys, holm([differences[key].p for key in keys]), strict=True))
    return adjusted


def verdict(runs: Runs) -> Verdict:
    differences = _differences(runs)
    adjusted = _adjusted(differences)
    clear = {key: one for key, one in differences.items() if adjusted[key] < 0.05}
    said, counts, answers = [], [], []
    for name, split in (("wrong labels", LABELS), ("disturbed images", IMAGES)):
        keys = [key for key in differences if _of(key, split)]
        listed = [f"{key[1]} at {key[0]} {clear[key].show(scale=100)}" for key in keys if key in clear]
        said.append(f"{name}: {len(listed)} of {len(keys)} ({', '.join(listed) or 'none'})")
        signs = {
            method: [clear[key].mean > 0 for key in keys if key in clear and key[1] == method] for method in METHODS
        }
        total = len(keys) // len(METHODS[1:])
        shown = [
            f"{method} more in {sum(signs[method])} and less in {signs[method].count(False)}" for method in METHODS[1:]
        ]
        counts.append(f"of {total} levels of {name}, {', '.join(shown)}")
        found = {clear[key].mean > 0 for key in keys if key in clear and key[0] not in UNDISTURBED}
        answers.append(f"{name}: {ANSWERS[frozenset(found)]}")
    few, many = (differences[name, "SAM"].pairs for name in ("clean images", f"{100 * TUNED:g} % of labels redrawn"))
    other = "" if many == few else f" ({many} at {100 * TUNED:g} % of labels)"
    seeds = f"{few} seeds{other}, Holm"
    return Verdict(
        "; ".join(answers),
        f"Digits, test accuracy clearly more or less than SGD's, {seeds}: {'; '.join(counts)}.",
        f"Differences from SGD that are told apart over {seeds}, in points of test accuracy, {'; '.join(said)}.",
    )


def _of(key: tuple[str, str], split: str) -> bool:
    return CONDITIONS[key[0]][0] == split


def tables(runs: Runs) -> str:
    rows = []
    for condition in CONDITIONS:
        own = [interval([100 * one for one in _values(runs, method, condition).values()]) for method in METHODS]
        rows.append([condition, *(f"{one.mean:.2f} ± {one.half:.2f}" for one in own)])
    accuracy = table(["test accuracy, %", *METHODS], rows)
    differences = _differences(runs)
    adjusted = _adjusted(differences)
    rows = [
        [condition, str(differences[condition, METHODS[1]].pairs)]
        + [
            f"{differences[condition, method].show(scale=100)} ({adjusted[condition, method]:.2g})"
            for method in METHODS[1:]
        ]
        for condition in CONDITIONS
    ]
    head = ["points of test accuracy (p after Holm)", "seeds", *(f"{method} - SGD" for method in METHODS[1:])]
    return f"{accuracy}\n\n{table(head, rows)}"


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    panels = {
        "training labels": ("share redrawn, %", {100 * one: f"{100 * one:g} % of labels redrawn" for one in SHARES})
    }
    for kind, title, unit in (("noise", "Gaussian noise", "standard deviation"), ("FGSM", "FGSM", "epsilon")):
        places = {0.0: "clean images"} | {one: f"{kind} {one:g}" for one in SIZES_OF[kind]}
        panels[f"{title} on test images"] = (f"{unit} (white is 1)", places)
    for axis, (title, (unit, places)) in zip(axes, panels.items(), strict=True):
        for number, method in enumerate(METHODS):
            own = [interval([100 * one for one in _values(runs, method, name).values()]) for name in places.values()]
            shift = 0.008 * max(places) * (number - 1.5)
            axis.errorbar(
                [place + shift for place in places],
                [one.mean for one in own],
                yerr=[one.half for one in own],
                fmt="o-",
                capsize=3,
                label=method,
            )
        axis.set(title=title, xlabel=unit, xticks=list(places))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %, mean and 95 %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(FIGURES / "robustness.png", dpi=100)
    plt.close(figure)
