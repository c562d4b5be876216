"""Where torch's fused attention overtakes the plain formula on this machine: the ratio of their times, alternately.

    python benchmarks/attention.py

Forward and backward at batch 128, 4 heads of size 32; `modeling.LONGEST_PLAIN` is the longest L at which plain wins.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from common import machine
from torch import Tensor

from text_diffusion import modeling

PAIRS = 15


def seconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
    """Time of one forward and backward pass."""
    started = time.perf_counter()
    torch.autograd.backward(attend(q, k, v).sum())
    return time.perf_counter() - started


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, whatever the length."""
    return modeling.plain_attention(q, k, v, 0.0)


def main() -> None:
    """Print a row for each L."""
    print(machine())
    print("L     fused/plain (median, lowest, highest of pairs)")
    for length in (8, 11, 16, 24, 32, 48, 64, 96, 128):
        q, k, v = (torch.randn(128, 4, length, 32, requires_grad=True) for _ in range(3))
        seconds(plain, q, k, v), seconds(F.scaled_dot_product_attention, q, k, v)
        pairs = [(seconds(F.scaled_dot_product_attention, q, k, v), seconds(plain, q, k, v)) for _ in range(PAIRS)]
        ratios = [fused / other for fused, other in pairs]
        print(f"{length:<5} {statistics.median(ratios):.2f}  {min(ratios):.2f}  {max(ratios):.2f}")


if __name__ == "__main__":
    main()
