"""Writes the tables of README and docs from results.json, each between its two marks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import control_e2e_table
import control_table
import distillation_table
import evaluation_table
import gpu_table
import likelihood_table
import posterior_table
import projection
import recipe_table
from common import ROOT, percent, results

SHIPPED = {  # name in results.json, and what those weights are
    "shipped_words": "shipped weights, 10,000 steps",
    "shipped_student": "shipped weights of its student, 8,000 steps more",
    "shipped": "shipped weights of `diffusion_lm`, 25,000 steps",
}


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
    if "shipped" in results:
        lines += ["| `simple`, 10,000 samples | steps | valid | unique | novel | slot KL, bits | sentences/s |"]
        lines += ["|---|---|---|---|---|---|---|"]
    for name, way in (("simple", "default training"), ("diffusion_lm", "`--objective diffusion_lm`")):
        if name in results:
            part = results[name]
            seconds = max(run["seconds"] for run in part["runs"])
            seeds = len({run["seed"] for run in part["runs"]})
            title = f"{way}, {part['runs'][0]['steps']:,} steps, at most {seconds:.0f} s, mean of {seeds} seeds"
            lines += simple_rows(results, name, title)
    for name, title in SHIPPED.items():
        if name in results:
            lines += simple_rows(results, name, title)
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
            f"`greetings`, `{g['objective']}`, {g['steps']} steps in {g['seconds']:.0f} s, {g['samples']:,} samples:",
            "",
            "| sampler | steps | every three words in a row are so in the corpus | copies of training lines | unique |",
            "|---|---|---|---|---|",
        ]
        for run in g["runs"]:
            shares = " | ".join(percent(run[name]) for name in ("in_corpus", "copies", "unique"))
            lines.append(f"| `{run['sampler']}` | {run['calls']} | {shares} |")
    if "text" in results:
        t = results["text"]
        flags = t.get("flags")  # older records lack them
        t = t | {"with_flags": f", `{flags}`" if flags else ""}
        lines += [
            "",
            f"Real text (`{t['file']}`, given as a file of one's own{t['with_flags']}), `{t['objective']}`, "
            f"{t['steps']} steps in {t['seconds'] / 60:.1f} minutes, {t['calls']} {t['sampler']}sampling steps: "
            f"{percent(t['triples'])} of the samples' word triples "
            f"occur in the {t['held_out_lines']} held-out lines; of real training lines' triples "
            f"{percent(t['triples_real'])} do. "
            f"{percent(t['copies'])} of 1,000 samples are exact copies of training lines. "
            "The first twenty, as they came:",
            "",
            "```text",
            *t["examples"],
            "```",
        ]
    shown = {
        name: results[name] for name in ("simple", "diffusion_lm", *SHIPPED, "greetings", "text") if name in results
    }
    for machine in sorted({part["machine"] for part in shown.values()}):
        names = ", ".join(name for name, part in shown.items() if part["machine"] == machine)
        lines += ["", f"Measured on {machine}: {names}."]
    return "\n".join(lines)


CURVES = {  # name in results.json, and the columns
    "simple": ("loss", *(f"cross_entropy_q{i}" for i in range(1, 5)), "grad_norm"),
    "diffusion_lm": ("loss", "mse", "tT_loss", "decoder_nll", *(f"mse_q{i}" for i in range(1, 5)), "grad_norm"),
}


def render_curve(name: str, results: dict[str, Any]) -> str:
    """The loss terms of the first run, by step, as Markdown."""
    columns = CURVES[name]
    lines = [f"| step | {' | '.join(f'`{name}`' for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in results.get(name, {}).get("curve", []):
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
        cells = (row["size"], row["batch"], row["length"], flags, f"{speed / row['batch']:.3g}", short(speed))
        lines.append(f"| {' | '.join(map(str, cells))} | {row['peak_mb']:.0f} MB |")
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def way(row: dict[str, Any]) -> str:
    """A sampler with its options."""
    options = " ".join(f"--{name} {row[name]:g}" for name in ("eta", "churn", "halt") if name in row)
    return f"`{row['sampler']}`" + (f" `{options}`" if options else "")


def render_frontier(name: str, results: dict[str, Any]) -> str:
    """Quality against calls: for every sampler and spacing, KL in bits, unique and valid share by number of calls."""
    part = results.get(name)
    if not part:
        return "Not measured yet."
    calls = sorted({row["calls"] for row in part["rows"]})
    lines = [
        f"KL in bits / unique / valid in %; {part['samples']:,} samples, seeds: {part['weights']}",
        "",
        f"| sampler | spacing | {' | '.join(f'{c} calls' for c in calls)} |",
        "|---" * (len(calls) + 2) + "|",
    ]
    cells = {(way(row), row["spacing"], row["calls"]): row for row in part["rows"]}
    for name, spacing in dict.fromkeys((way(row), row["spacing"]) for row in part["rows"]):
        found = [cells.get((name, spacing, c)) for c in calls]
        shown = [f"{r['kl_bits']:.3f} / {100 * r['unique']:.1f} / {100 * r['valid']:.2f}" if r else "" for r in found]
        lines.append(f"| {name} | {spacing} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])


def render_far(results: dict[str, Any]) -> str:
    """What few steps cost, beside 1,000."""
    part = results.get("far")
    if not part:
        return "Not measured yet."
    lines = ["| steps | slot KL, bits | unique | valid |", "|---" * 4 + "|"]
    for row in part["rows"]:
        lines.append(
            f"| {row['calls']:,} | {row['kl_bits']:.3f} | {percent(row['unique'])} | {percent(row['valid'])} |"
        )
    about = f"{part['samples']:,} samples. Measured on {part['machine']}."
    return "\n".join([*lines, "", about])


def render_speed(results: dict[str, Any]) -> str:
    """The training step and the sampler against what they are compared with."""
    lines = ["| what | ratio, median | least | most |", "|---|---|---|---|"]
    rows: list[tuple[str, dict[str, Any]]] = []
    if "step" in results:
        ms = results["step"]["ms"]
        title = f"training step against BertEncoder's ({ms['ours']:.1f} ms, {ms['BertEncoder']:.1f} ms)"
        rows.append((title, results["step"]))
    if "optimizer" in results:
        ms = results["optimizer"]["ms"]
        title = f"training step by Muon ({ms['muon']:.1f} ms) against the one by AdamW ({ms['adamw']:.1f} ms)"
        rows.append((title, results["optimizer"]))
    slow = {
        "walk": "2,000 ancestral steps of the same weights",
        "original": "2,000 steps of the original's network (BERT-base, length 50)",
        "20 calls": "without",
    }
    for row in results.get("sampling", {}).get("rows", []):
        fast = "20 calls with `--halt 3`" if row["fast"] == "halt" else row["fast"]
        rows.append((f"{fast} ({row['sentences_per_s']:.0f} sentences/s) against {slow[row['slow']]}", row))
    for title, part in rows:
        lines.append(f"| {title} | {' | '.join(short(part[name]) for name in ('ratio', 'least', 'most'))} |")
    for row in results.get("gemm", {}).get("rows", []):
        title = f"`{row['size']}`, B = {row['batch']}, L = {row['length']}: share of the matrix-product rate"
        lines.append(f"| {title} | {row['share']:.2f} | {row['least']:.2f} | {row['most']:.2f} |")
    machines = sorted(
        {results[name]["machine"] for name in ("step", "optimizer", "sampling", "gemm") if name in results}
    )
    return "\n".join([*lines, "", f"Measured on {'; '.join(machines)}."]) if machines else ""


def render_growth(results: dict[str, Any]) -> str:
    """Time and memory by dimension, with the exponents."""
    part = results.get("growth")
    if not part:
        return ""
    lines = ["| of | values | seconds a step, or MB | exponent | expected |", "|---|---|---|---|---|"]
    for row in part["rows"]:
        kind = "seconds" if "seconds" in row else "MB"
        points = ", ".join(f"{value:.3g}" for value in row[kind])
        values = ", ".join(f"{value:,}" for value in row["values"])
        lines.append(f"| {row['of']} | {values} | {kind}: {points} | {row['exponent']:.2f} | {row['expected']:g} |")
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])


CHOICES = {"simple": "choices", "animals": "choices_animals"}  # dataset, name in results.json


def render_choices(results: dict[str, Any]) -> str:
    """What other flags would do."""
    parts = {name: results[key] for name, key in CHOICES.items() if key in results}
    lines = ["| trained on | flags | calls | valid | unique | slot KL, bits | training, s |", "|---" * 7 + "|"]
    for name, part in parts.items():
        for row in part["rows"]:
            cells = (f"`{name}`", f"`{row['flags']}`" if row["flags"] else "none", row["calls"], percent(row["valid"]))
            more = (percent(row["unique"]), f"{row['kl_bits']:.3f}", row["seconds"])
            lines.append(f"| {' | '.join(map(str, (*cells, *more)))} |")
    return "\n".join([*lines, "", *(f"Measured on {part['machine']}: {name}." for name, part in parts.items())])


def render_faults(results: dict[str, Any]) -> str:
    """Runs that were killed, and those under mpiexec."""
    parts = [results[name] for name in ("faults", "faults_mpiexec") if name in results]
    return "\n\n".join(map(render_killed, parts))


def render_killed(part: dict[str, Any]) -> str:
    """One record of them."""
    moments = Counter(moment for row in part["rows"] for moment in row["kills"] if not moment.startswith("too late"))
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(row["kind"] for row in part["rows"]).items())
    short = part["planned"] - part["runs"]
    late = f" (there was no time for {short} more)" if short else ""
    lines = [
        f"{part['equal']} of {part['runs']} runs{late} of {part['steps']} steps ended with the weights, averages, "
        "optimizer and log of the run that was never killed, bit for bit, after "
        f"{moments.total()} kills in all; in each at least one came between its first checkpoint and its end "
        f"({kinds}):",
        "",
        *(f"- {count} {moment}" for moment, count in moments.most_common()),
    ]
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])


def render_parallel(results: dict[str, Any]) -> str:
    """Weak scaling, memory, checkpoints."""
    part = results.get("parallel")
    if not part:
        return ""
    lines = [
        "| run | ranks | global batch | ms a step, median | sentences/s | held by a rank, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        name = row["name"].rstrip("0123456789")
        speed = 1000 * row["batch"] / row["ms"]
        cells = (name, row["ranks"], row["batch"], f"{row['ms']:.1f}", f"{speed:.0f}", f"{row['held_mb']:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    saving = part["checkpoint"]
    lines += [
        "",
        f"FSDP2 and DDP on 2 ranks after 51 steps: weights differ by {part['difference']:.1e} (norm over norm).",
        "",
        f"A checkpoint of `--size base` ({saving['parameters'] / 1e6:.0f} M parameters, {saving['mb']:.0f} MB) stops "
        f"training for {saving['sync_s']:.2f} s with `--save_async False` and for {saving['async_s']:.2f} s without; "
        f"in the background it is written {saving['until_written_s']:.2f} s after it began (medians of 3).",
        "",
        f"Measured on {part['machine']}.",
    ]
    return "\n".join(lines)


PLACES: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "measured", render),
    ("README.md", "curve", partial(render_curve, "simple")),
    ("README.md", "curve-diffusion-lm", partial(render_curve, "diffusion_lm")),
    ("README.md", "choices", render_choices),
    ("docs/troubleshooting.md", "settings", render_settings),
    ("docs/speed.md", "frontier", partial(render_frontier, "frontier")),
    ("docs/speed.md", "frontier-diffusion-lm", partial(render_frontier, "frontier_diffusion_lm")),
    ("docs/speed.md", "far", render_far),
    ("docs/speed.md", "speed", render_speed),
    ("docs/speed.md", "growth", render_growth),
    ("README.md", "gpu", gpu_table.render),
    ("docs/distributed.md", "faults", render_faults),
    ("docs/distributed.md", "parallel", render_parallel),
    ("docs/distributed.md", "projected", projection.render),
    ("docs/control.md", "control", control_table.render),
    ("docs/control.md", "control-e2e", control_e2e_table.render),
    ("docs/evaluation.md", "animals", partial(evaluation_table.render, "animals")),
    ("docs/recipe.md", "recipe", recipe_table.render),
    ("docs/recipe.md", "distillation", distillation_table.render),
    ("docs/recipe.md", "vocabulary", recipe_table.render_vocabulary),
    ("docs/evaluation.md", "e2e", partial(evaluation_table.render, "e2e")),
    ("docs/evaluation.md", "likelihood", likelihood_table.render),
    ("docs/evaluation.md", "micro", likelihood_table.render_micro),
    ("docs/recipe.md", "posterior", posterior_table.render),
    ("docs/evaluation.md", "calibration", likelihood_table.render_calibration),
)


def write() -> None:
    """Put every table into its place."""
    kept = results()
    for file, name, renderer in PLACES:
        path = ROOT / file
        begin, end = f"<!-- {name}: written by benchmarks -->", f"<!-- /{name} -->"
        before, found, rest = path.read_text(encoding="utf-8").partition(begin)
        if not found:
            raise SystemExit(f"{file}: expected the mark {begin}, found none")
        path.write_text(f"{before}{begin}\n{renderer(kept)}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
