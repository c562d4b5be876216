"""Freed memory stays with the process; when memory runs out, batches shrink."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import environment, flags, train_flags

from text_diffusion.errors import UserError
from text_diffusion.memory import in_batches, is_out_of_memory

KEEPING = """
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

# The command in a process that may take so many more megabytes than it has once the libraries are loaded.
LIMITED = """
import resource, sys
from text_diffusion import sample, train
taken = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]) * 2**20,) * 2)
sys.exit({"sample": sample, "train": train}[sys.argv[2]].main(sys.argv[3:]))
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment()
    )


@needs_proc
@pytest.mark.parametrize(("mode", "low", "high"), [("keep", 0.9, 1.1), ("leave", -0.1, 0.1)])
def test_freed_memory_is_kept(mode: str, low: float, high: float) -> None:
    """Of 200 MB that were freed; in a process of its own, since it is settled for life."""
    assert low < float(python(KEEPING, mode).stdout) < high


def test_batches_shrink_until_they_fit() -> None:
    """To the half of what was tried, for good; nothing is made twice or left out."""
    tried: list[tuple[int, int]] = []

    def make(start: int, stop: int) -> list[int]:
        tried.append((start, stop))
        if stop - start > 3:
            raise torch.OutOfMemoryError
        return list(range(start, stop))

    assert in_batches(11, 100, make) == list(range(11))
    assert tried == [(0, 11), (0, 5), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]


def test_errors_of_other_kinds_and_of_single_sentences() -> None:
    def fail(error: Exception) -> None:
        def make(start: int, stop: int) -> list[int]:
            raise error

        in_batches(4, 4, make)

    with pytest.raises(RuntimeError, match="shape"):
        fail(RuntimeError("shape"))
    with pytest.raises(UserError, match="expected memory for one sentence"):
        fail(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@needs_proc
def test_sampling_with_little_memory(writer: Path, tmp_path: Path) -> None:
    """Says what fitted, and writes what it would have written."""
    options = flags(model_name_or_path=writer, out_dir=tmp_path, num_samples=30_000, batch_size=30_000, steps=1, show=0)
    result = python(LIMITED, "150", "sample", *options)
    assert result.returncode == 0, result.stderr
    assert "warning: out of memory with 30000 sentences at once; going on with 15000" in result.stderr
    (path,) = tmp_path.iterdir()
    assert path.read_text().count("\n") == 30_000


@needs_proc
def test_training_with_little_memory(corpus: Path, tmp_path: Path) -> None:
    options = train_flags(corpus, tmp_path / "run", steps=2, batch_size=30_000)
    result = python(LIMITED, "300", "train", *options)
    assert result.returncode == 1
    assert (
        "expected memory for 30000 sentences at once, found too little at step 0; --microbatch 15000" in result.stderr
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "std::bad_alloc",
        "MPS backend out of memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_how_memory_runs_out(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
