"""The table of docs/recipe.md about students: one row a writer, quality against network calls."""

from __future__ import annotations

from typing import Any

from common import line, percent

CALLS = (1, 2, 4, 8, 16, 32)
KL_AT = (1, 2, 4, 32)


def render(kept: dict[str, Any]) -> str:
    """A table for each language."""
    part = kept.get("distillation")
    if not part:
        return "Not measured yet."
    lines: list[str] = []
    for dataset in dict.fromkeys(row["dataset"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["dataset"] == dataset]
        heads = [*(f"valid at {calls}" for calls in CALLS), *(f"slot KL at {calls}" for calls in KL_AT)]
        heads = ["writer", "steps", "processor time, s", *heads, "unique at 4", "novel"]
        lines += [f"`{dataset}`, {rows[0]['samples']:,} samples:", "", line(*heads), "|---" * len(heads) + "|"]
        for row in rows:
            by_calls = {one["calls"]: one for one in row["samplings"]}
            cells = [f"{100 * by_calls[calls]['valid']:.2f} %" for calls in CALLS]
            cells += [f"{by_calls[calls]['kl_bits']:.3f}" for calls in KL_AT]
            cells += [percent(by_calls[4][name]) for name in ("unique", "novel")]
            lines.append(line(row["writer"], f"{row['steps']:,}", f"{row['cpu_seconds']:.0f}", *cells))
        best = part["ideal"][dataset]
        cells = ["", ""] + ["100 %"] * len(CALLS) + [f"{best['kl_bits']:.3f}"] * len(KL_AT)
        lines += [line("*an ideal sampler*", *cells, percent(best["unique"]), percent(best["novel"])), ""]
    machines = dict.fromkeys(row["machine"] for row in part["rows"])
    return "\n".join([*lines, f"Measured on {'; '.join(machines)}, beside other work."])
