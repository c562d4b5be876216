"""What an E2E description says of the fields of a meaning representation, by rules on its words.

The rules were written beside the training part only. They know the words people use most, and no more: how often they
find a field in the human texts is the bar that samples are held to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

FIELDS = ("name", "area", "food", "priceRange", "rating", "familyFriendly", "near")
Meaning = dict[str, str]

PRICE, RATING = r"(?:pric\w*|cost\w*)", r"(?:rat\w+|review\w*|rank\w*|scor\w+|feedback|satisfaction)"
FAMILY = r"(?:famil(?:y|ies)|kids?|child(?:ren)?s?)\b"
NEGATIVE = r"(?:not?(?! far| only)|non|n't|isnt|never|without|un\w+|avoid|dis\w+|in\w+appropriate|inappropriate)\b"
STARS = {"1": "(?:1|one)", "3": "(?:3|three)", "5": "(?:5|five)"}


def _around(word: str, what: str) -> str:
    """A word a little before or after what it is said of, in the same clause; `high` is not `highly rated` alone."""
    return rf"\b{word}\b(?:[\s-]+[\w']+){{0,2}}[\s-]+{what}\b|\b{what}\b(?:[\s-]+[\w']+){{0,3}}[\s-]+{word}\b"


TWENTY, THIRTY = "£? ?(?:20|twenty)\\b", "£? ?(?:30|thirty)\\b"
RULES: dict[tuple[str, str], str] = {
    ("area", "riverside"): r"\briver",
    ("area", "city centre"): r"\b(?:city|town|downtown)\b|\bcent(?:re|er|ral)",
    ("food", "Chinese"): r"\bchinese\b|\bchina\b",
    ("food", "English"): r"\benglish\b|\bbritish\b|\bengland\b",
    ("food", "Fast food"): r"\bfast[\s-]*foods?\b",
    ("food", "French"): r"\bfrench\b|\bfrance\b",
    ("food", "Indian"): r"\bindian?\b",
    ("food", "Italian"): r"\bitalian\b|\bitaly\b|\bpastas?\b|\bpizzas?\b",
    ("food", "Japanese"): r"\bjapan(?:ese)?\b|\bsushi\b",
    ("priceRange", "cheap"): rf"\b(?:cheap\w*|inexpensive|affordabl[ey]|budget)\b|{_around('low(?:er|ly)?', PRICE)}",
    ("priceRange", "moderate"): (
        rf"{_around('(?:moderate(?:ly)?|average|reasonabl[ey]|fair(?:ly)?|mid|middle|medium)', PRICE)}"
        r"|\b(?:mid|middle|moderate)[\s-]*(?:range|priced?)|\breasonabl[ey]\b|\bmoderate\b"
    ),
    (
        "priceRange",
        "high",
    ): rf"\b(?:expensive|pric[e]?y|costly|upscale|high[\s-]*end)\b|{_around('high(?:er|ly)?', PRICE)}",
    ("priceRange", "less than £20"): rf"\b(?:less|lower|under|below|cheaper|up to|beneath)\b(?: \w+){{0,2}} {TWENTY}",
    ("priceRange", "£20-25"): r"20 ?(?:-|to|and|\u2013) ?£? ?25\b",
    (
        "priceRange",
        "more than £30",
    ): rf"\b(?:more|over|above|higher|exceeds?|upwards of|greater|from)\b(?: \w+){{0,2}} {THIRTY}",
    ("rating", "low"): rf"{_around('(?:low(?:er|ly)?|poor(?:ly)?|bad(?:ly)?)', RATING)}",
    ("rating", "average"): rf"{_around('(?:average(?:ly)?|moderate(?:ly)?|decent(?:ly)?|mediocre)', RATING)}",
    ("rating", "high"): (
        rf"{_around('(?:high(?:er|ly)?|good|great|excellent|well|top)', RATING)}"
        r"|\bhighly[\s-]+(?:recommended|regarded)\b"
    ),
    **{
        ("rating", f"{n} out of 5"): rf"\b{word}[\s-]*(?:stars?\b|(?:out[\s-]+)?of[\s-]+(?:5|five)\b|/ ?5\b)"
        for n, word in STARS.items()
    },
}

# Words to want for a value, where it is not enough to say it: frequent ones of the training part.
PHRASES: dict[tuple[str, str], str] = {
    ("food", "Fast food"): "fast food",
    ("food", "Indian"): "Indian food",  # not that of Raja Indian Cuisine
    ("priceRange", "moderate"): "moderate price range",
    ("priceRange", "high"): "high price range",
    ("rating", "low"): "low customer rating",
    ("rating", "average"): "average customer rating",
    ("rating", "high"): "high customer rating",
    ("familyFriendly", "yes"): "is family friendly",
    ("familyFriendly", "no"): "not family friendly",
}


def parse(meaning: str) -> Meaning:
    """A meaning representation, "name[Alimentum], area[city centre]", as field: value."""
    return dict(re.findall(r"(\w+)\[([^\]]*)\]", meaning))


def linear(meaning: Meaning) -> str:
    """A meaning representation as a source text, in few tokens."""
    return " ".join(f"{field} {value}" for field, value in meaning.items())


def plain(text: str) -> str:
    """Lower case, without accents and curly quotes."""
    return text.lower().replace("é", "e").replace("\u2019", "'")


@cache
def _place(name: str) -> re.Pattern[str]:
    """A name of a restaurant, with or without its article."""
    words = plain(name).removeprefix("the ").split()
    return re.compile(r"\b" + r"[\s-]+".join(map(re.escape, words)) + r"(?:'?s)?\b")


class Matcher:
    """Knows all names, so that no part of one is taken for something else: "Raja Indian Cuisine" is no food."""

    def __init__(self, meanings: Iterable[Mapping[str, str]]) -> None:
        self.values: dict[str, list[str]] = {field: [] for field in FIELDS}
        for meaning in meanings:
            for field in FIELDS:
                if field in meaning and meaning[field] not in self.values[field]:
                    self.values[field].append(meaning[field])
        names = sorted({*self.values["name"], *self.values["near"]}, key=len, reverse=True)
        self.names = re.compile("|".join(_place(name).pattern for name in names) or "(?!)")

    def says(self, line: str, field: str, value: str) -> bool:
        """Whether a description says that a field has a value."""
        text = plain(line)
        if field in ("name", "near"):
            return _place(value).search(text) is not None
        text = self.names.sub("this", text)
        if field == "familyFriendly":
            return is_family_friendly(text) == value
        return re.search(RULES[field, value], text) is not None

    def said(self, line: str, field: str) -> list[str]:
        """All values of a field that a description has."""
        return [value for value in self.values[field] if self.says(line, field, value)]

    def errors(self, line: str, meaning: Mapping[str, str]) -> int:
        """Fields of a meaning representation that are missing or wrong, and those that are said without being in it."""
        wrong = sum(not self.says(line, field, meaning[field]) for field in FIELDS if field in meaning)
        return wrong + sum(bool(self.said(line, field)) for field in FIELDS if field not in meaning)


def is_family_friendly(text: str) -> str | None:
    """ "yes", "no", or None where nothing is said of families."""
    if not re.search(rf"\b{FAMILY}", text):
        return "no" if re.search(r"\badults?\b", text) else None
    before = rf"\b{NEGATIVE}(?:[\s-]+[\w']+){{0,4}}[\s-]+{FAMILY}|n't(?:[\s-]+[\w']+){{0,4}}[\s-]+{FAMILY}"
    after = rf"\b{FAMILY}(?:[\s-]+[\w']+){{0,3}}[\s-]+(?:not?\b|\w+n't\b|un\w+)"
    return "no" if re.search(f"{before}|{after}", text) else "yes"
