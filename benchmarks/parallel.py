"""What several ranks cost and save on this machine, and what a checkpoint costs.

python benchmarks/parallel.py          writes the tables of docs/distributed.md; a few minutes

Each measurement is a process (or two ranks) of its own, started by torchrun; this file is also their program.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from text_diffusion.config import SIZES  # noqa: E402
from text_diffusion.distributed import Ranks, joined  # noqa: E402
from text_diffusion.parallel import local, parallelised, whole  # noqa: E402
from text_diffusion.run import prepare  # noqa: E402
from text_diffusion.saver import Saver  # noqa: E402
from text_diffusion.step import train_step  # noqa: E402

TEXT = str(ROOT / "data" / "simple-test.txt")


def run(name: str, ranks: Ranks, folder: Path, **given: Any) -> dict[str, Any]:
    """Train some steps and measure; the time is what a tenth of them stay below, as others use the machine."""
    steps = given.pop("measured")
    given = {"dataset": TEXT, "checkpoint_path": str(folder / name), "device": "cpu", "eval_interval": 0, **given}
    given |= {"objective": "diffusion_lm"}
    run, state = prepare(given, ranks)
    loss = parallelised(state.loss, run.config.parallel, ranks)
    train_step(run, state, loss)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        train_step(run, state, loss)
        seconds.append(time.perf_counter() - started)
    middle = 1000 * sorted(seconds)[len(seconds) // 2]
    parameters = list(state.model.parameters())
    moments = [value for p in parameters for value in state.optimizer.state[p].values()]
    averages = [p for ema in state.emas for p in ema.model.parameters()]
    weights = torch.cat([tensor.detach().flatten() for tensor in whole(parameters)])
    if ranks.first:
        torch.save(weights, folder / f"{name}.pt")
    held = sum(local(x).numel() * x.element_size() for x in (*parameters, *moments, *averages))
    return {
        "name": name, "ranks": ranks.size, "batch": run.config.batch_size, "ms": middle,
        "held_mb": held / 2**20, "parameters": weights.numel(),
    }  # fmt: skip


def checkpoint(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """How long training stands still for a checkpoint of `base`, written at once or in the background."""
    given = {
        "dataset": TEXT,
        "checkpoint_path": str(folder / "base"),
        "device": "cpu",
        "batch_size": 2,
        "objective": "diffusion_lm",
        **SIZES["base"],
    }
    run, state = prepare(given, ranks)
    train_step(run, state, state.loss)
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    total = []
    for _ in range(3):
        for how, seconds in stalls.items():
            saver = Saver(run.folder, ranks, 1, how == "async")
            started = time.perf_counter()
            saver.save(run.snapshot(state, {}))
            seconds.append(time.perf_counter() - started)
            saver.finish()
            total += [time.perf_counter() - started] if how == "async" else []
            saver.close()
    size = sum(path.stat().st_size for path in run.folder.glob("*.pt"))
    parameters = sum(p.numel() for p in state.model.parameters())
    middle = {how: sorted(seconds)[1] for how, seconds in stalls.items()}
    return {
        "parameters": parameters,
        "sync_s": middle["sync"],
        "async_s": middle["async"],
        "until_written_s": sorted(total)[1],
        "mb": size / 2**20,
    }


def worker(what: str, folder: Path) -> None:
    """One rank of one measurement; rank 0 prints the figures."""
    small = {"measured": 50, "batch_size": 32}
    with joined() as ranks:
        torch.set_num_threads(1)
        if what == "weak":
            found = run(f"weak{ranks.size}", ranks, folder, **{"measured": 10, "batch_size": 128 * ranks.size})
        elif what == "checkpoint":
            found = checkpoint(ranks, folder)
        else:
            found = run(f"{what}{ranks.size}", ranks, folder, **small, parallel=what)
        if ranks.first:
            print("figures", json.dumps(found))


def measured(what: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Start the ranks and read what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    result = subprocess.run([*command, what, str(folder)], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("figures ")]
    if not lines:
        raise SystemExit(result.stderr)
    found: dict[str, Any] = json.loads(lines[0].removeprefix("figures "))
    print(what, ranks, found, flush=True)
    return found


def main() -> None:
    """Measure everything, keep, write."""
    import table
    from common import record

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [
            measured(what, n, folder) for what, n in (("weak", 1), ("weak", 2), ("ddp", 1), ("ddp", 2), ("fsdp", 2))
        ]
        rows.append(measured("fsdp", 4, folder))
        ddp, fsdp = (torch.load(folder / f"{name}2.pt", weights_only=True) for name in ("ddp", "fsdp"))
        difference = float((ddp - fsdp).norm() / ddp.norm())
        saving = measured("checkpoint", 1, folder)
    record("parallel", {"rows": rows, "difference": difference, "checkpoint": saving})
    table.write()


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else main()
