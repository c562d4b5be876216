"""Which t to train on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from text_diffusion.deterministic import cumulated
from text_diffusion.device import exact
from text_diffusion.fitted_time import FittedSampler


class UniformSampler:
    """Every t equally often."""

    def __init__(self, diffusion_steps: int, device: torch.device | str = "cpu") -> None:
        self.diffusion_steps = diffusion_steps

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform numbers u (B,) to timesteps (B,) int64 and importance weights (B,)."""
        t = (u * self.diffusion_steps).long().clamp_(max=self.diffusion_steps - 1)
        return t, torch.ones_like(u)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class LossSecondMomentSampler:
    """t in proportion to sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 18), with a floor.

    The last HISTORY losses of each t are kept; until every t has that many, t is uniform. Nothing here waits for the
    device or loops over sentences.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, diffusion_steps: int, device: torch.device | str = "cpu") -> None:
        self.diffusion_steps = diffusion_steps
        # The row after the last takes in what is not kept.
        self.losses = torch.zeros(diffusion_steps + 1, self.HISTORY, device=device)
        self.counts = torch.zeros(diffusion_steps, dtype=torch.int64, device=device)
        self.exact = exact(device)

    def probabilities(self) -> Tensor:
        """p(t), shape (T,), float64."""
        p = self.losses[:-1].to(self.exact).square().mean(dim=1).sqrt()
        p = (1 - self.UNIFORM_SHARE) * p / p.sum() + self.UNIFORM_SHARE / self.diffusion_steps
        is_known = (self.counts.min() >= self.HISTORY) & (self.losses[:-1].sum() > 0)
        return torch.where(is_known, p, 1 / self.diffusion_steps)

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform numbers u (B,) to timesteps (B,) int64 and importance weights 1 / (T p(t)), (B,)."""
        p = self.probabilities()
        t = torch.searchsorted(cumulated(p), u.to(self.exact), right=True).clamp_(max=self.diffusion_steps - 1)
        return t, (1 / (self.diffusion_steps * p[t])).to(u.dtype)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses (B,) measured at the timesteps t (B,), as if one after the other."""
        t, order = t.sort(stable=True)
        met = torch.zeros_like(self.counts).index_add_(0, t, torch.ones_like(t))  # how often each t is among these
        number = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)  # 0, 1, ... of the same t
        kept = number >= met[t] - self.HISTORY
        row, column = torch.where(kept, t, self.diffusion_steps), (self.counts[t] + number) % self.HISTORY
        self.losses[row, column] = losses[order].to(self.losses.dtype)
        self.counts += met

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {"losses": self.losses.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


TimestepSampler = UniformSampler | LossSecondMomentSampler | FittedSampler
TIMESTEP_SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentSampler,
    "fitted": FittedSampler,
}


def evenly_spread(count: int, diffusion_steps: int) -> Tensor:
    """`count` timesteps (count,) that cover 0..T-1 evenly, in an order without pattern: fixed, for validation."""
    t = ((np.arange(count) + 0.5) / count * diffusion_steps).astype(np.int64)
    return torch.from_numpy(np.random.default_rng(0).permutation(t))
