"""Controls at work: they follow the denoiser, so that every sampler obeys them.

    x_t -> denoiser -> x_0 --(1) gradients--> x_0 --(2) words--> x_0 -> sampler

(1) What is wanted, c, has a gradient: a classifier's, any differentiable function's, or that of the probability that
the words are accepted (`posterior`). With Tweedie's formula,
E[x_0 | x_t] = (x_t + sigma_t^2 grad log p(x_t)) / alpha_t, so that given c, as p(x_t | c) ~ p(x_t) p(c | x_t),

    E[x_0 | x_t, c] = E[x_0 | x_t] + sigma_t^2 / alpha_t  grad log p(c | x_t)                                  (1)

and the gradients of several controls add up. (2) What a demand makes of the words themselves is closed form too:

    E[x_0 | x_t, words accepted] = sum_v p(w_l = v | x_t, accepted) E(v)                                        (2)

if positions are independent given x_t. (2) is exact where a demand names the words; what follows for the words around
them only the denoiser knows, and (1) asks it (as reconstruction guidance does for images and videos, Ho et al. 2022,
arXiv 2204.03458). At t = 0 the most probable sentence that is accepted is taken, so that
demands on words hold without exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from text_diffusion.condition import Guided
from text_diffusion.control.posterior import Accepting
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Denoise

# Gradients are followed only where so much of the signal is left: above, sigma_t^2 / alpha_t makes thousands of the
# least error in one, and `heun` hundreds more (guided so, it said the label in 1 % of sentences; from here on in all).
LEAST_SIGNAL = 0.02


def has_signal(process: GaussianDiffusion, s: int) -> bool:
    """Whether gradients are followed at level s."""
    return bool(process.alphas_cumprod[s] >= LEAST_SIGNAL)


Predict = Callable[[], Tensor]  # log p(w_l = v | x_t) at the present t, differentiable


class Score(Protocol):
    """log p(c | x_t) of something wanted, c."""

    @property
    def strength(self) -> float:
        """By how much its gradient is multiplied."""

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        """(B,), differentiable in x_t (B, L, D), at the times that the network sees (B,)."""


@dataclass(frozen=True)
class OfWords:
    """Any differentiable function of log p(w_l = v | x_t), (B, L, V) -> (B,), as a score.

    Raises:
        UserError: in use, if the function gives something else.
    """

    function: Callable[[Tensor], Tensor]
    strength: float = 1.0

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        """The function of the predicted words."""
        score = self.function(predict())
        if not isinstance(score, Tensor) or score.shape != x_t.shape[:1] or not score.requires_grad:
            found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            found += ", detached" if isinstance(score, Tensor) and not score.requires_grad else ""
            raise UserError(
                f"a Scorer's function must give a differentiable tensor of {len(x_t)} numbers, one for each sentence, "
                f"found {found}"
            )
        return score


@dataclass(frozen=True)
class InnerSteps:
    """Follow scores by Diffusion-LM's update of each x_t, instead of by eq. (1) (see `Steered.arrive`).

    Args:
        steps: up the gradient, at each level.
        lr: of Adagrad; with `langevin` in units of the variance of the sampler's own step.
        langevin: with noise, so that x_t is drawn and not only sought; for the sampler `ancestral`.
    """

    steps: int = 3
    lr: float = 0.1
    langevin: bool = False


@dataclass(frozen=True)
class Steered:
    """A denoiser that obeys controls; (B, L, D) -> (B, L, D).

    Args:
        denoise: the model's.
        network: the model with what it is given; knows its words.
        process: what the sampler walks.
        scores: (1).
        accepting: (1) and (2), if there are demands on words.
        update: follow the scores by Diffusion-LM's steps instead of (1).
        noise: draws for level s and inner step k, (B, L, D), for Langevin steps.
        temperature: of the probabilities of words, if the model has them.
    """

    denoise: Denoise
    network: Guided
    process: GaussianDiffusion
    scores: Sequence[Score] = ()
    accepting: Accepting | None = None
    update: InnerSteps | None = None
    noise: Callable[[int, int], Tensor] | None = None
    temperature: float = 1.0

    @property
    def model(self) -> TransformerNetModel:
        """The model alone."""
        return self.network.model

    def __call__(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        """Predict x_0 as the controls have it."""
        s, scores = int(t[0]), self.scores if self.update is None else ()
        words = self.accepting
        if words is not None and s == 0:
            return self.model.get_embeds(words.best(Seen(self, x_t, t, previous).log_p))
        is_followed = has_signal(self.process, s) and (len(scores) > 0 or words is not None)
        if not is_followed:
            seen = Seen(self, x_t, t, previous)
            pred_xstart = seen.pred_xstart
        else:
            seen, gradient = self.gradient(scores, words is not None, x_t, t, previous)
            abar = float(self.process.alphas_cumprod[s])
            pred_xstart = seen.pred_xstart.detach().add(gradient, alpha=(1 - abar) / abar**0.5)
        if words is None:
            return pred_xstart
        p, q, E = seen.log_p.detach().exp(), seen.accepted, self.model.embeddings
        if is_followed:  # what (1) says of a word at its own position is in (2) again
            pred_xstart = pred_xstart - (q - p) @ E
        return reweighted(pred_xstart, p, q, E)

    def gradient(
        self, scores: Sequence[Score], words: bool, x_t: Tensor, t: Tensor, previous: Tensor | None
    ) -> tuple[Seen, Tensor]:
        """The sum of the gradients at x_t of scores, and of log Z if `words`, and what was seen of x_t on the way."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            seen, times = Seen(self, x, t, previous), self.process.network_time(t)
            total = 0 * x.sum()
            for score in scores:
                total = total + (score.strength * score.log_prob(x, times, lambda: seen.log_p)).sum()
            if words:
                total = total + (seen.accepted * seen.log_p).sum()  # d log Z / d log p
            (gradient,) = torch.autograd.grad(total, x)
        if not gradient.isfinite().all():
            raise UserError(
                f"expected a finite gradient of what is wanted, found none at t {self.process.timesteps[int(t[0])]}; "
                "lower the strength, or look at the scorer, or at whether the model's weights are finite"
            )
        return seen, gradient

    def arrive(self, x_s: Tensor, mean: Tensor, s: int) -> Tensor:
        """Diffusion-LM's update of x_s ~ N(mean, Sigma) (arXiv 2205.14217, section 5.1).

        Some steps up log p(c | x_s) - || x_s - mean ||^2 / (2 Sigma): by Adagrad, or Langevin's, which draw x_s from
        p(x_s | x_t, c) instead of looking for the most probable one.
        """
        if self.update is None or not self.scores or not has_signal(self.process, s) or s == 0:
            return x_s
        t = torch.full((len(x_s),), s, device=x_s.device)
        variance = float(self.process.posterior_variance[s + 1])
        squares = torch.zeros_like(x_s)
        for k in range(self.update.steps):
            uphill = self.gradient(self.scores, False, x_s, t, None)[1] - (x_s - mean) / variance
            if self.noise is not None:
                x_s = x_s + self.update.lr * variance * uphill
                x_s = x_s + (2 * self.update.lr * variance) ** 0.5 * self.noise(s, k)
            else:
                squares += uphill**2
                x_s = x_s + self.update.lr * uphill / (squares.sqrt() + 1e-10)
        return x_s


class Seen:
    """What the network makes of x_t, differentiable, each thing once."""

    def __init__(self, steered: Steered, x_t: Tensor, t: Tensor, previous: Tensor | None) -> None:
        self.steered, self.given = steered, (x_t, t, previous)

    @cached_property
    def pred_xstart(self) -> Tensor:
        """x_0, (B, L, D)."""
        return self.steered.denoise(*self.given)

    @cached_property
    def log_p(self) -> Tensor:
        """log p(w_l = v | x_t), (B, L, V): the model's own, or as its head reads the prediction."""
        model, (x_t, t, previous) = self.steered.model, self.given
        if isinstance(model, WordDenoiser):  # its head reads words at the smallest noise, not means of several
            log_p = self.steered.network.log_probs(x_t, self.steered.process.network_time(t), previous)
            return (log_p / self.steered.temperature).log_softmax(dim=-1)
        return model.get_logits(self.pred_xstart).float().log_softmax(dim=-1)

    @cached_property
    def accepted(self) -> Tensor:
        """p(w_l = v | x_t, accepted), (B, L, V), without a gradient."""
        assert self.steered.accepting is not None, "asked for where there are demands on words"
        return self.steered.accepting.posterior(self.log_p.detach())


def reweighted(pred_xstart: Tensor, p: Tensor, q: Tensor, embeds: Tensor) -> Tensor:
    """x_0 (B, L, D) when its words are distributed by q rather than p, (B, L, V).

    sum_v q(v) E(v), and what the prediction holds beyond sum_v p(v) E(v), as far as the distributions overlap: where
    q = p nothing changes, where q is one word that p did not expect it is that word.
    """
    overlap = torch.minimum(p, q).sum(dim=-1, keepdim=True)
    return q @ embeds + overlap * (pred_xstart - p @ embeds)
