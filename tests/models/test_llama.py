import builtins
import math
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ire import ConfigurationError
from lightning_ire.models import Llama

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "feed_forward": 12, "context_length": 9}
SIXTY = {"width": 410, "num_layers": 16, "num_heads": 10, "head_dim": 40, "feed_forward": 1640}


def network(**settings) -> Llama:
    torch.manual_seed(0)
    model = Llama(**{**SMALL, **settings})
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({**SIXTY, "tie_embeddings": True}, 63_409_370),
        ({}, 119_744_256),
        ({"num_layers": 16, "feed_forward": 3072}, 228_287_232),
    ],
    ids=["60M", "119M", "229M"],
)
def test_sizes_of_the_paper(settings, count):
    with torch.device("meta"):
        model = Llama(**settings)
        assert model(torch.zeros(2, 512, dtype=torch.int64)).shape == (2, 512, 50_304)
    assert sum(p.numel() for p in model.parameters()) == count


def rms(layer: nn.Module, x: torch.Tensor, eps: float) -> torch.Tensor:
    return layer.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Heads [H, L, d]: the pair (i, i + d/2) at position p turned by p / theta^(2i/d)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([[p / theta ** (i / half) for i in range(half)] for p in range(x.shape[1])]).to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def reference(model: Llama, sequence: torch.Tensor, num_heads: int, eps: float, theta: float) -> torch.Tensor:
    network, length = model.network, len(sequence)
    x = network.model.embed_tokens.weight[sequence]
    for layer in network.model.layers:
        inside, attention = rms(layer.input_layernorm, x, eps), layer.self_attn
        q, k, v = (
            projection(inside).view(length, num_heads, -1).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = rotated(q, theta) @ rotated(k, theta).transpose(1, 2) / q.shape[-1] ** 0.5
        later = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        x = x + attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
        inside = rms(layer.post_attention_layernorm, x, eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(inside)) * layer.mlp.up_proj(inside))
    return network.lm_head(rms(network.model.norm, x, eps))


@pytest.mark.parametrize(
    "settings", [{}, {"head_dim": 6, "norm_eps": 0.1, "rope_theta": 10.0}, {"tie_embeddings": True}]
)
def test_equals_the_slow_reference(settings):
    model, batch = network(**settings).double(), tokens()
    eps, theta = settings.get("norm_eps", 1e-5), settings.get("rope_theta", 10000.0)
    expected = torch.stack([reference(model, sequence, 2, eps, theta) for sequence in batch])
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)  # norms are in single precision
    assert model(batch).dtype == torch.float64


def test_equals_transformers_own_with_the_same_weights():
    model = network()
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            rms_norm_eps=1e-5, attn_implementation="sdpa",
        )
    )  # fmt: skip
    other.load_state_dict(model.network.state_dict())
    assert torch.equal(model(tokens()), other(tokens()).logits)


@pytest.mark.parametrize("grad", [True, False])
def test_looks_at_no_later_token(grad):
    model, batch = network(), tokens()
    other = batch.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    with torch.set_grad_enabled(grad):
        first, second = model(batch), model(other)
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=0, atol=1e-6)
    assert (first[:, 4:] - second[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_causal_without_a_mask(compiled, monkeypatch):
    calls, original = [], F.scaled_dot_product_attention

    def recording(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return original(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    def backend(graph, example_inputs):
        for node in graph.graph.nodes:
            if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
                calls.append((node.kwargs["attn_mask"], node.kwargs["is_causal"]))
        return graph.forward

    model = network()
    if compiled:
        torch.compiler.reset()
        torch.compile(model, backend=backend)(tokens())
        torch.compiler.reset()
    else:
        monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
        model(tokens())
    assert calls == [(None, True)] * 2


def test_tied_weights_are_one_parameter():
    untied, tied = network(), network(tie_embeddings=True)
    assert tied.network.lm_head.weight is tied.network.model.embed_tokens.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 11 * 8


def test_starts_with_no_row_of_zeros():
    model = Llama(vocab_size=300, width=64, num_layers=1, num_heads=2, feed_forward=64)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert p.abs().amax(dim=1).min() > 0.005, name
        else:
            assert p.eq(1).all(), name
    assert model.network.model.embed_tokens.padding_idx is None
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_checkpointing_works_layers_out_again_for_the_same_gradients():
    grads, calls = [], []
    for checkpointing in (False, True):
        model = network(checkpointing=checkpointing)
        counted = []
        model.network.model.layers[1].self_attn.register_forward_hook(lambda *args, into=counted: into.append(1))
        F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(len(counted))
    assert calls == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_transformers(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(builtins, "__import__", without)
    message = "^Expected transformers for `Llama`, got an import error: pip install 'lightning-ire\\[text\\]'$"
    with pytest.raises(ConfigurationError, match=message):
        Llama(**SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_eps": -1.0}, "Expected `norm_eps` to be a number >= 0, got -1.0."),
        ({"rope_theta": 0.0}, "Expected `rope_theta` to be a number > 0, got 0.0."),
        ({"head_dim": 0}, "Expected `head_dim` to be a whole number >= 1, got 0."),
        (
            {"num_heads": 3},
            "Expected `width` to be a multiple of `num_heads` = 3, got 8: change it or set `head_dim`.",
        ),
        (
            {"width": 410, "num_heads": 10},
            "Expected `head_dim` (default: `width` / `num_heads`) to be even, as rotary positions turn pairs, got 41: "
            "set it to 40.",
        ),
        ({"head_dim": 1}, "got 1: set it to 2."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Llama(**{**SMALL, **settings})
