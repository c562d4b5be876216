"""What each ingredient of `cross_entropy` buys, beside other objectives and layers, all trained for equally long.

python benchmarks/recipe.py                          every way, on `simple` and `animals`, 3 seeds
python benchmarks/recipe.py --corpora animals,FILE --ways "cross_entropy,masked" --seeds 102
python benchmarks/recipe.py --merge RESULTS          take the rows of the results.json of another checkout

A corpus is `simple` or `animals`, known exactly, a text file, one sentence a line, or the folder of E2E's CSV files
(see e2e.py). Equally long: as many steps as take the time of --steps steps of `cross_entropy`, by the ratio of a step
of each, measured in turn on one thread. results.json has a row for each corpus, seed and way, which is written as soon
as it is there; what is there already, of the same CODE, is not measured again. So it can be done in pieces, over days.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import table
import torch
from common import ROOT, fingerprint, machine, record, results, train
from evaluation import Task, exact, restaurants, write_split
from quality import simple_figures
from recipe_table import MOST_OF_TEXT
from speed import alternately, ratio

from text_diffusion import figures
from text_diffusion import train as training
from text_diffusion.autoregressive import Autoregressive
from text_diffusion.config import LikelihoodConfig
from text_diffusion.corpus import split
from text_diffusion.cross_entropy import WordDenoiser, cross_entropy_loss
from text_diffusion.embedding_health import effective_rank, smallest_angle
from text_diffusion.files import read_lines
from text_diffusion.generation import TextDiffusion, Writer, load
from text_diffusion.likelihood import figures_of, read_text
from text_diffusion.losses import Noise
from text_diffusion.memory import keep_freed_memory
from text_diffusion.run import prepare
from text_diffusion.step import train_step

REFERENCE = "cross_entropy"
OURS = f"--objective {REFERENCE}"
WAYS = {
    "diffusion_lm": "--objective diffusion_lm",
    REFERENCE: OURS,
    "masked": "--objective masked",
    "autoregressive": "--objective autoregressive",
    "with modern layers": f"{OURS} --denoiser modern",
    "without denoised input": f"{OURS} --denoised_input False",
    "output scale 1": f"{OURS} --output_scale 1",
    "D = 32": f"{OURS} --in_channel 32",
    "without neighbours": f"{OURS} --neighbours 0",
    "without shared evidence": f"{OURS} --shared_evidence False",
    "without known words": f"{OURS} --known_words False",
    "without the output prior": f"{OURS} --output_prior False",
    "without self-conditioning": f"{OURS} --self_condition False",
    "t uniform in log-SNR": f"{OURS} --schedule_sampler uniform",
    "t not stratified": f"{OURS} --stratified False",
}
CALLS = (2, 4, 8, 16, 32)
OF_TEXT = ("js_3", "mauve", "unique", "novel")  # figures of samples of a language that is not known
CODE = (  # a row is as good as new until one of these changes
    *("modeling", "modern", "losses", "cross_entropy", "chunked", "masked", "autoregressive", "objectives", "step"),
    *("gaussian_diffusion", "schedules", "timesteps", "spacing", "fitted_time", "loss_by_timestep"),
    *("samplers", "sampling", "ema", "condition"),
    *("muon", "shared_evidence", "neighbours", "bound", "likelihood"),
)
KEY = ("way", "dataset", "seed")


def task_of(name: str) -> Task:
    """A corpus by its name, or by its path."""
    if name in ("simple", "animals"):
        return exact(name)
    path = Path(name)
    if path.is_dir():
        return restaurants(path)
    return Task(path.stem, *split(read_lines(path)))


def stepper(text: Path, flags: Sequence[str], folder: Path) -> Callable[[], object]:
    """A step of the program's training each time it is called."""
    run, state = prepare(training.parse(["--dataset", str(text), "--checkpoint_path", str(folder), *flags]))
    if run.lock:
        run.lock.release()
    return lambda: train_step(run, state, state.loss)


def pace(text: Path, way: str, scratch: Path) -> float:
    """How many times a step of a way takes as long as one of the reference."""
    if way == REFERENCE:
        return 1.0
    both = {name: stepper(text, WAYS[name].split(), scratch / f"pace {name}") for name in (REFERENCE, way)}
    return ratio(alternately(both, rounds=15, repeat=4), slow=way, fast=REFERENCE)["ratio"]


def bits(model: Writer, task: Task, text_file: Path, lines: int) -> dict[str, float]:
    """Of the first held-out lines, bits a sentence and a token: exact, or the bound; and the truth, if it is known.

    The walk of a diffusion model has 1,000 steps, of a text whose language is not known 250, and each sentence of
    `masked` is hidden 64 times.
    """
    text = read_text(text_file, model.tokenizer, model.sequence_len, lines)
    steps = 1000 if task.grammar else 250
    config = LikelihoodConfig(steps=steps) if isinstance(model, TextDiffusion) else LikelihoodConfig(paths=64)
    found = figures_of(model, text, config).lines
    each = found["exact" if "exact" in found else "bound"]
    row = {"bound": float(each.mean()), "per_token": float(each.sum()) / text.tokens}
    if task.grammar is not None:
        row["true"] = -sum(map(task.grammar.log2_prob, text.lines)) / len(text.lines)
    return row


@torch.no_grad()
def linearity(model: Writer, weights: Path, text_file: Path) -> dict[str, float]:
    """R^2 of the cross-entropy of 500 held-out lines against the fitted time, and the embeddings' health."""
    E = model.model.embeddings
    found = {"embedding_rank": effective_rank(E), "embedding_angle": smallest_angle(E)}
    sampler = torch.load(next(weights.parent.glob("opt*.pt")), weights_only=True)["timestep_sampler"]
    if not isinstance(model, TextDiffusion) or not isinstance(model.model, WordDenoiser) or "F" not in sampler:
        return found
    ids = read_text(text_file, model.tokenizer, model.sequence_len, 500).ids
    places, u = np.linspace(0, model.diffusion.num_timesteps - 1, len(sampler["F"])), (np.arange(50) + 0.5) / 50
    losses = []
    for t in np.interp(u, sampler["F"].numpy(), places).astype(int).tolist():
        noise = Noise.draw((5, t), 0, len(ids), (ids.shape[1], E.shape[1]), ids.device)
        terms = cross_entropy_loss(model.model, model.diffusion, ids, torch.full((len(ids),), t), noise)
        losses.append(float(terms.cross_entropy.mean()))
    return found | {"r_squared": float(np.corrcoef(u, losses)[0, 1] ** 2)}


def judged(model: Writer, task: Task, samples: int, at: Sequence[int] = CALLS) -> list[dict[str, Any]]:
    """Quality against network calls, by the sampler that the command takes."""
    rows = []
    for calls in (model.sequence_len - 1,) if isinstance(model, Autoregressive) else at:
        n = samples if task.grammar else min(samples, MOST_OF_TEXT)
        started = time.perf_counter()
        sentences = model.sample(n) if isinstance(model, Autoregressive) else model.sample(n, steps=calls)
        seconds = time.perf_counter() - started
        if task.grammar:
            quality = simple_figures(sentences, task.grammar, task.train)
        else:
            found = figures.evaluate(sentences, task.test, train=task.train).rows
            quality = {row.figure.key: row.samples.value for row in found if row.figure.key in OF_TEXT}
        rows.append({"calls": calls, **quality, "sentences_per_s": n / seconds})
    return rows


def ideal(task: Task, samples: int) -> dict[str, float]:
    """What as many sentences of a perfect sampler are expected to give; without a grammar, held-out lines."""
    if task.grammar:
        found = figures.ideal_figures(task.grammar, samples, task.train, np.random.default_rng(0))
        return {name: found[name].value for name in ("unique", "novel")} | {"kl_bits": found["slot_kl"].value}
    rows = figures.evaluate(task.test, task.test, train=task.train).rows
    return {row.figure.key: row.real.value for row in rows if row.figure.key in OF_TEXT and row.real}


def measured(task: Task, way: str, seed: int, args: argparse.Namespace, known: dict[str, float]) -> dict[str, Any]:
    """Train, sample, judge; `known` is the pace of an earlier seed, or nothing."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_split(task, scratch)
        text, held_out = (scratch / f"{task.name}-{part}.txt" for part in ("train", "test"))
        flags = ["--val_txt_path", str(held_out), "--seed", str(seed), "--eval_interval", "0"]
        row: dict[str, Any] = {"way": way, "dataset": task.name, "seed": seed, **code_of(args)}
        row |= known or {"pace": pace(text, way, scratch)}
        row["steps"] = max(1, round(args.steps / row["pace"]))
        trained = train(scratch / "run", str(text), row["steps"], [*flags, *WAYS[way].split()])
        model = load(str(trained.weights), device="cpu")
        row |= {"seconds": trained.seconds, "cpu_seconds": trained.cpu_seconds, "machine": machine()}
        row["parameters"] = sum(parameter.numel() for parameter in model.model.parameters())
        row |= linearity(model, trained.weights, held_out) | bits(model, task, held_out, args.lines)
        row["samplings"] = judged(model, task, args.samples)
        if args.runs:
            shutil.move(scratch / "run", args.runs / f"{task.name}-{way}-{seed}".replace(" ", "-"))
        return row


def code_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a row to stay."""
    code = fingerprint(ROOT / f"src/text_diffusion/{name}.py" for name in CODE)
    return {"code": code, "budget": args.steps, "samples": args.samples, "lines": args.lines}


def kept() -> dict[str, Any]:
    """What was recorded, without rows of an older form."""
    part = results().get("recipe", {"rows": [], "ideal": {}})
    return {"rows": [row for row in part["rows"] if "code" in row], "ideal": part["ideal"]}


def keep(row: dict[str, Any], best: dict[str, float]) -> None:
    """Record a row instead of the one that was there."""
    part = kept()
    rows = [old for old in part["rows"] if any(old[name] != row[name] for name in KEY)]
    record("recipe", {"rows": [*rows, row], "ideal": part["ideal"] | {row["dataset"]: best}})


def main(argv: Sequence[str] | None = None) -> None:
    """One JSON line a row, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="simple,animals", help="names or paths, separated by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="names, separated by commas")
    parser.add_argument("--seeds", default="102,103,104")
    parser.add_argument("--steps", type=int, default=4000, help=f"of {REFERENCE}, whose time all have")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=200, help="held-out lines for the bound")
    parser.add_argument("--runs", type=Path, help="a folder to keep the trained models in")
    parser.add_argument("--merge", type=Path, help="a results.json whose rows to take; nothing is measured")
    args = parser.parse_args(argv)
    if args.merge:
        other = json.loads(args.merge.read_text())["recipe"]
        for row in other["rows"]:
            keep(row, other["ideal"][row["dataset"]])
        table.write()
        return
    if unknown := set(args.ways.split(",")) - set(WAYS):
        parser.error(f"--ways must be of {', '.join(WAYS)}, found {', '.join(unknown)}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the training command: time means the same beside other work
    keep_freed_memory()
    if args.runs:
        args.runs.mkdir(parents=True, exist_ok=True)
    for task in map(task_of, args.corpora.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for way in args.ways.split(","):
                measure(task, way, seed, args)
    table.write()


def measure(task: Task, way: str, seed: int, args: argparse.Namespace) -> None:
    """A row, unless it is there."""
    want = {"way": way, "dataset": task.name, **code_of(args)}
    same = [row for row in kept()["rows"] if want.items() <= row.items()]
    if any(row["seed"] == seed for row in same):
        print(f"{task.name}, {way}, seed {seed}: there already", flush=True)
        return
    row = measured(task, way, seed, args, {"pace": same[0]["pace"]} if same else {})
    print(json.dumps(row), flush=True)
    keep(row, ideal(task, args.samples))


if __name__ == "__main__":
    main()
