"""Writes the tables of README and docs from results.json, each between its two marks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from common import RESULTS, ROOT


def percent(value: float) -> str:
    """A share as a percentage with two places."""
    return f"{100 * value:.2f} %"


def simple_rows(results: dict[str, Any], name: str, title: str) -> list[str]:
    """One row for each number of network calls: the mean over seeds, and the range of the validity."""
    part = results[name]
    rows = []
    for calls in sorted({run["calls"] for run in part["runs"]}):
        runs = [run for run in part["runs"] if run["calls"] == calls]
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        lowest = f" (lowest {percent(min(run['valid'] for run in runs))})" if len(runs) > 1 else ""
        rows.append(
            f"| {title} | {calls} | {percent(mean['valid'])}{lowest} | {percent(mean['unique'])} | "
            f"{percent(mean['novel'])} | {mean['kl_bits']:.3f} | {mean['sentences_per_s']:.0f} |"
        )
    return rows


def render(results: dict[str, Any]) -> str:
    """The table and the lines under it, as Markdown."""
    lines: list[str] = []
    if "simple" in results or "shipped" in results:
        lines += ["| `simple`, 10,000 samples | steps | valid | unique | novel | slot KL, bits | sentences/s |"]
        lines += ["|---|---|---|---|---|---|---|"]
    if "simple" in results:
        part = results["simple"]
        seconds = max(run["seconds"] for run in part["runs"])
        seeds = len({run["seed"] for run in part["runs"]})
        title = f"default training, {part['runs'][0]['steps']} steps, at most {seconds:.0f} s, mean of {seeds} seeds"
        lines += simple_rows(results, "simple", title)
    if "shipped" in results:
        lines += simple_rows(results, "shipped", "shipped weights, 25,000 steps")
    if "simple" in results:
        ideal = results["simple"]["ideal"]
        lines += [
            f"| an ideal sampler | - | 100 % | {percent(ideal['unique'])} | {percent(ideal['novel'])} | "
            f"{ideal['kl_bits']:.3f} | - |",
            "",
            f"Default training: peak memory {max(run['peak_mb'] for run in results['simple']['runs']):.0f} MB.",
        ]
    if "greetings" in results:
        g = results["greetings"]
        lines += [
            "",
            f"`greetings`, {g['steps']} steps in {g['seconds']:.0f} s: in {percent(g['in_corpus'])} of "
            f"{g['samples']:,} samples every three words in a row are in a row in the corpus; "
            f"{percent(g['copies'])} are exact copies of training lines, {percent(g['unique'])} are unique.",
        ]
    if "text" in results:
        t = results["text"]
        lines += [
            "",
            f"Real text (`{t['file']}`, given as a file of one's own), {t['steps']} steps in {t['seconds'] / 60:.1f} "
            f"minutes, {t['calls']} sampling steps: {percent(t['triples'])} of the samples' word triples occur in the "
            f"{t['held_out_lines']} held-out lines; of real training lines' triples {percent(t['triples_real'])} do. "
            f"{percent(t['copies'])} of 1,000 samples are exact copies of training lines. "
            "The first twenty, as they came:",
            "",
            "```text",
            *t["examples"],
            "```",
        ]
    shown = {name: part for name, part in results.items() if name in ("simple", "shipped", "greetings", "text")}
    for machine in sorted({part["machine"] for part in shown.values()}):
        names = ", ".join(name for name, part in shown.items() if part["machine"] == machine)
        lines += ["", f"Measured on {machine}: {names}."]
    return "\n".join(lines)


def render_curve(results: dict[str, Any]) -> str:
    """The loss terms of the first default run, by step, as Markdown."""
    columns = ("loss", "mse", "tT_loss", "decoder_nll", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "grad_norm")
    lines = [f"| step | {' | '.join(f'`{name}`' for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in results.get("simple", {}).get("curve", []):
        lines.append(f"| {row['step']} | {' | '.join(f'{row[name]:.2g}' for name in columns)} |")
    return "\n".join(lines)


def render_settings(results: dict[str, Any]) -> str:
    """Time and memory of training settings, as Markdown."""
    lines = [
        "| size | batch | L | other flags | steps/s | sentences/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    part = results.get("settings", {"rows": [], "machine": "nothing yet"})
    for row in part["rows"]:
        speed, flags = row["sentences_per_s"], row["flags"] and f"`{row['flags']}`"
        cells = (row["size"], row["batch"], row["length"], flags, f"{speed / row['batch']:.3g}", f"{speed:.3g}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['peak_mb']:.0f} MB |")
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])


PLACES: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "measured", render),
    ("README.md", "curve", render_curve),
    ("docs/troubleshooting.md", "settings", render_settings),
)


def write() -> None:
    """Put every table into its place."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for file, name, renderer in PLACES:
        path = ROOT / file
        begin, end = f"<!-- {name}: written by benchmarks -->", f"<!-- /{name} -->"
        before, found, rest = path.read_text(encoding="utf-8").partition(begin)
        if not found:
            raise SystemExit(f"{file}: expected the mark {begin}, found none")
        path.write_text(f"{before}{begin}\n{renderer(results)}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
