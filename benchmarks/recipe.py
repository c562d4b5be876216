"""What each ingredient of `cross_entropy` buys: trains it without each in turn, on a language known exactly.

python benchmarks/recipe.py simple --seeds 102,103,104                 every way
python benchmarks/recipe.py animals --ways "cross_entropy,diffusion_lm"

A row of results.json for each way and seed, in place of the row that was there, so that it can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
from common import RESULTS, ROOT, machine, record, train
from quality import simple_figures

from text_diffusion.config import LikelihoodConfig
from text_diffusion.files import read_lines
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.likelihood import measure, read_text, true_bits

OURS = "--objective cross_entropy"
WAYS = {
    "cross_entropy": OURS,
    "without known words": f"{OURS} --known_words False",
    "without the output prior": f"{OURS} --output_prior False",
    "without self-conditioning": f"{OURS} --self_condition False",
    "t uniform in log-SNR": f"{OURS} --schedule_sampler uniform",
    "t not stratified": f"{OURS} --stratified False",
    "diffusion_lm": "--objective diffusion_lm",
}
CALLS = (2, 4, 8, 16, 32)


def bits(model: TextDiffusion, dataset: str, lines: int) -> dict[str, float]:
    """The bound of a walk of 1,000 steps and the truth, bits a sentence, over the first held-out lines."""
    text = read_text(ROOT / f"data/{dataset}-test.txt", model.tokenizer, model.sequence_len, lines)
    bound = measure(model, text, LikelihoodConfig(steps=1000)).lines["bound"]
    true = true_bits(ROOT / f"data/{dataset}/grammar.json", text.lines)
    return {"bound": float(bound.mean()), "true": float(true.mean())}


def judged(model: TextDiffusion, dataset: str, samples: int) -> list[dict[str, Any]]:
    """Quality against network calls."""
    grammar = Grammar.load(ROOT / f"data/{dataset}/grammar.json")
    seen = read_lines(ROOT / f"data/{dataset}-train.txt")
    rows = []
    for calls in CALLS:
        started = time.perf_counter()
        sentences = model.sample(samples, steps=calls)
        speed = samples / (time.perf_counter() - started)
        rows.append({"calls": calls, **simple_figures(sentences, grammar, seen), "sentences_per_s": speed})
    return rows


def ideal(dataset: str, samples: int) -> dict[str, float]:
    """What as many sentences of a perfect sampler are expected to give."""
    grammar = Grammar.load(ROOT / f"data/{dataset}/grammar.json")
    return {
        "unique": grammar.expected_unique(samples),
        "novel": grammar.expected_novel(read_lines(ROOT / f"data/{dataset}-train.txt")),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, judge; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("simple", "animals"))
    parser.add_argument("--ways", default=",".join(WAYS), help="names, separated by commas")
    parser.add_argument("--seeds", default="102,103,104")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=200, help="held-out lines for the bound")
    args = parser.parse_args(argv)
    for seed in map(int, args.seeds.split(",")):
        for way in args.ways.split(","):
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--seed", str(seed), "--eval_interval", "0", *WAYS[way].split()]
                trained = train(Path(folder, "run"), args.dataset, args.steps, flags)
                model = load_diffusion(trained.weights)
                row: dict[str, Any] = {"way": way, "dataset": args.dataset, "seed": seed, "steps": args.steps}
                row |= {"seconds": trained.seconds, "machine": machine(), "samples": args.samples}
                row |= bits(model, args.dataset, args.lines) | {"samplings": judged(model, args.dataset, args.samples)}
            print(json.dumps(row), flush=True)
            part = json.loads(RESULTS.read_text()).get("recipe", {"rows": [], "ideal": {}})
            same = ("way", "dataset", "seed")
            rows = [old for old in part["rows"] if any(old[name] != row[name] for name in same)]
            part["ideal"][args.dataset] = ideal(args.dataset, args.samples)
            record("recipe", {"rows": [*rows, row], "ideal": part["ideal"]})
    table.write()


if __name__ == "__main__":
    main()
