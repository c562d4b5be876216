"""What noisy embeddings elsewhere in a sentence say of a word here, where the same word returns: a name, say.

    u_i = sum_{j != i} a_ij e_j,   a_ij = sum_h g_h softmax_j <Q_h h_i, K_h h_j> / sqrt(d)

e_j (`cross_entropy`, eq. 6) is what the noisy embedding of position j adds to the score of each word there, and Bayes'
rule would add it to those of position i too, if both were known to have the same word. Where that is so, attention
over the layers' output h finds out; the evidence itself goes past the layers, which need not carry it word for word
(a pointer, Vinyals et al. 2015, arXiv 1506.03134). Heads add up with a gate g_h each, of any sign: evidence may also
count against a word. Shapes: h (B, L, H), e and u (B, L, D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH = 16  # d
FIRST_GATE = 0.1


class SharedEvidence(nn.Module):
    """u of the equation above.

    Args:
        hidden_size: H.
        num_heads: how many Q_h, K_h and g_h.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(hidden_size, 2 * num_heads * WIDTH)
        self.gate = nn.Parameter(torch.full((num_heads,), FIRST_GATE))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(B, L, H), (B, L, D) -> (B, L, D) float32, L > 1."""
        B, L, _ = h.shape
        q, k = self.qk(h).float().view(B, L, 2, self.num_heads, WIDTH).permute(2, 0, 3, 1, 4)  # each (B, A, L, d)
        with torch.autocast(h.device.type, enabled=False):  # e may be too large for bf16
            scores = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(
                torch.eye(L, dtype=torch.bool, device=h.device), -math.inf
            )
            a = (scores.softmax(dim=-1) * self.gate[:, None, None]).sum(dim=1)  # (B, L, L)
            shared: Tensor = a @ e
        return shared
