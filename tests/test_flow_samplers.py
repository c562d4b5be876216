"""Samplers that add no noise, or choose how much: against `diffusers`, the flow in closed form, and its order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import MU, STD, Optimal, Recorder, bend, last_of, process, regression
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.samplers import Denoise, Step, ancestral, ddim, dpm_solver, heun, invert
from text_diffusion.schedules import named_betas
from text_diffusion.spacing import churned, spaced_timesteps

# DDIM


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(eta: float) -> None:
    """The same noise through diffusers' DDIMScheduler, over all steps."""
    T = 20
    diffusion = process(T)
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=T,
        trained_betas=diffusion.betas.tolist(),
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(T)
    noise = torch.randn(T + 1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    target = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return 0.7 * target + 0.2 * torch.tanh(x_t)

    walk = list(ddim(denoise, diffusion, lambda s: noise[s], eta))
    x = noise[T]
    for step, t in zip(walk, scheduler.timesteps, strict=True):
        assert step.t == int(t)
        torch.testing.assert_close(step.x_t, x, rtol=1e-4, atol=1e-5)
        prediction = denoise(x, t, None)
        x = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise[int(t)] if eta else None).prev_sample


def test_ddim_with_eta_1_is_ancestral() -> None:
    diffusion = process(50).respace([0, 7, 20, 33, 49])
    noise = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(1))

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return torch.tanh(x_t)

    one = list(ancestral(denoise, diffusion, lambda s: noise[s]))
    other = list(ddim(denoise, diffusion, lambda s: noise[s], 1.0))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.x_t, b.x_t, rtol=1e-4, atol=1e-5)


# The flow


Z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 3, 3)


def gaussian_flow(levels: int) -> tuple[GaussianDiffusion, Denoise, Tensor, Tensor]:
    """A process, the denoiser of N(MU, STD^2) data, and where the flow goes through at both ends.

    The flow keeps z in x_t = mean + std z: Z here, as (the least noise, the most).
    """
    full = GaussianDiffusion(named_betas("cosine", 2000))
    diffusion = full.respace(spaced_timesteps(full.alphas_cumprod, levels, "log-snr"))
    optimal = [regression(abar) for abar in diffusion.alphas_cumprod.tolist()]

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        a, b = optimal[int(t[0])]
        return a + b * x_t

    low, high = (
        math.sqrt(abar) * MU + math.sqrt(abar * STD**2 + 1 - abar) * Z
        for abar in (diffusion.alphas_cumprod[0], diffusion.alphas_cumprod[-1])
    )
    return diffusion, denoise, low, high


def error_of(found: Tensor, expected: Tensor) -> float:
    """The largest distance in units of the std of the marginal."""
    return float((found - expected).abs().max() * (Z[0, -1, -1] - Z[0, 0, 0]) / (expected.max() - expected.min()))


def flow_error(sampler: Callable[..., Iterator[Step]], levels: int, **options: Any) -> float:
    """How far a deterministic sampler ends from where the flow goes: at t = 0, before the last prediction."""
    diffusion, denoise, low, high = gaussian_flow(levels)
    return error_of(list(sampler(denoise, diffusion, lambda _: high, **options))[-1].x_t, low)


def inversion_error(levels: int) -> float:
    """The same upwards."""
    diffusion, denoise, low, high = gaussian_flow(levels)
    return error_of(invert(denoise, diffusion, low), high)


@pytest.mark.parametrize(
    ("error", "order", "bound"),
    [
        (partial(flow_error, ddim), 1, 0.05),
        (partial(flow_error, dpm_solver), 2, 2e-3),
        (partial(flow_error, heun), 2, 2e-3),
        (inversion_error, 2, 2e-3),
    ],
)
def test_order_of_convergence(error: Callable[[int], float], order: int, bound: float) -> None:
    """Twice the steps: half the error to first order, a quarter to second."""
    errors = [error(levels) for levels in (51, 101, 201)]
    rates = [math.log2(before / after) for before, after in pairwise(errors)]
    assert errors[-1] < bound
    assert rates == pytest.approx([order] * 2, abs=0.25)


def test_inversion_asks_from_the_least_noise_up() -> None:
    """At each level but the last, without a previous prediction: a flow has none."""
    recorder = Recorder()
    invert(recorder.denoise, process(10, 4), torch.zeros(3, 2, 1))
    assert [(t, previous) for _, t, previous in recorder.calls] == [([s] * 3, None) for s in range(3)]


def test_inversion_does_not_extrapolate_its_long_last_step() -> None:
    """By the formula of arXiv 2211.01095, equations of the first and the second step, written out here."""
    diffusion, _, _, _ = gaussian_flow(4)
    alpha, sigma = (np.sqrt(x) for x in (diffusion.alphas_cumprod, 1 - diffusion.alphas_cumprod))
    lam = np.log(alpha / sigma)
    said = [0.3, -0.8, 2.0]

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return torch.full_like(x_t, said[int(t[0])])

    x = 1.0
    bent = said[1] + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (said[1] - said[0])
    for t, D in enumerate((said[0], bent, said[2])):
        x = sigma[t + 1] / sigma[t] * x - alpha[t + 1] * np.expm1(lam[t] - lam[t + 1]) * D
    found = invert(denoise, diffusion, torch.ones(1, 1, 1, dtype=torch.float64))
    assert found.item() == pytest.approx(x)


def test_heun_without_its_last_correction() -> None:
    diffusion, recorder = process(2000, 5), Recorder()
    steps = list(heun(recorder.denoise, diffusion, recorder.noise, correct_last=False))
    assert [step.t for step in steps] == [1999, 1499, 1499, 1000, 1000, 500, 500, 0]
    assert len(list(heun(recorder.denoise, diffusion, recorder.noise))) == 9


def test_heun_without_its_first_correction_does_not_overshoot() -> None:
    """From next to no signal, with the best denoiser there is: N(MU, STD^2) comes out as narrow as it is."""
    diffusion = process(2000, 10)
    z = torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0))
    results = [
        last_of(heun(Optimal(diffusion), diffusion, lambda _: z, correct_first=first)).std() for first in (True, False)
    ]
    assert float(results[0]) > 1.5 * STD
    assert float(results[1]) == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("sampler", [dpm_solver, heun])
def test_predictions_are_handed_on(sampler: Callable[..., Iterator[Step]]) -> None:
    recorder = Recorder()
    list(sampler(recorder.denoise, process(10, 4), recorder.noise))
    previous = [seen for _, _, seen in recorder.calls]
    assert previous[0] is None
    assert all(a is b for a, b in zip(previous[1:], recorder.predictions[:-1], strict=True))
    assert recorder.asked == [4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_dpm_solver_is_diffusers() -> None:
    """The same denoiser through DPMSolverMultistepScheduler (2M, x_0-prediction): every x_t agrees."""
    T, S = 1000, 12
    diffusion = process(T, S)
    theirs: Any = DPMSolverMultistepScheduler(
        T,
        trained_betas=named_betas("sqrt", T).tolist(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=False,
    )
    theirs.set_timesteps(timesteps=diffusion.timesteps[::-1])
    x_t = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    start = x_t

    def denoise(x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return bend(x, diffusion.timesteps[int(t[0])] // 50)

    walk = dpm_solver(denoise, diffusion, lambda _: start)
    for step in walk:
        torch.testing.assert_close(step.x_t, x_t, rtol=1e-4, atol=1e-5)
        if step.t > 0:  # beyond it they go on to a noise of their own choice
            x_t = theirs.step(bend(x_t, step.t // 50), step.t, x_t).prev_sample
    assert step.t == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_heun_is_diffusers() -> None:
    """The same denoiser through HeunDiscreteScheduler, which works on y = x / alpha at r = sigma / alpha."""
    T, S = 1000, 8
    diffusion = process(T, S, "linear")
    theirs: Any = HeunDiscreteScheduler(
        T, trained_betas=named_betas("linear", T).tolist(), prediction_type="sample", timestep_spacing="linspace"
    )
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist()[::2] == pytest.approx(diffusion.timesteps[::-1], abs=0.5)
    alpha = diffusion.sqrt_alphas_cumprod
    theirs.sigmas[:-1] = (diffusion.sqrt_one_minus_alphas_cumprod / alpha).flip(0).repeat_interleave(2)[1:]
    x_t = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    walk = heun(lambda x, t, _: torch.tanh(x), diffusion, lambda _: x_t)
    y = x_t / alpha[-1]
    levels = [S - 1, *(s for level in reversed(range(S - 1)) for s in (level, level))]
    for step, s, t in zip(walk, levels, theirs.timesteps, strict=False):
        torch.testing.assert_close(step.x_t / alpha[s], y, rtol=1e-4, atol=1e-4)
        y = theirs.step(torch.tanh(alpha[s] * y), t, y).prev_sample


@pytest.mark.parametrize("sampler", [dpm_solver, heun])
def test_churn_keeps_the_law(sampler: Callable[..., Iterator[Step]]) -> None:
    """Noise put in and taken out again by the exact denoiser leaves the law as it is; only the path is another."""
    full = process(2000, name="cosine")
    kept = spaced_timesteps(full.alphas_cumprod, 60, "log-snr")
    together, stops = churned(full.alphas_cumprod, kept, 6.0)
    diffusion = full.respace(together)
    optimal, draws, asked = Optimal(diffusion), torch.Generator().manual_seed(0), []

    def noise(s: int) -> Tensor:
        asked.append(s)
        return torch.randn(100, 20, 20, generator=draws)

    result = last_of(sampler(optimal, diffusion, noise, stops=stops))
    n, end = result.numel(), diffusion.alphas_cumprod[0]
    a, b = regression(end)
    mean, std = a + b * math.sqrt(end) * MU, b * math.sqrt(end * STD**2 + 1 - end)
    assert float(result.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n) + 2e-3)
    assert float(result.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * n) + 5e-3)
    assert len(asked) == len(set(asked)) == 1 + len(together) - len(stops) > 30
