"""Templates such as "The [GAP] apple is [GAP].": known words, and gaps to be filled.

[GAP]        one word or more
[GAP:2]      exactly two words, as white space separates them
[GAP:1-3]    one to three; [GAP:0-3] may stay empty, [GAP:2-] has no upper end
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from text_diffusion.control.vocabulary import Vocabulary, named
from text_diffusion.errors import UserError

GAP = re.compile(r"\[GAP(?::([^\]]*))?\]")


@dataclass(frozen=True)
class Known:
    """A known word, or the part of one that is glued to a gap: its text, its tokens, and whether a space is before."""

    text: str
    ids: tuple[int, ...]
    glued: bool


@dataclass(frozen=True)
class Gap:
    """A gap of `low` to `high` words (None: any number). Glued: it goes on with the word before it."""

    low: int
    high: int | None
    glued: bool = False


@dataclass(frozen=True)
class Parsed:
    """Known words and gaps, in order; `unknown` are those that the tokenizer does not know, in order, with the space
    before them if there is one."""

    items: tuple[Known | Gap, ...]
    unknown: tuple[str, ...] = ()

    @property
    def fewest_words(self) -> int:
        """How many words a sentence of this template has at least."""
        return sum(max(item.low - item.glued, 0) if isinstance(item, Gap) else not item.glued for item in self.items)


def parse(text: str, vocabulary: Vocabulary, allow_unk: bool = False) -> Parsed:
    """Read a template.

    Raises:
        UserError: it is empty, a gap is malformed, or a word is not in the vocabulary and `allow_unk` is off.
    """
    if not text.strip():
        raise UserError("--template must hold words or gaps such as [GAP], found nothing")
    items: list[Known | Gap] = []
    unknown: list[str] = []
    place = 0
    for match in [*GAP.finditer(text), None]:
        literal = text[place : match.start() if match else len(text)]
        for number, word in enumerate(literal.split()):
            glued = bool(items) and number == 0 and not literal[0].isspace()
            ids, missing = vocabulary.spell(word, glued, first=not items)
            items.append(Known(word, tuple(ids), glued))
            unknown += [("" if glued or not items[:-1] else " ") + word for word in missing]
        if match is None:
            break
        glued = bool(items) and not (literal[-1:].isspace() if literal else False)
        items.append(Gap(*_range(match[1], match[0]), glued))
        place = match.end()
    if unknown and not allow_unk:
        raise UserError(
            f"--template {text!r} has words that the model does not know: {named(unknown)}; "
            "leave them out, or take them as unknown with --allow_unk"
        )
    return Parsed(tuple(items), tuple(unknown))


def _range(text: str | None, gap: str) -> tuple[int, int | None]:
    if text is None:
        return 1, None
    match = re.fullmatch(r"(\d+)(?:-(\d*))?", text.strip())
    low = int(match[1]) if match else -1
    high = low if match and match[2] is None else int(match[2]) if match and match[2] else None
    if match is None or (high is not None and (high < low or high == 0)):
        raise UserError(f"a gap must be [GAP], [GAP:2] or [GAP:1-3] (at least 1 word, or 0 to a number), found {gap}")
    return low, high


def with_unknown(vocabulary: Vocabulary, ids: Sequence[int], unknown: Sequence[str]) -> str:
    """The sentence of ids, the words of `unknown` (with the space before them) in place of its [UNK]s."""
    tokenizer, ids = vocabulary.tokenizer, list(ids)
    ids = ids[: ids.index(tokenizer.sep_id)] if tokenizer.sep_id in ids else ids
    anchor = vocabulary.anchor  # a word too, so that what follows is spelled as behind one
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.unk_id:
            parts.append([])
        else:
            parts[-1].append(token)
    text, words = tokenizer.decode_all(parts[0]), [*unknown, *[""] * len(parts)]
    for word, part in zip(words, parts[1:], strict=False):
        text += word if text else word.lstrip()
        text += tokenizer.decode_all([anchor, *part]).removeprefix(tokenizer.decode_all([anchor]))
    return text
