"""Time in which the loss is linear: against SciPy's isotonic regression, a curve that is known, and none at all."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from text_diffusion.fitted_time import EVERYWHERE, FittedSampler, fitted_time, monotone

T = 2000


def curve(t: torch.Tensor) -> torch.Tensor:
    """A loss that rises where words are lost, as of t = 1200."""
    return 3 * torch.sigmoid((t.float() - 1200) / 60)


def fitted(noise: float = 0.0, steps: int = 200) -> FittedSampler:
    sampler, generator = FittedSampler(T), torch.Generator().manual_seed(0)
    for _ in range(steps):
        t, _ = sampler.sample(torch.rand(128, generator=generator))
        sampler.update(t, curve(t) + noise * torch.randn(128, generator=generator))
    return sampler


@pytest.mark.parametrize("seed", range(5))
def test_monotone_is_isotonic_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, weights = np.cumsum(rng.normal(size=50)), rng.uniform(0.1, 5, 50)
    expected = scipy.optimize.isotonic_regression(values, weights=weights).x
    assert monotone(values, weights) == pytest.approx(expected)
    assert monotone(values) == pytest.approx(scipy.optimize.isotonic_regression(values).x)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_loss_is_linear_in_time(noise: float) -> None:
    """R^2 of the true loss against u, of stratified u."""
    u = (torch.arange(1000) + 0.5) / 1000
    t, weights = fitted(noise).sample(u)
    assert bool((t.diff() >= 0).all())
    assert bool((weights == 1).all())
    assert np.corrcoef(u, curve(t))[0, 1] ** 2 > 0.99


def test_every_t_is_kept_in_view() -> None:
    """A tenth of the time is spent evenly, so that each part of 0..T-1 is met."""
    t, _ = fitted().sample((torch.arange(100_000) + 0.5) / 100_000)
    shares = torch.bincount(t * 10 // T, minlength=10) / 100_000
    assert float(shares.min()) == pytest.approx(EVERYWHERE / 10, rel=0.05)


def test_a_constant_loss_leaves_time_even() -> None:
    assert fitted_time(np.full(5, 2.0)) == pytest.approx(np.linspace(0, 1, 5))
    sampler = FittedSampler(T)
    for step in range(60):
        t, _ = sampler.sample(torch.rand(64, generator=torch.Generator().manual_seed(step)))
        sampler.update(t, torch.full((64,), 1.5))
    assert sampler.F.numpy() == pytest.approx(np.linspace(0, 1, len(sampler.F)), abs=1e-4)


def test_losses_that_are_not_finite_change_nothing() -> None:
    sampler = fitted()
    before = sampler.F.clone()
    for _ in range(sampler.REFIT):
        sampler.update(torch.tensor([5]), torch.tensor([float("nan")]))
    assert torch.equal(sampler.F, before)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_diffusion_steps(steps: int) -> None:
    sampler = FittedSampler(steps)
    for _ in range(30):
        t, _ = sampler.sample(torch.rand(16))
        assert int(t.min()) >= 0
        assert int(t.max()) < steps
        sampler.update(t, t.float())


def test_state_is_kept_whole() -> None:
    one, two = fitted(), FittedSampler(T)
    two.load_state_dict(one.state_dict())
    for sampler in (one, two):
        for step in range(30):
            t, _ = sampler.sample(torch.rand(64, generator=torch.Generator().manual_seed(step)))
            sampler.update(t, curve(t))
    assert torch.equal(one.F, two.F)
    assert torch.equal(one.measured.totals, two.measured.totals)
