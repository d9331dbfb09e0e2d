"""Where the gradient of a step is taken: the weights of one window moved by a perturbation, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire.curvature.batches import part_of, samples_to_cut
from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import MovingWeights
from lightning_ire.engine.optimizers import named_parameters
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.engine.state import Progress
from lightning_ire.functional import all_finite, local, perturbed
from lightning_ire.functional.seeds import mixed_seed
from lightning_ire.perturbation import Ascent, Perturbation

__all__ = ["WeightAscent", "unscaled"]


class WeightAscent:
    """Moves the weights for the gradient of one step.

    Args:
        perturbation: By how much.
        host: The loop.
        module: The module being trained.
        optimizer: The optimizer that is about to step.
        parameters: Its parameters.
        moving: The weights that the module itself moves.
        gathered: Copies of whole weights in the module.
        seed: Seed of this window's draws: the same on all ranks.
        progress: The optimizer's state that outlives the fit.
        second: Whether the weights are moved at this step at all, and the gradients there taken.

    Attributes:
        before: Whether the weights are moved before the training's own forward passes; else after them, by their
            gradient, for a second pass.
        synchronized: Whether the training's own backward passes leave averaged gradients on all devices.
        base: Inside of :meth:`ascend` the unmoved weights, by `id` of the parameter.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        host: Host,
        module: nn.Module,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        moving: MovingWeights,
        gathered: GatheredWeights,
        seed: int,
        progress: Progress,
        second: bool,
    ) -> None:
        self.perturbation = perturbation
        self.second = second
        self.before = second and not perturbation.uses_gradient
        self.synchronized = self.before or perturbation.sync or not second
        self.base: Mapping[int, Tensor] = {}
        self._host = host
        self._module = module
        self._optimizer = optimizer
        self._parameters = parameters
        self._moving = moving
        self._gathered = gathered
        self._seed = seed
        self._progress = progress
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._moved = ExitStack()

    def watch(self, notes: dict[str, Any], again: bool) -> AbstractContextManager[Any]:
        """The perturbation watches a forward pass inside the block.

        Args:
            notes: What it remembers of the first pass over the micro-batch.
            again: Whether this is the second one.
        """
        return self.perturbation.watch(notes, again) if self.second else nullcontext()

    def part_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of the first pass over a micro-batch, of which the perturbation may want a part.

        Args:
            args: Those of the whole.

        Raises:
            ConfigurationError: If the batch cannot be cut.
        """
        fraction = self.perturbation.fraction
        if fraction == 1 or not self.second or self.before:
            return args
        batch, *rest = args or (None,)
        samples = samples_to_cut(batch, self.perturbation, "set `perturbation.fraction` to 1")
        return (part_of(batch, 0, math.ceil(fraction * samples)), *rest)

    def put_back(self) -> None:
        """Put weights back that are moved, whatever line an interrupt hit."""
        self._moved.close()

    def move(self) -> None:
        """Move the weights until :meth:`put_back`, for a perturbation that needs no gradient."""
        self._moved.enter_context(self.moved())

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The weights are moved inside the block, by a perturbation that needs no gradient.

        What the pass itself changed in them stays, as a change of the unperturbed weights.

        Yields:
            Nothing.
        """
        movable, moves, _ = self.displacement()
        with self._perturbed(movable, moves):
            del moves
            yield
            changed = {id(p): local(p.detach()).clone() for p in movable if self._moving.moves(p)}
        if changed:
            again = self.displacement()  # which draws the same
            with torch.no_grad():
                for weight, move in zip(*again[:2], strict=True):
                    if move is not None and (now := changed.get(id(weight))) is not None:
                        base = local(weight.detach())
                        moved = base.clone().add_(local(move, weight))
                        base.copy_(torch.where(moved == base, now, base + (now - moved)))

    @contextmanager
    def _perturbed(self, weights: Sequence[nn.Parameter], moves: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
        """The weights are moved inside the block, and no layer computes with a gathered copy from before."""
        try:
            with perturbed(weights, moves) as saved:
                self._gathered.drop()
                yield saved
        finally:
            self._gathered.drop()

    def ascend(
        self, second_pass: Callable[[bool], Tensor | None]
    ) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
        """Replace the gradients in `.grad` by those at the weights that they move to, or by what is made of both.

        Args:
            second_pass: Makes the gradients at the moved weights and returns the loss there, if any; it is told
                whether these are the step's, and not those of a further ascent.

        Returns:
            The copies of the weights that this made, by `id` of the parameter (of sharded ones: of this rank's parts);
            the norm of the first gradient, and the loss at the last moved weights, where there is one.
        """
        moves: Sequence[Tensor | None] | None = None
        first_norm = loss = None
        copies: Mapping[int, Tensor] = {}
        own = self._gradients() if self.perturbation.combines else None
        ascents = self.perturbation.ascents if self.second else 0
        for number in range(1, ascents + 1):
            movable, moves, norm = self.displacement(moves)
            if number == 1:
                first_norm = norm
            block = self._perturbed(movable, moves)
            if number == ascents:
                moves = None  # the block frees them once the weights are moved
            saved = self._moved.enter_context(block)
            self.base = {id(parameter): copy for parameter, copy in zip(movable, saved, strict=True)}
            try:
                loss = second_pass(number == ascents)
            finally:
                self.put_back()
                copies, self.base = self.base, {}
        if own is not None:
            self._combine(own)
        return dict(copies), first_norm, loss

    def _gradients(self) -> list[Tensor | None]:
        """Copies of those in `.grad`, unscaled, of this rank's parts: DDP uses the memory of the first pass again."""
        scale = self._host.loss_scale
        parts = [None if w.grad is None else local(w.grad.detach(), w).to_dense() for w in self._trained]
        return unscaled(parts if scale != 1 else [None if part is None else part.clone() for part in parts], scale)

    @torch.no_grad()
    def _combine(self, own: Sequence[Tensor | None]) -> None:
        """Put in `.grad` what the perturbation makes of the gradients at the unmoved and at the moved weights."""
        perturbed = self._gradients() if self.second else None
        ascent = self._look(self._trained, own)
        scale = self._host.loss_scale
        made = self.perturbation.combine(own, perturbed, ascent)
        if scale != 1 and perturbed is not None and not bool(all_finite([one for one in perturbed if one is not None])):
            made = perturbed  # whatever was made of them: the GradScaler has to see that they overflowed
        for weight, gradient in zip(self._trained, made, strict=True):
            if gradient is None:
                weight.grad = None
                continue
            if weight.grad is None:  # at the moved weights it has none
                weight.grad = torch.zeros_like(weight)
            there = weight.grad if weight.grad.layout == torch.strided else weight.grad.to_dense()
            local(there).copy_(gradient if scale == 1 else gradient * scale)
            weight.grad = there

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has made a real step: what the perturbation wanted to keep is kept."""
        if type(self.perturbation).after_step is not Perturbation.after_step:
            self.perturbation.after_step(self._look(self._trained, [None] * len(self._trained)))
        kept = {name: memory for name, memory in self._memory.items() if memory}
        if kept:
            self._progress.memory.keep(kept, named_parameters(self._module, self._optimizer))

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    @property
    def movable(self) -> list[nn.Parameter]:
        """The parameters that may move; in manual optimization some may be frozen at the moment."""
        chosen = self.perturbation.selects(self._module)
        if chosen is None:
            return self._trained
        ids = {id(p) for name, p in self._module.named_parameters(remove_duplicate=False) if name in chosen}
        return [parameter for parameter in self._trained if id(parameter) in ids]

    def displacement(
        self, moves: Sequence[Tensor | None] | None = None
    ) -> tuple[list[nn.Parameter], Sequence[Tensor | None], Tensor | None]:
        """Ask the perturbation how far to move; random ones draw the same in every micro-batch and on all ranks.

        Args:
            moves: The displacements that the gradients in `.grad` were taken at; ``None``: none.

        Returns:
            The movable parameters, their displacements, and the norm to be logged.
        """
        self._gathered.drop()  # else its parameters may be gathered copies
        movable = self.movable
        gradients = [None if self.before else weight.grad for weight in movable]
        ascent = self._look(movable, unscaled(gradients, self._host.loss_scale), moves)
        moves, norm = self.perturbation.displacement(ascent)
        return movable, moves, norm

    def _look(
        self,
        weights: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
        moves: Sequence[Tensor | None] | None = None,
    ) -> Ascent:
        """What the perturbation may look at."""
        indices = {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        groups: list[Any] = [*self._optimizer.param_groups, {}]
        places = [indices.get(id(weight), -1) for weight in weights]
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        seed = mixed_seed(self._seed, "noise")
        generators = {
            device: torch.Generator(device).manual_seed(seed) for device in {weight.device for weight in weights}
        }
        factors: Sequence[float] = ()
        if self.perturbation.rho_schedule == "lr":
            of_groups = [*self._progress.shares_of_peak_lrs(self._optimizer), 1.0]
            factors = [of_groups[place] for place in places]
        masks = self._progress.masks.masks if self.perturbation.needs_mask else {}
        groups_of = [groups[place] for place in places]
        return Ascent(
            parameters=weights,
            gradients=self._minimized(gradients, groups_of),
            groups=groups_of,
            generators=[generators[weight.device] for weight in weights],
            moves=moves,
            names=[names.get(id(weight), "") for weight in weights],
            states=[self._optimizer.state.get(weight, {}) for weight in weights],
            memory=self._remembered(weights, names),
            factors=factors,
            flat=[masks.get(names.get(id(weight), "")) for weight in weights] if masks else (),
        )

    def _remembered(self, weights: Sequence[nn.Parameter], names: Mapping[int, str]) -> list[dict[str, Tensor]]:
        """What the perturbation keeps of each weight, to be changed by it until the step is made."""
        if not all(id(weight) in names for weight in weights):  # the optimizer alone has some
            names = {id(parameter): name for name, parameter in named_parameters(self._module, self._optimizer).items()}
        for weight in weights:
            name = names[id(weight)]
            if name not in self._memory:
                self._memory[name] = self._progress.memory.of(name)
        return [self._memory[names[id(weight)]] for weight in weights]

    def _minimized(
        self, gradients: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """Gradients of what the optimizer minimizes: of minus the loss for weights that it maximizes the loss over."""
        always = getattr(self._optimizer, "maximize", False)  # for the whole optimizer, as in pytorch_optimizer
        return [
            -g if g is not None and (always or group.get("maximize")) else g
            for g, group in zip(gradients, groups, strict=True)
        ]


def unscaled(gradients: Sequence[Tensor | None], scale: float) -> list[Tensor | None]:
    """Gradients without the factor of fp16's GradScaler, in at least float32 then.

    Args:
        gradients: Gradients of the scaled loss.
        scale: The factor; 1: there is none.
    """
    if scale == 1:
        return list(gradients)
    return [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in gradients]
