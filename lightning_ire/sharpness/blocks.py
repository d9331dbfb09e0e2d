"""Which kind of block of a network a parameter belongs to."""

from __future__ import annotations

import fnmatch

from torch import nn

__all__ = ["KINDS_OF_BLOCKS", "kinds_of_blocks"]

_PATTERNS = {  # of names in lower case, the last parts first; a fused projection has all three in one tensor
    "query_key_value": ("*qkv*", "*in_proj*", "*c_attn*", "*query_key_value*"),
    "query_key": ("*q_proj*", "*k_proj*", "*query*", "*key*", "*.wq.*", "*.wk.*", "*to_q.*", "*to_k.*"),
    "value_output": (
        *("*v_proj*", "*o_proj*", "*out_proj*", "*value*", "*.wv.*", "*.wo.*", "*to_v.*", "*to_out*"),
        *("*attn*.proj.*", "*attention*.output*", "*attn.c_proj*"),
    ),
    "feed_forward": (
        "*mlp*",
        "*ffn*",
        "*feed_forward*",
        "*linear1*",
        "*linear2*",
        "*.fc1.*",
        "*.fc2.*",
        "*intermediate*",
        "*.output.dense*",
    ),
    "embedding": ("*embed*", "*wte*", "*wpe*", "*cls_token*"),
    "head": ("*head*", "*classifier*", "fc.*", "*.fc.*", "linear.*", "*.linear.*", "*unembed*"),
}
KINDS_OF_BLOCKS = (
    "embedding",
    "query_key",
    "value_output",
    "query_key_value",
    "feed_forward",
    "norm",
    "convolution",
    "head",
    "other",
)
"""All kinds, in the order in which they are shown."""


def kinds_of_blocks(module: nn.Module) -> dict[str, str]:
    """The kind of block of each parameter, by the class of its layer, then by its name.

    Normalization layers, embeddings and convolutions are known by their classes, the rest by the names that
    Transformers usually have (those of transformers, timm and torch).

    Args:
        module: Any module.

    Returns:
        One of :data:`KINDS_OF_BLOCKS` by the parameter's name.

    Example:
        >>> kinds_of_blocks(nn.TransformerEncoderLayer(8, 2, 16))["self_attn.out_proj.weight"]
        'value_output'
    """
    owners = {
        f"{prefix}.{name}" if prefix else name: layer
        for prefix, layer in module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    }
    return {name: _kind(name.lower(), owners[name]) for name, _ in module.named_parameters()}


def _kind(name: str, layer: nn.Module) -> str:
    if "norm" in type(layer).__name__.lower():
        return "norm"
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    for kind, patterns in _PATTERNS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    return "convolution" if isinstance(layer, nn.modules.conv._ConvNd) else "other"
