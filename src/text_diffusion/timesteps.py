"""Which t to train on, and which t to keep when sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from text_diffusion.errors import UserError


def spaced_timesteps(diffusion_steps: int, steps: int) -> list[int]:
    """The `steps` timesteps kept by a sampler, evenly from 0 to T - 1, both included (a single step is T - 1).

    Raises:
        UserError: steps is not in 1..T.
    """
    if not 1 <= steps <= diffusion_steps:
        raise UserError(
            f"STEPS must be between 1 and {diffusion_steps}, the steps that the model was trained with, found {steps}"
        )
    if steps == 1:
        return [diffusion_steps - 1]
    return [round(i * (diffusion_steps - 1) / (steps - 1)) for i in range(steps)]


class UniformSampler:
    """Every t equally often."""

    def __init__(self, diffusion_steps: int) -> None:
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

    The last HISTORY losses of each t are kept; until every t has that many, t is uniform.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, diffusion_steps: int) -> None:
        self.losses = torch.zeros(diffusion_steps, self.HISTORY)
        self.counts = torch.zeros(diffusion_steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p(t), shape (T,), float64."""
        diffusion_steps = len(self.counts)
        uniform = torch.full((diffusion_steps,), 1 / diffusion_steps, dtype=torch.float64)
        if int(self.counts.min()) < self.HISTORY:
            return uniform
        p = self.losses.double().square().mean(dim=1).sqrt()
        if float(p.sum()) == 0:
            return uniform
        return (1 - self.UNIFORM_SHARE) * p / p.sum() + self.UNIFORM_SHARE * uniform

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform numbers u (B,) to timesteps (B,) int64 and importance weights 1 / (T p(t)), (B,)."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double().cpu(), right=True).clamp_(max=len(p) - 1)
        return t.to(u.device), (1 / (len(p) * p[t])).to(u.device, u.dtype)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses (B,) measured at the timesteps t (B,)."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[step, int(self.counts[step]) % self.HISTORY] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


TimestepSampler = UniformSampler | LossSecondMomentSampler
TIMESTEP_SAMPLERS: dict[str, type[UniformSampler | LossSecondMomentSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentSampler,
}


def evenly_spread(count: int, diffusion_steps: int) -> Tensor:
    """`count` timesteps (count,) that cover 0..T-1 evenly, in an order without pattern: fixed, for validation."""
    t = ((np.arange(count) + 0.5) / count * diffusion_steps).astype(np.int64)
    return torch.from_numpy(np.random.default_rng(0).permutation(t))
