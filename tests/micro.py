"""A language that can be enumerated, 6 words and 4 of them a sentence, and a small model trained on it in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from text_diffusion.bound import Posterior
from text_diffusion.config import ModelConfig
from text_diffusion.cross_entropy import WordDenoiser, cross_entropy_loss
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, diffusion_lm_loss
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.schedules import named_betas

V, L, D, T = 6, 4, 2, 1000


@dataclass(frozen=True)
class Micro:
    """The sentences with their probabilities (a Markov chain), and the model."""

    sentences: Tensor  # (1296, L)
    p: Tensor  # (1296,)
    model: TransformerNetModel
    diffusion: GaussianDiffusion

    @cached_property
    def x_start_mean(self) -> Tensor:
        return self.model.get_embeds(self.sentences)

    def posterior(self, process: GaussianDiffusion) -> Posterior:
        return Posterior(process, 1 - self.diffusion.alphas_cumprod[0] if self.model.noisy_start else 0.0)


def train_micro(words: bool = False, steps: int = 800, batch_size: int = 128) -> Micro:
    """Self-conditioned; the words stay on a circle, so that the model's size goes into what it is tested for.

    By the objective `cross_entropy` if `words` says so, else by that of Diffusion-LM.
    """
    torch.manual_seed(0)
    sentences = torch.tensor(list(product(range(V), repeat=L)))
    first, follows = (torch.randn(V) / 2).softmax(0), (torch.randn(V, V) / 2).softmax(1)
    p = first[sentences[:, 0]] * follows[sentences[:, :-1], sentences[:, 1:]].prod(dim=1)

    config = ModelConfig(in_channel=D, hidden_size=16, num_layers=1, num_heads=2, num_channels=16, neighbours=0)
    diffusion = GaussianDiffusion(named_betas("log-snr", 10 * T) if words else named_betas("sqrt", T))
    model = WordDenoiser(config, V, L) if words else TransformerNetModel(config, V, L)
    angles = torch.arange(V) * (2 * torch.pi / V)
    model.word_embedding.weight.data = 4 * torch.stack([angles.cos(), angles.sin()], dim=1)
    model.lm_head.weight = model.word_embedding.weight.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        model.progress = step / steps
        ids = sentences[p.multinomial(batch_size, replacement=True)]
        noise = Noise(*torch.randn(2, batch_size, L, D))
        t = torch.randint(diffusion.num_timesteps, (batch_size,))
        if isinstance(model, WordDenoiser):
            loss = cross_entropy_loss(model, diffusion, ids, t, noise).total().mean()
        else:
            loss = diffusion_lm_loss(model, diffusion, ids, t, noise).total().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return Micro(sentences, p, model.eval().requires_grad_(False), diffusion)
