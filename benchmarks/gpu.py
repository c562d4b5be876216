"""What share of a GPU is used? Ceilings first, then training and sampling, on random data; a table and a JSON file.

python benchmarks/gpu.py [--out gpu.json]       needs PyTorch, NumPy and src/ only, and no network; within 8 minutes
python benchmarks/gpu.py --toy                  the same at toy size, also on a CPU

A training step is all of the program's own `train_step`: batch, noise, self-conditioning, clipping, optimizer, EMA.
FLOPs are those of the network's matrix products, counted by PyTorch; Muon's own are not among them. MFU is their rate
over the device's bf16 rate, both what a large matrix product reached here and the data sheet's where that is known.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from text_diffusion.config import SIZES, DiffusionConfig, ModelConfig, TrainConfig, build
from text_diffusion.data import Batches
from text_diffusion.distributed import ALONE
from text_diffusion.ema import EMA
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.muon import optimizer_of
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.parallel import BatchLoss
from text_diffusion.randomness import Stream, draw, normal
from text_diffusion.samplers import ancestral
from text_diffusion.schedules import named_betas
from text_diffusion.step import gradient, train_step
from text_diffusion.timesteps import LossByTimestep, UniformSampler, spaced_timesteps

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 6  # after which no further part begins
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, SXM

Row = dict[str, Any]


class Clock:
    """Seconds of a piece of work: device events on a GPU, the wall clock elsewhere; medians after warming up."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def time(self, work: Callable[[], object], repeat: int = 1) -> float:
        """Median seconds of one `work`, over rounds of `repeat`."""
        work()
        seconds: list[float] = []
        for _ in range(self.rounds):
            if self.device.type == "cuda":
                event: Any = torch.cuda.Event
                start, end = event(enable_timing=True), event(enable_timing=True)
                start.record()
                for _ in range(repeat):
                    work()
                end.record()
                torch.cuda.synchronize()
                seconds.append(start.elapsed_time(end) / 1000 / repeat)
            else:
                started = time.perf_counter()
                for _ in range(repeat):
                    work()
                seconds.append((time.perf_counter() - started) / repeat)
        return statistics.median(seconds)


def ceilings(clock: Clock, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Bytes/s of a copy, FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.empty(size * size * 4, device=clock.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "copy_bytes_per_s": 2 * source.numel() / clock.time(lambda: target.copy_(source), 10),
        "gemm_flops_per_s": 2 * size**3 / clock.time(lambda: torch.mm(a, b), 10),
    }


def training(
    clock: Clock, model_config: ModelConfig, batch: int, length: int, vocab: int, **how: Any
) -> dict[str, Any]:
    """Tokens/s, FLOP/s and peak memory of the training step; `how` are fields of TrainConfig."""
    device = clock.device
    config = TrainConfig(batch_size=batch, steps=1_000_000, **how)
    model = TransformerNetModel(model_config, vocab, length).to(device).train()
    network: Any = torch.compile(model, dynamic=False) if config.compile else model
    state: Any = SimpleNamespace(
        model=model,
        emas=[EMA(model, 0.9999)],
        optimizer=optimizer_of(model, config),
        timestep_sampler=UniformSampler(2000),
        loss_by_timestep=LossByTimestep(2000, device),
        step=0,
    )
    run: Any = SimpleNamespace(
        config=config,
        model_config=model_config,
        diffusion_config=DiffusionConfig(),
        objective=OBJECTIVES["diffusion_lm"],
        ranks=ALONE,
        data_config=SimpleNamespace(sequence_len=length),
        device=device,
        diffusion=GaussianDiffusion(named_betas("sqrt", 2000), device),
        batches=Batches(torch.randint(vocab, (16 * batch, length), device=device), batch, 0),
    )
    plain = BatchLoss(model, run.objective, run.diffusion)
    loss = BatchLoss(network, run.objective, run.diffusion)
    with FlopCounterMode(display=False) as counter:
        gradient(run, state, plain)
    flops = counter.get_total_flops()
    state.optimizer.zero_grad()
    for _ in range(3):
        train_step(run, state, loss)  # compiles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = clock.time(lambda: train_step(run, state, loss), 5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "batch": batch,
        "length": length,
        **how,
        "ms": 1000 * seconds,
        "tokens_per_s": batch * length / seconds,
        "flops_per_s": flops / seconds,
        "peak_gib": peak,
    }


@torch.no_grad()
def sampling(
    clock: Clock, model_config: ModelConfig, batch: int, length: int, vocab: int, calls: int
) -> dict[str, Any]:
    """Sentences/s to ids, the network called plainly and as a replayed graph (on a GPU)."""
    device = clock.device
    model = TransformerNetModel(model_config, vocab, length).to(device).eval()
    process = GaussianDiffusion(named_betas("sqrt", 2000), device)
    process = process.respace(spaced_timesteps(process.alphas_cumprod, calls))

    def sentences(network: Any) -> None:
        def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x_self = torch.zeros_like(x_t) if previous is None else previous
                out: Tensor = network(x_t, process.network_time(t), x_self)
            return out.float()

        def noise(s: int) -> Tensor:
            return draw(normal, (0, Stream.SAMPLE, s), 0, batch, (length, model_config.in_channel), device)

        for step in ancestral(denoise, process, noise):
            last = step
        model.get_logits(last.pred_xstart).argmax(dim=-1).cpu()

    found: dict[str, Any] = {"batch": batch, "length": length, "calls": calls}
    found["eager_per_s"] = batch / clock.time(lambda: sentences(model))
    if device.type == "cuda":
        graphed = torch.compile(model, mode="reduce-overhead", dynamic=False)  # CUDA graphs
        sentences(graphed)
        found["graphed_per_s"] = batch / clock.time(lambda: sentences(graphed))
    return found


def about(device: torch.device) -> dict[str, str]:
    """Device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    sheet = next((rate for name, rate in DATA_SHEET.items() if name in results["about"]["device"]), None)
    gemm = results["ceilings"]["gemm_flops_per_s"]
    lines = [
        f"{results['about']}",
        f"copy {results['ceilings']['copy_bytes_per_s'] / 1e9:.0f} GB/s, matrix product {gemm / 1e12:.1f} TFLOP/s",
        "",
        "| training | batch | L | ms | tokens/s | TFLOP/s | of the product's rate | MFU (data sheet) | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["training"]:
        rate, peak = row["flops_per_s"], row["peak_gib"]
        flags = " ".join(f"{name}={row[name]}" for name in ("optimizer", "precision", "compile") if name in row)
        cells = (
            f"{row['size']} {flags}",
            row["batch"],
            row["length"],
            f"{row['ms']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{rate / 1e12:.3g}",
            f"{rate / gemm:.1%}",
            f"{rate / sheet:.1%}" if sheet else "-",
            f"{peak:.1f}" if peak else "-",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| sampling | batch | L | calls | eager, sentences/s | graphed |", "|---|---|---|---|---|---|"]
    for row in results["sampling"]:
        graphed = f"{row['graphed_per_s']:.0f}" if "graphed_per_s" in row else "-"
        shape = f"{row['size']} | {row['batch']} | {row['length']} | {row['calls']}"
        lines.append(f"| {shape} | {row['eager_per_s']:.0f} | {graphed} |")
    lines += [f"\nleft out: {reason}" for reason in results["left_out"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(argv)
    if not (args.toy or torch.cuda.is_available()):
        raise SystemExit("expected a CUDA device, found none; --toy runs the same at toy size on a CPU")
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    base, small = build(ModelConfig, SIZES["base"]), build(ModelConfig, SIZES["small"])
    if args.toy:
        base = replace(base, num_layers=1, hidden_size=48, in_channel=8)
    clock = Clock(device, 3 if args.toy else 10)
    bf16 = device.type == "cuda"
    results: dict[str, Any] = {
        "about": about(device),
        "ceilings": ceilings(clock, torch.bfloat16 if bf16 else torch.float32, 128 if args.toy else 8192),
        "training": [],
        "sampling": [],
        "left_out": [],
    }
    precision = {"precision": "bf16"} if bf16 else {}
    shapes = [(8, 16)] if args.toy else [(512, 64), (256, 128)]
    vocab = 64 if args.toy else 8192
    parts: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for batch, length in shapes:
        ways: list[Row] = [{"optimizer": "adamw"}, {"optimizer": "muon"}]
        ways += [] if args.toy else [{**way, "compile": True} for way in ways]
        for way in ways:
            how = precision | way
            parts.append(("training", "base", partial(training, clock, base, batch, length, vocab, **how)))
    for name, config, batch, length in (("small", small, 16384, 8), ("base", base, 1024, 64)):
        size, calls = (16, 3) if args.toy else (batch, 10)
        parts.append(("sampling", name, partial(sampling, clock, config, size, length, vocab, calls)))
    for kind, name, measure in parts:
        if time.monotonic() - started > MINUTES * 60:
            results["left_out"].append(f"{kind} {name}: no time was left")
            continue
        try:
            results[kind].append({"size": name, **measure()})
        except RuntimeError as error:  # out of memory, or what the compiler cannot do: the rest is worth having
            results["left_out"].append(f"{kind} {name}: {str(error).splitlines()[0]}")
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
