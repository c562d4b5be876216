"""The tables of docs/evaluation.md: every sampler by the most telling figures, then who beats whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = ("valid", "novel", "unique", "self_bleu", "js_2", "length", "mauve", "energy", "perplexity")


def render(corpus: str, results: dict[str, Any]) -> str:
    """One row a sampler, and one for the bar; then who beats whom."""
    part = results.get(f"evaluation-{corpus}")
    if not part:
        return "Not measured yet."
    judged = part["results"]
    first = next(iter(judged.values()))["figures"]  # copies of real lines, of which every figure can be taken
    keys = [key for key in SHOWN if key in first]
    lines = [f"| {part['samples']:,} lines of | {' | '.join(f'`{key}`' for key in keys)} | worse on |"]
    lines += ["|---" * (len(keys) + 2) + "|"]
    bars = [cell(first[key], first[key]["ideal"] or first[key]["real"]) for key in keys]
    lines += [f"| *the bar* | {' | '.join(f'*{bar}*' for bar in bars)} | |"]
    for name, result in judged.items():
        found = result["figures"]
        cells = [cell(found[key], found[key]["samples"], True) if key in found else "-" for key in keys]
        count = f"{len(result['worse'])} of {len(result['figures'])}"
        lines.append(f"| {name} | {' | '.join(cells)} | {count} |")
    lines += [""]
    for cheat, won in part["better"].items():
        lines.append(
            f"- {cheat}: better than the model on {names(won['cheat'])}, the model better on {names(won['model'])}."
        )
    slowest = max(result["seconds"] for result in judged.values())
    if part.get("written", part["samples"]) != part["samples"]:
        lines += ["", f"The trained models wrote {part['written']:,} lines each."]
    lines += ["", f"The whole suite took at most {slowest:.0f} s a text. Measured on {part['machine']}."]
    return "\n".join(lines)


def cell(figure: dict[str, Any], estimate: dict[str, float] | None, mark: bool = False) -> str:
    """A value, in bold where it is worse than the bar."""
    if estimate is None:
        return "-"
    value = estimate["value"]
    text = f"{100 * value:.1f} %" if figure["unit"] == "share" else f"{value:.3g}"
    return f"**{text}**" if mark and figure["worse"] else text


def names(keys: Sequence[str]) -> str:
    """Keys in a row."""
    return ", ".join(f"`{key}`" for key in keys) or "nothing"
