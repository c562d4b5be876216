"""The page of one run, or of several side by side: one file that loads nothing and shows all text as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_diffusion import __version__
from text_diffusion.config import ONCE
from text_diffusion.evaluate import shown, verdict
from text_diffusion.figures import Estimate, Figure
from text_diffusion.visual import plots
from text_diffusion.visual.charts import Chart, legend, scatter, svg, text
from text_diffusion.visual.findings import Findings
from text_diffusion.visual.recording import as_json, plain

SAMPLES = 24  # on the page
# Nothing from outside, whatever is in the text; its own style and script only.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(findings: Sequence[Findings]) -> str:
    """The whole page as HTML."""
    several = len(findings) > 1
    title = " · ".join(one.run.name for one in findings)
    body = [
        _players(findings),
        _samples(findings),
        _evaluation(findings),
        _charts("Quality against steps", QUALITY, plots.quality(findings)),
        _calibration(findings),
        _charts("Training", "", plots.training([one.run for one in findings])),
        _words(findings),
        _settings(findings),
        _missing(findings),
    ]
    here = Path(__file__)
    style, script = (here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{text(title)} · text-diffusion</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{text(title)}</h1>{"" if several else _subtitle(findings[0])}</header>
<main>
{"".join(body)}
</main>
<footer>Written by text-diffusion {__version__}. This page is one file and loads nothing.</footer>
<script>
{script}</script>
</body>
</html>
"""


QUALITY = "The same noise, walked back in more or fewer network calls."


def _section(title: str, intro: str, inside: str) -> str:
    lead = f'<p class="soft">{intro}</p>' if intro else ""
    return f"<section><h2>{title}</h2>{lead}{inside}</section>\n" if inside else ""


def _grid(findings: Sequence[Findings], parts: Sequence[str]) -> str:
    """A card a run, named where there are several."""
    cards = []
    for one, part in zip(findings, parts, strict=True):
        if part:
            name = f"<h3>{text(one.run.name)}</h3>" if len(findings) > 1 else ""
            cards.append(f'<div class="card">{name}{part}</div>')
    return f'<div class="grid wide">{"".join(cards)}</div>' if cards else ""


def _subtitle(one: Findings) -> str:
    settings = one.run.settings
    data, model = settings.get("data", {}), settings.get("model", {})
    facts = []
    if one.objective or model:
        facts.append(f"objective <code>{text(one.objective or model.get('objective', ''))}</code>")
    if data.get("dataset"):
        facts.append(f"corpus <code>{text(data['dataset'])}</code>")
    if one.run.rows:
        last, total = int(one.run.rows[-1]["step"]), settings.get("train", {}).get("steps")
        facts.append(f"step {last:,}" + (f" of {total:,}" if isinstance(total, int) else ""))
    if one.run.weights:
        facts.append(f"weights <code>{text(one.run.weights.name)}</code>")
    return f'<p class="soft">{" · ".join(facts)}</p>' if facts else ""


# Sentences


def _players(findings: Sequence[Findings]) -> str:
    parts = [_player(one, f"frames-{i}") if one.frames else "" for i, one in enumerate(findings)]
    intro = (
        "Sentences condensing out of noise. Shade and bar under a word: the probability that the model gives it. "
        "<kbd>Space</kbd> plays, <kbd>←</kbd> <kbd>→</kbd> step, <kbd>Home</kbd> <kbd>End</kbd> jump."
    )
    return _section("From noise to words", intro, _grid(findings, parts))


def _player(one: Findings, key: str) -> str:
    data = json.dumps(as_json(one.frames), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    lines = "".join(f"<li>{text(plain(words))}</li>" for words in one.frames[-1].guess)
    return f"""<div class="player" tabindex="0" role="group" aria-label="player" data-frames="{key}">
<ol class="stage">{lines}</ol>
<div class="controls"><button class="play" type="button">▶ Play</button>
<input type="range" min="0" value="0" aria-label="step">
<select class="view" aria-label="what is shown"><option value="noisy">what is there (x_t)</option>\
<option value="guess">the model's guess (x_0)</option></select>
<select class="speed" aria-label="speed"><option value="400">slow</option>\
<option value="180" selected>normal</option><option value="60">fast</option></select>
<div class="where"></div></div>
<script type="application/json" id="{key}">{data}</script>
</div>"""


def _samples(findings: Sequence[Findings]) -> str:
    parts = []
    for one in findings:
        lines = "".join(f"<li>{text(line) or '(blank)'}</li>" for line in one.samples[:SAMPLES])
        how = f"in {one.steps} steps, " if one.steps else ""
        note = (
            f'<p class="note">The first {min(SAMPLES, len(one.samples))} of {len(one.samples)}, {how}as they came.</p>'
        )
        parts.append(f'<ol class="samples">{lines}</ol>{note}' if one.samples else "")
    return _section("Samples", "", _grid(findings, parts))


# Figures


def _evaluation(findings: Sequence[Findings]) -> str:
    judged = [one for one in findings if one.evaluation is not None]
    if not judged:
        return ""
    verdicts, left_out = [], []
    for one in judged:
        assert one.evaluation is not None, "chosen above"
        name = f"{text(one.run.name)}: " if len(findings) > 1 else ""
        verdicts.append(f'<p class="verdict">{name}{text(verdict(one.evaluation))}</p>')
        reasons: dict[str, list[str]] = {}
        for key, reason in one.evaluation.left_out.items():
            reasons.setdefault(reason, []).append(key)
        left_out += [f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
        left_out += one.evaluation.warnings
    notes = "".join(f'<p class="note">Left out: {text(note)}.</p>' for note in dict.fromkeys(left_out))
    inside = f'<div class="card"><div class="scroll">{_table(judged)}</div>{"".join(verdicts)}{notes}</div>'
    intro = (
        "Samples beside real text, and beside an ideal sampler where the language is known. In brackets: 95 %; "
        "<b>worse</b>: than the ideal sampler, or else than real text, and the intervals do not meet."
    )
    return _section("Evaluation", intro, inside)


def _table(judged: Sequence[Findings]) -> str:
    """A row a figure; of several a column each, and the bars of the first, named if they are not those of all."""
    rows: dict[str, Figure] = {}
    for one in judged:
        assert one.evaluation is not None, "chosen by the caller"
        rows |= {row.figure.key: row.figure for row in one.evaluation.rows}
    names = ["samples"] if len(judged) == 1 else [text(one.run.name) for one in judged]
    corpora = {str(one.run.settings.get("data", {}).get("dataset")) for one in judged}
    whose = f" of {names[0]}" if len(corpora) > 1 else ""
    titles = ("figure", *names, f"real text{whose}", f"ideal sampler{whose}", "good is")
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = []
    for key, figure in rows.items():
        cells, bars = [], ("<td>-</td>", "<td>-</td>")
        for one in reversed(judged):
            assert one.evaluation is not None, "chosen by the caller"
            row = next((row for row in one.evaluation.rows if row.figure.key == key), None)
            cells.append(_cell(figure, row.samples, row.worse) if row else "<td>-</td>")
            bars = (_cell(figure, row.real), _cell(figure, row.ideal)) if row else bars
        good = "as real" if figure.good == "real" else figure.good
        title = figure.title[0].upper() + figure.title[1:]
        body.append(f"<tr><td>{title}</td>{''.join(reversed(cells))}{''.join(bars)}<td>{good}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(figure: Figure, estimate: Estimate | None, worse: bool = False) -> str:
    if estimate is None:
        return "<td>-</td>"
    factor, digits = (100, ".2f") if figure.unit == "%" else (1, ".3g")
    interval = ""
    if estimate.low != estimate.high:
        interval = (
            f' <span class="interval">[{factor * estimate.low:{digits}}, {factor * estimate.high:{digits}}]</span>'
        )
    mark = ' class="worse"' if worse else ""
    return f"<td{mark}>{shown(figure, estimate.value)}{' worse' if worse else ''}{interval}</td>"


def _figure(chart: Chart) -> str:
    note = f'<p class="note">{text(chart.note)}</p>' if chart.note else ""
    return f'<figure class="card"><h3>{text(chart.title)}</h3>{legend(chart)}{svg(chart)}{note}</figure>'


def _charts(title: str, intro: str, charts: Sequence[Chart]) -> str:
    figures = "".join(_figure(chart) for chart in charts if not chart.empty)
    return _section(title, intro, f'<div class="grid">{figures}</div>' if figures else "")


def _calibration(findings: Sequence[Findings]) -> str:
    figures = []
    for one in findings:
        for chart in plots.calibration(one):
            name = f"<h3>{text(one.run.name)}</h3>" if len(findings) > 1 else ""
            figures.append(f'<div class="wrap">{name}{_figure(chart)}</div>')
    intro = (
        "At each noise level: the probability of the word that the model holds most probable, and how often it stays."
    )
    return _section("Calibration", intro, f'<div class="grid">{"".join(figures)}</div>' if figures else "")


def _words(findings: Sequence[Findings]) -> str:
    parts = []
    for one in findings:
        if one.words is None:
            parts.append("")
            continue
        rows = "".join(
            f"<tr><td><b>{text(word)}</b></td><td>"
            + ", ".join(f'{text(other)} <span class="interval">{d:.2f}</span>' for other, d in near)
            + "</td></tr>"
            for word, near in one.words.neighbours
        )
        head = "<thead><tr><th>word</th><th>nearest, and how far</th></tr></thead>"
        table = f'<div class="scroll"><table>{head}{rows}</table></div>'
        charts = "".join(f"{svg(chart)}" for chart in plots.norms(one))
        norms = f'<div class="norms"><h3>Norms of the embeddings</h3><figure>{charts}</figure></div>' if charts else ""
        if len(one.words.norms) > 1 and plots.all_alike(one.words.norms):
            norms = f'<p class="note">All embeddings have the same norm, {one.words.norms[0]:.3g}.</p>'
        parts.append(f"{table}{norms}")
    maps = ""
    if len(findings) == 1 and findings[0].words and findings[0].words.places:
        share = 100 * findings[0].words.explained
        note = f'<p class="note">The two main axes, {share:.0f} % of the variance; point at a dot for its word.</p>'
        drawn = f'<div class="scroll">{scatter(findings[0].words.places)}</div>'
        maps = f'<div class="card map"><h3>Map</h3>{drawn}{note}</div>'
    intro = "What the model has learned to tell apart: near words are those that noise confuses first."
    return _section("Word embeddings", intro, maps + _grid(findings, parts) if any(parts) else "")


# What it was, and what is not here


def _settings(findings: Sequence[Findings]) -> str:
    tables: list[dict[str, Any]] = []
    for one in findings:
        groups = one.run.settings.values()
        values = {name: value for group in groups for name, value in group.items()}
        if values and len(findings) > 1:  # what older runs do not say was so
            values = {name: values.get(name, once) for name, once in ONCE.items()} | values
        tables.append({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})
    names = list(dict.fromkeys(name for values in tables for name in values))
    if len(findings) > 1:
        names = [name for name in names if len({str(values.get(name)) for values in tables}) > 1]
    if not names:
        return ""
    head = "".join(f"<th>{text(one.run.name)}</th>" for one in findings) if len(findings) > 1 else "<th>value</th>"
    rows = "".join(
        f"<tr><td><code>{text(name)}</code></td>"
        + "".join(f'<td class="settings">{text(values.get(name, "-"))}</td>' for values in tables)
        + "</tr>"
        for name in names
    )
    table = f'<div class="scroll"><table><thead><tr><th>setting</th>{head}</tr></thead>{rows}</table></div>'
    if len(findings) > 1:
        return _section("Settings that differ", "", f'<div class="card">{table}</div>')
    inside = f'<details class="card"><summary>All settings of the run</summary>{table}</details>'
    return _section("Settings", "", inside)


def _missing(findings: Sequence[Findings]) -> str:
    items = []
    for one in findings:
        name = f"{text(one.run.name)}: " if len(findings) > 1 else ""
        items += [f"<li>{name}<b>{text(what)}</b>: {text(why)}</li>" for what, why in one.run.missing.items()]
    return _section("Not here", "", f'<ul class="card missing">{"".join(items)}</ul>' if items else "")
