"""What a sharded model (FSDP2, tensor parallelism) asks of the engine besides sums over ranks."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["GatheredWeights"]


class GatheredWeights:
    """The copies of whole weights that FSDP2's modules compute with.

    They stay in the root module after a forward pass without gradients (a validation), and in modules that are not
    resharded after forward or backward passes. Then `module.parameters()` yields these copies, and the next forward
    pass does not see that the shards were moved. So they are dropped before parameters are looked up, after shards are
    moved, and after they are put back; the next pass gathers again.

    Args:
        module: The module being trained, sharded by now.
    """

    def __init__(self, module: nn.Module) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
        self._modules = [] if fsdp is None else [one for one in module.modules() if isinstance(one, fsdp.FSDPModule)]

    def __bool__(self) -> bool:
        """Whether there can be any."""
        return bool(self._modules)

    def drop(self) -> None:
        """Let layers hold their shards; not between a forward pass and its backward pass."""
        for module in self._modules:
            module.reshard()
