"""The table of docs/recipe.md: one row a way of training, means over the seeds."""

from __future__ import annotations

from typing import Any

VALID_AT, ELSE_AT = (2, 4, 8, 32), 16  # network calls


def render(results: dict[str, Any]) -> str:
    """A table for each language."""
    part = results.get("recipe")
    if not part:
        return ""
    lines: list[str] = []
    for dataset in dict.fromkeys(row["dataset"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["dataset"] == dataset]
        valid = " | ".join(f"valid at {calls}" for calls in VALID_AT)
        lines += [
            f"`{dataset}`, {rows[0]['steps']} steps of training, {rows[0]['samples']:,} samples:",
            "",
            f"| way | seeds | {valid} | slot KL at 2 | at {ELSE_AT} | unique | novel | bound over the truth, bits |",
            "|---" * (len(VALID_AT) + 7) + "|",
        ]
        for way in dict.fromkeys(row["way"] for row in rows):
            lines.append(line(way, [row for row in rows if row["way"] == way]))
        best = part["ideal"][dataset]
        lines += [
            f"| *an ideal sampler* | |{' |' * len(VALID_AT)} | | {share(best['unique'])} | {share(best['novel'])} | |"
        ]
        lines += ["", *fit([row for row in rows if row["way"] == "cross_entropy"])]
    lines += [f"Measured on {part['rows'][-1]['machine']}, beside other work."]
    return "\n".join(lines)


def line(way: str, rows: list[dict[str, Any]]) -> str:
    """The means of a way, with the spread of the seeds where there are several."""

    def figure(calls: int, name: str) -> list[float]:
        return [one[name] for row in rows for one in row["samplings"] if one["calls"] == calls]

    gaps = [row["bound"] - row["true"] for row in rows]
    true = sum(row["true"] for row in rows) / len(rows)
    cells = [
        way if " " in way else f"`{way}`",
        str(len(rows)),
        *(share(mean(figure(calls, "valid"))) for calls in VALID_AT),
        f"{mean(figure(VALID_AT[0], 'kl_bits')):.3f}",
        f"{mean(figure(ELSE_AT, 'kl_bits')):.3f}",
        share(mean(figure(ELSE_AT, "unique"))),
        share(mean(figure(ELSE_AT, "novel"))),
        f"{mean(gaps):.2f} ({100 * mean(gaps) / true:.1f} %)",
    ]
    return f"| {' | '.join(cells)} |"


def fit(rows: list[dict[str, Any]]) -> list[str]:
    """How linear time is, and how the embeddings lie."""
    if not rows:
        return []
    least = {name: min(row[name] for row in rows) for name in ("r_squared", "embedding_rank", "embedding_angle")}
    return [
        f"`cross_entropy`: R² of the cross-entropy against the fitted time at least {least['r_squared']:.4f}; "
        f"effective rank of the embeddings at least {least['embedding_rank']:.1f}; the two nearest words at least "
        f"{least['embedding_angle']:.0f}° apart.",
        "",
    ]


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def share(value: float) -> str:
    """A percentage."""
    return f"{100 * value:.2f} %"


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
