"""E2E as a task of steering: rows split by meaning representation, texts for training, trained models."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import e2e
from common import train
from e2e_fields import Matcher, Meaning, linear, parse
from quality import triples

from text_diffusion.generation import TextDiffusion, load_diffusion

# A few descriptions are twice as long as nearly all others, and every sentence takes the time of the longest. Half the
# usual batch is twice the steps in the same time.
FIT = (
    "--objective",
    "diffusion_lm",
    "--sequence_len",
    "50",
    "--long_lines",
    "drop",
    "--eval_interval",
    "0",
    "--batch_size",
    "64",
    "--lr",
    "0.003",
)
Triple = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A description and what it describes."""

    meaning: Meaning
    line: str


@dataclass(frozen=True)
class Task:
    """Both parts of the corpus."""

    train: list[Row]
    test: list[Row]

    @staticmethod
    def of(folder: Path, test_lines: int = 2000) -> Task:
        """From the CSV files of a folder."""
        parts = e2e.split_rows(folder, test_lines)
        return Task(*([Row(parse(meaning), line) for meaning, line in part] for part in parts))

    @cached_property
    def matcher(self) -> Matcher:
        """Knows the values of the training part."""
        return Matcher(row.meaning for row in self.train)

    @cached_property
    def train_lines(self) -> set[str]:
        """All different ones."""
        return {row.line for row in self.train}

    @cached_property
    def _held_out(self) -> set[Triple]:
        return self.known([row.line for row in self.test])

    @staticmethod
    def known(lines: Sequence[str]) -> set[Triple]:
        """All word triples of lines."""
        return set().union(*map(triples, lines))

    def triples(self, lines: Sequence[str]) -> float:
        """Share of the lines' word triples that occur in the held-out part."""
        found = [triple in self._held_out for line in lines for triple in triples(line)]
        return sum(found) / max(len(found), 1)

    @staticmethod
    def touching(words: Sequence[str], before: int, behind: int) -> list[Triple]:
        """The triples that have a word between the first `before` and the last `behind`."""
        end = len(words) - behind
        return [tuple(words[i : i + 3]) for i in range(len(words) - 2) if i + 2 >= before and i < end]

    def halves(self) -> tuple[list[Row], list[Row]]:
        """The held-out part in two, no meaning in both (rows of one meaning follow each other)."""
        middle = len(self.test) // 2
        while self.test[middle].meaning == self.test[middle - 1].meaning:
            middle += 1
        return self.test[:middle], self.test[middle:]


def write_texts(task: Task, folder: Path) -> None:
    """What models are trained on: lines alone, and `source TAB line`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", task.train), ("test", task.test)):
        lines = "".join(f"{row.line}\n" for row in rows)
        pairs = "".join(f"{linear(row.meaning)}\t{row.line}\n" for row in rows)
        (folder / f"e2e-{part}.txt").write_text(lines, encoding="utf-8")
        (folder / f"source-{part}.tsv").write_text(pairs, encoding="utf-8")


def trained(folder: Path, text: str, ending: str, steps: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Train into a folder, by the real command; a run that has finished there is taken as it is."""
    weights = folder / f"ema_0.9999_{steps:06d}.pt"
    if not weights.is_file():
        data = folder.parent / f"{text}-train.{ending}"
        held_out = ["--val_txt_path", str(folder.parent / f"{text}-test.{ending}")]
        weights = train(folder, str(data), steps, [*held_out, *FIT, *flags]).weights
    return {"weights": str(weights), "steps": steps, "seconds": seconds_of(weights)}


def seconds_of(weights: Path) -> float | None:
    """In the training loop until these weights, if the run's log lies beside them."""
    log = weights.parent / "metrics.jsonl"
    step = re.fullmatch(r".*_0*(\d+)", weights.stem)
    if not log.is_file() or not step:
        return None
    found = [row for row in map(json.loads, log.read_text().splitlines()) if "seconds" in row]
    return max((row["seconds"] for row in found if row["step"] <= int(step[1])), default=None)


def free_model(args: argparse.Namespace) -> tuple[TextDiffusion, dict[str, Any]]:
    """The unconditional model that was named, or one that is trained here; its file goes into `args.weights`."""
    if args.weights is None:
        about = trained(args.keep / "free", "e2e", "txt", args.steps)
        args.weights = Path(about["weights"])
    else:
        about = {"weights": str(args.weights), "seconds": seconds_of(args.weights)}
    model = load_diffusion(str(args.weights))
    return model, {"weights": args.weights.name, "seconds": about["seconds"]}
