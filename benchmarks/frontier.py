"""Quality against network calls, for every sampler and spacing: which default is the best?

python benchmarks/frontier.py WEIGHTS ...          of `simple`; each figure is the mean over the weights files given
python benchmarks/frontier.py --train 102,103,104  trains them first, by the default command with these seeds
                                                   (a model of Diffusion-LM's objective has a table of its own)
python benchmarks/frontier.py --far WEIGHTS        what few steps cost: one weights file, up to 1,000 steps
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from common import record, sample, train
from quality import simple_figures, simple_language

from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.generation import load_diffusion

CALLS = (2, 4, 8, 20)
SPACINGS = ("uniform", "log-snr", "loss")
WAYS: tuple[dict[str, Any], ...] = (
    *({"sampler": name, "spacing": spacing} for name in ("ancestral", "ddim", "dpm-solver++") for spacing in SPACINGS),
    {"sampler": "ddim", "spacing": "loss", "eta": 0.5},
    {"sampler": "dpm-solver++", "spacing": "loss", "churn": 2.0},
    {"sampler": "heun", "spacing": "loss"},
    {"sampler": "dpm-solver++", "spacing": "loss", "halt": 3},
)
FAR = (4, 8, 20, 50, 1000)  # calls, by the sampler that the command takes for so many


def main() -> None:
    """One JSON line a way, spacing and number of calls; all of them into results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*")
    parser.add_argument("--train", default="", help="seeds")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--calls", default=",".join(map(str, CALLS)))
    parser.add_argument("--far", action="store_true", help="only compare with 1,000 steps")
    args = parser.parse_args()
    if not (args.weights or args.train):
        parser.error("expected WEIGHTS or --train SEEDS, found neither")
    grammar, lines = simple_language()

    def measure(way: dict[str, Any], calls: int) -> dict[str, Any]:
        samples = [sample(path, args.samples, steps=calls, **way) for path in paths]
        found = [simple_figures(sentences, grammar, lines) for sentences in samples]
        mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        row = {**way, "calls": calls, **mean, "valid_least": min(one["valid"] for one in found)}
        print(json.dumps(row), flush=True)
        return row

    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(path) for path in args.weights]
        for seed in filter(None, args.train.split(",")):
            paths.append(train(Path(scratch, seed), "simple", flags=["--seed", seed, "--eval_interval", "0"]).weights)
        cases = [(way, calls) for calls in map(int, args.calls.split(",")) for way in WAYS]
        cases = [({}, calls) for calls in FAR] if args.far else cases
        words = all(isinstance(load_diffusion(str(path)).model, WordDenoiser) for path in paths)
        table = "frontier" if words else "frontier_diffusion_lm"
        rows: list[dict[str, Any]] = []
        for way, calls in cases:
            if not (way.get("sampler") == "heun" and calls < 3):
                rows.append(measure(way, calls))
                part = {"samples": args.samples, "weights": len(paths), "rows": rows}
                record("far" if args.far else table, part)


if __name__ == "__main__":
    main()
