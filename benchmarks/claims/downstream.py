"""Does what is flatter at equal pre-training loss transfer better? Liu et al. 2023 say so (arXiv 2210.14199).

Pre-training is that of task `bytes` of the claim on Figures 3 and 4, with the settings that its trials chose (for each
method as many). But twelve packages of the standard library and its documentation are kept out of the text: every file
whose path has the name of one of them in it, so the tests of the packages, too. There are two controls: `gamma = 1`,
all coordinates are boosted, which is a longer step; `inverted mask`, as many as with AdmIRE, but the sharpest.

Equal loss: checkpoints after 550 and 600 of 600 steps are evaluated. For each seed the level is the highest final
validation loss among the methods (512 sequences from all over the validation part), and every value is interpolated
linearly between the two checkpoints to where the validation loss is at the level. How far off its level a run is, where
it was there before the first checkpoint, is in the second table; so is the loss on the test part: other modules of the
same distribution, which says how equal the losses are.

- `packages`: next-token loss on half of the packages' files, zero-shot and after fine-tuning on the other half.
- `documentation`: the same for English text (pydoc_data/topics.py: the last fifth, fine-tuned on the rest).
- `line's package`: from which of the twelve packages does a line come? Logistic regression (C = 1) on the mean of what
  the output layer sees along the line, standardized; 300 lines of 32 to 64 bytes of each package, none of which is
  found twice, three quarters to fit and a quarter to test.

Fine-tuning is the same for all methods and was not tuned: AdamW without IRE, 50 steps of 1,024 tokens, lr 1e-3, decay
0.1, warm-up 10 %, cosine. Tr F: 16 draws on 32 training sequences. All is paired by seed (weights, order of text,
lines). Holm's correction is for the five comparisons of AdmIRE with AdamW; the controls' intervals are not corrected.

Does it go with Tr F? Spearman's correlation, over methods and seeds, of Tr F and the gain (accuracy or minus the loss)
at equal loss, each minus its mean over the methods of that seed; p takes the points as independent. Liu et al. let one
expect a negative one.

A 2-layer Transformer of width 64 (133,121 parameters) that has seen 3 % of the text once is far from the convergence at
which Liu et al. compare.
"""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib import pyplot as plt
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from claims import language
from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings, known
from claims._train import TEXT, Classifier, make_trainer, text_data, text_module
from lightning_ire import SharpnessMonitor
from lightning_ire._checks import ConfigurationError
from lightning_ire.compare.statistics import Difference, holm, interval, paired
from lightning_ire.data import Text
from lightning_ire.data._text_sources import StandardLibrary

QUESTION = "At equal pre-training loss, does an AdmIRE checkpoint transfer better than an AdamW one?"
METHODS = ["AdamW", "AdmIRE", "gamma = 1", "inverted mask"]
PACKAGES = [
    "asyncio", "ctypes", "distutils", "email", "http", "idlelib", "lib2to3", "logging", "multiprocessing", "tkinter",
    "unittest", "xml",
]  # fmt: skip
DOCUMENTATION = "pydoc_data"
TEXTS = ("packages", "documentation")
LOSSES = [f"{task}, {how}" for how in ("zero-shot", "fine-tuned") for task in TEXTS]
PROBE = "line's package"
OUTCOMES = [*LOSSES, PROBE]
SHARES = (11 / 12, 1)  # of the run, at the two checkpoints
SEQUENCES, LINES, SHORTEST = 512, 300, 32
BATCH = 64  # in evaluation: larger ones are slower on a CPU
FINE_TUNING = {"steps": 50, "lr": 1e-3}
SIZES = {"default": (3, None), "full": (10, None), "tiny": (2, 12)}  # seeds, and steps if not those of `language`


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    seeds, steps = SIZES[size]
    trials = known("language")
    if not trials.where(task="bytes"):
        raise ConfigurationError(
            "Expected the runs that choose the settings, got none: call `python -m claims language`."
        )
    best = {method: language.chosen(trials, "bytes", method) for method in METHODS}
    return [
        {**best[method], "steps": steps or best[method]["steps"], "seed": seed}
        for seed in range(seeds)
        for method in METHODS
    ]


def split_files() -> dict[str, list[Path]]:
    """The library's UTF-8 files: those of each package, the documentation, and "pre-training", about neither."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {name: [] for name in ("pre-training", DOCUMENTATION, *PACKAGES)}
    for path in StandardLibrary().files()["train"]:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        parts = path.relative_to(root).parts
        if parts[0] in found:
            found[parts[0]].append(path)
        elif not any(name in part for part in parts for name in (DOCUMENTATION, *PACKAGES)):
            found["pre-training"].append(path)
    return found


def transfer_texts(files: Mapping[str, list[Path]]) -> dict[str, Text]:
    """The texts of fine-tuning, with what is evaluated as their validation parts."""
    paths = [str(path) for name in PACKAGES for path in files[name]]
    return {
        "packages": text_data(source="files", files=paths[::2], val_files=paths[1::2], test_size=0.0),
        "documentation": text_data(
            source="files", files=list(map(str, files[DOCUMENTATION])), val_size=0.2, test_size=0.0, split_by="position"
        ),
    }


def draw_lines(files: Mapping[str, list[Path]], seed: int) -> tuple[list[bytes], list[int]]:
    """Lines without indentation, as many of each package, and the package's place: no line is in the packages twice."""
    lines = {
        name: [line.strip() for path in files[name] for line in path.read_bytes().splitlines()] for name in PACKAGES
    }
    counts = Counter(line for found in lines.values() for line in found)
    draw = random.Random(seed)
    texts, labels = [], []
    for label, name in enumerate(PACKAGES):
        once = [line for line in lines[name] if SHORTEST <= len(line) <= TEXT["length"] and counts[line] == 1]
        texts += draw.sample(once, LINES)
        labels += [label] * LINES
    return texts, labels


@torch.no_grad()
def features(network: nn.Module, lines: Sequence[bytes]) -> Tensor:
    """What the output layer sees, its mean over the positions of each line: [lines, width]."""
    seen: list[Tensor] = []
    lengths = torch.tensor([len(line) for line in lines])
    tokens = torch.zeros(len(lines), int(lengths.max()), dtype=torch.int64)  # causal: what is behind a line is not seen
    for row, line in zip(tokens, lines, strict=True):
        row[: len(line)] = torch.tensor(list(line))
    network.eval()
    with network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        for part in tokens.split(BATCH):
            network(part)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    return (torch.cat(seen) * inside[..., None]).sum(1) / lengths[:, None]


def probe(network: nn.Module, lines: Sequence[bytes], labels: Sequence[int], seed: int) -> float:
    """Accuracy of a linear probe on lines that it was not fitted to."""
    parts = train_test_split(features(network, lines).numpy(), labels, stratify=labels, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(parts[0], parts[2])
    return float(model.score(parts[1], parts[3]))


class _Checkpoints(Callback):
    """Copies of the weights after the given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step in self.steps:
            self.states.append({name: value.clone() for name, value in module.state_dict().items()})


def _sequences(loader: Any) -> tuple[Tensor, Tensor]:
    """Sequences from all over the held-out part of a loader, all of whose targets count."""
    assert isinstance(loader, DataLoader)
    places = torch.linspace(0, len(loader.dataset) - 2, SEQUENCES).long()  # type: ignore[arg-type]
    inputs, targets = zip(*(loader.dataset[place] for place in places.tolist()), strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _fine_tuned(state: Mapping[str, Tensor], text: Text, seed: int) -> Classifier:
    seed_everything(seed, verbose=False)
    module = text_module(257, **FINE_TUNING)
    module.load_state_dict(state)
    make_trainer(FINE_TUNING["steps"], clip=1.0).fit(module, text)
    return module


def measure(settings: Settings) -> Result:
    seed, steps = settings["seed"], settings["steps"]
    files = split_files()
    texts, lines = transfer_texts(files), draw_lines(files, seed)
    seed_everything(seed, verbose=False)
    data = text_data(source="files", files=list(map(str, files["pre-training"])))
    module = text_module(257, steps, settings["lr"])
    found: dict[str, Any] = {"untrained": probe(module.network, *lines, seed)}
    saved = _Checkpoints([round(share * steps) for share in SHARES])
    trainer = make_trainer(steps, language.make_ire(settings), saved, clip=1.0)
    trainer.fit(module, data)
    monitor = SharpnessMonitor(quantities=["trace_fisher"], max_vectors=16, relative_error=0, batch_size=32)
    held_out = {"val_loss": data.val_dataloader(), "test_loss": data.test_dataloader()}
    held_out |= {f"{task}, zero-shot": texts[task].val_dataloader() for task in TEXTS}
    batches = {name: _sequences(loader) for name, loader in held_out.items()}
    rows = []
    for state in saved.states:
        module.load_state_dict(state)
        row = {name: module.evaluate(*batch, BATCH)[0] for name, batch in batches.items()}
        row["trace_fisher"] = monitor.measure(trainer, module).values["sharpness/trace_fisher"]
        row[PROBE] = probe(module.network, *lines, seed)
        for task in TEXTS:
            tuned = _fine_tuned(state, texts[task], seed)
            row[f"{task}, fine-tuned"] = tuned.evaluate(*batches[f"{task}, zero-shot"], BATCH)[0]
        rows.append(row)
    found |= {name: [float(f"{row[name]:.5g}") for row in rows] for name in rows[0]}
    return found


def seeds(runs: Runs) -> list[int]:
    """The seeds that all methods were trained with."""
    return sorted(set.intersection(*({s["seed"] for s, _ in runs.where(method=method)} for method in METHODS)))


def at_level(runs: Runs, value: str) -> dict[str, dict[int, float]]:
    """A value of each method by seed, at that seed's level of the validation loss."""
    found: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for seed in seeds(runs):
        results = {method: runs.where(method=method, seed=seed)[0][1] for method in METHODS}
        level = max(one["val_loss"][-1] for one in results.values())
        for method, one in results.items():
            found[method][seed] = language.at_loss(one["val_loss"], one[value], level)
    return found


def gain(runs: Runs, outcome: str, method: str) -> Difference:
    """How much better a method transfers than AdamW at equal loss: nats less, or more accuracy."""
    values = at_level(runs, outcome)
    return paired(values[method], values["AdamW"]) if outcome == PROBE else paired(values["AdamW"], values[method])


def adjusted(runs: Runs) -> dict[str, float]:
    """The p of AdmIRE's gains, after Holm's correction for all of them."""
    return dict(zip(OUTCOMES, holm([gain(runs, outcome, "AdmIRE").p for outcome in OUTCOMES]), strict=True))


def trace_ratio(runs: Runs, method: str) -> Difference:
    """Tr F of a method over that of AdamW at equal loss, minus 1."""
    traces = at_level(runs, "trace_fisher")
    return interval([traces[method][seed] / base - 1 for seed, base in traces["AdamW"].items()])


def untrained_probes(runs: Runs) -> dict[int, float]:
    """Accuracy of the probe before training, by seed: the same for all methods."""
    return {settings["seed"]: result["untrained"] for settings, result in runs.where(method="AdamW")}


def correlation(runs: Runs, outcome: str) -> tuple[float, float]:
    """Spearman's correlation of Tr F and the gain, each minus its mean over the methods of a seed, and its p."""
    pairs: list[list[float]] = [[], []]
    for values, factor, name in zip(pairs, (1, 1 if outcome == PROBE else -1), ("trace_fisher", outcome), strict=True):
        found = at_level(runs, name)
        for seed in seeds(runs):
            line = [factor * found[method][seed] for method in METHODS]
            values += [one - fmean(line) for one in line]
    rho = stats.spearmanr(*pairs)
    return float(rho.statistic), float(rho.pvalue)


def verdict(runs: Runs) -> Verdict:
    gains = {outcome: gain(runs, outcome, "AdmIRE") for outcome in OUTCOMES}
    ps, ratio = adjusted(runs), trace_ratio(runs, "AdmIRE")
    better, worse = (
        sum(ps[outcome] < 0.05 and sign * one.mean > 0 for outcome, one in gains.items()) for sign in (1, -1)
    )
    flatter = ratio.mean < -ratio.half
    short = "not reproduced"
    if better and not worse:
        short = "reproduced" if flatter else "better, but not flatter"
    trends = [correlation(runs, outcome) for outcome in OUTCOMES]
    (with_flat, against), (with_flat_alone, against_alone) = (
        [sum(p < 0.05 and sign * rho > 0 for p, (rho, _) in zip(ps_of, trends, strict=True)) for sign in (-1, 1)]
        for ps_of in (holm([p for _, p in trends]), [p for _, p in trends])
    )
    counts = (
        f"At equal validation loss AdmIRE transfers better than AdamW in {better} and worse in {worse} of {len(gains)} "
        f"comparisons ({len(seeds(runs))} seeds, Holm); its Tr F there is {1 + ratio.mean:.2f} ± {ratio.half:.2f} of "
        f"AdamW's"
    )
    told = (
        f"Over methods and seeds a smaller Tr F goes with better transfer in {with_flat} and with worse in {against} "
        f"of {len(trends)} (Holm; {with_flat_alone} and {against_alone} without correction)"
    )
    shown = ", ".join(f"{outcome} {_show(one, outcome)}" for outcome, one in gains.items())
    return Verdict(short, f"{counts}. {told}.", f"{counts}. Gains, nats less or points more: {shown}. {told}.")


def _show(one: Difference, outcome: str) -> str:
    return one.show(1, 100) + " points" if outcome == PROBE else one.show(4)


def tables(runs: Runs) -> str:
    ps, others = adjusted(runs), METHODS[2:]
    rows = []
    for outcome in OUTCOMES:
        base = fmean(at_level(runs, outcome)["AdamW"].values())
        rho, p = correlation(runs, outcome)
        rows.append(
            [
                outcome,
                f"{100 * base:.1f} %" if outcome == PROBE else f"{base:.3f}",
                f"{_show(gain(runs, outcome, 'AdmIRE'), outcome)} ({ps[outcome]:.2g})",
                *(_show(gain(runs, outcome, other), outcome) for other in others),
                f"{rho:+.2f} (p = {p:.1g})",
            ]
        )
    probes, untrained = at_level(runs, PROBE)["AdamW"], untrained_probes(runs)
    bare = interval([*untrained.values()])
    head = [f"gain on AdamW at equal validation loss, {len(seeds(runs))} seeds", "AdamW", "AdmIRE (p after Holm)"]
    checks = ["", "validation loss", "off its level, at most", "test loss minus AdamW's", "Tr F", "Tr F / AdamW's"]
    return "\n\n".join(
        [
            table([*head, *others, "Tr F and gain: rank correlation"], rows),
            table(checks, [_check(runs, method) for method in METHODS]),
            f"The same probe of an untrained network: {100 * bare.mean:.1f} ± {100 * bare.half:.1f} % (chance "
            f"{100 / len(PACKAGES):.1f} %), so AdamW's pre-training adds {_show(paired(probes, untrained), PROBE)}.",
        ]
    )


def _check(runs: Runs, method: str) -> list[str]:
    """How equal the loss is, and how flat it is there."""
    losses, tests, traces = (at_level(runs, name) for name in ("val_loss", "test_loss", "trace_fisher"))
    levels = {seed: max(losses[one][seed] for one in METHODS) for seed in losses[method]}
    ratio = trace_ratio(runs, method)
    base = method == "AdamW"
    return [
        method,
        f"{fmean(losses[method].values()):.4f}",
        f"{max(levels[seed] - loss for seed, loss in losses[method].items()):.4f}",
        "" if base else paired(tests[method], tests["AdamW"]).show(4),
        f"{fmean(traces[method].values()):.0f}",
        "" if base else f"{1 + ratio.mean:.2f} ± {ratio.half:.2f}",
    ]


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=[2, 1, 2])
    traces, tuned = at_level(runs, "trace_fisher"), [at_level(runs, outcome) for outcome in LOSSES[len(TEXTS) :]]
    for number, method in enumerate(METHODS[1:]):
        style = {"fmt": "o", "capsize": 3, "color": f"C{number + 1}", "label": method}
        for axis, outcomes, scale in ((axes[0], LOSSES, 1), (axes[1], [PROBE], 100)):
            ones = [gain(runs, outcome, method) for outcome in outcomes]
            rows = [len(outcomes) - row + 0.1 - 0.2 * number for row in range(len(outcomes))]
            axis.errorbar([scale * one.mean for one in ones], rows, xerr=[scale * one.half for one in ones], **style)
            axis.set_yticks(range(len(outcomes), 0, -1), [outcome.replace(", ", ",\n") for outcome in outcomes])
        ratios = [traces[method][seed] / traces["AdamW"][seed] for seed in seeds(runs)]
        better = [fmean(one["AdamW"][seed] - one[method][seed] for one in tuned) for seed in seeds(runs)]
        axes[2].plot(ratios, better, "o", color=f"C{number + 1}", label=method)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].axvline(1, color="black", linewidth=0.8)
    axes[0].set(xlabel="nats less than AdamW, 95 %", title="next-token loss")
    axes[1].set(xlabel="points more than AdamW, 95 %", title="linear probe", ylim=(0.5, 1.5))
    axes[2].set(
        xlabel="Tr F / AdamW's (left of 1 is flatter)",
        ylabel="nats less than AdamW, fine-tuned",
        title="is the flatter one better? A point per seed",
    )
    axes[1].legend(loc="upper center")
    figure.suptitle("Transfer at equal pre-training (validation) loss; right of 0 is better than AdamW")
    figure.savefig(FIGURES / "downstream.png", dpi=100)
    plt.close(figure)
