"""How good are the samples? Trains by the commands of the README, samples, checks, writes the README's table.

python benchmarks/quality.py simple                   default training; exact check by the grammar (3 seeds)
python benchmarks/quality.py diffusion_lm             the same by the original's objective
python benchmarks/quality.py shipped                  the weights in the repository, at 2000 steps and at fewer
python benchmarks/quality.py shipped_words            those of the objective cross_entropy, at few
python benchmarks/quality.py shipped_student          those of its student, at fewer
python benchmarks/quality.py greetings
python benchmarks/quality.py text FILE --steps N      any text, a sentence a line, or the folder of E2E's CSV files
python benchmarks/quality.py table                    only write the table again, from results.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import table
from common import ROOT, Trained, record, sample, train
from e2e import e2e_lines

from text_diffusion.config import ModelConfig
from text_diffusion.files import read_lines
from text_diffusion.generation import load_diffusion
from text_diffusion.grammar import Grammar


def simple_figures(sentences: Sequence[str], grammar: Grammar, train_lines: Iterable[str]) -> dict[str, float]:
    """Shares of valid, unique and novel sentences, and the sum over slots of KL(true || sampled) in bits."""
    seen, ids = set(train_lines), grammar.encode(sentences)
    return {
        "valid": float(np.isfinite(grammar.log2_probs(ids)).mean()),
        "unique": len(set(sentences)) / len(sentences),
        "novel": sum(s not in seen for s in sentences) / len(sentences),
        "kl_bits": grammar.slot_kl_bits(ids),
    }


def simple_language() -> tuple[Grammar, list[str]]:
    """The grammar of `simple` and its training lines."""
    return Grammar.load(ROOT / "data/simple/grammar.json"), read_lines(ROOT / "data/simple-train.txt")


def about(trained: Trained) -> dict[str, float]:
    """What a training run took."""
    return {"steps": trained.steps, "seconds": trained.seconds, "peak_mb": trained.peak_mb}


def loss_curve(metrics: Path) -> list[dict[str, float]]:
    """The training rows at 50, 100, 200, 500, 1000, ... steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    shown = {digit * 10**power for digit in (1, 2, 5) for power in range(1, 7)} | {rows[-1]["step"]}
    return [row for row in rows if "loss" in row and row["step"] in shown]


OBJECTIVE = ModelConfig.objective
TRAINED: dict[str, tuple[int | None, tuple[str, ...], tuple[int, ...]]] = {  # steps, flags, network calls
    "simple": (None, (), (2, 4, 8, 16, 50)),
    "diffusion_lm": (2500, ("--objective", "diffusion_lm"), (8, 20, 50)),
}


def simple(name: str, scratch: Path, samples: int, seeds: Sequence[int]) -> None:
    """Train once a seed; sample with few and with more steps."""
    grammar, lines = simple_language()
    steps, flags, calls_of = TRAINED[name]
    runs: list[dict[str, Any]] = []
    curve: list[dict[str, float]] = []
    for seed in seeds:
        trained = train(scratch / f"{name}-{seed}", "simple", steps, [*flags, "--seed", str(seed)])
        curve = curve or loss_curve(trained.weights.parent / "metrics.jsonl")
        for calls in calls_of:
            started = time.perf_counter()
            sentences = sample(trained.weights, samples, steps=calls, seed=seed)
            speed = samples / (time.perf_counter() - started)
            figures = simple_figures(sentences, grammar, lines)
            runs.append({"seed": seed, "calls": calls, "sentences_per_s": speed, **about(trained), **figures})
            print(runs[-1], flush=True)
    ideal = {
        "unique": grammar.expected_unique(samples),
        "novel": grammar.expected_novel(lines),
        "kl_bits": sum(len(slot.words) - 1 for slot in grammar.slots.values()) / (2 * samples * 0.6931),
    }
    record(name, {"samples": samples, "ideal": ideal, "runs": runs, "curve": curve})


SHIPPED = {  # by the name of their figures: the weights, and network calls
    "shipped": ("ckpts/simple/ema_0.9999_025000.pt", (4, 8, 20, 50, 200, 2000)),
    "shipped_words": ("ckpts/simple-cross-entropy/ema_0.9999_010000.pt", (2, 4, 8, 16)),
    "shipped_student": ("ckpts/simple-student/ema_0.9999_008000.pt", (1, 2, 4)),
}


def shipped(name: str, samples: int) -> None:
    """The weights that come with the repository."""
    grammar, lines = simple_language()
    file, calls_of = SHIPPED[name]
    weights, runs = ROOT / file, []
    for calls in calls_of:
        started = time.perf_counter()
        sentences = sample(weights, samples, steps=calls)
        speed = samples / (time.perf_counter() - started)
        runs.append({"calls": calls, "sentences_per_s": speed, **simple_figures(sentences, grammar, lines)})
        print(runs[-1], flush=True)
        record(name, {"samples": samples, "runs": runs})


def triples(line: str) -> set[tuple[str, ...]]:
    """Every three words in a row of a line; words are what white space separates."""
    words = line.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def greetings(scratch: Path, samples: int) -> None:
    """Share of samples whose every three words in a row occur in a row in the corpus."""
    trained = train(scratch / "greetings", "greetings")
    lines = set(read_lines(ROOT / "data/greetings-train.txt"))
    corpus = set().union(*map(triples, read_lines(ROOT / "data/greetings/greetings.txt")))
    model, runs = load_diffusion(str(trained.weights)), []
    for calls in (8, 20, 50):
        sentences = model.sample(samples, steps=calls)
        figures = {
            "sampler": "auto",
            "calls": calls,
            "in_corpus": sum(bool(triples(s)) and triples(s) <= corpus for s in sentences) / samples,
            "copies": sum(s in lines for s in sentences) / samples,
            "unique": len(set(sentences)) / samples,
        }
        print(figures, flush=True)
        runs.append(figures)
    record(
        "greetings",
        {"objective": OBJECTIVE, "samples": samples, **about(trained), "runs": runs, "examples": sentences[:5]},
    )


def text(scratch: Path, file: Path, steps: int, calls: int, flags: Sequence[str]) -> None:
    """A text of one's own: share of the samples' word triples that occur in the held-out part, and of real lines'."""
    trained = train(scratch / file.stem, str(file), steps, flags)
    folder = trained.weights.parent
    held_out = read_lines(folder / f"{file.stem}-test.txt")
    train_lines = read_lines(folder / f"{file.stem}-train.txt")
    known = set().union(*map(triples, held_out))

    def share(lines: Sequence[str]) -> float:
        found = [triple in known for line in lines for triple in triples(line)]
        return sum(found) / max(len(found), 1)

    sentences = load_diffusion(str(trained.weights)).sample(1000, steps=calls)
    figures = {
        "objective": OBJECTIVE,
        "sampler": "",
        "triples": share(sentences),
        "triples_real": share(train_lines[:1000]),
        "copies": sum(s in set(train_lines) for s in sentences) / len(sentences),
        "unique": len(set(sentences)) / len(sentences),
        "held_out_lines": len(held_out),
        "calls": calls,
        "examples": sentences[:20],
    }
    print(figures)
    record("text", {"file": file.name, "flags": " ".join(flags), **about(trained), **figures})


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*TRAINED, *SHIPPED, "greetings", "text", "table"))
    parser.add_argument("file", type=Path, nargs="?", help="for `text`")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seeds", default="102,103,104")
    parser.add_argument("--steps", type=int, default=4000, help="training steps, for `text`")
    parser.add_argument("--calls", type=int, default=50, help="network calls of a sample, for `text`")
    parser.add_argument("--flags", default="", help="more flags for the training command, for `text`")
    parser.add_argument("--keep", type=Path, help="an empty folder for what is trained; else it is thrown away")
    args = parser.parse_args(argv)
    with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        if args.part in TRAINED:
            simple(args.part, scratch, args.samples, [int(seed) for seed in args.seeds.split(",")])
        elif args.part in SHIPPED:
            shipped(args.part, args.samples)
        elif args.part == "greetings":
            greetings(scratch, min(args.samples, 1000))
        elif args.part == "text":
            if args.file is None:
                parser.error("text needs a FILE")
            if args.file.is_dir():
                (scratch / "e2e.txt").write_text("\n".join(e2e_lines(args.file)), encoding="utf-8")
                args.file = scratch / "e2e.txt"
            text(scratch, args.file, args.steps, args.calls, args.flags.split())
    table.write()


if __name__ == "__main__":
    main()
