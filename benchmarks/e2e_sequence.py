"""From the meaning representation to the description: diffusion beside a model that writes left to right."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e2e_fields import FIELDS, linear
from e2e_task import Row, Task, seconds_of, trained
from sacrebleu.metrics.bleu import BLEU

from text_diffusion.autoregressive import Autoregressive
from text_diffusion.control import Sources
from text_diffusion.control.given import given_of
from text_diffusion.control.mbr import best_of
from text_diffusion.generation import TextDiffusion, Writer, load

Write = Callable[[int], list[str]]  # so many sentences for each source, one source after the other


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each source."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(linear(row.meaning), []).append(row)
    return found


def slot_error_rate(task: Task, pairs: Sequence[tuple[str, Row]]) -> float:
    """Fields missing, wrong or added in sentences, over the fields there should be (as the matcher sees them)."""
    errors = sum(task.matcher.errors(line, row.meaning) for line, row in pairs)
    return errors / sum(field in row.meaning for _, row in pairs for field in FIELDS)


def bleu(lines: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Of the corpus, cased, by sacrebleu's defaults; a reference that is there twice changes nothing."""
    most = max(map(len, references))
    streams = [[own[i % len(own)] for own in references] for i in range(most)]
    return float(BLEU().corpus_score(list(lines), streams).score)


def figures(task: Task, groups: dict[str, list[Row]], lines: Sequence[str]) -> dict[str, Any]:
    """Of one sentence for each source."""
    rows = [own[0] for own in groups.values()]
    return {
        "bleu": bleu(lines, [[row.line for row in own] for own in groups.values()]),
        "errors": slot_error_rate(task, list(zip(lines, rows, strict=True))),
        "copies": sum(line in task.train_lines for line in lines) / len(lines),
        "unique": len(set(lines)) / len(lines),
        "example": lines[0],
    }


def people(task: Task, groups: dict[str, list[Row]]) -> dict[str, Any]:
    """What one person wrote, beside what the others did; slot errors of all held-out descriptions."""
    several = [own for own in groups.values() if len(own) > 1]
    return {
        "way": "people (one against the others)",
        "bleu": bleu([own[0].line for own in several], [[row.line for row in own[1:]] for own in several]),
        "errors": slot_error_rate(task, [(row.line, row) for row in task.test]),
    }


def writers(model: Writer, texts: tuple[str, ...], args: argparse.Namespace) -> dict[str, Write]:
    """The ways of a model to write for the sources."""
    if isinstance(model, Autoregressive):

        def left_to_right(each: int, greedy: bool = False) -> list[str]:
            given = given_of([Sources(texts, each)], model)
            return model.sample(each * len(texts), seed=args.seed, given=given, greedy=greedy)

        return {"drawn": left_to_right, "most probable words": lambda each: left_to_right(each, greedy=True)}

    assert isinstance(model, TextDiffusion), f"nothing is known of {type(model).__name__}"

    def denoised(each: int, scale: float) -> list[str]:
        sources = Sources(texts, each, scale)
        return model.sample(each * len(texts), controls=[sources], steps=args.calls, seed=args.seed)

    return {
        "plain": lambda each: denoised(each, 1.0),
        f"--guidance_scale {args.scale:g}": lambda each: denoised(each, args.scale),
    }


def measure(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Both models, each way plain and by minimum Bayes risk."""
    groups = grouped(task.test)
    texts = tuple(groups)
    found: dict[str, dict[str, Any]] = {}
    for name, weights, steps, flags in (
        ("diffusion", args.weights, args.steps, ()),
        ("left to right", args.left_to_right, args.left_to_right_steps, ("--objective", "autoregressive")),
    ):
        if weights is None:
            folder = args.keep / ("source" if name == "diffusion" else "autoregressive")
            found[name] = trained(folder, "source", "tsv", steps, ("--condition", "source", *flags))
        else:
            found[name] = {"weights": str(weights), "seconds": seconds_of(weights)}
    rows = [people(task, groups)]
    for name, about in found.items():
        model = load(about["weights"])
        about["parameters"] = sum(parameter.numel() for parameter in model.model.parameters())
        about["weights"] = Path(about["weights"]).name  # where it lies is nobody's business
        for way, write in writers(model, texts, args).items():
            for candidates in (1, args.candidates) if way != "most probable words" else (1,):
                started = time.perf_counter()
                lines = write(candidates)
                lines = best_of(lines, candidates) if candidates > 1 else lines
                ms = 1000 * (time.perf_counter() - started) / len(texts)
                mbr = f", --mbr {candidates}" if candidates > 1 else ""
                rows.append({"way": f"{name}, {way}{mbr}", "ms": ms, **figures(task, groups, lines)})
                print(rows[-1], flush=True)
    return {"calls": args.calls, "sources": len(texts), "trained": found, "rows": rows}
