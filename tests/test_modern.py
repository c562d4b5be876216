"""The modern layers against Qwen3's in transformers and against their formulas, and their commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import HAS_BF16, everything, flags, metrics, one_sentence, same, stop_at, train_flags
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

import text_diffusion
from text_diffusion import checkpoint, config, sample, train
from text_diffusion.autoregressive import CausalTransformer
from text_diffusion.config import ModelConfig
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.masked import MaskedTransformer
from text_diffusion.modeling import Transformer, TransformerNetModel
from text_diffusion.modern import EPS, ModernLayer, feed_forward_width, modulated, rotated, rotation
from text_diffusion.objectives import OBJECTIVES

SMALL: dict[str, Any] = {
    "denoiser": "modern",
    "in_channel": 6,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "neighbours": 0,
}
V, L, B, H, A = 13, 9, 5, 24, 3
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(kind: type[Transformer] = TransformerNetModel, shaken: bool = True, **options: Any) -> Any:
    """With every weight random, so that none hides behind the 0 or 1 that it starts from; or as it starts."""
    torch.manual_seed(0)
    model = kind(ModelConfig(**SMALL | options), V, L).eval()
    if shaken:
        shake(model)
    return model


def shake(module: nn.Module) -> None:
    noise = generator(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))


def inputs(length: int = L) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, timesteps and a previous estimate."""
    x_t, x_self = torch.randn(2, B, length, 6, generator=generator(1))
    return x_t, 1000 * torch.rand(B, generator=generator(2)), x_self


# The parts


def test_rotation_knows_relative_positions_only() -> None:
    """<R^m q, R^n k> depends on m - n, and does depend on it; R keeps lengths."""
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator())
    turns = rotation(40, 8, CPU).double()
    products = rotated(q.expand(40, 8), turns) @ rotated(k.expand(40, 8), turns).T  # (m, n)
    for offset in range(-8, 9):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)
    assert len({round(float(products[0, n]), 3) for n in range(9)}) == 9
    torch.testing.assert_close(rotated(q.expand(40, 8), turns).norm(dim=1), q.norm().expand(40), rtol=0, atol=1e-6)
    assert torch.equal(rotated(q.expand(40, 8), turns)[0], q), "position 0 is not turned"


def test_rotation_is_that_of_complex_numbers() -> None:
    """x_i + sqrt(-1) x_{i + size/2} times e^(sqrt(-1) m theta_i), theta_i = 10,000^(-2i / size), in NumPy."""
    x = torch.randn(2, 7, 10, generator=generator())
    z = x[..., :5].double().numpy() + 1j * x[..., 5:].double().numpy()
    theta = 10_000.0 ** (-2 * np.arange(5) / 10)
    z = z * np.exp(1j * np.arange(7)[:, None] * theta)
    expected = torch.from_numpy(np.concatenate([z.real, z.imag], axis=-1)).float()
    torch.testing.assert_close(rotated(x, rotation(7, 10, CPU)), expected, rtol=1e-5, atol=1e-5)


def test_modulated_is_rms_norm() -> None:
    h, scale, shift = torch.randn(3, B, L, H, generator=generator())
    rms = h / (h.square().mean(dim=-1, keepdim=True) + EPS).sqrt()  # eq. (2)
    torch.testing.assert_close(rms, F.rms_norm(h, (H,), eps=EPS))
    torch.testing.assert_close(modulated(h, scale, shift), rms * (1 + scale) + shift)
    nothing = torch.zeros(H)
    torch.testing.assert_close(modulated(3 * h, nothing, nothing), rms, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_is_qwen_s(causal: bool) -> None:
    """With the gates open and no shift: pre-norm, QK-norm, rotary, gated, without biases."""
    settings = ModelConfig(**SMALL)
    layer = ModernLayer(settings, width := feed_forward_width(settings, timed=False), causal).eval()
    shake(layer)
    with torch.no_grad():
        layer.table[[0, 3]] = 0.0  # shifts
        layer.table[[2, 5]] = 1.0  # gates
    theirs_config = Qwen3Config(
        hidden_size=H, intermediate_size=width, num_attention_heads=A, num_key_value_heads=A, head_dim=H // A,
        rms_norm_eps=EPS, hidden_act="silu", attention_bias=False, num_hidden_layers=1, max_position_embeddings=L,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs = Qwen3DecoderLayer(theirs_config, 0).eval()
    q, k, v = layer.qkv.weight.detach().chunk(3)
    gate, up = layer.gate_and_up.weight.detach().chunk(2)
    theirs.load_state_dict(
        {
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": layer.attention_output.weight,
            "self_attn.q_norm.weight": layer.q_norm.weight,
            "self_attn.k_norm.weight": layer.k_norm.weight,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.down.weight,
            "input_layernorm.weight": 1 + layer.table[1],
            "post_attention_layernorm.weight": 1 + layer.table[4],
        }
    )
    h = torch.randn(B, L, H, generator=generator())
    turns = Qwen3RotaryEmbedding(theirs_config)(h, torch.arange(L)[None])
    mask = torch.full((L, L), -math.inf).triu(1)[None, None] if causal else None
    expected = theirs(h, attention_mask=mask, position_embeddings=turns)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(layer(h, rotation(L, H // A, CPU), None), expected, rtol=1e-4, atol=1e-5)


def test_time_modulates_as_the_formula_says() -> None:
    """Eqs. (1) and (3), its six parts by name."""
    model = network()
    layer, time = model.layers[0], torch.randn(B, 1, H, generator=generator())
    h, turns = torch.randn(B, L, H, generator=generator(3)), rotation(L, H // A, CPU)
    parts = layer.table + (F.silu(time) @ model.time_modulation.linear.weight.T).view(B, 1, 6, H)
    b_1, s_1, g_1, b_2, s_2, g_2 = (parts[:, :, i] for i in range(6))
    expected = h + g_1 * layer.attention(F.rms_norm(h, (H,), eps=EPS) * (1 + s_1) + b_1, turns)
    expected = expected + g_2 * layer.feed_forward(F.rms_norm(expected, (H,), eps=EPS) * (1 + s_2) + b_2)
    torch.testing.assert_close(layer(h, turns, model.time_modulation(time)), expected)


# The networks


@pytest.mark.parametrize("kind", [TransformerNetModel, WordDenoiser, MaskedTransformer, CausalTransformer])
def test_each_layer_starts_as_the_identity(kind: type[Transformer]) -> None:
    fresh, moved = network(kind, shaken=False), network(kind)
    h, turns = torch.randn(B, L, H, generator=generator()), rotation(L, H // A, CPU)
    for layer, other in zip(fresh.layers, moved.layers, strict=True):
        assert torch.equal(layer(h, turns, None), h)
        assert not torch.allclose(other(h, turns, None), h, atol=0.1)
    time = torch.randn(B, 1, H, generator=generator()) if fresh.timed else None
    assert torch.equal(fresh.encode(h, time), fresh.final_norm(h))
    if fresh.timed:
        x_t, timesteps, _ = inputs()
        assert torch.equal(fresh.time_modulation(time), torch.zeros(B, 1, 6, H))
    if kind is TransformerNetModel:
        assert torch.equal(fresh(x_t, timesteps), fresh(x_t, timesteps / 2)), "it does not know the time yet"
        assert not torch.allclose(moved(x_t, timesteps), moved(x_t, timesteps / 2), atol=1e-3)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("size", ["small", "base"])
def test_as_many_parameters_as_bert_s(objective: str, size: str) -> None:
    """Within 2 % at the named sizes, and with 1 and 6 layers."""
    sizes = {name: value for name, value in config.SIZES[size].items() if name in ModelConfig.__dataclass_fields__}
    for layers in (sizes["num_layers"], 1, 6):
        counts = []
        for denoiser in ("bert", "modern"):
            settings = ModelConfig(**sizes | {"objective": objective, "denoiser": denoiser, "num_layers": layers})
            with torch.device("meta"):
                model = OBJECTIVES[objective].network(settings, 200, 16)
            counts.append(sum(parameter.numel() for parameter in model.parameters()))
        assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_every_position_sees_every_other_and_where_it_is() -> None:
    model = network(num_layers=1)
    x_t, timesteps, x_self = inputs()
    x_t.requires_grad_()
    out = model(x_t, timesteps, x_self)
    for i in range(L):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x_t, retain_graph=True)
        assert bool((grad[0].abs().sum(dim=-1) > 0).all())
    swapped = model(x_t.flip(1), timesteps, x_self.flip(1)).flip(1)
    assert not torch.allclose(swapped, out, atol=1e-3)


def test_neither_neighbours_in_the_batch_nor_room_for_more_have_an_influence() -> None:
    """A sentence comes out the same whatever stands beside it and however long sentences may be."""
    model, (x_t, timesteps, x_self) = network(), inputs(length=4)
    whole = model(x_t, timesteps, x_self)
    alone = model(x_t[2:3], timesteps[2:3], x_self[2:3])
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-5, atol=1e-5)
    longer = TransformerNetModel(model.config, V, 50).eval()
    longer.load_state_dict(model.state_dict())  # no table whose length could differ
    assert torch.equal(longer(x_t, timesteps, x_self), whole)


def test_no_position_sees_what_follows() -> None:
    """So that pads after a sentence change nothing in it, of the network that writes from left to right."""
    model, ids = network(CausalTransformer), torch.randint(V, (1, L), generator=generator())
    before = model(ids)
    for position in range(1, L):
        changed = ids.clone()
        changed[0, position:] = (ids[0, position:] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:], atol=1e-3)


@pytest.mark.parametrize("kind", [TransformerNetModel, WordDenoiser, MaskedTransformer, CausalTransformer])
def test_gradient_reaches_every_parameter(kind: type[Transformer]) -> None:
    """With gradient checkpointing the same."""
    model, (x_t, timesteps, x_self) = network(kind), inputs()
    ids = torch.randint(V, (B, L), generator=generator())
    grads = []
    for again in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = again
        out = model.log_probs(x_t, timesteps, x_self) if model.timed else model(ids).log_softmax(dim=-1)
        out.gather(2, ids[:, :, None]).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        if name == "hidden_embedding":
            continue  # no word is hidden here
        assert grad is not None, name
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.skipif(not HAS_BF16, reason="no bf16 on this processor")
def test_half_the_digits() -> None:
    model, (x_t, timesteps, x_self) = network(), inputs()
    with torch.no_grad():
        whole = model(x_t, timesteps, x_self)
        with torch.autocast("cpu", torch.bfloat16):
            short = model(x_t, timesteps, x_self)
    assert float((short.float() - whole).norm() / whole.norm()) < 0.05


# The commands


def options_for(objective: str, **more: Any) -> dict[str, Any]:
    """Toy sizes without what the objective refuses."""
    names: dict[str, Any] = {"batch_size": 8, "hidden_size": 16, "num_heads": 2, "in_channel": 8, "eval_interval": 0}
    names |= {"denoiser": "modern", "num_layers": 2, "ema_rate": 0.9, "steps": 6, "objective": objective}
    return names | ({"diffusion_steps": 20} if objective == "diffusion_lm" else {}) | more


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_goes_on_bit_for_bit_and_writes(
    objective: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(objective, dropout=0.1, eval_interval=3)
    assert train.main(flags(dataset=corpus, checkpoint_path=tmp_path / "whole", **options)) == 0
    halves = flags(dataset=corpus, checkpoint_path=tmp_path / "halves", **options)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert train.main(halves) == 130
    assert train.main(halves) == 0
    assert same(everything(tmp_path / "whole", 6), everything(tmp_path / "halves", 6))
    assert metrics(tmp_path / "whole", validation=True) == metrics(tmp_path / "halves", validation=True)
    weights = tmp_path / "whole" / "ema_0.9_000006.pt"
    model = text_diffusion.load(str(weights))
    assert model.model.config.denoiser == "modern"
    assert isinstance(model.model.layers[0], ModernLayer)
    out = flags(model_name_or_path=weights, out_dir=tmp_path / "out", num_samples=3)
    assert sample.main(out + ([] if objective == "autoregressive" else ["--steps", "2"])) == 0


def test_it_learns(corpus: Path, tmp_path: Path) -> None:
    """The toy corpus, by the words' cross-entropy."""
    options = options_for(
        "cross_entropy", steps=50, lr=1e-2, warmup_steps=5, log_interval=10, hidden_size=32, batch_size=32
    )
    assert train.main(flags(dataset=corpus, checkpoint_path=tmp_path / "run", **options)) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]
    layers = checkpoint.read(tmp_path / "run" / "model000050.pt")["state"]
    assert float(layers["layers.0.table"][2].abs().max()) > 0.01, "the gates have opened"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "post"}, "--norm belongs to --denoiser bert: leave it out with --denoiser modern"),
        ({"activation": "gelu"}, "--activation belongs to --denoiser bert"),
        ({"hidden_size": 18}, "--denoiser modern expects an even number of entries in a head"),
    ],
)
def test_refused(
    options: dict[str, Any], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = train_flags(corpus, tmp_path / "run", denoiser="modern", steps=1, **options)
    assert train.main(argv) == 1
    assert message in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_size_s_activation_is_bert_s(corpus: Path) -> None:
    assert "activation" not in train.parse(["--size", "base", "--denoiser", "modern"])
    assert train.parse(["--size", "base"])["activation"] == "gelu"


def test_a_run_keeps_its_denoiser(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(train_flags(corpus, trained, steps=6, denoiser="modern")) == 1
    assert "was started with --denoiser bert, found modern" in one_sentence(capsys.readouterr().err)


def test_weights_of_the_other_denoiser_do_not_fit(trained: Path, tmp_path: Path) -> None:
    contents = checkpoint.read(trained / "model000006.pt")
    contents["model"]["denoiser"] = "modern"
    checkpoint.write(tmp_path / "mixed.pt", contents)
    with pytest.raises(text_diffusion.errors.UserError, match="do not fit"):
        text_diffusion.load(str(tmp_path / "mixed.pt"))
