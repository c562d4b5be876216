"""Which defaults pay: trains `simple` or `animals` several ways and compares the samples with the exact language.

    python benchmarks/choices.py --seeds 102,103 "" "--norm post" "--self_condition False"
    python benchmarks/choices.py --dataset animals "" "--self_condition False"

Each argument is a set of flags for the training command ("" is the default). One JSON line a setting and seed, and all
of them into results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
from common import record, train
from evaluation import exact
from quality import simple_figures

from text_diffusion.generation import load_diffusion


def main() -> None:
    """Train and judge each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="+")
    parser.add_argument("--dataset", choices=("simple", "animals"), default="simple")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", default="102")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--calls", default="8,20")
    args = parser.parse_args()
    task = exact(args.dataset)
    assert task.grammar is not None, "both languages are known"
    rows = []
    for seed in args.seeds.split(","):
        for flags in args.flags:
            with tempfile.TemporaryDirectory() as folder:
                more = ["--seed", seed, "--eval_interval", "0", *flags.split()]
                trained = train(Path(folder, "run"), args.dataset, args.steps, more)
                model = load_diffusion(str(trained.weights))
                for calls in map(int, args.calls.split(",")):
                    figures = simple_figures(model.sample(args.samples, steps=calls), task.grammar, task.train)
                    row = {"flags": flags, "seed": int(seed), "seconds": round(trained.seconds), "calls": calls}
                    rows.append(row | figures)
                    print(json.dumps(rows[-1]), flush=True)
                    record(table.CHOICES[args.dataset], {"samples": args.samples, "rows": rows})
    table.write()


if __name__ == "__main__":
    main()
