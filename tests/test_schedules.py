"""Each named schedule is the published formula, also by diffusers' account, and a valid process at every T."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from text_diffusion.errors import UserError
from text_diffusion.schedules import SCHEDULES, named_betas

LENGTHS = (1, 2, 10, 20, 1000, 2000)

# The curves of abar over u = t / T, as published.
CURVES: dict[str, Callable[[float], float]] = {
    "sqrt": lambda u: 1 - math.sqrt(u + 0.0001),
    "cosine": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
    "trunc_cos": lambda u: math.cos((u + 0.1) / 1.1 * math.pi / 2) ** 2,
}


def line(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def published(name: str, steps: int) -> list[float]:
    """The schedules of Diffusion-LM's and improved-diffusion's code, one beta at a time, capped at 0.999."""
    scale = 1000 / steps
    if name == "trunc_cos":  # from 1 to abar(0) first, so the curve's last piece is never used
        curve = CURVES[name]
        betas = [1 - curve(0)]
        for t in range(steps - 1):
            betas.append(1 - curve((t + 1) / steps) / curve(t / steps))
    elif name in CURVES:
        betas = [1 - CURVES[name]((t + 1) / steps) / CURVES[name](t / steps) for t in range(steps)]
    elif name == "linear":
        betas = line(scale * 0.0001, scale * 0.02, steps)
    elif name == "trunc_lin":
        betas = line(scale * 0.0001 + 0.01, scale * 0.02 + 0.01, steps)
    elif name == "log-snr":  # lambda from 6 towards -12, abar its logistic function
        abar = [1.0] + [1 / (1 + math.exp(18 * t / steps - 6)) for t in range(steps)]
        betas = [1 - after / before for before, after in pairwise(abar)]
    else:
        assert name == "pw_lin"
        betas = line(scale * 0.0001 + 0.01, scale * 0.0001, 10) + line(scale * 0.0001, scale * 0.02, steps - 10)
    return [min(beta, 0.999) for beta in betas]


def test_every_schedule_is_covered_here() -> None:
    assert set(SCHEDULES) == {"sqrt", "cosine", "trunc_cos", "linear", "trunc_lin", "pw_lin", "log-snr"}


# pw_lin is published for ten steps or more
@pytest.mark.parametrize(("name", "steps"), [(n, s) for n in SCHEDULES for s in LENGTHS if n != "pw_lin" or s >= 10])
def test_published_formula(name: str, steps: int) -> None:
    np.testing.assert_allclose(named_betas(name, steps), published(name, steps), rtol=1e-10)


@pytest.mark.parametrize("name", CURVES)
def test_abar_follows_its_curve(name: str) -> None:
    """The product of 1 - beta telescopes: abar(t + 1) / abar(0), or abar(t) itself where the curve begins below 1."""
    steps, curve = 2000, CURVES[name]
    abar = np.cumprod(1 - named_betas(name, steps))
    for t in range(steps - 1):  # the last beta may be capped
        expected = curve(t / steps) if name == "trunc_cos" else curve((t + 1) / steps) / curve(0)
        assert abar[t] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [21, 100, 2000, 4000])
def test_linear_keeps_the_total_noise_at_any_length(steps: int) -> None:
    assert float(named_betas("linear", steps).sum()) == pytest.approx(10.05)
    assert float(named_betas("trunc_lin", steps).sum()) == pytest.approx(10.05 + 0.01 * steps)


@pytest.mark.parametrize("steps", LENGTHS)
def test_cosine_agrees_with_diffusers(steps: int) -> None:
    theirs = betas_for_alpha_bar(steps)
    np.testing.assert_allclose(named_betas("cosine", steps), theirs.numpy(), rtol=1e-6)  # theirs is float32


@pytest.mark.parametrize("steps", [100, 1000, 2000])
def test_linear_and_cosine_agree_with_diffusers_scheduler(steps: int) -> None:
    linear = DDPMScheduler(steps, beta_start=0.1 / steps, beta_end=20 / steps, beta_schedule="linear")
    cosine = DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
    for betas, theirs in ((named_betas("linear", steps), linear), (named_betas("cosine", steps), cosine)):
        np.testing.assert_allclose(betas, theirs.betas.numpy(), rtol=1e-6)
        # their product of T float32 factors
        np.testing.assert_allclose(np.cumprod(1 - betas), theirs.alphas_cumprod.numpy(), rtol=1e-6 * steps)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_valid_process(name: str, steps: int) -> None:
    """Some noise but never all of it at each step, in float64, and less signal after every one."""
    betas = named_betas(name, steps)
    assert betas.shape == (steps,)
    assert betas.dtype == np.float64
    assert np.all(betas > 0)
    assert np.all(betas <= 0.999)
    abar = np.cumprod(1 - betas)
    assert np.all(np.diff(abar, prepend=1.0) < 0)
    assert abar[-1] > 0


def test_sqrt_at_2000_steps() -> None:
    """What is known of the default: the first noise has std 0.121, and next to no signal is left at the end."""
    abar = np.cumprod(1 - named_betas("sqrt", 2000))
    assert math.sqrt(1 - abar[0]) == pytest.approx(0.121, abs=0.001)
    assert abar[-1] == pytest.approx(2e-7, rel=0.05)


def test_sqrt_hides_more_at_the_start_than_the_others() -> None:
    first_noise = {name: named_betas(name, 2000)[:20].sum() for name in ("sqrt", "linear", "cosine")}
    assert first_noise["sqrt"] > 10 * max(first_noise["linear"], first_noise["cosine"])


def test_schedules_share_no_memory() -> None:
    named_betas("sqrt", 10)[:] = 0
    assert np.all(named_betas("sqrt", 10) > 0)


@pytest.mark.parametrize(("name", "steps"), [("cubic", 10), ("", 10), ("Sqrt", 10), ("sqrt", 0), ("linear", -1)])
def test_bad_name_or_length(name: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"found {name!r}" if steps > 0 else f"at least 1, found {steps}"):
        named_betas(name, steps)
