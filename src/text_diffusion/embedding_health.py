"""Whether embeddings use their space: two numbers that show a collapse before the samples do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # compared with all others at once


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the shares of variance along the principal axes of E (V, D): 1 (a line) to D (all alike).

    (Roy & Vetterli 2007, "The effective rank", with squared singular values, of directions about their mean.)
    """
    x = F.normalize(embeddings.float(), dim=1)
    variances = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    shares = variances / variances.sum().clamp(min=1e-30)
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def smallest_angle(embeddings: Tensor) -> float:
    """The angle between the two words of E (V, D) that are nearest in direction, in degrees; 180 with a single word."""
    x = F.normalize(embeddings.float(), dim=1)
    nearest = -1.0
    for start in range(0, len(x), ROWS):
        cosines = x[start : start + ROWS] @ x.T
        cosines.diagonal(start).fill_(-1.0)
        nearest = max(nearest, float(cosines.max()))
    return float(torch.rad2deg(torch.arccos(torch.tensor(nearest).clamp(-1, 1))))
