"""What share of a GPU is used? Ceilings first, then training and sampling, on random data; a table and a JSON file.

python benchmarks/gpu.py [--out gpu.json]       needs PyTorch, NumPy and src/ only, and no network; within 8 minutes
python benchmarks/gpu.py --toy                  the same at toy size, also on a CPU
python benchmarks/gpu.py --take gpu.json        put what another machine wrote into results.json and README.md

A training step is all of the program's own `train_step`: batch, noise, self-conditioning, clipping, optimizer, EMA.
FLOPs are those of the matrix products in the loss and its gradient, counted by PyTorch; Muon's own are not among them,
but the scores that cross_entropy computes a second time are. MFU is their rate over the device's bf16 rate, both what a
large matrix product reached here and the data sheet's where that is known.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from gpu_table import render
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from text_diffusion.config import SIZES, DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.data import Batches
from text_diffusion.distributed import ALONE
from text_diffusion.ema import EMA
from text_diffusion.flags import build
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.loss_by_timestep import LossByTimestep
from text_diffusion.muon import optimizer_of
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.parallel import BatchLoss
from text_diffusion.quick import quicken
from text_diffusion.randomness import Stream, draw, normal
from text_diffusion.samplers import ancestral
from text_diffusion.schedules import named_betas
from text_diffusion.spacing import spaced_timesteps
from text_diffusion.step import gradient, train_step
from text_diffusion.timesteps import TIMESTEP_SAMPLERS

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]
Part = tuple[str, str, Callable[[], Row]]  # a table, what is measured, and how


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


@dataclass(frozen=True)
class Shape:
    """What is trained or sampled: sizes of the network, of its text, of a batch."""

    size: str
    model: ModelConfig
    batch: int
    length: int
    vocab: int

    def row(self, **more: Any) -> Row:
        """What the tables say of it."""
        return {"size": self.size, "objective": self.model.objective, "batch": self.batch, "length": self.length} | more

    def network(self) -> Any:
        """A fresh network."""
        return OBJECTIVES[self.model.objective].network(self.model, self.vocab, self.length)

    def process(self, device: torch.device) -> tuple[DiffusionConfig, GaussianDiffusion]:
        """Its objective's."""
        config = build(DiffusionConfig, OBJECTIVES[self.model.objective].process)
        return config, GaussianDiffusion(named_betas(config.noise_schedule, config.diffusion_steps), device)


def trainer(shape: Shape, device: torch.device, **how: Any) -> tuple[Callable[[], object], int]:
    """A training step of random text each time it is called, and its FLOPs; `how` are fields of TrainConfig."""
    config = TrainConfig(batch_size=shape.batch, steps=1_000_000, **how)
    diffusion_config, diffusion = shape.process(device)
    model = shape.network().to(device).train()
    state: Any = SimpleNamespace(
        model=model,
        emas=[EMA(model, 0.9999)],
        optimizer=optimizer_of(model, config),
        timestep_sampler=TIMESTEP_SAMPLERS[diffusion_config.schedule_sampler](diffusion.num_timesteps, device),
        loss_by_timestep=LossByTimestep(diffusion.num_timesteps, device),
        step=0,
    )
    ids = torch.randint(shape.vocab, (16 * shape.batch, shape.length), device=device)
    run: Any = SimpleNamespace(
        config=config,
        model_config=shape.model,
        diffusion_config=diffusion_config,
        objective=OBJECTIVES[shape.model.objective],
        ranks=ALONE,
        data_config=SimpleNamespace(sequence_len=shape.length),
        device=device,
        diffusion=diffusion,
        batches=Batches(ids, shape.batch, 0),
    )
    with FlopCounterMode(display=False) as counter:
        gradient(run, state, BatchLoss(model, run.objective, diffusion))
    state.optimizer.zero_grad()
    network: Any = torch.compile(model, dynamic=False) if config.compile else model
    loss = BatchLoss(network, run.objective, diffusion)
    return lambda: train_step(run, state, loss), counter.get_total_flops()


def training(clock: Clock, shape: Shape, **how: Any) -> Row:
    """Tokens/s, FLOP/s and peak memory of the training step."""
    on_gpu = clock.device.type == "cuda"
    step, flops = trainer(shape, clock.device, **how)
    started = time.perf_counter()
    for _ in range(3):
        step()  # compiles
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    first = time.perf_counter() - started
    seconds = clock.time(step, 5)
    return shape.row(
        **how,
        first_steps_s=first,
        ms=1000 * seconds,
        tokens_per_s=shape.batch * shape.length / seconds,
        flops_per_s=flops / seconds,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    )


@torch.no_grad()
def sampling(clock: Clock, shape: Shape, calls: int) -> Row:
    """Sentences/s from noise to ids, in the program's bf16, the network called plainly and as a replayed graph."""
    device = clock.device
    on_gpu = device.type == "cuda"
    _, process = shape.process(device)
    process = process.respace(spaced_timesteps(process.alphas_cumprod, calls))

    def sentences(network: Any) -> None:
        def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
            x_self = torch.zeros_like(x_t) if previous is None else previous
            out: Tensor = network(x_t, process.network_time(t), x_self)
            return out

        def noise(s: int) -> Tensor:
            size = (shape.length, shape.model.in_channel)
            return draw(normal, (0, Stream.SAMPLE, s), 0, shape.batch, size, device)

        for step in ancestral(denoise, process, noise):
            last = step
        network.get_logits(last.pred_xstart).argmax(dim=-1).cpu()

    found = shape.row(calls=calls)
    for name, compiled in (("eager_per_s", False), ("graphed_per_s", True)):
        if compiled and not on_gpu:
            continue
        network = shape.network().to(device).eval()
        quicken(network, device, "bf16" if on_gpu else "float32", compiled)
        sentences(network)
        found[name] = shape.batch / clock.time(lambda network=network: sentences(network))  # type: ignore[misc]
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
        "date": str(datetime.datetime.now(tz=datetime.UTC).date()),
    }


def all_parts(clock: Clock) -> list[Part]:
    """What is measured, what matters most first."""

    def of(size: str, objective: str, batch: int, length: int, vocab: int) -> Shape:
        model = build(ModelConfig, OBJECTIVES[objective].model, SIZES[size], {"objective": objective})
        return Shape(size, model, batch, length, vocab)

    base, words = (of("base", objective, 256, 128, 8192) for objective in ("diffusion_lm", "cross_entropy"))
    short = of("base", "diffusion_lm", 512, 64, 8192)
    simple = [of("small", objective, 16384, 8, 165) for objective in ("diffusion_lm", "cross_entropy")]
    default = [replace(shape, batch=128) for shape in simple]
    quick: Row = {"precision": "bf16", "compile": True}
    adamw, muon = {"optimizer": "adamw"}, {"optimizer": "muon"}
    parts: list[Part] = []
    for shape, how in ((base, adamw | quick), (base, muon | quick)):
        parts.append(("training", shape.size, partial(training, clock, shape, **how)))
    for shape in simple:
        parts.append(("sampling", shape.size, partial(sampling, clock, shape, 8)))
    plain = {"precision": "bf16"}
    others = [(short, adamw | quick), (words, muon | quick), (base, adamw | plain), *((one, muon) for one in default)]
    for shape, how in others:
        parts.append(("training", shape.size, partial(training, clock, shape, **how)))
    paragraphs = of("base", "diffusion_lm", 1024, 64, 8192)
    return [*parts, ("sampling", "base", partial(sampling, clock, paragraphs, 10))]


def toy_parts(clock: Clock) -> list[Part]:
    """The same code in seconds."""
    parts: list[Part] = []
    for objective, optimizer in (("diffusion_lm", "adamw"), ("cross_entropy", "muon")):
        sizes = SIZES["base"] | {"num_layers": 1, "hidden_size": 48, "in_channel": 8, "objective": objective}
        shape = Shape("toy", build(ModelConfig, OBJECTIVES[objective].model, sizes), 8, 16, 64)
        parts.append(("training", "toy", partial(training, clock, shape, optimizer=optimizer)))
        parts.append(("sampling", "toy", partial(sampling, clock, shape, 3)))
    return parts


def take(found: dict[str, Any]) -> None:
    """Into results.json, and the documents."""
    import table
    from common import record

    about = found["about"]
    record("gpu", found | {"machine": f"{about['device']}, {about['date']}, commit {about['commit']}"})
    table.write()


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--take", type=Path)
    parser.add_argument("--minutes", type=float, default=6, help="after which no further part begins")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(argv)
    if args.take:
        if not args.take.is_file():
            parser.error(f"--take expects a file that this program wrote, found none at {args.take}")
        take(json.loads(args.take.read_text()))
        return
    if not (args.toy or torch.cuda.is_available()):
        raise SystemExit("expected a CUDA device, found none; --toy runs the same at toy size on a CPU")
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    clock = Clock(device, 3 if args.toy else 10)
    bf16 = device.type == "cuda"
    results: dict[str, Any] = {
        "about": about(device),
        "ceilings": ceilings(clock, torch.bfloat16 if bf16 else torch.float32, 128 if args.toy else 8192),
        "training": [],
        "sampling": [],
        "left_out": [],
    }
    parts = toy_parts(clock) if args.toy else all_parts(clock)
    for kind, name, measure in parts:
        if time.monotonic() - started > args.minutes * 60:
            results["left_out"].append(f"{kind} {name}: no time was left")
            continue
        try:
            results[kind].append(measure())
        except RuntimeError as error:  # out of memory, or what the compiler cannot do: the rest is worth having
            results["left_out"].append(f"{kind} {name}: {str(error).splitlines()[0]}")
        print(f"{time.monotonic() - started:.0f} s: {kind} {name}", file=sys.stderr, flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(render({"gpu": results}))


if __name__ == "__main__":
    main()
