"""Numbers depend on their key and on the sentence alone, and have the distribution that is promised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from text_diffusion.randomness import BLOCK, Stream, draw, mix, normal, truncated_normal, uniform

CPU = torch.device("cpu")
N = 100_000
# Bounds below are five standard errors: a false alarm has probability 6e-7 a bound. Those of p-values are 1e-6.


def sample(distribution: Callable[[tuple[int, ...], torch.Generator], Tensor], n: int = N) -> npt.NDArray[np.float64]:
    values = distribution((n,), torch.Generator().manual_seed(0))
    assert values.dtype == torch.float32
    return values.double().numpy()


# draw


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 3)])
def test_a_draw_is_a_slice_of_a_longer_one(shape: tuple[int, ...]) -> None:
    """Over many ranges, those at the edges of blocks among them: sentences meet the same noise in any company."""
    last = 5 * BLOCK + 7
    whole = draw(normal, (1, 2), 0, last, shape, CPU)
    assert whole.shape == (last, *shape)
    edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, last]
    ranges = list(itertools.combinations(edges, 2))
    ranges += [tuple(sorted(pair)) for pair in np.random.default_rng(0).integers(last, size=(100, 2)).tolist()]
    for start, stop in ranges:
        if start < stop:
            assert torch.equal(draw(normal, (1, 2), start, stop, shape, CPU), whole[start:stop])


def test_micro_batches_put_together_are_the_batch() -> None:
    whole = draw(uniform, (3,), 0, 100, (2,), CPU)
    for micro in (1, 10, 32, 33, 100):
        parts = [draw(uniform, (3,), i, min(i + micro, 100), (2,), CPU) for i in range(0, 100, micro)]
        assert torch.equal(torch.cat(parts), whole)


def test_keys_and_blocks_differ() -> None:
    """No number comes twice, neither under two keys nor in two blocks."""
    keys = [
        (seed, stream, step) for seed in (0, 1, 2) for stream in (Stream.TRAIN, Stream.SAMPLE) for step in (0, 1, 5)
    ]
    rows = torch.cat([draw(normal, key, 0, 4 * BLOCK, (3,), CPU) for key in keys])
    assert len(torch.unique(rows, dim=0)) == len(keys) * 4 * BLOCK


def test_numbers_do_not_depend_on_the_global_generator() -> None:
    """Nor does a draw move it."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = draw(normal, (1,), 0, 40, (2,), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(normal, (1,), 0, 40, (2,), CPU), one)


def test_sentences_are_independent() -> None:
    """Correlations between neighbours, blocks and keys are none, to five standard errors."""
    a, b = (draw(normal, (key,), 0, 64 * BLOCK, (50,), CPU).double() for key in (1, 2))
    for x, y in ((a, b), (a[1:], a[:-1]), (a[BLOCK:], a[:-BLOCK]), (a[:, 1:], a[:, :-1])):
        assert abs(float((x * y).mean())) < 5 / math.sqrt(x.numel())


# mix


def test_mix_never_collides() -> None:
    """30,000 keys of one length, small and large ones: as many seeds of 63 bits."""
    seeds = [
        mix(seed, stream, step, n)
        for seed in (0, 1, 2, 102, 10_708)
        for stream in Stream
        for step in range(214)
        for n in range(4)
    ]
    assert len(seeds) > 29_000
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_mix_tells_the_order_apart() -> None:
    orders = list(itertools.permutations((1, 2, 3, 4)))
    assert len({mix(*key) for key in orders}) == len(orders)


def test_streams_differ() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream)


# Distributions


def test_normal() -> None:
    z = sample(normal)
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert z.var() == pytest.approx(1, abs=5 * math.sqrt(2 / N))
    assert stats.kstest(z, "norm").pvalue > 1e-6


def test_uniform() -> None:
    u = sample(uniform)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("limit", [0.05, 0.5, 0.9, 2.0, 3.5, 6.0])
def test_truncated_normal(limit: float) -> None:
    """The standard normal given |z| <= limit: range, shape, mean, and the variance that the docstring states."""
    z = sample(truncated_normal(limit))
    truth = stats.truncnorm(-limit, limit)
    variance = 1 - 2 * limit * stats.norm.pdf(limit) / (2 * stats.norm.cdf(limit) - 1)
    assert truth.var() == pytest.approx(variance, rel=1e-6)
    assert np.abs(z).max() <= limit
    assert stats.kstest(z, truth.cdf).pvalue > 1e-6
    assert abs(z.mean()) < 5 * math.sqrt(variance / N)
    fourth = float(truth.moment(4))
    assert z.var() == pytest.approx(variance, abs=5 * math.sqrt((fourth - variance**2) / N))


@pytest.mark.parametrize(("limit", "variance"), [(0.9, 0.24), (2.0, 0.77)])
def test_variance_at_well_known_limits(limit: float, variance: float) -> None:
    assert sample(truncated_normal(limit)).var() == pytest.approx(variance, abs=0.01)


def test_truncation_keeps_the_order_of_the_numbers_it_is_made_from() -> None:
    """By inversion: one uniform number gives one z, so that nothing is drawn again and blocks keep their size."""
    z, u = sample(truncated_normal(0.9)), sample(uniform)
    assert np.all(np.diff(z[np.argsort(u)]) >= 0)
