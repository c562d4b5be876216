"""The loss at each noise level, of late: which levels are learned from, and where a sampler stops, go by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from text_diffusion.schedules import Array

BINS = 100  # equal parts of 0..T-1
FEWEST, SHARE, MOST = 25, 0.1, 1000  # steps to look back on: a share of those so far, within bounds
ENOUGH = 100  # losses in a mean


class LossByTimestep:
    """Means over the latest steps, in equal parts of 0..T-1.

    How far back these go grows with training, and stays a tenth of it: what was learned long ago is not what there is
    to learn. A level that is seldom drawn would otherwise look for long as hard as it was at the start.

    Args:
        diffusion_steps: T.
        device: of the sums.
    """

    def __init__(self, diffusion_steps: int, device: torch.device | str = "cpu") -> None:
        self.diffusion_steps = diffusion_steps
        self.totals = torch.zeros(2, min(BINS, diffusion_steps), device=device)  # of the losses, and how many
        self.updates = 0

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses (B,) at the timesteps t (B,); waits for nothing."""
        self.updates += 1
        memory = min(max(SHARE * self.updates, FEWEST), MOST)
        part = t * self.totals.shape[1] // self.diffusion_steps
        self.totals.mul_(1 - 1 / memory).index_add_(1, part, torch.stack([losses, torch.ones_like(losses)]))

    def means(self) -> list[float] | None:
        """The mean loss of each part; none before there have been enough losses for one, or if they are not finite."""
        sums, counts = self.totals.cpu().double().numpy()
        if counts.sum() < ENOUGH or not np.isfinite(sums).all():
            return None
        return means_of(sums, counts).tolist()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {"totals": self.totals.cpu().clone(), "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave; earlier versions did not count updates, and looked back as far as MOST."""
        self.totals.copy_(state["totals"])
        self.updates = int(state.get("updates", MOST / SHARE))


def means_of(sums: Array, counts: Array, enough: float = ENOUGH) -> Array:
    """The mean of each part, and of as many on both sides of it as it takes for `enough` losses, (BINS,)."""
    means = np.empty(len(sums))
    for i in range(len(sums)):
        near, reach = slice(i, i + 1), 0
        while counts[near].sum() < enough and reach < len(sums):
            reach += 1
            near = slice(max(0, i - reach), i + reach + 1)
        means[i] = sums[near].sum() / counts[near].sum()
    return means


def loss_curve(means: Sequence[float], diffusion_steps: int) -> Array:
    """The loss at every t, (T,), from its means over equal parts."""
    middles = (np.arange(len(means)) + 0.5) * diffusion_steps / len(means) - 0.5
    curve: Array = np.interp(np.arange(diffusion_steps), middles, np.asarray(means))
    return curve
