"""Lines of text as rows of numbers: their words, and their n-grams."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
LONGEST = 4  # n of the longest n-grams


@dataclass(frozen=True)
class Rows:
    """Rows of different lengths, one after the other: row i is values[starts[i] : starts[i + 1]]."""

    values: Ints
    starts: Ints

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> Rows:
        """From lists."""
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Rows(np.fromiter((value for row in rows for value in row), np.int64, int(starts[-1])), starts)

    @cached_property
    def lengths(self) -> Ints:
        """(n,)"""
        return np.diff(self.starts)

    @cached_property
    def owners(self) -> Ints:
        """Of each value, the number of its row."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def take(self, lines: Ints) -> Rows:
        """These rows only."""
        lengths = self.lengths[lines]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.starts[lines] - starts[:-1], lengths)
        return Rows(self.values[np.arange(starts[-1]) + shift], starts)


def words_of(line: str) -> list[str]:
    """Words and punctuation marks, the same for "is ripe." and for "is ripe ."."""
    return re.findall(r"\w+|[^\w\s]", line)


class Lines:
    """The lines of several texts in one numbering: of lines, of words, of n-grams."""

    def __init__(self, *texts: Sequence[str]) -> None:
        self.lines = [line for text in texts for line in text]
        ends = np.cumsum([0, *map(len, texts)])
        self.texts: list[Ints] = [np.arange(a, b) for a, b in pairwise(ends)]
        numbers: dict[str, int] = {}
        self.ids: Ints = np.array([numbers.setdefault(line, len(numbers)) for line in self.lines], dtype=np.int64)
        vocabulary: dict[str, int] = {}
        split = map(words_of, self.lines)
        words = Rows.of([[vocabulary.setdefault(word, len(vocabulary)) for word in line] for line in split])
        self.ngrams = [words]
        while len(self.ngrams) < LONGEST:
            self.ngrams.append(_longer(self.ngrams[-1], words, len(self.ngrams)))

    def counts(self, n: int, rows: Ints) -> Ints:
        """How often each n-gram of any text is in these lines."""
        ngrams = self.ngrams[n - 1]
        return np.bincount(ngrams.take(rows).values, minlength=int(ngrams.values.max(initial=-1)) + 1)


def _longer(shorter: Rows, words: Rows, n: int) -> Rows:
    """(n+1)-grams from the n-grams and the words of the same lines."""
    lengths = np.maximum(shorter.lengths - 1, 0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(starts[-1]) - starts[owners]
    last = words.values[words.starts[owners] + place + n]
    pairs = shorter.values[shorter.starts[owners] + place] * (words.values.max(initial=0) + 1) + last
    return Rows(np.unique(pairs, return_inverse=True)[1].astype(np.int64), starts)
