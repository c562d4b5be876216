"""Which t a sampler keeps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from text_diffusion.errors import UserError
from text_diffusion.schedules import named_betas
from text_diffusion.spacing import SPACINGS, churned, closing_power, spaced_timesteps

Array = npt.NDArray[np.float64]

# Kept timesteps


def abar(steps: int, name: str = "sqrt") -> Array:
    """alphas_cumprod of a schedule, (T,)."""
    values: Array = np.cumprod(1 - named_betas(name, steps), dtype=np.float64)
    return values


def rising(steps: int) -> Array:
    """A loss that rises fast at first, then stands still."""
    return np.minimum(np.sqrt(np.arange(steps) / steps), 0.6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", range(1, 51))
def test_spaced_timesteps(steps: int, spacing: str) -> None:
    """For every number of steps out of 50: that many, both ends kept, ascending."""
    kept = spaced_timesteps(abar(50), steps, spacing, rising(50))
    assert len(kept) == steps
    assert kept[-1] == 49
    assert kept[0] == (0 if steps > 1 else 49)
    assert np.all(np.diff(kept) >= 1)


def test_auto_spacing_is_by_loss_where_that_is_known() -> None:
    assert spaced_timesteps(abar(50), 7, loss=rising(50)) == spaced_timesteps(abar(50), 7, "loss", rising(50))
    assert spaced_timesteps(abar(50), 7) == spaced_timesteps(abar(50), 7, "uniform", rising(50))


@pytest.mark.parametrize("steps", range(2, 51))
def test_uniform_spacing_is_even(steps: int) -> None:
    assert abs(np.array(spaced_timesteps(abar(50), steps, "uniform")) - np.linspace(0, 49, steps)).max() <= 0.5


def test_log_snr_spacing_is_even_in_log_snr() -> None:
    a = abar(2000, "linear")
    snr = np.log(a / (1 - a))[spaced_timesteps(a, 10, "log-snr")]
    assert np.abs(np.diff(snr) / np.diff(snr).mean() - 1).max() < 0.05


def test_loss_spacing_is_even_in_the_loss_where_it_rises() -> None:
    """Until the loss stands still; from there on only the last timestep, or evenly."""
    loss = rising(2000)
    kept = spaced_timesteps(abar(2000), 20, "loss", loss)
    rises = np.diff(loss[kept])[:-1]
    assert np.abs(rises / rises.mean() - 1).max() < 0.1
    flat = spaced_timesteps(abar(2000), 20, "loss", np.ones(2000))
    assert np.abs(np.array(flat) - np.linspace(0, 1999, 20)).max() <= 0.5


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_places_that_close_up(steps: int) -> None:
    """Where the loss rises evenly with t, at powers of even places that begin short of 0; on other scales even ones."""
    kept = spaced_timesteps(abar(2000), steps, loss=np.linspace(0, 1, 2000), closing=1.5)
    expected = [((i - 0.75) / (steps - 0.75)) ** 1.5 for i in range(1, steps + 1)]
    assert np.abs(np.array(kept) / 1999 - expected).max() < 1e-3
    even = spaced_timesteps(abar(2000), steps, "log-snr", closing=1.5)
    assert even == spaced_timesteps(abar(2000), steps, "log-snr")


def test_places_close_up_where_calls_are_many_for_what_there_is_to_decide() -> None:
    assert closing_power(8, 16.0) == 1.5
    assert closing_power(32, 16.0) == closing_power(16, 16.0) == 2
    assert closing_power(1, 1000.0) == pytest.approx(1.001)
    assert closing_power(1, 0.0) == 2


def test_all_timesteps_and_known_ones() -> None:
    assert spaced_timesteps(abar(2000), 2000) == list(range(2000))
    assert spaced_timesteps(abar(2000), 2000, "log-snr") == list(range(2000))
    assert spaced_timesteps(abar(1), 1) == [0]
    assert spaced_timesteps(abar(2000), 2) == [0, 1999]
    assert spaced_timesteps(abar(101), 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("steps", [0, -1, 51, 2000])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(UserError, match=f"between 1 and 50, .* found {steps}$"):
        spaced_timesteps(abar(50), steps)


def test_bad_spacings() -> None:
    with pytest.raises(UserError, match="one of auto, loss, uniform, log-snr, found 'even'"):
        spaced_timesteps(abar(50), 5, "even")
    with pytest.raises(UserError, match="expects weights that carry their loss by timestep, found none"):
        spaced_timesteps(abar(50), 5, "loss")


# Churn


@pytest.mark.parametrize(("churn", "factor"), [(2.0, 1.2), (100.0, 2**0.5)])
def test_churn_raises_the_noise_by_its_factor(churn: float, factor: float) -> None:
    """From every stop but the first and last, to the nearest timestep: 1 + min(churn / S, sqrt(2) - 1)."""
    a = abar(2000, "linear")
    timesteps = spaced_timesteps(a, 10, "log-snr")
    together, stops = churned(a, timesteps, churn)
    assert [together[i] for i in stops] == timesteps
    ratio = np.sqrt(1 / a - 1)
    raised = [ratio[together[i + 1]] / ratio[together[i]] for i in stops[1:-1]]
    assert len(together) == 10 + 8
    assert raised == pytest.approx([factor] * 8, rel=0.05)


def test_no_churn_before_the_last_prediction() -> None:
    """Wherever that is made."""
    for lowest in (0, 5):
        together, stops = churned(abar(50), [lowest, 20, 40, 49], 100.0)
        assert stops[:2] == [0, 1]
        assert together[:2] == [lowest, 20]
        assert len(together) > 4


def test_no_churn_and_no_room_for_it() -> None:
    """Without churn, or where all timesteps are kept, nothing is added; much raises it as far as the next stop lets."""
    for timesteps, churn in (([0, 10, 40, 49], 0.0), (list(range(50)), 100.0)):
        assert churned(abar(50), timesteps, churn) == (timesteps, list(range(len(timesteps))))
    assert churned(abar(50), [0, 20, 22, 24, 49], 100.0)[0] == [0, 20, 21, 22, 23, 24, 33, 49]
