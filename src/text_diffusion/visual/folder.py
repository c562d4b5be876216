"""What is there of a run: its metrics as far as they are written, its settings, its latest weights, its texts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from text_diffusion.errors import UserError
from text_diffusion.files import project_root, read_lines

Row = dict[str, float]


@dataclass
class RunFolder:
    """A folder of a run, whole, in progress, or with shipped weights alone.

    rows: of metrics.jsonl, numbers only, ascending steps.
    settings: the groups model, diffusion, data and train, as far as known.
    weights: to sample from, if any.
    missing: of what is not there, the reason.
    """

    path: Path
    name: str
    rows: list[Row]
    settings: dict[str, dict[str, Any]]
    weights: Path | None
    missing: dict[str, str] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a column."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in found], [value for _, value in found]

    def columns(self) -> list[str]:
        """Every name that some row has, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def text(self, part: str) -> Path | None:
        """The file of the "train" or "test" part of the corpus, if it is still there."""
        data = self.settings.get("data", {})
        given = data.get({"train": "train_txt_path", "test": "val_txt_path"}[part]) or ""
        name = Path(str(data.get("dataset", ""))).stem
        candidates = [Path(str(given))] if given else []
        if name:
            own = [self.path / f"{name}-{part}.{ending}" for ending in ("tsv", "txt")]  # with a condition, without
            candidates += [*own, project_root() / "data" / f"{name}-{part}.txt"]
        return next((path for path in candidates if path.is_file()), None)

    def sentences(self, part: str) -> list[str] | None:
        """The lines of that file; with a condition, what the model is to say in them.

        Raises:
            UserError: it cannot be read.
        """
        path, condition = self.text(part), self.settings.get("model", {}).get("condition", "none")
        if path is None:
            return None
        rows = [line.split("\t") for line in read_lines(path)]
        return ["\t".join(row) if condition == "none" else row[-1 if condition == "source" else 0] for row in rows]


def read_run(path: Path) -> RunFolder:
    """Look into a run's folder, or into that of a weights file, of which then that one is taken.

    Raises:
        UserError: there is no such folder, or nothing of a run in it.
    """
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise UserError(f"{path}: expected the folder of a run, found nothing")
    metrics = folder / "metrics.jsonl"
    rows, unread = read_metrics(metrics) if metrics.is_file() else ([], 0)
    last = (rows[-1]["step"] if rows else 0) if metrics.is_file() else math.inf
    weights = path if path.is_file() else latest_weights(folder, last)
    if weights is None and not metrics.is_file():
        raise UserError(f"{folder}: expected the folder of a run, found neither metrics.jsonl nor weights (*.pt) in it")
    run = RunFolder(folder, folder.resolve().name, [], _settings(folder / "training_args.json"), weights)
    if not metrics.is_file():
        run.missing["training curves"] = "there is no metrics.jsonl in this folder (shipped weights come without)"
        return run
    run.rows = rows
    if unread:
        run.missing["parts of the training curves"] = f"{unread} lines of metrics.jsonl are not rows of numbers"
    if not run.rows:
        run.missing["training curves"] = "metrics.jsonl has no whole row yet"
    if weights is None:
        run.missing["everything that the model is asked for"] = "there are no weights in this folder yet"
    return run


def read_metrics(path: Path) -> tuple[list[Row], int]:
    """The rows of numbers, by step, and how many lines are none; a last one that is cut off is being written."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[Row] = []
    unread = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            unread += bool(line.strip()) and number < len(lines)
            continue
        try:
            read = {key: float(value) for key, value in row.items() if _is_number(value)}
        except (AttributeError, OverflowError):  # no row, or a number beyond all numbers
            read = {}
        if "step" in read:
            rows.append(read)
        else:
            unread += 1
    return sorted(rows, key=lambda row: row["step"]), unread


def latest_weights(folder: Path, last: float = math.inf) -> Path | None:
    """The averaged weights of the last step that has a file, or else the raw ones.

    A run's own, beside which its optimizer's state lies, come before others in its folder, such as shipped ones. Those
    of a step that the run, at `last`, has not reached are none of its.
    """
    found: list[tuple[bool, int, bool, str, Path]] = []
    for path in folder.glob("*.pt"):
        if name := re.fullmatch(r"(?:(ema)_([\d.]+)_|model)(\d+)\.pt", path.name):
            own = (folder / f"opt{name[3]}.pt").exists()
            if own or int(name[3]) <= last:
                found.append((own, int(name[3]), name[1] is not None, name[2] or "", path))
    return max(found)[-1] if found else None


def thinned(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equally many neighbours, so that a long run does not make a heavy page."""
    size = -(-len(x) // most)
    if size <= 1:
        return list(x), list(y)
    groups = [slice(i, i + size) for i in range(0, len(x), size)]
    return [sum(x[g]) / len(x[g]) for g in groups], [sum(y[g]) / len(y[g]) for g in groups]


def _settings(path: Path) -> dict[str, dict[str, Any]]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(read, dict):
        return {}
    return {name: group for name, group in read.items() if isinstance(group, dict)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
