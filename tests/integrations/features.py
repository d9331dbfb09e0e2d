"""What each loop can do, and how that is tested: the table of docs/loops.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from accelerate import DistributedType
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import FSDPStrategy as FabricFSDP
from lightning.pytorch.strategies import FSDPStrategy
from modules import Net, Scaler, sgd
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from integrations.loops import LOOPS, Hand, Job, Run, fresh_accelerate, resumed, trainer_of
from lightning_ire import SAM, AccelerateHost, FabricHost, IREStep, SharpnessMonitor, measure_sharpness, tags
from lightning_ire._lightning import check_strategy
from lightning_ire.integrations.transformers import attach

LIGHTNING, PLAIN, FABRIC, ACCELERATE, TRANSFORMERS = LOOPS
BY_HAND = (PLAIN, FABRIC, ACCELERATE)
BOOST = {"kappa": 2.0, "gamma": 0.7, "interval": 3}
SAM_IRE = {**BOOST, "perturbation": SAM(0.1)}


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        name: What the loop's user asks for.
        check: Fails if the loop cannot do it; ``None``: each cell says where it is tested.
        notes: By loop: a remark beside "works".
        refused: By loop: what the one-line error says; the check has to raise it.
        elsewhere: By loop: a test of another file, "FILE::NAME".
        untried: By loop: why nothing is known.
    """

    name: str
    check: Callable[[str, Path], None] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)

    def cell(self, loop: str) -> str:
        word = "refused" if loop in self.refused else "not tried" if loop in self.untried else "works"
        note = self.notes.get(loop) or self.untried.get(loop)
        return f"{word}: {note}" if note else word

    def tested(self, loop: str) -> bool:
        return loop not in self.elsewhere and loop not in self.untried


def assert_same(ours: Run, theirs: Run) -> None:
    """Weights, buffers, the optimizer's state, masks, counts, averages, logged values."""
    for what in ("weights", "optimizer", "state", "logs"):
        first, second = (getattr(run, what) for run in (ours, theirs))
        if what == "logs":
            first, second = (dict(sorted(one.items())) for one in (first, second))
        assert not list(cases.differences(first, second)), what


def same_as(reference: str, job: Job) -> Callable[[str, Path], None]:
    """The run is that of another loop, to the bit."""

    def check(loop: str, folder: Path) -> None:
        placed = replace(job, folder=folder)
        ours = LOOPS[loop](placed)
        assert_same(ours, LOOPS[reference](placed))
        assert ours.state["optimizers"][0]["started_at"] is not None

    return check


def short_window(loop: str, folder: Path) -> None:
    job = Job(SAM_IRE, accumulate=3, folder=folder)  # of 8 batches in an epoch
    same = (LIGHTNING, ACCELERATE) if loop in (LIGHTNING, ACCELERATE) else (PLAIN, FABRIC, TRANSFORMERS)
    assert_same(LOOPS[loop](job), LOOPS[same[0] if loop != same[0] else same[1]](job))


def exact_resume(loop: str, folder: Path) -> None:
    job = Job({**SAM_IRE, "beta": 0.5}, "adamw", epochs=4, folder=folder)
    assert_same(resumed(loop, job), LOOPS[loop](job))


def failing_loss(loop: str, folder: Path) -> None:
    """The second forward pass fails, which is the one at the moved weights."""
    torch.manual_seed(1)
    net = Net()
    begun = [p.detach().clone() for p in net.parameters()]
    moves: list[bool] = []

    def look(module: Any, inputs: Any) -> None:
        moves.append(not all(map(torch.equal, net.parameters(), begun)))
        if moves[-1]:
            raise ArithmeticError("at the moved weights")

    net.register_forward_pre_hook(look)
    with pytest.raises(ArithmeticError):
        LOOPS[loop](Job({"kappa": 0.0, "perturbation": SAM(0.5)}, net=lambda: net, folder=folder))
    assert moves == [False, True]
    assert all(cases.same_bits(p.detach(), before) for p, before in zip(net.parameters(), begun, strict=True))


def sharpness(loop: str, folder: Path) -> None:
    """On all of the training data, in eval mode, the eigenvalue is known; training is the same to the bit."""
    monitor = SharpnessMonitor(
        every_n_epochs=2, quantities=["lambda_max", "stability"], num_batches=8, max_iterations=100, tolerance=1e-5
    )
    found: dict[str, float] = {}

    def measure(step: IREStep, hand: Hand) -> None:
        measured = measure_sharpness(
            hand.model, hand.loss_of, data(), monitor.quantities, host=hand.host, step=step, max_iterations=100,
            tolerance=1e-5,
        )  # fmt: skip
        found.update(measured.values)

    job = Job(SAM_IRE, folder=folder)
    if loop in BY_HAND:
        run = LOOPS[loop](replace(job, after=measure))
    else:
        run = LOOPS[loop](replace(job, sharpness=monitor))
        assert monitor.last is not None
        found.update(monitor.last.values)
    assert_same(run, LOOPS[loop](job))
    assert found[tags.LAMBDA_MAX] == pytest.approx(largest_eigenvalue(run.model), rel=1e-4)
    assert found[tags.RATIO] > 0


def data() -> list[Any]:
    return list(cases.loader(cases.data()))


def largest_eigenvalue(model: Any) -> float:
    model.eval()
    x, y = cases.data().tensors
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model.net(x), y)
    return float(torch.linalg.eigvalsh(cases.dense_hessian(loss, parameters)).max())


def kappa_auto(loop: str, folder: Path) -> None:
    """kappa is half of the headroom measured last."""
    job = Job({**BOOST, "kappa": "auto"}, folder=folder)
    headroom: list[float] = []

    def measure(step: IREStep, hand: Hand) -> None:
        measured = measure_sharpness(
            hand.model, hand.loss_of, data()[:1], ["kappa_headroom"], host=hand.host, step=step
        )
        step.note_headroom(measured.values[tags.KAPPA_HEADROOM])
        headroom.append(measured.values[tags.KAPPA_HEADROOM])

    if loop in BY_HAND:
        run = LOOPS[loop](replace(job, after=measure))
    else:
        monitor = SharpnessMonitor(every_n_steps=4, every_n_epochs=None, quantities=["stability"])
        run = LOOPS[loop](replace(job, sharpness=monitor))
        assert monitor.last is not None
        headroom.append(monitor.last.values[tags.KAPPA_HEADROOM])
    assert headroom[0] > 0
    assert run.state["optimizers"][0]["auto_kappa"] == 0.5 * headroom[0]


def preview(loop: str, folder: Path) -> None:
    job = Job(BOOST, folder=folder)
    if loop == TRANSFORMERS:
        LOOPS[loop](replace(job, settings={**BOOST, "dry_run": True}))
    said: list[str] = []
    seen: list[IREStep] = []

    def show(step: IREStep, hand: Hand) -> None:
        said.append(step.preview(hand.loss_of, data()[0]))
        seen.append(step)

    LOOPS[loop](replace(job, after=show, epochs=1))
    assert "all that take part" in said[0].splitlines()[-1]


def overflow(loop: str, folder: Path) -> None:
    """A step that a GradScaler leaves out is neither counted nor boosted; the powers of two are exact."""
    scaler = Scaler()
    plugin = FabricMixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler  # "16-mixed" computes in fp16, which is no use on a CPU
    run = LOOPS[loop](Job(SAM_IRE, net=Net, folder=folder, options={"plugins": [plugin]}))
    assert scaler.calls == 16
    assert run.state["optimizers"][0]["step"] == 15


def groups(loop: str, folder: Path) -> None:
    """A frozen layer, and a group with a strength of its own."""

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self[0].requires_grad_(False)

    job = Job({**SAM_IRE, "kappa": {"*bias": 0.0, "*": 3.0}}, net=Frozen, folder=folder)
    run = LOOPS[loop](job)
    assert_same(run, LOOPS[LIGHTNING](job))
    assert "net.0.weight" not in run.state["optimizers"][0]["flat"]["masks"]


def sharded(loop: str, folder: Path) -> None:
    """What a process of its own would have to be started for is refused by its kind."""
    if loop == LIGHTNING:
        check_strategy(cases.under(FSDPStrategy), "IRE")
    elif loop == PLAIN:
        model: Any = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(model)
        IREStep(nn.Sequential(model), sgd(Net()), **BOOST)
    elif loop == FABRIC:
        FabricHost(cases.under(FabricFSDP))
    else:
        accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, parallelism_config=None)
        if loop == ACCELERATE:
            AccelerateHost(accelerator)  # type: ignore[arg-type]
        with fresh_accelerate():
            trainer = trainer_of(Job(), folder)
            trainer.accelerator = accelerator
            attach(trainer, SAM(0.05))


_STEPS = "a number of steps for IREStep"
_TOO_FEW = "one device or with DDP"

FEATURES = [
    Feature("IRE, SAM and its relatives, the same bits as Lightning's callback", same_as(LIGHTNING, Job(SAM_IRE))),
    Feature(
        "gradient accumulation",
        same_as(LIGHTNING, Job(SAM_IRE, accumulate=2)),
        notes={
            PLAIN: "`step(loss_of, first, second)`",
            FABRIC: "`step(loss_of, first, second)`",
            ACCELERATE: "`accelerator.accumulate`, one call each",
            TRANSFORMERS: "also with `num_items_in_batch`",
        },
    ),
    Feature(
        "a short last window",
        short_window,
        notes={
            LIGHTNING: "divided by the full number",
            PLAIN: "a mean",
            FABRIC: "a mean",
            ACCELERATE: "divided by the full number",
            TRANSFORMERS: "a mean",
        },
    ),
    Feature(
        "clipping by norm, of the final gradient",
        same_as(LIGHTNING, Job(SAM_IRE, clip=0.05)),
        notes=dict.fromkeys(BY_HAND, "`clip=`") | {TRANSFORMERS: "`max_grad_norm`"},
    ),
    Feature("bf16", same_as(LIGHTNING, Job(SAM_IRE, bf16=True)), notes={PLAIN: "autocast in the loss function"}),
    Feature(
        "fp16 with a GradScaler; steps that overflow are left out",
        overflow,
        notes={PLAIN: "`LocalHost(scaler)`"},
        elsewhere={
            LIGHTNING: "test_fp16.py::test_",
            PLAIN: "test_loop.py::test_a_grad_scaler_scales_unscales_and_skips",
        },
        untried=dict.fromkeys((ACCELERATE, TRANSFORMERS), "needs a GPU there"),
    ),
    Feature(
        "`start_step` as a number, soft masks, moving averages",
        same_as(
            LIGHTNING,
            Job(
                {
                    **BOOST,
                    "start_step": 5,
                    "mask": "soft",
                    "scope": "tensor",
                    "beta": 0.5,
                    "perturbation": SAM(0.1, interval=2),
                }
            ),
        ),
    ),
    Feature(
        "`start_step` and `ramp_steps` as fractions of the run",
        same_as(LIGHTNING, Job({**BOOST, "start_step": 0.25, "kappa_schedule": "ramp", "ramp_steps": 0.5})),
        refused=dict.fromkeys(BY_HAND, _STEPS),
    ),
    Feature(
        "`start_epoch`",
        same_as(LIGHTNING, Job({**BOOST, "start_epoch": 1})),
        notes=dict.fromkeys(BY_HAND, "`step.epoch = n`"),
    ),
    Feature(
        "`start_loss`",
        same_as(LIGHTNING, Job({**BOOST, "start_loss": 100.0})),
        notes=dict.fromkeys(BY_HAND, "`step.epoch = n`"),
    ),
    Feature("frozen layers, kappa by name", groups),
    Feature(
        "logged values",
        same_as(LIGHTNING, Job(SAM_IRE, optimizer="adamw")),
        notes=dict.fromkeys(BY_HAND, "`step.logs`") | {LIGHTNING: "its loggers", TRANSFORMERS: "its reporters"},
    ),
    Feature(
        "a resumed run goes on bit for bit",
        exact_resume,
        notes={
            LIGHTNING: "its checkpoints",
            PLAIN: "`state_dict`",
            FABRIC: "`state_dict` in `fabric.save`",
            ACCELERATE: "`register_for_checkpointing(step)`",
            TRANSFORMERS: "its checkpoints",
        },
    ),
    Feature("weights are put back when the loss fails", failing_loss),
    Feature(
        "sharpness and stability",
        sharpness,
        notes={LIGHTNING: "`SharpnessMonitor`", TRANSFORMERS: "`attach(..., sharpness=SharpnessMonitor(...))`"}
        | dict.fromkeys(BY_HAND, "`measure_sharpness`"),
    ),
    Feature('`kappa="auto"`', kappa_auto, notes=dict.fromkeys(BY_HAND, "`step.note_headroom`")),
    Feature(
        "a table of the first mask",
        preview,
        notes={LIGHTNING: "`dry_run=True`"} | dict.fromkeys(BY_HAND, "`step.preview`"),
        refused={TRANSFORMERS: "dry_run"},
        elsewhere={LIGHTNING: "test_masks.py::test_"},
    ),
    Feature(
        "DDP",
        elsewhere={
            LIGHTNING: "test_ddp.py::test_",
            PLAIN: "test_loop.py::test_replicas_of_torchrun_are_bit_identical",
            **dict.fromkeys((FABRIC, ACCELERATE, TRANSFORMERS), "integrations/test_processes.py::test_replicas"),
        },
    ),
    Feature(
        "`fully_shard` (FSDP2)",
        sharded,
        refused=dict.fromkeys((ACCELERATE, TRANSFORMERS), _TOO_FEW),
        elsewhere={
            LIGHTNING: "test_sharded.py::test_",
            PLAIN: "test_sharded.py::test_",
            FABRIC: "integrations/test_processes.py::test_fabric_shards",
        },
    ),
    Feature(
        "other sharding (FSDP1, DeepSpeed)",
        sharded,
        refused={
            LIGHTNING: "ModelParallelStrategy",
            PLAIN: "`fully_shard`",
            FABRIC: "ModelParallelStrategy",
            **dict.fromkeys((ACCELERATE, TRANSFORMERS), _TOO_FEW),
        },
    ),
]


def features_table() -> str:
    """The rows as Markdown."""
    lines = [f"| | {' | '.join(LOOPS)} |", f"| --- |{' --- |' * len(LOOPS)}"]
    lines += [f"| {one.name} | {' | '.join(one.cell(loop) for loop in LOOPS)} |" for one in FEATURES]
    return "\n".join(lines)
