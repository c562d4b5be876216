"""What depends on where a process runs: its device, and how many processes there are.

One process for now. Many would train copies of the same run side by side, so a launcher that asks for them is refused.
"""

from __future__ import annotations

import os
import sys

import torch

from text_diffusion.errors import UserError

WORLD_SIZE_VARIABLES = ("NPROC", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def check_single_process() -> None:
    """Refuse a launcher's request for several processes.

    Raises:
        UserError: one of WORLD_SIZE_VARIABLES says more than 1.
    """
    for name in WORLD_SIZE_VARIABLES:
        value = os.environ.get(name, "1")
        if value != "1":
            raise UserError(f"expected one process, found {name}={value}: several are not supported yet, so unset it")


def pick_device(device: str, gpu: str) -> torch.device:
    """The device for `--device auto|cpu|cuda|mps` and `--gpu 0,1|all`; one GPU is used, the first that is named.

    Raises:
        UserError: the device is not there, or `gpu` is not a list of devices that are.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"--device {device} expects such a device, found none; --device auto takes what there is")
    if device != "cuda":
        if gpu != "all":
            print(f"GPU {gpu} is ignored: running on {device}", file=sys.stderr)
        return torch.device(device)
    index = 0 if gpu == "all" else _first_gpu(gpu)
    if index >= torch.cuda.device_count():
        raise UserError(f"GPU must name devices below {torch.cuda.device_count()}, found {gpu!r}")
    return torch.device("cuda", index)


def pick_precision(precision: str, device: torch.device) -> str:
    """`precision`, or float32, with a warning, on a CPU whose bf16 would be imitated hundreds of times more slowly."""
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("warning: this CPU has no bf16 arithmetic; going on in float32", file=sys.stderr)
        return "float32"
    return precision


def _first_gpu(gpu: str) -> int:
    parts = gpu.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"GPU must be `all` or device numbers separated by commas, found {gpu!r}")
    return int(parts[0])
