"""A probabilistic template grammar: a toy language whose true distribution is known exactly.

A sentence fills the places of a template with the words of slots. A slot's word is drawn independently, or given the
word of an earlier slot (agreement in number, selectional restriction); a slot named twice repeats its word. So

    P(sentence) = prod_slots P(word | word of the slot it is given)

and entropies, sentence probabilities and the figures of an ideal sampler are computed, not estimated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from text_diffusion.errors import UserError
from text_diffusion.metrics import kl_bits, mutual_information_bits

_FIELD = re.compile(r"\{(\w+)\}")
OUT_OF_SHAPE = -1  # in the row of a line that does not have the template's shape

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Slot:
    """The words of a slot and P(word | word of the slot `given`), (words of that one, words); one row without it."""

    words: tuple[str, ...]
    given: str | None
    probs: Floats


class Grammar:
    """A template such as "{name} has {count} {animal}." and its slots, each one of two kinds:

        {"red": 3, "green": 1}                                         weights of independent words
        {"given": "count", "cases": [{"when": ["one"], "words": {"cow": 3, "goat": 1}}, ...]}

    where each word of the slot given, which stands earlier in `slots`, belongs to one case. Weights are scaled to
    sum to 1; words of weight 0 do not belong to the language.

    A row of word numbers (P,) has a number for each place of the template, counting within the words of its slot. The
    figures assume that a sentence determines its words, as it does when words hold no spaces and spaces separate them.

    Raises:
        ValueError: template or slots are malformed.
    """

    def __init__(self, template: str, slots: Mapping[str, object]) -> None:
        _check_template(template, slots)
        self.template = template
        self.slots: dict[str, Slot] = {}
        for name, value in slots.items():
            self.slots[name] = _slot(name, value, self.slots)
        self.places: list[str] = _FIELD.findall(template)

    @staticmethod
    def load(path: str | Path) -> Grammar:
        """Read a grammar from a JSON file with the keys "template" and "slots".

        Raises:
            UserError: there is no such file, or it is malformed.
        """
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path}: expected the JSON file of a grammar, found: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"grammar file {path}: {error}") from error

    # Sentences

    def sample(self, n: int, rng: np.random.Generator) -> list[str]:
        """Draw n independent sentences."""
        return self.decode(self.sample_ids(n, rng))

    def sample_ids(self, n: int, rng: np.random.Generator) -> Ids:
        """Draw n independent sentences as rows of word numbers, (n, P)."""
        drawn: dict[str, Ids] = {}
        for name, slot in self.slots.items():
            cumulative = slot.probs.cumsum(axis=1)
            cumulative /= cumulative[:, -1:]
            u = rng.random(n)
            rows = cumulative[drawn[slot.given]] if slot.given else cumulative
            drawn[name] = (rows <= u[:, None]).sum(axis=1)
        return np.stack([drawn[name] for name in self.places], axis=1)

    def decode(self, ids: Ids) -> list[str]:
        """The sentences of rows of word numbers (N, P)."""
        literals = _FIELD.split(self.template)[::2]
        words = [self.slots[name].words for name in self.places]
        return [
            literals[0] + "".join(w[i] + literal for w, i, literal in zip(words, row, literals[1:], strict=True))
            for row in ids.tolist()
        ]

    def encode(self, sentences: Sequence[str]) -> Ids:
        """Rows of word numbers (N, P), of all lines of the template's shape: words may break every constraint.

        The row of a line of another shape is OUT_OF_SHAPE.
        """
        numbers = [{word: i for i, word in enumerate(self.slots[name].words)} for name in self.places]
        rows = np.full((len(sentences), len(self.places)), OUT_OF_SHAPE, dtype=np.int64)
        for i, sentence in enumerate(sentences):
            if match := self._regex.fullmatch(sentence):
                rows[i] = [number[word] for number, word in zip(numbers, match.groups(), strict=True)]
        return rows

    def parse(self, sentence: str) -> dict[str, str] | None:
        """The word of each slot, or None if it is not exactly a sentence of the language."""
        ids = self.encode([sentence])
        if np.isneginf(self.log2_probs(ids)[0]):
            return None
        return {name: self.slots[name].words[i] for name, i in zip(self.places, ids[0], strict=True)}

    # Exact figures

    def log2_probs(self, ids: Ids) -> Floats:
        """log2 P of rows of word numbers (N, P), (N,); -inf outside the language."""
        first = {name: ids[:, self.places.index(name)] for name in self.slots}
        total = np.where((ids == OUT_OF_SHAPE).any(axis=1), -np.inf, 0.0)
        with np.errstate(divide="ignore"):
            for name, slot in self.slots.items():
                total += np.log2(slot.probs[first[slot.given] if slot.given else 0, first[name]])
        for place, name in enumerate(self.places):
            total[ids[:, place] != first[name]] = -np.inf
        return total

    def log2_prob(self, sentence: str) -> float:
        """Log probability of the sentence in bits (base 2, at most 0); -inf outside the language."""
        return float(self.log2_probs(self.encode([sentence]))[0])

    @cached_property
    def marginals(self) -> dict[str, dict[str, float]]:
        """Of each slot, P(word)."""
        return {name: dict(zip(self.slots[name].words, p.tolist(), strict=True)) for name, p in self._marginals.items()}

    def entropy_bits(self) -> float:
        """Entropy of the sentence distribution, in bits per sentence: the sum of the slots' conditional entropies."""
        total = 0.0
        for slot in self.slots.values():
            given = self._marginals[slot.given] if slot.given else np.ones(1)
            logs = np.log2(slot.probs, where=slot.probs > 0, out=np.zeros_like(slot.probs))
            total -= float((given[:, None] * slot.probs * logs).sum())
        return total

    @cached_property
    def support(self) -> tuple[Ids, Floats]:
        """All sentences of the language: rows of word numbers (S, P) and their probabilities (S,)."""
        columns: dict[str, Ids] = {}
        probs = np.ones(1)
        for name, slot in self.slots.items():
            extended = probs[:, None] * (slot.probs[columns[slot.given]] if slot.given else slot.probs)
            row, word = np.nonzero(extended)
            columns = {earlier: column[row] for earlier, column in columns.items()} | {name: word}
            probs = extended[row, word]
        return np.stack([columns[name] for name in self.places], axis=1), probs

    def expected_unique(self, n: int) -> float:
        """Expected share (0 to 1) of distinct sentences among n ideal samples; exact, over all sentences."""
        if n < 1:
            raise ValueError(f"expected_unique needs at least one sample, got n={n}")
        with np.errstate(divide="ignore"):  # a certain sentence (p = 1) gives log1p(-1) = -inf, and then expm1 = -1
            seen = -np.expm1(n * np.log1p(-self.support[1]))
        return float(seen.sum()) / n

    def expected_novel(self, training_lines: Iterable[str]) -> float:
        """Probability mass (0 to 1) of the sentences that are not among the training lines.

        This is the expected share of novel sentences from an ideal sampler.
        """
        known = math.fsum(2.0 ** self.log2_probs(self.encode(sorted(set(training_lines)))))
        return max(0.0, 1.0 - known)

    # Statistics of samples, of the lines that have the template's shape

    def slot_kl_bits(self, ids: Ids) -> float:
        """Sum over the slots of KL(true || sampled word frequencies), in bits; nan without any line of the shape.

        Each word's count gets one half added (Jeffreys smoothing), so a word that never occurs costs a finite amount.
        With n samples an ideal sampler still gets about (number of words - number of slots) / (2 n ln 2) bits.
        """
        ids = _in_shape(ids)
        if not len(ids):
            return math.nan
        return math.fsum(
            kl_bits(probs, np.bincount(ids[:, self.places.index(name)], minlength=len(probs)) + 0.5)
            for name, probs in self._marginals.items()
        )

    def mutual_information_bits(self, ids: Ids) -> float:
        """Sum over the pairs of places of their words' mutual information, in bits; nan without a line of the shape.

        Counted, it is too high by about (V_i - 1)(V_j - 1) / (2 n ln 2) for each pair, also for an ideal sampler.
        """
        ids = _in_shape(ids)
        if not len(ids):
            return math.nan
        return self._pairwise_information(ids)

    @cached_property
    def true_mutual_information_bits(self) -> float:
        """What `mutual_information_bits` comes to with infinitely many ideal samples."""
        return self._pairwise_information(*self.support)

    def _pairwise_information(self, ids: Ids, weights: Floats | None = None) -> float:
        sizes = [len(self.slots[name].words) for name in self.places]
        total = 0.0
        for b in range(len(sizes)):
            for a in range(b):
                cells = np.bincount(ids[:, a] * sizes[b] + ids[:, b], weights, sizes[a] * sizes[b])
                total += mutual_information_bits(cells.reshape(sizes[a], sizes[b]))
        return total

    @cached_property
    def _marginals(self) -> dict[str, Floats]:
        marginals: dict[str, Floats] = {}
        for name, slot in self.slots.items():
            marginals[name] = (marginals[slot.given] if slot.given else np.ones(1)) @ slot.probs
        return marginals

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """One pattern for a line of the template's shape, a group for each place."""
        literals, names = _FIELD.split(self.template)[::2], [*self.places, None]
        groups = [f"({'|'.join(map(re.escape, self.slots[name].words))})" if name else "" for name in names]
        return re.compile("".join(re.escape(a) + b for a, b in zip(literals, groups, strict=True)))


def _in_shape(ids: Ids) -> Ids:
    return np.compress(ids[:, 0] != OUT_OF_SHAPE, ids, axis=0)


# Reading


def _from_json(data: object) -> Grammar:
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    template, slots = data.get("template"), data.get("slots")
    if not isinstance(template, str):
        raise ValueError('missing "template" (a string)')
    if not isinstance(slots, dict):
        raise ValueError('missing "slots" (an object of slots)')
    return Grammar(template, slots)


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


def _slot(name: str, value: object, earlier: Mapping[str, Slot]) -> Slot:
    """Check one slot as the JSON file has it; ValueError when it is malformed."""
    if not isinstance(value, Mapping) or not isinstance(value.get("given"), str):
        table = _table(f"slot {name!r}", value)
        return Slot(tuple(table), None, np.array([list(table.values())]))
    given, cases = value["given"], value.get("cases")
    if given not in earlier:
        raise ValueError(f"slot {name!r} is given {given!r}, which is not a slot before it")
    if not isinstance(cases, list) or not all(isinstance(case, Mapping) for case in cases):
        raise ValueError(f'slot {name!r} must list its "cases", each an object with "when" and "words"')
    tables: dict[str, dict[str, float]] = {}
    for case in cases:
        table = _table(f"slot {name!r}", case.get("words"))
        for word in case.get("when") or ():
            if word not in earlier[given].words:
                raise ValueError(f"slot {name!r} has a case for {word!r}, which is not a word of slot {given!r}")
            if word in tables:
                raise ValueError(f"slot {name!r} has two cases for {word!r}")
            tables[word] = table
    if missing := [word for word in earlier[given].words if word not in tables]:
        raise ValueError(f"slot {name!r} has no case for {missing[0]!r}, a word of slot {given!r}")
    words = tuple(dict.fromkeys(word for table in tables.values() for word in table))
    rows = [[tables[word].get(own, 0.0) for own in words] for word in earlier[given].words]
    return Slot(words, given, np.array(rows))


def _table(where: str, words: object) -> dict[str, float]:
    """Check words with their weights and scale these to sum to 1; words of weight 0 go."""
    if not isinstance(words, Mapping):
        raise ValueError(f"{where} must map words to probabilities")
    if not words:
        raise ValueError(f"{where} has no words")
    for word, value in words.items():
        if not word:
            raise ValueError(f"{where} has an empty word")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: the probability of {word!r} is not a finite number: {value!r}")
        if value < 0:
            raise ValueError(f"{where}: the probability of {word!r} is negative: {value!r}")
    total = math.fsum(words.values())
    if total <= 0:
        raise ValueError(f"{where}: the probabilities sum to zero")
    return {word: value / total for word, value in words.items() if value > 0}
