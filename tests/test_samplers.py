"""Ancestral sampling reaches, by a denoiser known in closed form, the law that it must, and steps as diffusers does."""

from __future__ import annotations

import math

import pytest
import torch
from denoisers import MU, STD, Optimal, Recorder, bend, last_of, process, regression
from diffusers import DDPMScheduler
from torch import Tensor

from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.samplers import ancestral
from text_diffusion.schedules import named_betas


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
