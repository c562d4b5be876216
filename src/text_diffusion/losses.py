"""The objective of Diffusion-LM, end to end (arXiv 2205.14217, eq. 2 and section 4.1, simplified as in its code)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.randomness import draw, normal


@dataclass(frozen=True)
class Noise:
    """The two draws of a training step, each (B, L, D): w -> x_0 and x_0 -> x_t."""

    start: Tensor
    t: Tensor

    @staticmethod
    def draw(key: tuple[int, ...], start: int, stop: int, shape: tuple[int, int], device: torch.device) -> Noise:
        """The noise of the sentences start..stop-1 of a batch; shape is (L, D)."""
        both = draw(normal, key, start, stop, (2, *shape), device)
        return Noise(both[:, 0], both[:, 1])


@dataclass(frozen=True)
class Terms:
    """The terms of the loss, each (B,): means over positions (pads included) and embedding entries."""

    mse: Tensor
    tT_loss: Tensor
    decoder_nll: Tensor

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,). `weights` correct for how t was drawn: they touch what depends on t."""
        return weights * self.mse + self.tT_loss + self.decoder_nll


def diffusion_lm_loss(
    model: TransformerNetModel,
    diffusion: GaussianDiffusion,
    input_ids: Tensor,
    t: Tensor,
    noise: Noise,
    condition: Tensor | None = None,
) -> Terms:
    """loss = mse + tT_loss + decoder_nll for sentences w (B, L) at timesteps t (B,), given a condition if there is one.

    A source is no part of w: there is no noise on it, and it has no share in the means.
    """
    x_start_mean = model.get_embeds(input_ids)  # E(w)
    x_start = diffusion.q_start(x_start_mean).sample(noise.start)  # x_0
    x_t = diffusion.q_sample(x_start, t, noise.t)

    # 1. || x_0 - f(x_t, t) ||^2; at t = 0 the target is E(w) itself, the embedding loss.
    timesteps = diffusion.network_time(t)
    prediction = model(x_t, timesteps, first_estimate(model, x_t, timesteps, condition), condition=condition)
    target = torch.where((t == 0)[:, None, None], x_start_mean, x_start)
    mse = mean_flat((target - prediction) ** 2)

    # 2. || sqrt(abar_{T-1}) x_0 ||^2: the mean of q(x_T | x_0), which should be near zero.
    last = torch.full_like(t, diffusion.num_timesteps - 1)
    tT_loss = mean_flat(diffusion.q_mean_variance(x_start, last).mean ** 2)

    # 3. -log softmax(lm_head(x_0))[w]: trains the embeddings to stay apart.
    decoder_nll = nll_of_words(model.get_logits(x_start), input_ids).mean(dim=1)

    return Terms(mse, tT_loss, decoder_nll)


def first_estimate(
    model: TransformerNetModel, x_t: Tensor, timesteps: Tensor, condition: Tensor | None = None
) -> Tensor | None:
    """What self-conditioning shows the network in training: of every second sentence a first estimate of its x_0.

    Analog Bits (arXiv 2208.04202, algorithm 1) tosses a coin; sentences come in random order, so that taking every
    second one is as good, costs half of a first pass, and keeps shapes fixed.
    """
    if not model.config.self_condition:
        return None
    with torch.no_grad():
        estimate = model.without_estimate(x_t, timesteps)
        half = None if condition is None else condition[::2]
        estimate[::2] = model(x_t.detach()[::2], timesteps[::2], condition=half).to(estimate.dtype)
    return estimate


def nll_of_words(logits: Tensor, input_ids: Tensor) -> Tensor:
    """-log softmax(logits)[w] at every position, logits (B, L, V), w (B, L) -> (B, L)."""
    # One word's scores after the other, as they lie in memory: several times faster than (B, V, L) on any device.
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids.flatten(), reduction="none").view(input_ids.shape)


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the first dimension, (B, ...) -> (B,)."""
    return x.float().flatten(1).mean(dim=1)
