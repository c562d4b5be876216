"""What is remembered of the loss at each t, and what is read from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from text_diffusion.fitted_time import FittedSampler
from text_diffusion.loss_by_timestep import ENOUGH, LossByTimestep, loss_curve, means_of


def test_means_are_those_of_the_latest_tenth() -> None:
    """Every loss of the latest steps by hand, each with what is left of its weight; of 500 steps, 25 to 50 back."""
    measured, generator = LossByTimestep(200), torch.Generator().manual_seed(0)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(500):
        t, loss = torch.randint(200, (512,), generator=generator), torch.rand(512, generator=generator)
        measured.update(t, loss)
        history.append((t.numpy() // 2, loss.double().numpy()))
    kept, sums, counts = 1.0, np.zeros(100), np.zeros(100)
    for step in reversed(range(500)):
        part, loss_of_step = history[step]
        sums += kept * np.bincount(part, loss_of_step, minlength=100)
        counts += kept * np.bincount(part, minlength=100)
        kept *= 1 - 1 / max(25, (step + 1) / 10)
    assert counts.min() > ENOUGH
    assert measured.means() == pytest.approx(sums / counts, rel=1e-4)


def test_a_level_that_is_seldom_drawn_forgets_how_hard_it_was() -> None:
    """What all parts of 0..T-1 cost at first, 7 nats, is gone from those that are met once in eight steps, too."""
    measured, generator = LossByTimestep(1000), torch.Generator().manual_seed(0)
    for step in range(1500):
        seldom = torch.rand(64, generator=generator) < (1.0 if step < 25 else 0.1)
        t = torch.where(seldom, torch.randint(1000, (64,), generator=generator), 300)
        measured.update(t, torch.full((64,), 7.0 if step < 100 else 2.0))
    means = measured.means()
    assert means is not None
    assert means == pytest.approx([2.0] * 100, abs=0.01)


def test_a_level_that_is_seldom_drawn_borrows_from_both_sides() -> None:
    sums, counts = np.array([10.0, 1.0, 8.0, 0.0, 90.0]), np.array([10.0, 1.0, 4.0, 0.0, 30.0])
    assert means_of(sums, counts, enough=4) == pytest.approx([1.0, 19 / 15, 2.0, 98 / 34, 3.0])
    assert means_of(sums, counts, enough=1) == pytest.approx([1.0, 1.0, 2.0, 98 / 34, 3.0])
    assert means_of(sums, counts, enough=100) == pytest.approx([109 / 45] * 5)


def test_there_are_no_means_of_few_losses_or_of_what_is_no_number() -> None:
    measured = LossByTimestep(10)
    assert measured.means() is None
    measured.update(torch.arange(10).repeat(9), torch.ones(90))
    assert measured.means() is None
    measured.update(torch.arange(10).repeat(9), torch.ones(90))
    assert measured.means() == pytest.approx([1.0] * 10)
    measured.update(torch.tensor([3]), torch.tensor([float("inf")]))
    assert measured.means() is None


def test_state_is_kept_whole_and_that_of_earlier_versions_is_read() -> None:
    one, two, earlier = LossByTimestep(200), LossByTimestep(200), LossByTimestep(200)
    for step in range(400):
        one.update(torch.arange(200), torch.full((200,), float(step)))
    two.load_state_dict(one.state_dict())
    earlier.load_state_dict({"totals": one.totals})
    for measured in (one, two, earlier):
        measured.update(torch.arange(200), torch.full((200,), 1000.0))
    assert two.means() == one.means()
    assert float(earlier.totals[1].sum()) == pytest.approx(
        0.999 * float(one.totals[1].sum() - 200) / (1 - 1 / 40.1) + 200
    )


def test_time_is_fitted_to_what_is_hard_now() -> None:
    """Half of T is as hard as the other at first, and then as easy as can be: no time is spent there any more."""
    sampler, generator = FittedSampler(1000), torch.Generator().manual_seed(0)
    for step in range(1000):
        t, _ = sampler.sample((torch.arange(128) + torch.rand(128, generator=generator)) / 128)
        hard = 1.0 if step < 300 else 0.0
        sampler.update(t, torch.where(t < 500, 2.0 * t / 500, 2.0 + hard * (t - 500) / 100))
    t, _ = sampler.sample((torch.arange(1000) + 0.5) / 1000)
    assert float((t >= 500).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_loss_curve_goes_through_the_middles() -> None:
    curve = loss_curve([1.0, 2.0, 4.0], 9)
    assert curve.tolist() == pytest.approx([1, 1, 4 / 3, 5 / 3, 2, 8 / 3, 10 / 3, 4, 4])
