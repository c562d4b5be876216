"""Runs that are killed with SIGKILL at random moments, and go on by the same command: nothing may be lost or changed.

python benchmarks/faults.py [RUNS=100] [MINUTES=60] [MPIEXEC_RUNS=6]          writes its lines into docs/distributed.md

Of ten runs nine are one process and one is two ranks with --parallel fsdp. All are forked from this process, which has
imported the program but started no thread, so that a hundred of them take minutes. A checkpoint is written after every
second step, in the background, so that many kills come in the middle of a write. Every run is killed until at least one
kill came after its first checkpoint and before its end. Of two ranks both are killed, as when a machine fails, or rank
0 alone, which must end the other; while they still meet that takes minutes, so after five seconds it is killed too.
A few runs more, recorded by themselves, are two ranks under a real `mpiexec -n 2`: all of its processes are killed, or
one rank, and then mpiexec must end by itself.
Compared are all weights, averages, the optimizer and the log, bit for bit, with those of a run of the same kind that
was never killed. After every kill each file that is named as a checkpoint must be readable. Runs that there is no time
for are not begun; those that there was time for are recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # which AdamW loads, a second for each of hundreds of processes
from safetensors.torch import load_file  # noqa: E402

from text_diffusion import train  # noqa: E402

STEPS = 12
KILLS = 3  # of each run, at most by plan; more if none of them came between its first checkpoint and its end
TRIES = 20
EARLY, LATE = "before the first checkpoint", "too late: it had ended"
SIZES = {
    "steps": STEPS, "save_interval": 2, "log_interval": 3, "eval_interval": 6, "keep_last": 3, "batch_size": 16,
    "hidden_size": 64, "num_layers": 2, "num_heads": 2, "in_channel": 16, "num_channels": 16, "diffusion_steps": 50,
    "objective": "diffusion_lm",
    "dropout": 0.1, "ema_rate": "0.9,0.99", "lr": 1e-3, "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A way to start a run, and how many of ten are started so."""

    name: str
    ranks: int
    parallel: str
    of_ten: int
    mpiexec: str = ""  # the program, if that starts the ranks


KINDS = (
    Kind("one process", 1, "ddp", 9),
    Kind("two ranks, fsdp", 2, "fsdp", 1),
)
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
UNDER_MPIEXEC = Kind("two ranks, mpiexec", 2, "ddp", 10, shutil.which("mpiexec", path=PATH) or "")


def arguments(kind: Kind, text: Path, folder: Path) -> list[str]:
    """Of the command."""
    flags = {"dataset": text, "checkpoint_path": folder, "parallel": kind.parallel, **SIZES}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def fork(kind: Kind, text: Path, folder: Path, env: dict[str, str]) -> int:
    """A process that trains into the folder, or an mpiexec whose ranks do; its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.environ.update(env)
        if kind.mpiexec:
            command = [kind.mpiexec, "-n", str(kind.ranks), sys.executable, "-m", "text_diffusion", "train"]
            os.execv(kind.mpiexec, [*command, *arguments(kind, text, folder)])
        torch.set_num_threads(1)
        status = train.main(arguments(kind, text, folder))
    finally:
        os._exit(status)


def start(kind: Kind, text: Path, folder: Path) -> list[int]:
    """Start the ranks of a run, or their mpiexec; the ids."""
    if kind.mpiexec:
        return [fork(kind, text, folder, {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"})]
    if kind.ranks == 1:
        return [fork(kind, text, folder, {})]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": str(kind.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [fork(kind, text, folder, {"RANK": str(i), "LOCAL_RANK": str(i), **meeting}) for i in range(kind.ranks)]


def kill(processes: list[int]) -> None:
    """All of them that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def family(process: int) -> list[int]:
    """It, its children, their children and so on."""
    with contextlib.suppress(OSError):  # it has ended
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [process, *(member for child in children for member in family(int(child)))]
    return [process]


def ended(processes: list[int]) -> list[int]:
    """Wait for them; their exit statuses, negative if a signal ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def killed(kind: Kind, text: Path, folder: Path, seconds: float, rng: random.Random, after_first: bool) -> str:
    """Start, kill after some seconds (from the first checkpoint on, if need be), look at what is left; the moment."""
    processes = start(kind, text, folder)
    deadline = time.monotonic() + 60
    while after_first and not any(folder.glob("opt*.pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(seconds)
    everybody = family(processes[0]) if kind.mpiexec else processes
    one = rng.choice(everybody[2:] or everybody) if kind.mpiexec else everybody[0]  # mpiexec, its helper, the ranks
    kill([one] if rng.random() < 0.5 else everybody)
    deadline = time.monotonic() + (60 if kind.mpiexec else 5)
    statuses: dict[int, int] = {}
    while len(statuses) < len(processes):
        for process in processes:
            if process not in statuses and (reaped := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(reaped[1])
        if time.monotonic() > deadline:
            assert not kind.mpiexec, "mpiexec does not end"
            kill([process for process in processes if process not in statuses])
        time.sleep(0.01)
    if 0 in statuses.values():  # a rank ends so when all have done everything
        return LATE
    log = folder.with_suffix(".log")
    assert "Traceback" not in log.read_text(), log.read_text()
    whole, shards = list(folder.glob("opt*.pt")), list(folder.glob("opt*.shards"))
    for path in folder.glob("*.pt"):  # raises if one is not whole
        torch.load(path, weights_only=True)
    if not whole:
        return EARLY
    if any(folder.glob(".*.pt.*.tmp")):
        return "in the middle of writing a checkpoint's file"
    if len(list(folder.glob("model*.pt"))) > len(whole) or len(shards) > len(whole):
        return "between two files of a checkpoint"
    return "at another moment, after the first checkpoint"


def result(folder: Path) -> dict[str, Any]:
    """All that a complete run leaves, but for timings and the run's identifier."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*{STEPS:06d}.pt")):
        contents = torch.load(path, weights_only=True)
        kept = ("state", "optimizer", "emas", "timestep_sampler", "loss_by_timestep", "step", "tokenizer")
        found[path.name] = {name: contents[name] for name in kept if name in contents}
    for path in sorted(folder.glob(f"opt{STEPS:06d}.shards/*.safetensors")):  # of FSDP: optimizer and averages
        found[path.name] = load_file(path)
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


def survives(
    kind: Kind, text: Path, folder: Path, seconds: float, rng: random.Random, expected: Any
) -> tuple[bool, list[str]]:
    """Kill a run as often as chance will have it, and until one kill has cost something; then let it end."""
    moments: list[str] = []
    wanted = rng.randint(1, KILLS)
    for attempt in range(TRIES):
        if attempt >= wanted and set(moments) - {EARLY, LATE}:
            break
        if moments[-1:] == [LATE]:  # complete: it could not be killed any more
            shutil.rmtree(folder)
            moments.clear()
            seconds /= 2
        wait = rng.uniform(0, seconds if attempt < wanted else seconds / 8)
        moments.append(killed(kind, text, folder, wait, rng, attempt >= wanted))
    effective = bool(set(moments) - {EARLY, LATE})
    statuses = ended(start(kind, text, folder))
    equal = effective and not any(statuses) and same(result(folder), expected)
    if not equal:
        print(
            f"{folder.name}: {kind.name}, {moments}, {statuses}; {folder.with_suffix('.log').read_text()}", flush=True
        )
    return equal, moments


def run(runs: int, seed: int = 0, kinds: Sequence[Kind] = KINDS, minutes: float = 60) -> dict[str, Any]:
    """Kill and resume; the figures."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    plan = [kind for kind in kinds for _ in range(kind.of_ten)]
    rng.shuffle(plan)
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        words = ("red", "blue", "old", "new"), ("apple", "fig", "pear", "egg"), ("ripe", "cold", "sweet", "hot")
        text.write_text("".join(f"The {a} {b} is {c}.\n" for a, b, c in product(*words)))
        wholes: dict[Kind, tuple[float, Any]] = {}
        for kind in kinds:
            folder = Path(scratch, f"whole{len(wholes)}")
            started = time.perf_counter()
            assert not any(ended(start(kind, text, folder))), folder.with_suffix(".log").read_text()
            wholes[kind] = time.perf_counter() - started, result(folder)
        for i in range(runs):
            if time.monotonic() > deadline:
                break
            kind, folder = plan[i % len(plan)], Path(scratch, f"run{i}")
            equal, moments = survives(kind, text, folder, wholes[kind][0], rng, wholes[kind][1])
            rows.append({"kind": kind.name, "equal": equal, "kills": moments})
            print(f"{i + 1} of {runs}: {'equal' if equal else 'NOT EQUAL'}, {kind.name}, {moments}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "planned": runs,
        "runs": len(rows),
        "equal": sum(row["equal"] for row in rows),
        "steps": STEPS,
        "rows": rows,
    }


def main() -> None:
    """Measure, keep, write."""
    import table
    from common import record

    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "src", "benchmarks/faults.py"])
    if changed.returncode:
        raise SystemExit(
            "error: expected a clean commit, to which the figures belong, found changes; commit them first"
        )
    runs, minutes, mpiexec_runs = [*map(int, sys.argv[1:]), *(100, 60, 6)[len(sys.argv) - 1 :]]
    if mpiexec_runs and not UNDER_MPIEXEC.mpiexec:
        raise SystemExit("error: expected mpiexec, found none; pip install mpich mpi4py, or give 0 as MPIEXEC_RUNS")
    started = time.monotonic()
    if mpiexec_runs:
        record("faults_mpiexec", run(mpiexec_runs, kinds=[UNDER_MPIEXEC], minutes=minutes / 4))
    record("faults", run(runs, minutes=minutes - (time.monotonic() - started) / 60))
    table.write()


if __name__ == "__main__":
    main()
