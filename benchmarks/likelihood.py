"""How many bits do the models need for held-out lines of a language whose true bits are known?

python benchmarks/likelihood.py simple --weights CKPT [--teacher CKPT]   the bound; and -log2 P of a teacher, exactly
python benchmarks/likelihood.py animals --weights CKPT [--teacher CKPT]  likewise
python benchmarks/likelihood.py calibration --weights CKPT               of `simple`: is it as sure as it is right?
python benchmarks/likelihood.py micro                                    do the probabilities of all sentences sum to 1?
python benchmarks/likelihood.py table                                    only write the tables again

The tables go to docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import table
import torch
from common import ROOT, record
from micro import Micro, train_micro
from torch import Tensor

from text_diffusion.autoregressive import Autoregressive
from text_diffusion.bound import log_decoder
from text_diffusion.calibration import QUARTERS, calibrate
from text_diffusion.config import LikelihoodConfig
from text_diffusion.files import read_lines
from text_diffusion.flow import Predict, exact_trace, ode_log_weight, predict_twice
from text_diffusion.generation import load, load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.likelihood import measure, measure_exactly, read_text, standard_error, true_bits


def counted_bits(grammar: Grammar, train: Sequence[str], lines: Sequence[str]) -> Tensor:
    """-log2 P of lines under slots counted in the training text, one half added: what independent slots can reach."""
    seen, rows = grammar.encode(train), grammar.encode(lines)
    bits = np.zeros(len(lines))
    for name, slot in grammar.slots.items():
        place = grammar.places.index(name)
        if slot.given is None:
            counts = np.bincount(seen[:, place], minlength=len(slot.words)) + 0.5
            bits -= np.log2(counts / counts.sum())[rows[:, place]]
            continue
        given = grammar.places.index(slot.given)
        joint = np.zeros((len(grammar.slots[slot.given].words), len(slot.words)))
        np.add.at(joint, (seen[:, given], seen[:, place]), 1)
        joint += 0.5 * (slot.probs > 0)
        bits -= np.log2((joint / joint.sum(axis=1, keepdims=True))[rows[:, given], rows[:, place]])
    return torch.from_numpy(bits)


def corpus(name: str, weights: str, teacher: str | None, count: int, paths: int) -> None:
    """Bits of the first `count` held-out lines by each model, beside the truth."""
    grammar_file, test = ROOT / f"data/{name}/grammar.json", ROOT / f"data/{name}-test.txt"
    grammar = Grammar.load(grammar_file)
    model = load_diffusion(weights, device="cpu")
    text = read_text(test, model.tokenizer, model.sequence_len, count)
    true = true_bits(grammar_file, text.lines)
    train = read_lines(ROOT / f"data/{name}-train.txt")
    bits = {"true": true, "counted": counted_bits(grammar, train, text.lines)}
    if teacher is not None:
        judge = load(teacher, device="cpu")
        assert isinstance(judge, Autoregressive), f"{teacher} must write left to right"
        read = read_text(test, judge.tokenizer, judge.sequence_len, count)
        bits["autoregressive"] = measure_exactly(judge, read, LikelihoodConfig()).lines["exact"]
    figures = measure(model, text, LikelihoodConfig(paths=paths))
    bits |= figures.lines
    rows = {
        key: {
            "bits": float(values.mean()),
            "error": standard_error(values),
            "per_token": float(values.sum()) / text.tokens,
            "above": float((values - true).mean()),
            "above_error": standard_error(values - true),
        }
        for key, values in bits.items()
    }
    about = {"lines": len(text.lines), "paths": paths, "entropy": grammar.entropy_bits(), "rows": rows}
    record(f"likelihood-{name}", about)
    print(rows)


def calibration(name: str, weights: str) -> None:
    """How sure the model is of words at each noise level, and how often they stay."""
    found = calibrate(load_diffusion(weights, device="cpu"), sentences=1000)
    rows = [
        {
            "words": int(found.counts[quarter].sum()),
            "confidence": float(found.confidence[quarter].sum() / found.counts[quarter].sum()),
            "stays": float(found.stays[quarter].sum() / found.counts[quarter].sum()),
            "error": found.error(quarter),
        }
        for quarter in range(QUARTERS)
    ]
    record(f"calibration-{name}", {"sentences": 1000, "rows": rows})
    print(rows)


# The micro-language


def without_path(micro: Micro) -> Predict:
    """The same estimates, with what the first of the two calls has to do with x left out of the derivative."""

    def predict(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t * micro.diffusion.time_scale)
        xhat: Tensor = micro.model(x, time, micro.model(x, time).detach())
        return xhat

    return predict


def sums(micro: Micro, predict: Predict, draws: int, steps: int = 16) -> dict[str, float]:
    """The sum over all 1,296 sentences of their probabilities by importance sampling, and its error; bits of each."""
    decoder = partial(log_decoder, micro.model, micro.sentences)
    posterior, E = micro.posterior(micro.diffusion), micro.x_start_mean
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(E.shape, generator=generator) for _ in range(draws)]
    weigh = partial(ode_log_weight, predict, decoder, micro.diffusion, posterior, E)
    weights = torch.stack([weigh(noise, steps, exact_trace, 60) for noise in noises]).exp()  # (draws, 1296)
    mean = weights.mean(dim=0)
    bits = float(-(micro.p * mean.log2()).sum())
    return {"sum": float(mean.sum()), "error": float((weights.var(dim=0).sum() / draws).sqrt()), "bits": bits}


def micro(draws: int) -> None:
    """The whole trace, and the trace with the self-conditioning path left out."""
    model = train_micro()
    rows = {
        "whole": sums(model, predict_twice(model.model, model.diffusion), draws),
        "left_out": sums(model, without_path(model), draws),
    }
    entropy = float(-(model.p * model.p.log2()).sum())
    print(rows)
    record("likelihood-micro", {"draws": draws, "entropy": entropy, "rows": rows})


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simple", "animals", "calibration", "micro", "table"))
    parser.add_argument("--weights", help="of a diffusion model")
    parser.add_argument("--teacher", help="of a model that writes left to right")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--paths", type=int, default=2, help="paths for each line")
    parser.add_argument("--draws", type=int, default=24, help="of the micro-language")
    args = parser.parse_args(argv)
    if args.part in ("simple", "animals", "calibration") and not args.weights:
        parser.error(f"{args.part} needs --weights")
    if args.part in ("simple", "animals"):
        corpus(args.part, args.weights, args.teacher, args.lines, args.paths)
    elif args.part == "calibration":
        calibration("simple", args.weights)
    elif args.part == "micro":
        micro(args.draws)
    table.write()


if __name__ == "__main__":
    main()
