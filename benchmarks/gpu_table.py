"""The table of a GPU in README.md."""

from __future__ import annotations

from typing import Any

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, SXM


def render(results: dict[str, Any]) -> str:
    """Training and sampling, and the machine."""
    part = results.get("gpu")
    if not part:
        return "Not measured yet."
    about, gemm, copy = part["about"], part["ceilings"]["gemm_flops_per_s"], part["ceilings"]["copy_bytes_per_s"]
    sheet = next((rate for name, rate in DATA_SHEET.items() if name in about["device"]), None)
    lines = [
        "| training | batch | L | ms | tokens/s | TFLOP/s | of the product's rate | MFU (data sheet) | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in part["training"]:
        rate, peak = row["flops_per_s"], row["peak_gib"]
        cells = (
            name_of(row),
            row["batch"],
            row["length"],
            f"{row['ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{rate / 1e12:.3g}",
            f"{rate / gemm:.1%}",
            f"{rate / sheet:.1%}" if sheet else "-",
            f"{peak:.1f}" if peak else "-",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| sampling | batch | L | calls | eager, sentences/s | graphed |", "|---|---|---|---|---|---|"]
    for row in part["sampling"]:
        graphed = f"{row['graphed_per_s']:,.0f}" if "graphed_per_s" in row else "-"
        shape = f"{name_of(row)} | {row['batch']} | {row['length']} | {row['calls']}"
        lines.append(f"| {shape} | {row['eager_per_s']:,.0f} | {graphed} |")
    machine = f"{about['device']}, Python {about['python']}, PyTorch {about['torch']}"
    lines += [
        "",
        f"A copy moves {copy / 1e9:,.0f} GB/s, a large matrix product makes {gemm / 1e12:.0f} TFLOP/s. Measured on "
        f"{machine}, {about['date']}, commit {about['commit']}.",
    ]
    return "\n".join([*lines, *(f"Left out: {reason}." for reason in part["left_out"])])


def name_of(row: dict[str, Any]) -> str:
    """Size, objective, optimizer; `bf16` and `compiled` if it is that."""
    words = [row["size"], f"`{row['objective']}`", row.get("optimizer", ""), row.get("precision", "")]
    return " ".join(filter(None, [*words, "compiled" if row.get("compile") else ""]))
