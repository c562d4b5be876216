"""Which charts a run has, or several side by side: the training, quality against steps, calibration, norms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from text_diffusion.visual.charts import Chart, Series
from text_diffusion.visual.findings import Findings
from text_diffusion.visual.folder import RunFolder, thinned

NO_TERMS = {"step", "lr", "grad_norm", "seconds", "batch_size", "world_size", "embedding_norm"}
QUARTER_TITLES = ("least noise", "less", "more", "most noise")


def training(runs: Sequence[RunFolder]) -> list[Chart]:
    """Of one run each term; of several the same curve of each."""
    if len(runs) == 1:
        return _of_one(runs[0])
    found = [_overlay(runs, key, title, log) for key, title, log in (
        ("loss", "Loss", True),
        ("val_loss", "Loss on held-out text", True),
        *((f"{term}_q{i}", f"{term}, quarter {i} of t ({QUARTER_TITLES[i - 1]})", True) for term, i in _quarters(runs)),
        ("grad_norm", "Gradient norm", True),
        ("lr", "Learning rate", False),
        ("embedding_norm", "Mean norm of the word embeddings", False),
        ("sentences_per_s", "Sentences a second", False),
    )]  # fmt: skip
    return [chart for chart in found if not chart.empty]


def _of_one(run: RunFolder) -> list[Chart]:
    terms = [name for name in run.columns() if f"val_{name}" in run.columns() and name not in NO_TERMS]
    terms = terms or [name for name in ("loss", "mse", "tT_loss", "decoder_nll", "nll") if name in run.columns()]
    terms = terms if len(terms) > 2 else terms[:1]  # the loss, if it has one term
    charts = [
        Chart(
            "loss",
            "Loss, term by term" if len(terms) > 1 else "Loss",
            "step",
            "",
            [_line(run, name, name) for name in terms],
            "Their sum is the loss; read which one moves." if len(terms) > 1 else "",
            log_y=True,
        ),
        Chart(
            "held-out",
            "Loss on held-out text",
            "step",
            "",
            [_line(run, f"val_{name}", name, True) for name in terms],
            "Of the averaged weights, on the same sentences with the same noise each time.",
            log_y=True,
        ),
        _by_noise(run),
        Chart("grad_norm", "Gradient norm", "step", "", [_line(run, "grad_norm", "gradient norm")], log_y=True),
        Chart("lr", "Learning rate", "step", "", [_line(run, "lr", "learning rate")]),
        Chart(
            "embedding_norm",
            "Mean norm of the word embeddings",
            "step",
            "",
            [_line(run, "embedding_norm", "mean norm", True)],
        ),
        Chart(
            "rounding",
            "Words that rounding x_0 gets right",
            "step",
            "",
            [_line(run, "val_rounding_accuracy", "held-out words", True)],
            unit="%",
        ),
    ]
    return [chart for chart in charts if not chart.empty]


def _by_noise(run: RunFolder) -> Chart:
    lines = [
        _line(run, f"{term}_q{i}", f"{term}, quarter {i}: {QUARTER_TITLES[i - 1]}") for term, i in _quarters([run])
    ]
    note = "Quarters of t. In the last next to nothing of a sentence is left: learning shows before."
    chart = Chart("noise", "Loss by noise level", "step", "", lines, note, log_y=True)
    if nothing := [line.name for line in lines if len(line.x) and not chart.points(line)]:
        drawn = [line for line in lines if line.name not in nothing]
        chart = replace(chart, series=drawn, note=f"{note} Not drawn, being 0 throughout: {'; '.join(nothing)}.")
    return chart


def quality(findings: Sequence[Findings]) -> list[Chart]:
    """Each figure against network calls, a line a run, and the bar."""
    charts: list[Chart] = []
    titles = dict.fromkeys(found.title for one in findings for found in one.quality)
    for number, title in enumerate(titles):
        lines: list[Series] = []
        bars: dict[str, float] = {}
        unit = ""
        for one in findings:
            for found in (q for q in one.quality if q.title == title):
                name = one.run.name if len(findings) > 1 else "samples"
                lines.append(Series(name, found.calls, found.values, points=True))
                whose = f"{found.bar_title} ({one.run.name})" if len(findings) > 1 else found.bar_title
                bars[whose] = found.bar
                unit = found.unit
        calls = [c for line in lines for c in line.x]
        lines += [Series(name, [min(calls), max(calls)], [bar, bar]) for name, bar in bars.items()]
        of = f", {unit}" if unit not in ("", "%") else ""
        top = (None, None) if unit != "%" else (None, (min(0.9, *(min(line.y) for line in lines)), 1.0))
        key = "quality" if number == 0 else f"quality-{number + 1}"
        whole = title[0].upper() + title[1:] + of
        charts.append(
            Chart(key, whole, "network calls", "", lines, unit=unit, log_x=True, log_y=unit == "bits", ranges=top)
        )
    return charts


def calibration(findings: Findings) -> list[Chart]:
    """Confidence against how often a word stays, by quarters of t."""
    if findings.calibration is None:
        return []
    lines = []
    for quarter in reversed(range(4)):
        x, y = findings.calibration.curve(quarter)
        if x:
            error = 100 * findings.calibration.error(quarter)
            lines.append(Series(f"{QUARTER_TITLES[quarter]} (off by {error:.1f} %)", x, y, points=True))
    lines.append(Series("if it were right", [0.0, 1.0], [0.0, 1.0]))
    note = "Below the diagonal the model is too sure, above it not sure enough. Ancestral sampling, 50 steps."
    title = "How sure of a word, how often it stays"
    ends = (0.0, 1.0)
    return [Chart("calibration", title, "probability of the word", "", lines, note, unit="%", ranges=(ends, ends))]


def norms(findings: Findings) -> list[Chart]:
    """How many words have an embedding of what norm."""
    if findings.words is None or len(findings.words.norms) < 2 or all_alike(findings.words.norms):
        return []
    counts, edges = np.histogram(findings.words.norms, bins=24)
    x, y = np.repeat(edges, 2)[1:-1].tolist(), np.repeat(counts, 2).tolist()
    lines = [Series("words", [x[0], *x, x[-1]], [0, *y, 0])]
    return [Chart("norms", "Norms of the word embeddings", "norm", "words", lines)]


def all_alike(values: Sequence[float]) -> bool:
    """Whether they differ by rounding only, as norms do where embeddings are on a sphere."""
    return max(values) - min(values) <= 1e-4 * abs(max(values))


def _quarters(runs: Sequence[RunFolder]) -> list[tuple[str, int]]:
    found = [re.fullmatch(r"(\w+)_q([1-4])", name) for run in runs for name in run.columns()]
    return sorted({(name[1], int(name[2])) for name in found if name})


def _line(run: RunFolder, key: str, name: str, points: bool = False) -> Series:
    x, y = run.series(key)
    return Series(name, *thinned(x, y), points=points and len(x) <= 60)


def _overlay(runs: Sequence[RunFolder], key: str, title: str, log: bool) -> Chart:
    lines = [_line(run, key, run.name) for run in runs]
    return Chart(key, title, "step", "", [line for line in lines if len(line.x)], log_y=log)
