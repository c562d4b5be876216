"""One training step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from text_diffusion.config import TrainConfig
from text_diffusion.losses import Noise
from text_diffusion.randomness import Stream, draw, mix, uniform

if TYPE_CHECKING:
    from text_diffusion.run import Run
    from text_diffusion.state import TrainState


def train_step(run: Run, state: TrainState, network: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One step on the global batch, micro-batch by micro-batch: gradient, clipping, AdamW, EMA.

    Returns:
        The terms of the loss by name, each (B,) on the device, with `t` among them; the gradient norm before clipping.
    """
    config, seed, step = run.config, run.config.seed, state.step
    B, shape = config.batch_size, (run.data_config.sequence_len, run.model_config.in_channel)
    if run.model_config.dropout:
        torch.manual_seed(mix(seed, Stream.DROPOUT, step))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)

    input_ids = run.batches.batch(step)  # (B, L)
    t, weights = state.timestep_sampler.sample(draw(uniform, (seed, Stream.TRAIN, step, 1), 0, B, (), run.device))
    parts: list[dict[str, Tensor]] = []
    micro = config.microbatch or B
    for start in range(0, B, micro):
        part = slice(start, min(start + micro, B))
        noise = Noise.draw((seed, Stream.TRAIN, step, 0), part.start, part.stop, shape, run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = run.objective.loss(network, run.diffusion, input_ids[part], t[part], noise)
        loss = terms.total(weights[part])
        torch.autograd.backward(loss.sum() / B)  # by its share of B: cutting the batch changes nothing
        parts.append({"loss": loss.detach(), **{name: term.detach() for name, term in vars(terms).items()}})

    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clipping or math.inf)
    state.optimizer.step()
    state.optimizer.zero_grad()
    for ema in state.emas:
        ema.update()
    state.step += 1
    values = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    if run.objective.by_t:
        state.timestep_sampler.update(t, values[run.objective.by_t])
        state.loss_by_timestep.update(t, values[run.objective.by_t])
    return values | {"t": t}, grad_norm


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over the first steps, times a linear anneal to 0 at the end of the run."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.lr * warm * (1 - step / config.steps)
