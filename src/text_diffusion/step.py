"""One training step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from text_diffusion.condition import dropped
from text_diffusion.config import TrainConfig
from text_diffusion.losses import Noise
from text_diffusion.parallel import summed, summing
from text_diffusion.randomness import Stream, draw, mix, uniform

if TYPE_CHECKING:
    from text_diffusion.run import Run
    from text_diffusion.state import TrainState


def train_step(run: Run, state: TrainState, loss: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """One step: gradient, clipping, optimizer, EMA.

    Returns:
        The terms of the loss by name, each (B,) on the device, with `t` among them, those of all ranks on every rank;
        the gradient norm before clipping.
    """
    config = run.config
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    mine = gradient(run, state, loss)
    grad_norm = summed(torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clipping or math.inf))
    state.optimizer.step()
    state.optimizer.zero_grad()
    for ema in state.emas:
        ema.update()
    state.step += 1
    values = run.ranks.join(mine)
    if run.objective.by_t:
        state.timestep_sampler.update(values["t"], values[run.objective.by_t])
        state.loss_by_timestep.update(values["t"], values[run.objective.by_t])
    return values, grad_norm


def gradient(run: Run, state: TrainState, loss: nn.Module) -> dict[str, Tensor]:
    """Leave the gradient of the global batch in the parameters: each rank on its share, micro-batch by micro-batch.

    Returns:
        The terms of the loss by name, and `t`, each (b,), of this rank's share.
    """
    config, seed, step, ranks = run.config, run.config.seed, state.step, run.ranks
    B = config.batch_size
    state.model.progress = step / config.steps
    if run.model_config.dropout:
        torch.manual_seed(mix(seed, Stream.DROPOUT, step, ranks.rank))

    mine = ranks.share(B)
    input_ids, t, weights, condition = examples(run, state, mine)
    parts: list[dict[str, Tensor]] = []
    micro = config.microbatch or B
    for start in range(mine.start, mine.stop, micro):
        stop = min(start + micro, mine.stop)
        part = slice(start - mine.start, stop - mine.start)
        noise = noise_of(run, step, slice(start, stop))
        with summing(loss, last=stop == mine.stop):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                terms = loss(input_ids[part], t[part], noise, None if condition is None else condition[part])
            total = terms.total(weights[part])
            # By its share of B, as the ranks' gradients are averaged: cutting the batch changes nothing.
            torch.autograd.backward(total.sum() * (ranks.size / B))
        parts.append({"loss": total.detach(), **{name: term.detach() for name, term in vars(terms).items()}})
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]} | {"t": t}


def warm_up(run: Run, state: TrainState, loss: nn.Module) -> None:
    """Let DDP see a backward pass before a run goes on, as it had in the run that was not stopped.

    From the first one it learns in which order gradients come, and packs them so from then on; of more than two ranks
    the sum of a number depends, in its last bits, on where it is packed.
    """
    gradient(run, state, loss)
    state.optimizer.zero_grad()


def examples(run: Run, state: TrainState, mine: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Those of the batch of step `state.step` that are this rank's: w (b, L), t and its weights (b,), the condition."""
    B, seed, step = run.config.batch_size, run.config.seed, state.step
    u = draw(uniform, (seed, Stream.TRAIN, step, 1), mine.start, mine.stop, (), run.device)
    if run.diffusion_config.stratified:  # sentence i from part i: sentences come in random order
        u = (torch.arange(mine.start, mine.stop, device=run.device) + u) / B
    t, weights = state.timestep_sampler.sample(u)
    condition = run.batches.condition(step, mine)
    if condition is not None and run.teacher is None:  # a student's were dropped with the noise that belongs to them
        u = draw(uniform, (seed, Stream.TRAIN, step, 2), mine.start, mine.stop, (), run.device)
        condition = dropped(condition, u < run.model_config.drop_condition)
    return run.batches.batch(step, mine), t, weights, condition


def noise_of(run: Run, step: int, part: slice) -> Noise:
    """The noise of some sentences of the batch of a step; for a student, that to which its teacher followed them."""
    shape = (run.data_config.sequence_len, run.model_config.in_channel)
    noise = Noise.draw((run.config.seed, Stream.TRAIN, step, 0), part.start, part.stop, shape, run.device)
    own = run.batches.noise(step, part)
    return noise if own is None else replace(noise, t=own)


@torch.no_grad()
def goes_on(run: Run, state: TrainState, loss: nn.Module) -> bool:
    """Whether the weights will do for another step: whether the loss of its first micro-batch here is finite."""
    config, mine = run.config, run.ranks.share(run.config.batch_size)
    first = slice(mine.start, min(mine.start + (config.microbatch or config.batch_size), mine.stop))
    input_ids, t, weights, condition = examples(run, state, first)
    noise = noise_of(run, state.step, first)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        terms = loss(input_ids, t, noise, condition)
    return bool(terms.total(weights).isfinite().all())


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over the first steps, times a linear anneal to 0 at the end of the run."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.lr * warm * (1 - step / config.steps)
