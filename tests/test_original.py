"""The original's files: read, given their settings and vocabulary, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from toy import (
    contents,
    refused,
    sampled,
)

import text_diffusion


def original_state(vocab_size: int, layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the original's denoiser: D = 8, H = 24, C = 16, L = 10."""
    generator = torch.Generator().manual_seed(seed)
    D, H, C, L = 8, 24, 16, 10

    def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, Tensor]:
        return {
            f"{name}.weight": scale * inputs**-0.5 * torch.randn(outputs, inputs, generator=generator),
            f"{name}.bias": 0.1 * torch.randn(outputs, generator=generator),
        }

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(H), f"{name}.bias": torch.zeros(H)}

    state = {"position_ids": torch.arange(L)[None]}
    state |= linear("time_embed.0", C, 4 * C) | linear("time_embed.2", 4 * C, H)
    state |= linear("input_up_proj.0", D, H) | linear("input_up_proj.2", H, H, scale=5)
    state |= linear("output_down_proj.0", H, H) | linear("output_down_proj.2", H, D, scale=5)
    for n in range(layers):
        layer = f"input_transformers.layer.{n}"
        for part in ("query", "key", "value"):
            state |= linear(f"{layer}.attention.self.{part}", H, H)
        state |= linear(f"{layer}.attention.output.dense", H, H) | norm(f"{layer}.attention.output.LayerNorm")
        state |= linear(f"{layer}.intermediate.dense", H, 4 * H)
        state |= linear(f"{layer}.output.dense", 4 * H, H) | norm(f"{layer}.output.LayerNorm")
    state |= norm("LayerNorm") | linear("lm_head", D, vocab_size)
    state["word_embedding.weight"] = torch.randn(vocab_size, D, generator=generator)
    state["position_embeddings.weight"] = torch.randn(L, H, generator=generator)
    state["lm_head.weight"] = torch.randn(vocab_size, D, generator=generator)  # stale, as in its EMA files
    return state


def original_vocabulary(pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """A word-level vocabulary as the original makes one: other ids for the special tokens, no decoder."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "red", "blue", "apple", "fig", "is", "ripe", "."]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(words[:5])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return backend


ARGS = {"diffusion_steps": 40, "noise_schedule": "sqrt", "sequence_len": 9, "rescale_timesteps": True, "num_heads": 4}


@pytest.fixture(params=["Whitespace", "BertPreTokenizer"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Files of the original: weights with their settings beside them, and the vocabulary, elsewhere."""
    backend = original_vocabulary(getattr(pre_tokenizers, request.param)())
    vocab = tmp_path / "data" / "word-level-vocab.json"
    vocab.parent.mkdir()
    backend.save(str(vocab))
    weights = tmp_path / "ckpts" / "ema_0.9999_025001.pt"
    weights.parent.mkdir()
    torch.save(original_state(backend.get_vocab_size()), weights)
    (weights.parent / "training_args.json").write_text(json.dumps(ARGS))
    return weights, vocab


def test_original_is_sampled_from(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    sentences = sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20)
    words = [word for sentence in sentences for word in sentence.split(" ") if word]
    assert set(words) <= set(tokenizers.Tokenizer.from_file(str(vocab)).get_vocab())
    assert len(set(words)) > 4
    assert not any(word.startswith("[") for word in words)
    model = text_diffusion.generation.load_diffusion(weights, tokenizer=str(vocab))
    assert sentences == model.sample(30, steps=20)
    assert (model.sequence_len, model.diffusion.num_timesteps, model.diffusion.time_scale) == (9, 40, 25.0)
    assert (model.model.config.num_heads, model.model.config.num_layers, model.model.config.norm) == (12, 2, "post")


def test_original_s_time_scale(original: tuple[Path, Path]) -> None:
    """Unscaled timesteps if it was trained so."""
    weights, vocab = original
    weights.with_name("training_args.json").write_text(json.dumps(ARGS | {"rescale_timesteps": False}))
    assert text_diffusion.generation.load_diffusion(weights, tokenizer=str(vocab)).diffusion.time_scale == 1


def test_original_s_stale_head_is_ignored(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    sentences = sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20)
    state = contents(weights)
    torch.save(state | {"lm_head.weight": torch.zeros_like(state["lm_head.weight"])}, weights)
    assert sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20) == sentences
    embedding = state["word_embedding.weight"].flip(0)
    torch.save(state | {"word_embedding.weight": embedding}, weights)
    assert sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20) != sentences


def test_original_needs_its_vocabulary(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    assert "give its file as --tokenizer FILE" in refused(capsys, weights)
    torch.save(original_state(20), weights)
    assert "expected a tokenizer with 20 tokens, found one with 13" in refused(capsys, weights, tokenizer=vocab)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (None, "need their training_args.json beside them"),
        ("{", "expected the original's settings"),
        ("[]", "expected the original's settings"),
        ("null", "expected the original's settings"),
        (json.dumps(ARGS | {"noise_schedule": "nope"}), "'nope'"),
        (json.dumps(ARGS | {"diffusion_steps": "many"}), "'many'"),
        *(
            (json.dumps({key: value for key, value in ARGS.items() if key != name}), f"found a problem with '{name}'")
            for name in ("diffusion_steps", "noise_schedule", "sequence_len")
        ),
    ],
)
def test_original_needs_its_settings(
    args: str | None, message: str, original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, vocab = original
    settings = weights.with_name("training_args.json")
    settings.unlink()
    if args is not None:
        settings.write_text(args)
    assert message in refused(capsys, weights, tokenizer=vocab)


@pytest.mark.parametrize(
    "name", ["word_embedding.weight", "lm_head.bias", "input_transformers.layer.1.output.dense.bias"]
)
def test_original_with_a_part_missing(
    name: str, original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, vocab = original
    torch.save({key: value for key, value in contents(weights).items() if key != name}, weights)
    assert name in refused(capsys, weights, tokenizer=vocab)
