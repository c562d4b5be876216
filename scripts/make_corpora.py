"""Write the corpora under data/ from their sources: {simple,animals}/grammar.json and greetings/phrases.json there.

Deterministic: running it again reproduces the committed files byte for byte.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from text_diffusion.grammar import Grammar  # noqa: E402  (the package need not be installed)

DATA = ROOT / "data"
SEED = 20240501
TRAIN_LINES = 20_000
TEST_LINES = {"simple": 500, "animals": 4000}
GREETINGS_LINES = 3000
GREETINGS_TEST_LINES = 300


def new_rng(seed: int) -> np.random.Generator:
    """Return a generator of a named kind, as numpy may change which one default_rng gives."""
    return np.random.Generator(np.random.PCG64(seed))


def draw(grammar: Grammar, test_lines: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Draw the training lines, then test lines that are not among them (a test line may occur twice)."""
    train = grammar.sample(TRAIN_LINES, rng)
    known = set(train)
    test: list[str] = []
    while len(test) < test_lines:
        drawn = grammar.sample(test_lines - len(test), rng)
        test += [line for line in drawn if line not in known]
    return train, test


def make_greetings(path: Path, rng: np.random.Generator) -> list[str]:
    """Distinct lines in random order: a pattern, all equally likely, and for each of its slots a phrase, likewise."""
    source = json.loads(path.read_text(encoding="utf-8"))
    lines: dict[str, None] = {}
    while len(lines) < GREETINGS_LINES:
        pattern = source["patterns"][rng.integers(len(source["patterns"]))]
        slots = [source["slots"][name] for name in re.findall(r"{(\w+)}", pattern)]
        phrases = [slot[rng.integers(len(slot))] for slot in slots]
        lines[re.sub(r"{\w+}", "{}", pattern).format(*phrases)] = None
    return list(lines)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write one line each, ending in a line feed on every platform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main(out: Path = DATA) -> None:
    """Write all corpora under the folder out; the sources are always read from data/."""
    # A stream of its own for each corpus, so that a change to one leaves the others as they are.
    for name, seed in (("simple", SEED), ("animals", SEED + 2)):
        train, test = draw(Grammar.load(DATA / name / "grammar.json"), TEST_LINES[name], new_rng(seed))
        write_lines(out / f"{name}-train.txt", train)
        write_lines(out / f"{name}-test.txt", test)
        write_lines(out / name / f"{name}.txt", train + test)

    greetings = make_greetings(DATA / "greetings" / "phrases.json", new_rng(SEED + 1))
    write_lines(out / "greetings-train.txt", greetings[GREETINGS_TEST_LINES:])
    write_lines(out / "greetings-test.txt", greetings[:GREETINGS_TEST_LINES])
    write_lines(out / "greetings" / "greetings.txt", greetings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="output folder (default: the repository's data folder)")
    main(parser.parse_args().out)
