"""What a student writes in a few calls, beside its teacher and a masked model trained for as long as both.

python benchmarks/distillation.py                                   `simple` and `animals`, each from the start
python benchmarks/distillation.py --corpora animals --steps 10000 --student_steps 3000 --runs FOLDER

Times are the processor's, of the training commands, on one thread; that of a student includes what its teacher wrote.
What was trained in FOLDER is not trained again. The table goes to docs/recipe.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
import torch
from common import machine, record, results, train
from distillation_table import CALLS
from evaluation import Task, exact, write_split
from recipe import OURS, WAYS, ideal, judged, pace

from text_diffusion.generation import load
from text_diffusion.memory import keep_freed_memory


def trained(folder: Path, text: Path, steps: int, flags: Sequence[str]) -> dict[str, Any]:
    """Weights, steps and time of a run in a folder, which is trained unless it is there."""
    about = folder / "trained.json"
    if not about.is_file():
        run = train(folder, str(text), steps, flags)
        about.write_text(json.dumps({"weights": run.weights.name, "steps": steps, "cpu_seconds": run.cpu_seconds}))
    found: dict[str, Any] = json.loads(about.read_text())
    return found | {"weights": folder / found["weights"]}


def measure(task: Task, args: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    """A row for the teacher, the student, and the masked model."""
    write_split(task, runs)
    text, held_out = (runs / f"{task.name}-{part}.txt" for part in ("train", "test"))
    common = ["--val_txt_path", str(held_out), "--seed", str(args.seed), "--eval_interval", "0"]
    found: dict[str, dict[str, Any]] = {}

    def add(writer: str, steps: int, flags: Sequence[str]) -> dict[str, Any]:
        run = trained(runs / f"{task.name}-{writer}-{args.seed}", text, steps, [*common, *flags])
        model = load(str(run["weights"]), device="cpu")
        row = {"writer": writer, "dataset": task.name, "seed": args.seed, **run, "machine": machine()}
        found[writer] = row | {"samplings": judged(model, task, args.samples, CALLS), "samples": args.samples}
        del found[writer]["weights"]
        print(json.dumps(found[writer]), flush=True)
        return run

    teacher = add("teacher", args.steps, OURS.split())
    student = add("student", args.student_steps, ["--teacher", str(teacher["weights"])])
    as_long = (teacher["cpu_seconds"] + student["cpu_seconds"]) / teacher["cpu_seconds"]
    with tempfile.TemporaryDirectory() as scratch:
        steps = round(args.steps * as_long / pace(text, "masked", Path(scratch)))
    add("masked", steps, WAYS["masked"].split())
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="simple,animals", help="names, separated by commas")
    parser.add_argument("--steps", type=int, default=4000, help="of the teacher")
    parser.add_argument("--student_steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=102)
    parser.add_argument("--runs", type=Path, help="a folder to keep the trained models in")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the training command
    keep_freed_memory()
    if args.runs:
        args.runs.mkdir(parents=True, exist_ok=True)
    for task in map(exact, args.corpora.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(task, args, args.runs or Path(scratch))
        part = results().get("distillation", {"rows": [], "ideal": {}})
        others = [row for row in part["rows"] if row["dataset"] != task.name]
        record(
            "distillation",
            {"rows": [*others, *rows], "ideal": part["ideal"] | {task.name: ideal(task, args.samples)}},
        )
    table.write()


if __name__ == "__main__":
    main()
