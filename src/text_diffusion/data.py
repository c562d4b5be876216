"""Lines to ids of one fixed length, ids to endless seeded batches that can be entered at any step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from text_diffusion.errors import UserError
from text_diffusion.randomness import Stream, mix

if TYPE_CHECKING:
    from text_diffusion.tokenizer import Tokenizer

# A chosen length does not let a few long lines make every sentence expensive.
LONGEST_CHOSEN = 128
SHARE_CHOSEN = 0.999


def choose_length(encoded: Sequence[Sequence[int]]) -> int:
    """A length that SHARE_CHOSEN of the sentences fit in, [CLS] and [SEP] included, but at most LONGEST_CHOSEN."""
    lengths = sorted(map(len, encoded))
    return min(lengths[math.ceil(SHARE_CHOSEN * len(lengths)) - 1], LONGEST_CHOSEN)


def fit(
    encoded: Sequence[list[int]],
    length: int,
    tokenizer: Tokenizer,
    long_lines: str,
    source: str,
    line: Callable[[int], str] = lambda i: f"in line {i + 1}",
) -> Tensor:
    """Sentences of any length to one tensor (N, L) int64, padded with [PAD]; [SEP] stays when one is cut.

    Args:
        encoded: ids of each sentence.
        length: L.
        tokenizer: for its special tokens.
        long_lines: "truncate", "drop" or "error".
        source: where the sentences come from, for messages.
        line: where sentence i stands there.

    Raises:
        UserError: a sentence is longer than L and `long_lines` is "error", or none is left after "drop".
    """
    too_long = [i for i, ids in enumerate(encoded) if len(ids) > length]
    if too_long:
        first = too_long[0]
        what = (
            f"{source}: {len(too_long)} of {len(encoded)} sentences are longer than --sequence_len {length}, the first"
            f" {line(first)} with {len(encoded[first])} tokens"
        )
        if long_lines == "error":
            raise UserError(f"{what}; raise --sequence_len, or take --long_lines truncate or drop")
        done = "cut" if long_lines == "truncate" else "left out"
        print(f"warning: {what}; {done} (--long_lines {long_lines})", file=sys.stderr)
    if long_lines == "drop":
        encoded = [ids for ids in encoded if len(ids) <= length]
        if not encoded:
            raise UserError(f"{source}: expected sentences of at most {length} tokens, found only longer ones")
    table = np.full((len(encoded), length), tokenizer.pad_id, dtype=np.int64)
    for row, ids in zip(table, encoded, strict=True):
        kept = ids if len(ids) <= length else [*ids[: length - 1], tokenizer.sep_id]
        row[: len(kept)] = kept
    return torch.from_numpy(table)


class Batches:
    """An endless stream of batches over a corpus (N, L), a new order each epoch; batch `step` is always the same.

    The stream runs through epoch after epoch without gaps, so that a corpus smaller than a batch works too.
    """

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        seed: int,
        conditions: Tensor | None = None,
        noises: Tensor | None = None,
    ) -> None:
        self.ids, self.conditions = ids, conditions  # (N, L); (N,) or (N, S), if sentences are given something
        self.noises = noises  # (N, L, D), if each has its own
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}

    def batch(self, step: int, part: slice = slice(None)) -> Tensor:
        """The ids of batch number `step`, (B, L), or of a part of it."""
        return self.ids[self._rows(step, part)]

    def condition(self, step: int, part: slice = slice(None)) -> Tensor | None:
        """What the sentences of `batch` are given."""
        return None if self.conditions is None else self.conditions[self._rows(step, part)]

    def noise(self, step: int, part: slice = slice(None)) -> Tensor | None:
        """The noise that belongs to the sentences of `batch`."""
        return None if self.noises is None else self.noises[self._rows(step, part)]

    def first(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The first n sentences of the stream, (n, L), and what they are given."""
        rows = self._at(np.arange(n))
        return self.ids[rows], None if self.conditions is None else self.conditions[rows]

    def _rows(self, step: int, part: slice) -> Tensor:
        return self._at(np.arange(step * self.batch_size, (step + 1) * self.batch_size)[part])

    def _at(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        epochs, places = np.divmod(positions, len(self.ids))
        rows = np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        numbers = torch.from_numpy(rows)
        if self.ids.is_cuda:  # pinned, so that the copy waits for nothing
            return numbers.pin_memory().to(self.ids.device, non_blocking=True)
        return numbers.to(self.ids.device)

    def _order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()  # only the present epoch and, across its end, the next are ever needed
            rng = np.random.default_rng(mix(self.seed, Stream.ORDER, epoch))
            self._orders[epoch] = rng.permutation(len(self.ids))
        return self._orders[epoch]
