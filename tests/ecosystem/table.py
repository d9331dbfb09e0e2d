"""What users are told of optimizers, losses and networks: the README's table."""

from ecosystem.optimizers import OTHERS, PACKAGE, UNUSABLE
from ecosystem.rows import ROWS

# line of the README's table: its note
KINDS: dict[str, str] = {
    "optimizers of torch": "LBFGS is refused: it runs the closure several times per step",
    "fused and foreach optimizers": "",
    "optimizers of pytorch_optimizer": "and {others} more of the {all} in its list; {unusable}",
    "optimizers around another": "",
    "own optimizers": "",
    "losses": "",
    "penalties and weights in the loss": "",
    "teachers and memories": "",
    "self-supervised steps": "",
    "other steps": "",
    "weights": "a run with ModelPruning is not resumed exactly, with or without IRE: it saves no masks",
    "Hugging Face models": "the model computes its loss from the labels",
    "peft": "",
    "timm": "",
    "torchvision": "",
}


def ecosystem_table() -> str:
    """What users are told, one line per kind."""
    numbers = {"others": len(OTHERS), "all": len(PACKAGE) + len(OTHERS) + len(UNUSABLE)}
    names: dict[str, list[str]] = {}
    for title, reason in UNUSABLE.values():
        names.setdefault(reason, []).append(title)
    unusable = "; ".join(f"not {' and '.join(titles)}: {reason}" for reason, titles in names.items())
    lines = ["| what | which | note |", "| --- | --- | --- |"]
    for kind, note in KINDS.items():
        which = [row.what for row in ROWS if row.kind == kind and row.what]
        lines.append(f"| {kind} | {', '.join(which)} | {note.format(**numbers, unusable=unusable)} |")
    return "\n".join(lines)
