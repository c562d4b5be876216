"""A baseline that writes from left to right: p(w) = prod_l p(w_l | w_0 .. w_{l-1}), on the encoder of the denoiser.

Its likelihood is exact and its samples are what a diffusion model's have to be as good as. It counts the same events:
sentences of L tokens, pads included, of which w_0 = [CLS] is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from text_diffusion.condition import Given, of_labels, of_source
from text_diffusion.deterministic import cumulated
from text_diffusion.device import exact
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, nll_of_words
from text_diffusion.memory import in_batches
from text_diffusion.modeling import Transformer
from text_diffusion.randomness import Stream, draw, uniform

if TYPE_CHECKING:
    from text_diffusion.tokenizer import Tokenizer

AT_ONCE = 256  # sentences, if not said otherwise


class WordTransformer(Transformer):
    """Predicts words from words; a source is read before the first word."""

    timed = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """E(w), ids (B, L) -> (B, L, D)."""
        embedded: Tensor = self.word_embedding(input_ids)
        return embedded

    def forward(self, input_ids: Tensor, condition: Tensor | None = None) -> Tensor:
        """Scores of a word for each position, given labels or sources: (B, n) -> (B, n, V)."""
        n = input_ids.shape[1]
        h = self.placed(self.embed(input_ids))  # (B, n, H)
        if self.config.condition == "labels":
            h = h + of_labels(self.condition.weight, condition)
        if self.config.condition == "source":
            known = of_source(self.word_embedding, self.condition.weight, condition, len(h))
            h = torch.cat([self.input_up_proj(known) + self.condition.weight, h], dim=1)  # (B, S + n, H)
        logits: Tensor = self.lm_head(self.output_down_proj(self.encode(h)[:, -n:]))
        return logits


class CausalTransformer(WordTransformer):
    """Predicts each word from those before it: w_0 .. w_{n-1} to scores of w_1 .. w_n."""

    causal = True


@dataclass(frozen=True)
class NextWord:
    """The only term, (B,): -log p(w_l | w_0 .. w_{l-1}), the mean over l = 1 .. L - 1."""

    nll: Tensor

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,); there is no t to weight for."""
        return self.nll


def autoregressive_loss(
    model: CausalTransformer,
    diffusion: GaussianDiffusion,
    input_ids: Tensor,
    t: Tensor,
    noise: Noise,
    condition: Tensor | None = None,
) -> NextWord:
    """The loss of sentences w (B, L); process, t and noise are for other objectives."""
    return NextWord(nlls(model, input_ids, condition).mean(dim=1))


def nlls(model: CausalTransformer, input_ids: Tensor, condition: Tensor | None = None) -> Tensor:
    """-log p(w_l | w_0 .. w_{l-1}) in nats, l = 1 .. L - 1: ids (B, L) -> (B, L - 1)."""
    logits = model(input_ids[:, :-1], condition)  # (B, L - 1, V)
    return nll_of_words(logits, input_ids[:, 1:])


@dataclass(frozen=True)
class Autoregressive:
    """A trained model that writes sentences from left to right."""

    model: CausalTransformer
    tokenizer: Tokenizer
    sequence_len: int
    device: torch.device
    labels: tuple[str, ...] = ()

    @torch.no_grad()
    def sample(
        self,
        n: int = 10,
        *,
        seed: int = 10708,
        batch_size: int | None = None,
        first: int = 0,
        given: Given | None = None,
        greedy: bool = False,
        **settings: object,
    ) -> list[str]:
        """The sentences first..n-1 of a seed, each word drawn from p; sentence i depends on the seed and on i alone.

        Args:
            n: one after the last.
            seed: of the draws.
            batch_size: sentences at once.
            first: the first one.
            given: labels or sources, of a model that was trained with them.
            greedy: take the most probable word instead of drawing one.
            settings: none.

        Raises:
            ValueError: an argument is out of range, or there is one that only a diffusion model has.
        """
        if settings:
            raise UserError(f"{', '.join(settings)}: settings of a diffusion model, and this one writes left to right")

        def ids(start: int, stop: int) -> Tensor:
            condition = None if given is None else given.of(start, stop)
            return self._ids(seed, start, stop, condition, greedy)

        return sentences(ids, self.tokenizer, n, batch_size, first)

    def _ids(self, seed: int, start: int, stop: int, condition: Tensor | None = None, greedy: bool = False) -> Tensor:
        """The words of sentences start..stop-1, (B, L)."""
        ids = torch.full((stop - start, 1), self.tokenizer.cls_id, device=self.device)
        for position in range(1, self.sequence_len):
            logits = self.model(ids, condition)[:, -1]  # (B, V)
            if greedy:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                u = draw(uniform, (seed, Stream.SAMPLE, position), start, stop, (1,), self.device)
                chosen = drawn_word(logits, u)
            ids = torch.cat([ids, chosen], dim=1)
        return ids


def drawn_word(logits: Tensor, u: Tensor) -> Tensor:
    """The first v at which P(w <= v) exceeds a uniform number: scores (..., V) and numbers (..., 1) to ids (..., 1)."""
    dtype = exact(logits.device)
    cumulative = cumulated(logits.to(dtype).softmax(dim=-1))
    return torch.searchsorted(cumulative, u.to(dtype), right=True).clamp_(max=cumulative.shape[-1] - 1)


def sentences(
    ids: Callable[[int, int], Tensor], tokenizer: Tokenizer, n: int, batch_size: int | None, first: int
) -> list[str]:
    """The sentences first..n-1, whose words are ids(start, stop), (B, L), of as many at once as is said.

    Raises:
        UserError: a number is out of range.
    """
    if n < 0:
        raise UserError(f"the number of samples must not be negative, found {n}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"the batch size must be at least 1, found {batch_size}")

    def make(start: int, stop: int) -> list[str]:
        return [tokenizer.decode(row) for row in ids(start, stop).tolist()]

    return in_batches(n, batch_size or AT_ONCE, make, first)
