"""A small Transformer decoder for language."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_ire._checks import ConfigurationError, check_number, check_whole

__all__ = ["Transformer", "check_length", "sinusoids"]


class Transformer(nn.Module):
    """The decoder of the IRE paper's small language model (Wang et al., arXiv 2405.20763, Figure 3).

    Token embeddings plus sines and cosines of the position, dropout, `num_layers` layers of causal self-attention and a
    feed-forward part with ReLU (torch's own `nn.TransformerEncoderLayer`), a linear layer to the logits. The defaults
    with the 33,278 words of Wikitext-2 have 8,948,990 parameters, 4,689,406 with `tie_embeddings`; the paper says 8M.

    The authors' code (github.com/wmz9/IRE-algorithm-framework, NLP/small-scale/model.py) adds the sinusoid of the row
    in the batch, as its table is indexed by the first dimension of a [batch, sequence, width] tensor; here it is that
    of the position.

    Embeddings start as torch's own, N(0, 1), and are not scaled. Where they are tied, the shared matrix starts as that
    of the output layer: with N(0, 1) the first logits would be as large as sqrt(width).

    Attributes:
        vocab_size: Number of logits.
        context_length: Longest sequence.

    References:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762.

    Example:
        >>> import torch
        >>> Transformer(vocab_size=11, width=8, num_heads=2)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 11])
    """

    positions: Tensor

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 8,
        feed_forward: int = 512,
        context_length: int = 512,
        dropout: float = 0.0,
        position_dropout: float = 0.1,
        norm_first: bool = False,
        tie_embeddings: bool = False,
    ) -> None:
        """Build the network.

        Args:
            vocab_size: Number of tokens and of logits.
            width: Length of a token's vector, even and a multiple of `num_heads`.
            num_layers: Layers of attention and feed-forward part.
            num_heads: Heads of an attention.
            feed_forward: Width inside the feed-forward part.
            context_length: Longest sequence.
            dropout: Probability, in [0, 1), with which a value inside the layers (attention weights, too) is set to 0
                in training.
            position_dropout: The same for the sum of embedding and position.
            norm_first: Whether a layer normalises its input (and a last LayerNorm the output) instead of its output.
            tie_embeddings: Whether the output layer's matrix is the embedding's.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__()
        self.vocab_size = check_whole("vocab_size", vocab_size, low=1)
        self.context_length = check_whole("context_length", context_length, low=1)
        check_whole("num_layers", num_layers, low=1)
        check_whole("feed_forward", feed_forward, low=1)
        check_number("dropout", dropout, high=1.0, high_open=True)
        check_number("position_dropout", position_dropout, high=1.0, high_open=True)
        if check_whole("width", width, low=1) % check_whole("num_heads", num_heads, low=1):
            raise ConfigurationError(f"Expected `width` to be a multiple of `num_heads` = {num_heads}, got {width}.")
        if width % 2:
            raise ConfigurationError(f"Expected `width` to be even, one sine for each cosine, got {width}.")
        self.embedding = nn.Embedding(vocab_size, width)
        self.register_buffer("positions", sinusoids(context_length, width), persistent=False)
        self.dropout = nn.Dropout(position_dropout)
        self.layers = nn.ModuleList(  # nn.TransformerEncoder would start all its layers as copies of one
            nn.TransformerEncoderLayer(width, num_heads, feed_forward, dropout, batch_first=True, norm_first=norm_first)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, vocab_size)
        if tie_embeddings:
            self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each position's next token.

        Args:
            tokens: Token ids of shape [B, L], int64.

        Returns:
            Shape [B, L, vocab_size].

        Raises:
            ConfigurationError: If L is more than `context_length`.
        """
        length = tokens.shape[1]
        check_length(length, self.context_length)
        x = self.embedding(tokens)
        x = self.dropout(x + self.positions[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines that mark positions: `sin(p / 10000^(2i/d))` at 2i, the cosine of the same at 2i + 1.

    Vaswani et al., arXiv 1706.03762, section 3.5, for position p and width d. Worked out in double precision.

    Args:
        length: Number of positions.
        width: d, even.

    Returns:
        Shape [length, width], of torch's default type.
    """
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") * (-math.log(10000) / width))
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rates
    return (
        torch.stack([angles.sin(), angles.cos()], dim=-1)
        .flatten(1)
        .to(torch.get_default_device(), torch.get_default_dtype())
    )


def check_length(length: int, context_length: int) -> None:
    """Refuse sequences that are too long for a network.

    Args:
        length: Tokens in a sequence.
        context_length: The most that the network takes.

    Raises:
        ConfigurationError: If there are more.
    """
    if length > context_length:
        raise ConfigurationError(
            f"Expected `context_length` to be at least {length}, the length of the sequences "
            f"(`data.sequence_length`), got {context_length}."
        )
