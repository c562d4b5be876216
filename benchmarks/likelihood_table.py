"""The tables of docs/evaluation.md about likelihood."""

from __future__ import annotations

from typing import Any


def render(results: dict[str, Any]) -> str:
    """Bits of each model, corpus by corpus."""
    titles = {
        "true": "the language itself",
        "counted": "slots counted in the training text",
        "autoregressive": "autoregressive, exact",
        "bound": "diffusion, bound of the walk",
        "importance_sampled": "diffusion, {paths} paths together",
    }
    lines = []
    for name in ("simple", "animals"):
        part = results.get(f"likelihood-{name}")
        if not part:
            continue
        lines.append(f"| `{name}`, {part['lines']} held-out lines | bits a line | a token | above the truth |")
        lines.append("|---" * 4 + "|")
        truth = part["rows"]["true"]["bits"]
        for key, title in titles.items():
            if key not in part["rows"]:
                continue
            row = part["rows"][key]
            above = f"{row['above']:+.3f} ± {row['above_error']:.3f} ({row['above'] / truth:+.1%})"
            bits = f"{row['bits']:.3f} ± {row['error']:.3f}"
            cells = (title.format(paths=part["paths"]), bits, f"{row['per_token']:.4f}")
            lines.append(f"| {' | '.join(cells)} | {'-' if key == 'true' else above} |")
        terms = ", ".join(f"{key} {part['rows'][key]['bits']:.3f}" for key in ("reconstruction", "kl", "prior"))
        lines += ["", f"Terms of the bound, bits a line: {terms}. Entropy of the language: {part['entropy']:.2f} bits."]
        lines += [f"Measured on {part['machine']}.", ""]
    return "\n".join(lines).rstrip() or "Not measured yet."


def render_micro(results: dict[str, Any]) -> str:
    """What the probabilities of all sentences sum to."""
    part = results.get("likelihood-micro")
    if not part:
        return "Not measured yet."
    lines = ["| trace | sum of P(w) over all 1,296 sentences | mean of -log2 P, bits |", "|---|---|---|"]
    for key, title in (("whole", "whole"), ("left_out", "self-conditioning path left out")):
        row = part["rows"][key]
        lines.append(f"| {title} | {row['sum']:.4f} ± {row['error']:.4f} | {row['bits']:.3f} |")
    lines += ["", f"{part['draws']} draws a sentence; the language's entropy is {part['entropy']:.3f} bits. "]
    lines[-1] += f"Measured on {part['machine']}."
    return "\n".join(lines)


def render_calibration(results: dict[str, Any]) -> str:
    """By quarters of t, how sure and how right."""
    part = results.get("calibration-simple")
    if not part:
        return "Not measured yet."
    lines = ["| `simple`, quarter of t | words | mean confidence | stay | off by |", "|---" * 5 + "|"]
    for number, row in reversed(list(enumerate(part["rows"], 1))):
        noise = {1: " (least noise)", 4: " (most noise)"}.get(number, "")
        shares = " | ".join(f"{100 * row[key]:.1f} %" for key in ("confidence", "stays", "error"))
        lines.append(f"| {number}{noise} | {row['words']:,} | {shares} |")
    return "\n".join([*lines, "", f"Measured on {part['machine']}."])
