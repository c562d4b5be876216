"""From noise to sentences: samplers are generators of one signature, and somebody else prints.

    sampler(denoise, diffusion, noise) yields a Step for each kept timestep, from the noisiest to t = 0

`denoise(x_t, t, previous)` predicts x_0; `previous` is its own last prediction, which self-conditioning uses.
`noise(s)` gives the (B, L, D) standard normal draws of kept step s; noise(S), S the number of steps, is the start.
The result is the last prediction of x_0: q's first noise is never decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
NoiseSource = Callable[[int], Tensor]


@dataclass(frozen=True)
class Step:
    """One network call: the timestep of training it stands for, its input and its prediction, both (B, L, D)."""

    t: int
    x_t: Tensor
    pred_xstart: Tensor


def ancestral(denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource) -> Iterator[Step]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2): x_{t-1} ~ p(x_{t-1} | x_t)."""
    x_t = noise(diffusion.num_timesteps)
    pred_xstart = None
    for s in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), s, device=x_t.device)
        pred_xstart = denoise(x_t, t, pred_xstart)
        yield Step(diffusion.timesteps[s], x_t, pred_xstart)
        if s > 0:
            x_t = diffusion.p_mean_variance(pred_xstart, x_t, t).sample(noise(s))
