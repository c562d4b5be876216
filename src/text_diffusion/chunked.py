"""The loss and the mean embedding of a large vocabulary, without ever keeping a score for every position and word.

    log p(v) = <E(v), q> + b_v - log sum_u exp(<E(u), q> + b_u)

Scores are computed for some positions at a time. What they give goes into tensors that are made once, before the first
of them: small ones left behind between large ones would break memory into pieces, and the peak would hardly fall.
Shapes: q (B, L, D), E (V, D), b (V,), w (B, L).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 2**22  # scores in a chunk, of which two or three copies are in memory at once: 16 MB each
GPU_CHUNK = 2**27  # 512 MB each: a GPU is idle while many small products begin


def word_nll(q: Tensor, E: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """-log p(w) at every position, (B, L)."""
    nll: Tensor = _WordNLL.apply(q.flatten(0, 1), E, b, w.flatten())  # type: ignore[no-untyped-call]
    return nll.view(w.shape)


def mean_embedding(q: Tensor, E: Tensor, b: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v p(v) E(v) at every position, (B, L, D); p^(1 / temperature), made to sum to one, in the place of p."""

    def of(q: Tensor) -> Tensor:
        return (F.linear(q, E, b) / temperature).softmax(dim=-1) @ E

    flat = q.flatten(0, 1)
    if torch.is_grad_enabled():
        parts = [checkpoint(of, flat[at], use_reentrant=False) for at in _chunks(flat, E)]
        return torch.cat(parts).view(q.shape)
    mean = torch.empty_like(flat)
    for at in _chunks(flat, E):
        mean[at] = of(flat[at])
    return mean.view(q.shape)


class _WordNLL(torch.autograd.Function):
    """-log p(w), (N,), of q (N, D), E, b and w (N,); for the gradient the scores are computed a second time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, E: Tensor, b: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(q, E, b, w)
        nll = q.new_empty(len(q))
        for at in _chunks(q, E):
            nll[at] = F.cross_entropy(F.linear(q[at], E, b), w[at], reduction="none")
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """d nll / d score_v = p(v) - [v = w]."""
        q, E, b, w = ctx.saved_tensors
        dq, dE, db = torch.empty_like(q), torch.zeros_like(E), torch.zeros_like(b)
        for at in _chunks(q, E):
            d = F.linear(q[at], E, b).softmax(dim=-1)
            d[torch.arange(len(d), device=d.device), w[at]] -= 1
            d *= g[at, None]
            torch.mm(d, E, out=dq[at])
            dE.addmm_(d.T, q[at])
            db += d.sum(dim=0)
        return dq, dE, db, None


def _chunks(q: Tensor, E: Tensor) -> Iterator[slice]:
    """Positions to take at a time."""
    size = max(1, (GPU_CHUNK if q.device.type != "cpu" else CHUNK) // len(E))
    return (slice(start, start + size) for start in range(0, len(q), size))
