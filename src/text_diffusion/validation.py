"""How well a model predicts held-out text: fixed sentences, fixed t, fixed noise, no dropout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from text_diffusion.distributed import ALONE, Ranks
from text_diffusion.embedding_health import effective_rank, smallest_angle
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.objectives import OBJECTIVES, Network
from text_diffusion.randomness import Stream
from text_diffusion.timesteps import evenly_spread

SENTENCES = 512  # at most
AT_ONCE = 128


@torch.no_grad()
def validate(
    model: Network,
    diffusion: GaussianDiffusion,
    held_out: Tensor,
    ranks: Ranks = ALONE,
    condition: Tensor | None = None,
    noises: Tensor | None = None,
) -> dict[str, float]:
    """Means of the loss terms over held-out sentences (N, L), the accuracy of rounding x_0, the embeddings' health.

    Every run and every step is asked the same: t covers 0..T-1 evenly, the noise is always the same, and each rank
    asks its share. Of sentences that have noise (N, L, D) of their own, it is that.
    """
    ids = held_out[:SENTENCES]
    t = evenly_spread(len(ids), diffusion.num_timesteps).to(ids.device)
    shape = (ids.shape[1], model.config.in_channel)
    sums: dict[str, float] = {}
    loss = OBJECTIVES[model.config.objective].loss
    mine = ranks.share(len(ids))
    for start in range(mine.start, mine.stop, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, mine.stop))
        noise = Noise.draw((0, Stream.VALIDATION), part.start, part.stop, shape, ids.device)
        noise = noise if noises is None else replace(noise, t=noises[part])
        terms = loss(model, diffusion, ids[part], t[part], noise, None if condition is None else condition[part])
        values = {"loss": terms.total(), **vars(terms)}
        if isinstance(model, TransformerNetModel):
            x_start = diffusion.q_start(model.get_embeds(ids[part])).sample(noise.start)
            right = model.get_logits(x_start).argmax(dim=-1) == ids[part]
            values["rounding_accuracy"] = right.float().mean(dim=1)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    row = {f"val_{name}": total / len(ids) for name, total in ranks.total(sums).items()}
    E = model.embeddings
    health = {"rank": effective_rank(E), "angle": smallest_angle(E)}
    return row | {"embedding_norm": float(E.norm(dim=1).mean()), **{f"embedding_{k}": v for k, v in health.items()}}
