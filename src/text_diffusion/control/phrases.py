"""Words in a row, found in a sentence as it is written token by token.

What is known between two tokens is a set of ways to have begun: (form, how many of its tokens are there). A phrase of
which all tokens are there is found when its last word ends, as letters may still follow and make another word of it,
while punctuation may not. Nothing is consumed: phrases may share words with each other and with a template.
"""

from __future__ import annotations

from dataclasses import dataclass

from text_diffusion.control.vocabulary import Vocabulary

Progress = frozenset[tuple[int, int]]
NOTHING: Progress = frozenset()
FOUND: Progress = frozenset({(-1, 0)})


@dataclass(frozen=True)
class Token:
    """What matters of a token in a sentence: whether it begins a word, if so the first one, or only closes one."""

    id: int
    begins: bool
    first: bool
    closes: bool


@dataclass(frozen=True)
class Phrase:
    """One or more words: their text, and their tokens inside a sentence and at its start."""

    text: str
    forms: tuple[tuple[int, ...], ...]
    begins: tuple[tuple[bool, ...], ...]  # of each token of each form, whether it begins a word

    @staticmethod
    def of(text: str, vocabulary: Vocabulary) -> tuple[Phrase, list[str]]:
        """The phrase, and those of its words that the tokenizer does not know."""
        (inside, unknown), (first, _) = vocabulary.spell(text), vocabulary.spell(text, first=True)
        forms = tuple(dict.fromkeys((tuple(inside), tuple(first))))
        solid = [(True, *(bool(vocabulary.starts[i] or vocabulary.spaces[i]) for i in form[1:])) for form in forms]
        return Phrase(text, forms, tuple(solid)), unknown

    def begun(self, token: Token) -> Progress:
        """The ways in which a token begins it. The second form is that of the start of a sentence."""
        usable = self.forms if token.first else self.forms[:1]
        return frozenset((i, 1) for i, form in enumerate(usable) if token.begins and form[0] == token.id)

    def continued(self, progress: Progress, token: Token) -> Progress:
        """What a token, which begins no word behind the phrase, leaves of the ways."""
        after = set[tuple[int, int]]()
        for i, n in progress:
            if self.is_whole((i, n)):
                after |= {(i, n)} if token.closes and not token.begins else set()
            elif self.forms[i][n] == token.id and self.begins[i][n] == token.begins:
                after.add((i, n + 1))
        return frozenset(after)

    def searched(self, progress: Progress, token: Token) -> Progress:
        """What is known after a token of a phrase that may stand anywhere."""
        if progress == FOUND or (token.begins and self.is_there(progress)):
            return FOUND
        return self.continued(progress, token) | self.begun(token)

    def is_whole(self, way: tuple[int, int]) -> bool:
        """Whether all tokens of a form are there."""
        return way[1] == len(self.forms[way[0]])

    def is_there(self, progress: Progress) -> bool:
        """Whether the phrase is in the sentence if the word under way ends here."""
        return progress == FOUND or any(map(self.is_whole, progress))
