"""What ranks send each other in a step, and what that costs on links of stated speeds: computed, not measured."""

from __future__ import annotations

from typing import Any

import torch
from common import line

from text_diffusion.config import SIZES, ModelConfig
from text_diffusion.modeling import EncoderLayer, TransformerNetModel

LINKS = (  # bytes/s of a GPU each way, as their makers state them
    ("NVLink, within 8 GPUs, 450 GB/s", 450e9, (8,)),
    ("InfiniBand, 400 Gbit/s a GPU", 50e9, (8, 64, 512)),
    ("Ethernet, 25 Gbit/s a GPU", 3.1e9, (8, 64, 512)),
)
STEP_SECONDS = 0.25  # assumed: `base` on one GPU, with enough of the batch to fill it


def in_layers(size: str) -> int:
    """The parameters of a size that are in its layers, which FSDP2 shards one by one."""
    config = ModelConfig(**{name: value for name, value in SIZES[size].items() if hasattr(ModelConfig, name)})
    with torch.device("meta"):
        network = TransformerNetModel(config, 4, 8)
    layers = [layer for layer in network.modules() if isinstance(layer, EncoderLayer)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


def sent(parallel: str, parameters: int, layers: int, n: int) -> float:
    """Bytes that each of n GPUs sends in a step, float32, in rings.

    An all-reduce of the gradients goes around twice. With FSDP2 a layer is put together for the first estimate of
    self-conditioning, for the forward and for the backward pass, and its change for Muon; what is outside of layers is
    once; and every gradient is summed into its shard.
    """
    rest = parameters - layers
    passed = 2 * parameters if parallel == "ddp" else 5 * layers + 2 * rest
    return 4 * passed * (n - 1) / n


def efficiency(seconds: float) -> str:
    """Of GPUs that wait until all is sent."""
    return f"{100 * STEP_SECONDS / (STEP_SECONDS + seconds):.0f} %"


def render(results: dict[str, Any]) -> str:
    """Bytes of both sizes, efficiency of the large one."""
    part = results.get("parallel")
    if not part:
        return ""
    sizes = {"small": part["rows"][0]["parameters"], "base": part["checkpoint"]["parameters"]}
    lines = ["| `--size` | parameters | GPUs | sent by each GPU in a step, ddp | fsdp |", "|---|---|---|---|---|"]
    for size, parameters in sizes.items():
        for n in (2, 8, 64, 512):
            ddp, fsdp = (sent(way, parameters, in_layers(size), n) / 1e6 for way in ("ddp", "fsdp"))
            lines.append(line(size, f"{parameters:,}", n, f"{ddp:,.1f} MB", f"{fsdp:,.1f} MB"))
    lines += [
        "",
        "| link, `--size base` | GPUs | ddp: sending, ms | efficiency | fsdp: sending, ms | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for link, speed, gpus in LINKS:
        for n in gpus:
            ddp, fsdp = (sent(way, sizes["base"], in_layers("base"), n) / speed for way in ("ddp", "fsdp"))
            cells = (f"{1000 * ddp:.1f}", efficiency(ddp), f"{1000 * fsdp:.1f}", efficiency(fsdp))
            lines.append(line(link, n, *cells))
    return "\n".join([*lines, "", f"Computed from the networks measured on {part['machine']}."])
