"""From noise to sentences: samplers are generators of one signature, and somebody else prints.

    sampler(denoise, diffusion, noise) yields a Step for each kept timestep, from the noisiest to t = 0

`denoise(x_t, t, previous)` predicts x_0; `previous` is its own last prediction, which self-conditioning uses.
`noise(s)` gives the (B, L, D) standard normal draws of kept step s; noise(S), S the number of steps, is the start.
The result is the last prediction of x_0: q's first noise is never decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from text_diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
NoiseSource = Callable[[int], Tensor]
SAMPLERS = ("ancestral", "ddim")


@dataclass(frozen=True)
class Step:
    """One network call: the timestep of training it stands for, its input and its prediction, both (B, L, D)."""

    t: int
    x_t: Tensor
    pred_xstart: Tensor


def ancestral(denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource) -> Iterator[Step]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2): x_{t-1} ~ p(x_{t-1} | x_t)."""
    return _walk(denoise, diffusion, noise, diffusion.p_mean_variance)


def ddim(denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (arXiv 2010.02502): with eta = 0 nothing is random but the start; with eta = 1 it is ancestral sampling."""
    return _walk(denoise, diffusion, noise, partial(diffusion.ddim_mean_variance, eta=eta))


def _walk(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    noise: NoiseSource,
    reverse: Callable[[Tensor, Tensor, Tensor], Gaussian],
) -> Iterator[Step]:
    """x_T from noise, then x_{t-1} ~ reverse(x_0 prediction, x_t, t) down to t = 0."""
    x_t = noise(diffusion.num_timesteps)
    pred_xstart = None
    for s in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), s, device=x_t.device)
        pred_xstart = denoise(x_t, t, pred_xstart)
        yield Step(diffusion.timesteps[s], x_t, pred_xstart)
        if s > 0:
            x_t = reverse(pred_xstart, x_t, t).sample(noise(s))
