"""Time and memory of training settings: a few steps of the real command each.

python benchmarks/settings.py          writes the table in docs/troubleshooting.md
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
from common import record, train

# size, batch, length, flags, steps to run
SETTINGS = (
    ("small", 32, 8, "", 300),
    ("small", 128, 8, "", 300),
    ("small", 512, 8, "", 100),
    ("small", 128, 64, "", 60),
    ("small", 128, 8, "--self_condition False", 300),
    ("small", 128, 64, "--hidden_size 256 --num_layers 6", 20),
    ("base", 32, 8, "", 12),
    ("base", 32, 64, "", 3),
    ("base", 32, 64, "--gradient_checkpointing", 3),
    ("base", 128, 64, "--microbatch 32", 3),
)


def main() -> None:
    """Measure each setting; the table is written again after each."""
    done = []
    for size, batch, length, flags, steps in SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            more = f"--size {size} --batch_size {batch} --sequence_len {length} {flags} --eval_interval 0"
            more += " --objective diffusion_lm --optimizer adamw"
            log = ["--log_interval", str(max(steps // 3, 1)), "--save_interval", "100000"]
            trained = train(Path(scratch, "run"), "simple", steps, [*more.split(), *log])
            rows = [json.loads(line) for line in (trained.weights.parent / "metrics.jsonl").read_text().splitlines()]
        speed = max(row["sentences_per_s"] for row in rows)  # the first row pays for warming up
        row = {"size": size, "batch": batch, "length": length, "flags": flags}
        done.append(row | {"sentences_per_s": speed, "peak_mb": trained.peak_mb})
        print(done[-1], flush=True)
        record("settings", {"rows": done})
        table.write()


if __name__ == "__main__":
    main()
