"""The GPU benchmark runs here at toy size, with nothing but PyTorch, NumPy and the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from toy import environment

ROOT = Path(__file__).resolve().parent.parent

# Runs the benchmark where every other library that the program uses is missing.
PROGRAM = """
import os, runpy, sys
for name in ("tokenizers", "tqdm", "transformers", "diffusers", "scipy"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_gpu_benchmark_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "benchmarks" / "gpu.py"), "--toy"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "gpu.json")], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["ceilings"]["gemm_flops_per_s"] > results["ceilings"]["copy_bytes_per_s"] / 100 > 0
    assert [row["optimizer"] for row in results["training"]] == ["adamw", "muon"]
    for training in results["training"]:
        assert training["tokens_per_s"] == training["batch"] * training["length"] / (training["ms"] / 1000)
        assert 0 < training["flops_per_s"] < results["ceilings"]["gemm_flops_per_s"]
    assert [row["eager_per_s"] > 0 for row in results["sampling"]] == [True, True]
    assert "| toy `diffusion_lm` adamw | 8 | 16 |" in result.stdout
