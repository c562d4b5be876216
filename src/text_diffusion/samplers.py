"""From noise to sentences: samplers are generators of one signature, and somebody else prints.

    sampler(denoise, diffusion, noise) yields a Step for each network call, from the noisiest level to t = 0

`denoise(x_t, t, previous)` predicts x_0; `previous` is its own last prediction, which self-conditioning uses.
`noise(s)` gives the (B, L, D) standard normal draws of level s; noise(S), S the number of levels, is the start, and
what is drawn beyond that has numbers above S.
The result is the last prediction of x_0: q's first noise is never decoded. A denoiser that has a method `arrive`
(`Arriving`) may also move each x_s on its arrival.

`invert` goes the other way, from a sentence to the noise that the flow would make it of.

`ancestral` and `ddim` draw from p(x_{t-1} | x_t). `dpm_solver` and `heun` follow to second order the flow that has the
same marginals, dy/dr = (y - x_0) / r for y = x_t / alpha_t, r = sigma_t / alpha_t (arXiv 2206.00364, eq. 4), where
alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t); `ddim` with eta = 0 follows it to first order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from text_diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion
from text_diffusion.schedules import Array

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
NoiseSource = Callable[[int], Tensor]
SAMPLERS = ("auto", "ancestral", "ddim", "dpm-solver++", "heun")


@runtime_checkable
class Arriving(Protocol):
    """A denoiser that moves what the sampler arrives at."""

    def arrive(self, x_s: Tensor, mean: Tensor, s: int) -> Tensor:
        """Where to go on from at level s instead of x_s, drawn around `mean`; both (B, L, D)."""


@dataclass(frozen=True)
class Step:
    """One network call: the timestep of training it stands for, its input and its prediction, both (B, L, D)."""

    t: int
    x_t: Tensor
    pred_xstart: Tensor


def ancestral(
    denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource, visits: Sequence[int] | None = None
) -> Iterator[Step]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2): x_{t-1} ~ p(x_{t-1} | x_t).

    Args:
        denoise: see above.
        diffusion: the respaced process.
        noise: see above.
        visits: how many network calls each level takes, (S,), one if not given. In between, x_{t-1} goes back to x_t
            by q (RePaint, arXiv 2201.09865, algorithm 1), so that words that do not suit each other meet again.
    """
    return _walk(denoise, diffusion, noise, diffusion.p_mean_variance, visits)


def ddim(denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (arXiv 2010.02502): with eta = 0 nothing is random but the start; with eta = 1 it is ancestral sampling."""
    return _walk(denoise, diffusion, noise, partial(diffusion.ddim_mean_variance, eta=eta))


def _walk(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    noise: NoiseSource,
    reverse: Callable[[Tensor, Tensor, Tensor], Gaussian],
    visits: Sequence[int] | None = None,
) -> Iterator[Step]:
    """x_T from noise, then x_{t-1} ~ reverse(x_0 prediction, x_t, t) down to t = 0."""
    S = diffusion.num_timesteps
    more = itertools.count(S + 1)
    x_t, pred_xstart = noise(S), None
    for s in reversed(range(S)):
        t = _full(x_t, s)
        for left in reversed(range(1 if visits is None else visits[s])):
            pred_xstart = denoise(x_t, t, pred_xstart)
            yield Step(diffusion.timesteps[s], x_t, pred_xstart)
            if s == 0:
                continue
            p = reverse(pred_xstart, x_t, t)
            if left:
                x_t = diffusion.q_step(p.sample(noise(next(more))), s, noise(next(more)))
            else:
                x_t = _arrived(denoise, p.sample(noise(s)), p.mean, s - 1)


def dpm_solver(
    denoise: Denoise, diffusion: GaussianDiffusion, noise: NoiseSource, stops: Sequence[int] | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), one network call a step.

    With lambda = log(alpha / sigma) and h = lambda_s - lambda_t for the step t -> s:
    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^{-h}) D,    D = x_0 + h / (2 h_before) (x_0 - x_0_before).
    h_before is the step before in full, even if the noise was raised again since: over the short way that is left, the
    difference of the predictions is mostly that noise, and to extrapolate it would spread the law.

    Args:
        denoise: see above.
        diffusion: the respaced process.
        noise: see above.
        stops: levels to stop at; from each the noise is raised to the next level, if that is none (see `churned`).
    """
    levels = _levels(diffusion)
    x_t, previous, before = noise(diffusion.num_timesteps), None, None
    for level, below in _path(diffusion, stops):
        x_t, t = _raised(diffusion, x_t, level, stops, noise)
        previous = denoise(x_t, _full(x_t, t), previous)
        yield Step(diffusion.timesteps[t], x_t, previous)
        if below is None:
            return
        x_t, before = _multistep(levels, x_t, t, below, previous, before)
        x_t = _arrived(denoise, x_t, x_t, below)


def invert(denoise: Denoise, diffusion: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """The start of which the flow makes what is at the least noise, (B, L, D): the steps of `dpm_solver`, upwards.

    (The encoding of DDIM, arXiv 2010.02502, sections 4.3 and 5.4, to second order.) Where a flow is at depends on x_t
    and t alone, so that `denoise` is given no previous prediction. With S levels it is called S - 1 times. The last
    step is to first order, as the first of `dpm_solver` is: it may be many times as long as the one before, over noise
    in which predictions no longer change, and to extrapolate them would overshoot.
    """
    levels, last = _levels(diffusion), diffusion.num_timesteps - 1
    x_t, before = x_0, None
    for t in range(last):
        pred_xstart = denoise(x_t, _full(x_t, t), None)
        x_t, before = _multistep(levels, x_t, t, t + 1, pred_xstart, before if t + 1 < last else None)
    return x_t


def _multistep(
    levels: tuple[Array, Array], x_t: Tensor, t: int, s: int, pred_xstart: Tensor, before: tuple[Tensor, float] | None
) -> tuple[Tensor, tuple[Tensor, float]]:
    """x_s of DPM-Solver++(2M), s on either side of t, and what the next step needs: `before`, x_0 and h of this."""
    alpha, sigma = levels
    h = float(np.log(alpha[s] / sigma[s]) - np.log(alpha[t] / sigma[t]))
    D = pred_xstart
    if before is not None:
        D = pred_xstart + h / (2 * before[1]) * (pred_xstart - before[0])
    return float(sigma[s] / sigma[t]) * x_t - float(alpha[s] * np.expm1(-h)) * D, (pred_xstart, h)


def heun(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    noise: NoiseSource,
    stops: Sequence[int] | None = None,
    correct_first: bool = True,
    correct_last: bool = True,
) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 2): the slope is the mean of both ends'.

    Two network calls a step, one to predict at t = 0, and one less for each of the first and the last step that is not
    corrected. Where the schedule begins at next to no signal, r falls by a factor of hundreds in the first step, and
    the mean of two slopes so far apart would overshoot by that factor. Arguments as for `dpm_solver`.
    """
    alpha, sigma = _levels(diffusion)
    r = sigma / alpha
    x_t, pred_xstart = noise(diffusion.num_timesteps), None
    for level, below in _path(diffusion, stops):
        x_t, t = _raised(diffusion, x_t, level, stops, noise)
        pred_xstart = denoise(x_t, _full(x_t, t), pred_xstart)
        yield Step(diffusion.timesteps[t], x_t, pred_xstart)
        if below is None:
            return
        slope = (x_t / float(alpha[t]) - pred_xstart) / float(r[t])
        y = float(r[below] / r[t]) * (x_t / float(alpha[t])) + float(1 - r[below] / r[t]) * pred_xstart
        x_t = float(alpha[below]) * y
        if (correct_last or below > 0) and (correct_first or level + 1 < diffusion.num_timesteps):
            pred_xstart = denoise(x_t, _full(x_t, below), pred_xstart)
            yield Step(diffusion.timesteps[below], x_t, pred_xstart)
            bend = (y - pred_xstart) / float(r[below]) - slope
            x_t = float(alpha[below]) * (y + float(r[below] - r[t]) / 2 * bend)
        x_t = _arrived(denoise, x_t, x_t, below)


def _levels(diffusion: GaussianDiffusion) -> tuple[Array, Array]:
    """alpha and sigma of every level, (S,) float64."""
    abar = diffusion.alphas_cumprod
    return np.sqrt(abar), np.sqrt(1 - abar)


def _path(diffusion: GaussianDiffusion, stops: Sequence[int] | None) -> Iterator[tuple[int, int | None]]:
    """The stops from the noisiest down, each with the next one; the last has none."""
    down = sorted(range(diffusion.num_timesteps) if stops is None else stops, reverse=True)
    return zip_longest(down, down[1:])


def _raised(
    diffusion: GaussianDiffusion, x_t: Tensor, level: int, stops: Sequence[int] | None, noise: NoiseSource
) -> tuple[Tensor, int]:
    """x at a stop, taken by q to the level above if that is not itself a stop; and the level it is at then."""
    above = level + 1
    if stops is None or above in stops or above == diffusion.num_timesteps:
        return x_t, level
    return diffusion.q_step(x_t, above, noise(above)), above


def _arrived(denoise: Denoise, x_s: Tensor, mean: Tensor, s: int) -> Tensor:
    return denoise.arrive(x_s, mean, s) if isinstance(denoise, Arriving) else x_s


def _full(x_t: Tensor, t: int) -> Tensor:
    return torch.full((len(x_t),), t, device=x_t.device)
