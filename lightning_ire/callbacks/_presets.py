"""Settings by name: the paper's experiments, which are those of the configs of the same names, and two relatives."""

from __future__ import annotations

import json
from typing import Any

from lightning_ire import curvature, perturbation
from lightning_ire._checks import check_choice

__all__ = ["PRESETS", "as_flags", "preset_settings"]


def _sam(rho: float) -> dict[str, Any]:
    return {"perturbation": {"class_path": "SAM", "init_args": {"rho": rho}}}


_TABLE_1 = {"kappa": 1.0, "gamma": 0.99}
_CIFAR10, _CIFAR100 = _TABLE_1 | {"start_epoch": 60}, _TABLE_1 | {"start_epoch": 70}
_TABLE_2 = {"kappa": 2.0, "gamma": 0.8, "start_loss": 2.516}
_TABLE_3 = {"kappa": 20.0, "gamma": 0.99, "start_loss": 0.5}
_FIGURE_2 = {"kappa": 2.0, "gamma": 0.9, "start_epoch": 30}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"cifar10_{net}_sgd_ire": _CIFAR10 for net in ("wrn28_10", "resnet56")},
    **{f"cifar10_{net}_sam_ire": _CIFAR10 | _sam(0.05) for net in ("wrn28_10", "resnet56")},
    **{f"cifar100_{net}_sgd_ire": _CIFAR100 for net in ("wrn28_10", "resnet56")},
    **{f"cifar100_{net}_sam_ire": _CIFAR100 | _sam(0.1) for net in ("wrn28_10", "resnet56")},
    **{f"cifar100_{net}_admire": _TABLE_3 for net in ("vit_t", "vit_s")},
    **{f"cifar100_{net}_sam_ire": _TABLE_3 | _sam(0.1) for net in ("vit_t", "vit_s")},
    "imagenet_resnet50_sgd_ire": _TABLE_2,
    "imagenet_resnet50_sam_ire": _TABLE_2 | _sam(0.05),
    "imagenet_vit_s16_admire": {"kappa": 2.0, "gamma": 0.8, "start_epoch": 100},
    "cifar10_wrn16_8_sam_ire": _FIGURE_2 | _sam(0.05),
    "cifar10_wrn16_8_sam_ire_decayed": _FIGURE_2 | _sam(0.05),
    "wikitext2_transformer_admire": {"kappa": 5.0, "gamma": 0.99, "start_step": 3000},
    "wikitext103_llama60m_admire": {"kappa": 3.0, "gamma": 0.6, "start_step": 500},
    "minipile_llama119m_admire": {"kappa": 4.0, "gamma": 0.6, "start_step": 300},
    "openwebtext_llama229m_admire": {"kappa": 4.0, "gamma": 0.6, "start_step": 1000},
    "blockwise": {
        "kappa": {"*norm*": 0.0, "*embed*": 9.0, "*[qk]_proj*": 7.0, "*[vo]_proj*": 3.0, "*mlp*": 5.0, "*": 0.0},
        "gamma": 1.0,
        "interval": 1000,
        "curvature": {"class_path": "RandomMask"},
    },
    "lite": {
        "kappa": 2.0,
        "gamma": 0.9,
        "start_step": 0.1,
        "curvature": {"class_path": "SecondMoment"},
        "scope": "tensor",
        "kappa_schedule": "ramp",
        "ramp_steps": 0.5,
        "mask": "soft",
    },
}
"""Arguments of IRE, as a config writes them."""


def preset_settings(name: str) -> dict[str, Any]:
    """The arguments of IRE, with objects made.

    Args:
        name: A key of :data:`PRESETS`.

    Raises:
        ConfigurationError: If it is none.
    """
    settings = dict(PRESETS[check_choice("name", name, PRESETS)])
    for key, package in (("curvature", curvature), ("perturbation", perturbation)):
        if key in settings:
            made = settings[key]
            settings[key] = getattr(package, made["class_path"])(**made.get("init_args", {}))
    return settings


def as_flags(name: str, key: str, defaults: dict[str, Any]) -> list[str]:
    """The command-line flags that say the same, for all arguments: what a config had for them is replaced.

    Args:
        name: A key of :data:`PRESETS`.
        key: The top-level key.
        defaults: The arguments of IRE with their defaults.

    Raises:
        ConfigurationError: If it is none.
    """
    settings = defaults | PRESETS[check_choice(f"{key}.preset", name, PRESETS)]
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [f"--{key}.{name}={text}" for name, text in texts.items()]
