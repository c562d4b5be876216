"""The layers of `--denoiser modern`: what has changed since BERT, in as many parameters.

    h = h + g_1 Attention(m(h; s_1, b_1)),   h = h + g_2 FFN(m(h; s_2, b_2)),   m(h; s, b) = (1 + s) RMS(h) + b     (1)
    RMS(h) = h / sqrt(mean(h^2) + eps)                       (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)       (2)
    (b_1, s_1, g_1, b_2, s_2, g_2) = table + W SiLU(time)    (adaLN-Zero: Peebles & Xie 2023, arXiv 2212.09748)     (3)
    FFN(h) = W_3 (SiLU(W_1 h) * W_2 h)                       (SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 6)        (4)
    q_m = R^m RMS(W_q h_m),   k_n = R^n RMS(W_k h_n)         (QK-norm: Henry et al. 2020, arXiv 2010.04245)         (5)

R turns pairs of entries of a head, each pair by an angle of its own (RoPE, Su et al. 2021, arXiv 2104.09864, eq. 34):
<q_m, k_n> knows m - n, without a table of positions. W is one for all layers, the table one for each (PixArt, Chen et
al. 2023, arXiv 2310.00426); both begin at 0, so that each layer begins as the identity. A network that is not told the
time has the tables alone. Shapes: h (B, L, H), time (B, 1, H), heads are written A and have H / A entries each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_diffusion.config import ModelConfig

EPS = 1e-6
BASE = 10_000.0  # of the angles
PARTS = 6  # of eq. (3)


class ModernLayer(nn.Module):
    """Eq. (1).

    Args:
        config: sizes and choices.
        width: of the feed-forward network.
        causal: each position attends to itself and to those before it only.
    """

    def __init__(self, config: ModelConfig, width: int, causal: bool = False) -> None:
        super().__init__()
        H, head = config.hidden_size, config.hidden_size // config.num_heads
        self.config, self.causal = config, causal
        self.table = nn.Parameter(torch.zeros(PARTS, H))
        self.qkv = nn.Linear(H, 3 * H, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(head, eps=EPS), nn.RMSNorm(head, eps=EPS)
        self.attention_output = nn.Linear(H, H, bias=False)
        self.gate_and_up = nn.Linear(H, 2 * width, bias=False)  # W_1 and W_2 of eq. (4)
        self.down = nn.Linear(width, H, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, turns: Tensor, of_time: Tensor | None) -> Tensor:
        """(B, L, H) -> (B, L, H); `turns` of `rotation`, `of_time` (B, 1, 6, H) is W SiLU(time) of eq. (3)."""
        parts = self.table if of_time is None else self.table + of_time
        b_1, s_1, g_1, b_2, s_2, g_2 = parts.unbind(dim=-2)
        h = h + g_1 * self.attention(modulated(h, s_1, b_1), turns)
        return h + g_2 * self.feed_forward(modulated(h, s_2, b_2))

    def attention(self, h: Tensor, turns: Tensor) -> Tensor:
        """Multi-head attention, eq. (5)."""
        B, L, H = h.shape
        A = self.config.num_heads
        q, k, v = self.qkv(h).view(B, L, 3, A, H // A).permute(2, 0, 3, 1, 4)  # each (B, A, L, H / A)
        q, k = (rotated(norm(x.float()), turns).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        dropout_p = self.config.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=self.causal)
        out: Tensor = self.dropout(self.attention_output(mixed.transpose(1, 2).reshape(B, L, H)))
        return out

    def feed_forward(self, h: Tensor) -> Tensor:
        """Eq. (4)."""
        gate, up = self.gate_and_up(h).chunk(2, dim=-1)
        out: Tensor = self.dropout(self.down(F.silu(gate) * up))
        return out


class TimeModulation(nn.Module):
    """W SiLU(time) of eq. (3), for all layers: (B, 1, H) -> (B, 1, 6, H)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, PARTS * hidden_size, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, time: Tensor) -> Tensor:
        """See above."""
        parts: Tensor = self.linear(F.silu(time))
        return parts.view(*time.shape[:-1], PARTS, -1)


def feed_forward_width(config: ModelConfig, timed: bool) -> int:
    """With which all layers and W have the 12 n H^2 parameters of n layers of BERT's shape, to a multiple of 8."""
    n, H = config.num_layers, config.hidden_size
    left = 8 * n * H - (PARTS * H if timed else 0)  # over H, without the 4 n H^2 of attention
    return max(8, 8 * round(left / (3 * n) / 8))


def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """m of eq. (1), (B, L, H)."""
    normed: Tensor = F.rms_norm(h, h.shape[-1:], eps=EPS)
    return normed * (1 + scale) + shift


def rotation(length: int, size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the angles m BASE^(-2i / size) of positions m, of pairs i and once more, (2, L, size)."""
    frequencies = BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """R^m x_m for every position m of x (..., L, size); entry i is paired with entry i + size / 2."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    turned: Tensor = x * cos + torch.cat([-second, first], dim=-1) * sin
    return turned
