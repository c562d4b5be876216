"""Labelled sentences: a file of lines `sentence TAB label`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from text_diffusion.corpus import split
from text_diffusion.errors import UserError
from text_diffusion.pairs import LABELS, Pair, labels_of, read_pairs


@dataclass(frozen=True)
class Labeled:
    """Sentences with their labels, and those held out; `labels` are all there are, sorted."""

    train: list[Pair]
    held_out: list[Pair]
    labels: tuple[str, ...]


def read(path: Path) -> Labeled:
    """Read a labelled file; 5 % of the different sentences, at most 500, are held out.

    Raises:
        UserError: the file cannot be read, a line is malformed (with its number), or there is a single label.
    """
    rows = read_pairs(path, LABELS)
    labels = labels_of(rows, path)
    sentences = [sentence for sentence, _ in rows]
    kept = set(split(sentences)[0])
    train = [row for row in rows if row[0] in kept]
    if missing := sorted(set(labels) - {label for _, label in train}):
        raise UserError(f"{path}: expected several different sentences of each label, found too few of {missing[0]!r}")
    return Labeled(train, [row for row in rows if row[0] not in kept], labels)
