"""The tables of docs/recipe.md about the exact posterior of a language that is known."""

from __future__ import annotations

from typing import Any

from common import percent


def render(results: dict[str, Any]) -> str:
    """Nats a sentence at each level, and sentences with the posterior in the model's place at some."""
    part = results.get("posterior")
    if not part:
        return "Not measured yet."
    levels = part["levels"]
    lines = [
        "| λ | " + " | ".join(f"{row['level']:g}" for row in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
        "| the exact posterior, nats a sentence | " + " | ".join(f"{row['exact']:.2f}" for row in levels) + " |",
        "| the model | " + " | ".join(f"{row['model']:.2f}" for row in levels) + " |",
        "",
        f"| the exact posterior in the model's place, {part['calls']} calls | valid | slot KL |",
        "|---|---|---|",
    ]
    lines += [
        f"| {where(*row['between'])} | {percent(row['valid'])} | {row['kl_bits']:.3f} |" for row in part["sampled"]
    ]
    about = f"{part['lines']:,} held-out lines of `animals`, {part['samples']:,} samples"
    return "\n".join([*lines, "", f"{about}. Measured on {part['machine']}."])


def where(low: float, high: float) -> str:
    """Between two levels, in words; levels far beyond all mean no border."""
    below, above = f"{low:g}", f"{high:g}"
    if low == high:
        return "nowhere"
    if abs(low) > 50 and abs(high) > 50:
        return "everywhere"
    if abs(low) > 50:
        return f"λ < {above}"
    return f"λ > {below}" if abs(high) > 50 else f"{below} < λ < {above}"
