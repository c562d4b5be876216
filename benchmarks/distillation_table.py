"""The table of docs/recipe.md about students: a row a writer, quality against network calls, 95 % intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

from common import line
from recipe_table import MOST_OF_TEXT, interval, sampled

CALLS = (1, 2, 4, 8, 16, 32)


class Column(NamedTuple):
    """A figure at a number of calls."""

    head: str
    key: str
    calls: int
    factor: float
    places: int

    @property
    def unit(self) -> str:
        """After the number."""
        return " %" if self.factor == 100 else ""


KNOWN = (
    *(Column(f"valid at {calls}", "valid", calls, 100, 2) for calls in CALLS),
    *(Column(f"slot KL at {calls}", "kl_bits", calls, 1, 3) for calls in (1, 2, 4, 32)),
    *(Column(head, key, 4, 100, 2) for head, key in (("unique at 4", "unique"), ("novel", "novel"))),
)
OF_TEXT = (
    *(Column(f"word triples at {calls}", "js_3", calls, 1, 3) for calls in (1, 4, 8, 32)),
    *(Column(f"MAUVE at {calls}", "mauve", calls, 1, 3) for calls in (1, 4, 8, 32)),
    *(Column(head, key, 32, 100, 1) for head, key in (("unique at 32", "unique"), ("novel", "novel"))),
)


def render(kept: dict[str, Any]) -> str:
    """A table for each language."""
    part = kept.get("distillation")
    if not part:
        return "Not measured yet."
    lines: list[str] = []
    for dataset in dict.fromkeys(row["dataset"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["dataset"] == dataset]
        is_known = "valid" in rows[0]["samplings"][0]
        columns = KNOWN if is_known else OF_TEXT
        heads = ["writer", "seeds", "steps", "processor time, s", *(column.head for column in columns)]
        count = rows[0]["samples"] if is_known else min(rows[0]["samples"], MOST_OF_TEXT)
        lines += [f"`{dataset}`, {count:,} samples:", "", line(*heads), "|---" * len(heads) + "|"]
        for writer in dict.fromkeys(row["writer"] for row in rows):
            own = [row for row in rows if row["writer"] == writer]
            cells = [sampled(own, column.calls, column.key, column.factor, column.places) for column in columns]
            about = [f"{sum(row[name] for row in own) / len(own):,.0f}" for name in ("steps", "cpu_seconds")]
            lines.append(line(writer, len(own), *about, *cells))
        best = {"valid": 1.0} | part["ideal"][dataset]
        cells = [interval([c.factor * best[c.key]], c.places, c.unit) if c.key in best else "" for c in columns]
        lines += [line("*an ideal sampler*" if is_known else "*held-out lines*", "", "", "", *cells), ""]
    machines = dict.fromkeys(row["machine"] for row in part["rows"])
    return "\n".join([*lines, f"Measured on {'; '.join(machines)}, beside other work."])
