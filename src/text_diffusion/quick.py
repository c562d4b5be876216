"""A network that computes in bf16, or compiled, on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from text_diffusion.device import check_compiler, pick_precision


def quicken(model: nn.Module, device: torch.device, precision: str = "float32", compiled: bool = False) -> None:
    """Let the network's `forward` compute otherwise from now on; what it gives is float32 as before.

    Args:
        model: a denoiser, in evaluation mode.
        device: where it is.
        precision: "bf16": matrix products in bf16 (float32, with a warning, on a CPU that has none).
        compiled: by torch.compile, anew for each shape that it meets. Its CUDA graphs write every result to the same
            place, so that each is copied.

    Raises:
        UserError: it is to be compiled for a CPU, and there is no C++ compiler.
    """
    forward: Callable[..., Tensor] = model.forward
    if pick_precision(precision, device) == "bf16":
        forward = _in_bf16(forward, device)
    if compiled:
        check_compiler(device)
        forward = _compiled(forward, device)
    model.forward = forward


def _in_bf16(forward: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    def run(*inputs: Any, **more: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*inputs, **more).float()

    return run


def _compiled(forward: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    quick: Callable[..., Tensor]
    if device.type != "cuda":
        quick = torch.compile(forward, dynamic=False)
        return quick
    quick = torch.compile(forward, dynamic=False, mode="reduce-overhead")

    def run(*inputs: Any, **more: Any) -> Tensor:
        return quick(*inputs, **more).clone()

    return run
