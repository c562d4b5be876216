"""How time and memory of a training step grow with B, L, V and layers, and those of sampling with STEPS.

python benchmarks/growth.py        the table in docs/speed.md and docs/growth.png (needs the extra `viz`)
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib
import table
import torch
from common import ROOT, record
from speed import alternately, sizes, stepper

matplotlib.use("Agg")
from matplotlib import pyplot

from text_diffusion.generation import load_diffusion
from text_diffusion.memory import keep_freed_memory

BASE_SHAPE = {"batch": 64, "length": 32, "vocab": 1000, "layers": 3}
SAMPLING_STEPS = (5, 10, 20, 40, 80)
# values, and the exponents of time and memory to expect at their end
GROWTH: dict[str, tuple[Sequence[int], tuple[float, float]]] = {
    "batch": ((32, 64, 128, 256), (1.0, 1.0)),
    "length": ((16, 32, 64, 128, 256), (1.0, 1.0)),  # the square of attention is small until L nears H
    "vocab": ((1000, 4000, 16_000, 64_000), (1.0, 1.0)),  # the logits of decoder_nll
    "layers": ((3, 6, 12, 24), (1.0, 1.0)),
}


def growth_point(shape: dict[str, int]) -> tuple[float, float]:
    """Seconds a step, and peak memory in MB, of a process of its own."""
    keep_freed_memory()
    torch.manual_seed(0)
    config = replace(sizes("small"), num_layers=shape["layers"])
    once = stepper(config, shape["batch"], shape["length"], shape["vocab"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = alternately({"step": once}, rounds=5)["step"]
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def steps_point(weights: Path, steps: int) -> tuple[float, float]:
    """Seconds to sample 256 sentences in so many steps, and peak memory in MB, of a process of its own."""
    keep_freed_memory()
    model = load_diffusion(str(weights))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = alternately({"sample": lambda: model.sample(256, steps=steps, sampler="dpm-solver++")}, rounds=5)[
        "sample"
    ]
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def growth(weights: Path) -> None:
    """Each dimension in turn, the others as in BASE_SHAPE; the exponent is that of the last doubling or quadrupling."""
    rows: list[dict[str, Any]] = []

    def add(name: str, values: Sequence[int], points: Sequence[tuple[float, float]], expected: Sequence[float]) -> None:
        for column, kind in enumerate(("seconds", "MB")):
            last, before = points[-1][column], points[-2][column]
            exponent = math.log(max(last, 1e-9) / max(before, 1e-9)) / math.log(values[-1] / values[-2])
            row = {"of": name, "values": list(values), kind: [point[column] for point in points]}
            rows.append(row | {"exponent": exponent, "expected": expected[column]})
            print(json.dumps(rows[-1]), flush=True)

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, (values, expected) in GROWTH.items():
            points = [pool.apply(growth_point, (BASE_SHAPE | {name: value},)) for value in values]
            add(name, values, points, expected)
        points = [pool.apply(steps_point, (weights, value)) for value in SAMPLING_STEPS]
        add("sampling steps", SAMPLING_STEPS, points, (1.0, 0.0))
    record("growth", {"base": BASE_SHAPE, "rows": rows})
    plot_growth(rows)


def plot_growth(rows: Sequence[Mapping[str, Any]]) -> None:
    """docs/growth.png: seconds and MB of each dimension on logarithmic axes, beside lines of the expected exponent."""
    names = list(dict.fromkeys(row["of"] for row in rows))
    figure, axes = pyplot.subplots(2, len(names), figsize=(3 * len(names), 5), layout="constrained", squeeze=False)
    for row in rows:
        kind = "seconds" if "seconds" in row else "MB"
        axis, values, points = axes[int("seconds" not in row)][names.index(row["of"])], row["values"], row[kind]
        axis.loglog(values, points, "o-", color="#1f4e79")
        line = [points[-1] * (value / values[-1]) ** row["expected"] for value in values]
        axis.loglog(values, line, ":", color="#999999")
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False, fontsize=7)
        axis.xaxis.minorticks_off()
        axis.set(xlabel=row["of"], ylabel=kind if row["of"] == names[0] else "")
        axis.set_title(f"exponent {row['exponent']:.2f}", fontsize=9)
    figure.savefig(ROOT / "docs/growth.png", dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Measure, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "ckpts/simple/ema_0.9999_025000.pt", help="to sample")
    growth(parser.parse_args().weights)
    table.write()


if __name__ == "__main__":
    main()
