import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ire import ConfigurationError
from lightning_ire.models import Transformer
from lightning_ire.models.transformer import sinusoids

SMALL = {"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "feed_forward": 12, "context_length": 9}


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(**{**SMALL, "position_dropout": 0.0, **settings}).double()
    for p in model.parameters():  # biases and norms that are not all alike
        nn.init.normal_(p, std=0.4)
    return model


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return layer.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + layer.bias


def attention(layer: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Of one sequence [L, width], query by query."""
    size = x.shape[1] // layer.num_heads
    queries, keys, values = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=1)
    out = torch.zeros_like(x)
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = torch.stack([queries[i, part] @ keys[j, part] / size**0.5 for j in range(i + 1)])
            weights = scores.exp() / scores.exp().sum()
            out[i, part] = sum(weights[j] * values[j, part] for j in range(i + 1))
    return out @ layer.out_proj.weight.T + layer.out_proj.bias


def reference(model: Transformer, sequence: torch.Tensor, norm_first: bool) -> torch.Tensor:
    """The logits of one sequence."""
    width = model.embedding.weight.shape[1]
    x = torch.stack([model.embedding.weight[t] for t in sequence])
    for p in range(len(sequence)):
        for i in range(width):
            angle = p / 10000 ** (2 * (i // 2) / width)
            x[p, i] += math.cos(angle) if i % 2 else math.sin(angle)
    for layer in model.layers:
        if norm_first:
            x = x + attention(layer.self_attn, norm(layer.norm1, x))
        else:
            x = norm(layer.norm1, x + attention(layer.self_attn, x))
        inside = (norm(layer.norm2, x) if norm_first else x) @ layer.linear1.weight.T + layer.linear1.bias
        x = x + inside.clamp(min=0) @ layer.linear2.weight.T + layer.linear2.bias
        x = x if norm_first else norm(layer.norm2, x)
    x = norm(model.norm, x) if norm_first else x
    return x @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_equals_the_slow_reference(norm_first, tie_embeddings):
    model, batch = network(norm_first=norm_first, tie_embeddings=tie_embeddings), tokens()
    expected = torch.stack([reference(model, sequence, norm_first) for sequence in batch])
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-6)  # positions are in single precision
    assert model.eval()(batch).sub(expected).abs().max() < 1e-6
    with torch.no_grad():  # torch has another kernel for this case
        assert model(batch).sub(expected).abs().max() < 1e-6


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_looks_at_no_later_token(grad, training):
    model, batch = network().train(training), tokens()
    other = batch.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    with torch.set_grad_enabled(grad):
        first, second = model(batch), model(other)
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=0, atol=1e-12)
    assert (first[:, 4:] - second[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_attention_is_causal_without_a_mask(monkeypatch):
    original, calls = F.scaled_dot_product_attention, []

    def recording(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return original(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    for model in (network(), network(norm_first=True).eval(), network(dropout=0.5)):
        calls.clear()
        model(tokens())
        assert calls == [(None, True)] * 2


def test_positions_are_sines_and_cosines():
    table = sinusoids(5, 6)
    assert table.shape == (5, 6)
    assert table.dtype == torch.float32
    for p in range(5):
        for i in range(3):
            assert table[p, 2 * i].item() == pytest.approx(math.sin(p / 10000 ** (2 * i / 6)), abs=1e-7)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(p / 10000 ** (2 * i / 6)), abs=1e-7)


def test_same_token_at_two_positions_and_in_two_rows():
    logits = network()(torch.full((2, 3), 5))
    torch.testing.assert_close(logits[0], logits[1])  # by position, not by row
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-3


def test_layers_start_unequal_and_checkpoints_hold_no_positions():
    model = Transformer(**SMALL)
    first, second = (dict(layer.named_parameters()) for layer in model.layers)
    assert [name for name in first if torch.equal(first[name], second[name])] == [
        "self_attn.in_proj_bias", "self_attn.out_proj.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"
    ]  # fmt: skip
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_embeddings_start_as_torchs_own_and_tied_ones_as_the_output_layers():
    model = Transformer(2000, width=16)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    tied = Transformer(2000, width=16, tie_embeddings=True)
    assert tied.embedding.weight is tied.head.weight
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tied.parameters()) == 2000 * 16
    assert tied.head.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.01)


def test_dropouts_are_where_they_should_be():
    model = Transformer(**SMALL, dropout=0.25, position_dropout=0.5)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("dropout") == 0.5
    assert set(rates.values()) == {0.25}
    assert [layer.self_attn.dropout for layer in model.layers] == [0.25, 0.25]
    seen = []
    model.dropout.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    model(tokens())
    assert (seen[1] == 0).any()
    torch.testing.assert_close(seen[1][seen[1] != 0], 2 * seen[0][seen[1] != 0])
    torch.testing.assert_close(seen[0], model.embedding(tokens()) + sinusoids(7, 8))


@pytest.mark.parametrize(("settings", "count"), [({}, 8_948_990), ({"tie_embeddings": True}, 4_689_406)])
def test_size_with_the_words_of_wikitext2(settings, count):
    with torch.device("meta"):
        model = Transformer(33_278, **settings)
        assert model(torch.zeros(2, 512, dtype=torch.int64)).shape == (2, 512, 33_278)
    assert sum(p.numel() for p in model.parameters()) == count


def test_half_precision():
    model = network().bfloat16()
    assert model(tokens()).dtype == torch.bfloat16
    with torch.no_grad():
        assert model.eval()(tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "Expected `dropout` to be a number in [0, 1), got 1.0."),
        ({"position_dropout": -0.1}, "Expected `position_dropout` to be a number in [0, 1), got -0.1."),
        ({"num_heads": 3}, "Expected `width` to be a multiple of `num_heads` = 3, got 8."),
        ({"width": 9, "num_heads": 3}, "Expected `width` to be even, one sine for each cosine, got 9."),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Transformer(**{**SMALL, **settings})
