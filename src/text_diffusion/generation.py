"""The Python API: `load(path).sample(n, steps=...)`, which the command line uses too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion import checkpoint
from text_diffusion.distributed import pick_device
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.randomness import Stream, draw, normal, truncated_normal
from text_diffusion.samplers import SAMPLERS, Step, ancestral, ddim
from text_diffusion.timesteps import spaced_timesteps
from text_diffusion.tokenizer import Tokenizer

BATCH_MEMORY = 64 * 2**20  # bytes of activations or logits that a chosen batch may need at once


def load(path: str | Path, *, device: str = "auto", gpu: str = "all", tokenizer: str = "") -> TextDiffusion:
    """Load a weights file, ours or the original's (which needs its vocabulary file as `tokenizer`).

    Raises:
        ValueError: the file is missing, truncated or foreign; the device is not there.
    """
    weights = checkpoint.load_weights(Path(path), pick_device(device, gpu), tokenizer)
    return TextDiffusion(weights.model, weights.diffusion, weights.tokenizer, weights.sequence_len, weights.info)


@dataclass(frozen=True)
class TextDiffusion:
    """A trained model that writes sentences."""

    model: TransformerNetModel
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer
    sequence_len: int
    info: dict[str, Any]

    def sample(
        self,
        n: int = 10,
        *,
        steps: int = 20,
        seed: int = 10708,
        batch_size: int | None = None,
        sequence_len: int | None = None,
        sampler: str = "ancestral",
        eta: float | None = None,
        top_p: float | None = None,
        clamp: bool = False,
        clamp_start: int | None = None,
    ) -> list[str]:
        """n sentences; sentence i depends on the seed and on i, not on n or on the batch size.

        Args:
            n: how many.
            steps: network calls, 1..T.
            seed: of the noise.
            batch_size: sentences at once; chosen by size if not given.
            sequence_len: tokens in a sentence, at most the model's, which is the default.
            sampler: "ancestral" or "ddim".
            eta: of ddim, 0..1: the share of the noise that is drawn anew at each step; 0 if not given.
            top_p: truncate the noise added at each step to |z| <= top_p (less variety, more typical sentences).
            clamp: round each prediction of x_0 to the nearest words.
            clamp_start: clamp only at timesteps t < clamp_start, 1..T; everywhere if not given.

        Raises:
            ValueError: an argument is out of range.
        """
        if n < 0:
            raise UserError(f"the number of samples must not be negative, found {n}")
        sentences: list[str] = []
        if batch_size is not None and batch_size < 1:
            raise UserError(f"the batch size must be at least 1, found {batch_size}")
        size = batch_size or self.choose_batch_size(n)
        for start in range(0, n, size):
            stop = min(start + size, n)
            steps_taken = self.denoising(
                start,
                stop,
                steps=steps,
                seed=seed,
                sequence_len=sequence_len,
                sampler=sampler,
                eta=eta,
                top_p=top_p,
                clamp=clamp,
                clamp_start=clamp_start,
            )
            last = deque(steps_taken, maxlen=1).pop()
            sentences += self.decode(last.pred_xstart)
        return sentences

    def denoising(
        self,
        start: int,
        stop: int,
        *,
        steps: int = 20,
        seed: int = 10708,
        sequence_len: int | None = None,
        sampler: str = "ancestral",
        eta: float | None = None,
        top_p: float | None = None,
        clamp: bool = False,
        clamp_start: int | None = None,
    ) -> Iterator[Step]:
        """The sentences start..stop-1 of a seed, step by step; arguments as for `sample`.

        Raises:
            ValueError: an argument is out of range (at once, not at the first step).
        """
        length = sequence_len or self.sequence_len
        if not 3 <= length <= self.sequence_len:
            raise UserError(f"SEQ_LEN must be between 3 and {self.sequence_len}, the model's, found {length}")
        if top_p is not None and not top_p > 0:
            raise UserError(f"TOP_P must be above 0 (it bounds the noise), found {top_p:g}")
        if sampler not in SAMPLERS:
            raise UserError(f"the sampler must be one of {', '.join(SAMPLERS)}, found {sampler!r}")
        if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
            raise UserError(
                f"eta belongs to the sampler ddim and must be between 0 and 1, found {eta:g} with {sampler}"
            )
        if clamp_start is not None and not clamp:
            raise UserError("clamp_start says from where to clamp, so it expects clamp to be on, found it off")
        if clamp_start is not None and not 1 <= clamp_start <= self.diffusion.num_timesteps:
            raise UserError(f"clamp_start must be between 1 and {self.diffusion.num_timesteps}, found {clamp_start}")
        process = self.diffusion.respace(spaced_timesteps(self.diffusion.num_timesteps, steps))
        shape, device = (length, self.model.config.in_channel), self.diffusion.device
        inner = normal if top_p is None else truncated_normal(top_p)

        def noise(s: int) -> Tensor:
            distribution = normal if s == steps else inner
            return draw(distribution, (seed, Stream.SAMPLE, s), start, stop, shape, device)

        def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
            pred_xstart: Tensor = self.model(x_t, process.network_time(t), previous)
            timestep = process.timesteps[int(t[0])] if clamp else 0
            if clamp and (clamp_start is None or timestep < clamp_start):
                pred_xstart = nearest_embedding(pred_xstart, self.model.word_embedding.weight)
            return pred_xstart

        if sampler == "ddim":
            return _without_grad(ddim(denoise, process, noise, eta or 0.0))
        return _without_grad(ancestral(denoise, process, noise))

    @torch.no_grad()
    def decode(self, x: Tensor, whole: bool = False) -> list[str]:
        """Round (B, L, D) to words by the tied head, and to sentences; `whole` keeps what follows [SEP]."""
        ids = self.model.get_logits(x).argmax(dim=-1).tolist()
        return [self.tokenizer.decode_all(row) if whole else self.tokenizer.decode(row) for row in ids]

    def choose_batch_size(self, n: int) -> int:
        """As many sentences at once as BATCH_MEMORY allows, at most 256 on a CPU, whose caches are small."""
        config = self.model.config
        widest = max(self.tokenizer.vocab_size, 4 * config.hidden_size, config.num_heads * self.sequence_len)
        most = 256 if self.diffusion.device.type == "cpu" else 16384
        return max(1, min(n, most, BATCH_MEMORY // (4 * widest * self.sequence_len)))


def nearest_embedding(x: Tensor, embeddings: Tensor) -> Tensor:
    """Clamping (Diffusion-LM section 4.2): each entry (..., D) is replaced by the embedding nearest to it."""
    # argmin |x - e|^2 = argmax x.e - |e|^2 / 2
    scores = x @ embeddings.T - embeddings.square().sum(dim=1) / 2
    return embeddings[scores.argmax(dim=-1)]


def _without_grad(steps: Iterator[Step]) -> Iterator[Step]:
    """Run a generator's body without autograd; the body of the caller's loop keeps its own mode."""
    while True:
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step
