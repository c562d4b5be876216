"""Text of a corpus or of a model on a terminal or a page: shown as it is, and never obeyed."""

from __future__ import annotations

# Control characters by their pictures, as of ESC, which begins a terminal's escape codes; those of 8 bits have none.
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """The text with a picture in place of each character that a terminal would obey, ends a line or turns its reading.

    >>> visible("\\x1b[31mred")
    '␛[31mred'
    """
    return text.translate(_PICTURES)
