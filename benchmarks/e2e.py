"""The E2E restaurant descriptions (Novikova et al. 2017, arXiv 1706.09254, CC BY-SA 4.0) as a text, one a line.

python benchmarks/e2e.py FOLDER > e2e.txt          FOLDER holds its CSV files, with the columns mr and ref
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path


def read(folder: Path) -> list[tuple[str, str]]:
    """Meaning representation and description of every row of a folder's CSV files, white space made single."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += [(row["mr"], " ".join(row["ref"].split())) for row in csv.DictReader(file)]
    if not rows:
        raise SystemExit(f"{folder}: expected the CSV files of E2E, found none")
    return rows


def e2e_lines(folder: Path) -> list[str]:
    """The descriptions, pooled."""
    return [line for _, line in read(folder)]


def split(folder: Path, test_lines: int = 2000) -> tuple[list[str], list[str]]:
    """Training lines and about `test_lines` held-out ones; a meaning representation is on one side only."""
    train, test = split_rows(folder, test_lines)
    return [line for _, line in train], [line for _, line in test]


def split_rows(folder: Path, test_lines: int = 2000) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The same with the meaning representation before each line."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for meaning, line in read(folder):
        groups.setdefault(meaning, []).append((meaning, line))
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for meaning in random.Random(0).sample(sorted(groups), len(groups)):
        (test if len(test) < test_lines else train).extend(groups[meaning])
    return train, test


if __name__ == "__main__":
    print("\n".join(e2e_lines(Path(sys.argv[1]))))
