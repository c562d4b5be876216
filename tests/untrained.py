"""A model with random weights that says different words for different noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from text_diffusion.config import ModelConfig
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Step
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import train_word_level

T, L = 50, 8


def build(self_condition: bool = True, time_scale: float | None = None) -> TextDiffusion:
    """Random weights, scaled up so that the network says different words for different noise.

    With this seed no word of the first 40 sentences wins by less than 0.001, so that rounding errors change none.
    """
    lines = [f"The {a} {b} is {c}." for a in ("red", "blue", "old") for b in ("apple", "fig") for c in ("ripe", "cold")]
    tokenizer = train_word_level(lines)
    torch.manual_seed(27)
    config = ModelConfig(
        in_channel=6,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_channels=8,
        neighbours=0,
        self_condition=self_condition,
    )
    model = TransformerNetModel(config, tokenizer.vocab_size, L)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                parameter.mul_(3)
    return TextDiffusion(
        model.eval(), GaussianDiffusion(named_betas("sqrt", T), time_scale=time_scale), tokenizer, L, {}
    )


def final(steps: Any) -> Tensor:
    """The last prediction of a walk."""
    return list[Step](steps)[-1].pred_xstart
