"""A baseline that hides words instead of blurring them: masked diffusion (MDLM, Sahoo et al. 2024, arXiv 2406.07524).

    q      at time t each word is hidden, by itself, with probability t, 0 < t <= 1  (alpha_t = 1 - t)             (1)
    loss   1/t sum over the hidden l of -log p(w_l | the words that are not hidden),
           whose mean over t is a bound on -log P(w) (there eq. 10)                                                (2)
    p      from t to s < t each hidden word is shown with probability (t - s) / t, drawn from p; all at once,
           each without knowing the others (there section 3.2)                                                     (3)

The network is that of the baseline that writes left to right, but looks both ways. It is not told t: how much is hidden
can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from text_diffusion.autoregressive import AT_ONCE, WordTransformer, drawn_word, sentences
from text_diffusion.config import ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, nll_of_words
from text_diffusion.randomness import Stream, draw, uniform

if TYPE_CHECKING:
    from text_diffusion.condition import Given
    from text_diffusion.tokenizer import Tokenizer

HIDDEN = -1  # in the place of a word's id
STEPS = 50


class MaskedTransformer(WordTransformer):
    """Predicts each hidden word from those that are shown.

    Args:
        config: sizes and choices.
        vocab_size: V.
        sequence_len: largest L.
        conditions: how many labels, or how many tokens in a source.
    """

    causal = False

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_len: int, conditions: int = 0) -> None:
        super().__init__(config, vocab_size, sequence_len, conditions)
        self.hidden_embedding = nn.Parameter(torch.randn(config.in_channel))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Of ids (B, L), HIDDEN among them, (B, L, D)."""
        shown: Tensor = self.word_embedding(input_ids.clamp(min=0))
        return torch.where((input_ids == HIDDEN)[:, :, None], self.hidden_embedding, shown)


@dataclass(frozen=True)
class HiddenWords:
    """The only term, (B,): eq. (2) in nats, divided by L."""

    nll: Tensor

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,)."""
        return weights * self.nll


def masked_loss(
    model: MaskedTransformer,
    diffusion: GaussianDiffusion,
    input_ids: Tensor,
    t: Tensor,
    noise: Noise,
    condition: Tensor | None = None,
) -> HiddenWords:
    """The loss of sentences w (B, L) at t (B,), 0..T-1, which stand for the times (t + 1) / T; what is hidden depends
    on the draw that other objectives use for w -> x_0."""
    time = (t + 1) / diffusion.num_timesteps
    hidden = torch.special.ndtr(noise.start[:, :, 0]) < time[:, None]
    return HiddenWords(bound(model, input_ids, hidden, time, condition) / input_ids.shape[1])


def bound(
    model: MaskedTransformer, input_ids: Tensor, hidden: Tensor, time: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Eq. (2) in nats, (B,): of sentences w (B, L) of which the words `hidden` (B, L) are hidden at `time` (B,)."""
    logits = model(input_ids.masked_fill(hidden, HIDDEN), condition)  # (B, L, V)
    nll = nll_of_words(logits, input_ids)
    return nll.masked_fill(~hidden, 0).sum(dim=1) / time


@torch.no_grad()
def mean_bound(model: MaskedTransformer, input_ids: Tensor, paths: int, seed: int, batch_size: int = AT_ONCE) -> Tensor:
    """Eq. (2) in nats of sentences (N, L), the mean over `paths` times, one from each of as many equal parts, (N,)."""
    sums = torch.zeros(len(input_ids), device=input_ids.device)
    for path in range(paths):
        for start in range(0, len(input_ids), batch_size):
            ids = input_ids[start : start + batch_size]
            key = (seed, Stream.LIKELIHOOD, path)
            u = draw(uniform, key, start, start + len(ids), (ids.shape[1] + 1,), ids.device)
            time = (path + 1 - u[:, 0]) / paths
            sums[start : start + len(ids)] += bound(model, ids, u[:, 1:] < time[:, None], time)
    return sums / paths


@dataclass(frozen=True)
class Masked:
    """A trained model that uncovers words."""

    model: MaskedTransformer
    tokenizer: Tokenizer
    sequence_len: int
    device: torch.device
    labels: tuple[str, ...] = ()

    @torch.no_grad()
    def sample(
        self,
        n: int = 10,
        *,
        steps: int = STEPS,
        seed: int = 10708,
        batch_size: int | None = None,
        first: int = 0,
        given: Given | None = None,
        **settings: object,
    ) -> list[str]:
        """The sentences first..n-1 of a seed; sentence i depends on the seed and on i alone.

        Args:
            n: one after the last.
            steps: network calls; the times between which (3) goes are evenly spread.
            seed: of the draws.
            batch_size: sentences at once.
            first: the first one.
            given: labels or sources, of a model that was trained with them.
            settings: none.

        Raises:
            ValueError: an argument is out of range, or there is one that only Gaussian diffusion has.
        """
        if settings:
            raise UserError(f"{', '.join(settings)}: settings of Gaussian diffusion, and this model uncovers words")
        if steps < 1:
            raise UserError(f"STEPS must be at least 1, found {steps}")

        def ids(start: int, stop: int) -> Tensor:
            return self._ids(steps, seed, start, stop, None if given is None else given.of(start, stop))

        return sentences(ids, self.tokenizer, n, batch_size, first)

    def _ids(self, steps: int, seed: int, start: int, stop: int, condition: Tensor | None = None) -> Tensor:
        """The words of sentences start..stop-1, (B, L)."""
        L = self.sequence_len
        ids = torch.full((stop - start, L), HIDDEN, device=self.device)
        for step in range(steps):
            u = draw(uniform, (seed, Stream.SAMPLE, step), start, stop, (L, 2), self.device)
            word = drawn_word(self.model(ids, condition), u[:, :, 1:].contiguous()).squeeze(-1)
            shown = (ids == HIDDEN) & (u[:, :, 0] * (steps - step) < 1)  # (t - s) / t = 1 / (steps - step)
            ids = torch.where(shown, word, ids)
        return ids
