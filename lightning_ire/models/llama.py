"""Llama, from Hugging Face's transformers, with random weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ire._checks import ConfigurationError, check_number, check_whole
from lightning_ire.models.transformer import check_length

__all__ = ["Llama"]


class Llama(nn.Module):
    """Llama: a decoder with rotary positions, RMSNorm before each part and a gated feed-forward part (SwiGLU).

    The layers are those of transformers' `LlamaForCausalLM`. Nothing is downloaded: weights start as there, matrices
    with N(0, 0.02^2) and norms with 1. The IRE paper's sizes (Wang et al., arXiv 2405.20763), with the default
    vocabulary, that of GPT-2 filled up from 50,257 to a multiple of 128:

    - "60M", 63,409,370 parameters: `width=410, num_layers=16, num_heads=10, head_dim=40, feed_forward=1640,
      tie_embeddings=True`. Rotary positions need an even `head_dim`, and 410 / 10 is odd.
    - "119M", 119,744,256: the defaults.
    - "229M", 228,287,232: `num_layers=16, feed_forward=3072`.

    Norms and rotations are worked out in single precision, with double-precision weights too.

    Attributes:
        vocab_size: Number of logits.
        context_length: Longest sequence.
        network: The `LlamaForCausalLM`.

    References:
        Touvron et al., LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971.
    """

    def __init__(
        self,
        vocab_size: int = 50304,
        width: int = 768,
        num_layers: int = 6,
        num_heads: int = 12,
        feed_forward: int = 2048,
        head_dim: int | None = None,
        context_length: int = 512,
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        checkpointing: bool = False,
    ) -> None:
        """Build the network.

        Args:
            vocab_size: Number of tokens and of logits.
            width: Length of a token's vector.
            num_layers: Layers of attention and feed-forward part.
            num_heads: Heads of an attention.
            feed_forward: Width inside the feed-forward part.
            head_dim: Width of a head, even; none: `width` / `num_heads`.
            context_length: Longest sequence.
            tie_embeddings: Whether the output layer's matrix is the embedding's.
            norm_eps: What RMSNorm adds to the mean square.
            rope_theta: Base of the rotary positions' wavelengths.
            checkpointing: Whether the backward pass works out each layer's inside again instead of keeping it in
                memory: the same gradients for one more forward pass.

        Raises:
            ConfigurationError: If a value is out of range, or transformers is not installed.
        """
        super().__init__()
        self.vocab_size = check_whole("vocab_size", vocab_size, low=1)
        self.context_length = check_whole("context_length", context_length, low=1)
        check_whole("num_layers", num_layers, low=1)
        check_whole("feed_forward", feed_forward, low=1)
        check_number("norm_eps", norm_eps)
        check_number("rope_theta", rope_theta, low_open=True)
        head_dim = _head_dim(check_whole("width", width, low=1), check_whole("num_heads", num_heads, low=1), head_dim)
        transformers = _transformers()
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=feed_forward,
            head_dim=head_dim,
            max_position_embeddings=context_length,
            tie_word_embeddings=tie_embeddings,
            rms_norm_eps=norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            use_cache=False,
            pad_token_id=None,  # or the embedding of one token would stay 0
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=_attention(transformers),
        )
        self.network = transformers.LlamaForCausalLM(config)
        if checkpointing:
            enable = getattr(
                self.network, "activation_checkpointing_enable", None
            )  # older releases have the other name
            (enable or self.network.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each position's next token.

        Args:
            tokens: Token ids of shape [B, L], int64.

        Returns:
            Shape [B, L, vocab_size].

        Raises:
            ConfigurationError: If L is more than `context_length`.
        """
        check_length(tokens.shape[1], self.context_length)
        return self.network(tokens).logits

    def split_(self, mesh: DeviceMesh) -> None:
        """Split heads, feed-forward parts and vocabulary over devices (tensor parallel), in place.

        The plan of torch's tutorial on tensor parallel, without its sequence parallel: each device has its own heads
        and its own columns of the feed-forward part, and its rows of embedding and output matrix; norms are the same on
        all. All devices get the same tokens and return all logits. Two sums over the devices per layer in the forward
        pass, and two in the backward pass, of a tensor of the size [B, L, width].

        Args:
            mesh: The devices, a mesh of one dimension.

        Raises:
            ConfigurationError: If they do not divide the heads, `feed_forward` or the vocabulary.

        References:
            Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3.
        """
        config, devices = self.network.config, mesh.size()
        divided = {
            "num_heads": config.num_attention_heads,
            "feed_forward": config.intermediate_size,
            "vocab_size": config.vocab_size,
        }
        for name, value in divided.items():
            if value % devices:
                raise ConfigurationError(
                    f"Expected trainer.strategy.init_args.tensor_parallel_size to divide `{name}` = {value}, got "
                    f"{devices}."
                )
        layers, columns, rows = "model.layers.*", ColwiseParallel(), RowwiseParallel()
        parallelize_module(
            self.network,
            mesh,
            {
                **{f"{layers}.self_attn.{name}_proj": columns for name in "qkv"},
                f"{layers}.self_attn.o_proj": rows,
                f"{layers}.mlp.gate_proj": columns,
                f"{layers}.mlp.up_proj": columns,
                f"{layers}.mlp.down_proj": rows,
                "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
                "lm_head": ColwiseParallel(output_layouts=Replicate()),
            },
        )
        if config.tie_word_embeddings:
            self.network.lm_head.weight = self.network.model.embed_tokens.weight
        for layer in self.network.model.layers:
            _replicate_(layer.input_layernorm, mesh)
            _replicate_(layer.post_attention_layernorm, mesh)
        _replicate_(self.network.model.norm, mesh)


def _replicate_(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Let all devices do the same, with a DTensor: clipping takes no plain tensors beside them."""
    distribute_module(
        norm,
        mesh,
        None,
        lambda _, inputs, mesh: tuple(  # type: ignore[arg-type]  # the stub leaves out the result
            DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs
        ),
        lambda _, output, mesh: output.to_local(),
    )


def _head_dim(width: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is None:
        if width % num_heads:
            raise ConfigurationError(
                f"Expected `width` to be a multiple of `num_heads` = {num_heads}, got {width}: change it or set "
                "`head_dim`."
            )
        head_dim = width // num_heads
    if check_whole("head_dim", head_dim, low=1) % 2:
        raise ConfigurationError(
            f"Expected `head_dim` (default: `width` / `num_heads`) to be even, as rotary positions turn pairs, got "
            f"{head_dim}: set it to {head_dim - 1 or 2}."
        )
    return head_dim


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "Expected transformers for `Llama`, got an import error: pip install 'lightning-ire[text]'"
        ) from error
    return transformers


def _attention(transformers: Any) -> str:
    """Torch's attention kernel under a name of our own, for which transformers makes no mask.

    With its own name "sdpa" it looks at each batch for packed sequences: eager code waits for the GPU in every forward
    pass, compiled code hands over a mask, which keeps the kernel from its fast causal form.
    """
    name = "lightning_ire_causal"
    functions = transformers.AttentionInterface()
    functions.register(name, functions["sdpa"])
    return name
