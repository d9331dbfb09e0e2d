"""How a network is spread over the devices of Lightning's `ModelParallelStrategy`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_ire._checks import ConfigurationError

__all__ = ["TensorParallel", "is_sharded", "layers_of", "shard_"]


@runtime_checkable
class TensorParallel(Protocol):
    """A network that knows how its matrices are split (`Llama`)."""

    def split_(self, mesh: DeviceMesh) -> None:
        """Let each device of a mesh of one dimension keep its part of the matrices, in place.

        Args:
            mesh: The devices.
        """


def layers_of(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network: what its longest `nn.ModuleList` holds; nothing where there is no such list.

    Args:
        network: Any network.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def is_sharded(network: nn.Module) -> bool:
    """Return whether devices have parts of a network's parameters.

    Args:
        network: Any network.
    """
    return isinstance(network, FSDPModule) or any(isinstance(p, DTensor) for p in network.parameters())


def shard_(network: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, compile: bool) -> None:
    """Spread a network over the devices of a mesh, in place: its matrices first, then what is left of each parameter.

    Over "tensor_parallel", if it has more than one device, the network splits itself. Over "data_parallel" each layer
    (see :func:`layers_of`) and then all the rest is one group of torch's `fully_shard`, whose parameters are gathered
    together, used and given up again.

    Args:
        network: The network, with the same weights on all devices (or those of the first one count).
        mesh: Lightning's mesh of two dimensions.
        policy: What `fully_shard` gathers and reduces in.
        compile: Whether each layer (without layers: the network) is compiled, apart from the others: a graph cannot go
            through the gathering anyway.

    Raises:
        ConfigurationError: If the network cannot be split so.
    """
    replicas, parts = mesh["data_parallel"], mesh["tensor_parallel"]
    layers = layers_of(network)
    if parts.size() > 1:
        if not isinstance(network, TensorParallel):
            raise ConfigurationError(
                f"Expected trainer.strategy.init_args.tensor_parallel_size to be 1, as {type(network).__name__} has no "
                f"plan for tensor parallel (Llama has one), got {parts.size()}."
            )
        if compile:
            raise ConfigurationError(
                "Expected model.compile to be false with trainer.strategy.init_args.tensor_parallel_size > 1, got "
                "true: torch hands plain tensors to DTensor in a compiled layer's backward pass. Set one of the two."
            )
        network.split_(parts)
    if compile:
        for layer in layers or [network]:
            layer.compile()  # in place: the names in checkpoints stay
    if replicas.size() > 1 or parts.size() == 1:  # on one device, too: Lightning loads checkpoints of sharded networks
        for layer in layers:
            fully_shard(layer, mesh=replicas, mp_policy=policy)
        fully_shard(network, mesh=replicas, mp_policy=policy)
