"""What sentences are given, p(w | c): a label, or a source text to write from.

A label's embedding is added to that of the time. A source stands before the sentence, its words E(w) without noise, so
that the sentence attends to it; the network is asked for the sentence alone (DiffuSeq, Gong et al. 2023, arXiv
2210.08933, whose "partial noising" this is, with a place of fixed size for the source). Now and then a sentence is
given nothing in training, NONE, so that one network knows p(w) too; sampling goes along the difference (classifier-free
guidance, Ho & Salimans 2022, arXiv 2207.12598, eq. 6; by Tweedie's formula it is the same in x_0 as in the noise):

    x_0 = f(x_t) + scale (f(x_t, c) - f(x_t))                                                                  (1)

Shapes: labels (B,), sources (B, S), both int64, NONE where nothing is given; a table is (C, H) of labels, (S, H) of the
places in a source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from text_diffusion.modeling import TransformerNetModel

NONE = -1
TABLE_STD = 0.1  # of fresh embeddings, so that at first they drown nothing


def condition_table(rows: int, width: int) -> nn.Embedding:
    """A new table."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=TABLE_STD)
    return table


def of_labels(table: Tensor, labels: Tensor | None) -> Tensor:
    """Embeddings (B, 1, H) of labels; 0 for NONE, and of shape (1, 1, H) if there are no labels at all."""
    if labels is None:
        return torch.zeros_like(table[:1, None])
    return (F.embedding(labels.clamp(min=0), table) * (labels >= 0)[:, None])[:, None]


def of_source(embed: Callable[[Tensor], Tensor], table: Tensor, source: Tensor | None, sentences: int) -> Tensor:
    """E(w) of sources (B, S, D); 0 for NONE, also if there are none at all."""
    if source is None:
        source = torch.full((sentences, len(table)), NONE, device=table.device)
    return embed(source.clamp(min=0)) * (source >= 0).unsqueeze(-1)


def dropped(condition: Tensor, mask: Tensor) -> Tensor:
    """Conditions (B, ...), NONE where the mask (B,) says so."""
    return condition.masked_fill(mask if condition.ndim == 1 else mask[:, None], NONE)


@dataclass(frozen=True)
class Given:
    """What the sentences of a seed are given.

    Args:
        conditions: labels (N,) or sources (N, S), each for `each` sentences in a row; and round again.
        each: see there.
        scale: of eq. (1); 1 is p(w | c) as it was learned.
    """

    conditions: Tensor
    each: int = 1
    scale: float = 1.0

    def of(self, start: int, stop: int) -> Tensor:
        """Of the sentences start..stop-1."""
        rows = torch.arange(start, stop, device=self.conditions.device) // self.each % len(self.conditions)
        return self.conditions[rows]


@dataclass(frozen=True)
class Guided:
    """A denoiser, given something: eq. (1).

    Args:
        model: f.
        condition: of each sentence of the batch; None: nothing is given.
        scale: of eq. (1).
    """

    model: TransformerNetModel
    condition: Tensor | None = None
    scale: float = 1.0

    def __call__(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None, rows: Tensor | None = None, **how: Any
    ) -> Tensor:
        """Predict x_0, (B, L, D); of a part of the batch, if its rows are named."""
        return self._along(self.model, x_t, timesteps, x_self, rows, **how)

    def log_probs(self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None) -> Tensor:
        """log p(v | x_t), (B, L, V), guided in the same way and normalised."""
        return self._along(self.model.log_probs, x_t, timesteps, x_self, None).log_softmax(dim=-1)

    def _along(
        self,
        f: Callable[..., Tensor],
        x_t: Tensor,
        timesteps: Tensor,
        x_self: Tensor | None,
        rows: Tensor | None,
        **how: Any,
    ) -> Tensor:
        condition = self.condition if self.condition is None or rows is None else self.condition[rows]
        if condition is None or self.scale == 1:
            return f(x_t, timesteps, x_self, condition=condition, **how)
        both = torch.cat([condition, torch.full_like(condition, NONE)])
        twice = None if x_self is None else torch.cat([x_self, x_self])
        given, free = f(torch.cat([x_t, x_t]), timesteps.repeat(2), twice, condition=both, **how).chunk(2)
        return free + self.scale * (given - free)
