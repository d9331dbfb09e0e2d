"""The configs of the text experiments: the paper's settings, one step offline by flags only, the networks' sizes."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import yaml
from config_files import QUIET, TEXT, by_name, in_two_processes, scalars, value

import lightning_ire.models
from lightning_ire import IRE
from lightning_ire.cli import IRECLI, main
from lightning_ire.data._batches import plan_batches
from lightning_ire.sweeps._options import read_options

# The paper's experiments, typed from ../shared/ALGORITHM.md section 4 apart from the configs.
COMMON = {
    "model.class_path": "LanguageModel",
    "model.optimizer.class_path": "torch.optim.AdamW",
    "model.optimizer.lr": 6e-4,
    "model.optimizer.betas": [0.9, 0.95],
    "model.optimizer.weight_decay": 0.1,
    "model.lr_scheduler.class_path": "WarmupCosineLR",
    "model.lr_scheduler.total": None,
    "model.lr_scheduler.final_lr_ratio": 1 / 20,
    "model.lr_interval": "step",
    "ire.interval": 10,
    "ire.scale_weight_decay": True,
    "ire.perturbation": None,
}
LLAMA = {
    **COMMON,
    "model.model.class_path": "Llama",
    "model.model.vocab_size": 50304,
    "data.tokenizer": "gpt2",
    "trainer.gradient_clip_val": 1.0,
    "ire.gamma": 0.6,
}
PAPER: dict[str, dict[str, Any]] = {
    "wikitext2_transformer_admire": {
        **COMMON,
        "model.model.class_path": "Transformer",
        "model.model.num_layers": 2,
        "model.model.num_heads": 8,
        "model.model.width": 128,
        "model.model.feed_forward": 512,
        "data.source": "wikitext-2",
        "data.tokenizer": "words",
        "data.sequence_length": 512,
        "data.global_batch_size": 32,
        "trainer.max_steps": 100_000,
        "model.lr_scheduler.warmup": 3000,
        "ire.start_step": 3000,
        "ire.kappa": 5.0,
        "ire.gamma": 0.99,
    },
    "wikitext103_llama60m_admire": {
        **LLAMA,
        "model.model.num_layers": 16,
        "model.model.num_heads": 10,
        "model.model.width": 410,
        "model.model.feed_forward": 1640,
        "model.model.head_dim": 40,
        "model.model.tie_embeddings": True,
        "data.source": "wikitext-103",
        "data.sequence_length": 150,
        "data.global_batch_size": 240,
        "trainer.max_steps": 50_000,
        "model.lr_scheduler.warmup": 500,
        "ire.start_step": 500,
        "ire.kappa": 3.0,
    },
    "minipile_llama119m_admire": {
        **LLAMA,
        "model.model.num_layers": 6,
        "model.model.num_heads": 12,
        "model.model.width": 768,
        "model.model.feed_forward": 2048,
        "model.model.tie_embeddings": False,
        "data.source": "minipile",
        "data.sequence_length": 512,
        "data.global_batch_size": 300,
        "trainer.max_steps": 30_000,
        "model.lr_scheduler.warmup": 300,
        "ire.start_step": 300,
        "ire.kappa": 4.0,
    },
    "openwebtext_llama229m_admire": {
        **LLAMA,
        "model.model.num_layers": 16,
        "model.model.num_heads": 12,
        "model.model.width": 768,
        "model.model.feed_forward": 3072,
        "model.model.tie_embeddings": False,
        "data.source": "openwebtext",
        "data.sequence_length": 1024,
        "data.global_batch_size": 480,
        "trainer.max_steps": 50_000,
        "model.lr_scheduler.warmup": 1000,
        "ire.start_step": 1000,
        "ire.kappa": 4.0,
    },
}
# Settings of ours, in place of the paper's: scaled from its largest Llama.
SCALED: dict[str, Any] = {
    **PAPER["openwebtext_llama229m_admire"],
    "model.model.num_layers": 22,
    "model.model.num_heads": 16,
    "model.model.width": 2048,
    "model.model.feed_forward": 5632,
    "model.optimizer.lr": 6e-4 * 768 / 2048,
    "data.source": "hub:HuggingFaceFW/fineweb:sample-10BT",
    "data.sequence_length": 2048,
    "data.global_batch_size": 256,
}
# Counted; the names' 60, 119 and 229 millions and the paper's 8 millions are met to within 12 %.
PARAMETERS = {
    "stdlib_transformer_admire": 462_593,
    "wikitext2_transformer_admire": 8_948_990,
    "wikitext103_llama60m_admire": 63_409_370,
    "minipile_llama119m_admire": 119_744_256,
    "openwebtext_llama229m_admire": 228_287_232,
    "fineweb_llama1b_admire": 1_336_502_272,
}
NAMED = {"wikitext2": 8e6, "llama60m": 60e6, "llama119m": 119e6, "llama229m": 229e6, "llama1b": 1.3e9}
FIGURE_5 = {  # learning rates of AdamW; for the first two the paper's
    "wikitext2_transformer_admire": [1.5e-4, 3e-4, 6e-4, 1.2e-3, 1.8e-3, 3e-3],
    "wikitext103_llama60m_admire": [3e-4, 6e-4, 1.2e-3, 1.8e-3],
    "stdlib_transformer_admire": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
}
ADAMW_GB = 16e-9  # per parameter: weight, gradient and two averages in single precision


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def tiny(path: Path, tokens: Path, flags: str = "") -> list[str]:
    """The command that runs a text config on the embedded text, with a network of one layer: by flags only."""
    data = f"--data.source stdlib --data.tokenizer bytes --data.vocabulary_size null --data.cache_dir {tokens}"
    data += " --data.val_size 0.05 --data.test_size 0.05 --data.global_batch_size 4 --data.max_batch_per_device 2"
    data += " --data.eval_batch_size 2 --data.sequence_length 12"
    network = "--model.model.num_layers 1 --model.model.width 16 --model.model.num_heads 2 --model.model.vocab_size 260"
    network += " --model.model.feed_forward 24 --model.model.context_length 12"
    network += " --model.model.head_dim 8" if "llama" in path.stem else ""
    network += " --model.gather_bf16 false --trainer.strategy auto" if "fineweb" in path.stem else ""
    given = f"{QUIET} --ire.start_step 0 {data} {network} --trainer.devices 1 {flags}"
    return ["fit", "--config", str(path), *given.split()]


def test_there_are_text_configs():
    assert (
        {path.stem for path in TEXT}
        == {"stdlib_transformer_admire", "fineweb_llama1b_admire", *PAPER}
        == set(PARAMETERS)
    )


@pytest.mark.parametrize("path", by_name([path for path in TEXT if path.stem in PAPER]))
def test_settings_of_the_paper(path):
    config = yaml.safe_load(path.read_text())
    assert {key: value(config, key) for key in PAPER[path.stem]} == PAPER[path.stem]
    assert ("gradient_clip_val" in config["trainer"]) == ("llama" in path.stem)


def named(name: str) -> Path:
    (path,) = (path for path in TEXT if path.stem == name)
    return path


def test_settings_that_are_scaled_from_the_paper():
    path = named("fineweb_llama1b_admire")
    config, text = yaml.safe_load(path.read_text()), path.read_text()
    assert {key: value(config, key) for key in SCALED} == pytest.approx(SCALED)
    count, step = PARAMETERS[path.stem], 256 * 2048
    for said in (f"{count:,} parameters", f"{step:,}; there 491,520", f"{step * 50_000 / 1e9:.1f} billion tokens"):
        assert said in text
    assert f"{step * 50_000 / count:.1f} per\n# parameter" in text
    assert f"{4e-9 * count:.1f} GB (8 processes: {8 * 4e-9 * count:.0f} GB)" in text
    assert f"{ADAMW_GB * count:.1f} GB together" in text


STRATEGY = r"--trainer\.strategy\.data_parallel_size (\d+) --trainer\.strategy\.tensor_parallel_size (\d+)"


@pytest.mark.parametrize("path", by_name([path for path in TEXT if "llama" in path.stem]))
def test_header_has_a_command_that_spreads_the_network(path):
    """As many devices as there are, which share the batch of the paper equally and divide what they split."""
    text, config = path.read_text(), yaml.safe_load(path.read_text())
    given = config["trainer"].get("strategy", {}).get("init_args", {})
    meshes = [(1, 8, int(replicas), int(parts)) for replicas, parts in re.findall(STRATEGY, text)]
    if given:
        meshes = [(8, 8, *meshes[0][2:]), (1, 8, given["data_parallel_size"], given["tensor_parallel_size"])]
        assert "--trainer.num_nodes 8 --trainer.devices 8" in text
    else:
        assert "--trainer.devices 8 \\\n#       --trainer.strategy ModelParallelStrategy" in text
    for nodes, devices, replicas, parts in meshes:
        assert nodes * devices == replicas * parts
        assert value(config, "data.global_batch_size") % replicas == 0
        for key in ("num_heads", "feed_forward", "vocab_size"):
            assert value(config, f"model.model.{key}") % parts == 0
    plan = plan_batches(
        value(config, "data.global_batch_size"), meshes[-1][2], 1, value(config, "data.max_batch_per_device")
    )
    if plan.accumulation > 1 and not given:
        assert f"{plan.devices} x {plan.accumulation} micro-batches of {plan.per_device}" in text


@pytest.mark.parametrize("path", by_name(TEXT))
def test_parameters(path):
    config = yaml.safe_load(path.read_text())["model"]["init_args"]["model"]
    with torch.device("meta"):
        network = getattr(lightning_ire.models, config["class_path"])(**config["init_args"])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS[path.stem]
    for name, size in NAMED.items():
        if name in path.stem:
            assert count == pytest.approx(size, rel=0.12)


@pytest.mark.parametrize("path", by_name(TEXT))
def test_header_has_the_controls_of_the_weight_decay(path):
    config, text = yaml.safe_load(path.read_text()), path.read_text()
    decay = value(config, "model.optimizer.weight_decay")
    matched = decay * (1 + config["ire"]["kappa"] * config["ire"]["gamma"])  # of the mean over all coordinates
    (given,) = re.findall(r"--ire\.kappa 0 --model\.optimizer\.weight_decay (\S+)", text)
    assert math.isclose(float(given), matched, rel_tol=1e-3)
    assert "--ire.scale_weight_decay false" in text
    if path.stem in PAPER:
        assert re.search(r"^# Paper: ", text, re.MULTILINE)


def shown(path: Path, subcommand: str) -> list[list[str]]:
    """The commands of that kind in a config's header, as a shell splits them, without `python cli.py`."""
    text = re.sub(r" *\\\n# *", " ", path.read_text())
    commands = re.findall(rf"python cli\.py ({subcommand} .*)", text)
    return [shlex.split(one.replace(f"configs/{path.name}", str(path))) for one in commands]


@pytest.mark.parametrize(("name", "rates"), FIGURE_5.items())
def test_header_has_figure_5(name, rates, tokens):
    path = named(name)
    (command,) = (one for one in shown(path, "sweep") if any(word.endswith("_figure5") for word in one))
    options = read_options(command[1:])
    assert [float(trial["model.optimizer.lr"]) for trial in options.grid.trials] == rates
    given = [*options.flags, *options.grid.trials[-1].command]
    flags = "--trainer.fast_dev_run 1 --data.global_batch_size 2 --test_after_fit false"
    cli = IRECLI([*tiny(path, tokens, flags), *given])
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == rates[-1]
    assert not any(isinstance(callback, IRE) for callback in cli.trainer.callbacks)
    assert options.metric in cli.trainer.callback_metrics


@pytest.mark.parametrize("name", ["wikitext103_llama60m_admire", "stdlib_transformer_admire"])
def test_header_has_table_6(name, tokens):
    path = named(name)
    ((_, *words),) = shown(path, "validate")
    words = words[: words.index("--ckpt_path")] + words[words.index("--ckpt_path") + 2 :]
    assert words[:2] == ["--config", str(path)]
    cli = IRECLI(["validate", *tiny(path, tokens, "--trainer.fast_dev_run 1")[1:], *words[2:]])
    measured = {tag for tag in cli.trainer.callback_metrics if tag.startswith("sharpness/")}
    assert measured == {"sharpness/trace_fisher", "sharpness/trace_fisher_stderr"}


@pytest.mark.parametrize("path", by_name(TEXT))
def test_text_makes_one_step(path, tokens):
    cli = IRECLI(
        tiny(path, tokens, "--trainer.fast_dev_run 1 --data.global_batch_size 2 --ire.curvature SampledFisher")
    )
    (ire,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, IRE))
    assert cli.trainer.global_step == 1
    assert ire.started_at == 0
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())
    logged = cli.trainer.callback_metrics
    part = "test" if value(yaml.safe_load(path.read_text()), "test_after_fit") else "val"
    assert logged[f"{part}/bits_per_byte"] == pytest.approx(float(logged[f"{part}/loss"]) / math.log(2), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("", id="accumulated"),
        pytest.param("--ire.kappa 0", id="baseline"),
        pytest.param("--ire.scale_weight_decay false --data.order contiguous", id="no extra decay"),
        pytest.param("--ire.scale_weight_decay only --data.split_by position", id="extra decay alone"),
        pytest.param("--ire.perturbation SAM --ire.perturbation.rho 0.1 --trainer.precision bf16-mixed", id="sam bf16"),
        pytest.param("--model.compile true --data.num_workers 1", id="compiled"),
        pytest.param("--sharpness.every_n_steps 2", id="monitored"),
    ],
)
@pytest.mark.parametrize("path", by_name(TEXT))
def test_text_makes_two_steps(path, flags, tokens):
    cli = IRECLI(tiny(path, tokens, f"--trainer.fast_dev_run 4 {flags}"))
    assert cli.trainer.accumulate_grad_batches == 2  # global batch 4, at most 2 at once
    assert cli.trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", by_name(TEXT))
def test_text_on_a_gpu(path, tokens):
    fast = "--trainer.precision bf16-mixed --model.compile true"
    cli = IRECLI(tiny(path, tokens, f"--trainer.fast_dev_run 4 --trainer.accelerator gpu {fast}"))
    assert cli.trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


def stdlib() -> Path:
    return named("stdlib_transformer_admire")


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tokens, tmp_path):
    """Plain AdamW: what is logged is the same, up to rounding, in 1 and 2 processes."""
    flags = "--ire.kappa 0 --model.model.position_dropout 0 --trainer.max_epochs 2 --trainer.limit_train_batches 6"
    flags += " --trainer.limit_test_batches 1.0 --data.test_size 0.002 --data.eval_batch_size 64"
    flags += " --trainer.log_every_n_steps 1 --data.max_batch_per_device null --trainer.limit_val_batches 0"
    command = tiny(stdlib(), tokens, flags)
    (tmp_path / "two").mkdir()
    others = [tiny(path, tokens, "--trainer.fast_dev_run 2") for path in TEXT]
    in_two_processes([command, *others], tmp_path / "two")
    IRECLI([*command, "--trainer.default_root_dir", "one", "--trainer.logger.save_dir", "one"])
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in ("test/loss", "test/perplexity", "test/bits_per_byte", "data/passes"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-4), tag


@pytest.mark.slow
def test_the_same_command_again_and_resuming(tokens, tmp_path, capsys):
    """A second run gets a folder of its own; a resumed one goes on; predict prints what a checkpoint has learned."""
    flags = "--trainer.limit_train_batches 3 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1"
    fit = tiny(stdlib(), tokens, flags)
    assert main([*fit, "--trainer.max_epochs", "2"]) == 0
    assert main([*fit, "--trainer.max_epochs", "2"]) == 0
    folder = tmp_path / "logs" / "stdlib_transformer_admire"
    first, second = (torch.load(folder / f"version_{run}/checkpoints/last.ckpt", weights_only=True) for run in (0, 1))
    assert first["global_step"] == 4  # 3 micro-batches of 2: the last one by itself
    assert all(torch.equal(first["state_dict"][name], weight) for name, weight in second["state_dict"].items())
    checkpoint = str(folder / "version_0/checkpoints/last.ckpt")
    assert main([*fit, "--trainer.max_epochs", "3", "--ckpt_path", checkpoint]) == 0
    assert torch.load(folder / "version_2/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    capsys.readouterr()
    config = str(folder / "version_0" / "config.yaml")
    predict = ["predict", "--config", config, "--ckpt_path", checkpoint, "--model.max_new_tokens", "20"]
    assert main([*predict, "--data.prompts", '["def main(", "import "]']) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- Sample") == 2
    assert "def main(" in printed
    assert main([*predict, "--data.prompts", "null"]) == 0
    assert capsys.readouterr().out.count("--- Sample") == 3


RESUMABLE = "--trainer.max_epochs 2 --trainer.limit_train_batches 6 --trainer.limit_val_batches 1 --ire.interval 2"
RESUMABLE += " --model.model.position_dropout 0.5 --test_after_fit false"


def keeping_every_step(tokens: Path, flags: str, name: str, *more: str) -> list[str]:
    """A run of 6 steps, 3 in an epoch, with a checkpoint `name/step=N.ckpt` after each."""
    kept = {"dirpath": name, "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    callbacks = json.dumps([{"class_path": "ModelCheckpoint", "init_args": kept}])
    return [*tiny(stdlib(), tokens, f"{RESUMABLE} {flags}"), "--trainer.callbacks", callbacks, *more]


def assert_same_weights(folder: Path, first: str, second: str) -> None:
    one, two = (torch.load(folder / name / "step=6.ckpt", weights_only=True)["state_dict"] for name in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one), second


@pytest.mark.parametrize(
    "flags",
    cases.first_at_once(["", "--data.order contiguous --ire.perturbation SAM --ire.perturbation.rho 0.1"]),
)
def test_a_resumed_run_goes_on_bit_for_bit(flags, tokens, tmp_path):
    """With dropout, accumulation, IRE and a learning-rate schedule; from the middle of an epoch and from its end."""
    IRECLI(keeping_every_step(tokens, flags, "whole"))
    for step in (2, 3, 5):
        IRECLI(keeping_every_step(tokens, flags, f"from_{step}", "--ckpt_path", f"whole/step={step}.ckpt"))
        assert_same_weights(tmp_path, "whole", f"from_{step}")


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit_in_two_processes(tokens, tmp_path):
    flags = "--data.max_batch_per_device 1"
    whole = keeping_every_step(tokens, flags, "whole")
    resumed = keeping_every_step(tokens, flags, "resumed", "--ckpt_path", "whole/step=2.ckpt")
    in_two_processes([whole, resumed], tmp_path)
    assert_same_weights(tmp_path, "whole", "resumed")


SPREAD = "--trainer.strategy ModelParallelStrategy --trainer.strategy.process_group_backend gloo"
SPREAD += " --trainer.strategy.data_parallel_size {} --trainer.strategy.tensor_parallel_size {}"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["fsdp", "tensor parallel"])
def test_a_network_that_is_spread_over_two_processes(sizes, tokens, tmp_path):
    """By the strategy of the shown commands: trained, evaluated, saved, resumed in the middle, asked to go on.

    There are three prompts: a device that made one more forward pass than the other would wait for ever.
    """
    flags = "--trainer.max_steps 4 --model.lr_scheduler.warmup 1 --model.model.num_layers 2 --ire.interval 2"
    flags += " --ire.perturbation SAM --ire.perturbation.rho 0.1 --ire.perturbation.sync true --data.val_size 0.002"
    flags += " --ire.curvature EmpiricalFisher --data.eval_batch_size 64 --trainer.val_check_interval 4"
    flags += " --trainer.log_every_n_steps 1"
    command = tiny(named("openwebtext_llama229m_admire"), tokens, flags)
    IRECLI([*command, "--trainer.default_root_dir", "one", "--trainer.logger.save_dir", "one"])
    one = scalars(tmp_path / "one")
    kept = {"dirpath": "kept", "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    keeping = ["--trainer.callbacks", json.dumps([{"class_path": "ModelCheckpoint", "init_args": kept}])]
    resumed = [*command, "--trainer.logger.name", "resumed", "--ckpt_path", "kept/step=2.ckpt"]
    predict = [*command, "--ckpt_path", "kept/step=4.ckpt", "--model.max_new_tokens", "3", "--trainer.logger", "false"]
    needs_it = tiny(named("fineweb_llama1b_admire"), tokens, "--trainer.fast_dev_run 2 --model.gather_bf16 true")
    commands = [[*command, *keeping], resumed, ["predict", *predict[1:]], needs_it]
    (tmp_path / "two").mkdir()
    in_two_processes(commands, tmp_path / "two", SPREAD.format(*sizes))
    for folder in ("openwebtext_llama229m_admire", "resumed"):
        two = scalars(tmp_path / "two" / "logs" / folder)
        for tag in ("val/loss", "val/bits_per_byte", "sam/grad_norm", "ire/step_norm_sharp"):
            assert two[tag] == pytest.approx(one[tag], rel=1e-3), (folder, tag)
    assert (tmp_path / "two" / "kept" / "step=4.ckpt" / "meta.pt").is_file()
