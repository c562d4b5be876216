"""The table about students, of rows made by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import distillation_table
import recipe_table


def row(writer: str, seed: int, dataset: str, figure: str, value: float) -> dict[str, Any]:
    shares = {"unique": 0.75, "novel": 0.5}
    kl = {"kl_bits": 0.125} if figure == "valid" else {"mauve": 0.25}
    samplings = [{"calls": calls, figure: value + calls / 1000, **shares, **kl} for calls in distillation_table.CALLS]
    about = {"writer": writer, "seed": seed, "dataset": dataset, "steps": 10 * seed, "cpu_seconds": 100.0 * seed}
    return about | {"samples": 5000, "machine": f"machine {seed}", "samplings": samplings}


def cells(table: str, first: str) -> list[str]:
    found = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_seeds_are_one_row_with_an_interval() -> None:
    rows = [row("teacher", 2, "toy", "valid", 0.5), row("student", 1, "toy", "valid", 0.5)]
    rows.append(row("student", 3, "toy", "valid", 0.75))
    part = {"rows": rows, "ideal": {"toy": {"kl_bits": 0.0625, "unique": 0.875, "novel": 0.25}}}
    table = distillation_table.render({"distillation": part})
    assert "`toy`, 5,000 samples:" in table
    assert "Measured on machine 2; machine 1; machine 3, beside other work." in table
    heads = cells(table, "writer")
    of_student = dict(zip(heads, cells(table, "student"), strict=True))
    assert [of_student[head] for head in ("seeds", "steps", "processor time, s")] == ["2", "20", "200"]
    assert of_student["valid at 32"] == recipe_table.interval([53.2, 78.2], 2, " %")
    assert dict(zip(heads, cells(table, "teacher"), strict=True))["valid at 4"] == "50.40 %"
    ideal = dict(zip(heads, cells(table, "*an ideal sampler*"), strict=True))
    assert [ideal[head] for head in ("valid at 1", "slot KL at 4", "unique at 4")] == ["100.00 %", "0.062", "87.50 %"]


def test_of_a_text_word_triples_and_mauve() -> None:
    part = {"rows": [row("student", 1, "text", "js_3", 0.5)], "ideal": {"text": {"js_3": 0.25}}}
    table = distillation_table.render({"distillation": part})
    assert f"`text`, {recipe_table.MOST_OF_TEXT:,} samples:" in table
    heads = cells(table, "writer")
    student = dict(zip(heads, cells(table, "student"), strict=True))
    assert [student[head] for head in ("word triples at 8", "MAUVE at 8", "novel")] == ["0.508", "0.250", "50.0 %"]
    real = dict(zip(heads, cells(table, "*held-out lines*"), strict=True))
    assert [real[head] for head in ("word triples at 1", "MAUVE at 1")] == ["0.250", ""]


@pytest.mark.parametrize("kept", [{}, {"distillation": None}])
def test_nothing_was_measured(kept: dict[str, Any]) -> None:
    assert distillation_table.render(kept) == "Not measured yet."
