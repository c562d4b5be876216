"""The committed corpora are what the script writes, and what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from text_diffusion.grammar import Grammar

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
WRITTEN = [
    "simple-train.txt",
    "simple-test.txt",
    "simple/simple.txt",
    "animals-train.txt",
    "animals-test.txt",
    "animals/animals.txt",
    "greetings-train.txt",
    "greetings-test.txt",
    "greetings/greetings.txt",
]


def read_lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_corpora", ROOT / "scripts" / "make_corpora.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path_factory.mktemp("corpora")
    script.main(out)
    return out


# The files


@pytest.mark.parametrize("name", WRITTEN)
def test_committed_file_is_what_the_script_writes(rewritten: Path, name: str) -> None:
    assert (rewritten / name).read_bytes() == (DATA / name).read_bytes()


def test_script_writes_nothing_else(rewritten: Path) -> None:
    written = {path.relative_to(rewritten).as_posix() for path in rewritten.rglob("*") if path.is_file()}
    assert written == set(WRITTEN)


@pytest.mark.parametrize(("name", "test_lines"), [("simple", 500), ("animals", 4000)])
def test_splits_of_the_exact_corpora(name: str, test_lines: int) -> None:
    train, test = read_lines(f"{name}-train.txt"), read_lines(f"{name}-test.txt")
    assert (len(train), len(test)) == (20_000, test_lines)
    assert not set(train) & set(test)
    assert read_lines(f"{name}/{name}.txt") == train + test


@pytest.mark.parametrize("name", ["simple", "animals"])
def test_every_line_of_the_exact_corpora_parses(name: str) -> None:
    grammar = Grammar.load(DATA / name / "grammar.json")
    assert np.isfinite(grammar.log2_probs(grammar.encode(read_lines(f"{name}/{name}.txt")))).all()


def triples(line: str) -> set[tuple[str, ...]]:
    words = line.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_greetings_splits() -> None:
    source = read_lines("greetings/greetings.txt")
    train, test = read_lines("greetings-train.txt"), read_lines("greetings-test.txt")
    assert len(set(source)) == len(source)
    assert sorted(train + test) == sorted(source)
    assert (len(train), len(test)) == (2700, 300)


def test_greetings_follow_their_patterns() -> None:
    """Each line is a pattern with a phrase in each slot, and every pattern and phrase occurs."""
    source = json.loads((DATA / "greetings" / "phrases.json").read_text())
    slots = {name: "|".join(map(re.escape, phrases)) for name, phrases in source["slots"].items()}
    patterns = [
        re.sub(r"{(\w+)}", lambda m: f"({slots[m[1]]})", re.sub(r"([.?])", r"\\\1", p)) for p in source["patterns"]
    ]
    lines = read_lines("greetings/greetings.txt")
    met = Counter(next(i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, line)) for line in lines)
    assert len(met) == len(patterns)
    assert min(met.values()) > 100
    assert all(phrase in "\n".join(lines) for phrases in source["slots"].values() for phrase in phrases)


def test_greetings_can_be_recombined() -> None:
    """What is said in a held-out line, three words at a time, was said in training lines."""
    train, test = read_lines("greetings-train.txt"), read_lines("greetings-test.txt")
    known = set().union(*map(triples, train))
    assert all(triples(line) and triples(line) <= known for line in test)


def test_words_of_simple() -> None:
    grammar = Grammar.load(DATA / "simple" / "grammar.json")
    words = [word for slot in grammar.slots.values() for word in slot.words]
    assert [len(slot.words) for slot in grammar.slots.values()] == [10, 93, 54]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    for slot in grammar.marginals.values():
        weights = 1 / (np.arange(1, len(slot) + 1) + 5)
        np.testing.assert_allclose(list(slot.values()), weights / weights.sum(), rtol=1e-5)
