"""A probabilistic template grammar: a toy language whose true distribution is known exactly.

Each sentence fills a template's slots with words drawn independently, so entropies, sentence probabilities
and the figures an ideal sampler would reach can all be computed rather than estimated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Grammar:
    """A template with named slots, and for each slot its words with their probabilities (normalised on creation).

    The figures assume that a sentence determines its slot words, as it does when the words hold no spaces and the
    template separates its slots by spaces.
    """

    template: str
    slots: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        """Check the template and slots (ValueError when malformed) and scale each slot to sum to 1."""
        _check_template(self.template, self.slots)
        normalised = {name: _normalised(name, words) for name, words in self.slots.items()}
        object.__setattr__(self, "slots", normalised)

    @classmethod
    def load(cls, path: str | Path) -> Grammar:
        """Read a grammar from a JSON file with the keys "template" and "slots"; ValueError when malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls._from_json(data)
        except ValueError as error:
            raise ValueError(f"grammar file {path}: {error}") from error

    @classmethod
    def _from_json(cls, data: object) -> Grammar:
        if not isinstance(data, dict):
            raise ValueError("expected a JSON object")
        template, slots = data.get("template"), data.get("slots")
        if not isinstance(template, str):
            raise ValueError('missing "template" (a string)')
        if not isinstance(slots, dict):
            raise ValueError('missing "slots" (an object of slots)')
        return cls(template, slots)

    def sample(self, n: int, rng: np.random.Generator) -> list[str]:
        """Draw n independent sentences."""
        columns = []
        for words in self.slots.values():
            choices = list(words)
            drawn = rng.choice(len(choices), size=n, p=np.array(list(words.values())))
            columns.append([choices[i] for i in drawn])
        return [self._fill(dict(zip(self.slots, row, strict=True))) for row in zip(*columns, strict=True)]

    def parse(self, sentence: str) -> dict[str, str] | None:
        """Return the sentence's word for each slot, or None if it is not exactly a sentence of the grammar."""
        match = self._regex.fullmatch(sentence)
        return match and {name: match[f"slot{i}"] for i, name in enumerate(self.slots)}

    def entropy_bits(self) -> float:
        """Entropy of the sentence distribution, in bits per sentence."""
        return math.fsum(-p * math.log2(p) for words in self.slots.values() for p in words.values() if p > 0)

    def log2_prob(self, sentence: str) -> float:
        """Log probability of the sentence in bits (base 2, at most 0); -inf outside the grammar."""
        found = self.parse(sentence)
        if found is None:
            return -math.inf
        probs = [self.slots[name][word] for name, word in found.items()]
        return math.fsum(map(math.log2, probs)) if all(probs) else -math.inf

    def expected_unique(self, n: int) -> float:
        """Expected share (0 to 1) of distinct sentences among n ideal samples; exact, over all sentences."""
        if n < 1:
            raise ValueError(f"expected_unique needs at least one sample, got n={n}")
        with np.errstate(divide="ignore"):  # a certain sentence (p = 1) gives log1p(-1) = -inf, and then expm1 = -1
            seen = -np.expm1(n * np.log1p(-self._sentence_probs()))
        return float(seen.sum()) / n

    def expected_novel(self, training_lines: Iterable[str]) -> float:
        """Probability mass (0 to 1) of the sentences that are not among the training lines.

        This is the expected share of novel sentences from an ideal sampler.
        """
        known = math.fsum(2.0 ** self.log2_prob(line) for line in set(training_lines))
        return max(0.0, 1.0 - known)

    def slot_kl_bits(self, sentences: Iterable[str]) -> float:
        """Sum over the slots of KL(true || sampled word frequencies), in bits, over the valid sentences only.

        Each word's count gets one half added (Jeffreys smoothing), so a word that never occurs costs a finite amount.
        Without any valid sentence there are no frequencies and the result is nan. With n samples an ideal sampler
        still gets about (number of words - number of slots) / (2 n ln 2) bits.
        """
        parsed = [found for sentence in sentences if (found := self.parse(sentence)) is not None]
        if not parsed:
            return math.nan
        return math.fsum(
            _kl_bits(words, Counter(found[name] for found in parsed)) for name, words in self.slots.items()
        )

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """One pattern for a whole sentence; a slot's second use must repeat its first word."""
        numbers = {name: i for i, name in enumerate(self.slots)}
        pieces: list[str] = []
        opened: set[str] = set()
        for i, part in enumerate(_FIELD.split(self.template)):
            if i % 2 == 0:
                pieces.append(re.escape(part))
            elif part in opened:
                pieces.append(f"(?P=slot{numbers[part]})")
            else:
                opened.add(part)
                pieces.append(f"(?P<slot{numbers[part]}>{'|'.join(map(re.escape, self.slots[part]))})")
        return re.compile("".join(pieces))

    def _fill(self, words: Mapping[str, str]) -> str:
        return _FIELD.sub(lambda field: words[field[1]], self.template)

    def _sentence_probs(self) -> NDArray[np.float64]:
        """Probabilities of all sentences, in no order that matters."""
        probs = np.ones(1)
        for words in self.slots.values():
            probs = np.outer(probs, np.array(list(words.values()))).ravel()
        return probs


def _check_template(template: str, slots: Mapping[str, object]) -> None:
    parts = _FIELD.split(template)
    if any(brace in literal for literal in parts[::2] for brace in "{}"):
        raise ValueError(f"stray brace in the template {template!r}")
    fields = set(parts[1::2])
    if not fields:
        raise ValueError(f"the template {template!r} names no slot")
    if missing := sorted(fields - set(slots)):
        raise ValueError(f"the template names slots that are not given: {', '.join(missing)}")
    if unused := sorted(set(slots) - fields):
        raise ValueError(f"slots that the template does not use: {', '.join(unused)}")


def _normalised(name: str, words: object) -> dict[str, float]:
    """Check one slot's words and scale their probabilities to sum to 1."""
    if not isinstance(words, Mapping):
        raise ValueError(f"slot {name!r} must map words to probabilities")
    if not words:
        raise ValueError(f"slot {name!r} has no words")
    for word, value in words.items():
        if not word:
            raise ValueError(f"slot {name!r} has an empty word")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"slot {name!r}: the probability of {word!r} is not a finite number: {value!r}")
        if value < 0:
            raise ValueError(f"slot {name!r}: the probability of {word!r} is negative: {value!r}")
    total = math.fsum(words.values())
    if total <= 0:
        raise ValueError(f"slot {name!r}: the probabilities sum to zero")
    return {word: value / total for word, value in words.items()}


def _kl_bits(probs: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """KL(probs || counts with one half added to each), in bits."""
    total = sum(counts.values()) + 0.5 * len(probs)
    return math.fsum(p * math.log2(p * total / (counts.get(word, 0) + 0.5)) for word, p in probs.items() if p > 0)
