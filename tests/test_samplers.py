"""Ancestral sampling reaches, by a denoiser known in closed form, the law that it must, and steps as diffusers does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.samplers import Step, ancestral, ddim, dpm_solver, heun
from text_diffusion.schedules import named_betas
from text_diffusion.timesteps import churned, spaced_timesteps

# Data N(MU, STD^2) in each entry, of which the optimal denoiser is linear.
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


def exact_law(abar: list[float], visits: list[int] | None = None) -> tuple[float, float]:
    """Mean and std of the last prediction: the sampler's linear recursion, pushed through by hand in float64."""
    mean, variance = 0.0, 1.0
    for s in reversed(range(1, len(abar))):
        now, before, beta = abar[s], abar[s - 1], 1 - abar[s] / abar[s - 1]
        a, b = regression(now)
        from_start = beta * math.sqrt(before) / (1 - now)  # DDPM eq. 7
        from_x_t = (1 - before) * math.sqrt(now / before) / (1 - now)
        slope = from_start * b + from_x_t
        for visit in range(1 if visits is None else visits[s]):
            if visit:  # DDPM eq. 2
                mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
            mean = from_start * a + slope * mean
            variance = slope**2 * variance + beta * (1 - before) / (1 - now)
    a, b = regression(abar[0])
    return a + b * mean, b * math.sqrt(variance)


def last_of(steps: Iterator[Step]) -> Tensor:
    return list(steps)[-1].pred_xstart


def law_by_superposition(diffusion: GaussianDiffusion, visits: list[int] | None = None) -> tuple[float, float]:
    """The sampler's own law without chance: it is linear, so unit noises, one draw at a time, tell every weight.

    Row 0 sees no noise and is the mean; row s sees 1 as its draw number s.
    """
    draws = diffusion.num_timesteps + (2 * sum(visit - 1 for visit in visits) if visits else 0)

    def unit(s: int) -> Tensor:
        noise = torch.zeros(draws + 1, 1, 1)
        noise[s] = 1.0
        return noise

    result = last_of(ancestral(Optimal(diffusion), diffusion, unit, visits)).double().flatten()
    return float(result[0]), float((result[1:] - result[0]).norm())


PROCESSES = [(20, None, "sqrt"), (200, None, "linear"), (2000, 20, "sqrt"), (2000, 7, "cosine"), (100, 1, "sqrt")]


@pytest.mark.parametrize(("steps", "kept", "name"), PROCESSES)
def test_law_of_the_result_is_exact(steps: int, kept: int | None, name: str) -> None:
    diffusion = process(steps, kept, name)
    mean, std = law_by_superposition(diffusion)
    expected = exact_law(diffusion.alphas_cumprod.tolist())
    assert (mean, std) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("visits", [[1, 1, 1, 1, 1, 1], [1, 3, 1, 4, 2, 5], [1, 50, 50, 50, 50, 50]])
def test_law_where_levels_are_walked_again(visits: list[int]) -> None:
    """Each return by q has noises of its own, and the law is that of the recursion."""
    diffusion = process(2000, len(visits))
    assert law_by_superposition(diffusion, visits) == pytest.approx(
        exact_law(diffusion.alphas_cumprod.tolist(), visits), rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize(("steps", "kept", "name"), PROCESSES)
def test_moments_of_samples(steps: int, kept: int | None, name: str) -> None:
    """40,000 independent entries; each bound is five standard errors, so a false alarm has probability 6e-7 a bound."""
    diffusion = process(steps, kept, name)
    generator = torch.Generator().manual_seed(0)
    samples = last_of(ancestral(Optimal(diffusion), diffusion, lambda s: torch.randn(100, 40, 10, generator=generator)))
    mean, std = exact_law(diffusion.alphas_cumprod.tolist())
    n = samples.numel()
    assert float(samples.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n) + 1e-6)
    assert float(samples.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * n) + 1e-6)


def test_all_steps_come_close_to_the_data() -> None:
    """Over all of the 2,000 steps the mean is the data's, and the std 4 % below it.

    Two things narrow it: the posterior's variance is the smaller of DDPM's two choices (right for data in single
    points, such as words), and the last prediction is a mean.
    """
    mean, std = law_by_superposition(process(2000))
    assert mean == pytest.approx(MU, rel=1e-3)
    assert 0.95 * STD < std < STD


def test_more_steps_come_closer() -> None:
    errors = [abs(law_by_superposition(process(2000, kept))[1] - STD) for kept in (2, 5, 20, 100, 2000)]
    assert errors == sorted(errors, reverse=True)


# Against diffusers


def bend(x_t: Tensor, t: int) -> Tensor:
    """Some denoiser, not linear, that knows t."""
    return torch.tanh(1.7 * x_t + 0.1 * t) * (1 + 0.05 * t)


@pytest.mark.parametrize("kept", [None, 5, 12])
@pytest.mark.parametrize("name", ["sqrt", "linear", "trunc_cos"])
def test_steps_agree_with_diffusers(name: str, kept: int | None) -> None:
    """The same denoiser and noise, through all of T = 20 steps and respaced: every x_t and the result agree."""
    T = 20
    diffusion = process(T, kept, name)
    theirs = DDPMScheduler(T, trained_betas=named_betas(name, T).tolist(), prediction_type="sample", clip_sample=False)
    if kept is not None:
        theirs.set_timesteps(timesteps=diffusion.timesteps[::-1])
    ours = torch.Generator().manual_seed(1)  # both draw from the noisiest step downwards
    generator = torch.Generator().manual_seed(1)
    steps = ancestral(
        lambda x_t, t, previous: bend(x_t, diffusion.timesteps[int(t[0])]),
        diffusion,
        lambda s: torch.randn(4, 3, 2, generator=ours),
    )
    x_t = torch.randn(4, 3, 2, generator=generator)
    for step in steps:
        torch.testing.assert_close(step.x_t, x_t, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.pred_xstart, bend(x_t, step.t), rtol=1e-5, atol=1e-5)
        x_t = theirs.step(bend(x_t, step.t), step.t, x_t, generator=generator).prev_sample
    # At t = 0 their step adds nothing and returns the prediction: our result.
    torch.testing.assert_close(step.pred_xstart, x_t, rtol=1e-5, atol=1e-5)


# Who is called with what


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


@pytest.mark.parametrize(("T", "S"), [(10, None), (10, 1), (10, 2), (10, 10), (2000, 20), (1, 1)])
def test_every_kept_step_is_one_call_from_the_noisiest_to_zero(T: int, S: int | None) -> None:
    diffusion, recorder = process(T, S), Recorder()
    steps = list(ancestral(recorder.denoise, diffusion, recorder.noise))
    calls = T if S is None else S
    assert len(steps) == len(recorder.calls) == calls
    assert [step.t for step in steps] == diffusion.timesteps[::-1]
    assert steps[0].t == T - 1
    assert steps[-1].t == 0 or calls == 1
    # The denoiser gets positions in the kept process, one for each sentence.
    assert [t for _, t, _ in recorder.calls] == [[s] * 3 for s in reversed(range(calls))]


def test_steps_yield_what_the_denoiser_saw_and_said() -> None:
    recorder = Recorder()
    steps = list(ancestral(recorder.denoise, process(10), recorder.noise))
    for step, (x_t, _, _), prediction in zip(steps, recorder.calls, recorder.predictions, strict=True):
        assert step.x_t is x_t
        assert step.pred_xstart is prediction


def test_denoiser_receives_its_previous_prediction() -> None:
    recorder = Recorder()
    list(ancestral(recorder.denoise, process(10), recorder.noise))
    previous = [seen for _, _, seen in recorder.calls]
    assert previous[0] is None
    assert all(a is b for a, b in zip(previous[1:], recorder.predictions[:-1], strict=True))


def test_noise_is_asked_for_once_a_step_and_never_at_the_last() -> None:
    """It starts at noise(S), and the step to position s - 1 takes noise(s): the result is a prediction, not a draw."""
    recorder, diffusion = Recorder(), process(10, 4)
    steps = list(ancestral(recorder.denoise, diffusion, recorder.noise))
    assert recorder.asked == [4, 3, 2, 1]
    assert steps[0].x_t is recorder.given[0]
    for before, after, s in zip(steps, steps[1:], (3, 2, 1), strict=False):
        t = torch.full((3,), s)
        expected = diffusion.p_mean_variance(before.pred_xstart, before.x_t, t).sample(torch.full((3, 2, 1), float(s)))
        assert torch.equal(after.x_t, expected)


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    recorder = Recorder()
    steps = ancestral(recorder.denoise, process(10), recorder.noise)
    assert (recorder.calls, recorder.asked) == ([], [])
    next(steps)
    assert len(recorder.calls) == 1


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


def flow_error(sampler: Callable[..., Iterator[Step]], levels: int, **options: Any) -> float:
    """How far a deterministic sampler ends from where the flow of N(MU, STD^2) data goes, from x_T = z to MU + STD z.

    In units of the std of the marginal; at the level of t = 0, before the last prediction.
    """
    full = GaussianDiffusion(named_betas("cosine", 2000))
    diffusion = full.respace(spaced_timesteps(full.alphas_cumprod, levels, "log-snr"))
    optimal = [regression(abar) for abar in diffusion.alphas_cumprod.tolist()]

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        a, b = optimal[int(t[0])]
        return a + b * x_t

    def spread(abar: float) -> tuple[float, float]:
        return math.sqrt(abar) * MU, math.sqrt(abar * STD**2 + 1 - abar)

    (first, start), (last, end) = spread(diffusion.alphas_cumprod[-1]), spread(diffusion.alphas_cumprod[0])
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 3, 3)
    steps = list(sampler(denoise, diffusion, lambda _: first + start * z, **options))
    return float(((steps[-1].x_t - last) / end - z).abs().max())


@pytest.mark.parametrize(("sampler", "order", "bound"), [(ddim, 1, 0.05), (dpm_solver, 2, 2e-3), (heun, 2, 2e-3)])
def test_order_of_convergence(sampler: Callable[..., Iterator[Step]], order: int, bound: float) -> None:
    """Twice the steps: half the error to first order, a quarter to second."""
    errors = [flow_error(sampler, levels) for levels in (51, 101, 201)]
    rates = [math.log2(before / after) for before, after in pairwise(errors)]
    assert errors[-1] < bound
    assert rates == pytest.approx([order] * 2, abs=0.25)


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
