"""The ladder of recipe.py on a GPU: all ways at once, each in a process of its own, for the same time.

python benchmarks/recipe_gpu.py FILE[,FOLDER] --out OUT [--minutes 3] [--tokenizer VOCAB]    trains, on the GPU
python benchmarks/recipe_gpu.py --judge OUT                        figures of the samples in OUT, on any machine

FILE is a text, a sentence a line, whose last 2,000 lines are held out, on which every way is trained; FOLDER has E2E's
CSV files, on which the four objectives are. Small networks leave most of a GPU idle, so that the processes share it: in
a first part each counts the steps that it makes beside the others, and then makes as many as that gives in --minutes.
OUT then has a folder for each text, in it the text's two parts and, for each way, a JSON file with its bound and a text
of samples for each number of network calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
import torch
from common import ROOT, commit, fingerprint
from evaluation import Task, restaurants, write_split
from recipe import CODE, OF_TEXT, WAYS, ideal, keep
from recipe_table import CALLS

from text_diffusion import figures
from text_diffusion import train as training
from text_diffusion.autoregressive import Autoregressive
from text_diffusion.config import LikelihoodConfig
from text_diffusion.files import read_lines
from text_diffusion.generation import TextDiffusion, load
from text_diffusion.likelihood import figures_of, read_text
from text_diffusion.run import new_state, prepare
from text_diffusion.step import train_step

HELD_OUT = 2000  # lines
BESIDE = 17  # processes, at most
COUNTING = 8.0  # seconds of the first part
LONG = 600  # seconds to wait for the others, beside the time of training


def task_of(path: Path) -> Task:
    """E2E's folder, or a text with its last lines held out."""
    if path.is_dir():
        return restaurants(path)
    lines = read_lines(path)
    return Task(path.stem, lines[:-HELD_OUT], lines[-HELD_OUT:])


def process(folder: Path, name: str, way: str, barrier: Any, args: argparse.Namespace) -> None:
    """What runs in one: the others do not wait for it if it fails."""
    try:
        trained(folder, name, way, barrier, args)
    except BaseException:
        barrier.abort()
        raise


def trained(folder: Path, name: str, way: str, barrier: Any, args: argparse.Namespace) -> None:
    """Prepare, count, train, and write down what the model can do."""
    torch.set_num_threads(1)
    text, held_out = (folder / f"{name}-{part}.txt" for part in ("train", "test"))
    flags = ["--dataset", str(text), "--val_txt_path", str(held_out), "--device", args.device, "--eval_interval", "0"]
    flags += ["--checkpoint_path", str(folder / f"run {way}"), "--save_interval", "1000000", "--steps", "1000000"]
    flags += ["--tokenizer", args.tokenizer] if args.tokenizer and name != "e2e" else []
    run, state = prepare(training.parse([*flags, *WAYS[way].split()]))
    for _ in range(3):
        train_step(run, state, state.loss)
    meet(barrier, args)  # all have read their text
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < COUNTING:
        for _ in range(5):
            train_step(run, state, state.loss)
        wait(args.device)
        steps += 5
    rate = steps / (time.perf_counter() - started)
    run = replace(run, config=replace(run.config, steps=max(10, round(rate * args.minutes * 60))))
    state = new_state(run)
    meet(barrier, args)
    started = time.perf_counter()
    training.train(run, state)
    wait(args.device)
    row: dict[str, Any] = {"way": way, "dataset": name, "seed": run.config.seed, "steps": run.config.steps}
    row["seconds"] = time.perf_counter() - started
    row["parameters"] = sum(parameter.numel() for parameter in state.model.parameters())
    with contextlib.suppress(BrokenBarrierError):  # what is trained is trained, should another have failed
        meet(barrier, args)  # nobody is slowed down by what the others do next
    model = load(next(run.folder.glob("ema_*.pt")), device=args.device)
    lines = read_text(held_out, model.tokenizer, model.sequence_len, args.lines)
    config = LikelihoodConfig(steps=args.walk) if isinstance(model, TextDiffusion) else LikelihoodConfig(paths=64)
    found = figures_of(model, lines, config).lines
    bits = found["exact" if "exact" in found else "bound"]
    row |= {"bound": float(bits.mean()), "per_token": float(bits.sum()) / lines.tokens, "samplings": []}
    row["machine"] = f"one {device_name(args.device)}, {barrier.parties - 1} runs at once, PyTorch {torch.__version__}"
    row |= {"samples": args.samples, "lines": args.lines, "walk": args.walk, "commit": commit()}
    row["code"] = fingerprint(ROOT / f"src/text_diffusion/{part}.py" for part in CODE)
    for calls in (model.sequence_len - 1,) if isinstance(model, Autoregressive) else CALLS:
        (folder / f"{way}.json").write_text(json.dumps(row, indent=1) + "\n")  # what there is, should time run out
        begun = time.perf_counter()
        if isinstance(model, Autoregressive):
            sentences = model.sample(args.samples)
        else:
            sentences = model.sample(args.samples, steps=calls)
        row["samplings"].append({"calls": calls, "sentences_per_s": args.samples / (time.perf_counter() - begun)})
        (folder / f"{way} {calls}.txt").write_text("".join(f"{line}\n" for line in sentences), encoding="utf-8")
    (folder / f"{way}.json").write_text(json.dumps(row, indent=1) + "\n")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Of the first GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def together(args: argparse.Namespace) -> None:
    """Start a process for each text and way, and see them through."""
    context = multiprocessing.get_context("spawn")
    tasks = [task_of(Path(path)) for path in args.texts.split(",")]
    ways = args.ways.split(",")
    jobs = [(task.name, way) for task in tasks for way in ways if task.name != "e2e" or " " not in way]
    if len(jobs) > BESIDE:
        raise SystemExit(f"expected at most {BESIDE} runs at once, found {len(jobs)}: leave out a text or some --ways")
    for task in tasks:
        (args.out / task.name).mkdir(parents=True)
        write_split(task, args.out / task.name)
    barrier = context.Barrier(len(jobs) + 1)
    processes = [
        context.Process(target=process, args=(args.out / name, name, way, barrier, args)) for name, way in jobs
    ]
    for one in processes:
        one.start()
    try:
        for what in ("counting the steps of each", f"training for {args.minutes:g} minutes", "samples and bounds"):
            meet(barrier, args)
            print(what, file=sys.stderr, flush=True)
    except BrokenBarrierError:
        print("one of them failed, see above", file=sys.stderr)
    for one in processes:
        one.join()
    raise SystemExit(any(one.exitcode for one in processes))


def meet(barrier: Any, args: argparse.Namespace) -> None:
    """Where all are ready for the next part."""
    barrier.wait(LONG + 60 * args.minutes)


def judge(out: Path) -> None:
    """The rows of docs/recipe.md, from what `together` left in a folder."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        name = folder.name
        task = Task(name, read_lines(folder / f"{name}-train.txt"), read_lines(folder / f"{name}-test.txt"))
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=place)]
        budget = next((row["steps"] for row in rows if row["way"] == "cross_entropy"), 0)
        if not budget:
            print(f"{folder}: expected a run of cross_entropy, found none, so it is left out", file=sys.stderr)
            continue
        best = ideal(task, rows[0]["samples"])
        for row in rows:
            for sampling in row["samplings"]:
                lines = read_lines(folder / f"{row['way']} {sampling['calls']}.txt")
                found = figures.evaluate(lines, task.test, train=task.train).rows
                sampling |= {one.figure.key: one.samples.value for one in found if one.figure.key in OF_TEXT}
            row |= {"dataset": f"{name} on a GPU", "budget": budget, "pace": budget / row["steps"]}
            print(json.dumps(row), flush=True)
            keep(row, best)
    table.write()


def place(path: Path) -> int:
    """Rows stand in the order of the ways."""
    return list(WAYS).index(path.stem)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=3, help="of training, of all at once")
    parser.add_argument("--ways", default=",".join(WAYS), help="names, separated by commas")
    parser.add_argument("--tokenizer", default="", help="vocabulary of FILE; word-level without a limit if not given")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=200, help="held-out lines for the bound")
    parser.add_argument("--walk", type=int, default=250, help="steps of the walk that the bound is taken over")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--judge", type=Path)
    args = parser.parse_args(argv)
    for path in [*map(Path, filter(None, args.texts.split(","))), *([args.judge] if args.judge else [])]:
        if not path.exists():
            parser.error(f"expected a text or a folder, found nothing at {path}")
    if unknown := set(args.ways.split(",")) - set(WAYS):
        parser.error(f"--ways must be of {', '.join(WAYS)}, found {', '.join(unknown)}")
    if args.out and args.out.exists() and not args.judge:
        parser.error(f"--out must be a new folder, found {args.out}; name another, or remove it")
    if args.judge:
        judge(args.judge)
    elif not (args.texts and args.out):
        parser.error("expected FILE and --out, or --judge")
    else:
        together(args)


if __name__ == "__main__":
    main()
