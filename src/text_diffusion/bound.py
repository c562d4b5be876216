"""A bound on how many bits the sampler needs for a sentence: -log P(w) of the walk from noise to words, term by term.

A process that ends in x_0 and a decoder make a distribution P(w), which sums to one over all w of L tokens, pads
included. The decoder is the tied head at the last prediction of x_0, one word a position (the samplers take its most
probable word, here it is drawn):

    p(w | x_0) = prod_l softmax(lm_head(xhat_0))_{l, w_l}                                                      (1)

The process is ancestral sampling in S kept steps, as `samplers.ancestral` does it:

    x_{S-1} ~ N(0, I),   x_{s-1} ~ p(x_{s-1} | x_s) = N(mu_s(x_s, xhat_s), sigma_s^2 I),   s = S-1 .. 1          (2)
    xhat_s = f(x_s, t_s, xhat_{s+1})         (self-conditioned on the step before, xhat_S = 0; or without; or, with
                                              fresh estimates, f(x_s, t_s, f(x_s, t_s, none)): two calls a step)

    -log P(w) <= E_q [ KL(q(x_{S-1} | w) || N(0, I))                                                    prior
                       + sum_s KL(q(x_{s-1} | x_s, w) || p(x_{s-1} | x_s))                              kl
                       - log p(w | x_0) ]                                                               reconstruction

(DDPM, arXiv 2006.11239, eq. 5; Diffusion-LM, arXiv 2205.14217, eq. 1.) sigma_s^2 is the posterior's variance, which
is 0 nowhere in (2). Self-conditioned on the step before, xhat_s depends on all of x_s .. x_{S-1}: p is no longer
Markov, but still a product of normalised conditionals, and the bound holds as long as whole paths are drawn from q,
which is what is done.

It holds for any q. Ours is the forward process of training given the words, with the small noise of w -> x_start
(variance v) integrated out, down to a step called the handover:

    q(x_s | w) = N(sqrt(abar_s) E(w), v_s I),   v_s = 1 - abar_s (1 - v)                                       (3)
    q(x_{s-1} | x_s, w) = N((sqrt(abar_{s-1}) beta_s E(w) + sqrt(1 - beta_s) v_{s-1} x_s) / v_s, v_{s-1} beta_s / v_s I)

and p itself from there on: once the words are settled in x_s, to prescribe what is left to draw has nothing to do with
them, and costs all that p knows less precisely than q. With K paths, -log mean_k p(w, path_k) / q(path_k | w) is a
tighter bound (Burda et al. 2016, arXiv 1509.00519).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Denoise, NoiseSource

MISREAD = 3e-4  # words a sentence
Decoder = Callable[[Tensor], Tensor]  # xhat_0 (B, L, D) -> log p(w | x_0) of the sentences at hand (B,)


def log_decoder(model: TransformerNetModel, input_ids: Tensor, xhat: Tensor) -> Tensor:
    """log p(w | x_0), eq. (1): ids (B, L), xhat (B, L, D) -> (B,)."""
    log_p = model.get_logits(xhat).float().log_softmax(dim=-1)
    return log_p.gather(2, input_ids[:, :, None]).flatten(1).sum(dim=1)


class Posterior:
    """q of eq. (3): the forward process seen from the words.

    Args:
        process: S kept steps.
        start_variance: v, that of q(x_start | w).
    """

    def __init__(self, process: GaussianDiffusion, start_variance: float) -> None:
        abar = process.alphas_cumprod  # (S,)
        self.abar, self.v = abar, 1 - abar * (1 - start_variance)
        alpha = abar[1:] / abar[:-1]
        none = [np.nan]  # nothing comes before x_0
        self.coef_words = np.concatenate([none, np.sqrt(abar[:-1]) * (1 - alpha) / self.v[1:]])
        self.coef_x = np.concatenate([none, np.sqrt(alpha) * self.v[:-1] / self.v[1:]])
        self.variance = np.concatenate([none, self.v[:-1] * (1 - alpha) / self.v[1:]])

    def marginal(self, x_start_mean: Tensor, s: int) -> Gaussian:
        """q(x_s | w), from E(w) (B, L, D)."""
        return Gaussian(math.sqrt(self.abar[s]) * x_start_mean, _variance(self.v[s], x_start_mean))

    def step(self, x_start_mean: Tensor, x_s: Tensor, s: int) -> Gaussian:
        """q(x_{s-1} | x_s, w), s >= 1."""
        mean = float(self.coef_words[s]) * x_start_mean + float(self.coef_x[s]) * x_s
        return Gaussian(mean, _variance(self.variance[s], x_s))


@dataclass(frozen=True)
class Drawn:
    """One x_s of a walk: the distributions that q and p draw it from, and the prediction made from it."""

    s: int
    x: Tensor  # (B, L, D)
    xhat: Tensor  # (B, L, D)
    q: Gaussian
    p: Gaussian


def walk(
    denoise: Denoise,
    process: GaussianDiffusion,
    posterior: Posterior,
    x_start_mean: Tensor,
    noise: NoiseSource,
    handover: int = 0,
) -> Iterator[Drawn]:
    """Draw x_{S-1} .. x_0 ~ q(. | w), with p beside it, eq. (2).

    Args:
        denoise: predicts x_0 from (x_s, s, its own last prediction).
        process: S kept steps.
        posterior: q.
        x_start_mean: E(w), (B, L, D).
        noise: of s, standard normal draws (B, L, D).
        handover: the last s whose x_s is drawn knowing w; from there on q is p.
    """
    q = posterior.marginal(x_start_mean, process.num_timesteps - 1)
    p = Gaussian(torch.zeros_like(x_start_mean), torch.ones_like(q.variance))
    xhat = None
    for s in reversed(range(process.num_timesteps)):
        x = q.sample(noise(s))
        t = torch.full((len(x),), s, device=x.device)
        xhat = denoise(x, t, xhat)
        yield Drawn(s, x, xhat, q, p)
        if s > 0:
            p = process.p_mean_variance(xhat, x, t)
            q = posterior.step(x_start_mean, x, s) if s > handover else p


@dataclass(frozen=True)
class PathTerms:
    """The terms of the bound along one path for each sentence, in nats, and the path's importance weight."""

    reconstruction: Tensor  # (B,)
    kl: Tensor  # (B, S): of x_0 .. x_{S-1}, the last of which is the prior's
    log_weight: Tensor  # (B,): log p(w, path) / q(path | w), whose mean is minus the sum of the terms'


@torch.no_grad()
def path_terms(drawn: Iterator[Drawn], decoder: Decoder) -> PathTerms:
    """Compare q and p along a walk.

    The mean of -log_weight is the bound, as is that of the terms, but it varies less: with a p that is right it is
    log P(w) on every path, while what one step costs more the next costs less.
    """
    terms, log_weight = [], torch.zeros(())
    for step in drawn:
        terms.append(kl(step.q, step.p))
        log_weight = log_weight.to(step.x.device) + log_ratio(step.p, step.q, step.x)
    log_p_words = decoder(step.xhat)
    return PathTerms(-log_p_words, torch.stack(terms[::-1], dim=1), log_weight + log_p_words)


@torch.no_grad()
def handover_for(posterior: Posterior, embeddings: Tensor, input_ids: Tensor) -> int:
    """A good handover for these sentences: the last s at which x_s still tells their words, MISREAD a sentence aside.

    A word u is misread from x_s as v, nearer to it, with probability Phi(-sqrt(abar_s) |E(u) - E(v)| / (2 sqrt(v_s))):
    so often would p, not knowing w, lose the word for good. Later, nothing is lost, but the terms of small noise, which
    are the largest, must be paid. The bound holds whatever is chosen here.

    Args:
        posterior: q.
        embeddings: E, (V, D).
        input_ids: the sentences, (N, L).
    """
    counts = torch.bincount(input_ids.flatten(), minlength=len(embeddings))
    words = counts.nonzero()  # (U, 1)
    distances = torch.cdist(embeddings[words[:, 0]], embeddings).scatter_(1, words, math.inf)  # (U, V)

    def misread(s: int) -> float:
        half = distances * (math.sqrt(posterior.abar[s] / posterior.v[s]) / 2)
        return float(torch.special.ndtr(-half).sum(dim=1) @ counts[words[:, 0]].to(half.dtype)) / len(input_ids)

    return bisect_left(range(1, len(posterior.abar)), True, key=lambda s: misread(s) > MISREAD)


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats, summed over positions and entries, (B,)."""
    d = q.variance / p.variance - 1
    excess = (q.mean - p.mean).square() / p.variance
    return 0.5 * (excess + (d - d.log1p())).flatten(1).sum(dim=1)  # log1p: d is tiny, and there are many steps


def log_ratio(p: Gaussian, q: Gaussian, x: Tensor) -> Tensor:
    """log p(x) / q(x) in nats, summed over positions and entries, (B,)."""
    gap = (x - q.mean).square() / q.variance - (x - p.mean).square() / p.variance
    return 0.5 * (gap + (q.variance / p.variance).log()).flatten(1).sum(dim=1)


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean of weights over the paths, (K, B) -> (B,)."""
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))


def _variance(value: float, x: Tensor) -> Tensor:
    """A number as (1, 1, 1), beside x."""
    return torch.full((1, 1, 1), value, dtype=x.dtype, device=x.device)
