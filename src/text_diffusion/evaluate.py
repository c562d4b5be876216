"""How good are samples? Every figure with its interval, beside held-out real text and, if known, an ideal sampler.

python -m text_diffusion.evaluate SAMPLES --reference FILE [--train FILE] [--checkpoint CKPT]

SAMPLES is any text, one sentence a line, also another program's; of a .jsonl file, the "text" of each line.
docs/evaluation.md says what each figure can and cannot tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_diffusion import errors, figures
from text_diffusion.config import EvaluateConfig
from text_diffusion.errors import UserError
from text_diffusion.figures import Estimate, Evaluation, Figure, Row
from text_diffusion.files import read_lines, write_atomically
from text_diffusion.flags import Parser, add_options, build
from text_diffusion.grammar import Grammar
from text_diffusion.launcher import check_alone
from text_diffusion.remote import local, output
from text_diffusion.teacher import load_teacher


def read_samples(path: Path) -> list[str]:
    """The lines of a sample file, blank ones too: the sampler wrote them.

    Raises:
        UserError: see `read_lines`; or a line of a .jsonl file is not an object with a "text".
    """
    lines = read_lines(path, blank=True)
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: expected text, found half a surrogate pair in line {number}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f'{path}: expected JSON objects with a "text", found another thing in line {number}'
            ) from None
        texts.append(text)
    return texts


def stripped(lines: Sequence[str]) -> list[str]:
    """Without white space around them, which no figure is about."""
    return [line.strip() for line in lines]


def find_grammar(given: str, reference: Path) -> Grammar | None:
    """The language that is named, or the one of the data folder that the reference belongs to, if there is one.

    Raises:
        UserError: the file is not a grammar.
    """
    beside = reference.parent / reference.stem.removesuffix("-test") / "grammar.json"
    if given or beside.is_file():
        return Grammar.load(local(given) if given else beside)
    return None


def verdict(result: Evaluation) -> str:
    """In a sentence: on which figures the samples are worse than an ideal sampler, or else than real text."""
    if not result.rows:
        lines = "1 line" if result.lines == 1 else f"{result.lines} lines"
        return f"nothing can be told from {lines}, beside {result.real_lines} of real text"
    worse = [row for row in result.rows if row.worse]
    bars = " or ".join(sorted({"an ideal sampler" if row.ideal else "real text" for row in worse or result.rows}))
    if not worse:
        return f"no figure of {len(result.rows)} tells these samples from {bars}"
    return f"worse than {bars} on {len(worse)} of {len(result.rows)} figures: " + "; ".join(map(_against, worse))


def _against(row: Row) -> str:
    kind = "ideal" if row.ideal else "real"
    return f"{row.figure.key} {shown(row.figure, row.samples.value)} ({kind} {shown(row.figure, row.bar.value)})"


def shown(figure: Figure, value: float) -> str:
    """A value with its unit."""
    if figure.unit == "%":
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" + (f" {figure.unit}" if figure.unit else "")


def as_json(result: Evaluation) -> dict[str, Any]:
    """Everything under stable keys; a figure's values are in the unit given, shares between 0 and 1."""

    def plain(estimate: Estimate | None) -> dict[str, float] | None:
        return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}

    figures = {
        row.figure.key: {
            "title": row.figure.title,
            "unit": "share" if row.figure.unit == "%" else row.figure.unit,
            "good": row.figure.good,
            "samples": plain(row.samples),
            "real": plain(row.real),
            "ideal": plain(row.ideal),
            "worse": row.worse,
        }
        for row in result.rows
    }
    return {
        "lines": result.lines,
        "real_lines": result.real_lines,
        "figures": figures,
        "left_out": result.left_out,
        "warnings": result.warnings,
        "worse": [row.figure.key for row in result.rows if row.worse],
        "verdict": verdict(result),
    }


def as_text(result: Evaluation) -> str:
    """The table, what was left out and why, warnings, and the verdict, as Markdown."""
    reasons: dict[str, list[str]] = {}
    for key, reason in result.left_out.items():
        reasons.setdefault(reason, []).append(key)
    parts = [
        f"{result.lines} lines of samples, {result.real_lines} of real text; [95 % interval]; `worse`: than the ideal "
        "sampler, or else than real text, and the intervals do not meet",
        as_table(result) if result.rows else "",
        "\n".join(f"left out: {', '.join(keys)}: {reason}" for reason, keys in reasons.items()),
        "\n".join(f"warning: {warning}" for warning in result.warnings),
        f"**verdict: {verdict(result)}**",
    ]
    return "\n\n".join(part for part in parts if part)


def as_table(result: Evaluation) -> str:
    """A Markdown table, aligned so that it reads well on a terminal too."""
    cells = [["figure", "samples", "real text", "ideal sampler", "good is", ""]]
    for row in result.rows:
        estimates = [_with_interval(row.figure, estimate) for estimate in (row.samples, row.real, row.ideal)]
        good = "as real" if row.figure.good == "real" else row.figure.good
        cells.append([row.figure.title, *estimates, good, "worse" if row.worse else ""])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )


def _with_interval(figure: Figure, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    value = shown(figure, estimate.value)
    if estimate.low == estimate.high:
        return value
    factor, digits = (100, ".2f") if figure.unit == "%" else (1, ".4g")
    return f"{value} [{factor * estimate.low:{digits}}, {factor * estimate.high:{digits}}]"


def command(argv: Sequence[str] | None) -> None:
    """Parse, read, measure, print, write."""
    parser = Parser(prog="text-diffusion evaluate", description="Measure samples beside real text.")
    parser.add_argument("samples", metavar="SAMPLES", help="text to judge, one sentence a line (or .jsonl)")
    add_options(parser, EvaluateConfig)
    given = vars(parser.parse_args(argv))
    config = build(EvaluateConfig, given)
    check_alone("evaluate")
    if not config.reference:
        raise UserError("--reference must name a file of held-out real text, found nothing")
    inputs = (given["samples"], config.reference, config.train, config.grammar, config.checkpoint)
    samples = stripped(read_samples(local(given["samples"])))
    reference = stripped(read_lines(local(config.reference)))
    train = stripped(read_lines(local(config.train))) if config.train else None
    grammar = find_grammar(config.grammar, Path(config.reference))
    scorer = load_teacher(config.checkpoint) if config.checkpoint else None
    for name in filter(None, (config.json, config.markdown)):
        output(name, *filter(None, inputs))

    result = figures.evaluate(samples, reference, train=train, grammar=grammar, scorer=scorer, seed=config.seed)
    text = as_text(result)
    print(text)
    if config.json:
        about = {"samples": given["samples"], "reference": config.reference, "train": config.train, "seed": config.seed}
        about["teacher"] = config.checkpoint
        contents = json.dumps(about | as_json(result), indent=1, allow_nan=False) + "\n"
        write_atomically(Path(config.json), lambda file: file.write(contents.encode()))
    if config.markdown:
        write_atomically(Path(config.markdown), lambda file: file.write(f"{text}\n".encode()))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
