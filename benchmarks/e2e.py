"""The E2E restaurant descriptions (Novikova et al. 2017, arXiv 1706.09254, CC BY-SA 4.0) as a text, one a line.

python benchmarks/e2e.py FOLDER > e2e.txt          FOLDER holds its CSV files, with the columns mr and ref
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def e2e_lines(folder: Path) -> list[str]:
    """The descriptions of every CSV file of a folder, pooled, white space made single."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            lines += [" ".join(row["ref"].split()) for row in csv.DictReader(file)]
    if not lines:
        raise SystemExit(f"{folder}: expected the CSV files of E2E, found none")
    return lines


if __name__ == "__main__":
    print("\n".join(e2e_lines(Path(sys.argv[1]))))
