"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from text_diffusion.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
tensor = torch.ones(50_000_000)
full = resident()
del tensor
print((resident() - before) / (full - before))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("mode", "low", "high"), [("keep", 0.9, 1.1), ("leave", -0.1, 0.1)])
def test_freed_memory_is_kept(mode: str, low: float, high: float) -> None:
    """Of 200 MB that were freed; in a process of its own, since it is settled for life."""
    share = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True).stdout
    assert low < float(share) < high
