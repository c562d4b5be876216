"""Memory of a training step of `cross_entropy` with a vocabulary of 30,000 words, in chunks and with all scores kept.

python benchmarks/vocabulary.py        a line in docs/recipe.md
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
import torch
from common import record

from text_diffusion import chunked
from text_diffusion.config import ModelConfig
from text_diffusion.cross_entropy import WordDenoiser, cross_entropy_loss
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.schedules import named_betas

V, B, L, D = 30_000, 128, 32, 32


def step(chunk: int) -> dict[str, float]:
    """Seconds and peak memory of the process in MB, before the first step and after three."""
    chunked.CHUNK = chunk
    torch.manual_seed(0)
    model = WordDenoiser(ModelConfig(objective="cross_entropy", in_channel=D), V, L).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    diffusion = GaussianDiffusion(named_betas("log-snr", 10_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for number in range(3):
        started = time.perf_counter()
        noise = Noise.draw((0, number), 0, B, (L, D), torch.device("cpu"))
        ids, t = torch.randint(V, (B, L)), torch.randint(10_000, (B,))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy_loss(model, diffusion, ids, t, noise).total().mean())
        optimizer.step()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "before_mb": before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = {name: pool.apply(step, (size,)) for name, size in (("chunked", chunked.CHUNK), ("whole", 2**40))}
    print(json.dumps(rows))
    record("vocabulary", {"V": V, "B": B, "L": L, "rows": rows})
    table.write()


if __name__ == "__main__":
    main()
