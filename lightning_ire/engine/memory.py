"""What a perturbation keeps of each weight from step to step, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed

from lightning_ire.functional import is_sharded, local, part_of_whole, whole_of_part

__all__ = ["PerturbationMemory"]


class PerturbationMemory:
    """Tensors by parameter name and a name of the perturbation's choice; of sharded parameters this rank's parts."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._sharded: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies get no parameters."""
        return {**vars(self), "_sharded": {}}

    def of(self, name: str) -> dict[str, Tensor]:
        """What is kept of a weight, in a dictionary of its own.

        Args:
            name: The parameter's name.
        """
        return dict(self._tensors.get(name, {}))

    def keep(self, tensors: Mapping[str, dict[str, Tensor]], parameters: Mapping[str, Tensor]) -> None:
        """Replace what is kept of some weights.

        Args:
            tensors: By the parameter's name.
            parameters: The parameters, by name.
        """
        self._tensors |= tensors
        self._sharded |= {name: parameters[name] for name in tensors if is_sharded(parameters[name])}

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU; of sharded parameters the whole, for which all ranks have to call: rank 0 has them."""
        state: dict[str, Any] = {}
        for name, kept in self._tensors.items():
            parameter = self._sharded.get(name)
            for key, value in kept.items():
                whole = value
                if parameter is not None and value.shape == local(parameter).shape:
                    whole = whole_of_part(value, parameter)
                    if distributed.get_rank() != 0:
                        continue
                state.setdefault(name, {})[key] = whole.detach().cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take up what was saved, where it still fits a parameter.

        Args:
            state: What :meth:`state_dict` returned.
            parameters: The run's parameters by name, on their devices.
        """
        self._sharded = {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}
        self._tensors = {}
        for name, kept in state.items():
            parameter = parameters.get(name)
            if parameter is None:
                continue
            for key, value in kept.items():
                if value.dim() and value.shape != parameter.shape:
                    continue
                part = part_of_whole(value, parameter) if value.dim() else value
                self._tensors.setdefault(name, {})[key] = part.to(parameter.device)
