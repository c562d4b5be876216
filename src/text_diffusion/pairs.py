"""Texts of two columns, a tab between them: sentences with labels, sources with what to write for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from text_diffusion.errors import UserError
from text_diffusion.files import read_lines

Pair = tuple[str, str]
LABELS = ("a sentence", "a label")
SOURCE = ("a source", "a sentence")


def read_pairs(path: Path, columns: tuple[str, str]) -> list[Pair]:
    """The two fields of every line, white space around them taken off.

    Args:
        path: the file.
        columns: what the fields are, for messages.

    Raises:
        UserError: the file cannot be read, or a line is malformed (with its number).
    """
    rows: list[Pair] = []
    left, right = columns
    for number, line in enumerate(read_lines(path, blank=True), 1):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            # The last tab goes with the white space at the end, if nothing follows it.
            nothing = f"no {right.removeprefix('a ')}"
            found = "an empty line" if not line else nothing if len(parts) == 1 else "an empty field"
            found = f"{len(parts) - 1} tabs" if len(parts) > 2 else found
            raise UserError(f"{path}: expected {left}, a tab and {right} in line {number}, found {found}")
        rows.append((parts[0], parts[1]))
    return rows


def labels_of(rows: Sequence[Pair], path: Path) -> tuple[str, ...]:
    """All labels of rows to learn from, sorted.

    Raises:
        UserError: there is a single one.
    """
    labels = tuple(sorted({label for _, label in rows if label}))
    if len(labels) < 2:
        raise UserError(f"{path}: expected lines of at least two labels to learn from, found only {labels[0]!r}")
    return labels
