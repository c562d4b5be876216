"""How many bits do the models need for held-out lines of a language whose true bits are known?

python benchmarks/likelihood.py simple CKPT ...      the bound of each model, exact of one that writes left to right
python benchmarks/likelihood.py animals CKPT ...     likewise
python benchmarks/likelihood.py calibration CKPT     of `simple`: is it as sure as it is right?
python benchmarks/likelihood.py micro                do the probabilities of all sentences sum to 1?
python benchmarks/likelihood.py table                only write the tables again

The tables go to docs/evaluation.md. Models are added to those that are there, one of an objective.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import table
import torch
from common import ROOT, machine, record, results
from micro import Micro, train_micro
from torch import Tensor

from text_diffusion.autoregressive import Autoregressive
from text_diffusion.bound import handover_for, log_decoder, path_terms, walk
from text_diffusion.calibration import QUARTERS, calibrate
from text_diffusion.config import LikelihoodConfig
from text_diffusion.files import read_lines
from text_diffusion.flow import Predict, exact_trace, ode_log_weight, predict_twice
from text_diffusion.generation import Writer, load, load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.likelihood import BIT, Text, measure, measure_exactly, read_text, standard_error, true_bits
from text_diffusion.masked import Masked, mean_bound
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.spacing import spaced_timesteps

MASKED_PATHS = 64  # a path is one call of a masked model, and T of them of a diffusion model


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


def objective_of(model: Writer) -> str:
    """The name of what it was trained for."""
    network = type(model.model)
    return next(name for name, objective in OBJECTIVES.items() if objective.network is network)


def bits_of(model: Writer, text: Text, walk: LikelihoodConfig) -> dict[str, Tensor]:
    """Bits of each line, by name."""
    if isinstance(model, Autoregressive):
        return measure_exactly(model, text, LikelihoodConfig()).lines
    if isinstance(model, Masked):
        return {"bound": mean_bound(model.model, text.ids, MASKED_PATHS, LikelihoodConfig().seed).cpu() / BIT}
    return measure(model, text, walk).lines


def corpus(name: str, weights: Sequence[str], count: int, walk: LikelihoodConfig) -> None:
    """Bits of the first `count` held-out lines by each model, beside the truth."""
    grammar_file, test = ROOT / f"data/{name}/grammar.json", ROOT / f"data/{name}-test.txt"
    grammar, lines = Grammar.load(grammar_file), read_lines(test)[:count]
    true = true_bits(grammar_file, lines)
    counted = counted_bits(grammar, read_lines(ROOT / f"data/{name}-train.txt"), lines)

    def row(values: Tensor) -> dict[str, float]:
        return {
            "bits": float(values.mean()),
            "error": standard_error(values),
            "above": float((values - true).mean()),
            "above_error": standard_error(values - true),
        }

    language = {"true": row(true), "counted": row(counted)}
    before = results().get(f"likelihood-{name}", {})
    models: dict[str, Any] = before["models"] if before.get("lines") == count else {}
    for file in weights:
        model = load(file, device="cpu")
        text = read_text(test, model.tokenizer, model.sequence_len, count)
        assert text.lines == lines, f"{file}: some of the lines are too long for it"
        rows = {key: row(values) for key, values in bits_of(model, text, walk).items()}
        of = {"weights": Path(file).name, "paths": walk.paths, "steps": walk.steps, "machine": machine()}
        models[objective_of(model)] = of | {"rows": rows}
        print(file, rows, flush=True)
        tokens = text.tokens / count
        about = {"lines": count, "tokens": tokens, "entropy": grammar.entropy_bits(), "language": language}
        record(f"likelihood-{name}", about | {"models": models})


def calibration(name: str, weights: str) -> None:
    """How sure the model is of words at each noise level, and how often they stay."""
    model = load_diffusion(weights, device="cpu")
    if model.is_student:
        raise SystemExit(f"{weights}: expected weights that know no noise, found a student's")
    found = calibrate(model, sentences=1000)
    rows = [
        {
            "words": int(found.counts[quarter].sum()),
            "confidence": float(found.confidence[quarter].sum() / found.counts[quarter].sum()),
            "stays": float(found.stays[quarter].sum() / found.counts[quarter].sum()),
            "error": found.error(quarter),
        }
        for quarter in range(QUARTERS)
    ]
    print(rows)
    models = results().get(f"calibration-{name}", {"models": {}})["models"]
    models[model.model.config.objective] = {"rows": rows, "machine": machine()}
    record(f"calibration-{name}", {"sentences": 1000, "models": models})


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


@torch.no_grad()
def of_the_walk(micro: Micro, paths: int, steps: int = 30) -> dict[str, dict[str, float]]:
    """The same of the walk of as many ancestral steps: of its variational bound, and of all paths together."""
    diffusion = micro.diffusion.respace(spaced_timesteps(micro.diffusion.alphas_cumprod, steps))
    posterior, E = micro.posterior(diffusion), micro.x_start_mean
    decoder = partial(log_decoder, micro.model, micro.sentences)
    handover = handover_for(posterior, micro.model.word_embedding.weight, micro.sentences)
    generator = torch.Generator().manual_seed(0)

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        xhat: Tensor = micro.model(x_t, diffusion.network_time(t), previous)
        return xhat

    def weigh() -> Tensor:
        drawn = walk(denoise, diffusion, posterior, E, lambda s: torch.randn(E.shape, generator=generator), handover)
        return path_terms(drawn, decoder).log_weight

    weights = torch.stack([weigh() for _ in range(paths)])  # (paths, 1296)
    bound, together = -weights.mean(dim=0), weights.exp().mean(dim=0)
    of_bound = (-bound).exp()
    spread, spread_together = (x.var(dim=0) / paths for x in (weights, weights.exp()))
    rows = {}
    for name, p, error in (("bound", of_bound, of_bound.square() * spread), ("together", together, spread_together)):
        bits = float(-(micro.p * p.log2()).sum())
        rows[name] = {"sum": float(p.sum()), "error": float(error.sum().sqrt()), "bits": bits}
    return rows


def micro(draws: int) -> None:
    """The whole trace, the trace with the self-conditioning path left out, and the bound."""
    model = train_micro()
    rows = {
        "whole": sums(model, predict_twice(model.model, model.diffusion), draws),
        "left_out": sums(model, without_path(model), draws),
        **of_the_walk(model, draws),
    }
    entropy = float(-(model.p * model.p.log2()).sum())
    print(rows)
    record("likelihood-micro", {"draws": draws, "entropy": entropy, "rows": rows})


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simple", "animals", "calibration", "micro", "table"))
    parser.add_argument("weights", metavar="CKPT", nargs="*", help="weights files")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--paths", type=int, default=2, help="paths for each line")
    parser.add_argument("--steps", type=int, default=0, help="of a path; 0: all that the model was trained for")
    parser.add_argument("--draws", type=int, default=24, help="of the micro-language")
    args = parser.parse_args(argv)
    if args.part in ("simple", "animals", "calibration") and not args.weights:
        parser.error(f"{args.part} needs CKPT")
    if args.part in ("simple", "animals"):
        corpus(args.part, args.weights, args.lines, LikelihoodConfig(paths=args.paths, steps=args.steps))
    elif args.part == "calibration":
        calibration("simple", *args.weights)
    elif args.part == "micro":
        micro(args.draws)
    table.write()


if __name__ == "__main__":
    main()
