"""The results of the IRE paper (Wang et al., NeurIPS 2024, arXiv 2405.20763), by the name of our config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PAPER", "PaperResult", "PaperRow"]

_TOP1, _TOP5 = "test/accuracy", "test/accuracy_top5"


@dataclass(frozen=True)
class PaperRow:
    """One number of the paper.

    Args:
        method: As the paper calls it.
        percent: By the tag of our metric.
        cell: Our grid's values where the paper gives a result for them; empty for the best of the paper's grid.
    """

    method: str
    percent: Mapping[str, float]
    cell: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperResult:
    """What the paper reports for a config.

    Args:
        table: Which table.
        baseline: Without IRE.
        rows: With IRE.
    """

    table: str
    baseline: PaperRow
    rows: tuple[PaperRow, ...]


def _pair(table: str, base: tuple[str, float], ours: tuple[str, float]) -> PaperResult:
    baseline, method = (PaperRow(name, {_TOP1: percent}) for name, percent in (base, ours))
    return PaperResult(table, baseline, (method,))


def _sgd_and_sam(stem: str, sgd: float, sgd_ire: float, sam: float, sam_ire: float) -> dict[str, PaperResult]:
    return {
        f"{stem}_sgd_ire": _pair("Table 1", ("SGD", sgd), ("SGD-IRE", sgd_ire)),
        f"{stem}_sam_ire": _pair("Table 1", ("SAM", sam), ("SAM-IRE", sam_ire)),
    }


def _adamw_and_sam(stem: str, adamw: float, admire: float, sam: float, sam_ire: float) -> dict[str, PaperResult]:
    return {
        f"{stem}_admire": _pair("Table 3", ("AdamW", adamw), ("AdmIRE", admire)),
        f"{stem}_sam_ire": _pair("Table 3", ("SAM", sam), ("SAM-IRE", sam_ire)),
    }


def _top(method: str, top1: float, top5: float, **cell: float) -> PaperRow:
    return PaperRow(method, {_TOP1: top1, _TOP5: top5}, {f"ire.{key}": value for key, value in cell.items()})


PAPER: dict[str, PaperResult] = {
    **_sgd_and_sam("cifar10_wrn28_10", 95.84, 96.24, 96.58, 96.70),
    **_sgd_and_sam("cifar100_wrn28_10", 80.81, 81.49, 83.05, 83.50),
    **_sgd_and_sam("cifar10_resnet56", 93.49, 93.78, 94.05, 94.46),
    **_sgd_and_sam("cifar100_resnet56", 72.81, 73.78, 75.54, 75.86),
    **_adamw_and_sam("cifar100_vit_t", 63.90, 67.05, 64.25, 67.33),
    **_adamw_and_sam("cifar100_vit_s", 65.43, 68.39, 66.93, 70.47),
    "imagenet_resnet50_sgd_ire": PaperResult("Table 2", _top("SGD", 76.81, 93.31), (_top("SGD-IRE", 77.04, 93.58),)),
    "imagenet_resnet50_sam_ire": PaperResult("Table 2", _top("SAM", 77.47, 93.90), (_top("SAM-IRE", 77.92, 94.12),)),
    "imagenet_vit_s16_admire": PaperResult(
        "Table 4",
        _top("AdamW", 78.7, 94.0),
        (_top("AdmIRE", 79.0, 94.3, kappa=2.0, gamma=0.6), _top("AdmIRE", 79.1, 94.2, kappa=2.0, gamma=0.8)),
    ),
}
"""By the stem of the config's file name."""
