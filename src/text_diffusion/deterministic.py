"""Kernels that add in the same order each time (`--deterministic`), so that a GPU too makes the same run twice.

On CPUs they are such anyhow, as long as the number of threads stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from text_diffusion.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when it is used first
WORKSPACES = (":4096:8", ":16:8")  # those with which it is deterministic


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, if wanted, PyTorch takes deterministic kernels alone, and raises where it has none.

    Raises:
        UserError: the environment has cuBLAS do otherwise.
    """
    if not wanted:
        yield
        return
    found = os.environ.get(WORKSPACE)
    if found not in (None, *WORKSPACES):
        raise UserError(f"--deterministic expects {WORKSPACE} to be {' or '.join(WORKSPACES)}, found {found}; unset it")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        if found is None:
            del os.environ[WORKSPACE]


def cumulated(p: Tensor) -> Tensor:
    """Sums over all up to each, along the last dimension; if they must be deterministic, on a CPU: CUDA's are not."""
    if p.is_cuda and torch.are_deterministic_algorithms_enabled():
        return p.cpu().cumsum(-1).to(p.device)
    return p.cumsum(-1)
