"""Which t a sampler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from text_diffusion.errors import UserError
from text_diffusion.fitted_time import fitted_time, monotone
from text_diffusion.schedules import Array

SPACINGS = ("auto", "loss", "uniform", "log-snr")


def spaced_timesteps(
    alphas_cumprod: Array,
    steps: int,
    spacing: str = "auto",
    loss: Array | None = None,
    closing: float | None = None,
) -> list[int]:
    """The `steps` timesteps kept by a sampler, ascending to T - 1 (a single step is T - 1).

    Args:
        alphas_cumprod: abar, (T,).
        steps: how many, 1..T.
        spacing: what grows evenly from one to the next: `uniform` t itself, `log-snr` log(abar / (1 - abar)), `loss`
            the loss measured in training, so that more steps go where prediction gets harder faster; `auto` is `loss`
            where that is known, else `uniform`.
        loss: the loss by t, (T,), if it was measured.
        closing: on the scale of the loss, from 0 to 1, they stand at ((i - 3/4) / (S - 3/4))^closing, i = 1..S, instead
            of at even places: the last one short of t = 0, and the greater the power, the closer together the less
            noise there is.

    Raises:
        UserError: steps is not in 1..T; no such spacing, or the loss was not measured.
    """
    T = len(alphas_cumprod)
    if not 1 <= steps <= T:
        raise UserError(f"STEPS must be between 1 and {T}, the steps that the model was trained with, found {steps}")
    if spacing == "auto":
        spacing = "uniform" if loss is None else "loss"
    if spacing == "uniform":
        scale = np.arange(T, dtype=np.float64)
    elif spacing == "log-snr":
        scale = np.log1p(-alphas_cumprod) - np.log(alphas_cumprod)
    elif spacing == "loss":
        if loss is None:
            raise UserError("the spacing `loss` expects weights that carry their loss by timestep, found none in these")
        scale = fitted_time(monotone(loss), everywhere=0.01)
    else:
        raise UserError(f"the spacing must be one of {', '.join(SPACINGS)}, found {spacing!r}")
    if steps == 1:
        return [T - 1]
    places = np.linspace(scale[0], scale[-1], steps)
    if closing is not None and spacing == "loss":
        even = (np.arange(steps) + 0.25) / (steps - 0.75)
        places = scale[0] + even**closing * (scale[-1] - scale[0])
    kept = np.rint(np.interp(places, scale, np.arange(T))).astype(int)
    return _distinct(kept, T).tolist()  # type: ignore[no-any-return]


def closing_power(calls: int, nats: float) -> float:
    """How close together the calls of a model of words stand at little noise, 1..2 (see `spaced_timesteps`).

    What a call leaves open the next one decides for each word by itself, whatever its neighbour decides. Where there
    are fewer calls than there is to decide in a sentence, in nats, that is so everywhere, and they are spread evenly.
    Where there are more, few mistakes are made at much noise, and they close up towards the last words, which nothing
    corrects.
    """
    return 1 + min(1.0, calls / nats) if nats > 0 else 2.0


def _distinct(timesteps: npt.NDArray[np.int64], diffusion_steps: int) -> npt.NDArray[np.int64]:
    """Ascending timesteps, moved apart as little as makes them distinct, within 0..T - 1."""
    places = np.arange(len(timesteps))
    apart = np.maximum.accumulate(timesteps - places) + places
    return np.minimum(apart, diffusion_steps - len(timesteps) + places)


def churned(alphas_cumprod: Array, timesteps: Sequence[int], churn: float) -> tuple[list[int], list[int]]:
    """Timesteps for a sampler that raises the noise again before each step (arXiv 2206.00364, algorithm 2).

    sigma / alpha rises by the factor 1 + min(churn / S, sqrt(2) - 1), S the number of steps, to the nearest timestep of
    training, or to the last one below the next one kept. Not before the last prediction: nothing comes after it.

    Returns:
        all timesteps, ascending; and the positions among them of those that were given, the stops.
    """
    noise = np.sqrt(1 / alphas_cumprod - 1)
    factor = 1 + min(churn / len(timesteps), np.sqrt(2) - 1)
    both = set(timesteps)
    for t, following in pairwise(timesteps[1:]):
        raised = int(np.abs(np.log(noise / (noise[t] * factor))).argmin())
        both.add(min(raised, following - 1))
    together = sorted(both)
    return together, [together.index(t) for t in timesteps]
