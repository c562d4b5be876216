"""What a student writes in a few calls, beside its teacher and models of other objectives trained for as long as both.

python benchmarks/distillation.py                                   `simple` and `animals`, each from the start
python benchmarks/distillation.py --corpora animals --steps 10000 --student_steps 3000 --runs FOLDER

Times are the processor's, of the training commands, on one thread; a student's includes what its teacher computed.
What was trained in FOLDER is not trained again. The table goes to docs/recipe.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
import torch
from common import machine, record, results, train
from distillation_table import CALLS
from evaluation import Task, write_split
from recipe import OURS, WAYS, ideal, judged, pace, task_of

from text_diffusion.generation import load
from text_diffusion.memory import keep_freed_memory

OTHERS = ("masked", "diffusion_lm")
WRITERS = ("teacher", "student", *OTHERS)
KEY = ("dataset", "writer", "seed")


def trained(folder: Path, text: Path, flags: Sequence[str], steps: int | Callable[[], int]) -> dict[str, Any]:
    """Weights, steps and time of a run in a folder, which is trained unless it is there.

    Steps that have to be measured are not measured again: they would be others each time.
    """
    about = folder / "trained.json"
    how: dict[str, Any] = {"flags": list(flags)} | ({} if callable(steps) else {"steps": steps})
    if not about.is_file():
        number = steps() if callable(steps) else steps
        run = train(folder, str(text), number, flags)
        kept = {"steps": number, "weights": run.weights.name, "cpu_seconds": run.cpu_seconds}
        about.write_text(json.dumps(how | kept))
    found: dict[str, Any] = json.loads(about.read_text())
    if {name: found.get(name) for name in how} != how:
        raise SystemExit(f"{folder}: expected a run of {how}, found another; give --runs another folder")
    return found | {"weights": folder / found["weights"]}


def measure(task: Task, seed: int, args: argparse.Namespace, runs: Path) -> None:
    """Record a row for the teacher, the student, and models of other objectives, as far as they are asked for."""
    write_split(task, runs)
    text, held_out = (runs / f"{task.name}-{part}.txt" for part in ("train", "test"))
    common = ["--val_txt_path", str(held_out), "--seed", str(seed), "--eval_interval", "0"]

    def run_of(writer: str, steps: int | Callable[[], int], flags: Sequence[str]) -> dict[str, Any]:
        return trained(runs / f"{task.name}-{writer}-{seed}", text, [*common, *flags], steps)

    def as_long(other: str) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            both: float = (teacher["cpu_seconds"] + student["cpu_seconds"]) / teacher["cpu_seconds"]
            steps: int = args.steps
            return round(steps * both / pace(text, other, Path(scratch)))

    def add(writer: str, run: dict[str, Any]) -> None:
        if writer not in args.writers.split(","):
            return
        model = load(str(run["weights"]), device="cpu")
        row = {"writer": writer, "dataset": task.name, "seed": seed, "steps": run["steps"], "samples": args.samples}
        row |= {"cpu_seconds": run["cpu_seconds"], "machine": machine()}
        keep(row | {"samplings": judged(model, task, args.samples, CALLS)}, ideal(task, args.samples))

    teacher = run_of("teacher", args.steps, OURS.split())
    add("teacher", teacher)
    taught = ["--teacher", str(teacher["weights"]), *(["--pairs", str(args.pairs)] if args.pairs else [])]
    student = run_of("student", args.student_steps, taught)
    add("student", student)
    for other in [name for name in args.writers.split(",") if name in OTHERS]:
        add(other, run_of(other, partial(as_long, other), WAYS[other].split()))


def keep(row: dict[str, Any], best: dict[str, float]) -> None:
    """Record a row instead of the one that was there."""
    print(json.dumps(row), flush=True)
    part = results().get("distillation", {"rows": [], "ideal": {}})
    rows = [old for old in part["rows"] if any(old[name] != row[name] for name in KEY)]
    rows = sorted([*rows, row], key=lambda row: (row["dataset"], WRITERS.index(row["writer"]), row["seed"]))
    record("distillation", {"rows": rows, "ideal": part["ideal"] | {row["dataset"]: best}})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="simple,animals", help="names or paths, separated by commas")
    parser.add_argument("--steps", type=int, default=4000, help="of the teacher")
    parser.add_argument("--student_steps", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=0, help="that it learns from; 0: as many as by default")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seeds", default="102,103,104")
    parser.add_argument(
        "--writers", default="teacher,student,masked", help="whose samples to judge, separated by commas"
    )
    parser.add_argument("--runs", type=Path, help="a folder to keep the trained models in")
    args = parser.parse_args(argv)
    if unknown := set(args.writers.split(",")) - set(WRITERS):
        parser.error(f"--writers must be of {', '.join(WRITERS)}, found {', '.join(unknown)}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the training command
    keep_freed_memory()
    if args.runs:
        args.runs.mkdir(parents=True, exist_ok=True)
    for task in map(task_of, args.corpora.split(",")):
        for seed in map(int, args.seeds.split(",")):
            with tempfile.TemporaryDirectory() as scratch:
                measure(task, seed, args, args.runs or Path(scratch))
    table.write()


if __name__ == "__main__":
    main()
