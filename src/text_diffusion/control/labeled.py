"""Labelled sentences: a file of lines `sentence TAB label`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from text_diffusion.corpus import split
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines


@dataclass(frozen=True)
class Labeled:
    """Sentences with their labels, and those held out; `labels` are all there are, sorted."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    labels: tuple[str, ...]


def read(path: Path) -> Labeled:
    """Read a labelled file; 5 % of the different sentences, at most 500, are held out.

    Raises:
        UserError: the file cannot be read, a line is malformed (with its number), or there is a single label.
    """
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path, blank=True), 1):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            # The last tab goes with the white space at the end, if nothing follows it.
            found = "an empty line" if not line else "no tab and label" if len(parts) == 1 else "an empty field"
            found = f"{len(parts) - 1} tabs" if len(parts) > 2 else found
            raise UserError(f"{path}: expected a sentence, a tab and a label in line {number}, found {found}")
        rows.append((parts[0], parts[1]))
    labels = tuple(sorted({label for _, label in rows}))
    if len(labels) < 2:
        raise UserError(f"{path}: expected at least two labels, found only {labels[0]!r}")
    sentences = [sentence for sentence, _ in rows]
    kept = set(split(sentences)[0])
    train = [row for row in rows if row[0] in kept]
    if missing := sorted(set(labels) - {label for _, label in train}):
        raise UserError(f"{path}: expected several sentences of each label, found too few of {missing[0]!r}")
    return Labeled(train, [row for row in rows if row[0] not in kept], labels)
