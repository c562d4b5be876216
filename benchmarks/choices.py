"""Which defaults pay: trains `simple` several ways, equally long, and compares the samples with the exact language.

    python benchmarks/choices.py --seconds 180 --seeds 102,103 --out choices.json "" "--norm post" "--self_condition False"

Each argument is a set of flags for the training command ("" is the default). The runs take the same training time;
the learning-rate schedule of each ends with it, since a short run measures its speed first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from text_diffusion import load  # noqa: E402
from text_diffusion.grammar import Grammar  # noqa: E402


def train(flags: list[str], steps: int, seed: int, folder: Path) -> float:
    """Train `simple` with the default command plus flags; returns the seconds of training."""
    command = [sys.executable, "-m", "text_diffusion.train", "--steps", str(steps), "--seed", str(seed)]
    command += ["--checkpoint_path", str(folder), "--eval_interval", "0", "--log_interval", str(max(steps // 20, 1))]
    command += ["--save_interval", str(steps), *flags]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": str(ROOT / "src")} | dict(__import__("os").environ))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["seconds"])


def quality(sentences: list[str], grammar: Grammar, train_lines: list[str]) -> dict[str, float]:
    """Shares of valid, unique and novel sentences, and the sum over slots of KL(true || sampled) in bits."""
    seen = set(train_lines)
    return {
        "valid": sum(grammar.parse(s) is not None for s in sentences) / len(sentences),
        "unique": len(set(sentences)) / len(sentences),
        "novel": sum(s not in seen for s in sentences) / len(sentences),
        "kl_bits": grammar.slot_kl_bits(sentences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="+")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seeds", default="102")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--calls", default="8,20,200")
    parser.add_argument("--fixed_steps", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    grammar = Grammar.load(ROOT / "data/simple/grammar.json")
    train_lines = (ROOT / "data/simple-train.txt").read_text().splitlines()
    results: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        for flags in args.flags:
            with tempfile.TemporaryDirectory() as scratch:
                steps = args.fixed_steps or int(args.seconds * 300 / train(flags.split(), 300, seed, Path(scratch, "a")))
                seconds = train(flags.split(), steps, seed, Path(scratch, "b"))
                for weights in ("ema_0.9999_", "model"):
                    model = load(str(Path(scratch, "b", f"{weights}{steps:06d}.pt")))
                    for calls in map(int, args.calls.split(",")) if weights != "model" else [20]:
                        n = args.samples if calls < 100 else min(args.samples, 2000)
                        row = {"flags": flags, "seed": seed, "steps": steps, "seconds": round(seconds), "weights": weights, "calls": calls}
                        row |= quality(model.sample(n, steps=calls), grammar, train_lines)
                        print(json.dumps(row), flush=True)
                        results.append(row)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(__import__("os").environ.get("OMP_NUM_THREADS", "2")))
    main()
