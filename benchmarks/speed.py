"""How fast on this CPU? Every comparison is a ratio of things measured alternately in the same run, with its spread.

python benchmarks/speed.py             all of it, in 8 minutes of two cores:
python benchmarks/speed.py step        the training step against the same one on transformers' BertEncoder, with the
                                       original's logging of every sentence and averaging of every parameter
python benchmarks/speed.py optimizer   the training step by Muon against the one by AdamW
python benchmarks/speed.py gemm        its share of the matrix-multiplication rate of this machine
python benchmarks/speed.py sampling    a sentence by the default sampler against 2,000 ancestral steps, and against the
                                       network that the original ships (BERT-base, length 50)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import table
import torch
from common import ROOT, record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from text_diffusion.config import SIZES, DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.data import Batches
from text_diffusion.distributed import ALONE
from text_diffusion.ema import EMA
from text_diffusion.flags import build
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import load_diffusion
from text_diffusion.loss_by_timestep import LossByTimestep
from text_diffusion.losses import Noise, diffusion_lm_loss
from text_diffusion.memory import keep_freed_memory
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.muon import optimizer_of
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.parallel import BatchLoss
from text_diffusion.schedules import named_betas
from text_diffusion.state import TrainState
from text_diffusion.step import train_step
from text_diffusion.timesteps import UniformSampler

Seconds = dict[str, list[float]]
DIFFUSION_LM = OBJECTIVES["diffusion_lm"]


def alternately(things: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 1) -> Seconds:
    """Seconds of each thing in each round; all of them in turn, `repeat` times each, after one round to warm up."""
    seconds: Seconds = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, thing in things.items():
            started = time.perf_counter()
            for _ in range(repeat):
                thing()
            if number:
                seconds[name].append((time.perf_counter() - started) / repeat)
    return seconds


def ratio(seconds: Seconds, slow: str, fast: str) -> dict[str, float]:
    """How often `fast` fits into `slow`: the median over the rounds, and the least and most."""
    ratios = sorted(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    return {"ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def stepper(
    model_config: ModelConfig, batch: int, length: int, vocab: int, optimizer_name: str = "adamw"
) -> Callable[[], None]:
    """One training step of the program, data, logging and averages included, each time it is called.

    By AdamW if not said otherwise, as what it is compared with has.
    """
    model = TransformerNetModel(model_config, vocab, length).train()
    loss = BatchLoss(model, DIFFUSION_LM, GaussianDiffusion(named_betas("sqrt", 2000)))
    config = TrainConfig(batch_size=batch, steps=1_000_000, optimizer=optimizer_name)
    optimizer = optimizer_of(model, config)
    state = TrainState(model, loss, [EMA(model, 0.9999)], optimizer, UniformSampler(2000), LossByTimestep(2000))
    run: Any = SimpleNamespace(
        config=config,
        model_config=model_config,
        objective=DIFFUSION_LM,
        ranks=ALONE,
        diffusion_config=build(DiffusionConfig, DIFFUSION_LM.process),
        data_config=SimpleNamespace(sequence_len=length),
        device=torch.device("cpu"),
        diffusion=GaussianDiffusion(named_betas("sqrt", 2000)),
        batches=Batches(torch.randint(vocab, (10_000, length)), batch, 0),
    )

    def step() -> None:
        train_step(run, state, loss)

    return step


def bert_stepper(model_config: ModelConfig, batch: int, length: int, vocab: int) -> Callable[[], None]:
    """The same step, plainly: transformers' BertEncoder, loops over sentences and over parameters."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    class Layers(nn.Module):
        """The encoder in the place of our layers."""

        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                hidden_size=model_config.hidden_size,
                num_hidden_layers=model_config.num_layers,
                num_attention_heads=model_config.num_heads,
                intermediate_size=4 * model_config.hidden_size,
                hidden_act=model_config.activation,
                hidden_dropout_prob=model_config.dropout,
                attention_probs_dropout_prob=model_config.dropout,
                attn_implementation="sdpa",
            )
            self.encoder: nn.Module = BertEncoder(config)

        def forward(self, h: Tensor) -> Tensor:
            """(B, L, H) -> (B, L, H)."""
            out: Tensor = self.encoder(h).last_hidden_state
            return out

    model = TransformerNetModel(replace(model_config, norm="post"), vocab, length).train()
    model.layers = nn.ModuleList([Layers()])
    averages = copy.deepcopy(list(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    diffusion = GaussianDiffusion(named_betas("sqrt", 2000))
    ids = torch.randint(vocab, (10_000, length))
    generator = torch.Generator().manual_seed(0)
    log: dict[str, list[float]] = {}

    def step() -> None:
        rows = torch.randint(len(ids), (batch,), generator=generator)
        t = torch.randint(2000, (batch,), generator=generator)
        shape = (batch, length, model_config.in_channel)
        noise = Noise(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        terms = diffusion_lm_loss(model, diffusion, ids[rows], t, noise)
        loss = terms.total()
        optimizer.zero_grad()
        torch.autograd.backward(loss.mean())
        for name, values in {"loss": loss, **vars(terms)}.items():
            for one, value in zip(t.cpu().numpy(), values.detach().cpu().numpy(), strict=True):
                log.setdefault(f"{name}_q{int(4 * one / 2000)}", []).append(float(value))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.detach().mul_(0.9999).add_(parameter.detach(), alpha=1e-4)

    return step


def sizes(name: str) -> ModelConfig:
    """A named size, and one between them, for Diffusion-LM's objective."""
    between = {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "in_channel": 64}
    size = between if name == "hidden 256" else SIZES[name]
    return build(ModelConfig, DIFFUSION_LM.model, size, {"objective": "diffusion_lm"})


def step() -> None:
    """Ours against BertEncoder's at the default size."""
    torch.manual_seed(0)
    shape = (sizes("small"), 128, 8, 107)
    seconds = alternately({"ours": stepper(*shape), "BertEncoder": bert_stepper(*shape)}, rounds=15, repeat=10)
    figures = {"ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()}}
    record("step", figures | ratio(seconds, "BertEncoder", "ours"))
    print(json.dumps(figures | ratio(seconds, "BertEncoder", "ours")))


def optimizer() -> None:
    """Muon's step against AdamW's, at the default size."""
    torch.manual_seed(0)
    steps = {name: stepper(sizes("small"), 128, 8, 107, name) for name in ("muon", "adamw")}
    seconds = alternately(steps, rounds=15, repeat=10)
    figures = {"ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()}}
    record("optimizer", figures | ratio(seconds, "muon", "adamw"))
    print(json.dumps(figures | ratio(seconds, "muon", "adamw")))


def gemm() -> None:
    """Achieved against the rate of one large matrix multiplication, in turn with it."""
    torch.manual_seed(0)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rows = []
    for name, batch, length in (("small", 128, 8), ("small", 128, 64), ("hidden 256", 128, 16), ("base", 16, 64)):
        once = stepper(sizes(name), batch, length, 1000)
        once()
        with FlopCounterMode(display=False) as counter:
            once()
        flops = counter.get_total_flops()
        seconds = alternately(
            {"gemm": lambda: torch.mm(a, b), "step": once}, rounds=7, repeat=3 if name == "base" else 8
        )
        shares = sorted(
            (flops / step) / (2 * 2048**3 / mm) for step, mm in zip(seconds["step"], seconds["gemm"], strict=True)
        )
        rows.append(
            {
                "size": name,
                "batch": batch,
                "length": length,
                "gflops": flops / statistics.median(seconds["step"]) / 1e9,
                "gemm_gflops": 2 * 2048**3 / statistics.median(seconds["gemm"]) / 1e9,
                "share": statistics.median(shares),
                "least": shares[0],
                "most": shares[-1],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    record("gemm", {"rows": rows})


def sampling(weights: Path) -> None:
    """Batches by the default sampler, in turn with 2,000 ancestral steps and with a call of the original's network."""
    model = load_diffusion(str(weights))
    original = TransformerNetModel(sizes("base"), 107, 50).eval()
    x_t = torch.randn(16, 50, original.config.in_channel)

    def one_call() -> None:
        with torch.inference_mode():
            original(x_t, torch.full((16,), 500.0))

    things: dict[str, Callable[[], object]] = {
        "walk": lambda: model.sample(256, steps=2000, sampler="ancestral", spacing="uniform"),
        "call": one_call,
        **{f"{calls} calls": partial(model.sample, 1024, steps=calls) for calls in (4, 8, 20)},
        "halt": lambda: model.sample(1024, steps=20, halt=3),
    }
    seconds = alternately(things, rounds=3)
    each = {name: [value / 1024 for value in seconds[name]] for name in ("4 calls", "8 calls", "20 calls", "halt")}
    each["walk"] = [value / 256 for value in seconds["walk"]]
    each["original"] = [2000 * value / 16 for value in seconds["call"]]
    rows = [
        {"slow": slow, "fast": fast, "sentences_per_s": 1 / statistics.median(each[fast]), **ratio(each, slow, fast)}
        for slow, fast in (
            *((slow, f"{calls} calls") for slow in ("walk", "original") for calls in (4, 8, 20)),
            ("20 calls", "halt"),
        )
    ]
    record("sampling", {"rows": rows})
    print(json.dumps(rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("all", "step", "optimizer", "gemm", "sampling"), nargs="?", default="all")
    parser.add_argument("--weights", type=Path, default=ROOT / "ckpts/simple/ema_0.9999_025000.pt")
    args = parser.parse_args(argv)
    keep_freed_memory()
    parts: dict[str, Callable[[], None]] = {
        "step": step,
        "optimizer": optimizer,
        "gemm": gemm,
        "sampling": partial(sampling, args.weights),
    }
    for name, part in parts.items():
        if args.part in (name, "all"):
            part()
    table.write()


if __name__ == "__main__":
    main()
