"""The tables of the recipe: means, intervals and where a figure stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import recipe_table


def row(way: str, seed: int, valid: float, calls: tuple[int, ...] = recipe_table.CALLS) -> dict[str, Any]:
    sampled = {"valid": valid, "kl_bits": 0.25, "unique": 0.75, "novel": 0.5}
    return {
        "way": way, "dataset": "simple", "seed": seed, "code": "abc", "budget": 4000, "samples": 100, "steps": 3000,
        "cpu_seconds": 60.0, "bound": 17.0, "true": 16.0, "machine": "a machine",
        "samplings": [{"calls": number, **sampled} for number in calls],
    }  # fmt: skip


def cells_of(way: str, *rows: dict[str, Any]) -> list[str]:
    best = {"unique": 0.8, "novel": 0.6, "kl_bits": 0.01}
    table = recipe_table.render({"recipe": {"rows": list(rows), "ideal": {"simple": best}}})
    line = next(line for line in table.splitlines() if line.startswith(f"| {way} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_student_s(n: int) -> None:
    values = [1.0, 2.0, 4.0, 7.0, 3.0, 5.0, 6.0, 2.5, 3.5, 4.5][:n]
    error = stats.t.interval(0.95, n - 1, loc=0, scale=stats.sem(values))[1]
    assert recipe_table.interval(values, 3) == f"{sum(values) / n:.3f} ± {error:.3f}"


def test_seeds_are_put_together() -> None:
    cells = cells_of("`masked`", row("masked", 1, 0.90), row("masked", 2, 0.92), row("other", 1, 0.1))
    assert cells[:4] == ["`masked`", "2", "3,000", "91.00 ± 12.71 %"]
    assert cells[-1] == "1.00 ± 0.00 (6.2 %)"
    assert cells_of("`masked`", row("masked", 1, 0.9))[3] == "90.00 %"


def test_a_way_with_one_number_of_calls_stands_where_that_is() -> None:
    cells = cells_of("`autoregressive`", row("autoregressive", 1, 0.9, calls=(7,)))
    assert cells[3:8] == ["", "", "90.00 % (7 calls)", "", ""]
    assert cells[8:12] == ["", "0.250 (7 calls)", "75.00 % (7 calls)", "50.00 % (7 calls)"]


def test_rows_of_an_older_form_are_left_out() -> None:
    old = {"way": "cross_entropy", "dataset": "simple", "seed": 1, "steps": 4000}
    assert recipe_table.render({"recipe": {"rows": [old], "ideal": {}}}) == "Not measured yet."
