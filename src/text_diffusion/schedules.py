"""Noise schedules: for each name a pure function T -> betas, shape (T,), float64.

`sqrt`, `trunc_cos`, `trunc_lin` and `pw_lin` come from Diffusion-LM (arXiv 2205.14217, appendix A, and its code),
`linear` from Ho et al. 2020 rescaled to any T, `cosine` from Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from text_diffusion.errors import UserError

Array = npt.NDArray[np.float64]

LOG_SNR_MAX, LOG_SNR_MIN = 6.0, -12.0  # a word is then never, and always, mistaken: embeddings of any usual size
MAX_BETA = 0.999  # a beta of 1 would leave nothing to divide by


def betas_for_alpha_bar(abar: Callable[[Array], Array], steps: int, *, from_one: bool = False) -> Array:
    """Betas for a curve ``abar(u)``, u in 0..1: beta_t = 1 - abar((t + 1) / T) / abar(t / T).

    Their cumulative product is abar(u) / abar(0). With ``from_one`` the first step goes from 1 to abar(0), so that the
    product meets a curve that begins below 1 exactly.
    """
    u = np.linspace(0.0, 1.0, steps + 1)
    values = np.concatenate([[1.0], abar(u[:-1])]) if from_one else abar(u)
    betas: Array = np.minimum(1.0 - values[1:] / values[:-1], MAX_BETA)
    return betas


def sqrt(steps: int) -> Array:
    """abar(u) = 1 - sqrt(u + 1e-4): noise rises fast at the start, where a word is still easily told from the next."""
    return betas_for_alpha_bar(lambda u: 1.0 - np.sqrt(u + 1e-4), steps)


def cosine(steps: int) -> Array:
    """abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2)."""
    return betas_for_alpha_bar(lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2, steps)


def trunc_cos(steps: int) -> Array:
    """The cosine curve entered later, abar(0) = 0.98: even the first step hides something."""
    return betas_for_alpha_bar(lambda u: np.cos((u + 0.1) / 1.1 * np.pi / 2) ** 2, steps, from_one=True)


def linear(steps: int) -> Array:
    """Betas from 1e-4 to 0.02 at T = 1000; other T keep the same total noise."""
    return np.minimum(np.linspace(0.1 / steps, 20.0 / steps, steps), MAX_BETA)


def trunc_lin(steps: int) -> Array:
    """The linear schedule with 0.01 added to every beta."""
    return np.minimum(np.linspace(0.1 / steps, 20.0 / steps, steps) + 0.01, MAX_BETA)


def pw_lin(steps: int) -> Array:
    """Piecewise linear: ten steps down from 1e-4 + 0.01 to 1e-4 (at T = 1000), then up to 0.02."""
    knee = min(10, steps)
    first = np.linspace(0.1 / steps + 0.01, 0.1 / steps, knee)
    betas: Array = np.concatenate([first, np.linspace(0.1 / steps, 20.0 / steps, steps - knee)])
    return np.minimum(betas, MAX_BETA)


def log_snr(steps: int) -> Array:
    """abar = sigmoid(lambda) with lambda linear from LOG_SNR_MAX at t = 0 towards LOG_SNR_MIN at t = T."""
    lam = LOG_SNR_MAX + (LOG_SNR_MIN - LOG_SNR_MAX) * np.arange(steps) / steps
    abar = 1 / (1 + np.exp(-lam))
    betas: Array = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    return np.minimum(betas, MAX_BETA)


def log_snr_at(timesteps: Tensor) -> Tensor:
    """lambda of the schedule `log-snr` at a time in 0..1000."""
    return LOG_SNR_MAX + (LOG_SNR_MIN - LOG_SNR_MAX) * timesteps / 1000


SCHEDULES: dict[str, Callable[[int], Array]] = {
    "sqrt": sqrt,
    "linear": linear,
    "cosine": cosine,
    "trunc_cos": trunc_cos,
    "trunc_lin": trunc_lin,
    "pw_lin": pw_lin,
    "log-snr": log_snr,
}


def named_betas(name: str, steps: int) -> Array:
    """The betas of a named schedule, shape (T,), float64, each in (0, 0.999].

    Raises:
        UserError: the name is not one of SCHEDULES, or steps < 1.
    """
    if name not in SCHEDULES:
        raise UserError(f"noise schedule must be one of {', '.join(SCHEDULES)}, found {name!r}")
    if steps < 1:
        raise UserError(f"diffusion steps must be at least 1, found {steps}")
    return SCHEDULES[name](steps)
