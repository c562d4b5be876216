"""The tables of docs/control.md."""

from __future__ import annotations

from typing import Any

PARTS = ("labels", "words", "infilling", "composed", "group", "learned")
TITLES = {
    "labels": "Each of the 10 colours, by a classifier",
    "words": "Each of the 10 colours, by words",
    "infilling": "Infilling",
    "composed": "Colour, state and length at once, 10 pairs drawn at random",
    "group": "{red, blue, green, white} as one label",
    "learned": "Each of the 10 colours, by a model that learned them (classifier-free guidance above scale 1)",
}


def render(results: dict[str, Any]) -> str:
    """Success, validity, the other slots' KL and time, as Markdown."""
    lines = [
        "| by | samples | steps | valid and obeyed | lowest | valid "
        "| KL of the other slots, bits (an ideal sampler) | ms a sentence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    machines = []
    for part in PARTS:
        figures = results.get(f"control_{part}")
        if not figures:
            continue
        machines.append(f"{part}: {figures['machine']}")
        lines.append(f"| **{TITLES[part]}** | | | | | | | |")
        most = max(row["samples"] for row in figures["rows"])  # what `ideal_kl` is for; it goes with 1 / samples
        for row in figures["rows"]:
            obeyed = "" if row["name"] == "none" else f"{row['obeyed']:.2%} | {row['lowest']:.1%}"
            lines.append(
                f"| {row['name']} | {row['samples']:,} | {row['steps']} | {obeyed or ' | '} | {row['valid']:.2%} | "
                f"{row['kl_bits']:.3f} ({figures['ideal_kl'] * most / row['samples']:.3f}) | {row['ms']:.1f} |"
            )
    kept = [row["kept"] for row in results.get("control_infilling", {"rows": []})["rows"] if "kept" in row]
    known = [f"Known words of the templates are kept in {min(kept):.2%} of the sentences.", ""] if kept else []
    return "\n".join([*lines, "", *known, *(f"Measured on {machine}." for machine in machines)])
