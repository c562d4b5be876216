"""The algebra of q and p: closed forms against iteration, Bayes' rule and diffusers; respacing is the same process."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from text_diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion
from text_diffusion.schedules import named_betas

Array = npt.NDArray[np.float64]

T = 50
KEPT = [0, 1, 7, 8, 20, 33, 49]
PROCESSES = [(name, kept) for name in ("sqrt", "linear", "trunc_cos") for kept in (None, KEPT, [49])]


def process(name: str = "sqrt", kept: list[int] | None = None, steps: int = T) -> GaussianDiffusion:
    diffusion = GaussianDiffusion(named_betas(name, steps))
    return diffusion if kept is None else diffusion.respace(kept)


def everything(diffusion: GaussianDiffusion) -> Tensor:
    """Every t of a process, as a batch."""
    return torch.arange(diffusion.num_timesteps)


def constant(value: float, t: Tensor) -> Tensor:
    return torch.full((len(t), 1, 1), value)


def flat(x: Tensor) -> Array:
    values: Array = x.double().flatten().numpy()
    return values


def iterate(betas: Array, mean: float, variance: float) -> tuple[float, float]:
    """Push N(mean, variance) through q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), step by step."""
    for beta in betas:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    return mean, variance


def transition(name: str, kept: list[int] | None, s: int) -> tuple[float, float]:
    """q(x_t | x_prev) = N(c x_prev, v) between the (s-1)-th kept step (x_0 before the first) and the s-th: (c, v)."""
    steps = list(range(T)) if kept is None else kept
    betas = named_betas(name, T)
    return iterate(betas[steps[s - 1] + 1 if s else 0 : steps[s] + 1], 1.0, 0.0)


# The forward process


@pytest.mark.parametrize("name", ["sqrt", "linear", "trunc_cos"])
def test_iterating_q_gives_its_closed_form(name: str) -> None:
    diffusion = process(name)
    t = everything(diffusion)
    closed = diffusion.q_mean_variance(constant(3.0, t), t)
    stepwise = [iterate(named_betas(name, T)[: int(s) + 1], 3.0, 0.0) for s in t]
    np.testing.assert_allclose(flat(closed.mean), [mean for mean, _ in stepwise], rtol=1e-6)
    np.testing.assert_allclose(flat(closed.variance), [variance for _, variance in stepwise], rtol=1e-6)


def test_q_sample_is_mean_plus_std_times_noise() -> None:
    diffusion = process()
    t = everything(diffusion)
    x_start, noise = torch.randn(2, T, 3, 2, generator=torch.Generator().manual_seed(0))
    x_t = diffusion.q_sample(x_start, t, noise)
    for i in range(T):
        mean, variance = iterate(named_betas("sqrt", T)[: i + 1], 1.0, 0.0)
        torch.testing.assert_close(x_t[i], mean * x_start[i] + math.sqrt(variance) * noise[i])


def test_gaussian_sample() -> None:
    gaussian = Gaussian(torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([9.0, 0.0]).view(2, 1, 1))
    samples = gaussian.sample(torch.tensor([[[1.0, -1.0]], [[5.0, 7.0]]]))
    assert samples.tolist() == [[[4.0, -2.0]], [[2.0, 2.0]]]


def test_q_start_has_the_first_noise() -> None:
    """q(x_0 | w) is as noisy as x_t at t = 0, but its mean is not shrunk."""
    diffusion = process()
    embeddings = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    start = diffusion.q_start(embeddings)
    assert torch.equal(start.mean, embeddings)
    assert start.sample(torch.zeros(3, 4, 2)).shape == (3, 4, 2)
    np.testing.assert_allclose(flat(start.variance), named_betas("sqrt", T)[0], rtol=1e-6)


# The posterior


@pytest.mark.parametrize(("name", "kept"), PROCESSES)
def test_bayes_rule_gives_the_posterior(name: str, kept: list[int] | None) -> None:
    """q(x_prev | x_t, x_0) = q(x_t | x_prev) q(x_prev | x_0) / q(x_t | x_0), for every t, whole and respaced.

    Precisions add up, and so do means in proportion to them. Checked at two points, which determine the linear mean.
    """
    diffusion = process(name, kept)
    t = everything(diffusion)[1:]
    abar = np.cumprod(1 - named_betas(name, T))[diffusion.timesteps]
    for x_start, x_t in ((1.0, 0.0), (0.0, 1.0), (-2.0, 3.0)):
        posterior = diffusion.q_posterior_mean_variance(constant(x_start, t), constant(x_t, t), t)
        mean, variance = flat(posterior.mean), flat(posterior.variance)
        for row, s in enumerate(t.tolist()):
            c, v = transition(name, kept, s)
            precision = c * c / v + 1 / (1 - abar[s - 1])
            weighted = c * x_t / v + math.sqrt(abar[s - 1]) * x_start / (1 - abar[s - 1])
            assert variance[row] == pytest.approx(1 / precision, rel=1e-5)
            assert mean[row] == pytest.approx(weighted / precision, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kept", [None, KEPT])
def test_bayes_rule_on_a_grid(kept: list[int] | None) -> None:
    """The same by brute force: multiply the two densities on a fine grid of x_prev, normalise, take moments."""
    diffusion = process("sqrt", kept)
    abar = np.cumprod(1 - named_betas("sqrt", T))[diffusion.timesteps]
    grid = np.linspace(-8, 8, 20_001)
    for s in (1, 2, 5, diffusion.num_timesteps - 1):
        c, v = transition("sqrt", kept, s)
        x_start, x_t = 1.3, -0.4
        log_density = -((x_t - c * grid) ** 2) / (2 * v)
        log_density -= (grid - math.sqrt(abar[s - 1]) * x_start) ** 2 / (2 * (1 - abar[s - 1]))
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        mean = float(density @ grid)
        t = torch.tensor([s])
        posterior = diffusion.q_posterior_mean_variance(constant(x_start, t), constant(x_t, t), t)
        assert float(posterior.mean) == pytest.approx(mean, abs=1e-5)
        assert float(posterior.variance) == pytest.approx(float(density @ (grid - mean) ** 2), rel=1e-4)


@pytest.mark.parametrize(("name", "kept"), PROCESSES)
def test_posterior_at_the_first_step_is_x_start(name: str, kept: list[int] | None) -> None:
    diffusion = process(name, kept)
    x_start, x_t = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    posterior = diffusion.q_posterior_mean_variance(x_start, x_t, torch.tensor([0]))
    torch.testing.assert_close(posterior.mean, x_start, rtol=1e-6, atol=0)
    assert posterior.variance.tolist() == [[[0.0]]]


def test_posterior_undoes_q_on_average() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x_0), averaged over q(x_t | x_0), are those of q(x_{t-1} | x_0)."""
    diffusion = process("linear")
    t = everything(diffusion)[1:]
    one, zero = constant(1.0, t), constant(0.0, t)
    now, before = diffusion.q_mean_variance(one, t), diffusion.q_mean_variance(one, t - 1)
    slope = flat(diffusion.q_posterior_mean_variance(zero, one, t).mean)
    posterior = diffusion.q_posterior_mean_variance(one, now.mean, t)
    np.testing.assert_allclose(flat(posterior.mean), flat(before.mean), rtol=1e-6)
    total = flat(posterior.variance) + slope**2 * flat(now.variance)
    np.testing.assert_allclose(total, flat(before.variance), rtol=1e-6)


def test_p_is_q_given_the_prediction() -> None:
    diffusion = process()
    t = everything(diffusion)
    guess, x_t = torch.randn(2, T, 3, 2, generator=torch.Generator().manual_seed(0))
    p, q = diffusion.p_mean_variance(guess, x_t, t), diffusion.q_posterior_mean_variance(guess, x_t, t)
    assert torch.equal(p.mean, q.mean)
    assert torch.equal(p.variance, q.variance)


def test_each_sentence_has_its_own_t() -> None:
    """Rows of a batch at different t are what each is on its own."""
    diffusion = process()
    t = torch.tensor([0, 49, 3, 3])
    x_start, x_t = torch.randn(2, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    whole = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    assert whole.mean.shape == (4, 5, 2)
    assert whole.variance.shape == (4, 1, 1)
    for row in range(4):
        one = slice(row, row + 1)
        alone = diffusion.q_posterior_mean_variance(x_start[one], x_t[one], t[one])
        assert torch.equal(alone.mean, whole.mean[one])
        assert torch.equal(alone.variance, whole.variance[one])


# Against diffusers


@pytest.mark.parametrize("name", ["sqrt", "linear", "cosine"])
def test_forward_agrees_with_diffusers(name: str) -> None:
    diffusion = process(name)
    theirs = DDPMScheduler(T, trained_betas=named_betas(name, T).tolist())
    t = everything(diffusion)
    x_start, noise = torch.randn(2, T, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        diffusion.q_sample(x_start, t, noise), theirs.add_noise(x_start, noise, t), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["sqrt", "linear", "cosine"])
def test_posterior_agrees_with_diffusers(name: str) -> None:
    """Their step is mean + std * noise; theirs works in float32 throughout."""
    diffusion = process(name)
    theirs = DDPMScheduler(T, trained_betas=named_betas(name, T).tolist(), prediction_type="sample", clip_sample=False)
    guess, x_t = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    for s in range(T):
        posterior = diffusion.p_mean_variance(guess, x_t, torch.tensor([s]))
        stepped = theirs.step(guess, s, x_t, generator=torch.Generator().manual_seed(s)).prev_sample
        noise = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(s))
        torch.testing.assert_close(posterior.sample(noise), stepped, rtol=1e-5, atol=1e-5)
        if s > 0:
            torch.testing.assert_close(float(posterior.variance), float(theirs._get_variance(s)), rtol=1e-4, atol=0)


# Noise and x_0 as two ways to say the same


@pytest.mark.parametrize("name", ["sqrt", "linear"])
def test_epsilon_and_x_start_conversions_are_inverse(name: str) -> None:
    diffusion = process(name)
    t = everything(diffusion)
    x_start, noise = torch.randn(2, T, 3, 2, generator=torch.Generator().manual_seed(0))
    x_t = diffusion.q_sample(x_start, t, noise)
    eps = diffusion.predict_eps_from_xstart(x_t, t, x_start)
    torch.testing.assert_close(eps, noise, rtol=1e-5, atol=1e-4)  # x_t's rounding over sqrt(1 - abar_0) >= 0.04
    # Where little signal is left, the rounding of x_t is all that the division by sqrt(abar) finds.
    signal = diffusion.sqrt_alphas_cumprod[:, None, None]
    for recovered in (diffusion.predict_xstart_from_eps(x_t, t, eps), diffusion.predict_xstart_from_eps(x_t, t, noise)):
        torch.testing.assert_close(signal * recovered, signal * x_start, rtol=0, atol=2e-6)


# Respacing


@pytest.mark.parametrize("name", ["sqrt", "linear", "trunc_cos"])
def test_respaced_abar_is_the_training_abar(name: str) -> None:
    full, respaced = process(name), process(name, KEPT)
    np.testing.assert_allclose(respaced.alphas_cumprod, full.alphas_cumprod[KEPT], rtol=1e-12)
    assert respaced.timesteps == KEPT
    assert respaced.num_timesteps == len(KEPT)
    x, t = constant(1.0, torch.tensor(KEPT)), everything(respaced)
    for ours, theirs in (
        (respaced.q_mean_variance(x, t), full.q_mean_variance(x, torch.tensor(KEPT))),
        (respaced.q_start(x), full.q_start(x)),
    ):
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.variance, theirs.variance)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 2000])
def test_network_sees_training_timesteps_rescaled_to_1000(steps: int) -> None:
    full = process(steps=steps)
    kept = sorted({0, steps // 3, steps - 1})
    for diffusion, timesteps in ((full, list(range(steps))), (full.respace(kept), kept)):
        seen = diffusion.network_time(everything(diffusion))
        assert seen.dtype == torch.float32
        np.testing.assert_allclose(seen.numpy(), [1000 * t / steps for t in timesteps], rtol=1e-6)


def test_time_scale_survives_respacing() -> None:
    raw = GaussianDiffusion(named_betas("sqrt", T), time_scale=1.0)
    assert raw.network_time(torch.tensor([3, 49])).tolist() == [3.0, 49.0]
    assert raw.respace(KEPT).network_time(torch.tensor([2, 6])).tolist() == [7.0, 49.0]


def test_respacing_composes() -> None:
    """Keeping some of the kept steps is keeping those."""
    twice, once = process().respace(KEPT).respace([1, 3, 6]), process().respace([1, 8, 49])
    assert twice.timesteps == once.timesteps == [1, 8, 49]
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-12)
    t = everything(once)
    assert torch.equal(twice.network_time(t), once.network_time(t))


def test_full_respacing_is_the_identity() -> None:
    full, respaced = process(), process(kept=list(range(T)))
    np.testing.assert_allclose(respaced.betas, full.betas, rtol=1e-10)
    t = everything(full)
    assert torch.equal(full.network_time(t), respaced.network_time(t))
    ours, theirs = (d.q_posterior_mean_variance(constant(1.0, t), constant(2.0, t), t) for d in (full, respaced))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
