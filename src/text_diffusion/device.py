"""What a process computes on."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from text_diffusion.distributed import ALONE, Ranks
from text_diffusion.errors import UserError


def pick_device(device: str, gpu: str, ranks: Ranks = ALONE) -> torch.device:
    """The device for `--device auto|cpu|cuda|mps` and `--gpu 0,1|all`: of the GPUs named, this rank's.

    Raises:
        UserError: the device is not there, or `gpu` is not a list of devices that are.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps and ranks.size == 1 else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"--device {device} expects such a device, found none; --device auto takes what there is")
    if device == "mps" and ranks.size > 1:
        raise UserError("--device mps expects one process, found several; take --device cpu")
    if device != "cuda":
        if gpu != "all":
            print(f"GPU {gpu} is ignored: running on {device}", file=sys.stderr)
        return torch.device(device)
    there = torch.cuda.device_count()
    named = list(range(there)) if gpu == "all" else _gpus(gpu)
    if max(named) >= there:
        raise UserError(f"GPU must name devices below {there}, found {gpu!r}")
    if ranks.local_rank >= len(named):
        raise UserError(
            f"expected a GPU for each process on this host, found {len(named)}; start fewer processes, or let each see "
            "all GPUs of its host (srun --gpus-per-node, not --gpus-per-task)"
        )
    own = torch.device("cuda", named[ranks.local_rank])
    torch.cuda.set_device(own)  # which shards, pinned memory and NCCL take, as they are not told
    return own


def pick_precision(precision: str, device: torch.device) -> str:
    """`precision`, or float32, with a warning, on a CPU whose bf16 would be imitated hundreds of times more slowly."""
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        print("warning: this CPU has no bf16 arithmetic; going on in float32", file=sys.stderr)
        return "float32"
    return precision


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def exact(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a Mac's GPU, which has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def check_compiler(device: torch.device) -> None:
    """Find out now whether torch.compile has what it needs.

    Raises:
        UserError: for a CPU it generates C++, and there is no compiler.
    """
    usual = "clang++" if sys.platform == "darwin" else "cl" if sys.platform == "win32" else "g++"
    compiler = os.environ.get("CXX", usual)
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile on a CPU expects a C++ compiler, found no {compiler}; install one, or leave it out")


def _gpus(gpu: str) -> list[int]:
    parts = gpu.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"GPU must be `all` or device numbers separated by commas, found {gpu!r}")
    return [int(part) for part in parts]
