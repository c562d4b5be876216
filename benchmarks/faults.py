"""Runs that are killed with SIGKILL at random moments, and go on by the same command: nothing may be lost or changed.

python benchmarks/faults.py [RUNS=100]          writes its line into docs/distributed.md

Each run is a process of its own, forked from this one, which has imported the program but started no thread, so that a
hundred of them take a minute or two. A checkpoint is written after every second step, in the background, so that many
kills come in the middle of a write. Compared are all weights, averages, the optimizer and the log, bit for bit, with
those of a run that was never killed. After every kill each file that is named as a checkpoint must be readable.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from text_diffusion import train  # noqa: E402

STEPS = 24
KILLS = 3  # of each run, at most, before it may end
SIZES = {
    "steps": STEPS, "save_interval": 2, "log_interval": 3, "eval_interval": 8, "keep_last": 3, "batch_size": 16,
    "hidden_size": 64, "num_layers": 2, "num_heads": 2, "in_channel": 16, "num_channels": 16, "diffusion_steps": 50,
    "dropout": 0.1, "ema_rate": "0.9,0.99", "lr": 1e-3, "device": "cpu",
}  # fmt: skip


def start(text: Path, folder: Path) -> int:
    """Fork a process that trains into the folder; its id."""
    process = os.fork()
    if process:
        return process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    status = 1
    try:
        torch.set_num_threads(1)
        flags = {"dataset": text, "checkpoint_path": folder, **SIZES}
        status = train.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    finally:
        os._exit(status)


def ended(process: int) -> int:
    """Wait for it; its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(text: Path, folder: Path, seconds: float, kills: Counter[str]) -> None:
    """Start, kill after some seconds unless it has ended, and look at what is left."""
    process = start(text, folder)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    status = ended(process)
    if status == 0:
        kills["too late: it had ended"] += 1
        return
    assert status == -signal.SIGKILL, f"ended by itself with {status}: {folder.with_suffix('.log').read_text()}"
    if any(folder.glob(".*.pt.*.tmp")):
        kills["in the middle of writing a checkpoint's file"] += 1
    elif len(list(folder.glob("model*.pt"))) > len(list(folder.glob("opt*.pt"))):
        kills["between two files of a checkpoint"] += 1
    elif any(folder.glob("opt*.pt")):
        kills["at another moment, after the first checkpoint"] += 1
    else:
        kills["before the first checkpoint"] += 1
    for path in folder.glob("*.pt"):  # raises if one is not whole
        torch.load(path, weights_only=True)


def result(folder: Path) -> dict[str, Any]:
    """All that a complete run leaves, but for timings and the run's identifier."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*{STEPS:06d}.pt")):
        contents = torch.load(path, weights_only=True)
        kept = ("state", "optimizer", "emas", "timestep_sampler", "loss_by_timestep", "step", "tokenizer")
        found[path.name] = {name: contents[name] for name in kept if name in contents}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in row.items() if k not in ("seconds", "sentences_per_s")} for row in rows]
    return found


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def run(runs: int, seed: int = 0) -> dict[str, Any]:
    """Kill and resume; the figures."""
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    equal = 0
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        words = ("red", "blue", "old", "new"), ("apple", "fig", "pear", "egg"), ("ripe", "cold", "sweet", "hot")
        text.write_text("".join(f"The {a} {b} is {c}.\n" for a, b, c in product(*words)))
        started = time.perf_counter()
        assert ended(start(text, Path(scratch, "whole"))) == 0, Path(scratch, "whole.log").read_text()
        seconds = time.perf_counter() - started
        expected = result(Path(scratch, "whole"))
        for i in range(runs):
            folder = Path(scratch, f"run{i}")
            for _ in range(rng.randint(1, KILLS)):
                killed(text, folder, rng.uniform(0, seconds), kills)
            status = ended(start(text, folder))
            found = result(folder) if status == 0 else None
            if same(found, expected):
                equal += 1
            else:
                print(f"run {i}: status {status}, not the same; {folder.with_suffix('.log').read_text()}")
            shutil.rmtree(folder)
    return {"runs": runs, "equal": equal, "kills": dict(kills), "steps": STEPS}


def main() -> None:
    """Measure, keep, write."""
    import table
    from common import record

    figures = run(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    print(figures)
    record("faults", figures)
    table.write()


if __name__ == "__main__":
    main()
