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

import numpy as np
import table
import torch
from common import ROOT, machine, record, results, train
from quality import simple_figures

from text_diffusion.config import LikelihoodConfig
from text_diffusion.cross_entropy import WordDenoiser, cross_entropy_loss
from text_diffusion.embedding_health import effective_rank, smallest_angle
from text_diffusion.files import read_lines
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.likelihood import measure, read_text, true_bits
from text_diffusion.losses import Noise

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


@torch.no_grad()
def linearity(model: TextDiffusion, weights: Path, dataset: str) -> dict[str, float]:
    """R^2 of the cross-entropy of 500 held-out lines against the fitted time, and the embeddings' health."""
    E = model.model.embeddings
    found = {"embedding_rank": effective_rank(E), "embedding_angle": smallest_angle(E)}
    sampler = torch.load(next(weights.parent.glob("opt*.pt")), weights_only=True)["timestep_sampler"]
    if not isinstance(model.model, WordDenoiser) or "F" not in sampler:
        return found
    ids = read_text(ROOT / f"data/{dataset}-test.txt", model.tokenizer, model.sequence_len, 500).ids
    places, u = np.linspace(0, model.diffusion.num_timesteps - 1, len(sampler["F"])), (np.arange(50) + 0.5) / 50
    losses = []
    for t in np.interp(u, sampler["F"].numpy(), places).astype(int).tolist():
        noise = Noise.draw((5, t), 0, len(ids), (ids.shape[1], E.shape[1]), ids.device)
        terms = cross_entropy_loss(model.model, model.diffusion, ids, torch.full((len(ids),), t), noise)
        losses.append(float(terms.cross_entropy.mean()))
    return found | {"r_squared": float(np.corrcoef(u, losses)[0, 1] ** 2)}


def judged(model: TextDiffusion, dataset: str, samples: int) -> list[dict[str, Any]]:
    """Quality against network calls."""
    grammar = Grammar.load(ROOT / f"data/{dataset}/grammar.json")
    seen = read_lines(ROOT / f"data/{dataset}-train.txt")
    rows = []
    for calls in CALLS:
        started = time.perf_counter()
        sentences = model.sample(samples, steps=calls, sampler="dpm-solver++")
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
                row |= linearity(model, trained.weights, args.dataset)
                row |= bits(model, args.dataset, args.lines) | {"samplings": judged(model, args.dataset, args.samples)}
            print(json.dumps(row), flush=True)
            part = results().get("recipe", {"rows": [], "ideal": {}})
            same = ("way", "dataset", "seed")
            rows = [old for old in part["rows"] if any(old[name] != row[name] for name in same)]
            part["ideal"][args.dataset] = ideal(args.dataset, args.samples)
            record("recipe", {"rows": [*rows, row], "ideal": part["ideal"]})
    table.write()


if __name__ == "__main__":
    main()
