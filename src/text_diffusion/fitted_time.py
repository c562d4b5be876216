"""Time in which the loss is linear, fitted while training (Dieleman et al. 2022, arXiv 2211.15089, section 3.3).

    F(t) = (1 - e) (l(t) - l(0)) / (l(T-1) - l(0)) + e t / (T-1),    l: the mean loss at t, made monotone

rises from 0 to 1 as t does. A uniform number u becomes t = F^-1(u): in training many t where the loss rises fast, in
sampling (`spacing.spaced_timesteps`) steps at places on it. The share e keeps every t in view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from text_diffusion.loss_by_timestep import LossByTimestep
from text_diffusion.schedules import Array

EVERYWHERE = 0.1  # e


def monotone(values: Array, weights: Array | None = None) -> Array:
    """The non-decreasing sequence nearest to `values` in (weighted) squares, by pooling neighbours that fall."""
    weights = np.ones(len(values)) if weights is None else weights
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] >= pool[0]:
            mean, total, count = pools.pop()
            both = total + pool[1]
            pool = ((mean * total + pool[0] * pool[1]) / both, both, count + pool[2])
        pools.append(pool)
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


def fitted_time(loss: Array, everywhere: float = EVERYWHERE) -> Array:
    """F at points evenly spaced from 0 to T - 1, from the loss there, monotone; a straight line if that is constant."""
    even = np.linspace(0.0, 1.0, len(loss))
    rise = loss[-1] - loss[0]
    if rise <= 1e-3 * abs(loss[-1]) + 1e-9:  # what is left of a rise is rounding
        return even
    F: Array = (1 - everywhere) * (loss - loss[0]) / rise + everywhere * even
    return F


class FittedSampler:
    """t = F^-1(u), F of the loss at each t as it has been of late; refitted every REFIT steps, on the CPU."""

    REFIT = 25

    def __init__(self, diffusion_steps: int, device: torch.device | str = "cpu") -> None:
        self.diffusion_steps = diffusion_steps
        self.measured = LossByTimestep(diffusion_steps, device)
        self.F = torch.linspace(0, 1, self.measured.totals.shape[1] + 1, device=device)  # at the edges of its parts

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform numbers u (B,) to timesteps (B,) int64 and weights of 1: what F prefers shall weigh more."""
        part = (torch.searchsorted(self.F, u.contiguous(), right=True) - 1).clamp_(0, len(self.F) - 2)
        within = (u - self.F[part]) / (self.F[part + 1] - self.F[part])
        t = ((part + within) * self.diffusion_steps / (len(self.F) - 1)).long()
        return t.clamp_(max=self.diffusion_steps - 1), torch.ones_like(u)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses (B,) at the timesteps t (B,)."""
        self.measured.update(t, losses)
        if self.measured.updates % self.REFIT == 0 and (means := self.measured.means()) is not None:
            edges = np.arange(len(self.F)) - 0.5
            loss = np.interp(edges, np.arange(len(means)), monotone(np.asarray(means)))
            self.F.copy_(torch.from_numpy(fitted_time(loss)))

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {"F": self.F.cpu().clone(), **self.measured.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.F.copy_(state["F"])
        self.measured.load_state_dict(state)
