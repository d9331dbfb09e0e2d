"""Where the gradient of a step is taken: the weights of one window moved by a perturbation, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ire.engine.host import Host
from lightning_ire.engine.module_state import MovingWeights
from lightning_ire.engine.sharding import GatheredWeights
from lightning_ire.functional import local, perturbed
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
    ) -> None:
        self.perturbation = perturbation
        self.before = not perturbation.uses_gradient
        self.synchronized = self.before or perturbation.sync
        self.base: Mapping[int, Tensor] = {}
        self._host = host
        self._module = module
        self._optimizer = optimizer
        self._parameters = parameters
        self._moving = moving
        self._gathered = gathered
        self._seed = seed
        self._moved = ExitStack()

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
        """Replace the gradients in `.grad` by those at the weights that they move to.

        Args:
            second_pass: Makes the gradients at the moved weights and returns the loss there, if any; it is told
                whether these are the step's, and not those of a further ascent.

        Returns:
            The copies of the weights that this made, by `id` of the parameter (of sharded ones: of this rank's parts);
            the norm of the first gradient, and the loss at the last moved weights, where there is one.
        """
        moves: Sequence[Tensor | None] | None = None
        first_norm = loss = None
        ascents = self.perturbation.ascents
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
        return dict(copies), first_norm, loss

    @property
    def movable(self) -> list[nn.Parameter]:
        """The parameters that may move; in manual optimization some may be frozen at the moment."""
        chosen = self.perturbation.selects(self._module)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        if chosen is None:
            return trained
        ids = {id(p) for name, p in self._module.named_parameters(remove_duplicate=False) if name in chosen}
        return [parameter for parameter in trained if id(parameter) in ids]

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
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        groups_of = [groups.get(id(weight), {}) for weight in movable]
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        seed = mixed_seed(self._seed, "noise")
        generators = {
            device: torch.Generator(device).manual_seed(seed) for device in {weight.device for weight in movable}
        }
        gradients = [None if self.before else weight.grad for weight in movable]
        ascent = Ascent(
            parameters=movable,
            gradients=self._minimized(unscaled(gradients, self._host.loss_scale), groups_of),
            groups=groups_of,
            generators=[generators[weight.device] for weight in movable],
            moves=moves,
            names=[names.get(id(weight), "") for weight in movable],
        )
        moves, norm = self.perturbation.displacement(ascent)
        return movable, moves, norm

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
