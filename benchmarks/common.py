"""What the benchmarks share: where things are, the machine, training by the real command, figures kept in one file."""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from text_diffusion.generation import load_diffusion
from text_diffusion.memory import in_batches, keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"


@dataclass(frozen=True)
class Trained:
    """A finished training run: weights file, seconds in the loop, in all and of the processor, peak memory in MB."""

    weights: Path
    steps: int
    seconds: float
    wall_seconds: float
    cpu_seconds: float
    peak_mb: float


def train(folder: Path, dataset: str, steps: int | None = None, flags: Sequence[str] = ()) -> Trained:
    """Train by the command of the README into an empty folder."""
    command = ["bash", str(ROOT / "scripts/run_train.sh"), dataset, "all", "False", "False", "False", str(steps or "")]
    started = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--checkpoint_path", str(folder), *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"training failed, see {log.name}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max((row for row in rows if "seconds" in row), key=lambda row: row["step"])
    weights = next(folder.glob(f"ema_*_{last['step']:06d}.pt"))
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cpu = usage.ru_utime + usage.ru_stime
    return Trained(weights, last["step"], last["seconds"], time.perf_counter() - started, cpu, peak)


def sample(weights: Path, n: int, **how: Any) -> list[str]:
    """Sentences 0..n-1 of a diffusion model, each core its share: n processes of one thread beat one of n threads."""
    cores = torch.get_num_threads()
    shares = [(weights, i * n // cores, (i + 1) * n // cores, how) for i in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return [sentence for part in pool.starmap(_share, shares) for sentence in part]


def _share(weights: Path, first: int, last: int, how: dict[str, Any]) -> list[str]:
    torch.set_num_threads(1)
    keep_freed_memory()
    model = load_diffusion(str(weights))

    def make(start: int, stop: int) -> list[str]:
        step = deque(model.denoising(start, stop, **how), maxlen=1).pop()
        return model.decode(step.pred_xstart)

    return in_batches(last, model.choose_batch_size(last - first), make, first)


def environment() -> dict[str, str]:
    """This process's environment, with its interpreter first, so that the scripts use the same one."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}


def machine() -> str:
    """Processor, cores, versions, date and commit, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{torch.get_num_threads()} core(s) of {cpu}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{today}, commit {commit()}"
    )


def commit() -> str:
    """The commit that is measured, `-dirty` if code or data differ from it; figures and documents may."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = ["src", "scripts", "data", "ckpts", "benchmarks", ":!benchmarks/results.json"]
    same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True).returncode == 0
    return (found or "unknown") + ("" if same else "-dirty")


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes with the contents of these files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def percent(value: float) -> str:
    """A share as a percentage with two places."""
    return f"{100 * value:.2f} %"


def line(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def record(name: str, figures: dict[str, Any]) -> None:
    """Keep the figures of a part under its name, with the machine they were measured on."""
    text = json.dumps(results() | {name: {"machine": machine(), **figures}}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n")


def results() -> dict[str, Any]:
    """All figures that are kept, by part."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return kept
