"""The tables of docs/evaluation.md about likelihood."""

from __future__ import annotations

from typing import Any

from text_diffusion.calibration import QUARTERS

TITLES = {
    "exact": "{objective}, exact",
    "bound": "{objective}, bound{steps}",
    "importance_sampled": "{objective}, {paths} paths together{steps}",
}


def render(results: dict[str, Any]) -> str:
    """Bits of each model, corpus by corpus."""
    parts = [
        corpus(name, results[f"likelihood-{name}"]) for name in ("simple", "animals") if f"likelihood-{name}" in results
    ]
    return "\n\n".join(parts) or "Not measured yet."


def corpus(name: str, part: dict[str, Any]) -> str:
    """The table of one corpus."""
    language, models = part["language"], part["models"]
    rows = [("the language itself", language["true"]), ("slots counted in the training text", language["counted"])]
    terms = []
    for objective, model in models.items():
        found = model["rows"]
        steps = f" ({model['steps']:,} steps)" if model.get("steps") else ""
        rows += [
            (title.format(objective=f"`{objective}`", paths=model["paths"], steps=steps), found[key])
            for key, title in TITLES.items()
            if key in found
        ]
        if "kl" in found:
            names = ("reconstruction", "kl", "prior")
            each = (f"{key} {found[key]['bits']:.3f} ± {found[key]['error']:.3f}" for key in names)
            terms.append(f"`{objective}` " + ", ".join(each))
    lines = [
        f"| `{name}`, {part['lines']} held-out lines | bits a line | a token | above the truth |",
        "|---" * 4 + "|",
    ]
    for title, row in rows:
        bits, above = f"{row['bits']:.3f} ± {row['error']:.3f}", "-"
        if row is not language["true"]:
            share = row["above"] / language["true"]["bits"]
            above = f"{row['above']:+.3f} ± {row['above_error']:.3f} ({share:+.1%})"
        lines.append(f"| {title} | {bits} | {row['bits'] / part['tokens']:.4f} | {above} |")
    machines = sorted({model["machine"] for model in models.values()})
    below = (
        f"Terms of the bounds, bits a line: {'; '.join(terms)}. Entropy of the language: {part['entropy']:.2f} bits."
    )
    return "\n".join([*lines, "", f"{below} Measured on {'; '.join(machines)}."])


def render_micro(results: dict[str, Any]) -> str:
    """What the probabilities of all sentences sum to."""
    part = results.get("likelihood-micro")
    if not part:
        return "Not measured yet."
    lines = ["| -log2 P(w) by | sum of P(w) over all 1,296 sentences | its mean, bits |", "|---|---|---|"]
    titles = {
        "whole": "the flow, the whole trace",
        "left_out": "the flow, self-conditioning path left out of the trace",
        "bound": "the bound of a walk of 30 ancestral steps",
        "together": "all paths of that walk together",
    }
    for key, row in part["rows"].items():
        title = titles[key]
        lines.append(f"| {title} | {row['sum']:.4f} ± {row['error']:.4f} | {row['bits']:.3f} |")
    lines += ["", f"{part['draws']} draws or paths a sentence; the language's entropy is {part['entropy']:.3f} bits. "]
    lines[-1] += f"Measured on {part['machine']}."
    return "\n".join(lines)


def render_calibration(results: dict[str, Any]) -> str:
    """By quarters of t, how sure and how right."""
    part = results.get("calibration-simple")
    if not part:
        return "Not measured yet."
    models = sorted(part["models"].items())
    heads = [f"`{name}`: {head}" for name, _ in models for head in ("mean confidence", "stay", "off by")]
    lines = ["| `simple`, quarter of t | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for number in range(QUARTERS, 0, -1):
        noise = {1: " (least noise)", QUARTERS: " (most noise)"}.get(number, "")
        rows = [found["rows"][number - 1] for _, found in models]
        shares = " | ".join(f"{100 * row[key]:.1f} %" for row in rows for key in ("confidence", "stays", "error"))
        lines.append(f"| {number}{noise} | {shares} |")
    machines = dict.fromkeys(found["machine"] for _, found in models)
    counts = [row["words"] for _, found in models for row in found["rows"]]
    words = f"{part['sentences']:,} sentences, {min(counts):,} to {max(counts):,} words a quarter."
    return "\n".join([*lines, "", f"{words} Measured on {'; '.join(machines)}."])
