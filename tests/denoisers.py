"""Denoisers for tests of samplers: the optimal one for data N(MU, STD^2) in each entry; a bent one; one that looks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.samplers import Step
from text_diffusion.schedules import named_betas
from text_diffusion.spacing import spaced_timesteps

MU, STD = 1.5, 0.5


def process(steps: int, kept: int | None = None, name: str = "sqrt") -> GaussianDiffusion:
    diffusion = GaussianDiffusion(named_betas(name, steps))
    return diffusion if kept is None else diffusion.respace(spaced_timesteps(diffusion.alphas_cumprod, kept))


def regression(abar: float) -> tuple[float, float]:
    """E[x_0 | x_t] = a + b x_t for x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise and x_0 ~ N(MU, STD^2): (a, b)."""
    b = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
    return MU - b * math.sqrt(abar) * MU, b


class Optimal:
    """The denoiser E[x_0 | x_t] of a process."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        lines = [regression(abar) for abar in diffusion.alphas_cumprod.tolist()]
        self.a: Tensor = torch.tensor([a for a, _ in lines])[:, None, None]
        self.b: Tensor = torch.tensor([b for _, b in lines])[:, None, None]

    def __call__(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return self.a[t] + self.b[t] * x_t


def last_of(steps: Iterator[Step]) -> Tensor:
    return list(steps)[-1].pred_xstart


def bend(x_t: Tensor, t: int) -> Tensor:
    """Some denoiser, not linear, that knows t."""
    return torch.tanh(1.7 * x_t + 0.1 * t) * (1 + 0.05 * t)


class Recorder:
    """A denoiser that keeps what it saw and said, and a noise source that keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[int], Tensor | None]] = []
        self.predictions: list[Tensor] = []
        self.asked: list[int] = []
        self.given: list[Tensor] = []

    def denoise(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        self.calls.append((x_t, t.tolist(), previous))
        self.predictions.append(0.5 * x_t + 1)
        return self.predictions[-1]

    def noise(self, s: int) -> Tensor:
        self.asked.append(s)
        self.given.append(torch.full((3, 2, 1), float(s)))
        return self.given[-1]
