"""What stands next to a word, seen before any layer looks for it.

    h_i <- h_i + sum_{0 < |k| <= n} W_k h_{i+k} + b,   h beyond the ends being 0

Attention has to find out first that the words beside a word say most of it. A convolution over the sentence begins with
them (Primer, So et al. 2021, arXiv 2109.08668, has one in each layer's attention). Shapes: h (B, L, H), W_k (H, H).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.02  # of fresh W_k: layers begin with each word by itself


class Neighbours(nn.Module):
    """The equation above; W_k lie side by side, as one matrix.

    Args:
        hidden_size: H.
        reach: n.
        causal: k < 0 alone, for a network that writes from left to right.
    """

    def __init__(self, hidden_size: int, reach: int, causal: bool = False) -> None:
        super().__init__()
        self.shifts = [k for k in range(-reach, reach + 1) if k < 0 or (k > 0 and not causal)]
        self.linear = nn.Linear(len(self.shifts) * hidden_size, hidden_size)
        nn.init.normal_(self.linear.weight, std=STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        n, L = max(map(abs, self.shifts)), h.shape[1]
        padded = F.pad(h, (0, 0, n, n))
        out: Tensor = h + self.linear(torch.cat([padded[:, n + k : n + k + L] for k in self.shifts], dim=-1))
        return out
