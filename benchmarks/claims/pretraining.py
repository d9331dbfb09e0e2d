"""Figure 5 and Table 6 in small: is AdamW tuned, and is the minimum that AdmIRE ends in flatter?

No runs of its own. Figure 5 is made of trials of the claim on Figures 3 and 4: AdamW at ten learning rates, for each of
three tasks, one seed. The best is inside the grid if it is neither the smallest nor the largest.

Table 6 is Tr F of the final weights, each method at the settings that tuning chose for it, paired by seed, from the
same claim (8 draws on 16 training sequences; in `unclipped` 100 steps before the end) and from the one on transfer
(`bytes, packages kept out`: 16 draws on 32 other sequences). This is not at equal loss, but the losses are nearly equal
(last column); Tr F at equal loss is in those two claims. Flatter or sharper: p < 0.05 after Holm's correction for the
tasks. The paper's Table 6 is for Llama (60M) on Wikitext-103, with the same estimator (eq. 6).

The commands for the paper's networks are in the headers of configs/wikitext2_transformer_admire.yaml (Figure 5) and
configs/wikitext103_llama60m_admire.yaml (both); they have not been run at that size yet.
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from claims import language
from claims._report import FIGURES, Verdict, table
from claims._runs import Result, Runs, Settings, known
from lightning_ire.compare.statistics import Difference, holm, interval, paired

QUESTION = (
    "Figure 5 and Table 6: is AdamW's best learning rate inside the grid, and is the minimum after pre-training "
    "flatter with AdmIRE?"
)
APART = "bytes, packages kept out"


def plan(size: str, runs: Runs) -> list[dict[str, Any]]:
    return []


def measure(settings: Settings) -> Result:
    raise NotImplementedError("the runs are those of `language` and `downstream`")


def trials(task: str) -> dict[float, float]:
    """AdamW's validation loss by learning rate."""
    found = known("language").where(task=task, method="AdamW", seed=language.TUNING_SEED)
    return dict(sorted((settings["lr"], result["val_loss"]) for settings, result in found))


def inside(losses: dict[float, float]) -> bool:
    """Whether the best learning rate has smaller and larger ones beside it."""
    return min(losses) < min(losses, key=losses.__getitem__) < max(losses)


def finals(method: str) -> dict[str, dict[int, Result]]:
    """Results of the tuned runs by task and seed."""
    runs = known("language")
    found = {task: language.results(runs, task, method) for task in language.TASKS if runs.where(task=task)}
    apart = {settings["seed"]: result for settings, result in known("downstream").where(method=method)}
    return found | ({APART: apart} if apart else {})


def _final(result: Result, name: str) -> float:
    """What a run ends with: Tr F ("trace") or the loss on the test part."""
    if name == "trace":
        return result["traces" if "traces" in result else "trace_fisher"][-1]
    loss = result["test_loss"]
    return loss[-1] if isinstance(loss, list) else loss


def compared(task: str) -> tuple[Difference, Difference, Difference, Difference]:
    """Tr F with AdamW and with AdmIRE, their ratio minus 1, and the difference of the final test losses."""
    traces, losses = (
        [{seed: _final(one, name) for seed, one in finals(method)[task].items()} for method in ("AdamW", "AdmIRE")]
        for name in ("trace", "loss")
    )
    ratios = [traces[1][seed] / traces[0][seed] - 1 for seed in sorted(traces[0].keys() & traces[1].keys())]
    own = [interval([*values.values()]) for values in traces]
    return own[0], own[1], interval(ratios), paired(losses[1], losses[0])


def verdict(runs: Runs) -> Verdict:
    rates = {task: trials(task) for task in finals("AdamW") if task != APART}
    tuned = sum(map(inside, rates.values()))
    ratios = {task: compared(task)[2] for task in finals("AdamW")}
    adjusted = holm([one.p for one in ratios.values()])
    flatter, sharper = (
        sum(p < 0.05 and sign * one.mean > 0 for p, one in zip(adjusted, ratios.values(), strict=True))
        for sign in (-1, 1)
    )
    best = ", ".join(f"{task} {min(losses, key=losses.__getitem__):g}" for task, losses in rates.items())
    shown = ", ".join(f"{task} {1 + one.mean:.2f} ± {one.half:.2f}" for task, one in ratios.items())
    said = ["reproduced" if done else "not reproduced" for done in (tuned == len(rates), flatter == len(ratios))]
    short = f"Figure 5 {said[0]}, Table 6 {'partly reproduced' if 0 < flatter < len(ratios) else said[1]}"
    sentence = (
        f"AdamW's best learning rate is inside the grid in {tuned} of {len(rates)} tasks ({best}). The minimum after "
        f"pre-training is flatter with AdmIRE in {flatter} and sharper in {sharper} of {len(ratios)}: final Tr F over "
        f"AdamW's, both tuned, {shown}."
    )
    return Verdict(short, sentence, sentence)


def tables(runs: Runs) -> str:
    rates = {task: trials(task) for task in finals("AdamW") if task != APART}
    every = sorted({lr for losses in rates.values() for lr in losses})
    rows = [
        [
            task,
            *(f"**{losses[lr]:.3f}**" if losses[lr] == min(losses.values()) else f"{losses[lr]:.3f}" for lr in every),
            "inside" if inside(losses) else "at the end",
        ]
        for task, losses in rates.items()
    ]
    traces = []
    for task in finals("AdamW"):
        base, treated, ratio, loss = compared(task)
        traces.append(
            [
                f"{task}, {ratio.pairs} seeds",
                f"{base.mean:.0f} ± {base.half:.0f}",
                f"{treated.mean:.0f} ± {treated.half:.0f}",
                f"{1 + ratio.mean:.2f} ± {ratio.half:.2f}",
                loss.show(3),
            ]
        )
    head = ["Table 6: Tr F at the end", "AdamW", "AdmIRE", "AdmIRE / AdamW", "test loss, AdmIRE minus AdamW"]
    return "\n\n".join(
        [
            table(["Figure 5: AdamW's validation loss at lr =", *(f"{lr:g}" for lr in every), "best"], rows),
            table(head, traces),
        ]
    )


def draw(runs: Runs) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=[1.2, 1])
    for number, task in enumerate(one for one in finals("AdamW") if one != APART):
        losses = trials(task)
        best = min(losses.values())
        above = [loss - best for loss in losses.values()]
        axes[0].plot([*losses], above, "o-", color=f"C{number}", label=f"{task}: {best:.3f} at its best")
    rates = language.WIDE
    axes[0].set(
        xscale="log",
        xlabel="AdamW's learning rate",
        ylabel="nats above the best trial",
        ylim=(-0.02, 0.4),
        xlim=(2e-3, 5e-2),
    )
    axes[0].set_xticks(rates[::2], [f"{lr:g}" for lr in rates[::2]])
    axes[0].minorticks_off()
    axes[0].set_title("Figure 5: final validation loss")
    axes[0].legend(loc=(0.25, 0.79), fontsize=9)
    tasks = list(finals("AdamW"))
    for place, task in enumerate(tasks):
        base, treated = (finals(method)[task] for method in ("AdamW", "AdmIRE"))
        for seed in base.keys() & treated.keys():
            pair = [_final(one[seed], "trace") for one in (base, treated)]
            axes[1].plot([place - 0.2, place + 0.2], pair, "-", color="gray", linewidth=0.7)
            for side, value, colour in zip((-0.2, 0.2), pair, ("C0", "C1"), strict=True):
                axes[1].plot(place + side, value, "o", color=colour, markersize=4)
    for name, colour in (("AdamW", "C0"), ("AdmIRE", "C1")):
        axes[1].plot([], [], "o", color=colour, markersize=4, label=name)
    axes[1].set_xticks(range(len(tasks)), [task.replace(", packages ", ",\npackages\n") for task in tasks])
    axes[1].set(ylabel="Tr F of the final weights", title="Table 6: both tuned, a line per seed", ylim=(0, None))
    axes[1].legend(loc="lower left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(FIGURES / "pretraining.png", dpi=100)
    plt.close(figure)
