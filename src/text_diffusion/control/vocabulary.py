"""Which tokens begin a word, which go on with one, and how a text is spelled in tokens, for any tokenizer.

Words are what white space separates. Everything is found out by decoding, so that it holds for tokens that carry the
space before them, for those that join the word before unless they say otherwise, and for those that are words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from text_diffusion.tokenizer import SPECIAL_TOKENS, Tokenizer

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, sorted by what they do to words."""

    tokenizer: Tokenizer

    @cached_property
    def anchor(self) -> int:
        """A token that is a word, or the most of one, which others are decoded behind."""
        vocab = self.tokenizer.backend.get_vocab()
        ordinary = [(text, i) for text, i in vocab.items() if text not in SPECIAL_TOKENS]
        texts = [(self.tokenizer.decode_all([i]).strip(), i) for _, i in sorted(ordinary)]
        return max(texts, key=lambda found: (found[0].isalpha() and found[0].isascii(), len(found[0])))[1]

    @cached_property
    def _behind(self) -> list[str]:
        """What each token adds to a text that ends in a word; "" for special ones and for gaps among the ids."""
        decode, anchor = self.tokenizer.decode_all, self.anchor
        first = decode([anchor])
        behind = [""] * self.tokenizer.vocab_size
        for token, i in self.tokenizer.backend.get_vocab().items():
            if token not in SPECIAL_TOKENS:
                behind[i] = decode([anchor, i]).removeprefix(first)
        return behind

    @cached_property
    def starts(self) -> Mask:
        """Tokens that begin a word, (V,)."""
        return np.array([text[:1] == " " and _is_solid(text[1:]) for text in self._behind])

    @cached_property
    def spaces(self) -> Mask:
        """Tokens that are the space before a word and no more, (V,)."""
        return np.array([text == " " for text in self._behind])

    @cached_property
    def continues(self) -> Mask:
        """Tokens that go on with one, (V,)."""
        return np.array([text[:1] != " " and _is_solid(text) for text in self._behind])

    @cached_property
    def closes(self) -> Mask:
        """Tokens that may follow a word without making another of it: punctuation, (V,)."""
        closing: Mask = self.continues & np.array([not any(map(str.isalnum, text)) for text in self._behind])
        return closing

    def spell(self, text: str, glued: bool = False, first: bool = False) -> tuple[list[int], list[str]]:
        """The tokens of a text without white space around it, and the words in it that the tokenizer does not know.

        Args:
            text: one or more words.
            glued: it goes on with a word; otherwise it begins one.
            first: it stands at the start of the sentence.

        A word that is unknown where it stands, but known after a space, or without one, is taken in that form.
        """
        ids: list[int] = []
        unknown: list[str] = []
        for number, word in enumerate(text.split()):
            natural = ("glued" if glued else "first" if first else "inside") if number == 0 else "inside"
            forms = [self._form(word, kind) for kind in dict.fromkeys((natural, "inside", "first", "glued"))]
            known = [form for form in forms if form and self.tokenizer.unk_id not in form]
            ids += known[0] if known else [self.tokenizer.unk_id]
            unknown += [] if known else [word]
        return ids, unknown

    def _form(self, word: str, kind: str) -> list[int]:
        """The tokens of a word at the start of a sentence, inside one, or glued to another word; [] if that fails."""
        if kind == "first":
            return self.tokenizer.encode([word])[0][1:-1]
        anchor = self.tokenizer.decode_all([self.anchor]).strip()
        before, both = self.tokenizer.encode([anchor, anchor + (" " if kind == "inside" else "") + word])
        n = len(before) - 1
        return both[n:-1] if both[:n] == before[:n] else []


def _is_solid(text: str) -> bool:
    return bool(text) and not any(map(str.isspace, text))


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    kept = [i for i, letter in enumerate(word) if letter.isalnum()]
    return word[kept[0] : kept[-1] + 1] if kept else word


def named(words: Sequence[str]) -> str:
    """Words for a message: each once, without the punctuation around it."""
    return ", ".join(dict.fromkeys(map(bare, words)))
