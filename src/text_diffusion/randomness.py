"""Random numbers that depend on what they are for, not on how often a generator was called.

Every draw belongs to a block of consecutive sentences and is a function of a key, such as (seed, stream, step), and of
the block's number. Hence a batch may be cut into micro-batches or shared between ranks, a run may stop and go on, a
sentence may be sampled alone or among others: each sentence meets the same noise. (A GPU's is not a CPU's.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # sentences
GPU_BLOCK, GPU_NUMBERS = 1024, 2**23  # sentences, numbers at most: a draw takes a GPU longer to begin than to make


class Stream(IntEnum):
    """What a draw is for: the same step of the same seed must not reuse numbers for two purposes."""

    INIT = 0
    ORDER = 1
    TRAIN = 2
    DROPOUT = 3
    VALIDATION = 4
    SAMPLE = 5
    SPLIT = 6
    LIKELIHOOD = 7
    PAIRS = 8
    CONTROL = 20


def mix(*key: int) -> int:
    """One well-mixed seed for torch's generators from several integers in 0..2^32-1 (NumPy's SeedSequence).

    A key begins with seed and stream, and those of a stream have one length: SeedSequence ignores zeros at the end.
    (On a CPU torch's generator takes the lower 32 bits, so that among 10,000 blocks two share numbers with 1 % chance.)
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw(
    distribution: Callable[[tuple[int, ...], torch.Generator], Tensor],
    key: tuple[int, ...],
    start: int,
    stop: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Draws for the sentences start..stop-1, shape (stop - start, *shape): the same whatever else is drawn."""
    generator = torch.Generator(device)
    size = block_size(shape, generator.device)
    blocks = []
    for block in range(start // size, -(-stop // size)):
        generator.manual_seed(mix(*key, block))
        first = block * size
        blocks.append(distribution((size, *shape), generator)[max(start - first, 0) : stop - first])
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def block_size(shape: tuple[int, ...], device: torch.device) -> int:
    """Sentences in a block of draws of a shape: it must not depend on how many are asked for."""
    if device.type == "cpu":
        return BLOCK
    return max(BLOCK, min(GPU_BLOCK, GPU_NUMBERS // math.prod(shape)))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), float32."""
    return torch.rand(shape, generator=generator, device=generator.device)


def truncated_normal(limit: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """Standard normal numbers given that |z| <= limit, by inverting the distribution function.

    Their variance is 1 - 2 a phi(a) / (2 Phi(a) - 1) for a = limit: 0.24 at 0.9, 0.77 at 2. The original calls this
    top_p; unlike nucleus sampling it takes variance, and hence variety, from the whole process.
    """
    limit = min(limit, 5.0)  # beyond that, erf is 1 in float32 and its inverse infinite
    erf = float(torch.erf(torch.tensor(limit / 2**0.5, dtype=torch.float64)))  # P(|z| <= limit)

    def distribution(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        u = uniform(shape, generator) * 2 - 1
        return (2**0.5 * torch.erfinv(u * erf)).clamp(-limit, limit)

    return distribution
