"""What each rank of `test_ranks` runs: short runs, whose gradients, weights and sentences rank 0 writes down.

rank_worker TEXT FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy import SIZES

from text_diffusion import parallel
from text_diffusion.checkpoint import Weights
from text_diffusion.config import SampleConfig
from text_diffusion.control.controls import Plan
from text_diffusion.distributed import Ranks, joined
from text_diffusion.generation import writer_of
from text_diffusion.parallel import parallelised, whole, whole_copy
from text_diffusion.run import prepare
from text_diffusion.sample import generate
from text_diffusion.step import train_step
from text_diffusion.validation import validate

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"steps": 50, "batch_size": 64},
    "fsdp": {"steps": 50, "batch_size": 64, "parallel": "fsdp"},
    "micro": {"steps": 3, "batch_size": 72, "microbatch": 6, "self_condition": False},
    "micro fsdp": {"steps": 3, "batch_size": 72, "microbatch": 6, "parallel": "fsdp", "gradient_checkpointing": True},
    "second moment": {
        "steps": 8, "batch_size": 64, "schedule_sampler": "loss-second-moment", "diffusion_steps": 4,
    },
    "autoregressive": {"steps": 2, "batch_size": 16, "objective": "autoregressive"},
    "words": {"steps": 6, "batch_size": 64, "objective": "cross_entropy"},
    "words fsdp": {"steps": 6, "batch_size": 64, "objective": "cross_entropy", "parallel": "fsdp"},
    "student": {"steps": 3, "batch_size": 72, "teacher": ".pt", "pairs": 600, "teacher_levels": 3},
    "labels": {"steps": 3, "batch_size": 72, "microbatch": 6, "condition": "labels", "drop_condition": 0.5},
}  # fmt: skip


def work(case: dict[str, Any], text: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Train, then ask the average, on every rank; what came out, the same on all of them."""
    parallel.BUCKET = 500  # several exchanges at toy size too
    sizes = {name: value for name, value in SIZES.items() if name not in ("ema_rate", *_unfit(case))}
    text = text.replace(".txt", ".tsv") if "condition" in case else text
    case = case | ({"teacher": text.replace(".txt", ".pt")} if "teacher" in case else {})
    given = {"dataset": text, "checkpoint_path": str(folder), "ema_rate": (0.9,), "lr": 1e-3, **sizes, **case}
    run, state = prepare(given, ranks)
    loss = parallelised(state.loss, run.config.parallel, ranks)
    grads: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        if not grads:
            grads.append(flat(gradients))

    state.optimizer.register_step_pre_hook(keep)
    losses = []
    for _ in range(case["steps"]):
        values, norm = train_step(run, state, loss)
        losses.append(values["loss"])
    held = sum(part.numel() * part.element_size() for part in _local(state))
    weights = flat(list(state.model.parameters()))
    averages = flat(list(state.emas[0].model.parameters()))
    model = whole_copy(state.emas[0].model, run.network)
    assert run.held_out is not None
    writer = writer_of(Weights(model, run.diffusion, run.tokenizer, run.data_config.sequence_len, {}))
    sentences = [generate(writer, SampleConfig(num_samples=n, steps=4, show=0), Plan(), ranks) for n in (1, 7)]
    return {
        "grad": grads[0], "clipped norm": float(norm), "losses": torch.stack(losses), "weights": weights,
        "averages": averages, "sentences": sentences, "by t": state.loss_by_timestep.totals, "held": held,
        "validation": validate(model, run.diffusion, run.held_out, ranks, run.held_out_given, run.held_out_noise),
        **({} if run.batches.noises is None else {"noises": run.batches.noises}),
    }  # fmt: skip


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All of them in one row, put together in several exchanges."""
    return torch.cat([tensor.detach().flatten() for tensor in whole(tensors)])


def _unfit(case: dict[str, Any]) -> tuple[str, ...]:
    """Sizes that a case takes from elsewhere, or has not."""
    if "teacher" in case or case.get("objective") == "cross_entropy":
        return ("diffusion_steps",)
    return ("diffusion_steps", "num_channels") if case.get("objective") == "autoregressive" else ()


def _local(state: Any) -> list[torch.Tensor]:
    from text_diffusion.parallel import local

    moments = [value for p in state.model.parameters() for value in state.optimizer.state[p].values()]
    return [local(tensor) for tensor in (*state.model.parameters(), *moments)]


def main(argv: list[str]) -> int:
    """All cases, one after the other."""
    text, folder = argv[0], Path(argv[1])
    torch.set_num_threads(1)
    with joined() as ranks:
        found = {name: work(case, text, folder / name, ranks) for name, case in CASES.items()}
        if ranks.first:
            torch.save(found, folder / "found.pt")
    return 0
