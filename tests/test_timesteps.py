"""Which t are drawn, how often and with what weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from text_diffusion.fitted_time import FittedSampler
from text_diffusion.timesteps import (
    TIMESTEP_SAMPLERS,
    LossSecondMomentSampler,
    UniformSampler,
    evenly_spread,
)

Array = npt.NDArray[np.float64]

T = 7
HISTORY = LossSecondMomentSampler.HISTORY
ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1


def losses(rows: int, seed: int = 0) -> Array:
    """Losses (rows, T), of another size at each t."""
    values: Array = np.random.default_rng(seed).exponential(1 + np.arange(T) ** 2, size=(rows, T)).astype(np.float32)
    return values.astype(np.float64)


def fed(history: Array) -> LossSecondMomentSampler:
    """A sampler that took in one loss of every t, row by row."""
    sampler = LossSecondMomentSampler(T)
    for row in history:
        sampler.update(torch.arange(T), torch.tensor(row, dtype=torch.float32))
    return sampler


def by_hand(history: Array) -> Array:
    """p(t) in proportion to sqrt(E[L_t^2]) of the last ten losses, mixed with 0.001 of the uniform distribution."""
    p = np.array([np.sqrt(np.mean(column[-10:] ** 2)) for column in history.T])
    mixed: Array = 0.999 * p / p.sum() + 0.001 / T
    return mixed


def inside(p: Array) -> Tensor:
    """For each t a uniform number that belongs to it: the middle of its piece of 0..1."""
    return torch.tensor(np.cumsum(p) - p / 2)


# Uniform


@pytest.mark.parametrize("steps", [1, 7, 50, 2000])
def test_uniform_cuts_zero_to_one_evenly(steps: int) -> None:
    """On a grid of eight numbers to every t, each gets its eight, in order, with weight 1."""
    u = (torch.arange(8 * steps, dtype=torch.float64) + 0.5) / (8 * steps)
    t, weights = UniformSampler(steps).sample(u)
    assert t.tolist() == [i // 8 for i in range(8 * steps)]
    assert t.dtype == torch.int64
    assert weights.tolist() == [1.0] * len(u)


@pytest.mark.parametrize("steps", [1, 10, 2000, 999_999, 1_000_000])
def test_uniform_stays_in_range(steps: int) -> None:
    """Also if rounding made a 1 of a number below it."""
    t, _ = UniformSampler(steps).sample(torch.tensor([0.0, ALMOST_ONE, 1.0]))
    assert t.tolist() == [0, steps - 1, steps - 1]


def test_uniform_learns_nothing() -> None:
    sampler = UniformSampler(T)
    sampler.update(torch.arange(T), torch.rand(T))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})


def test_names() -> None:
    assert dict(TIMESTEP_SAMPLERS) == {
        "uniform": UniformSampler,
        "loss-second-moment": LossSecondMomentSampler,
        "fitted": FittedSampler,
    }


# Loss second moment


def test_probabilities_are_the_root_of_the_second_moment() -> None:
    history = losses(HISTORY)
    np.testing.assert_allclose(fed(history).probabilities().numpy(), by_hand(history), rtol=1e-6)


def test_uniform_until_every_t_has_its_history() -> None:
    sampler = fed(losses(HISTORY - 1))
    few = torch.arange(T - 1)
    for _ in range(3):  # more for all but the last t
        sampler.update(few, torch.full((T - 1,), 9.0))
        assert sampler.probabilities().tolist() == [1 / T] * T
        u = torch.tensor((np.arange(5 * T) + 0.5) / (5 * T))
        t, weights = sampler.sample(u)
        assert t.tolist() == [i // 5 for i in range(5 * T)]
        torch.testing.assert_close(weights, torch.ones_like(u))
    sampler.update(torch.tensor([T - 1]), torch.tensor([1.0]))
    assert len(set(sampler.probabilities().tolist())) > 1


def test_in_the_warm_up_draws_are_the_uniform_sampler_s() -> None:
    """Edges belong to the piece above them: 0, 1/8, ..., 7/8 are exact."""
    u = torch.arange(16) / 16
    assert torch.equal(LossSecondMomentSampler(8).sample(u)[0], UniformSampler(8).sample(u)[0])
    assert UniformSampler(8).sample(u)[0].tolist() == [i // 2 for i in range(16)]


def test_only_the_last_ten_losses_count() -> None:
    """The history is a ring: 13 rows of losses leave the last ten, and 27 do."""
    for rows in (13, 27):
        history = losses(rows)
        np.testing.assert_allclose(fed(history).probabilities().numpy(), by_hand(history), rtol=1e-6)
        first_ten = by_hand(history[:10])
        assert not np.allclose(fed(history).probabilities().numpy(), first_ten, rtol=0.01)


def test_one_batch_may_hold_a_t_many_times() -> None:
    """Every loss of a batch is kept, in order, also where t repeats."""
    history = losses(12)
    t, values = torch.arange(T).repeat(12), torch.tensor(history, dtype=torch.float32).flatten()
    sampler = LossSecondMomentSampler(T)
    sampler.update(t, values)
    np.testing.assert_allclose(sampler.probabilities().numpy(), by_hand(history), rtol=1e-6)


def test_every_t_gets_its_share_of_uniform_numbers() -> None:
    """The inverse of the distribution function, exactly: middles and edges of each t's piece of 0..1."""
    sampler = fed(losses(HISTORY))
    p = sampler.probabilities().numpy()
    assert sampler.sample(inside(p))[0].tolist() == list(range(T))
    edges = np.cumsum(p)[:-1]
    assert sampler.sample(torch.tensor(edges - 1e-9))[0].tolist() == list(range(T - 1))
    assert sampler.sample(torch.tensor(edges + 1e-9))[0].tolist() == list(range(1, T))
    t, weights = sampler.sample(torch.tensor([0.0, ALMOST_ONE, 1.0]))
    assert t.tolist() == [0, T - 1, T - 1]
    assert weights.dtype == torch.float32


def test_weighted_mean_is_unbiased() -> None:
    """sum_t p(t) w(t) L(t) is the mean of L over t, whatever p is: the exact expectation, not an average of draws."""
    sampler = fed(losses(HISTORY))
    p = sampler.probabilities().numpy()
    t, weights = sampler.sample(inside(p))
    assert t.tolist() == list(range(T))
    L = np.array([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0])
    assert float(np.sum(p * weights.numpy() * L)) == pytest.approx(L.mean(), rel=1e-9)
    assert float(np.sum(p * weights.numpy() ** 2 * L**2)) != pytest.approx(np.mean(L**2), rel=0.1)  # p is not uniform


def test_no_t_is_forgotten() -> None:
    """A t whose losses are zero keeps a thousandth of its uniform share, so its weight is bounded."""
    history = losses(HISTORY)
    history[:, 3] = 0
    sampler = fed(history)
    p = sampler.probabilities().numpy()
    assert p[3] == pytest.approx(0.001 / T)
    assert p.sum() == pytest.approx(1)
    assert float(sampler.sample(inside(p))[1].max()) == pytest.approx(1000)


@pytest.mark.parametrize("rows", [4, 13])
def test_state_survives_a_round_trip(rows: int) -> None:
    """A sampler restored in the warm-up, or after it, goes on as the first one does; states share no memory."""
    history = losses(rows + 9)
    sampler, restored = fed(history[:rows]), LossSecondMomentSampler(T)
    state = sampler.state_dict()
    before = sampler.probabilities()
    restored.load_state_dict(state)
    assert torch.equal(restored.probabilities(), before)
    for row in history[rows:]:
        sampler.update(torch.arange(T), torch.tensor(row))
    assert torch.equal(restored.probabilities(), before)
    restored.load_state_dict(state)
    for row in history[rows:]:
        restored.update(torch.arange(T), torch.tensor(row))
    assert torch.equal(restored.probabilities(), sampler.probabilities())
    np.testing.assert_allclose(restored.probabilities().numpy(), by_hand(history), rtol=1e-6)


# Evenly spread


@pytest.mark.parametrize("count", [1, 10, 512, 2000, 5000])
def test_evenly_spread(count: int) -> None:
    """Every stretch of 0..T-1 gets its share, in an order that tells nothing, the same each time."""
    t = evenly_spread(count, 2000)
    assert torch.equal(t, evenly_spread(count, 2000))
    assert t.dtype == torch.int64
    ideal = (np.arange(count) + 0.5) / count * 2000
    assert np.abs(np.sort(t.numpy()) + 0.5 - ideal).max() <= 0.5 + 1e-9
    if count > 10:
        place = np.corrcoef(np.arange(count), t.numpy())[0, 1]
        assert abs(place) < 5 / np.sqrt(count)  # five standard errors of a random order
