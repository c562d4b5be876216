"""The table of docs/recipe.md about students: a row a writer, quality against network calls, 95 % intervals."""

from __future__ import annotations

from typing import Any

from common import line, percent
from recipe_table import sampled

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
        heads = ["writer", "seeds", "steps", "processor time, s", *heads, "unique at 4", "novel"]
        lines += [f"`{dataset}`, {rows[0]['samples']:,} samples:", "", line(*heads), "|---" * len(heads) + "|"]
        for writer in dict.fromkeys(row["writer"] for row in rows):
            own = [row for row in rows if row["writer"] == writer]
            cells = [sampled(own, calls, "valid", 100, 2) for calls in CALLS]
            cells += [sampled(own, calls, "kl_bits", 1, 3) for calls in KL_AT]
            cells += [sampled(own, 4, name, 100, 2) for name in ("unique", "novel")]
            about = [f"{sum(row[name] for row in own) / len(own):,.0f}" for name in ("steps", "cpu_seconds")]
            lines.append(line(writer, len(own), *about, *cells))
        best = part["ideal"][dataset]
        cells = ["", "", ""] + ["100 %"] * len(CALLS) + [f"{best['kl_bits']:.3f}"] * len(KL_AT)
        lines += [line("*an ideal sampler*", *cells, percent(best["unique"]), percent(best["novel"])), ""]
    machines = dict.fromkeys(row["machine"] for row in part["rows"])
    return "\n".join([*lines, f"Measured on {'; '.join(machines)}, beside other work."])
