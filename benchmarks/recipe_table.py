"""The tables of docs/recipe.md: one row a way of training, means over the seeds with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import line, percent

CALLS, ELSE_AT = (2, 4, 8, 16, 32), 16  # network calls
MOST_OF_TEXT = 2000  # samples of a language that is not known
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t of 1, 2, ... degrees of freedom


def render(results: dict[str, Any]) -> str:
    """A table for each language, and one for each text."""
    part = results.get("recipe", {"rows": []})
    all_rows = [row for row in part["rows"] if "code" in row]  # not those of an older form
    if not all_rows:
        return "Not measured yet."
    lines: list[str] = []
    exact_first = sorted(all_rows, key=lambda row: "true" not in row)
    for dataset in dict.fromkeys(row["dataset"] for row in exact_first):
        rows = [row for row in all_rows if row["dataset"] == dataset]
        samples = rows[0]["samples"] if "true" in rows[0] else min(rows[0]["samples"], MOST_OF_TEXT)
        lines += [
            f"`{dataset}`, the time of {rows[0]['budget']:,} steps of `cross_entropy` for each, {samples:,} samples:",
            "",
            *(exact if "true" in rows[0] else of_text)(rows, part["ideal"][dataset]),
            "",
            *about(rows),
        ]
    machines = dict.fromkeys(row["machine"] for row in all_rows)
    return "\n".join([*lines, f"Measured on {'; '.join(machines)}, beside other work."])


def exact(rows: list[dict[str, Any]], best: dict[str, float]) -> list[str]:
    """Of a language that is known."""
    heads = [f"valid at {calls}" for calls in CALLS]
    heads += ["slot KL at 4", f"at {ELSE_AT}", f"unique at {ELSE_AT}", "novel", "bits over the truth"]
    lines = [line("way", "seeds", "steps", *heads), "|---" * (len(heads) + 3) + "|"]
    for way, own in by_way(rows):
        gaps, true = [row["bound"] - row["true"] for row in own], own[0]["true"]
        cells = [sampled(own, calls, "valid", 100, 2) for calls in CALLS]
        cells += [sampled(own, calls, "kl_bits", 1, 3) for calls in (4, ELSE_AT)]
        cells += [sampled(own, ELSE_AT, name, 100, 2) for name in ("unique", "novel")]
        share = f" ({100 * sum(gaps) / len(gaps) / true:.1f} %)"
        lines.append(line(way, len(own), f"{own[0]['steps']:,}", *cells, interval(gaps, 2) + share))
    cells = ["" for _ in CALLS] + ["", f"{best['kl_bits']:.3f}", percent(best["unique"]), percent(best["novel"]), ""]
    return [*lines, line("*an ideal sampler*", "", "", *cells)]


def of_text(rows: list[dict[str, Any]], best: dict[str, float]) -> list[str]:
    """Of a text."""
    at = (4, 8, 32)
    heads = ["bits a token", *(f"word triples at {calls}" for calls in at), *(f"MAUVE at {calls}" for calls in at)]
    heads += [f"unique at {at[-1]}", "novel"]
    lines = [line("way", "seeds", "steps", *heads), "|---" * (len(heads) + 3) + "|"]
    for way, own in by_way(rows):
        cells = [interval([row["per_token"] for row in own], 3)]
        cells += [sampled(own, calls, name, 1, 3) for name in ("js_3", "mauve") for calls in at]
        cells += [sampled(own, at[-1], name, 100, 1) for name in ("unique", "novel")]
        lines.append(line(way, len(own), f"{own[0]['steps']:,}", *cells))
    shown = [f"{best[name]:.3f}" if name in best else "" for name in ("js_3", "mauve")]
    shares = [percent(best[name]) if name in best else "" for name in ("unique", "novel")]
    cells = ["", "", "", shown[0], "", "", shown[1], *shares]
    return [*lines, line("*held-out lines*", "", "", *cells)]


def by_way(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each way, under its title."""
    ways = dict.fromkeys(row["way"] for row in rows)
    return [(way if " " in way else f"`{way}`", [row for row in rows if row["way"] == way]) for way in ways]


def sampled(rows: Sequence[dict[str, Any]], calls: int, name: str, factor: float, places: int) -> str:
    """A figure of samples at a number of calls; a way that has one number only stands in one of the columns."""
    values = [one[name] for row in rows for one in row["samplings"] if one["calls"] == calls and name in one]
    note = ""
    for only in (row["samplings"][0] for row in rows if row.get("way") == "autoregressive"):
        above = min((shown for shown in CALLS if shown >= only["calls"]), default=CALLS[-1])
        if calls == {"valid": above, "js_3": CALLS[-1], "mauve": CALLS[-1]}.get(name, calls if calls >= ELSE_AT else 0):
            values.append(only[name])
            note = f" ({only['calls']} calls)"
    unit = " %" if factor == 100 else ""
    return interval([factor * value for value in values], places, unit) + note if values else ""


def interval(values: Sequence[float], places: int, unit: str = "") -> str:
    """The mean, and how far the 95 % interval reaches, if there are several seeds."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return f"{mean:.{places}f}{unit}"
    deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    return f"{mean:.{places}f} ± {T95[min(n, len(T95) + 1) - 2] * deviation / n**0.5:.{places}f}{unit}"


def about(rows: list[dict[str, Any]]) -> list[str]:
    """How long it took, and of `cross_entropy` how linear time is and how the embeddings lie."""
    if "walk" in rows[0]:  # of recipe_gpu.py
        seconds = [row["seconds"] for row in rows]
        return [
            f"All at once, {min(seconds):.0f} to {max(seconds):.0f} s of training. The bound is that of "
            f"{rows[0]['lines']} lines and a walk of {rows[0]['walk']} steps.",
            "",
        ]
    seconds = [row["cpu_seconds"] for row in rows]
    lines = [f"Processor time of the training commands: {min(seconds):.0f} to {max(seconds):.0f} s, on one thread."]
    ours = [row for row in rows if row["way"] == "cross_entropy" and "r_squared" in row]
    if ours:
        least = {name: min(row[name] for row in ours) for name in ("r_squared", "embedding_rank", "embedding_angle")}
        lines[0] += (
            f" `cross_entropy`: R² of the cross-entropy against the fitted time at least {least['r_squared']:.4f}; "
            f"effective rank of the embeddings at least {least['embedding_rank']:.1f}; the two nearest words at least "
            f"{least['embedding_angle']:.0f}° apart."
        )
    return [*lines, ""]


def render_vocabulary(results: dict[str, Any]) -> str:
    """Memory of a step with a large vocabulary."""
    part = results.get("vocabulary")
    if not part:
        return ""
    chunked, whole = part["rows"]["chunked"], part["rows"]["whole"]
    about = f"{part['V']:,} words, batch {part['B']}, L = {part['L']}, default size"
    peaks = [f"{row['seconds']:.1f} s and the process {row['peak_mb']:.0f} MB at its peak" for row in (chunked, whole)]
    return (
        f"{about}: a step takes {peaks[0]} ({chunked['before_mb']:.0f} MB before the first); with all scores at once "
        f"{peaks[1]}. Measured on {part['machine']}."
    )
