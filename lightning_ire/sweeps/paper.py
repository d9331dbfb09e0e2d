"""The results of the IRE paper (Wang et al., NeurIPS 2024, arXiv 2405.20763), by the name of our config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["PAPER", "PaperResult", "PaperRow"]


class PaperRow(NamedTuple):
    """A result of the paper."""

    method: str  # as the paper calls it
    percent: Mapping[str, float]  # by the tag of our metric
    trial: Mapping[str, float]  # our grid's values that it is for; empty: the best of the paper's grid


class PaperResult(NamedTuple):
    """What the paper reports for a config."""

    table: str
    baseline: PaperRow  # without IRE
    rows: tuple[PaperRow, ...]  # with IRE


def _result(table: str, *rows: PaperRow) -> PaperResult:
    return PaperResult(f"Table {table}", rows[0], rows[1:])


def _row(method: str, top1: float, top5: float | None = None, **trial: float) -> PaperRow:
    percent = {"test/accuracy": top1, **({} if top5 is None else {"test/accuracy_top5": top5})}
    return PaperRow(method, percent, {f"ire.{key}": value for key, value in trial.items()})


PAPER: dict[str, PaperResult] = {
    "cifar10_wrn28_10_sgd_ire": _result("1", _row("SGD", 95.84), _row("SGD-IRE", 96.24)),
    "cifar10_wrn28_10_sam_ire": _result("1", _row("SAM", 96.58), _row("SAM-IRE", 96.70)),
    "cifar100_wrn28_10_sgd_ire": _result("1", _row("SGD", 80.81), _row("SGD-IRE", 81.49)),
    "cifar100_wrn28_10_sam_ire": _result("1", _row("SAM", 83.05), _row("SAM-IRE", 83.50)),
    "cifar10_resnet56_sgd_ire": _result("1", _row("SGD", 93.49), _row("SGD-IRE", 93.78)),
    "cifar10_resnet56_sam_ire": _result("1", _row("SAM", 94.05), _row("SAM-IRE", 94.46)),
    "cifar100_resnet56_sgd_ire": _result("1", _row("SGD", 72.81), _row("SGD-IRE", 73.78)),
    "cifar100_resnet56_sam_ire": _result("1", _row("SAM", 75.54), _row("SAM-IRE", 75.86)),
    "cifar100_vit_t_admire": _result("3", _row("AdamW", 63.90), _row("AdmIRE", 67.05)),
    "cifar100_vit_t_sam_ire": _result("3", _row("SAM", 64.25), _row("SAM-IRE", 67.33)),
    "cifar100_vit_s_admire": _result("3", _row("AdamW", 65.43), _row("AdmIRE", 68.39)),
    "cifar100_vit_s_sam_ire": _result("3", _row("SAM", 66.93), _row("SAM-IRE", 70.47)),
    "imagenet_resnet50_sgd_ire": _result("2", _row("SGD", 76.81, 93.31), _row("SGD-IRE", 77.04, 93.58)),
    "imagenet_resnet50_sam_ire": _result("2", _row("SAM", 77.47, 93.90), _row("SAM-IRE", 77.92, 94.12)),
    "imagenet_vit_s16_admire": _result(
        "4",
        _row("AdamW", 78.7, 94.0),
        _row("AdmIRE", 79.0, 94.3, kappa=2.0, gamma=0.6),
        _row("AdmIRE", 79.1, 94.2, kappa=2.0, gamma=0.8),
    ),
}
"""By the stem of the config's file name."""
