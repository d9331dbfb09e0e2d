"""Imports point one way, and private names of Lightning stay in one file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ire

PACKAGE = Path(__file__).parent.parent / "lightning_ire"

# what each part may import of the package itself; anything not listed is forbidden
ALLOWED = {
    "_checks": set(),
    "tags": set(),
    "_patches": set(),
    "_lightning": {"_checks", "_patches", "engine"},
    "_run_length": set(),
    "functional": {"functional"},
    "schedule": {"_checks"},
    "perturbation": {"_checks", "functional", "schedule", "perturbation"},
    "curvature": {"_checks", "functional", "curvature"},
    "engine": {"_checks", "tags", "functional", "schedule", "perturbation", "curvature", "engine"},
    "sharpness": {
        *("_checks", "tags", "functional", "perturbation", "curvature", "engine", "sharpness", "measure_sharpness"),
    },
    "loop": {"_checks", "perturbation", "engine", "IREStep", "LocalHost", "SAM"},
    "_checkpoint_files": {"_checks"},
    "connectivity": {"_checkpoint_files", "_checks", "functional", "engine", "connectivity", "barrier"},
    "integrations": {
        *(
            "_checks",
            "_lightning",
            "_patches",
            "tags",
            "functional",
            "perturbation",
            "engine",
            "sharpness",
            "callbacks",
        ),
        *("loop", "integrations", "AccelerateHost", "FabricHost", "IRE", "IREStep"),
        *("SAM", "SharpnessMonitor"),
    },
    "callbacks": {
        *(
            "engine",
            "sharpness",
            "_checks",
            "_lightning",
            "_patches",
            "_run_length",
            "tags",
            "functional",
            "schedule",
            "perturbation",
        ),
        *("curvature", "callbacks"),
    },
    "_cli_messages": {"_checks"},
    "_cli_checkpoints": {"_checkpoint_files", "_checks"},
    "_cli_command": {"_checks", "_cli_messages"},
    "_cli_options": {"_checks"},
    "_cli_barrier": {
        *("_checkpoint_files", "_checks", "_cli_checkpoints", "_cli_command", "_cli_options", "connectivity"),
    },
    "models": {"_checks", "_lightning", "_run_length", "models"},
    "data": {"_checks", "_lightning", "data"},
    "sweeps": {"_checks", "_cli_options", "__version__", "sweeps"},
    "compare": {"_checks", "_cli_options", "sweeps", "compare"},
    "find": {
        "_checks",
        "_cli_command",
        "_cli_options",
        "tags",
        "schedule",
        "perturbation",
        "engine",
        "callbacks",
        "find",
    },
}
# packages of others, beside the standard library
THIRD_PARTY = {
    "_checks": set(),
    "tags": set(),
    "functional": {"torch"},
    "schedule": set(),
    "perturbation": {"torch"},
    "curvature": {"torch"},
    "engine": {"torch"},
    "loop": {"torch"},
    "_patches": set(),
    "integrations": {"torch", "lightning", "accelerate", "transformers"},
    "sharpness": {"torch", "tqdm"},
    "_checkpoint_files": {"torch"},
    "_cli_options": {"yaml"},
    "connectivity": {"torch", "matplotlib"},
    "_lightning": {"torch", "lightning"},
    "_run_length": {"lightning"},
    "callbacks": {"torch", "lightning", "lightning_utilities", "tqdm", "matplotlib"},
    "data": {
        *("torch", "lightning", "numpy", "tqdm", "filelock", "torchvision", "PIL", "sklearn"),
        *("tokenizers", "datasets", "huggingface_hub", "pyarrow", "zstandard"),
    },
    "models": {"torch", "lightning", "torchmetrics", "transformers"},
    "find": {"torch", "lightning", "tqdm", "matplotlib"},
    "sweeps": {"optuna", "tensorboard", "tqdm", "matplotlib"},
    "compare": {"torch", "numpy", "scipy", "lightning", "tqdm", "matplotlib"},
}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("__init__.py", "cli.py")
)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    ours = {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "lightning_ire"}
    if "ConfigurationError" in ours:  # the public name of something in _checks
        ours = ours - {"ConfigurationError"} | {"_checks"}
    assert ours <= ALLOWED[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_packages(path: Path) -> None:
    part = part_of(path)
    if part in THIRD_PARTY:
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots - set(sys.stdlib_module_names) - {"lightning_ire"} <= THIRD_PARTY[part]


def test_nothing_imports_the_command_line_or_the_tests() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith(("lightning_ire.cli", "tests", "cli."))}


def test_the_mathematics_is_usable_without_lightning() -> None:
    code = (
        "import sys, lightning_ire\n"
        "for part in ('functional', 'curvature', 'perturbation', 'engine', 'sharpness', 'loop', 'connectivity'):\n"
        "    getattr(lightning_ire, part)\n"
        "    assert not {'lightning', 'torchmetrics', 'jsonargparse'} & set(sys.modules), part\n"
        "assert lightning_ire.IREStep and lightning_ire.measure_sharpness and 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_are_loaded_on_first_use() -> None:
    assert sorted(name for names in lightning_ire._MODULES.values() for name in names) == sorted(lightning_ire.__all__)
    for name in (*lightning_ire.__all__, *lightning_ire._PUBLIC_MODULES):
        assert name in dir(lightning_ire)
        assert getattr(lightning_ire, name).__name__ in (name, f"lightning_ire.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'Ire'"):
        lightning_ire.Ire  # noqa: B018


def test_private_names_of_lightning_are_in_one_file() -> None:
    pattern = re.compile(r"\b(trainer|strategy|pl_module|module|precision_plugin|fit_loop|logger)\._(?!_)[a-z]\w*")
    found = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line) and "self._trainer" not in line
    }
    assert found == {"_lightning.py", "_torch.py"}
