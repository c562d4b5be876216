"""Steering on real text: do E2E descriptions say what they are told to, and do they stay as people write them?

python benchmarks/control_e2e.py FOLDER PART [--weights CKPT] [--keep DIR] [--steps N] ...

FOLDER holds the CSV files of E2E (see e2e.py), which are split so that no meaning representation is on two sides. PART:

    split       only write the texts into DIR
    words       each value of each field, by words that must occur
    labels      the same by classifiers of the meaning representations, trained here
    length      sentences of so many words
    infilling   the middle third of held-out descriptions, beside other ways of filling it
    price       time of a guided sentence against an unguided one
    sequence    from the meaning representation to the description, beside a model that writes left to right
    table       only write the table again, from results.json

The first five are of an unconditional model: CKPT, trained on DIR/e2e-train.txt, or DIR/free, trained here if it is not
there yet. `sequence` trains DIR/source and DIR/autoregressive; see docs/control.md for what each takes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import e2e_infilling
import e2e_sequence
import numpy as np
import table
import torch
from common import record
from e2e_fields import FIELDS, PHRASES
from e2e_task import Task, free_model, write_texts

from text_diffusion.control import Control, Label, Length, Template, Want, train_classifier
from text_diffusion.control import classifier as classifiers
from text_diffusion.control.classifier import Classifier
from text_diffusion.generation import TextDiffusion
from text_diffusion.memory import keep_freed_memory

NOT_SAID = "(none)"  # the label of descriptions whose meaning representation lacks a field
Steer = Callable[[str, str], list[Control]]  # field and value to controls


def describe(task: Task, lines: Sequence[str]) -> dict[str, float]:
    """How far sentences are as people write them."""
    return {
        "triples": task.triples(lines),
        "copies": sum(line in task.train_lines for line in lines) / len(lines),
        "unique": len(set(lines)) / len(lines),
        "words": sum(len(line.split()) for line in lines) / len(lines),
    }


def by_field(task: Task, model: TextDiffusion, steer: Steer, args: argparse.Namespace) -> dict[str, Any]:
    """Of each field: how many sentences say the value they were told to, beside people and beside no steering."""
    unguided = model.sample(args.samples, steps=args.calls, seed=1)
    seeds = count(2)  # else all values would meet the same noise
    rows = []
    for field in FIELDS:
        values = task.matcher.values[field]
        each = -(-args.samples // len(values))
        says, alone, shares, written, seconds = 0, 0, list[float](), list[str](), 0.0
        for value in values:
            started = time.perf_counter()
            lines = model.sample(each, steps=args.calls, controls=steer(field, value), seed=next(seeds))
            seconds += time.perf_counter() - started
            said = [task.matcher.said(line, field) for line in lines]
            shares.append(sum(value in found for found in said) / each)
            says += sum(value in found for found in said)
            alone += sum(found == [value] for found in said)
            written += lines
        people = [(row.meaning[field], row.line) for row in task.test if field in row.meaning]
        free = [found for line in unguided if (found := task.matcher.said(line, field))]
        rows.append(
            {
                "field": field,
                "values": len(values),
                "samples": len(written),
                "says": says / len(written),
                "alone": alone / len(written),
                "lowest": min(shares),
                "lowest_value": values[int(np.argmin(shares))],
                "people": sum(task.matcher.says(line, field, value) for value, line in people) / len(people),
                "people_alone": sum(task.matcher.said(line, field) == [value] for value, line in people) / len(people),
                "chance": sum(map(len, free)) / len(unguided) / len(values),
                "chance_alone": sum(len(one) == 1 for one in free) / max(len(free), 1),
                "ms": 1000 * seconds / len(written),
                "example": written[0],
                **describe(task, written),
            }
        )
        print(rows[-1], flush=True)
    return {**about(task, unguided, args), "rows": rows}


def about(task: Task, unguided: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What the figures of an unconditional model are held to: people, and itself without steering."""
    some = np.random.default_rng(0).permutation(len(task.train))[:1000]
    return {
        "calls": args.calls,
        "unguided": describe(task, unguided),
        "unguided_examples": unguided[:10],
        "people_triples": task.triples([task.train[i].line for i in some]),
    }


def words(task: Task, model: TextDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """Each value of each field, by words that must occur."""

    def steer(field: str, value: str) -> list[Control]:
        return [Want(PHRASES.get((field, value), f"near {value}" if field == "near" else value))]

    return by_field(task, model, steer, args)


def classifier_of(field: str, task: Task, model: TextDiffusion, args: argparse.Namespace) -> Classifier:
    """Of the values of a field, unless there is one already."""
    labeled, out = args.keep / f"{field}.tsv", args.keep / f"{field}.classifier.pt"
    if not out.is_file():
        rows = [f"{row.line}\t{row.meaning.get(field, NOT_SAID)}\n" for row in task.train]
        labeled.write_text("".join(rows), encoding="utf-8")
        flags = ["--labeled", str(labeled), "--out", str(out), "--steps", str(args.classifier_steps)]
        if train_classifier.main([str(args.weights), *flags]):
            raise SystemExit(f"no classifier of {field} came about")
    return classifiers.load(out, model)


def labels(task: Task, model: TextDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """Each value of each field, by a classifier of each field."""
    found = {field: classifier_of(field, task, model, args) for field in FIELDS}

    def steer(field: str, value: str) -> list[Control]:
        return [Label(found[field], value, args.strength)]

    settings = {"strength": args.strength, "classifier_steps": args.classifier_steps}
    return by_field(task, model, steer, args) | settings


def length(task: Task, model: TextDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """Sentences of as many words as the held-out ones have, at nine evenly spaced ranks."""
    numbers = np.quantile([len(row.line.split()) for row in task.test], np.linspace(0.1, 0.9, 9), method="nearest")
    each = -(-args.samples // len(numbers))
    written: list[tuple[int, str]] = []
    started = time.perf_counter()
    for seed, number in enumerate(map(int, numbers)):
        lines = model.sample(each, steps=args.calls, controls=[Length(number, number)], seed=seed)
        written += [(number, line) for line in lines]
    seconds = time.perf_counter() - started
    figures = {
        "lengths": [int(number) for number in numbers],
        "samples": len(written),
        "exact": sum(len(line.split()) == number for number, line in written) / len(written),
        "ms": 1000 * seconds / len(written),
        **describe(task, [line for _, line in written]),
    }
    print(figures)
    return about(task, model.sample(args.samples, steps=args.calls, seed=1), args) | figures


def infilling(task: Task, model: TextDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """The middle of descriptions of one half of the held-out meanings; the other half says what people would write."""
    found: dict[str, Any] = e2e_infilling.measure(task, model, args.samples, args.calls)
    return found


def price(task: Task, model: TextDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """Time of a sentence by each way of steering against none, one after the other, five times."""
    classifier = classifier_of("area", task, model, args)
    ways: dict[str, list[Control]] = {
        "none": [],
        "a label, by a classifier": [Label(classifier, "riverside", args.strength)],
        "a word": [Want("riverside")],
        "five words in a row": [Want("has a high customer rating")],
        "length": [Length(20, 20)],
        "a template with a free gap": [Template("The [GAP] is a coffee shop [GAP].")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for controls in ways.values():  # the first call of each is slower
        model.sample(1, steps=2, controls=controls)
    for seed in range(5):
        for name, controls in ways.items():
            started = time.perf_counter()
            model.sample(args.batch, steps=args.calls, controls=controls, seed=seed)
            seconds[name].append((time.perf_counter() - started) / args.batch)
    rows = [
        {
            "way": name,
            "ms": 1000 * median(found),
            "ratio": median(mine / free for mine, free in zip(found, seconds["none"], strict=True)),
        }
        for name, found in seconds.items()
    ]
    print(rows)
    return {"calls": args.calls, "batch": args.batch, "rows": rows}


PARTS = {"words": words, "labels": labels, "length": length, "infilling": infilling, "price": price}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=("split", *PARTS, "sequence", "table"))
    parser.add_argument(
        "--weights", type=Path, help="of the unconditional model, or for `sequence` of that with sources"
    )
    parser.add_argument("--left_to_right", type=Path, help="for `sequence`: weights of the autoregressive model")
    parser.add_argument("--keep", type=Path, help="folder for texts, weights and classifiers, to be used again")
    parser.add_argument("--steps", type=int, default=4400, help="of training a diffusion model")
    parser.add_argument("--left_to_right_steps", type=int, default=6000, help="of training the autoregressive model")
    parser.add_argument("--classifier_steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=500, help="of each field, or in all")
    parser.add_argument("--calls", type=int, default=50, help="network calls of a sentence")
    parser.add_argument("--strength", type=float, default=10.0, help="of guidance by classifiers")
    parser.add_argument("--batch", type=int, default=64, help="sentences at once, for `price`")
    parser.add_argument("--candidates", type=int, default=10, help="for `sequence`: of MBR decoding")
    parser.add_argument("--scale", type=float, default=1.5, help="for `sequence`: of classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0, help="for `sequence`")
    args = parser.parse_args(argv)
    if args.part != "table":
        torch.set_num_threads(1)
        keep_freed_memory()
        with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
            args.keep = Path(folder)
            task = Task.of(args.folder)
            write_texts(task, args.keep)
            if args.part == "sequence":
                record("control_e2e_sequence", e2e_sequence.measure(task, args))
            elif args.part != "split":
                model, trained = free_model(args)
                record(f"control_e2e_{args.part}", {"trained": trained, **PARTS[args.part](task, model, args)})
    table.write()


if __name__ == "__main__":
    main()
