"""The interface between the engine and a perturbation, and when a perturbation is on."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, NotForFabric, check_choice
from lightning_ire.schedule import Start

__all__ = ["GROUP_RADIUS", "Ascent", "Perturbation"]

GROUP_RADIUS = "sam_rho"
"""Key of an optimizer's parameter group that gives its weights a radius of their own."""


@dataclass(frozen=True)
class Ascent:
    """What a perturbation may look at; everything in the order of the parameters that it moves.

    Of a sharded model weights and gradients are DTensors: arithmetic element by element works on them as it is; norms
    over all of them are :func:`lightning_ire.functional.global_norm`.

    Attributes:
        parameters: The weights, unmoved.
        gradients: Gradients of what the optimizer minimizes (of minus the loss in a group with `maximize`), unscaled;
            ``None`` where there is none. All ``None`` if the class does not use them.
        groups: The optimizer's parameter group of each weight.
        generators: One random generator per weight, on its device, the same on every rank and in every micro-batch of
            the accumulation window.
        moves: Displacements at which the gradients were taken; ``None``: at the unmoved weights.
        names: Their names in the module ("": the optimizer alone has it).
        states: The optimizer's state of each weight; empty before its first step.
        memory: What the perturbation keeps of each weight from step to step: tensors of the weight's shape (of a
            DTensor this rank's part) or numbers, by names of its own choice. It is saved in every checkpoint. Put new
            tensors in, do not write into old ones: if the step is left out (fp16 overflow), what was put in is dropped.
        factors: What `rho_schedule` multiplies the radius of each weight with.
        flat: IRE's mask in force of each weight (of a DTensor this rank's part), whose values, 1 for flat,
            :func:`lightning_ire.functional.as_shares` gives; ``None`` where there is none.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    groups: Sequence[Mapping[str, Any]]
    generators: Sequence[torch.Generator]
    moves: Sequence[Tensor | None] | None = None
    names: Sequence[str] = ()
    states: Sequence[Mapping[str, Any]] = ()
    memory: Sequence[dict[str, Tensor]] = ()
    factors: Sequence[float] = ()
    flat: Sequence[Tensor | None] = ()

    def radii(self, rho: float) -> list[float]:
        """The radius of each weight: that of its parameter group, or this one; times the factor of `rho_schedule`.

        Args:
            rho: For groups without a radius.
        """
        factors = self.factors or [1.0] * len(self.groups)
        return [
            float(group.get(GROUP_RADIUS, rho)) * factor for group, factor in zip(self.groups, factors, strict=True)
        ]


class Perturbation(NotForFabric, ABC):
    """Moves the weights for the gradient of a step; the step itself starts from the unmoved weights.

    Give it to `IRE(perturbation=...)`; in `Trainer(callbacks=[...])` it stands for `IRE(kappa=0, perturbation=...)`.

    Every perturbation takes the arguments below by name.

    Args:
        start_step: Zero-based optimizer step of the first perturbed step; strictly between 0 and 1: fraction of the
            whole run. SAM in the last part of a run alone finds nearly as flat a minimum (Zhou et al. 2024, arXiv
            2410.10373).
        start_epoch: The same by zero-based epoch. At most one of the two; none: from the first step.
        stop_step: Optimizer step of the first plain step after that, or a fraction of the run.
        stop_epoch: The same by epoch. At most one of the two; none: never.
        rho_schedule: "constant", or "lr": the radius times lr / (highest lr so far), per parameter group (as in GSAM,
            Zhuang et al. 2022, arXiv 2203.08065, with a smallest radius of 0; 1 during a warm-up).

    Raises:
        ConfigurationError: If an argument is out of range.

    Attributes:
        uses_gradient: True: :meth:`displacement` gets the gradient at the unmoved weights, so a step costs a second
            forward and backward pass. False: the weights are moved before the only pass.
        ascents: How often :meth:`displacement` is called for a step, with the gradient at the weights that the last
            call moved: so many forward and backward passes more than a plain step.
        interval: The weights are moved at every `interval`-th optimizer step (see :meth:`second_pass`).
        sync: Whether that gradient is averaged over devices first (else each device moves by its own). Has to be true
            for a class that combines gradients or keeps something in `Ascent.memory`.
        fraction: Part of each micro-batch that the gradient at the unmoved weights is taken from.
        needs_mask: Whether it looks at `Ascent.flat`, so that it makes sense with IRE's boost only.
        has_radii: Whether it takes radii of parameter groups (`Ascent.radii`).
    """

    uses_gradient: ClassVar[bool] = True
    ascents: int = 1
    interval: int = 1
    sync: bool = False
    fraction: float = 1.0
    needs_mask: bool = False
    has_radii: bool = True
    _settled: ClassVar[tuple[str, ...]] = ()  # arguments of a base class that this one gives itself
    start: Start = Start()
    stop: Start = Start(name="stop")
    rho_schedule: str = "constant"

    def __init__(
        self,
        *,
        start_step: int | float | None = None,
        start_epoch: int | None = None,
        stop_step: int | float | None = None,
        stop_epoch: int | None = None,
        rho_schedule: Literal["constant", "lr"] = "constant",
    ) -> None:
        self.start = Start(start_step, start_epoch)
        self.stop = Start(stop_step, stop_epoch, name="stop")
        self.rho_schedule = check_choice("rho_schedule", rho_schedule, ("constant", "lr"))
        for unit in ("step", "epoch"):
            first, last = getattr(self.start, unit), getattr(self.stop, unit)
            alike = first is not None and last is not None and isinstance(first, float) is isinstance(last, float)
            if alike and first >= last:
                raise ConfigurationError(f"Expected `stop_{unit}` to be later than `start_{unit}`={first}, got {last}.")

    @abstractmethod
    def displacement(self, ascent: Ascent) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Say by how much each weight moves.

        Args:
            ascent: The weights that :meth:`selects` chose, their gradients, ...

        Returns:
            One displacement per weight (``None``: not moved), and the gradient norm to be logged, if any.
        """

    def combine(
        self, gradients: Sequence[Tensor | None], perturbed: Sequence[Tensor | None] | None, ascent: Ascent
    ) -> Sequence[Tensor | None]:
        """Say what the step's gradient is; by default the one at the moved weights.

        A class that overrides this is asked at each step while it is on, also where there was no second pass.

        Args:
            gradients: At the unmoved weights, unscaled; ``None`` where there is none. Of a DTensor this rank's part.
            perturbed: The same at the moved weights; ``None``: there was no second pass.
            ascent: The rest, in the same order: all weights that are trained, not only those that :meth:`selects`
                chose.

        Returns:
            New tensors, or some of the given ones; ``None``: the weight has no gradient.
        """
        return gradients if perturbed is None else perturbed

    def after_step(self, ascent: Ascent) -> None:
        """Called after a real step of the optimizer, before IRE's boost, under `torch.no_grad`.

        Args:
            ascent: As in :meth:`combine`; the weights are those after the step.
        """

    def second_pass(self, step: int) -> bool:
        """Whether the weights are moved at this step, which takes a second pass if the class uses the gradient.

        Args:
            step: Zero-based count of the optimizer's real steps.
        """
        return step % self.interval == 0

    def watch(self, notes: dict[str, Any], again: bool) -> AbstractContextManager[Any]:
        """Entered around each forward pass of a perturbed step.

        Args:
            notes: What the class likes to remember of the first pass over a micro-batch, for the second one.
            again: Whether this is the second pass, at the moved weights.
        """
        return nullcontext()

    def selects(self, module: nn.Module) -> set[str] | None:
        """Names of the parameters that may move; ``None`` for all.

        Args:
            module: The module being trained.

        Returns:
            Names as in `module.named_parameters()`.
        """
        return None

    def effective_radius(self, norm: float) -> float | None:
        """rho_e: by how many gradients the weights move, for the stability of steps; ``None``: not one number.

        Args:
            norm: The norm that :meth:`displacement` gave.
        """
        return None

    @property
    def combines(self) -> bool:
        """Whether the step's gradient is something else than the one at the moved weights."""
        return type(self).combine is not Perturbation.combine

    def is_on(self, from_start: int, from_stop: int, epoch: int, first_step: int | None, last_step: int | None) -> bool:
        """Whether the perturbation is between its start and its stop.

        Args:
            from_start: Zero-based optimizer step, or batch, in what `self.start` counts.
            from_stop: The same in what `self.stop` counts.
            epoch: Zero-based epoch.
            first_step: What `self.start.first_step` said.
            last_step: What `self.stop.first_step` said.
        """
        if not self.start.reached(from_start, epoch, first_step):
            return False
        return self.stop.immediate or not self.stop.reached(from_stop, epoch, last_step)

    def state_dict(self) -> dict[str, Any]:
        """What a class of your own keeps besides `Ascent.memory`; saved in every checkpoint: tensors, numbers, text."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Args:
            state: That.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(_changed_arguments(self))})"

    @property
    def for_fabric(self) -> str:
        """The same in a loop with Fabric."""
        return (
            f"`IREStep(model, optimizer, host=FabricHost(fabric), kappa=0, perturbation={self!r})` after `fabric.setup`"
        )

    # In a Trainer's list of callbacks, which asks for no more than these before `setup`

    @property
    def state_key(self) -> str:
        """Lightning asks every callback for this name, of which there may be one each."""
        return f"{type(self).__name__}, in place of IRE"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning asks every callback to get ready: put an IRE callback in the place of this perturbation.

        Args:
            trainer: The trainer in whose list of callbacks this stands.
            pl_module: Its module.
            stage: "fit", "validate", "test" or "predict".
        """
        ire = importlib.import_module("lightning_ire").IRE  # which only those load who have a Trainer
        others = [one for one in trainer.callbacks if isinstance(one, (ire, Perturbation)) and one is not self]
        if any(isinstance(one, Perturbation) or not one.idle for one in others):
            raise ConfigurationError(
                f"Expected {self!r} to be the only callback of its kind, got {others[0]!r} beside it: give IRE(...) "
                f"its perturbation as `perturbation={self!r}`; two perturbations do not go together."
            )
        callback = ire(kappa=0, perturbation=self)
        trainer.callbacks = [callback if one is self else one for one in trainer.callbacks]
        callback.setup(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Nothing: the run failed before `setup`."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing: the run failed before `setup`."""


def _changed_arguments(perturbation: Perturbation) -> list[str]:
    """The arguments that made it, but for those that are as by default; the first one always."""
    found: dict[str, inspect.Parameter] = {}
    for kind in type(perturbation).__mro__:
        made = vars(kind).get("__init__")
        if made is None or kind is object:
            continue
        arguments = inspect.signature(made).parameters.values()
        found |= {one.name: one for one in arguments if one.name not in found and one.name != "self"}
        if not any(one.kind is one.VAR_KEYWORD for one in arguments):
            break
    words: list[str] = []
    for name, argument in found.items():
        if argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL) or name in perturbation._settled:
            continue
        value = _value(perturbation, name, argument.default)
        if value is argument.empty:  # kept under another name
            continue
        if not words or value != argument.default:
            short = isinstance(value, float) and float(f"{value:g}") == value
            words.append(f"{name}={value:g}" if short else f"{name}={value!r}")
    return words


def _value(perturbation: Perturbation, name: str, default: Any) -> Any:
    when, _, unit = name.partition("_")
    if when in ("start", "stop") and unit in ("step", "epoch"):
        return getattr(getattr(perturbation, when), unit)
    return getattr(perturbation, name, default)
