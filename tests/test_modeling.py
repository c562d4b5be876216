"""The denoiser against independent encoders (transformers' BERT, torch's own) and the original's forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

from text_diffusion import original
from text_diffusion.config import ModelConfig
from text_diffusion.modeling import (
    EncoderLayer,
    TransformerNetModel,
    timestep_embedding,
)

SMALL: dict[str, Any] = {
    "in_channel": 6,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_channels": 10,
    "neighbours": 0,
}
V, L, B = 13, 9, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, so that none hides behind the 0 or 1 that it starts from."""
    noise = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return module


def network(**options: Any) -> TransformerNetModel:
    torch.manual_seed(0)
    model = TransformerNetModel(ModelConfig(**SMALL | options), V, L)
    shaken(model)
    return model.eval()


def inputs(batch: int = B, length: int = L) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, timesteps and a previous estimate."""
    x_t, x_self = torch.randn(2, batch, length, SMALL["in_channel"], generator=generator(1))
    return x_t, 1000 * torch.rand(batch, generator=generator(2)), x_self


def bert_encoder(config: ModelConfig) -> nn.Module:
    encoder: nn.Module = BertEncoder(
        BertConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.hidden_size,
            hidden_act=config.activation,
            layer_norm_eps=1e-12,
        )
    )
    return shaken(encoder).eval()


def sinusoids(timesteps: Tensor, dim: int) -> Tensor:
    """timestep_embedding in NumPy, one entry at a time."""
    half = dim // 2
    rows = []
    for t in timesteps.double().tolist():
        angles = [t / 10_000 ** (i / half) for i in range(half)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2))
    return torch.tensor(rows, dtype=torch.float32)


def forward_by_hand(
    weights: dict[str, Tensor], encoder: Callable[[Tensor], Tensor], x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The original's forward pass: three inputs summed, normed, encoded; two linear maps with tanh around it all."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    time = sinusoids(timesteps, weights["time_embed.0.weight"].shape[1])
    time = linear("time_embed.0", time)
    time = linear("time_embed.2", time * torch.sigmoid(time))
    words = linear("input_up_proj.2", torch.tanh(linear("input_up_proj.0", x_t)))
    h = weights["position_embeddings.weight"][: x_t.shape[1]][None] + words + time[:, None]
    h = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True, unbiased=False)
    h = encoder(h * weights["LayerNorm.weight"] + weights["LayerNorm.bias"])
    return linear("output_down_proj.2", torch.tanh(linear("output_down_proj.0", h)))


# Encoders


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_post_norm_is_bert(activation: str) -> None:
    """The same numbers as transformers' BertEncoder with the same weights, exact GELU and ReLU."""
    config = ModelConfig(**SMALL | {"norm": "post", "activation": activation})
    bert = bert_encoder(config)
    ours = nn.Sequential(*(EncoderLayer(config) for _ in range(config.num_layers))).eval()
    for n, layer in enumerate(ours):
        layer.load_state_dict(original.bert_layer(bert.state_dict(), f"layer.{n}."))
    h = torch.randn(B, L, config.hidden_size, generator=generator())
    torch.testing.assert_close(ours(h), bert(h).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [L, 4])
def test_forward_is_the_original_s(length: int) -> None:
    """A state dict with the original's names, converted, does what the original's formulas and BERT do with it."""
    H, C, D = 24, 16, 6
    bert = bert_encoder(ModelConfig(hidden_size=H, num_layers=3, num_heads=12, activation="gelu", norm="post"))
    shapes = {
        "time_embed.0": (4 * C, C),
        "time_embed.2": (H, 4 * C),
        "input_up_proj.0": (H, D),
        "input_up_proj.2": (H, H),
        "output_down_proj.0": (H, H),
        "output_down_proj.2": (D, H),
        "lm_head": (V, D),
    }
    state = {f"input_transformers.{name}": tensor for name, tensor in bert.state_dict().items()}
    state["position_ids"] = torch.arange(L)[None]
    state["word_embedding.weight"] = torch.randn(V, D, generator=generator(3))
    state["position_embeddings.weight"] = torch.randn(L, H, generator=generator(4))
    state["LayerNorm.weight"], state["LayerNorm.bias"] = torch.randn(2, H, generator=generator(5))
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator(10 + i)) / math.sqrt(columns)
        state[f"{name}.bias"] = torch.randn(rows, generator=generator(30 + i))

    config, ours = original.convert(state)
    model = TransformerNetModel(config, V, L).eval()
    model.load_state_dict(ours | {"lm_head.weight": ours["word_embedding.weight"]})
    x_t = torch.randn(B, length, D, generator=generator(6))
    timesteps = torch.tensor([0.0, 0.5, 17.0, 500.0, 999.5])
    expected = forward_by_hand(state, lambda h: bert(h).last_hidden_state, x_t, timesteps)
    # angles of up to 999.5 in float32 are good to 3e-5
    torch.testing.assert_close(model(x_t, timesteps), expected, rtol=1e-4, atol=1e-4)
    logits = x_t @ state["word_embedding.weight"].T + state["lm_head.bias"]
    torch.testing.assert_close(model.get_logits(x_t), logits)


def torch_layer(config: ModelConfig, layer: nn.Module) -> nn.Module:
    """torch's encoder layer with our layer's weights."""
    theirs = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_heads,
        4 * config.hidden_size,
        dropout=0.0,
        activation=config.activation,
        layer_norm_eps=1e-12,
        batch_first=True,
        norm_first=config.norm == "pre",
    )
    names = {
        "qkv.": "self_attn.in_proj_",
        "attention_output.": "self_attn.out_proj.",
        "intermediate.": "linear1.",
        "output.": "linear2.",
        "attention_norm.": "norm1.",
        "output_norm.": "norm2.",
    }
    state = layer.state_dict()
    theirs.load_state_dict({new + kind: state[old + kind] for old, new in names.items() for kind in ("weight", "bias")})
    return theirs.train()  # no dropout to switch off, and no fast path that would be a third implementation


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layer_is_torch_s(norm: str, activation: str) -> None:
    config = ModelConfig(**SMALL | {"norm": norm, "activation": activation})
    layer = shaken(EncoderLayer(config))
    h = torch.randn(B, L, config.hidden_size, generator=generator())
    torch.testing.assert_close(layer(h), torch_layer(config, layer)(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_forward_around_torch_s_encoder(norm: str, self_condition: bool) -> None:
    """The whole of our own shapes too: pre-norm has one more norm at the end, self-conditioning a second input."""
    model = network(norm=norm, self_condition=self_condition)
    x_t, timesteps, x_self = inputs()

    def encoder(h: Tensor) -> Tensor:
        for layer in model.layers:
            h = torch_layer(model.config, layer)(h)
        last: Any = model.final_norm
        return F.layer_norm(h, h.shape[-1:], last.weight, last.bias, 1e-12) if norm == "pre" else h

    seen = torch.cat([x_t, x_self], dim=-1) if self_condition else x_t
    expected = forward_by_hand(model.state_dict(), encoder, seen, timesteps)
    torch.testing.assert_close(model(x_t, timesteps, x_self), expected, rtol=1e-4, atol=1e-4)


# What enters and what comes out


def test_head_is_tied() -> None:
    model = network()
    assert model.lm_head.weight is model.word_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "word_embedding.weight" in names
    assert "lm_head.weight" not in names
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.state_dict().values()) - V * 6


def test_embeddings_and_logits() -> None:
    model = network()
    ids = torch.randint(V, (B, L), generator=generator())
    embeddings = model.word_embedding.weight
    assert torch.equal(model.get_embeds(ids), embeddings[ids])
    x = torch.randn(B, L, 6, generator=generator())
    torch.testing.assert_close(model.get_logits(x), x @ embeddings.T + model.lm_head.bias)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_permuting_the_batch_permutes_the_output(norm: str) -> None:
    model = network(norm=norm)
    x_t, timesteps, x_self = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = model(x_t, timesteps, x_self)
    torch.testing.assert_close(model(x_t[order], timesteps[order], x_self[order]), whole[order], rtol=1e-5, atol=1e-6)


def test_every_position_sees_every_other() -> None:
    """Attention goes both ways, and positions are told apart."""
    model = network(num_layers=1)
    x_t, timesteps, x_self = inputs(batch=1)
    x_t.requires_grad_()
    out = model(x_t, timesteps, x_self)
    for i in range(L):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x_t, retain_graph=True)
        assert bool((grad[0].abs().sum(dim=-1) > 0).all())
    swapped = model(x_t.flip(1), timesteps, x_self.flip(1)).flip(1)
    assert not torch.allclose(swapped, out, atol=1e-3)


def test_time_matters() -> None:
    model = network()
    x_t, timesteps, _ = inputs()
    assert not torch.allclose(model(x_t, timesteps), model(x_t, timesteps + 1), atol=1e-3)


def test_previous_estimate_matters_and_none_is_zeros() -> None:
    model = network(self_condition=True)
    x_t, timesteps, x_self = inputs()
    without = model(x_t, timesteps)
    assert torch.equal(without, model(x_t, timesteps, torch.zeros_like(x_t)))
    assert not torch.allclose(without, model(x_t, timesteps, x_self), atol=1e-3)


def test_previous_estimate_is_no_input_without_self_conditioning() -> None:
    model = network(self_condition=False)
    x_t, timesteps, x_self = inputs()
    assert torch.equal(model(x_t, timesteps), model(x_t, timesteps, x_self))
    assert [m.state_dict()["input_up_proj.0.weight"].shape[1] for m in (network(), model)] == [12, 6]


def test_shorter_sentences_use_the_first_positions() -> None:
    model = network()
    x_t, timesteps, _ = inputs(length=4)
    before = model(x_t, timesteps)
    with torch.no_grad():
        model.position_embeddings.weight[4:] += 1
    assert torch.equal(model(x_t, timesteps), before)
    with torch.no_grad():
        model.position_embeddings.weight[3] += torch.randn(24, generator=generator())
    assert not torch.allclose(model(x_t, timesteps), before, atol=1e-3)


# Time


@pytest.mark.parametrize("dim", [2, 3, 16, 127, 128])
def test_timestep_embedding_formula(dim: int) -> None:
    timesteps = torch.tensor([0.0, 0.5, 1.0, 33.3, 999.5])
    ours = timestep_embedding(timesteps, dim)
    assert ours.shape == (5, dim)
    torch.testing.assert_close(ours, sinusoids(timesteps, dim), rtol=0, atol=1e-4)


def test_timesteps_are_told_apart() -> None:
    """Any two of 0, 0.5, ..., 1000 (T = 2000) have embeddings that differ by much more than rounding."""
    embeddings = timestep_embedding(torch.arange(2001) / 2, 128)
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    assert float(distances.min()) > 0.5


# Training


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    model = network(dropout=0.3)
    x_t, timesteps, x_self = inputs()
    model.eval()
    quiet = model(x_t, timesteps, x_self)
    assert torch.equal(quiet, model(x_t, timesteps, x_self))
    model.train()
    one, two = model(x_t, timesteps, x_self), model(x_t, timesteps, x_self)
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(one, quiet, atol=1e-3)


def test_no_dropout_by_default() -> None:
    model, (x_t, timesteps, x_self) = network(), inputs()
    assert torch.equal(model.train()(x_t, timesteps, x_self), model.eval()(x_t, timesteps, x_self))


def test_dropout_is_where_bert_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embeddings, the attention's weights and output, and the feed-forward output: the original's 0.1."""
    model = network(dropout=0.3)
    places: list[float] = []

    torch_s = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        places.append(dropout_p)
        return torch_s(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, x, y: places.append(m.p if m.training else 0.0))
    x_t, timesteps, _ = inputs()
    model.train()(x_t, timesteps)
    assert places == [0.3] * (1 + 3 * SMALL["num_layers"])
    places.clear()
    model.eval()(x_t, timesteps)
    assert places == [0.0] * (1 + 3 * SMALL["num_layers"])


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradient_reaches_every_parameter(norm: str, self_condition: bool) -> None:
    model = network(norm=norm, self_condition=self_condition)
    x_t, timesteps, x_self = inputs()
    prediction = model(x_t, timesteps, x_self)
    (prediction.square().sum() + model.get_logits(prediction).square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
