"""Controls at work: they follow the denoiser, so that every sampler obeys them.

    x_t -> denoiser -> x_0 --(1) scores--> x_0 --(2) words--> x_0 -> sampler

(1) What is known through a gradient, of a classifier or of any differentiable function. With Tweedie's formula,
E[x_0 | x_t] = (x_t + sigma_t^2 grad log p(x_t)) / alpha_t, so that given c, as p(x_t | c) ~ p(x_t) p(c | x_t),

    E[x_0 | x_t, c] = E[x_0 | x_t] + sigma_t^2 / alpha_t  grad log p(c | x_t)                                  (1)

and the gradients of several controls add up. (2) What is known of the words themselves is closed form (`posterior`):

    E[x_0 | x_t, words accepted] = sum_v p(w_l = v | x_t, accepted) E(v)                                        (2)

At t = 0 the most probable sentence that is accepted is taken, so that demands on words hold without exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from text_diffusion.control.posterior import Accepting
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Denoise

Predict = Callable[[Tensor], Tensor]  # x_t -> x_0 at the present t, differentiable


class Score(Protocol):
    """log p(c | x_t) of something wanted, c."""

    @property
    def strength(self) -> float:
        """By how much its gradient is multiplied."""

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        """(B,), differentiable in x_t (B, L, D), at the times that the network sees (B,)."""


@dataclass(frozen=True)
class Steered:
    """A denoiser that obeys controls; (B, L, D) -> (B, L, D).

    Args:
        denoise: the model's.
        model: knows its words.
        process: what the sampler walks.
        scores: (1).
        accepting: (2), if there are demands on words.
    """

    denoise: Denoise
    model: TransformerNetModel
    process: GaussianDiffusion
    scores: Sequence[Score] = ()
    accepting: Accepting | None = None

    def __call__(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        """Predict x_0 as the controls have it."""
        pred_xstart = self.follow_scores(x_t, t, previous) if self.scores else self.denoise(x_t, t, previous)
        if self.accepting is None:
            return pred_xstart
        log_p = self.model.get_logits(pred_xstart).float().log_softmax(dim=-1)
        if int(t[0]) == 0:
            return self.model.get_embeds(self.accepting.best(log_p))
        return reweighted(pred_xstart, log_p.exp(), self.accepting.posterior(log_p), embeddings(self.model))

    def follow_scores(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        """Eq. (1)."""
        predictions: list[Tensor] = []

        def predict(x: Tensor) -> Tensor:
            if not predictions:  # once for all scores that ask
                predictions.append(self.denoise(x, t, previous))
            return predictions[0]

        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            times = self.process.network_time(t)
            total = torch.stack([s.strength * s.log_prob(x, times, predict) for s in self.scores]).sum()
            gradient = torch.autograd.grad(total, x)[0]
        abar = float(self.process.alphas_cumprod[int(t[0])])
        return predict(x_t).detach().add(gradient, alpha=(1 - abar) / abar**0.5)


def embeddings(model: TransformerNetModel) -> Tensor:
    """E of every word, (V, D)."""
    V = model.word_embedding.num_embeddings
    return model.get_embeds(torch.arange(V, device=model.lm_head.weight.device)[None])[0]


def reweighted(pred_xstart: Tensor, p: Tensor, q: Tensor, embeds: Tensor) -> Tensor:
    """x_0 (B, L, D) when its words are distributed by q rather than p, (B, L, V).

    sum_v q(v) E(v), and what the prediction holds beyond sum_v p(v) E(v), as far as the distributions overlap: where
    q = p nothing changes, where q is one word that p did not expect it is that word.
    """
    overlap = torch.minimum(p, q).sum(dim=-1, keepdim=True)
    return q @ embeds + overlap * (pred_xstart - p @ embeds)
